"""Arithmetic with floats that has the same result on every machine, to the last bit.

An encoder's choices depend on it, and payloads are the same everywhere. So the kernels take nothing from
the C library, which differs between systems, and leave no sum to LLVM to reorder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ..kernel_arrays import Floats
from .kernel import array, intrinsic, kernel, room

_LANES = 16
_FRACTION, _BIAS = np.int64((1 << 52) - 1), np.int64(1023)
_ONE, _SQRT_2 = np.int64(1023 << 52), 1.4142135623730951
_partial_sums = room(types.float32, _LANES)
#: log2(m) = sum of _SERIES[k] * s**(2k + 1) with s = (m - 1) / (m + 1): the series of the inverse hyperbolic
#: tangent. With m between sqrt(1/2) and sqrt(2), eleven terms are as exact as a double.
_SERIES = tuple(2.0 / (0.6931471805599453 * (2 * k + 1)) for k in range(11))


@intrinsic
def _bits_of(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@intrinsic
def _float_of(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@kernel(types.float64(types.float64))
def log2(value: float) -> float:
    """The logarithm of a positive, normal number; exact for powers of two."""
    bits = _bits_of(value)
    exponent = (bits >> 52) - _BIAS
    mantissa = _float_of((bits & _FRACTION) | _ONE)
    if mantissa > _SQRT_2:
        mantissa, exponent = mantissa * 0.5, exponent + 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    low = _SERIES[0] + z * (_SERIES[1] + z * _SERIES[2])
    middle = _SERIES[3] + z * (_SERIES[4] + z * _SERIES[5])
    high = _SERIES[6] + z * (_SERIES[7] + z * _SERIES[8])
    top = _SERIES[9] + z * _SERIES[10]
    cube = z * z * z
    return np.float64(exponent) + s * (low + cube * (middle + cube * (high + cube * top)))  # type: ignore[no-any-return]


@kernel(types.float32(array(types.float32)))
def sum_of(values: Floats) -> float:
    """The sum of float32s, in sixteen interleaved sums that are then added up in order."""
    sums = _partial_sums()
    for lane in range(_LANES):
        sums[lane] = np.float32(0)
    whole = len(values) - len(values) % _LANES
    for first in range(0, whole, _LANES):
        for lane in range(_LANES):
            sums[lane] += values[first + lane]
    for i in range(whole, len(values)):
        sums[i - whole] += values[i]
    for half in (8, 4, 2, 1):
        for lane in range(half):
            sums[lane] += sums[lane + half]
    return sums[0]  # type: ignore[no-any-return]
