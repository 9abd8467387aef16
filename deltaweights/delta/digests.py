"""Hashes the files of base and target from the bytes that are coded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import Checkpoint, Shard, Tensor
from ..match.names import Match
from ..payload import CodedChunk
from ..storage import Source, Span
from ..workers import Buffers, Lane, Workers

#: What is hashed at a time.
_BLOCK_BYTES = 1 << 20


class CodedBatch(NamedTuple):
    """Encoded chunks, and the bytes of target and base as they were read."""

    chunks: list[CodedChunk]
    target: NDArray[np.uint8]
    base: NDArray[np.uint8]
    base_spans: list[tuple[Span | None, int]]  # where those of the base are in its files, and how many


class PassingDigest:
    """SHA-256 of a base's shard whose bytes are read for the delta, as far as they come in order. What comes
    out of order (the rest of the shard, where another shard of the target begins) is read once more."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._sha256 = hashlib.sha256(shard.header.raw)
        self._end = shard.header.data_start
        self._lock = threading.Lock()

    def feed(self, start: int, data: memoryview) -> None:
        """Bytes of the file from ``start`` on; from any thread."""
        with self._lock:
            if start == self._end:
                self._sha256.update(data)
                self._end += len(data)

    def finish(self, source: Source, workers: Workers) -> str:
        """The file's SHA-256; reads what is missing."""
        path, file = self._shard.path, self._shard.file
        with source.expect([Span(path, self._end, file.size)] if self._end < file.size else []):
            for start in range(self._end, file.size, _BLOCK_BYTES):
                workers.check()
                self._sha256.update(file.read(start, min(_BLOCK_BYTES, file.size - start)))
        return self._sha256.hexdigest()


class ShardDigests:
    """SHA-256 of a target's shard, and of the base's shards that are read along with it."""

    def __init__(self, shard: Shard, passing: Mapping[str, PassingDigest], lane: Lane) -> None:
        self._target = hashlib.sha256(shard.header.raw)
        self._passing = passing
        self._lane = lane
        self._unfinished: tuple[Callable[[], None], ...] = ()  # the base is hashed at the same time

    def update(self, batch: CodedBatch, buffers: Buffers) -> None:
        """Hash the next batch, and give its memory back to ``buffers``."""
        self.finish()
        if any(span and span.path in self._passing for span, _ in batch.base_spans):
            hashed = self._lane.aside(partial(self._feed, batch))
            self._unfinished = hashed, partial(buffers.give, batch.base)
        else:
            buffers.give(batch.base)
        self._target.update(batch.target.data)
        buffers.give(batch.target)

    def _feed(self, batch: CodedBatch) -> None:
        position = 0
        for span, nbytes in batch.base_spans:
            if span and span.path in self._passing:
                self._passing[span.path].feed(span.start, batch.base[position : position + nbytes].data)
            position += nbytes

    def finish(self) -> None:
        """Wait until all of the base is hashed."""
        for call in self._unfinished:
            call()
        self._unfinished = ()

    @property
    def target(self) -> str:
        return self._target.hexdigest()


def passing_shards(by_shard: Mapping[str, Sequence[Match]], old: Checkpoint) -> list[Shard]:
    """The base's shards that are hashed while shards are coded: those that are read from the first byte to
    the last for one shard of the target; on the Hub, where a second read costs most, all that are read."""
    found: dict[str, Shard] = {}
    for matches in by_shard.values():
        spans = base_spans([match for match in matches if isinstance(match.base, Tensor)])
        for shard in {span.path: old.shards[span.path] for span in spans}.values():
            if is_far(old.source, shard.path) or _reads_in_order(shard, matches):
                found[shard.path] = shard
    return [shard for shard in found.values() if old.source.checked_sha256(shard.path) is None]


def digested_along(by_shard: Mapping[str, Sequence[Match]], old: Checkpoint) -> dict[str, str]:
    """For shards of the target that are coded apart from each other: which shard of the base each of them
    reads from the first byte to the last, so that it is hashed there. Each shard of the base occurs once."""
    found: dict[str, str] = {}
    for path, matches in by_shard.items():
        for shard in passing_shards({path: matches}, old):
            is_whole = _reads_in_order(shard, matches)
            if is_whole and path not in found and shard.path not in found.values():
                found[path] = shard.path
    return found


def digested_apart(by_shard: Mapping[str, Sequence[Match]], old: Checkpoint) -> set[str]:
    """The base's shards whose bytes have to be hashed: on the Hub, those only that are read for the delta."""
    source = old.source
    read = {span.path for matches in by_shard.values() for span in base_spans(matches)}
    return {
        path
        for path in source.sizes
        if path.endswith(".safetensors")
        and source.checked_sha256(path) is None
        and not (is_far(source, path) and source.published_sha256(path) and path not in read)
    }


def _reads_in_order(shard: Shard, matches: Iterable[Match]) -> bool:
    spans = base_spans([match for match in matches if isinstance(match.base, Tensor)])
    ends = [Span(shard.path, 0, shard.header.data_start), *spans]
    in_order = all(a.path == b.path and a.end == b.start for a, b in pairwise(ends))
    return in_order and spans[-1].end == shard.file.size


def is_far(source: Source, path: str) -> bool:
    """Whether a file comes over a network: it is not in the local cache."""
    return source.is_remote and source.full_path(path) is None


def base_spans(matches: Iterable[Match]) -> list[Span]:
    """The bytes of the base's files that the matches are compared with."""
    return [
        span
        for m in matches
        if m.base and m.shared_bytes
        for span in m.base.spans(0, codec.rescale(m.shared_bytes, m.target.dtype, m.base.dtype))
    ]
