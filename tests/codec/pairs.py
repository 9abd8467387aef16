"""Pairs of chunks for the codec's tests: what a fine-tune looks like, and what it must survive."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaweights.codec.methods.ulp import FORMATS

Bytes = NDArray[np.uint8]


def to_bits(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Floats to bit patterns of a dtype, rounded somehow (the tests do not care how)."""
    if dtype in ("F32", "C64"):
        return values.astype("<f4").view("<u4")
    if dtype == "F64":
        return values.astype("<f8").view("<u8")
    if dtype == "F16":
        return values.astype("<f2").view("<u2")
    if dtype == "BF16":
        return ((values.astype("<f4").view("<u4") + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2")
    half = values.astype("<f2").view("<u2")
    if dtype == "F8_E5M2":
        return (half >> np.uint16(8)).astype("u1")
    return ((half >> np.uint16(8) & np.uint16(0x80)) | (half >> np.uint16(7) & np.uint16(0x7F))).astype("u1")


def fine_tune(
    dtype: str, count: int, update: float, seed: int = 0, spread: float = 0.02
) -> tuple[Bytes, Bytes]:
    """(base, target) of `count` weights, the target moved by Laplace updates of std `update`."""
    rng = np.random.default_rng(seed)
    base = to_bits(rng.normal(0, spread, count), dtype)
    target = to_bits(values_of(base, dtype) + rng.laplace(0, update / 2**0.5, count), dtype)
    return base.view(np.uint8), target.view(np.uint8)


def decayed(
    count: int, rate: float, steps: int, moved: float = 0.0, seed: int = 0, width: int = 384
) -> tuple[Bytes, Bytes]:
    """(base, target) of `count` F32 weights: `steps` of weight decay, the learning rate times the decay going
    from `rate` to 0; and updates of std 2e-4 in that part of the rows of `width` that `moved` says."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.03, count).astype("<f4")
    target = base.copy()
    for step in range(steps):
        target *= np.float32(1 - rate * (1 - step / steps))
    rows = np.repeat(rng.random(count // width + 1) < moved, width)[:count]
    target[rows] += rng.laplace(0, 2e-4 / 2**0.5, np.count_nonzero(rows)).astype("<f4")
    return base.view(np.uint8), target.view(np.uint8)


def values_of(bits: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Bit patterns back to floats."""
    if dtype == "BF16":
        return (bits.astype("<u4") << np.uint32(16)).view("<f4").astype(np.float64)
    if dtype == "F8_E5M2":
        return (bits.astype("<u2") << np.uint16(8)).view("<f2").astype(np.float64)
    if dtype == "F8_E4M3":
        wide = bits.astype("<u2")
        half = (wide & np.uint16(0x80)) << np.uint16(8) | (wide & np.uint16(0x7F)) << np.uint16(7)
        return half.view("<f2").astype(np.float64)
    return bits.view(f"<f{bits.dtype.itemsize}").astype(np.float64)


def noise(dtype: str, count: int, seed: int = 0) -> Bytes:
    """Any bits at all: NaN payloads, infinities, subnormals, both zeros."""
    itemsize = FORMATS[dtype].itemsize if dtype in FORMATS else 1
    return np.random.default_rng(seed).integers(0, 256, count * itemsize, dtype=np.uint8)


def numpy_free_alignment(data: Bytes, offset: int) -> Bytes:
    """A copy of data that begins `offset` bytes past an aligned address."""
    room = np.zeros(len(data) + offset + 16, np.uint8)
    start = -room.ctypes.data % 16 + offset
    room[start : start + len(data)] = data
    return room[start : start + len(data)]
