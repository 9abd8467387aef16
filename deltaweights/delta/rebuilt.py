"""A target readable like a folder without being on disk: its bytes are decoded on demand.

So ``apply``, ``verify`` and ``diff`` need hardly any code for chains: the base of the last delta is such a
source.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ..manifest import TargetFile
from ..recent import Recent
from ..storage import Announce, HubId, ReadableFile, Source, Span, file_blocks
from .recipes import ShardRecipe, TensorRecipe
from .target_recipe import TargetRecipe, check_digest

#: Memory for chunks that readers ask for in parts.
_CACHE_BYTES = 16 << 20


class RebuiltSource(Source):
    """The files of a target as a :class:`Source`, decoded as they are read. Closing it closes the target.

    Every file's SHA-256 counts as published, since it is in the manifest and bytes that differ from it are
    refused. Chunks are checked as they are decoded, whole files at the end of :meth:`blocks`.
    """

    def __init__(self, target: TargetRecipe) -> None:
        self.target = target
        record = target.manifest.target
        self._files = {file.path: file for file in record.files}
        super().__init__(
            f"the target of {target.source.where}",
            {path: file.size for path, file in sorted(self._files.items())},
            hub_id=HubId(record.repo_id, record.revision),
            left_out=record.left_out,
        )
        self._cache = _ChunkCache(_CACHE_BYTES)
        self._opened: dict[str, ReadableFile] = {}

    @property
    def origins(self) -> list[Source]:
        """The sources of deltas and base."""
        return self.target.sources

    @property
    def is_remote(self) -> bool:
        """Whether delta or base is remote."""
        return self.target.is_remote

    def open(self, path: str) -> ReadableFile:
        """The file at ``path``.

        Raises:
            DeltaError: the delta is damaged.
        """
        if path not in self._opened:
            file = self._files[path]
            if file.stored == "tensors":
                self._opened[path] = RebuiltShard(self.target.shard(path), self._cache)
            else:
                self._opened[path] = _SequentialFile(self.target, file)
        return self._opened[path]

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB.

        Raises:
            DeltaError: at the end, if their SHA-256 differs from the manifest's.
        """
        file = self._files[path]
        is_shard = file.stored == "tensors"
        sha256 = hashlib.sha256()
        with self.expect([Span(path, 0, file.size)]):
            for block in file_blocks(self.open(path)) if is_shard else self.target.blocks(file):
                sha256.update(block)
                yield block
        check_digest(file, sha256.hexdigest())

    def published_sha256(self, path: str) -> str | None:
        """The SHA-256 in the manifest."""
        return self._files[path].sha256 if path in self._files else None

    def checked_sha256(self, path: str) -> str | None:
        """The SHA-256 in the manifest: chunks are checked as they are decoded."""
        return self.published_sha256(path)

    def fingerprint(self, path: str) -> str:
        """Path and SHA-256."""
        return f"{path}:{self._files[path].sha256}"

    @contextmanager
    def announcing(self) -> Iterator[Announce]:
        """Fetch ahead the bytes of delta and base from which spans are decoded."""
        if not self.target.is_remote:
            yield lambda spans: None
            return
        with self.target.source.announcing() as payloads, self.target.announcing_base() as bases:

            def announce(spans: Iterable[Span]) -> None:
                needed, below = self._needed(spans)
                payloads(needed)
                bases(below)

            yield announce

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """The ranges of delta and base to fetch over a network for these spans."""
        payloads, bases = self._needed(spans)
        base = self.target.base
        return self.target.source.ranges(payloads) + (base.source.ranges(bases) if base else [])

    def _needed(self, spans: Iterable[Span]) -> tuple[list[Span], list[Span]]:
        """The spans of delta and base from which these spans are decoded."""
        chunks: dict[tuple[TensorRecipe, int], None] = {}
        payloads, bases = [], []
        for path, start, end in spans:
            file = self._files[path]
            opened = self.open(path)
            if isinstance(opened, RebuiltShard):
                chunks |= {(recipe, index): None for recipe, index, _ in opened.chunks(start, end)}
            elif file.stored == "base":
                bases.append(Span(file.source, start, end))
            else:
                payloads.append(Span(file.source, 0, self.target.source.sizes[file.source]))
        self.target.read_tables(dict.fromkeys(recipe for recipe, _ in chunks))
        payloads += [recipe.data_span(index) for recipe, index in chunks]
        wanted = (recipe.base_spans(index) for recipe, index in chunks if recipe.needs_base(index))
        bases += [span for spans in wanted for span in spans]
        return payloads, bases

    def cancel(self) -> None:
        """End all reads that wait for a network."""
        self.target.cancel()

    def close(self) -> None:
        """Close deltas and base."""
        self._opened.clear()
        self._cache.clear()
        self.target.close()


class RebuiltShard(ReadableFile):
    """A shard of a target, readable at any position: only the chunks that are read are decoded."""

    def __init__(self, recipe: ShardRecipe, cache: _ChunkCache) -> None:
        super().__init__(recipe.file.path, recipe.file.size)
        self._raw_header = np.frombuffer(recipe.header.raw, np.uint8)
        self._recipes = [tensor for tensor in recipe.tensors.values() if tensor.info.nbytes]
        self._starts = [recipe.header.data_start + tensor.info.start for tensor in self._recipes]
        self._cache = cache

    def chunks(self, start: int, end: int) -> Iterator[tuple[TensorRecipe, int, int]]:
        """The chunks that hold bytes ``start`` to ``end`` of the file: recipe, index, and the chunk's first
        byte in the file."""
        for k in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts)):
            recipe, place = self._recipes[k], self._starts[k]
            first = recipe.plan.index_at(min(max(start - place, 0), recipe.info.nbytes - 1))
            for index in range(first, recipe.plan.count):
                begin = place + recipe.plan.span(index)[0]
                if begin >= end:
                    return
                yield recipe, index, begin

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Raises BaseMismatchError or DeltaError if base or delta contradicts the manifest."""
        end = offset + out.size
        # Write to `out` only after everything is decoded: the readers below may use it as a buffer too (see
        # PayloadReader).
        chunks = list(self.chunks(offset, end))
        if chunks and _is_row(chunks, offset, end):
            recipe, first, _ = chunks[0]
            recipe.decode(first, first + len(chunks), out)
            return
        pieces = [(place, self._cache.chunk(recipe, index)) for recipe, index, place in chunks]
        for place, piece in [(0, self._raw_header), *pieces]:
            first, last = max(place, offset), min(place + piece.size, end)
            if first < last:
                out[first - offset : last - offset] = piece[first - place : last - place]


def _is_row(chunks: Sequence[tuple[TensorRecipe, int, int]], start: int, end: int) -> bool:
    """Whether these chunks can be decoded in one call, and are exactly bytes ``start`` to ``end`` of their
    file."""
    (recipe, first, begin), (last_recipe, last, last_begin) = chunks[0], chunks[-1]
    is_alike = recipe is last_recipe and recipe.plan.has_base(first) == recipe.plan.has_base(last)
    return is_alike and begin == start and last_begin + recipe.plan.length(last, last + 1) == end


class _ChunkCache(Recent[NDArray[np.uint8]]):
    """The chunks decoded last, for readers that cut a file at other places than its delta does."""

    def chunk(self, recipe: TensorRecipe, index: int) -> NDArray[np.uint8]:
        """A chunk, decoded now or earlier. Do not write to it."""

        def decode() -> NDArray[np.uint8]:
            chunk = np.empty(recipe.plan.length(index, index + 1), np.uint8)
            recipe.decode(index, index + 1, chunk)
            return chunk

        return self.get((recipe, index), decode)


class _SequentialFile(ReadableFile):
    """A file that is not a shard. Each read decodes it from its start, since it may be compressed, so reading
    it by position is slow."""

    def __init__(self, target: TargetRecipe, file: TargetFile) -> None:
        super().__init__(file.path, file.size)
        self._blocks: Callable[[], Iterator[bytes]] = lambda: target.blocks(file)

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        position, end = 0, offset + out.size
        for block in self._blocks():
            first, last = max(position, offset), min(position + len(block), end)
            if first < last:
                piece = block[first - position : last - position]
                out[first - offset : last - offset] = np.frombuffer(piece, np.uint8)
            position += len(block)
            if position >= end:
                return
