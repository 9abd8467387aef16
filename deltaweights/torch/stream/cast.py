"""Tensors that are read in a narrower dtype, as trainers publish float32 master weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tensors import code_of
from .state import StateTensor


class CastTensor(StateTensor):
    """A floating-point tensor's bytes in the narrower ``dtype``, made of its values whenever they are read:
    bit for bit those of ``tensor.to(dtype)``. It cannot be written."""

    def __init__(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        super().__init__(name, tensor)
        self._dtype = dtype
        self._values = self._flat.view(tensor.dtype)
        self._bytes = None
        self.code = code_of(name, dtype)
        self.nbytes = tensor.numel() * dtype.itemsize

    @property
    def on_gpu(self) -> None:
        """None: no kernel can use its bytes."""
        return None

    def read(self, start: int, end: int) -> NDArray[np.uint8]:
        """A copy of the bytes from ``start`` to ``end`` (uint8), both at the border of an element."""
        itemsize = self._dtype.itemsize
        values = self._values[start // itemsize : end // itemsize].to(self._dtype)
        copy: NDArray[np.uint8] = values.view(torch.uint8).cpu().numpy()
        return copy


def read_as(name: str, tensor: Tensor, dtype: torch.dtype | None) -> StateTensor:
    """The tensor's bytes: in ``dtype`` if it is floating-point and its elements are larger, else as it is."""
    if dtype is not None and tensor.is_floating_point() and tensor.itemsize > dtype.itemsize:
        return CastTensor(name, tensor, dtype)
    return StateTensor(name, tensor)
