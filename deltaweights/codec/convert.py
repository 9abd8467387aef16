"""Converts the base to the target's dtype, by an exact, portable rule, since a single wrong bit in the base
would decode to garbage.

Values are widened to F32 (F64: rounded to nearest even), then rounded to nearest even. Every NaN becomes the
quiet NaN of its sign without payload, because processors disagree on the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES

_FLOATS = {code: DTYPES[code].bits // 8 for code in ("BF16", "F16", "F32", "F64")}


def is_convertible(source: str, target: str) -> bool:
    """Whether :func:`convert` knows this pair of dtype codes."""
    return source in _FLOATS and target in _FLOATS


def rescale(nbytes: int, source: str, target: str) -> int:
    """The bytes that the elements in ``nbytes`` bytes of dtype ``source`` take as ``target``."""
    return nbytes if source == target else nbytes * 8 // DTYPES[source].bits * DTYPES[target].bits // 8


def convert(data: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    """Convert the elements ``data`` (uint8, little-endian, whole elements) from dtype ``source`` to
    ``target``."""
    if source == target:
        return data
    if not is_convertible(source, target):
        raise ValueError(f"no rule to convert {source} to {target}")
    if source == "BF16":
        single = (data.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            single = data.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[source]).astype("<f4")
    bits = single.view("<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        bits = np.where(nan, (bits & 0x80000000) | 0x7FC00000, bits)
        single = bits.view("<f4")
    if target == "BF16":
        rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
        rounded[nan] = bits[nan]
        result = (rounded >> 16).astype("<u2")
    elif target == "F32":
        result = single
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            result = single.astype({"F16": "<f2", "F64": "<f8"}[target])
    return np.frombuffer(result.data, np.uint8)
