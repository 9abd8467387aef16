"""Chunks next to each other, decoded and checked, or compared, in one call. With a call for each chunk and
each checksum, threads would wait for Python's lock most of the time.

Only what most chunks are is decoded here: elements of at most 32 bits, methods SAME, DELTA, SPARSE and DRIFT,
planes that are not by zstd. Everything else, and everything
that is damaged, is left to :mod:`..methods.chunk`, which says why.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..constants import (
    AFTER,
    BAD,
    BEFORE,
    DELTA,
    DRIFT,
    DRIFT_HEAD,
    FILL,
    FINE,
    HEAD,
    LENGTH,
    LOG_SEGMENT,
    LOWEST,
    METHOD,
    MOST_SHIFTS_LOG,
    RANS,
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
    WIDE_PLANES,
    XXH3_SHORT,
)
from ..kernel_arrays import Bytes, Elements, Longs, Numbers, OpenDelta, RowSpace
from ..tables import BYTE_BITS, PRECISION
from . import difference, runs, subset
from .kernel import kernel
from .runs import get_number
from .xxh3 import xxh3

_PLANE_HEAD = 9


@kernel()
def decode(
    records: Bytes,
    coded: Bytes,
    step: int,
    base_bytes: Bytes,
    base: Elements,
    out_bytes: Bytes,
    out: Elements,
    shift: int,
    mask: int,
    family: Numbers,
    space: RowSpace,
    is_right: NDArray[np.bool_],
) -> bool:
    """Decode what can be of some chunks of elements of 8 or 16 bits.

    records     uint8: the chunks' records (see constants.py)
    coded       uint8: the data of all chunks
    step        how many elements all chunks but the last have
    base, out   unsigned[n], apart; base_bytes and out_bytes: the same memory as uint8
    space       a RowSpace
    is_right    bool[m], written: whether base and result have their checksums; else out holds anything

    Returns whether all are, and nothing follows the last chunk's data.
    """
    return _decode(
        records, coded, step, base_bytes, base, out_bytes, out, shift, mask, family, space, is_right, None
    )


@kernel()
def decode_wide(
    records: Bytes,
    coded: Bytes,
    step: int,
    base_bytes: Bytes,
    base: Elements,
    out_bytes: Bytes,
    out: Elements,
    shift: int,
    mask: int,
    family: Numbers,
    space: RowSpace,
    is_right: NDArray[np.bool_],
) -> bool:
    """The same for elements of 32 bits."""
    return _decode(
        records, coded, step, base_bytes, base, out_bytes, out, shift, mask, family, space, is_right, True
    )


@kernel()
def _decode(
    records: Bytes,
    coded: Bytes,
    step: int,
    base_bytes: Bytes,
    base: Elements,
    out_bytes: Bytes,
    out: Elements,
    shift: int,
    mask: int,
    family: Numbers,
    space: RowSpace,
    is_right: NDArray[np.bool_],
    wide: bool | None,
) -> bool:
    """:func:`decode`. `wide` is None for elements of 8 or 16 bits: Numba then leaves out what only wider ones
    have, which would take a quarter more time to compile."""
    at, right = 0, 0
    for c in range(len(is_right)):
        record = records[c * RECORD_BYTES : (c + 1) * RECORD_BYTES]
        at, data = at + get_number(record, LENGTH, 4), coded[at : at + get_number(record, LENGTH, 4)]
        start, end = c * step, min((c + 1) * step, len(out))
        first, last = start * out.itemsize, end * out.itemsize
        is_right[c] = False
        method, nbytes = get_number(record, METHOD, 4), last - first  # the bytes behind a method are zero
        if nbytes <= XXH3_SHORT or method not in (SAME, DELTA, SPARSE, DRIFT):
            continue
        if wide is not None and not _is_simple(method, data):
            continue
        if xxh3(base_bytes[first:last]) != get_number(record, BEFORE, 8):
            continue
        before, result = base[start:end], out[start:end]
        if wide is not None and method == DRIFT:
            behind = _drift(data, before, result, shift, mask, family, space)
            if behind == BAD:
                continue
            method, data, before = np.int64(data[1]), data[behind:], result  # type: ignore[assignment]
        if _decode_chunk(method, data, before, result, shift, mask, wide, family, space):
            is_right[c] = xxh3(out_bytes[first:last]) == get_number(record, AFTER, 8)
            right += is_right[c]
    return right == len(is_right) and at == len(coded)


@kernel()
def _is_simple(method: int, data: Bytes) -> bool:
    """Whether a chunk of 32-bit elements has no plane by zstd, as far as can be seen: found out late, it
    would have been decoded for nothing. (The caller then brings it without such planes: see
    :mod:`..methods.without_zstd`.)"""
    at = 0
    if method == DRIFT:
        method, at = np.int64(data[1]) if len(data) > 1 else SAME, _section_end(data, DRIFT_HEAD)  # type: ignore[assignment]
    if method == SPARSE and at != BAD:
        if at + SPARSE_HEAD > len(data):
            return False
        follows, exceptions = data[at + 2], get_number(data, at + 3, 4)
        at = _plane_end(data, at + SPARSE_HEAD)
        for _ in range(2 if exceptions else 0):
            at = _section_end(data, at)
        method = DELTA if follows else SAME
    if method == DELTA and at != BAD:
        if at + HEAD > len(data):
            return False
        sections = 2 if data[at] else 1  # scales, values
        at += HEAD
        for _ in range(sections):
            at = _section_end(data, at)
        for _ in range(WIDE_PLANES):
            at = _plane_end(data, at)
    return at != BAD


@kernel()
def _decode_chunk(
    method: int,
    data: Bytes,
    base: Elements,
    out: Elements,
    shift: int,
    mask: int,
    wide: bool | None,
    family: Numbers,
    space: RowSpace,
) -> bool:
    """Fill out, perhaps base itself, from a chunk's data; whether that can be done."""
    if method == SAME:
        return len(data) == 0 and _copy(base, out)
    if method == DELTA:
        return _decode_delta(data, base, out, shift, mask, wide, family, space)
    return method == SPARSE and _decode_sparse(data, base, out, shift, mask, wide, family, space)


@kernel()
def _drift(
    data: Bytes, base: Elements, out: Elements, shift: int, mask: int, family: Numbers, space: RowSpace
) -> int:
    """Fill out with a drifted chunk's drifted base (layout: see :mod:`..methods.drift`); where what is coded
    against that begins, or BAD."""
    if len(data) < DRIFT_HEAD or data[0] > MOST_SHIFTS_LOG or len(space.shifts) < 1 << data[0]:
        return BAD
    shifts, last = space.shifts[: 1 << data[0]], np.uint32(0)
    at = runs.read_list(data, DRIFT_HEAD, family, space.frequencies[:1], space.words, shifts)
    if at != BAD:
        for s in range(len(shifts)):
            last += (shifts[s] >> np.uint32(1)) ^ (np.uint32(0) - (shifts[s] & np.uint32(1)))
            shifts[s] = last
        difference.drift(base, shifts, shift, mask, out)
    return at


@kernel()
def compare(
    base_bytes: Bytes, base: Elements, target_bytes: Bytes, target: Elements, step: int, found: Longs
) -> None:
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
def _copy(source: Elements, out: Elements) -> bool:
    for i in range(len(out)):
        out[i] = source[i]
    return True


@kernel(inline="always")
def _signed(data: Bytes, at: int, size: int) -> int:
    value, sign = get_number(data, at, size), np.int64(1) << (8 * size - 1)
    return (value ^ sign) - sign  # type: ignore[return-value]


@kernel()
def _decode_delta(
    data: Bytes,
    base: Elements,
    out: Elements,
    shift: int,
    mask: int,
    wide: bool | None,
    family: Numbers,
    space: RowSpace,
) -> bool:
    """Fill out, perhaps base itself, from a delta (layout: see :mod:`..methods.floats`); whether that can be
    done."""
    count = len(out)
    first, end = _run_of(data, count, wide, family, space)
    if first == BAD:
        return False
    opened = _opened(data, first, end, count, count, shift, mask, wide, family, space)
    return difference.decode(base, out, opened) == FINE


@kernel()
def _run_of(data: Bytes, count: int, wide: bool | None, family: Numbers, space: RowSpace) -> tuple[int, int]:
    """Where in a delta of at most `count` elements the run is, its planes being brought to the space; BAD
    twice where it can be no delta, as far as its head tells, or planes are by zstd."""
    if len(data) < HEAD:
        return BAD, BAD
    log_segment, step, tables, at = data[0], data[1], data[2], HEAD
    if not (log_segment == 0 or 6 <= log_segment <= 26) or step > 1 or not 1 <= tables <= 64:
        return BAD, BAD
    if log_segment:
        at = _section_end(data, at)
    end = len(data) if at != BAD else BAD
    if wide is not None:
        at, end = at + 4, _section_end(data, at) if at != BAD else BAD
        if end == BAD or not _read_planes(data, end, count, family, space):
            return BAD, BAD
    return at, end


@kernel(inline="always")
def _section_end(data: Bytes, at: int) -> int:
    """Where the section at data[at] ends, which begins with its length, or BAD; BAD also from there."""
    if at == BAD or at + 4 > len(data) or at + 4 + get_number(data, at, 4) > len(data):
        return BAD
    return at + 4 + get_number(data, at, 4)


@kernel()
def _read_planes(data: Bytes, at: int, count: int, family: Numbers, space: RowSpace) -> bool:
    """Whether data[at:] is the planes of a delta of 32-bit elements, each of at most `count` bytes, which are
    brought to the space, one behind the other."""
    filled = 0
    for p in range(WIDE_PLANES):
        length = _plane_length(data, at)
        if length == BAD or length > count:
            return False
        plane = space.planes[filled : filled + length]
        at = _read_plane(data, at, family, space, space.chosen, plane)
        if at == BAD:
            return False
        filled += length
        space.starts[p + 1] = filled
    space.starts[WIDE_PLANES + 1 :] = filled
    return at == len(data)


@kernel()
def _plane_length(data: Bytes, at: int) -> int:
    """How long the plane is whose head is at data[at]; BAD where that or what is stored does not fit."""
    if at + _PLANE_HEAD > len(data) or at + _PLANE_HEAD + get_number(data, at + 5, 4) > len(data):
        return BAD
    return get_number(data, at + 1, 4)


@kernel(inline="always")
def _plane_end(data: Bytes, at: int) -> int:
    """Where the plane at data[at] ends; BAD where it is by zstd or does not fit, and from there."""
    if at == BAD or _plane_length(data, at) == BAD or data[at] not in (RAW, FILL, RANS):
        return BAD
    return at + _PLANE_HEAD + get_number(data, at + 5, 4)


@kernel()
def _read_plane(
    data: Bytes, at: int, family: Numbers, space: RowSpace, numbers: Numbers, out: Elements
) -> int:
    """Fill out, as long as the plane whose head is at data[at]; where that ends, or BAD where it is by zstd
    or does not fit.

    numbers   uint32, as many or more: scratch
    """
    kind, at, end = data[at], at + _PLANE_HEAD, at + _PLANE_HEAD + get_number(data, at + 5, 4)
    if kind == RAW and end - at == len(out):
        _copy(data[at:end], out)
    elif kind == FILL and end - at == 1:
        out[:] = data[at]
    elif kind == RANS:
        frequencies, words, found = space.frequencies[:1], space.words, numbers[: len(out)]
        if not runs.decode_numbers(data[at:end], family, BYTE_BITS, 0, frequencies, words, found):
            return BAD
        _copy(found, out)
    else:
        return BAD
    return end


@kernel()
def _opened(
    data: Bytes,
    first: int,
    end: int,
    count: int,
    ahead: int,
    shift: int,
    mask: int,
    wide: bool | None,
    family: Numbers,
    space: RowSpace,
) -> OpenDelta:
    """A delta of at most so many elements, its run from `first` to `end`, as a kernel_arrays.OpenDelta."""
    layout, segments, listed = space.layout, count // UNIT + 1, data[:0]
    layout[LOG_SEGMENT], layout[STEP], layout[LOWEST] = data[0], data[1], _signed(data, 3, 2)
    layout[TABLES] = data[2]
    if layout[LOG_SEGMENT]:
        listed = data[HEAD + 4 : _section_end(data, HEAD)]
    return OpenDelta(
        data[first:end], listed, shift, mask, wide is not None, ahead, family, layout, _signed(data, 5, 2),
        _signed(data, 7, 1), space.planes, space.starts, space.scales[:segments], space.above[:segments],
        space.slots[: layout[TABLES] << PRECISION], space.frequencies[: layout[TABLES]], space.words,
    )  # fmt: skip


@kernel()
def _decode_sparse(
    data: Bytes,
    base: Elements,
    out: Elements,
    shift: int,
    mask: int,
    wide: bool | None,
    family: Numbers,
    space: RowSpace,
) -> bool:
    """Fill out, perhaps base itself, from a sparse chunk's data (layout: see :mod:`..methods.sparse`);
    whether it is one, and the plane is not by zstd."""
    if len(data) < SPARSE_HEAD:
        return False
    cutoff, follows, exceptions = _signed(data, 0, 2), data[2], get_number(data, 3, 4)
    active = space.active[: (len(base) + SUBSET_UNIT - 1) // SUBSET_UNIT]
    at = _read_marks(data, SPARSE_HEAD, family, space, active)
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
    data = data[at:]
    first, end = _run_of(data, len(base), wide, family, space)
    if first == BAD or not subset.restore_at(base, places, values):
        return False
    none = np.int64(0)  # a constant would have Numba compile it once more
    opened = _opened(data, first, end, len(base), none, shift, mask, wide, family, space)  # type: ignore[arg-type]
    cutoff, chosen, changed = min(cutoff, mask), space.chosen, space.changed
    return subset.decode(base, out, cutoff, active, places, values, chosen, changed, opened) == FINE


@kernel()
def _read_marks(data: Bytes, at: int, family: Numbers, space: RowSpace, active: Bytes) -> int:
    """Which units are active, from the plane at data[at]; where it ends, or BAD."""
    marks = space.marks[: (len(active) + 7) >> 3]
    if _plane_length(data, at) != len(marks):
        return BAD
    at = _read_plane(data, at, family, space, space.places, marks)
    for unit in range(len(active)):
        active[unit] = marks[unit >> 3] >> (unit & 7) & 1
    return at
