"""Codes chunks with few changes: elements that are likely to move as a dense delta, the others by place.

i16          cutoff, at least -1: elements of larger exponent are not in the delta
u8           1 if a delta follows, 0 if all chosen elements are the base's
u32          exceptions: elements outside the delta that changed nevertheless, at most one in 16
plane        one bit for each unit of 256 elements, lowest first: whether it is active
u32, list    exceptions' places, each as the distance from the one before, less one
u32, list    exceptions' zigzagged distances, as two lists if elements have 64 bits: low half,
             then high half
delta        of the chosen elements
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import subset
from ..constants import BAD, SPARSE_SHARE, SUBSET_SPARE, SUBSET_UNIT
from ..working_memory import ThreadArray
from . import entropy, floats, ulp
from .planes import put_plane, take_plane
from .ulp import FloatFormat

Bytes = NDArray[np.uint8]
_HEAD = struct.Struct("<hBI")
_FEW = 0.06  # the most changed elements of a sparse chunk, as a part of all
_RARE = 0.01  # the most exceptions when encoding, as a part of all elements
_QUICK = 0.02  # the most changes that may all be exceptions to save time, as a part of all elements
_MOST = 0.6  # the part of chosen elements above which nothing is gained
_ACTIVE = 0.4  # the part of active units up to which the others are left out
_TOLERANCE = 0.01  # the estimated growth of a chunk that is accepted for speed
_PATCH = 64  # sampled elements in a row, since changes come in clusters
_DELTA_BITS = 200  # the approximate fixed cost of a delta,
_TABLE_BITS = 24  # and for each exponent that moved
_LISTS_BITS = 200  # the approximate fixed cost of two lists
_VALUE_BITS = 4.4  # the approximate cost of an exception without its place


def encode_sparse(
    base: Bytes, target: Bytes, form: FloatFormat, *, quick: bool = False, changed: int | None = None
) -> bytes | None:
    """Encode the target against the base; None if too much changed for this method. ``changed`` is the number
    of changed elements, if known.

    `quick` codes all changes by place if they are few: up to half as long again, but coded in a third of the
    time and decoded in less than half.
    """
    before, after = floats.elements(base, form), floats.elements(target, form)
    if _is_much(before, after, changed):
        return None
    changes = _find_changes(before, after, form)
    if changes is None:
        return None
    gaps, distances, active = changes.gaps, changes.distances, changes.active
    if quick and len(gaps) <= _QUICK * len(before):
        head, none = _HEAD.pack(-1, 0, len(gaps)), np.zeros_like(active)
        return b"".join([head, put_plane(np.packbits(none)), *_put_exceptions(gaps, distances)])
    if active.mean() > _ACTIVE:
        active[:] = 1
    cutoff = _cutoff(before, changes, form)
    chosen = _chosen(working_memory.CHOSEN, before, before, cutoff, active, form)
    if len(chosen) > _MOST * len(before):
        return None
    wanted = _chosen(working_memory.WANTED, before, after, cutoff, active, form)
    delta = b""
    if not np.array_equal(chosen, wanted):
        found = floats.encode_delta(chosen.view(np.uint8), wanted.view(np.uint8), form)
        if found is None:
            return None
        delta = found
    kept = subset.keep_outside(before, form.shift, form.mask, cutoff, gaps, distances)
    head = _HEAD.pack(cutoff, len(delta) > 0, kept)
    marks = put_plane(np.packbits(active, bitorder="little"))
    return b"".join([head, marks, *_put_exceptions(gaps[:kept], distances[:kept]), delta])


def _is_much(before: NDArray[Any], after: NDArray[Any], changed: int | None) -> bool:
    """Whether too many elements changed, judged by a sample if their number is unknown."""
    if changed is not None:
        return changed > _FEW * len(before)
    glance, there = floats.sample(before, _PATCH), floats.sample(after, _PATCH)
    return bool(np.count_nonzero(glance != there) > 1.2 * _FEW * len(glance))


class _Changes(NamedTuple):
    """The changes in a chunk, in this thread's working memory."""

    gaps: NDArray[np.uint32]  # [m]: the number of elements between a change and the one before
    distances: NDArray[Any]  # [m]: zigzagged; uint32, or uint64 if elements have 64 bits
    active: Bytes  # [units]: 1 if something changed
    moved: NDArray[np.uint32]  # [mask + 1]: the number of changes per exponent


def _find_changes(before: NDArray[Any], after: NDArray[Any], form: FloatFormat) -> _Changes | None:
    """The changes; None if there are too many for a sparse chunk."""
    most, units = int(_FEW * len(before)), -(-len(before) // SUBSET_UNIT)
    active, moved = np.zeros(units, np.uint8), np.zeros(form.mask + 1, np.uint32)
    if before.itemsize == 8:
        places = np.flatnonzero(before != after)
        if len(places) > most:
            return None
        active[places // SUBSET_UNIT] = 1
        moved += np.bincount(ulp.exponent(before[places], form), minlength=len(moved)).astype(np.uint32)
        gaps = (np.diff(places, prepend=-1) - 1).astype(np.uint32)
        return _Changes(gaps, ulp.distance(before[places], after[places]), active, moved)
    found = working_memory.GAPS.take(most), working_memory.DISTANCES.take(most)
    count = subset.find_changes(before, after, form.shift, form.mask, *found, active, moved)
    return None if count == BAD else _Changes(found[0][:count], found[1][:count], active, moved)


def _cutoff(before: NDArray[Any], changes: _Changes, form: FloatFormat) -> int:
    """The lowest exponent up to which all elements are coded; the few changes above it are exceptions.

    Coding an element that never moves costs almost only time, so a slightly longer payload is accepted.
    """
    stride = 1 + (len(before) >> 16)
    four = np.empty((4, form.mask + 1), np.uint32)
    subset.count_exponents(before[::stride].copy(), form.shift, form.mask, four)
    counts = four.sum(axis=0) * (stride * changes.active.mean())
    moved = changes.moved.astype(np.int64)
    # The cost of coding all elements up to each exponent, tables included.
    inside = np.cumsum(_place_bits(moved, counts) + _TABLE_BITS * (moved > 0)) + _DELTA_BITS
    above = moved.sum() - np.cumsum(moved)
    outside = _place_bits(above, counts.sum() - np.cumsum(counts) + above)
    total = inside + outside
    full = float(inside[-1]) + (_VALUE_BITS - 2) * len(changes.gaps)
    # Element -1 stands for coding none.
    nothing = _place_bits(moved.sum(keepdims=True), counts.sum(keepdims=True))
    total, above = np.append(nothing, total), np.append(moved.sum(), above)
    good = (total <= total[-1] + _TOLERANCE * full) & (above <= _RARE * len(before))
    cutoff, last = int(np.flatnonzero(good)[0]) - 1, int(np.flatnonzero(moved)[-1])
    # If the lists alone cost more than the tolerance, coding some more elements saves them.
    few = _TOLERANCE * full < _LISTS_BITS and counts[: last + 1].sum() <= _FEW * len(before)
    if few and -1 < cutoff < last and total[last + 1] < total[cutoff + 1] + _LISTS_BITS:
        return last
    return cutoff


def _place_bits(moved: NDArray[Any], among: NDArray[Any]) -> NDArray[np.float64]:
    """The entropy, in bits, of the choice of `moved` elements out of `among`."""
    among = np.maximum(among, moved)
    share = np.clip(moved / np.maximum(among, 1), 1e-12, 1 - 1e-12)
    bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * among
    return np.where(moved > 0, bits, 0.0)


def _chosen(
    memory: ThreadArray,
    before: NDArray[Any],
    source: NDArray[Any],
    cutoff: int,
    active: Bytes,
    form: FloatFormat,
) -> NDArray[Any]:
    """The chosen elements of source in a row, in this thread's ``memory``."""
    row = memory.take(len(before) + SUBSET_SPARE, form.dtype)
    count = subset.choose(before, source, form.shift, form.mask, cutoff, active, row)
    return row[:count]


def _put_exceptions(gaps: NDArray[np.uint32], distances: NDArray[Any]) -> list[bytes]:
    lists = [gaps, distances.astype(np.uint32, copy=False)]
    if distances.dtype.itemsize == 8:
        lists.append((distances >> np.uint64(32)).astype(np.uint32))
    return [floats.sized(entropy.encode_list(values)) for values in lists] if len(gaps) else []


def decode_sparse(data: Bytes, base: Bytes, form: FloatFormat, out: Bytes) -> None:
    """Fill out, which may be the base, with the target; PayloadError if data codes no such chunk."""
    before, result = floats.elements(base, form), floats.elements(out, form)
    parts = _take_apart(data, len(before), form)
    if not parts.delta.size:
        if out is not base:
            result[:] = before
        _move(result, parts)
    else:
        restored = _restored_at(before, parts)  # before the base is overwritten
        active = np.unpackbits(parts.marks, count=-(-len(before) // SUBSET_UNIT), bitorder="little")
        chosen, changed = (
            memory.take(len(before) + SUBSET_SPARE, form.dtype)
            for memory in (working_memory.CHOSEN, working_memory.CHANGED)
        )
        opened = floats.open_delta(parts.delta, len(before), form)
        floats.check_decoded(
            subset.decode(
                before, result, parts.cutoff, active, parts.places, restored, chosen, changed, opened
            )
        )
    floats.deliver(result, out)


@dataclass(frozen=True, slots=True)
class Overwritten:
    """The overwritten elements of a chunk (unsigned[m]) and their places (uint32[m])."""

    places: NDArray[np.uint32]
    elements: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return self.places.nbytes + self.elements.nbytes

    def put_back(self, chunk: Bytes) -> None:
        """Restore the chunk."""
        chunk.view(self.elements.dtype)[self.places] = self.elements


def patch_sparse(data: Bytes, chunk: Bytes, form: FloatFormat) -> Overwritten | None:
    """Turn a chunk from the base into the target by writing only the places that change.

    Returns None if data holds more than places, or elements have 64 bits or unaligned memory; PayloadError if
    it codes no such chunk. In both cases, nothing is written.
    """
    elements = chunk.view(form.dtype)
    if form.itemsize == 8 or not elements.flags.aligned or _follows(data):
        return None
    parts = _take_apart(data, len(elements), form)
    places, before = np.empty_like(parts.places), np.empty(parts.values.size, form.dtype)
    _move(elements, parts)  # from here on no allocation can fail
    places[:], before[:] = parts.places, parts.values
    return Overwritten(places, before)


class Patch(NamedTuple):
    """The changes that turn a chunk of a base into the target's: places of elements (int32[m], ascending),
    their moves (uint32[m], zigzagged ULPs; see :mod:`.ulp`), and the bytes of an element."""

    places: NDArray[np.int32]
    distances: NDArray[np.uint32]
    itemsize: int


def read_patch(data: Bytes, count: int, form: FloatFormat) -> Patch | None:
    """Read a chunk of `count` elements as a patch.

    Returns None if data holds more than places, or elements have 64 bits; PayloadError if it codes no such
    chunk.
    """
    if form.itemsize == 8 or _follows(data):
        return None
    return _patch_of(_take_apart(data, count, form), count, form)


def _patch_of(parts: _Parts, count: int, form: FloatFormat) -> Patch:
    places = np.cumsum(parts.places.astype(np.int64) + 1) - 1
    if places.size and places[-1] >= count:
        raise _beyond()
    return Patch(places.astype(np.int32), parts.values, form.itemsize)


class _Parts(NamedTuple):
    """The parts of a sparse chunk. The marks are one bit for each unit."""

    cutoff: int
    marks: Bytes
    exceptions: NDArray[np.uint32]  # [lists, m]: gaps between places, and distances
    delta: Bytes

    @property
    def places(self) -> NDArray[np.uint32]:
        """The gaps between places; after :func:`_move` or :func:`_restored_at`, the places."""
        found: NDArray[np.uint32] = self.exceptions[0]
        return found

    @property
    def values(self) -> NDArray[np.uint32]:
        """The distances; after those two functions, their results."""
        found: NDArray[np.uint32] = self.exceptions[1]
        return found


def _follows(data: Bytes) -> bool:
    """Whether a delta follows; False if the head cannot be read."""
    return len(data) >= _HEAD.size and bool(_HEAD.unpack(data[: _HEAD.size].tobytes())[1])


def _take_apart(data: Bytes, count: int, form: FloatFormat) -> _Parts:
    if len(data) < _HEAD.size:
        raise PayloadError("the payload of a chunk is cut short")
    cutoff, follows, exceptions = _HEAD.unpack(data[: _HEAD.size].tobytes())
    units = -(-count // SUBSET_UNIT)
    size = -(-units // 8)
    marks, data = take_plane(data[_HEAD.size :], size)
    if len(marks) != size or follows > 1 or cutoff < -1 or exceptions > count // SPARSE_SHARE:
        raise PayloadError("the head of a sparse chunk is damaged")
    lists = np.empty((3 if form.itemsize == 8 else 2, exceptions), np.uint32)
    if exceptions:
        data = entropy.decode_lists(data, lists)
    if follows != (len(data) > 0):
        raise PayloadError("a sparse chunk's delta is missing or unannounced")
    return _Parts(min(cutoff, form.mask), marks, lists, data)  # no exponent is larger


def _restored_at(before: NDArray[Any], parts: _Parts) -> NDArray[Any]:
    """The target's elements at the places."""
    if before.itemsize == 8:
        return _long_restored(before, parts)
    if len(parts.places) and not subset.restore_at(before, parts.places, parts.values):
        raise _beyond()
    return parts.values


def _move(elements: NDArray[Any], parts: _Parts) -> None:
    """Move the exceptions among `elements` from the base's values to the target's."""
    if elements.itemsize == 8:
        elements[parts.places] = _long_restored(elements, parts)
    elif not subset.move(elements, parts.places, parts.values):
        raise _beyond()


def _long_restored(before: NDArray[np.uint64], parts: _Parts) -> NDArray[np.uint64]:
    """The target's elements of 64 bits at the places."""
    gaps, low, high = parts.exceptions.astype(np.uint64)
    places = np.cumsum(gaps + np.uint64(1)) - np.uint64(1)
    if places.size and places[-1] >= before.size:
        raise _beyond()
    parts.places[:] = places
    return ulp.restore(before[places], low | high << np.uint64(32))


def _beyond() -> PayloadError:
    return PayloadError("an exception lies beyond the end of its chunk")
