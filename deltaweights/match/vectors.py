"""Some elements of a tensor, a fixed distance apart, read as numbers: what parts of tensors are told by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Tensor
from ..codec import convert, is_convertible
from ..dtypes import DTYPES

#: Elements of a sample, where there are as many.
SAMPLE = 64

#: A row of fewer elements is not searched for: among thousands of rows, one would resemble it by chance.
MIN_WIDTH = 32

#: Samples as far apart as this or less show the same weights; see :func:`distances`.
CLOSE = 0.5

#: Numbers whose mean is this many times their spread or more, such as those of norms, resemble all others of
#: their kind.
_FLAT = 4

#: Elements at a distance are read with those between them if all together take up so many bytes at most.
_EXTENT_BYTES = 1 << 16

#: Numbers of this size or more count as 0, so that sums do not overflow.
_HUGE = 1e30


@dataclass(frozen=True, slots=True)
class Vector:
    """The elements ``start + k * stride`` of ``tensor``."""

    tensor: Tensor
    start: int
    count: int
    stride: int


class OutOfBudgetError(Exception):
    """A search took more reads than it may."""


@dataclass
class Samples:
    """Reads samples, and counts what that takes, in the time of a small read.

    Attributes:
        cost: what was spent.
        limit: where reading ends, with :class:`OutOfBudgetError`.
        normalizes: whether samples are divided by their mean size, so that quantized weights resemble those
            that they were made from, whatever their scales.
    """

    cost: float = 0
    limit: float = np.inf
    normalizes: bool = False

    def spend(self, cost: float) -> None:
        """Count other work of that cost."""
        self.cost += cost
        if self.cost > self.limit:
            raise OutOfBudgetError

    def read(self, vector: Vector) -> NDArray[np.float32]:
        """The vector's elements, as numbers."""
        return self.read_all([vector]).reshape(-1)

    def read_all(self, vectors: Sequence[Vector]) -> NDArray[np.float32]:
        """A row of numbers for each of several vectors of one length and dtype."""
        dtype = vectors[0].tensor.dtype
        itemsize = DTYPES[dtype].itemsize
        assert itemsize
        data = np.empty((len(vectors), vectors[0].count * itemsize), np.uint8)
        for row, vector in zip(data, vectors, strict=True):
            self._read_into(vector, itemsize, row)
        found = numbers(data.reshape(-1), dtype).reshape(len(vectors), -1)
        if self.normalizes:
            sizes = np.abs(found).mean(axis=1, keepdims=True)
            found = np.divide(found, sizes, out=np.zeros_like(found), where=sizes > 0)
        return found

    def alike(self, one: Vector, other: Vector) -> bool:
        """Whether two vectors of a length hold the same weights, perhaps trained further."""
        return are_close(self.read(one), self.read(other))

    def _read_into(self, vector: Vector, itemsize: int, out: NDArray[np.uint8]) -> None:
        extent = (vector.count - 1) * vector.stride + 1
        if vector.stride == 1:
            self.spend(1)
            vector.tensor.read_into(vector.start * itemsize, out)
        elif extent * itemsize <= _EXTENT_BYTES:
            self.spend(2)
            data = np.empty(extent * itemsize, np.uint8)
            vector.tensor.read_into(vector.start * itemsize, data)
            out.reshape(-1, itemsize)[:] = data.reshape(-1, itemsize)[:: vector.stride]
        else:
            self.spend(vector.count)
            for k, element in enumerate(out.reshape(-1, itemsize)):
                vector.tensor.read_into((vector.start + k * vector.stride) * itemsize, element)


def distances(ones: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far rows of :func:`numbers` are apart, as similarity.py has it: their mean difference by their mean
    size, which is 0 for equal ones and 1.4 for unrelated ones."""
    apart = np.abs(others - ones).sum(axis=-1)
    sizes = (np.abs(others).sum(axis=-1) + np.abs(ones).sum(axis=-1)) / 2
    found: NDArray[np.float32] = np.divide(apart, sizes, out=np.zeros_like(apart), where=sizes > 0)
    return found


def are_close(ones: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    """Whether two samples show the same weights."""
    return bool(distances(ones, others) < CLOSE)


def tells(sample: NDArray[np.float32]) -> bool:
    """Whether weights can be told by this sample: whether they differ enough among themselves."""
    size = float(np.abs(sample).mean(dtype=np.float64))
    return size > 0 and float(sample.std(dtype=np.float64)) * _FLAT > size


def can_be_read(tensor: Tensor) -> bool:
    """Whether it has elements, of a dtype that :func:`numbers` knows."""
    dtype = DTYPES.get(tensor.dtype)
    is_known = dtype and dtype.itemsize and tensor.dtype not in ("BOOL", "C64")
    return bool(is_known) and tensor.info.numel > 0


def dtype_class(tensor: Tensor) -> str:
    """Equal for tensors whose elements can be coded against each other's: empty for floats that are
    converted, or else the dtype."""
    return "" if is_convertible(tensor.dtype, "F32") else tensor.dtype


def numbers(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Elements as finite numbers of moderate size. Others than floats count as signed integers:
    packed ones are any bits, which differ most if they are about zero."""
    found: NDArray[np.float32]
    if is_convertible(dtype, "F32"):
        found = convert(data, dtype, "F32").view("<f4")
    elif DTYPES[dtype].mantissa:
        found = _small_floats(DTYPES[dtype].mantissa)[data]
    else:
        found = data.view(f"<i{DTYPES[dtype].itemsize}").astype(np.float32)
    return np.where(np.abs(found) < _HUGE, found, np.float32(0))


def _small_floats(mantissa: int) -> NDArray[np.float32]:
    """The value of every float of 8 bits, but for a factor; NaN and infinity count as large ones."""
    bits = np.arange(128)
    exponent, fraction = bits >> mantissa, bits & ((1 << mantissa) - 1)
    steps = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
    sizes = np.ldexp(steps.astype(np.float32), np.maximum(exponent, 1))
    return np.concatenate([sizes, -sizes]).astype(np.float32)
