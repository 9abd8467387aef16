"""Estimates what payloads will take from a sample of their chunks, which are coded as they would be.

Chunks that ought to be alike form a stratum: those of tensors whose names differ in numbers only, that are of
one dtype and compared with the like. A few chunks of each are coded first. Those that vary most then get the
rest of the sample.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple, TypeAlias

import numpy as np

from .. import codec
from ..checkpoint import Checkpoint, Tensor, tensors_of
from ..match.candidates import fold
from ..match.names import Match
from ..payload import CHUNK_BYTES, ChunkPlan
from ..storage import Span
from ..workers import Buffers, Workers
from .encoding import ChunkRow, encode_rows

#: Bytes of the target that are coded: enough for an error of a few percent, and done in seconds. Over a
#: network, where they have to be fetched, less.
SAMPLE_BYTES, REMOTE_SAMPLE_BYTES = 160 << 20, 96 << 20

#: Strata of their own, for the largest; what is left is put together by dtype.
_MAX_STRATA = 32

#: Chunks of each stratum that are coded first, or more where they are small, up to so many.
_FIRST, _FIRST_SMALL = 5, 16

#: Most chunks that are coded: small ones have few bytes, but each takes its time.
_MAX_CHUNKS = 1024

#: Runs of bytes at which a tensor is compared with its base, to tell those that did not change.
_GLANCES, _GLANCE_BYTES = 2, 4096

#: The error that is stated is so many standard deviations; where one chunk says nothing of how much they
#: vary, that is taken to be half of what it takes.
_DEVIATIONS, _UNKNOWN = 2.0, 0.5

#: The part of a chunk's length that is added to its deviation, to choose what is coded next: where the first
#: few chunks equal the base, others may not.
_DOUBT = 0.01

#: The golden section, in units of 2**-64.
_GOLDEN = 0x9E3779B97F4A7C15


class EstimatedPayload(NamedTuple):
    """What a tensor's payload will take: ``nbytes``, give or take ``error``, and how many elements
    ``changed``. ``is_same``: nothing in the sample differs from the base."""

    nbytes: int
    error: float
    changed: int
    is_same: bool


class PayloadEstimates(NamedTuple):
    """Estimates for tensors in their order; the error of their sum, and the bytes of the target that were
    coded for it."""

    payloads: list[EstimatedPayload]
    error: float
    sampled_bytes: int


def estimate_payloads(
    old: Checkpoint,
    new: Checkpoint,
    matches: Sequence[Match],
    workers: Workers,
    *,
    sample_bytes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> PayloadEstimates:
    """What the payloads of all matches will take.

    The same sample is taken every time.

    Args:
        old, new: the checkpoints of the matches.
        sample_bytes: about how many bytes of the target to code; if None, :data:`SAMPLE_BYTES`, or
            :data:`REMOTE_SAMPLE_BYTES`.
        chunk_bytes: as for :func:`make_delta`.
    """
    is_remote = old.source.is_remote or new.source.is_remote
    if sample_bytes is None:
        sample_bytes = REMOTE_SAMPLE_BYTES if is_remote else SAMPLE_BYTES
    sampler = _Sampler(old, new, workers)
    strata = _strata(matches, chunk_bytes, look=not is_remote)
    sampler.take([(stratum, stratum.first(is_remote)) for stratum in strata])
    sampler.take(_allotted(strata, sample_bytes))
    sums = [_Sum() for _ in matches]
    for stratum in strata:
        stratum.add_to(sums)
    payloads = [one.payload(match, chunk_bytes) for one, match in zip(sums, matches, strict=True)]
    error = math.sqrt(sum(stratum.error**2 for stratum in strata))
    return PayloadEstimates(payloads, error, sum(stratum.sampled_bytes for stratum in strata))


#: See :func:`kind_of`.
KindOfTensor: TypeAlias = tuple[str, str, tuple[str, ...]]


def kind_of(match: Match) -> KindOfTensor:
    """What tensors of one kind have in common: the name without its numbers, the dtype, and the names,
    likewise, of what they are compared with."""
    others: Sequence[Tensor] = ()
    if match.like:
        others = [match.like]
    elif match.base and match.shared_bytes:
        others = list(tensors_of(match.base))
    names = tuple(dict.fromkeys(fold(other.name) for other in others))
    return fold(match.target.name), match.target.dtype, names


@dataclass(frozen=True, slots=True)
class _Part:
    """The chunks of a tensor that have a base, or those that have none. ``number`` is the match's."""

    number: int
    match: Match
    plan: ChunkPlan
    has_base: bool

    @property
    def first(self) -> int:
        return 0 if self.has_base else self.plan.shared_count

    @property
    def count(self) -> int:
        return self.plan.shared_count if self.has_base else self.plan.count - self.plan.shared_count

    @property
    def nbytes(self) -> int:
        return self.plan.shared if self.has_base else self.plan.nbytes - self.plan.shared


class _Coded(NamedTuple):
    """A chunk of the sample: its bytes, those that it was coded as, its changed elements, and whether
    nothing differs from the base."""

    nbytes: int
    data_bytes: int
    changed: int
    is_same: bool


class _Stratum:
    """Chunks that ought to be alike, and those of them that were coded."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)
        self.count = sum(part.count for part in parts)
        self.coded: list[_Coded] = []
        self._ends = list(accumulate(part.count for part in parts))
        self._order = _spread(self.count)

    def first(self, is_remote: bool) -> int:
        """How many chunks to code before anything is known of them."""
        small = 0 if is_remote else min(_FIRST_SMALL, CHUNK_BYTES // self.mean_bytes)
        return min(self.count, max(_FIRST, small))

    @property
    def mean_bytes(self) -> int:
        """The bytes of a chunk, on average."""
        return max(1, self.nbytes // self.count)

    def rows(self, count: int) -> Iterator[ChunkRow]:
        """So many of the chunks that were not coded yet."""
        for index in islice(self._order, count):
            number = bisect_right(self._ends, index)
            part = self.parts[number]
            chunk = part.first + index - (self._ends[number] - part.count)
            yield ChunkRow(part.match, part.plan, chunk, chunk + 1)

    @property
    def sampled_bytes(self) -> int:
        return sum(one.nbytes for one in self.coded)

    @property
    def deviation(self) -> float:
        """How far, in bytes, what a chunk is coded as lies from what its length lets one expect."""
        if len(self.coded) < 2:
            return _UNKNOWN * sum(one.data_bytes for one in self.coded)
        rate = self._rate(one.data_bytes for one in self.coded)
        squares = sum((one.data_bytes - rate * one.nbytes) ** 2 for one in self.coded)
        return math.sqrt(squares / (len(self.coded) - 1))

    @property
    def error(self) -> float:
        """Of the estimate for all of its chunks; none where all were coded."""
        count = len(self.coded)
        left = 1 - count / self.count
        return _DEVIATIONS * self.count * self.deviation * math.sqrt(left / count)

    def _rate(self, counts: Iterable[int]) -> float:
        """Counts of all coded chunks, for each of their bytes."""
        return sum(counts) / self.sampled_bytes

    def add_to(self, sums: Sequence[_Sum]) -> None:
        """Add what the chunks are likely to take to the sums of their tensors."""
        data = self._rate(one.data_bytes for one in self.coded)
        changed = self._rate(one.changed for one in self.coded)
        error = self.error / self.nbytes
        is_same = all(one.is_same for one in self.coded)
        for part in self.parts:
            one = sums[part.number]
            one.data += data * part.nbytes
            one.error += error * part.nbytes
            one.changed += changed * part.nbytes
            one.is_same = one.is_same and is_same


class _Sum:
    """What the chunks of one tensor are likely to take."""

    def __init__(self) -> None:
        self.data = self.error = self.changed = 0.0
        self.is_same = True

    def payload(self, match: Match, chunk_bytes: int) -> EstimatedPayload:
        if match.like:
            return EstimatedPayload(0, 0.0, 0, is_same=False)
        plan = ChunkPlan(match.target.nbytes, match.shared_bytes, chunk_bytes)
        stored = len(match.prediction.stored) if match.prediction else 0
        nbytes = stored + plan.count * codec.RECORD.itemsize + round(self.data)
        is_same = self.is_same and plan.shared == plan.nbytes
        return EstimatedPayload(nbytes, self.error, round(self.changed), is_same)


class _Sampler:
    """Codes chunks of strata."""

    def __init__(self, old: Checkpoint, new: Checkpoint, workers: Workers) -> None:
        self._old = old
        self._new = new
        self._workers = workers
        self._buffers = Buffers(CHUNK_BYTES)

    def take(self, wanted: Sequence[tuple[_Stratum, int]]) -> None:
        """Code so many chunks of each stratum."""
        chosen = [(stratum, row) for stratum, count in wanted for row in stratum.rows(count)]
        chosen.sort(key=lambda one: _target_span(one[1]))
        rows = [row for _, row in chosen]
        targets = (_target_span(row) for row in rows)
        bases = (span for row in rows for span in row.base_spans)
        with self._old.source.expect(bases), self._new.source.expect(targets):
            for (stratum, _), coded in zip(chosen, self._workers.map(self._code, rows), strict=True):
                stratum.coded.append(coded)

    def _code(self, row: ChunkRow) -> _Coded:
        batch = encode_rows([row], self._buffers)
        self._buffers.give(batch.target)
        self._buffers.give(batch.base)
        (chunk,) = batch.chunks
        is_same = row.has_base and not chunk.method
        return _Coded(row.nbytes, len(chunk.data), chunk.changed, is_same)


def _target_span(row: ChunkRow) -> Span:
    return row.match.target.span(*row.plan.bounds(row.first, row.end))


def _strata(matches: Sequence[Match], chunk_bytes: int, *, look: bool) -> list[_Stratum]:
    """All chunks that will be coded, in strata. ``look`` at each tensor, whether it is its base's."""
    kinds: dict[tuple[KindOfTensor, bool, bool], list[_Part]] = {}
    for number, match in enumerate(matches):
        if match.like:
            continue
        plan = ChunkPlan(match.target.nbytes, match.shared_bytes, chunk_bytes)
        looks_same = look and _looks_same(match)
        for has_base in (True, False):
            part = _Part(number, match, plan, has_base)
            if part.count:
                kinds.setdefault((kind_of(match), has_base, looks_same), []).append(part)
    by_size = sorted(kinds.items(), key=lambda kind: -sum(part.nbytes for part in kind[1]))
    pooled: dict[tuple[KindOfTensor, bool, bool], list[_Part]] = {}
    for rank, (((name, dtype, others), *rest), parts) in enumerate(by_size):
        kind = (name, dtype, others) if rank < _MAX_STRATA else ("", dtype, ())
        pooled.setdefault((kind, rest[0], rest[1]), []).extend(parts)
    return [_Stratum(parts) for parts in pooled.values()]


def _looks_same(match: Match) -> bool:
    """Whether a few short runs are those of the base. A transposed base is not looked at: that would read
    most of it."""
    if not match.shared_bytes or not isinstance(match.base, Tensor):
        return False
    for k in range(_GLANCES):
        start = (match.shared_bytes * (2 * k + 1) // (2 * _GLANCES)) // 64 * 64
        end = min(start + _GLANCE_BYTES, match.shared_bytes)
        if not np.array_equal(match.read(start, end), match.compared(match.read_base(start, end), start)):
            return False
    return True


def _spread(count: int) -> Iterator[int]:
    """All numbers below ``count``, so that the first few, however many, lie all over, and not at the same
    places of tensors of one length: each step is the golden section of the whole."""
    seen = set[int]()
    for k in range(2 * count):
        index = ((k * _GOLDEN + (1 << 63)) % (1 << 64)) * count >> 64
        if index not in seen:
            seen.add(index)
            yield index
    yield from (index for index in range(count) if index not in seen)


def _allotted(strata: Sequence[_Stratum], sample_bytes: int) -> list[tuple[_Stratum, int]]:
    """How many more chunks of each stratum to code: the more, the more its chunks vary in all."""
    taken = sum(len(stratum.coded) for stratum in strata)
    room = max(0, sample_bytes - sum(stratum.sampled_bytes for stratum in strata))
    weights = [stratum.count * (stratum.deviation + _DOUBT * stratum.mean_bytes) for stratum in strata]
    cost = sum(w * stratum.mean_bytes for w, stratum in zip(weights, strata, strict=True))
    scale = min(room / cost, max(0, _MAX_CHUNKS - taken) / sum(weights)) if cost else 0.0
    return [
        (stratum, min(round(weight * scale), stratum.count - len(stratum.coded)))
        for stratum, weight in zip(strata, weights, strict=True)
    ]
