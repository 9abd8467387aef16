"""A model's tensors cut into the parts of a stream's, in the tensors' own memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..boxes import Box, cut
from .records import StateRecord, StreamTensor
from .state import TORCH_WORDS, StateTensor

#: The names of each tensor's payloads, and the parts that they hold; None: the whole tensor.
Cuts: TypeAlias = Mapping[str, Mapping[str, Box | None]]


def cuts_of(tensors: Iterable[StreamTensor]) -> Cuts:
    """How a stream's tensors are cut."""
    return {
        tensor.name: {key: part.box if part else None for key, part in tensor.keys.items()}
        for tensor in tensors
    }


def has_cuts(record: StateRecord, cuts: Cuts, *, is_partial: bool) -> bool:
    """Whether the record's tensors are cut like this, or, if ``is_partial``, have these parts."""
    theirs = cuts_of(record.tensors)
    if not is_partial:
        return theirs == cuts
    return all(
        key in theirs.get(name, {}) and theirs[name][key] == box
        for name, parts in cuts.items()
        for key, box in parts.items()
    )


def split(state: Mapping[str, StateTensor], cuts: Cuts) -> dict[str, StateTensor]:
    """The tensors' parts by the names of their payloads.

    Args:
        state: tensors by name; or parts by the names of their payloads, which stay as they are.
        cuts: parts that lie within them.
    """
    return {
        key: _part_of(key, state[name].tensor[box.slices]) if box and key not in state else state[key]
        for name, parts in cuts.items()
        for key, box in parts.items()
    }


def _part_of(key: str, view: Tensor) -> StateTensor:
    return StateTensor(key, view) if view.is_contiguous() else StridedPart(key, view)


class StridedPart(StateTensor):
    """A part whose rows are not adjacent: some columns of a matrix. Its bytes are gathered whenever they are
    read, and scattered when they are written.

    Args:
        name: of its payload.
        view: its elements.
    """

    def __init__(self, name: str, view: Tensor) -> None:
        super().__init__(name, view[:0])  # without a copy
        self.shape = tuple(view.shape)
        self.nbytes = view.nbytes
        self._tensor = view
        self._bytes = None
        self._is_copy = False
        self.identity = ("part", str(view.device), view.data_ptr(), self.code, self.shape, view.stride())

    @property
    def device(self) -> torch.device:
        """The device of its bytes."""
        return self._tensor.device

    @property
    def on_gpu(self) -> None:
        """None: kernels take adjacent bytes."""
        return None

    @property
    def memory(self) -> Tensor:
        """The tensor that it is a part of, or some of it."""
        return self._tensor

    def _boxes(self, start: int, nbytes: int) -> Iterator[tuple[Tensor, slice]]:
        """The elements in these bytes, as few boxes of them, and each box's place among the bytes."""
        itemsize, position = self.words.itemsize, 0
        for box in cut(self.shape, start // itemsize, (start + nbytes) // itemsize):
            end = position + box.numel * itemsize
            yield self._tensor[box.slices], slice(position, end)
            position = end

    def read(self, start: int, end: int) -> NDArray[np.uint8]:
        """A copy of the bytes from ``start`` to ``end`` (uint8), both at the border of an element."""
        data = torch.empty(end - start, dtype=torch.uint8)
        for box, span in self._boxes(start, end - start):
            data[span].view(box.dtype).view(box.shape).copy_(box)
        copy: NDArray[np.uint8] = data.numpy()
        return copy

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        """Replace the bytes beginning at ``start`` by ``data`` (uint8)."""
        bits = torch.from_numpy(data)
        with torch.inference_mode():
            for box, span in self._boxes(start, data.size):
                box.copy_(bits[span].view(box.dtype).view(box.shape))

    def put_at(self, indices: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Replace the elements at different indices by ``values`` (of the type ``words``)."""
        with torch.inference_mode():
            elements = self._tensor.view(TORCH_WORDS[self.words.itemsize])
            bits = torch.from_numpy(values.view(np.uint8)).view(elements.dtype).to(elements.device)
            places = np.unravel_index(indices, self.shape)
            elements.index_put_(tuple(torch.from_numpy(one).to(elements.device) for one in places), bits)


def whole_indices(indices: NDArray[np.int64], box: Box | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The indices in a tensor of ``shape`` of the elements at ``indices`` of its part ``box``."""
    if box is None:
        return indices
    places = np.unravel_index(indices, box.sizes)
    moved = tuple(place + offset for place, offset in zip(places, box.offsets, strict=True))
    found: NDArray[np.int64] = np.asarray(np.ravel_multi_index(moved, shape), np.int64)
    return found
