"""Maps floats to integers in numeric order, and measures their distances in ULPs (NumPy).

This is the readable form of the vector code in :mod:`.delta`; the tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES

Unsigned = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class FloatFormat:
    """The layout of a float type: the exponent is (bits >> shift) & mask, the sign is the top bit."""

    itemsize: int
    shift: int
    mask: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The unsigned integers that hold this type's bits, little-endian."""
        return np.dtype(f"<u{self.itemsize}")


FORMATS = {
    code: FloatFormat(dtype.bits // 8, dtype.mantissa, (1 << dtype.exponent) - 1)
    for code, dtype in DTYPES.items()
    if dtype.exponent
}
FORMATS["C64"] = FORMATS["F32"]  # pairs


def numeric_order(bits: Unsigned) -> Unsigned:
    """Map bit patterns to integers in the floats' numeric order, modulo 2**N; its own inverse.

    Negative floats have their magnitude bits flipped, so that read as two's complement the result
    rises with the value: -0.0 is -1, +0.0 is 0.
    """
    top = 8 * bits.dtype.itemsize - 1
    one = bits.dtype.type(1)
    magnitude = bits.dtype.type((1 << top) - 1)
    negative = (bits >> bits.dtype.type(top)) & one
    return bits ^ (negative * magnitude)


def distance(base: Unsigned, target: Unsigned) -> Unsigned:
    """The distance of the target from the base in ULPs, positive away from zero, zigzagged: 0, -1, +1, -2 ...

    base, target: bit patterns (uint8 ... uint64) of equal length. Exact modulo 2**N, hence
    invertible for every pair of patterns: see `restore`.
    """
    kind = base.dtype.type
    top = kind(8 * base.dtype.itemsize - 1)
    steps = numeric_order(target) - numeric_order(base)
    steps = np.where(base >> top, kind(0) - steps, steps)
    sign = kind(0) - (steps >> top)
    return (steps << kind(1)) ^ sign


def restore(base: Unsigned, zigzag: Unsigned) -> Unsigned:
    """The target at distance `zigzag` from the base: restore(b, distance(b, t)) == t."""
    kind = base.dtype.type
    top = kind(8 * base.dtype.itemsize - 1)
    steps = (zigzag >> kind(1)) ^ (kind(0) - (zigzag & kind(1)))
    steps = np.where(base >> top, kind(0) - steps, steps)
    return numeric_order(numeric_order(base) + steps)


def exponent(bits: Unsigned, form: FloatFormat) -> NDArray[np.int64]:
    """The biased exponent of each pattern."""
    return (bits.astype(np.uint64) >> np.uint64(form.shift)).astype(np.int64) & form.mask


def rotate(bits: Unsigned) -> Unsigned:
    """Move the sign from the top bit to the bottom: exponent, mantissa, sign."""
    kind = bits.dtype.type
    return (bits << kind(1)) | (bits >> kind(8 * bits.dtype.itemsize - 1))


def unrotate(rotated: Unsigned) -> Unsigned:
    """The inverse of `rotate`."""
    kind = rotated.dtype.type
    return (rotated >> kind(1)) | (rotated << kind(8 * rotated.dtype.itemsize - 1))
