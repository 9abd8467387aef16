"""Presents tensors in memory as the safetensors files that they would be saved as, and as a checkpoint."""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint import TensorInfo, build_header
from ...dtypes import DTYPES
from ...storage import ReadableFile, Source, file_blocks
from ..tensors import byte_view, code_of, settle, stored_shape

#: The order of tensors in safetensors files: by dtype in this order, then by name.
_ORDER = tuple(DTYPES)

#: A file's bytes: in the CPU's memory as an array, elsewhere as a uint8 tensor.
_Piece: TypeAlias = "NDArray[np.uint8] | Tensor"


class MemoryFile(ReadableFile):
    """A file made of pieces of memory, one after the other."""

    def __init__(self, path: str, pieces: Iterable[_Piece]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        *self._starts, size = accumulate(map(len, self._pieces), initial=0)
        super().__init__(path, size)

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Copies only these bytes from another device."""
        done = 0
        while done < out.size:
            number = bisect_right(self._starts, offset + done) - 1
            piece, start = self._pieces[number], offset + done - self._starts[number]
            part = piece[start : start + out.size - done]
            if isinstance(part, Tensor):
                torch.from_numpy(out[done : done + len(part)]).copy_(part)
            else:
                out[done : done + len(part)] = part
            done += len(part)


class MemorySource(Source):
    """Files in memory as a :class:`Source`.

    The tensors are not copied, so they must not change while a delta is made from them.

    Args:
        shards: for each path, the tensors by name (dense and contiguous, on any device) and the metadata.
        files: the other files' bytes.
        others: more files, from a different source; the file in memory counts if both have the same path.
        digests: known SHA-256 of files, in hex, which saves reading them.
    """

    def __init__(
        self,
        shards: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
        files: Mapping[str, bytes],
        others: Source | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self._digests = dict(digests or {})
        self._mark = uuid.uuid4().hex
        self._files = {
            path: MemoryFile(path, [np.frombuffer(data, np.uint8)]) for path, data in files.items()
        }
        for path, (tensors, metadata) in shards.items():
            settle(tensors.values())
            self._files[path] = MemoryFile(path, _safetensors(tensors, metadata))
        self._others = others
        self._elsewhere = _without_weights(others) if others else set()
        self._elsewhere -= set(self._files)
        sizes = {path: file.size for path, file in self._files.items()}
        sizes |= {path: others.sizes[path] for path in self._elsewhere} if others else {}
        super().__init__(
            "the state in memory",
            dict(sorted(sizes.items())),
            unreadable=others.unreadable if others else None,
        )

    @property
    def is_remote(self) -> bool:
        """Whether the files that are not in memory are remote."""
        return bool(self._others and self._others.is_remote)

    def _other(self, path: str) -> Source | None:
        """The source of the file, if it is not in memory."""
        return self._others if path in self._elsewhere else None

    def open(self, path: str) -> ReadableFile:
        """The file at ``path``."""
        other = self._other(path)
        return other.open(path) if other else self._files[path]

    def name(self, path: str) -> str:
        """The file's name for messages."""
        other = self._other(path)
        return other.name(path) if other else f"{path} of {self.where}"

    def full_path(self, path: str) -> Path | None:
        """The file's path, if it is not in memory."""
        other = self._other(path)
        return other.full_path(path) if other else None

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB."""
        other = self._other(path)
        return other.blocks(path) if other else file_blocks(self._files[path])

    def published_sha256(self, path: str) -> str | None:
        """The known SHA-256 of the file."""
        other = self._other(path)
        return self._digests.get(path) or (other.published_sha256(path) if other else None)

    def checked_sha256(self, path: str) -> str | None:
        """The known SHA-256 of a file in memory."""
        other = self._other(path)
        return other.checked_sha256(path) if other else self._digests.get(path)

    def fingerprint(self, path: str) -> str:
        """A different text for every source, since changes of memory cannot be detected."""
        return f"{path}:{self._mark}"

    def cancel(self) -> None:
        """End reads of files that come over a network."""
        if self._others:
            self._others.cancel()

    def close(self) -> None:
        """Close the files that are not in memory."""
        if self._others:
            self._others.close()


def _without_weights(source: Source) -> set[str]:
    return {path for path in source.sizes if not path.endswith((".safetensors", ".safetensors.index.json"))}


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[_Piece]:
    """The bytes of a safetensors file, as the library would write it, with metadata sorted by key."""
    codes = {name: code_of(name, tensor.dtype) for name, tensor in tensors.items()}
    infos, position = [], 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(codes[name]), name)):
        end = position + tensors[name].nbytes
        infos.append(TensorInfo(name, codes[name], stored_shape(name, tensors[name]), position, end))
        position = end
    yield np.frombuffer(build_header(infos, dict(sorted(metadata.items()))), np.uint8)
    for info in infos:
        data = byte_view(tensors[info.name])
        yield data.numpy() if data.device.type == "cpu" else data
