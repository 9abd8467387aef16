"""Encodes one shard of a target into one of a delta, and hashes both sides on the way."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice, tee

from ..checkpoint import Checkpoint
from ..codec import Effort
from ..entries import TensorEntry
from ..manifest import TargetFile
from ..match.low_rank import search_bytes, with_low_rank
from ..match.names import Match
from ..payload import ChunkPlan, CodedChunk
from ..workers import Buffers, Lane, MemoryBudget, Meter, batches
from .digests import PassingDigest, ShardDigests, base_spans
from .encoding import ChunkRow, encode_rows
from .entry import entry_of
from .writer import DeltaWriter

_log = logging.getLogger(__name__)

#: Memory for searches in several tensors at once: two of the largest.
_SEARCHES_BYTES = 576 << 20


class ShardEncoder:
    """Encodes shards of ``new`` against ``old``, and writes them.

    Args:
        passing: those of the base's shards that are hashed as they are coded.
    """

    def __init__(
        self,
        old: Checkpoint,
        new: Checkpoint,
        writer: DeltaWriter,
        chunk_bytes: int,
        effort: Effort,
        meter: Meter,
        passing: Mapping[str, PassingDigest],
    ) -> None:
        self._old = old
        self._new = new
        self._writer = writer
        self._chunk_bytes = chunk_bytes
        self._effort = effort
        self._meter = meter
        self._passing = passing
        self._searches = MemoryBudget(_SEARCHES_BYTES)

    def write_shard(
        self, lane: Lane, path: str, matches: Sequence[Match], name: str
    ) -> tuple[TargetFile, list[TensorEntry]]:
        """Write the delta shard ``name`` for the target's shard at ``path``, whose tensors have these
        ``matches``; or find it there, from an interrupted run."""
        if done := self._writer.finished_before(name):
            self._meter.skip(done.target.size)
            _log.info("%s: kept from an earlier run", path)
            return done.target, list(done.entries)
        shard, plans, entries = self._new.shards[path], self._plans(matches), list[TensorEntry]()
        digests = ShardDigests(shard, self._passing, lane)
        with self._writer.shard(name, shard, plans) as output:
            # Predictions are looked for while the tensors before are coded.
            for_entries, for_chunks = tee(lane.map(self._with_prediction, matches))
            planned = zip(for_chunks, plans, strict=True)
            with self._expect(matches), closing(self._encode_all(lane, planned, digests)) as chunks:
                for match, plan in zip(for_entries, plans, strict=True):
                    coded, written = islice(chunks, plan.count), None
                    if match.like:
                        deque(coded, 0)  # a duplicate's bytes are only hashed
                    else:
                        stored = match.prediction.stored if match.prediction else b""
                        written = output.payloads.write(plan, coded, prediction=stored)
                    entries.append(entry_of(match, written, self._old))
                    _log_tensor(entries[-1], plan)
            digests.finish()
            self._new.source.require_sha256(path, digests.target)
            target = output.finish(digests.target, entries)
        self._meter.add(shard.header.data_start)
        payloads = sum(entry.payload_bytes for entry in entries)
        sizes = len(entries), shard.file.size, payloads
        _log.info("%s: %d tensors, %d bytes, written as %d bytes of payloads to %s", path, *sizes, name)
        return target, entries

    @contextmanager
    def _expect(self, matches: Sequence[Match]) -> Iterator[None]:
        """Within the block, the matches' tensors will be read, about in order."""
        targets = (m.target.span(0, m.target.info.nbytes) for m in matches)
        with self._old.source.expect(base_spans(matches)), self._new.source.expect(targets):
            yield

    def _plans(self, matches: Sequence[Match]) -> list[ChunkPlan]:
        return [ChunkPlan(m.target.info.nbytes, m.shared_bytes, self._chunk_bytes) for m in matches]

    def _with_prediction(self, match: Match) -> Match:
        """The match, with a low-rank prediction where one pays. That takes several reads of both tensors, so
        none is looked for over a network."""
        if self._old.source.is_remote or self._new.source.is_remote:
            return match
        with self._searches.taking(search_bytes(match)):
            return with_low_rank(match, self._effort)

    def _encode_all(
        self, lane: Lane, planned: Iterable[tuple[Match, ChunkPlan]], digests: ShardDigests
    ) -> Generator[CodedChunk, None, None]:
        """The chunks of all tensors, in order. While one tensor is written, the next ones are encoded and
        their input is hashed."""
        at_once = lane.batch_bytes
        buffers = Buffers(at_once)
        rows = (
            ChunkRow(match, plan, first, end) for match, plan in planned for first, end in plan.rows(at_once)
        )
        encode = partial(encode_rows, buffers=buffers)
        for batch in lane.map(encode, batches(rows, at_once, lambda row: row.nbytes)):
            digests.update(batch, buffers)
            self._meter.add(batch.target.nbytes)
            yield from batch.chunks


def _log_tensor(entry: TensorEntry, plan: ChunkPlan) -> None:
    other = entry.base or entry.like
    counts = entry.changed, plan.count, plan.shared_count, entry.payload_bytes
    _log.debug(
        "%s: %s, %s %s, compared with %s: %d elements changed; %d chunks, %d with a base; payload: %d bytes",
        entry.name, entry.status, entry.dtype, list(entry.shape), other.name if other else "nothing", *counts,
    )  # fmt: skip
