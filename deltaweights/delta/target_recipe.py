"""The recipe that rebuilds a whole target from a delta and its base, for patch.py, verify.py and plan.py."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import Base, Checkpoint, HeldExtents, tensors_of
from ..entries import TargetTensor, TensorEntry
from ..errors import DeltaError, PayloadError
from ..manifest import Manifest, TargetFile
from ..recent import Recent
from ..storage import Announce, Source
from .bases import find_bases
from .faults import DeltaFaults
from .recipes import ShardRecipe, TensorRecipe
from .shards import DeltaShard, contradicts, read_delta_shard

#: Memory for what predicts the tensors that are rebuilt at the same time.
_PREDICTORS_BYTES = 64 << 20

#: How many bytes of payloads may lie between the tensor that is decoded and the chunk records that are read:
#: fewer than are fetched ahead, and enough to fetch the base ahead, too.
_AHEAD_BYTES = 4 << 20


class TargetRecipe:
    """The recipe for a target. A context manager that holds the delta and its base open."""

    def __init__(self, source: Source, manifest: Manifest, base: Checkpoint | None) -> None:
        self.source = source
        self.manifest = manifest
        self.base = base
        self.faults = DeltaFaults(source, manifest, base)
        self._files = {file.path: file for file in manifest.target.files if file.stored == "tensors"}
        self._entries: dict[str, dict[str, TensorEntry]] = {path: {} for path in self._files}
        self._shards: dict[str, ShardRecipe] = {}
        self._delta_shards: dict[str, DeltaShard] = {}
        self._locks = {path: threading.Lock() for path in self._files}
        for entry in manifest.tensors:
            if entry.file is not None:
                self._entries[entry.file][entry.name] = entry
        if base and base.source.is_remote and 2 * manifest.delta_bytes < manifest.target_bytes:
            source.hold_less()
        self._predictors = Recent[codec.Predictor](_PREDICTORS_BYTES)
        self._bases = find_bases(manifest, base, self.faults, HeldExtents())

    def __enter__(self) -> TargetRecipe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def sources(self) -> list[Source]:
        """The sources of delta and base; for a base that is itself rebuilt, the sources of that."""
        return [self.source, *(self.base.source.origins if self.base else [])]

    @property
    def is_remote(self) -> bool:
        """Whether any of it comes over a network."""
        return any(source.is_remote for source in self.sources)

    def cancel(self) -> None:
        """End all reads of delta or base over a network, in any thread."""
        for source in self.sources:
            source.cancel()

    def close(self) -> None:
        """Close the files of delta and base."""
        for source in self.sources:
            source.close()

    def shard(self, path: str) -> ShardRecipe:
        """The recipe for the target shard at ``path``; its headers are read and checked once.

        Raises:
            DeltaError: the delta shard contradicts the manifest.
        """
        if path not in self._shards:
            self._shards[path] = self._read_shard(self._files[path])
        return self._shards[path]

    def _read_shard(self, file: TargetFile) -> ShardRecipe:
        own = self._delta_shard(file.path)
        entries = self._entries[file.path]
        tensors = {}
        for info in own.header.tensors:
            entry = entries.get(info.name)
            if not entry or (entry.dtype, entry.shape) != (info.dtype, info.shape):
                raise contradicts(file, f"They describe tensor {info.name!r} differently")
            own.payload(entry)  # a duplicate's is empty
            coded = self._coded(entry)
            assert coded.file is not None
            payload = self._delta_shard(coded.file).payload(coded)
            base = self._bases.get((coded.file, coded.name))
            tensors[info.name] = TensorRecipe(
                info, coded, payload, base, self.manifest.chunk_bytes, self.faults, self._predictors
            )
        if len(tensors) != len(entries):
            raise contradicts(file, f"The manifest has {len(entries)} tensors, the shard has {len(tensors)}")
        return ShardRecipe(file, own.header, tensors, own.shard, self)

    def _delta_shard(self, path: str) -> DeltaShard:
        """The delta shard of the target shard at ``path``. It is read once for all threads, since shards
        rebuilt in parallel may hold duplicates of each other's tensors."""
        with self._locks[path]:
            if path not in self._delta_shards:
                entries = self._entries[path].values()
                self._delta_shards[path] = read_delta_shard(self.source, self._files[path], entries)
            return self._delta_shards[path]

    def _coded(self, entry: TensorEntry) -> TensorEntry:
        """The entry whose payload and base give this entry's bytes: itself, or the original of a
        duplicate."""
        like = entry.like
        return self._entries[like.file][like.name] if isinstance(like, TargetTensor) else entry

    def base_of(self, path: str, name: str) -> Base | None:
        """What tensor ``name`` of the shard at ``path`` is coded against, if anything. For a duplicate, the
        base tensor of its name, or else the base of its original."""
        entry = self._entries[path][name]
        coded = self._coded(entry)
        own = self.base.find(name, path) if self.base and coded is not entry else None
        return own or self._bases.get((coded.file or path, coded.name))

    def base_files(self) -> list[str]:
        """The base's files that the target needs, by path."""
        shards = {tensor.path for base in self._bases.values() for tensor in tensors_of(base)}
        others = {file.source for file in self.manifest.target.files if file.stored == "base"}
        return sorted(shards | others)

    def check_published(self) -> set[str]:
        """The base's files that are known to be right without reading them; raises like
        :meth:`DeltaFaults.check_published`."""
        return self.faults.check_published(self.base_files())

    def with_base(self, skipped: Collection[str] = ()) -> list[TensorRecipe]:
        """The recipes of all tensors with a base, except those whose base is in the files ``skipped``."""
        return [
            self.shard(path).tensors[name]
            for (path, name), base in self._bases.items()
            if any(tensor.path not in skipped for tensor in tensors_of(base))
        ]

    def read_tables(self, recipes: Iterable[TensorRecipe]) -> None:
        """Read the chunk records of several tensors, in parallel if the delta is remote. Records that were
        read before are not fetched again."""
        recipes = [recipe for recipe in recipes if not recipe.is_read]
        with self.source.expect(recipe.table_span for recipe in recipes):
            for recipe in recipes:
                recipe.read_table()

    @contextmanager
    def decoding(self, recipes: Iterable[TensorRecipe]) -> Iterator[Iterator[TensorRecipe]]:
        """Announce that these tensors will be decoded whole within the block, one after the other: iterate
        over what this gives. Their chunk records come with the payloads, a little ahead, and tell which bytes
        of the base are needed."""
        recipes = list(recipes)
        with self.source.announcing() as payloads, self.announcing_base() as bases:
            payloads(span for recipe in recipes for span in recipe.spans(with_table=not recipe.is_read))
            yield self._with_tables(recipes, bases)

    def _with_tables(self, recipes: Iterable[TensorRecipe], bases: Announce) -> Iterator[TensorRecipe]:
        ahead, nbytes = deque[TensorRecipe](), 0
        for recipe in recipes:
            recipe.read_table()
            if self.is_remote:
                chunks = filter(recipe.needs_base, range(recipe.plan.count))
                bases(span for index in chunks for span in recipe.base_spans(index))
            ahead.append(recipe)
            nbytes += recipe.stored.nbytes
            while ahead and nbytes > _AHEAD_BYTES:
                nbytes -= ahead[0].stored.nbytes
                yield ahead.popleft()
        yield from ahead

    def announcing_base(self) -> AbstractContextManager[Announce]:
        """:meth:`Source.announcing` of the base, if there is one."""
        return self.base.source.announcing() if self.base else nullcontext(lambda spans: None)

    @contextmanager
    def expect(self, chunks: Iterable[tuple[TensorRecipe, int]]) -> Iterator[None]:
        """Announce that ``chunks`` will be decoded within the block, in about this order, so that their bytes
        are fetched ahead. Their tensors' chunk records must have been read."""
        chunks = list(chunks) if self.is_remote else []
        payloads = (recipe.data_span(index) for recipe, index in chunks)
        with self.source.expect(payloads), self.expect_base(c for c in chunks if c[0].needs_base(c[1])):
            yield

    def expect_base(self, chunks: Iterable[tuple[TensorRecipe, int]]) -> AbstractContextManager[None]:
        """:meth:`expect` for reads of the base's bytes only."""
        if self.base is None:
            return nullcontext()
        return self.base.source.expect(span for recipe, index in chunks for span in recipe.base_spans(index))

    def read(self, recipe: TensorRecipe, start: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """A tensor's bytes from ``start`` to ``end``; all of them by default.

        Raises:
            BaseMismatchError, DeltaError: base or delta contradicts the manifest.
        """
        recipe.read_table()
        plan, end = recipe.plan, recipe.info.nbytes if end is None else end
        data = np.empty(end - start, np.uint8)
        wanted = range(plan.index_at(start), plan.index_at(end - 1) + 1) if end > start else range(0)
        with self.expect((recipe, index) for index in wanted):
            for index in wanted:
                first, stop = plan.span(index)
                if start <= first and stop <= end:
                    recipe.decode(index, index + 1, data[first - start : stop - start])
                    continue
                chunk = np.empty(stop - first, np.uint8)
                recipe.decode(index, index + 1, chunk)
                low, high = max(first, start), min(stop, end)
                data[low - start : high - start] = chunk[low - first : high - first]
        return data

    def base_source(self, file: TargetFile) -> Source:
        """The source of a file that the target has in common with its base.

        Raises:
            BaseMismatchError: the base lacks it, or it has a different size.
        """
        if not self.base or file.source not in self.base.source.sizes:
            raise self.faults.wrong_base(
                f"it lacks {file.source!r}, a file that the target has in common with it"
            )
        if self.base.source.sizes[file.source] != file.size:
            raise self.faults.wrong_base(f"its file {file.source!r} has a different size")
        return self.base.source

    def blocks(self, file: TargetFile) -> Iterator[bytes]:
        """The bytes of a file that is not a shard, in blocks of at most 1 MiB.

        Raises:
            BaseMismatchError: it comes from the base, but the base does not have it.
            PayloadError: it does not decompress, or has more bytes than the manifest says.
        """
        if file.stored == "base":
            yield from self.base_source(file).blocks(file.source)
            return
        blocks = self.source.blocks(file.source)
        if file.stored == "zstd":
            blocks = codec.decompress_blocks(blocks)
        left = file.size
        why = f"It does not hold the {file.size} bytes of {file.path}."
        try:
            for block in blocks:
                left -= len(block)
                if left < 0:
                    break
                yield block
        except PayloadError as error:
            left, why = -1, f"{error.what}."
        if left:
            raise PayloadError(f"{file.source} in the delta is damaged", why, "Get the delta again.")


def check_digest(file: TargetFile, sha256: str) -> None:
    """Raise :class:`DeltaError` if a rebuilt file differs from the manifest's."""
    if sha256 != file.sha256:
        raise DeltaError(
            f"{file.path} was not rebuilt correctly",
            f"Its SHA-256 is {sha256}, not {file.sha256}: the delta is damaged.",
            "Get the delta again.",
        )
