# mypy: ignore-errors
# Numba and LLVM type what is in here.
"""Chunks next to each other, decoded and checked, or compared, in one call: for each chunk and each checksum
alone a thread would have to wait for Python's lock, which is most of what many threads do otherwise.

Only what most chunks are is decoded here: elements of 8 or 16 bits, methods SAME, DELTA and SPARSE, planes
that are stored or of one byte. The rest, and what is not right, is left to :mod:`.chunk`, which says why.
"""

from __future__ import annotations

import numpy as np
from numba import types

from . import delta, runs, subset
from .constants import (
    AFTER,
    BAD,
    BEFORE,
    DELTA,
    FILL,
    FINE,
    HEAD,
    LENGTH,
    METHOD,
    RAW,
    RECORD_BYTES,
    SAME,
    SPARSE,
    SPARSE_HEAD,
    SPARSE_SHARE,
    SUBSET_UNIT,
    TABLES,
    UNIT,
    XXH3_SHORT,
)
from .kernel import kernel, room
from .spaces import OpenDelta
from .tables import DIRECT_BITS, PRECISION
from .xxh3 import xxh3

_PLANE_HEAD = 9
_layout, _starts = room(types.int64, 4), room(types.int64, 8)


@kernel()
def decode(records, coded, step, base_bytes, base, out_bytes, out, shift, mask, family, space, is_right):
    """Decode what can be of some chunks.

    records     uint8: the chunks' records (payload.RECORD)
    coded       uint8: the data of all chunks
    step        how many elements all chunks but the last have
    base, out   unsigned[n] of 8 or 16 bits, apart; base_bytes and out_bytes: the same memory as uint8
    space       a RowSpace
    is_right    bool[m], written: whether base and result have their checksums; else out holds anything

    Returns whether all are, and nothing follows the last chunk's data.
    """
    at, right = 0, 0
    for c in range(len(is_right)):
        record = records[c * RECORD_BYTES : (c + 1) * RECORD_BYTES]
        at, data = at + _number(record, LENGTH, 4), coded[at : at + _number(record, LENGTH, 4)]
        start, end = c * step, min((c + 1) * step, len(out))
        first, last = start * out.itemsize, end * out.itemsize
        is_right[c] = False
        method, nbytes = _number(record, METHOD, 4), last - first  # the bytes behind a method are zero
        if nbytes <= XXH3_SHORT or len(data) > nbytes or method not in (SAME, DELTA, SPARSE):
            continue
        if xxh3(base_bytes[first:last]) != _number(record, BEFORE, 8):
            continue
        before, result, is_done = base[start:end], out[start:end], False
        if method == DELTA:
            is_done = _decode_delta(data, before, result, len(before), shift, mask, family, space)
        elif method == SPARSE:
            is_done = _decode_sparse(data, before, result, shift, mask, family, space)
        elif len(data) == 0:
            is_done = _copy(before, result)
        if is_done:
            is_right[c] = xxh3(out_bytes[first:last]) == _number(record, AFTER, 8)
            right += is_right[c]
    return right == len(is_right) and at == len(coded)


@kernel()
def compare(base_bytes, base, target_bytes, target, step, found):
    """Checksums of chunks of base and target, and how many elements differ.

    base, target   unsigned[n]; base_bytes and target_bytes: the same memory as uint8
    step           how many elements all chunks but the last have
    found          int64[m, 3], written: the base's checksum and the target's, of chunks of more than
                   XXH3_SHORT bytes, and how many elements differ
    """
    for c in range(len(found)):
        start, end = c * step, min((c + 1) * step, len(base))
        first, last = start * base.itemsize, end * base.itemsize
        if last - first > XXH3_SHORT:
            found[c, 0], found[c, 1] = xxh3(base_bytes[first:last]), xxh3(target_bytes[first:last])
        found[c, 2] = subset.count_changes(base[start:end], target[start:end])


@kernel()
def _copy(source, out):
    for i in range(len(out)):
        out[i] = source[i]
    return True


@kernel(inline="always")
def _number(data, at, size):
    """The unsigned integer of `size` bytes at data[at]."""
    value = np.int64(0)
    for place in range(size):
        value |= np.int64(data[at + place]) << 8 * place
    return value


@kernel(inline="always")
def _signed(data, at, size):
    value, sign = _number(data, at, size), np.int64(1) << (8 * size - 1)
    return (value ^ sign) - sign


@kernel()
def _decode_delta(data, base, out, ahead, shift, mask, family, space):
    """Fill out from a delta (layout: see :mod:`.floats`) of at most so many elements; whether it is one."""
    layout, starts = _layout(), _starts()
    if len(data) < HEAD:
        return False
    log_segment, step, tables = np.int64(data[0]), np.int64(data[1]), np.int64(data[2])
    if not (log_segment == 0 or 6 <= log_segment <= 26) or step > 1 or not 1 <= tables <= 64:
        return False
    layout[0], layout[1], layout[2], layout[3] = log_segment, step, _signed(data, 3, 2), tables
    base_scale, tweak, at = _signed(data, 5, 2), _signed(data, 7, 1), HEAD
    listed = data[:0]
    if log_segment:
        if len(data) < at + 4 or len(data) < at + 4 + _number(data, at, 4):
            return False
        listed = data[at + 4 : at + 4 + _number(data, at, 4)]
        at += 4 + len(listed)
    starts[:] = 0
    segments = len(base) // UNIT + 1
    opened = OpenDelta(
        data[at:], listed, shift, mask, False, ahead, family, layout, base_scale, tweak, space.planes, starts,
        space.scales[:segments], space.above[:segments], space.slots[: layout[TABLES] << PRECISION],
        space.frequencies[: layout[TABLES]], space.words,
    )  # fmt: skip
    return delta.decode(base, out, opened) == FINE


@kernel()
def _decode_sparse(data, base, out, shift, mask, family, space):
    """Fill out from a sparse chunk's data (layout: see :mod:`.sparse`); whether it is one, and the plane is
    coded in one of the two simple ways."""
    if len(data) < SPARSE_HEAD + _PLANE_HEAD:
        return False
    cutoff, follows, exceptions = _signed(data, 0, 2), data[2], _number(data, 3, 4)
    active = space.active[: (len(base) + SUBSET_UNIT - 1) // SUBSET_UNIT]
    at = _read_marks(data, SPARSE_HEAD, active)
    if at == BAD or follows > 1 or cutoff < -1 or exceptions > len(base) // SPARSE_SHARE:
        return False
    places, values = space.places[:exceptions], space.values[:exceptions]
    if exceptions:
        at = _read_list(data, at, family, space, places)
        at = at if at == BAD else _read_list(data, at, family, space, values)
    if at == BAD or (follows == 1) != (at < len(data)):
        return False
    if not follows:
        return _copy(base, out) and subset.move(out, places, values)
    return subset.restore_at(base, places, values) and _merge_delta(
        data[at:], base, out, min(cutoff, mask), active, places, values, shift, mask, family, space
    )


@kernel()
def _merge_delta(data, base, out, cutoff, active, places, values, shift, mask, family, space):
    """Fill out from a delta of the chosen elements, and what others, at some places, became."""
    count = subset.choose(base, base, shift, mask, cutoff, active, space.chosen)
    chosen, changed = space.chosen[:count], space.changed[:count]
    if not _decode_delta(data, chosen, changed, 0, shift, mask, family, space):
        return False
    subset.merge(base, shift, mask, cutoff, active, space.changed, out)
    for i in range(len(places)):
        out[places[i]] = values[i]
    return True


@kernel()
def _read_marks(data, at, active):
    """Which units are active, from the plane at data[at]; where it ends, or BAD."""
    size = (len(active) + 7) >> 3
    kind, length, stored = data[at], _number(data, at + 1, 4), _number(data, at + 5, 4)
    at += _PLANE_HEAD
    if length != size or at + stored > len(data):
        return BAD
    if not ((kind == RAW and stored == size) or (kind == FILL and stored == 1)):
        return BAD
    for unit in range(len(active)):
        active[unit] = data[at + (unit >> 3 if kind == RAW else 0)] >> (unit & 7) & 1
    return at + stored


@kernel()
def _read_list(data, at, family, space, out):
    """Fill out from the list at data[at]; where it ends, or BAD."""
    if at + 4 > len(data) or at + 4 + _number(data, at, 4) > len(data):
        return BAD
    end = at + 4 + _number(data, at, 4)
    if not runs.decode_list(
        data[at + 4 : end], family, DIRECT_BITS, 0, space.frequencies[:1], space.words, out
    ):
        return BAD
    return end
