"""Base and target to an estimate of what their delta will take, in seconds, from a sample.

Everything that is small is made as ``diff`` would make it: matches, headers, manifest, license texts.
Payloads and large files are extrapolated (:mod:`.delta.sampling`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from . import codec
from ._version import __version__
from .changes import PICTURE_NAME, delta_picture
from .changes.grid import shared_elements
from .checkpoint import Checkpoint, Shard
from .delta.entry import entry_of, removed_entries
from .delta.sampling import (
    EstimatedPayload,
    KindOfTensor,
    PayloadEstimates,
    estimate_payloads,
    kind_of,
)
from .delta.shards import shard_header, shard_metadata
from .delta.writer import compression_level, most_compressed
from .entries import STATUSES, Status, TensorEntry
from .inputs import CheckpointFacts, facts_of, match_inputs, open_base, open_target
from .license import rules
from .manifest import BaseRecord, FileRecord, Manifest, TargetFile, TargetRecord, Tool
from .match.duplicates import find_duplicates
from .match.low_rank import with_low_rank
from .match.names import Match, RenameRule
from .match.quantized import find_quantized
from .payload import CHUNK_BYTES, WrittenPayload
from .storage import Readable, Source, Span
from .workers import Workers

_log = logging.getLogger(__name__)

#: Files beside the weights are compressed whole up to this size, and so many bytes of all; of others,
#: and to compare them with the base's, some blocks are read.
_WHOLE_BYTES, _ALL_BYTES = 4 << 20, 64 << 20
_BLOCKS, _BLOCK_BYTES = 8, 256 << 10

#: Kinds of tensors in which a merged adapter is looked for, the largest ones.
_MERGED_KINDS = 24

#: Stands for a SHA-256 that is not known before everything is read.
_DIGEST = 64 * "0"


@dataclass(frozen=True, slots=True)
class EstimatedTensors:
    """Tensors of the target whose names differ in numbers only, of one dtype and status.

    Attributes:
        name: their name, with ``*`` for numbers.
        count: how many there are.
        dtype: their dtype's safetensors code.
        status: as the delta will give it, as far as the sample tells.
        compared_with: the names, with ``*`` for numbers, of the base tensors that they are compared with; of
            a duplicate, of the tensor that it is equal to. Empty for those that are coded without a base.
        nbytes: their size.
        delta_bytes: what they are likely to take in the delta.
        low, high: the range in which that is likely to lie.
        changed_fraction: the part of their elements that differ from the base; None where none has one.
    """

    name: str
    count: int
    dtype: str
    status: Status
    compared_with: tuple[str, ...]
    nbytes: int
    delta_bytes: int
    low: int
    high: int
    changed_fraction: float | None


@dataclass(frozen=True, slots=True)
class DeltaEstimate:
    """What :func:`make_delta` is likely to write.

    Attributes:
        target_bytes: the target's size.
        delta_bytes: the delta's likely size (without the model card).
        low, high: the range in which that size is likely to lie.
        ratio: of ``delta_bytes`` to ``target_bytes``.
        counts: how many tensors have each status, as far as the sample tells; those that none has are absent.
        tensors: all tensors of the target, by kind, the largest payloads first.
        other_bytes: the part of ``delta_bytes`` that is no payload: files beside the weights, license texts,
            headers, the manifest.
        sampled_bytes: bytes of the target's tensors that were coded for the estimate.
    """

    target_bytes: int
    delta_bytes: int
    low: int
    high: int
    ratio: float
    counts: dict[Status, int]
    tensors: tuple[EstimatedTensors, ...]
    other_bytes: int
    sampled_bytes: int

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON."""
        return asdict(self)


def estimate_delta(
    base: Readable,
    target: Readable,
    *,
    rename: Sequence[RenameRule] = (),
    exclude: Sequence[str] = (),
    sample_bytes: int | None = None,
    threads: int | None = None,
) -> DeltaEstimate:
    """Estimate what :func:`make_delta` would write with the same arguments. Writes nothing.

    Tensors are matched as :func:`make_delta` matches them. A sample of their chunks is coded, and the rest is
    extrapolated, by kind of tensor. The same files give the same estimate. What is odd is logged as there.

    Args:
        base, target, rename, exclude, threads: as for :func:`make_delta`.
        sample_bytes: about how many bytes of the target's tensors to code; if None, 160 MiB, or 96 MiB where
            base or target is on the Hub. There, equal tensors of the target are not looked for.

    Raises:
        CheckpointError: a checkpoint cannot be found or read.
    """
    with open_base(base) as old, open_target(target, exclude) as new, Workers(threads) as workers:
        for source in (old.source, new.source):
            workers.at_stop(source.cancel)
        _log.info("estimating the delta from %s to %s", old.source.where, new.source.where)
        sides = facts_of(old, "base"), facts_of(new, "target")
        matches = find_quantized(match_inputs(old, new, *sides, rename), old, new)
        if not new.source.is_remote:
            matches = find_duplicates(new, matches, CHUNK_BYTES, workers, sampled=True)
        sampled = matches
        if not (old.source.is_remote or new.source.is_remote):
            sampled = _as_merged(matches, workers)
        found = estimate_payloads(old, new, sampled, workers, sample_bytes=sample_bytes)
        matches = [
            replace(match, prediction=one.prediction) for match, one in zip(matches, sampled, strict=True)
        ]
        entries = [
            entry_of(match, _written(payload), old)
            for match, payload in zip(matches, found.payloads, strict=True)
        ]
        manifest = _manifest(old, new, sides, [*entries, *removed_entries(old, matches)])
        _log.info("coded %d bytes", found.sampled_bytes)
        return _estimate(manifest, matches, entries, found)


def _as_merged(matches: Sequence[Match], workers: Workers) -> list[Match]:
    """The matches as they are to be sampled: where an adapter seems to be merged into all tensors of a kind,
    one of these stands for the others, since finding each one's factors would take as long as the diff."""
    kinds: dict[tuple[KindOfTensor, tuple[int, ...]], list[int]] = {}
    for number, match in enumerate(matches):
        if not match.like:
            kinds.setdefault((kind_of(match), match.target.info.shape), []).append(number)
    largest = sorted(kinds.values(), key=lambda numbers: -sum(matches[n].target.nbytes for n in numbers))
    searched = [numbers[len(numbers) // 2] for numbers in largest[:_MERGED_KINDS]]
    found = workers.map(lambda number: with_low_rank(matches[number], "default"), searched)
    sampled = list(matches)
    for numbers, one in zip(largest, found, strict=False):
        if one.prediction and one.prediction.rank:
            for number in numbers:
                sampled[number] = one
    return sampled


def _written(payload: EstimatedPayload) -> WrittenPayload:
    """An estimate as if it were a payload in a file."""
    return WrittenPayload(0, payload.nbytes, payload.changed, np.empty(0, codec.RECORD), payload.is_same)


def _estimate(
    manifest: Manifest, matches: Sequence[Match], entries: Sequence[TensorEntry], found: PayloadEstimates
) -> DeltaEstimate:
    counts = Counter(entry.status for entry in manifest.tensors)
    target_bytes, delta_bytes = manifest.target_bytes, manifest.delta_bytes
    payload_bytes = sum(payload.nbytes for payload in found.payloads)
    other_bytes = delta_bytes - payload_bytes
    low, high = _range(payload_bytes, found.error)
    return DeltaEstimate(
        target_bytes=target_bytes,
        delta_bytes=delta_bytes,
        low=other_bytes + low,
        high=other_bytes + high,
        ratio=delta_bytes / max(1, target_bytes),
        counts={status: counts[status] for status in STATUSES if counts[status]},
        tensors=_by_kind(matches, entries, found.payloads),
        other_bytes=other_bytes,
        sampled_bytes=found.sampled_bytes,
    )


def _range(nbytes: int, error: float) -> tuple[int, int]:
    return max(0, round(nbytes - error)), round(nbytes + error)


def _by_kind(
    matches: Sequence[Match], entries: Sequence[TensorEntry], payloads: Sequence[EstimatedPayload]
) -> tuple[EstimatedTensors, ...]:
    kinds: dict[object, list[int]] = {}
    for number, (match, entry) in enumerate(zip(matches, entries, strict=True)):
        kinds.setdefault((kind_of(match), entry.status), []).append(number)
    found = []
    for numbers in kinds.values():
        name, dtype, others = kind_of(matches[numbers[0]])
        some = [entries[number] for number in numbers]
        delta_bytes = sum(entry.payload_bytes for entry in some)
        low, high = _range(delta_bytes, sum(payloads[number].error for number in numbers))
        elements = sum(map(shared_elements, some))
        found.append(
            EstimatedTensors(
                name=name if len(some) > 1 else some[0].name,
                count=len(some),
                dtype=dtype,
                status=some[0].status,
                compared_with=others,
                nbytes=sum(matches[number].target.nbytes for number in numbers),
                delta_bytes=delta_bytes,
                low=low,
                high=high,
                changed_fraction=sum(entry.changed for entry in some) / elements if elements else None,
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.delta_bytes, one.name)))


# What is small, and other files --------------------------------------------------------------------------


def _manifest(
    old: Checkpoint,
    new: Checkpoint,
    sides: tuple[CheckpointFacts, CheckpointFacts],
    entries: Sequence[TensorEntry],
) -> Manifest:
    """The delta's manifest, but for digests, and with sizes as estimated."""
    base, target = sides
    target_files, files = _Files(old, new).all(entries)
    base_files = tuple(FileRecord(path, size, _DIGEST) for path, size in old.source.sizes.items())
    base_record = BaseRecord(base.repo_id, base.revision, base.license.license, base_files)
    target_record = TargetRecord(
        target.repo_id, target.revision, target.license.license, target_files, new.source.left_out
    )
    texts = base.license.texts | target.license.texts
    conflicts = base.license.conflicts + target.license.conflicts
    whole = rules.combine(base_record, target_record, conflicts, target.license.base_models)
    if whole:
        texts[rules.NOTICE_NAME] = rules.notice_text(base_record, target_record)
    if picture := delta_picture(entries):
        texts[PICTURE_NAME] = picture
    files += (FileRecord(path, len(text), _DIGEST) for path, text in texts.items())
    return Manifest(
        base=base_record,
        target=target_record,
        license=whole,
        tensors=tuple(entries),
        files=tuple(files),
        tool=Tool("deltaweights", __version__),
        chunk_bytes=CHUNK_BYTES,
    )


class _Files:
    """The target's files, as they will be stored."""

    def __init__(self, old: Checkpoint, new: Checkpoint) -> None:
        self._old = old
        self._new = new
        self._left = _ALL_BYTES
        self._by_size: dict[int, list[str]] = {}
        for path, size in old.source.sizes.items():
            self._by_size.setdefault(size, []).append(path)

    def all(self, entries: Sequence[TensorEntry]) -> tuple[tuple[TargetFile, ...], list[FileRecord]]:
        """The target's files, and the delta's."""
        stored, files = [], []
        payloads = Counter[str]()
        for entry in entries:
            payloads[entry.file or ""] += entry.payload_bytes
        count = len(self._new.shards)
        for number, (path, shard) in enumerate(self._new.shards.items(), 1):
            name = f"delta-{number:05d}-of-{count:05d}.safetensors"
            stored.append(TargetFile(path, shard.file.size, _DIGEST, "tensors", name))
            files.append(FileRecord(name, _header_bytes(shard) + payloads[path], _DIGEST))
        for path in self._new.other_files:
            one, size = self._other(path)
            stored.append(one)
            if one.stored != "base":
                files.append(FileRecord(one.source, size, _DIGEST))
        return tuple(stored), files

    def _other(self, path: str) -> tuple[TargetFile, int]:
        """A file beside the weights, and what it takes in the delta."""
        size = self._new.source.sizes[path]
        for other in sorted(self._by_size.get(size, ()), key=lambda other: other != path):
            if self._is_equal(path, other, size):
                return TargetFile(path, size, _DIGEST, "base", other), 0
        level = compression_level(size)
        packed = size if level is None else self._packed(path, size, level)
        if level is not None and packed <= most_compressed(size):
            return TargetFile(path, size, _DIGEST, "zstd", f"files/{path}.zst"), packed
        return TargetFile(path, size, _DIGEST, "verbatim", f"files/{path}"), size

    def _is_equal(self, path: str, other: str, size: int) -> bool:
        """Whether a file of the base has the same bytes, as far as published digests or some blocks tell."""
        new, old = self._new.source, self._old.source
        digests = new.published_sha256(path), old.published_sha256(other)
        if all(digests):
            return digests[0] == digests[1]
        spans = _blocks(size)
        return all(
            ours == theirs
            for ours, theirs in zip(_read(new, path, spans), _read(old, other, spans), strict=True)
        )

    def _packed(self, path: str, size: int, level: int) -> int:
        """What a file takes when it is compressed."""
        spans = _blocks(size)
        if size <= min(_WHOLE_BYTES, self._left):
            self._left -= size
            spans = [(0, size)]
        read = sum(end - start for start, end in spans)
        packed = sum(map(len, codec.compress_blocks(_read(self._new.source, path, spans), level)))
        return packed * size // read


def _header_bytes(shard: Shard) -> int:
    """The length of a delta shard's header."""
    return len(shard_header(shard.file.size, shard_metadata(shard)))


def _blocks(size: int) -> list[tuple[int, int]]:
    """First bytes and ends of blocks all over a file: all of it, if it is small."""
    if size <= _BLOCKS * _BLOCK_BYTES:
        return [(0, size)]
    starts = [(size - _BLOCK_BYTES) * k // (_BLOCKS - 1) for k in range(_BLOCKS)]
    return [(start, start + _BLOCK_BYTES) for start in starts]


def _read(source: Source, path: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    file = source.open(path)
    with source.expect(Span(path, start, end) for start, end in spans):
        for start, end in spans:
            yield file.read(start, end - start)
