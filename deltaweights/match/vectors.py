"""Some elements of a tensor, a fixed distance apart, read as numbers: what parts of tensors are told by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Tensor
from ..codec import convert, is_convertible
from ..dtypes import DTYPES
from .similarity import distances

#: Elements of a sample, where there are as many.
SAMPLE = 64

#: A row of fewer elements is not searched for: among thousands of rows, one would resemble it by chance.
MIN_WIDTH = 32

#: Samples as far apart as this or less show the same weights; see :func:`~.similarity.distances`.
_CLOSE = 0.5

#: Numbers whose mean is this many times their spread or more, such as those of norms, resemble all others of
#: their kind.
_FLAT = 4

#: Elements at a distance are read with those between them if all together take up so many bytes at most.
_EXTENT_BYTES = 1 << 16


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
    """

    cost: float = 0
    limit: float = np.inf

    def spend(self, cost: float) -> None:
        """Count other work of that cost."""
        self.cost += cost
        if self.cost > self.limit:
            raise OutOfBudgetError

    def read(self, vector: Vector) -> NDArray[np.float32]:
        """The vector's elements, as numbers."""
        tensor, start, count, stride = vector.tensor, vector.start, vector.count, vector.stride
        itemsize = DTYPES[tensor.dtype].itemsize
        assert itemsize
        extent = (count - 1) * stride + 1
        if extent * itemsize <= max(_EXTENT_BYTES, count * itemsize):
            self.spend(1)
            data = np.empty(extent * itemsize, np.uint8)
            tensor.read_into(start * itemsize, data)
            return numbers(data, tensor.dtype)[::stride]
        self.spend(count)
        data = np.empty(count * itemsize, np.uint8)
        for k in range(count):
            tensor.read_into((start + k * stride) * itemsize, data[k * itemsize : (k + 1) * itemsize])
        return numbers(data, tensor.dtype)

    def alike(self, one: Vector, other: Vector) -> bool:
        """Whether two vectors of a length hold the same weights, perhaps trained further."""
        return are_close(self.read(one), self.read(other))


def are_close(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two samples show the same weights."""
    return bool(distances(one, other[np.newaxis])[0] < _CLOSE)


def tells(sample: NDArray[np.float32]) -> bool:
    """Whether weights can be told by this sample: whether they differ enough among themselves."""
    size = float(np.abs(sample).mean(dtype=np.float64))
    return size > 0 and float(sample.std(dtype=np.float64)) * _FLAT > size


def can_be_read(tensor: Tensor) -> bool:
    """Whether it has elements, of a dtype that :func:`numbers` knows."""
    dtype = DTYPES.get(tensor.dtype)
    is_known = dtype and (kind_of(tensor) or dtype.mantissa or (dtype.numpy and dtype.numpy[1] in "iu"))
    return bool(is_known) and tensor.info.numel > 0


def kind_of(tensor: Tensor) -> str:
    """Equal for tensors whose elements can be coded against each other's: empty for floats that are
    converted, or else the dtype."""
    return "" if is_convertible(tensor.dtype, "F32") else tensor.dtype


def numbers(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Elements as finite numbers whose sums do not overflow. Integers count as signed: packed ones are any
    bits, and their sizes must be about zero to differ as much as they can."""
    found: NDArray[np.float32]
    if is_convertible(dtype, "F32"):
        found = convert(data, dtype, "F32").view("<f4")
    elif DTYPES[dtype].mantissa:
        found = _small_floats(DTYPES[dtype].mantissa)[data]
    else:
        found = data.view(f"<i{DTYPES[dtype].itemsize}").astype(np.float32)
    return np.clip(np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0), -1e30, 1e30)


def _small_floats(mantissa: int) -> NDArray[np.float32]:
    """The value of every float of 8 bits, but for a factor; NaN and infinity count as large ones."""
    bits = np.arange(128)
    exponent, fraction = bits >> mantissa, bits & ((1 << mantissa) - 1)
    steps = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
    sizes = np.ldexp(steps.astype(np.float32), np.maximum(exponent, 1))
    return np.concatenate([sizes, -sizes]).astype(np.float32)
