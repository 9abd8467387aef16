"""A checkpoint: the tensors of all its shards by name, and the other files beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, HeaderError
from ..storage.location import Readable, open_source
from ..storage.source import HEAD_BYTES, ReadableFile, Source, Span
from .header import Header, TensorInfo, header_length, parse_header
from .index import read_indexes
from .other_formats import advice


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One safetensors file of a checkpoint."""

    path: str
    file: ReadableFile
    header: Header


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor and the shard that holds it. Compared by identity: a checkpoint has one object per
    tensor."""

    info: TensorInfo
    shard: Shard

    @property
    def name(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def dtype(self) -> str:
        """Its dtype's safetensors code."""
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.info.nbytes

    @property
    def path(self) -> str:
        """The path of its shard."""
        return self.shard.path

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the tensor's bytes, beginning at byte ``start`` of the tensor."""
        offset = self.shard.header.data_start + self.info.start + start
        self.shard.file.read_into(offset, out)

    def span(self, start: int, end: int) -> Span:
        """The span of the tensor's bytes ``start`` to ``end`` in its file."""
        offset = self.shard.header.data_start + self.info.start
        return Span(self.shard.path, offset + start, offset + end)

    def spans(self, start: int, end: int) -> list[Span]:
        """:meth:`span`, as a list."""
        return [self.span(start, end)]


class Checkpoint:
    """An open base or target: every header is read and checked, but no weights.

    ``shards`` maps the path of each safetensors file to its :class:`Shard`; ``tensors`` is all tensors,
    shard by shard, in the order of their bytes; ``other_files`` is the sorted paths of all other files.

    The source is closed with the checkpoint, and also if opening fails.

    Args:
        may_lack: files that cannot be read count as absent, shards with a broken header among them, which
            stand in ``broken`` with their errors: what nobody needs of a base is not to decide over success.

    Raises:
        CheckpointError: it holds no safetensors file, or one of them is broken (all of them, with
            ``may_lack``).
    """

    def __init__(self, source: Source, *, may_lack: bool = False) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {}
        self.broken: dict[str, CheckpointError] = {}
        self.tensors: list[Tensor] = []
        self._by_name: dict[str, list[Tensor]] = {}
        try:
            self._read_headers(may_lack)
        except BaseException:
            source.close()
            raise
        for tensor in self.tensors:
            self._by_name.setdefault(tensor.info.name, []).append(tensor)
        self.other_files = sorted(set(source.sizes) - set(self.shards) - set(self.broken))

    def _read_headers(self, may_lack: bool) -> None:
        source = self.source
        if not may_lack:
            source.require_readable()
        self.broken |= {path: e for path, e in source.unreadable.items() if path.endswith(".safetensors")}
        paths = sorted(path for path in source.sizes if path.endswith(".safetensors"))
        with source.expect(Span(path, 0, min(HEAD_BYTES, source.sizes[path])) for path in paths):
            for path in paths:
                try:
                    self.shards[path] = shard = read_shard(source, path)
                except HeaderError as error:
                    self.broken[path] = error
                    if not may_lack:
                        raise
                else:
                    self.tensors += (Tensor(info, shard) for info in shard.header.tensors)
        if self.broken and not self.shards:
            raise next(iter(self.broken.values()))
        if not paths and (id := source.hub_id).repo_id and not source.is_remote:
            raise CheckpointError(
                f"{id.repo_id} is not whole in the local Hub cache",
                f"{source.where} has no .safetensors file: only part of it was downloaded.",
                f"Get all of it: hf download {id.repo_id} --revision {id.revision}",
            )
        if not paths:
            is_one = source.root is not None and source.root.is_file()
            raise CheckpointError(
                f"{source.where} {'is' if is_one else 'holds'} no .safetensors file",
                *advice(source.sizes),
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    def named(self, name: str) -> list[Tensor]:
        """All tensors called ``name``: usually one, but two shards may use the same name."""
        return self._by_name.get(name, [])

    def find(self, name: str, path: str) -> Tensor | None:
        """The tensor called ``name``. If there are several, the one in the shard at ``path`` comes first,
        then one in the same folder, then the first."""
        found = self.named(name)
        folder = os.path.dirname(path)

        def distance(tensor: Tensor) -> tuple[bool, bool]:
            return tensor.shard.path != path, os.path.dirname(tensor.shard.path) != folder

        return min(found, key=distance, default=None)

    def closest(self, name: str, path: str, misfit: Callable[[Tensor], tuple[bool, ...]]) -> Tensor | None:
        """The tensor called ``name``; of several, the one with the least ``misfit``, then one in the folder
        of ``path``, then the one that the index names, then the one at ``path``."""
        found = self.named(name)
        if not found[1:]:
            return found[0] if found else None
        folder = os.path.dirname(path)

        def distance(tensor: Tensor) -> tuple[bool, ...]:
            is_indexed = any(index.get(name) == tensor.path for index in self.indexes.values())
            is_elsewhere = os.path.dirname(tensor.path) != folder
            return *misfit(tensor), is_elsewhere, not is_indexed, tensor.path != path

        return min(found, key=distance)

    @cached_property
    def indexes(self) -> dict[str, dict[str, str]]:
        """For each index, by its path: tensors' names, and the paths of the shards that should hold them."""
        return read_indexes(self.source)

    def require_found(self, name: str, path: str) -> None:
        """Raise :class:`CheckpointError` where a broken file should hold the tensor called ``name``: one that
        the index names, or one at ``path``."""
        if not self.broken or self.named(name):
            return
        for place in (*(index.get(name, "") for index in self.indexes.values()), path):
            if place in self.broken:
                raise self.broken[place]


def read_shard(source: Source, path: str) -> Shard:
    """Read and check the header of the safetensors file at ``path``.

    Raises:
        HeaderError: it breaks the format's rules.
    """
    return read_header(source.open(path), source.name(path))


def read_header(file: ReadableFile, where: str) -> Shard:
    """:func:`read_shard` for an open file; ``where`` is its name in messages."""
    head = file.read(0, min(HEAD_BYTES, file.size))
    length = header_length(head[:8], file.size, where)
    if length > len(head):
        head += file.read(len(head), length - len(head))
    return Shard(file.path, file, parse_header(head[:length], file.size, where))


def open_checkpoint(location: Readable, *, may_lack: bool = False) -> Checkpoint:
    """Open the checkpoint at ``location`` (a folder, one .safetensors file, a Hub id, or an open source).

    Args:
        may_lack: as for :class:`Checkpoint`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return Checkpoint(open_source(location), may_lack=may_lack)
