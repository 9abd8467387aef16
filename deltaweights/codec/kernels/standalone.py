"""Floats without a base, compiled: the leading byte entropy-coded, the others as byte planes.

Rotated so that the sign comes last, a float's leading byte is its exponent (all of it in BF16 and
F32, with three mantissa bits in F16), which is where nearly all that can be saved lies.
"""

from __future__ import annotations

import numpy as np
from numba import types

from ..constants import BAD, BLOCK, GUARD, LANES, TAIL
from ..kernel_arrays import Bytes, Elements, Numbers, Words
from ..tables import BYTE_BITS, PRECISION
from . import runs
from .arithmetic import log2
from .kernel import kernel, room

_block_of_bytes, _block_of_numbers = room(types.uint8, BLOCK), room(types.uint32, BLOCK)
_counts_of_bytes = room(types.int64, 256)
_one_long, _settings, _rest = room(types.int64, 1), room(types.int64, 4), room(types.int64, 64)
_slots, _states = room(types.uint32, 1 << PRECISION), room(types.uint32, 64)


@kernel()
def rotated_byte(bits: Elements, place: int, out: Elements) -> None:
    """Byte `place` (0 = lowest) of each element, rotated so that its sign comes last, into out."""
    # One shift takes the byte from above the sign's new place, the sign itself being byte 0's.
    top, shift = 8 * bits.itemsize - 1, 8 * place - 1
    if place == 0:
        for i in range(len(bits)):
            value = np.int64(bits[i])
            out[i] = ((value << 1) | ((value >> top) & 1)) & 255
    else:
        for i in range(len(bits)):
            out[i] = (np.int64(bits[i]) >> shift) & 255


@kernel()
def upper_words(bits: Elements, out: Numbers) -> None:
    """The upper 16 bits of each element (uint16 or wider), rotated so that its sign comes last."""
    top = 8 * bits.itemsize - 1
    if bits.itemsize == 2:
        for i in range(len(bits)):
            value = np.int64(bits[i])
            out[i] = ((value << 1) | (value >> top)) & 0xFFFF
    else:
        for i in range(len(bits)):
            out[i] = (np.uint64(bits[i]) >> np.uint64(top - 16)) & np.uint64(0xFFFF)


@kernel()
def enter_window(words: Numbers, bias: int, span: int, values: Numbers) -> int:
    """Words as their distance from the bias, 1 to span - 1, and 0 for those farther off; how many are."""
    outside = 0
    for i in range(len(words)):
        value = (np.int64(words[i]) - bias) & 0xFFFF
        inside = value < span
        values[i] = value if inside else 0
        outside += (not inside) | (value == 0)
    return outside


@kernel()
def join(leading: Numbers, planes: Bytes, out: Elements) -> None:
    """The elements with these leading bits (uint32[n]) and planes of lower bytes (uint8[.., n])."""
    size = out.itemsize
    if size <= 4:
        for p in range(len(planes) - 1, -1, -1):
            plane = planes[p]
            for i in range(len(out)):
                leading[i] = (leading[i] << np.uint32(8)) | np.uint32(plane[i])
        top = 8 * size - 1
        for i in range(len(out)):
            value = np.int64(leading[i])
            out[i] = (value >> 1) | ((value & 1) << top)
    else:
        for i in range(len(out)):
            whole = np.uint64(leading[i])
            for p in range(len(planes) - 1, -1, -1):
                whole = whole << np.uint64(8) | np.uint64(planes[p, i])
            out[i] = (whole >> np.uint64(1)) | (whole << np.uint64(63))


@kernel()
def decode_joined(
    data: Bytes, family: Numbers, frequencies: Numbers, words: Words, planes: Bytes, out: Elements
) -> bool:
    """Fill out (unsigned[n]) from a run of leading bytes and the other planes; False: bad.

    data     uint8, all of the run
    planes   uint8[itemsize - 1, n]; the others as in :func:`.runs.decode_list`
    """
    members, slots, states, settings, rest = _one_long(), _slots(), _states(), _settings(), _rest()
    members[0], settings[TAIL] = 0, 0
    rest[:] = 0
    count = runs.open_run(data, members, family, BYTE_BITS, frequencies, slots, states, settings, words)
    if count == BAD:
        return False
    words = words[:count]
    contexts, values, cursor = _block_of_bytes(), _block_of_numbers(), 0
    contexts[:] = 0
    for first in range(0, len(out), BLOCK):
        stop = min(first + BLOCK, len(out))
        block = contexts[: stop - first]
        cursor = runs.decode_values(words, cursor, slots, block, values, settings, states, rest)
        if cursor > len(words) - GUARD:
            return False
        join(values, planes[:, first:stop], out[first:stop])
    return runs.ended_well(words, cursor, settings[LANES], states)


@kernel()
def byte_bits(values: Bytes, stride: int) -> float:
    """The order-0 entropy of bytes in bits each, from every `stride`-th run of 256."""
    counts = _counts_of_bytes()
    counts[:] = 0
    for first in range(0, len(values), 256 * stride):
        for i in range(first, min(first + 256, len(values))):
            counts[values[i] & 255] += 1
    total, bits = 0.0, 0.0
    for t in range(256):
        if counts[t] > 0:
            total += counts[t]
            bits -= counts[t] * log2(np.float64(counts[t]))
    return (bits + total * log2(total)) / total if total > 0.0 else 0.0
