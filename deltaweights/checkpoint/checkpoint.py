"""A checkpoint: the tensors of all its shards by name, and the other files beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..storage.location import Readable, open_source
from ..storage.source import HEAD_BYTES, ReadableFile, Source, Span
from .header import Header, TensorInfo, header_length, parse_header


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


class Checkpoint:
    """An open base or target: every header is read and checked, but no weights.

    ``shards`` maps the path of each safetensors file to its :class:`Shard`; ``tensors`` is all tensors,
    shard by shard, in the order of their bytes; ``other_files`` is the sorted paths of all other files.

    The source is closed with the checkpoint, and also if opening fails.

    Raises:
        CheckpointError: it holds no safetensors file, or one of them is broken.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {}
        self.tensors: list[Tensor] = []
        self._by_name: dict[str, list[Tensor]] = {}
        try:
            self._read_headers()
        except BaseException:
            source.close()
            raise
        for tensor in self.tensors:
            self._by_name.setdefault(tensor.info.name, []).append(tensor)
        self.other_files = sorted(set(source.sizes) - set(self.shards))

    def _read_headers(self) -> None:
        source = self.source
        paths = sorted(path for path in source.sizes if path.endswith(".safetensors"))
        with source.expect(Span(path, 0, min(HEAD_BYTES, source.sizes[path])) for path in paths):
            for path in paths:
                self.shards[path] = shard = read_shard(source, path)
                self.tensors += (Tensor(info, shard) for info in shard.header.tensors)
        if not paths:
            raise CheckpointError(
                f"{source.where} holds no .safetensors file",
                "deltaweights compares safetensors checkpoints.",
                "Convert the weights first, for example with save_pretrained(...) of transformers.",
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


def open_checkpoint(location: Readable) -> Checkpoint:
    """Open the checkpoint at ``location`` (a folder, one .safetensors file, a Hub id, or an open source).

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return Checkpoint(open_source(location))
