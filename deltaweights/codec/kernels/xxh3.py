"""XXH3-64, compiled, for kernels that check what they read and write: to call the xxhash library, a thread
would have to wait for Python's lock.

Method and numbers: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..constants import XXH3_KEYS, XXH3_LAST_FACTOR, XXH3_LENGTH_FACTOR, XXH3_SCRAMBLE_FACTOR, XXH3_START
from ..kernel_arrays import Bytes
from .kernel import array, intrinsic, kernel, room
from .vectors import I8, I32, I64, Vec, address, int64

_STRIPE, _STRIPES = 64, 16  # bytes of a stripe, and stripes of a block
_SCRAMBLE, _LAST, _MERGE = 16, 24, 32  # where those keys begin that are for other things than stripes
_keys, _start = np.array(XXH3_KEYS, np.uint64), np.array(XXH3_START, np.uint64)
_accumulators = room(types.uint64, 8)
_half, _low = np.uint64(32), np.uint64(0xFFFFFFFF)


@kernel(types.int64(array(types.uint8)))
def xxh3(data: Bytes) -> int:
    """The hash of more than 240 bytes, seed 0, as a signed number of the same bits."""
    sums, blocks = _accumulators(), (len(data) - 1) // (_STRIPE * _STRIPES)
    for i in range(8):
        sums[i] = _start[i]
    at = 0
    for _ in range(blocks):
        _mix(data, at, _STRIPES, _keys, 0, sums)
        for i in range(8):
            mixed = sums[i] ^ (sums[i] >> np.uint64(47)) ^ _keys[_SCRAMBLE + i]
            sums[i] = mixed * np.uint64(XXH3_SCRAMBLE_FACTOR)
        at += _STRIPE * _STRIPES
    _mix(data, at, (len(data) - 1 - at) // _STRIPE, _keys, 0, sums)
    _mix(data, len(data) - _STRIPE, 1, _keys, _LAST, sums)
    found = np.uint64(len(data)) * np.uint64(XXH3_LENGTH_FACTOR)
    for i in range(0, 8, 2):
        found += _folded(sums[i] ^ _keys[_MERGE + i], sums[i + 1] ^ _keys[_MERGE + i + 1])
    found = (found ^ (found >> np.uint64(37))) * np.uint64(XXH3_LAST_FACTOR)
    return np.int64(found ^ (found >> _half))  # type: ignore[return-value]


@kernel(inline="always")
def _folded(a: np.uint64, b: np.uint64) -> np.uint64:
    """The product's lower 64 bits XOR its upper ones."""
    middle = (a >> _half) * (b & _low) + (((a & _low) * (b & _low)) >> _half)
    other = (a & _low) * (b >> _half) + (middle & _low)
    return (a * b) ^ ((a >> _half) * (b >> _half) + (middle >> _half) + (other >> _half))


@intrinsic
def _mix(typingctx: Any, data: Any, at: Any, stripes: Any, keys: Any, key: Any, sums: Any) -> Any:
    """Add so many stripes of data[at:] to the eight sums, the keys of the first beginning at keys[key]."""
    kind = ir.VectorType(I64, 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_of, words_of, into = (
            context.make_array(kind_of)(context, builder, args[i]).data
            for i, kind_of in ((0, data), (3, keys), (5, sums))
        )
        place = address(builder, into, int64(0), I64)
        total = cgutils.alloca_once_value(builder, builder.load(place, typ=kind, align=8))
        with cgutils.for_range(builder, args[2]) as turn:
            offset = builder.add(args[1], builder.mul(turn.index, int64(_STRIPE)))
            stripe = builder.load(address(builder, bytes_of, offset, I8), typ=kind, align=1)
            where = address(builder, words_of, builder.add(args[4], turn.index), I64)
            keyed = Vec(builder, builder.xor(stripe, builder.load(where, typ=kind, align=8)))
            swapped = builder.shuffle_vector(
                stripe, stripe, ir.Constant(ir.VectorType(I32, 8), [1, 0, 3, 2, 5, 4, 7, 6])
            )
            product = (keyed & 0xFFFFFFFF) * (keyed >> 32)
            added = Vec(builder, builder.load(total, typ=kind)) + Vec(builder, swapped) + product
            builder.store(added.value, total)
        builder.store(builder.load(total, typ=kind), place, align=8)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.int64, keys, types.int64, sums), codegen
