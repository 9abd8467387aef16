# mypy: ignore-errors
# Numba and LLVM type what is in here.
"""Chunks next to each other, decoded and checked, or compared, in one call: for each chunk and each checksum
alone a thread would have to wait for Python's lock, which is most of what many threads do otherwise.

Only what most chunks are is decoded here: elements of 8 or 16 bits, methods SAME, DELTA and SPARSE, planes
that are stored or of one byte. The rest, and what is not right, is left to :mod:`.chunk`, which says why.
"""

from __future__ import annotations

import numpy as np

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
    LOG_SEGMENT,
    LOWEST,
    METHOD,
    RAW,
    RECORD_BYTES,
    SAME,
    SPARSE,
    SPARSE_HEAD,
    SPARSE_SHARE,
    STEP,
    SUBSET_UNIT,
    TABLES,
    UNIT,
    XXH3_SHORT,
)
from .kernel import kernel
from .runs import get_number
from .spaces import OpenDelta
from .tables import PRECISION
from .xxh3 import xxh3

_PLANE_HEAD = 9


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
        at, data = at + get_number(record, LENGTH, 4), coded[at : at + get_number(record, LENGTH, 4)]
        start, end = c * step, min((c + 1) * step, len(out))
        first, last = start * out.itemsize, end * out.itemsize
        is_right[c] = False
        method, nbytes = get_number(record, METHOD, 4), last - first  # the bytes behind a method are zero
        if nbytes <= XXH3_SHORT or len(data) > nbytes or method not in (SAME, DELTA, SPARSE):
            continue
        if xxh3(base_bytes[first:last]) != get_number(record, BEFORE, 8):
            continue
        before, result, is_done = base[start:end], out[start:end], False
        if method == DELTA and _is_delta(data):
            opened = _opened(data, len(before), len(before), shift, mask, family, space)
            is_done = delta.decode(before, result, opened) == FINE
        elif method == SPARSE:
            is_done = _decode_sparse(data, before, result, shift, mask, family, space)
        elif method == SAME and len(data) == 0:
            is_done = _copy(before, result)
        if is_done:
            is_right[c] = xxh3(out_bytes[first:last]) == get_number(record, AFTER, 8)
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
def _signed(data, at, size):
    value, sign = get_number(data, at, size), np.int64(1) << (8 * size - 1)
    return (value ^ sign) - sign


@kernel()
def _is_delta(data):
    """Whether data may be a delta (layout: see :mod:`.floats`), as far as its head tells."""
    if len(data) < HEAD:
        return False
    log_segment, step, tables = data[0], data[1], data[2]
    if not (log_segment == 0 or 6 <= log_segment <= 26) or step > 1 or not 1 <= tables <= 64:
        return False
    return log_segment == 0 or (len(data) >= HEAD + 4 and len(data) >= HEAD + 4 + get_number(data, HEAD, 4))


@kernel()
def _opened(data, count, ahead, shift, mask, family, space):
    """A delta that :func:`_is_delta`, of at most so many elements, as a spaces.OpenDelta."""
    layout, at, segments = space.layout, HEAD, count // UNIT + 1
    layout[LOG_SEGMENT], layout[STEP], layout[LOWEST] = data[0], data[1], _signed(data, 3, 2)
    layout[TABLES] = data[2]
    listed = data[:0]
    if layout[LOG_SEGMENT]:
        listed = data[at + 4 : at + 4 + get_number(data, at, 4)]
        at += 4 + len(listed)
    return OpenDelta(
        data[at:], listed, shift, mask, False, ahead, family, layout, _signed(data, 5, 2),
        _signed(data, 7, 1), space.planes, space.starts, space.scales[:segments], space.above[:segments],
        space.slots[: layout[TABLES] << PRECISION], space.frequencies[: layout[TABLES]], space.words,
    )  # fmt: skip


@kernel()
def _decode_sparse(data, base, out, shift, mask, family, space):
    """Fill out from a sparse chunk's data (layout: see :mod:`.sparse`); whether it is one, and the plane is
    coded in one of the two simple ways."""
    if len(data) < SPARSE_HEAD + _PLANE_HEAD:
        return False
    cutoff, follows, exceptions = _signed(data, 0, 2), data[2], get_number(data, 3, 4)
    active = space.active[: (len(base) + SUBSET_UNIT - 1) // SUBSET_UNIT]
    at = _read_marks(data, SPARSE_HEAD, active)
    if at == BAD or follows > 1 or cutoff < -1 or exceptions > len(base) // SPARSE_SHARE:
        return False
    places, values = space.places[:exceptions], space.values[:exceptions]
    if exceptions:
        at = runs.read_list(data, at, family, space.frequencies[:1], space.words, places)
        if at != BAD:
            at = runs.read_list(data, at, family, space.frequencies[:1], space.words, values)
    if at == BAD or (follows == 1) != (at < len(data)):
        return False
    if not follows:
        return _copy(base, out) and subset.move(out, places, values)
    if not _is_delta(data[at:]) or not subset.restore_at(base, places, values):
        return False
    opened = _opened(data[at:], len(base), 0, shift, mask, family, space)
    cutoff, chosen, changed = min(cutoff, mask), space.chosen, space.changed
    return subset.decode(base, out, cutoff, active, places, values, chosen, changed, opened) == FINE


@kernel()
def _read_marks(data, at, active):
    """Which units are active, from the plane at data[at]; where it ends, or BAD."""
    size = (len(active) + 7) >> 3
    kind, length, stored = data[at], get_number(data, at + 1, 4), get_number(data, at + 5, 4)
    at += _PLANE_HEAD
    if length != size or at + stored > len(data):
        return BAD
    if not ((kind == RAW and stored == size) or (kind == FILL and stored == 1)):
        return BAD
    for unit in range(len(active)):
        active[unit] = data[at + (unit >> 3 if kind == RAW else 0)] >> (unit & 7) & 1
    return at + stored
