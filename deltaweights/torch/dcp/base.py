"""Bases of distributed checkpoints: shards are coded against the same parts of a base's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ... import codec
from ...checkpoint import Checkpoint
from ...checkpoint import Tensor as StoredTensor
from ...storage import sha256_of
from ...workers import Workers
from ..boxes import Box, cut, envelope, read_box
from .record import DTYPES, BaseIdentity, DcpBaseTensor

_ITEMSIZES = dict(DTYPES.values())


class TensorType(NamedTuple):
    """The dtype code and shape of a base's tensor."""

    dtype: str
    shape: tuple[int, ...]


class BaseTensors(Protocol):
    """Tensors by name, readable in parts, by several threads at once. ``where`` is their name in messages;
    ``identity`` goes into records."""

    where: str
    identity: BaseIdentity

    def find(self, name: str) -> TensorType | None:
        """The tensor of that name, if it exists and can be read in parts."""

    def read(self, name: str, box: Box, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements ``start`` to ``stop``, in row-major order, of the tensor's part ``box``."""

    def expect(self, parts: Iterable[tuple[str, Box]]) -> AbstractContextManager[None]:
        """Announce that these parts will be read within the block, each once, in about this order."""

    def require_undamaged(self, workers: Workers, share: int, of: int) -> None:
        """Check what nothing else checks: one of ``of`` shares of it."""

    def close(self) -> None: ...


class CheckpointBase:
    """A safetensors checkpoint as a base."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        source = checkpoint.source
        self.where = source.where
        self.identity = BaseIdentity("safetensors", source.hub_id.repo_id, source.hub_id.revision)
        self._checkpoint = checkpoint

    def find(self, name: str) -> TensorType | None:
        tensor = self._tensor(name)
        return TensorType(tensor.info.dtype, tensor.info.shape) if tensor else None

    def _tensor(self, name: str) -> StoredTensor | None:
        tensor = self._checkpoint.find(name, "")
        if tensor is None:
            self._checkpoint.require_found(name, "")
        if tensor is None or tensor.info.nbytes != tensor.info.numel * _ITEMSIZES.get(tensor.info.dtype, 0):
            return None  # elements smaller than a byte, or of a dtype that torch lacks
        return tensor

    def read(self, name: str, box: Box, start: int, stop: int) -> NDArray[np.uint8]:
        tensor = self._tensor(name)
        assert tensor is not None
        itemsize = _ITEMSIZES[tensor.info.dtype]
        data = np.empty((stop - start) * itemsize, np.uint8)
        position = 0
        for part in cut(box.sizes, start, stop):
            end = position + part.numel * itemsize
            there = part.moved_by(box.offsets)
            read_box(tensor.read_into, tensor.info.shape, itemsize, there, data[position:end])
            position = end
        return data

    def expect(self, parts: Iterable[tuple[str, Box]]) -> AbstractContextManager[None]:
        """Announce the parts that are contiguous in the file."""
        spans = []
        for name, box in parts:
            tensor = self._tensor(name)
            if tensor is not None and box.numel:
                first, end = envelope(tensor.info.shape, box)
                itemsize = _ITEMSIZES[tensor.info.dtype]
                if end - first == box.numel:
                    spans.append(tensor.span(first * itemsize, end * itemsize))
        return self._checkpoint.source.expect(spans) if spans else nullcontext()

    def require_undamaged(self, workers: Workers, share: int, of: int) -> None:
        """Compare the SHA-256 of files in the Hub cache with the one that they are stored under, once in a
        process. Of other files there is none, or none without reading all of them over the network.

        Raises:
            CheckpointError: one is damaged.
        """
        source = self._checkpoint.source
        paths = sorted({tensor.path for tensor in self._checkpoint.tensors})
        stored = [path for path in paths if source.full_path(path) and source.told_sha256(path)]

        def check(path: str) -> None:
            copy = source.full_path(path)
            assert copy is not None
            status = copy.stat()
            mark = copy, status.st_size, status.st_ctime_ns, status.st_ino
            if mark not in _undamaged:
                source.require_sha256(path, sha256_of(source.blocks(path)))
                _undamaged.add(mark)

        for _ in workers.map(check, stored[share::of]):
            pass

    def close(self) -> None:
        self._checkpoint.source.close()


#: Files in the Hub cache that this process has compared: path, size, time of change, inode.
_undamaged: set[tuple[Path, int, int, int]] = set()


@dataclass(frozen=True, slots=True)
class BasePart:
    """The part ``box`` of a base tensor, against which a part of a state's tensor is coded."""

    tensors: BaseTensors
    tensor: DcpBaseTensor
    box: Box

    @property
    def name(self) -> str:
        """The base tensor's name."""
        return self.tensor.name

    @property
    def path(self) -> str:
        """The place of the base."""
        return self.tensors.where

    @property
    def dtype(self) -> str:
        """The base tensor's dtype."""
        return self.tensor.dtype

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the part's bytes, in row-major order, beginning at byte ``start``."""
        itemsize = _ITEMSIZES[self.dtype]
        first, end = start // itemsize, (start + out.size) // itemsize
        out[:] = self.tensors.read(self.tensor.name, self.box, first, end)

    def expect(self) -> AbstractContextManager[None]:
        """Announce that all of it will be read within the block, in about this order."""
        return self.tensors.expect([(self.tensor.name, self.box)])


def find_counterpart(
    tensors: BaseTensors, name: str, dtype: str, shape: tuple[int, ...]
) -> DcpBaseTensor | None:
    """Find the base tensor called ``name``, or that without its first part (which belongs to the state, as in
    ``{"model": model.state_dict()}``).

    It has the same shape, and the same dtype or a float dtype that converts to it.
    """
    for candidate in candidates(name):
        found = tensors.find(candidate)
        if found is None or found.shape != shape:
            continue
        if found.dtype == dtype or codec.is_convertible(found.dtype, dtype):
            return DcpBaseTensor(candidate, found.dtype)
    return None


def candidates(name: str) -> tuple[str, str]:
    """The names to look for in a base, for a tensor of a state: its own, and that without the first part."""
    return name, name.partition(".")[2]
