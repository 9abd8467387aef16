"""The elements of a chunk worth coding, compiled: what sparse chunks are reduced to.

Where a fine-tune moved few weights, they are those whose ULP is small: the others could not follow
so small an update. Elements are *chosen* by two things that the decoder knows: their unit is marked
active, and the base's exponent is at most a cutoff.
"""

from __future__ import annotations

import numpy as np

from ..constants import BAD, FINE, SUBSET_UNIT
from ..kernel_arrays import Bytes, Elements, Numbers, OpenDelta
from . import difference, simd
from .kernel import kernel

_AHEAD = 32  # places; how far ahead of changing them elements are asked for
_AT_ONCE = 32  # elements that are compared at once


@kernel()
def count_exponents(base: Elements, shift: int, mask: int, counts: Numbers) -> None:
    """How many elements have each exponent, in four parts that add up: uint32[4, mask + 1]."""
    counts[:] = 0
    whole = len(base) & ~3
    for i in range(0, whole, 4):
        for k in range(4):
            counts[k, (np.int64(base[i + k]) >> shift) & mask] += np.uint32(1)
    for i in range(whole, len(base)):
        counts[0, (np.int64(base[i]) >> shift) & mask] += np.uint32(1)


@kernel(inline="always")
def _stretch(active: Bytes, unit: int) -> int:
    """The unit after the last of those that are active, or inactive, in a row from `unit` on."""
    last = unit + 1
    while last < len(active) and active[last] == active[unit]:
        last += 1
    return last


@kernel(inline="always")
def _worked(part: Elements) -> int:
    """How many elements of a stretch the vector loops work."""
    return len(part) - len(part) % (64 // part.itemsize) if part.itemsize <= 4 else 0


@kernel()
def choose(
    base: Elements, source: Elements, shift: int, mask: int, cutoff: int, active: Bytes, chosen: Elements
) -> int:
    """The chosen elements of `source` in a row (chosen by `base`); how many.

    base, source   unsigned[n]
    cutoff         -1 to mask
    active         uint8[units], 0 or 1
    chosen         unsigned[n + SUBSET_SPARE], written
    """
    at, unit = 0, 0
    while unit < len(active):
        after = _stretch(active, unit)
        if active[unit]:
            part = base[unit * SUBSET_UNIT : min(after * SUBSET_UNIT, len(base))]
            wanted = source[unit * SUBSET_UNIT : min(after * SUBSET_UNIT, len(base))]
            at = simd.select_vectors(part, shift, mask, cutoff, chosen, at, wanted)
            for i in range(_worked(part), len(part)):
                chosen[at] = wanted[i]
                at += ((np.int64(part[i]) >> shift) & mask) <= cutoff  # type: ignore[assignment]
        unit = after
    return at


@kernel()
def merge(
    base: Elements, shift: int, mask: int, cutoff: int, active: Bytes, chosen: Elements, out: Elements
) -> None:
    """Fill out with the base, the chosen elements replaced by those in `chosen`, in order.

    `out` may be `base` itself.
    """
    at, unit = 0, 0
    while unit < len(active):
        after = _stretch(active, unit)
        part = base[unit * SUBSET_UNIT : min(after * SUBSET_UNIT, len(base))]
        result = out[unit * SUBSET_UNIT : min(after * SUBSET_UNIT, len(base))]
        if active[unit]:
            at = simd.merge_vectors(part, shift, mask, cutoff, chosen, at, result)
            for i in range(_worked(part), len(part)):
                inside = ((np.int64(part[i]) >> shift) & mask) <= cutoff
                result[i] = chosen[at] if inside else part[i]
                at += inside  # type: ignore[assignment]
        else:
            for i in range(len(part)):
                result[i] = part[i]
        unit = after


@kernel()
def decode(
    base: Elements,
    out: Elements,
    cutoff: int,
    active: Bytes,
    places: Numbers,
    restored: Elements,
    chosen: Elements,
    changed: Elements,
    opened: OpenDelta,
) -> int:
    """Fill out from the delta of the chosen elements, and what others became; see :func:`.difference.decode`.

    base, out          unsigned[n], out perhaps base itself
    cutoff, active     what is chosen, see :func:`choose`
    places, restored   uint32[m] and unsigned[m]: the other elements that changed, and what they are now
    chosen, changed    unsigned[n + SUBSET_SPARE], scratch
    opened             a kernel_arrays.OpenDelta
    """
    count = choose(base, base, opened.shift, opened.mask, cutoff, active, chosen)
    result = difference.decode(chosen[:count], changed[:count], opened)
    if result != FINE:
        return result
    merge(base, opened.shift, opened.mask, cutoff, active, changed, out)
    for i in range(len(places)):
        out[places[i]] = restored[i]
    return FINE


@kernel(inline="always")
def _find_places(gaps: Numbers, limit: int) -> bool:
    """Gaps (each the distance from the place before, less one) to places, where they stand.

    False where one is not below `limit`.
    """
    place = np.int64(-1)
    for i in range(len(gaps)):
        place += np.int64(gaps[i]) + 1
        if place >= limit:
            return False
        gaps[i] = place
    return True


@kernel()
def restore_at(base: Elements, places: Numbers, values: Numbers) -> bool:
    """The target's elements at some places; False where a place is beyond the base.

    base     unsigned[n], of at most 32 bits
    places   uint32[m]: gaps between them before (see :mod:`..methods.sparse`), places after
    values   uint32[m]: zigzagged distances before, elements after
    """
    if not _find_places(places, len(base)):
        return False
    top = 8 * base.itemsize - 1
    for i in range(len(places)):
        values[i] = difference.restored(np.int64(base[places[i]]), values[i], top)
    return True


@kernel()
def move(elements: Elements, places: Numbers, values: Numbers) -> bool:
    """Bring a base's elements at some places to the target's, where they stand.

    False, and nothing is moved, where a place is beyond them.

    elements  unsigned[n], of at most 32 bits: the base's before, the target's after
    places    uint32[m]: gaps between them before, places after
    values    uint32[m]: zigzagged distances before, what stood in elements after
    """
    if not _find_places(places, len(elements)):
        return False
    top, last = 8 * elements.itemsize - 1, len(places) - 1
    for i in range(len(places)):
        simd.ask_for(elements, np.int64(places[min(i + _AHEAD, last)]))
        before = np.int64(elements[places[i]])
        elements[places[i]] = difference.restored(before, values[i], top)
        values[i] = before
    return True


@kernel(inline="always")
def _differing(base: Elements, target: Elements, first: int) -> np.uint32:
    """Which of the 32 elements from `first` on differ, as a uint32; those beyond the end do not."""
    if first + _AT_ONCE <= len(base):
        return simd.differing(base, target, first)  # type: ignore[no-any-return]
    differ = np.uint32(0)
    for i in range(len(base) - first):
        differ |= np.uint32(base[first + i] != target[first + i]) << np.uint32(i)
    return differ


@kernel()
def count_changes(base: Elements, target: Elements) -> int:
    """How many elements of two arrays (unsigned[n]) differ."""
    found = 0
    for first in range(0, len(base), _AT_ONCE):
        found += simd.bits_set(_differing(base, target, first))
    return found


@kernel()
def find_changes(
    base: Elements,
    target: Elements,
    shift: int,
    mask: int,
    gaps: Numbers,
    distances: Numbers,
    active: Bytes,
    moved: Numbers,
) -> int:
    """Where target differs from base: how many times, or BAD for more often than there is room.

    base, target  unsigned[n], of at most 32 bits
    gaps          uint32[m], written: how many elements lie between a change and the one before
    distances     uint32[m], written: zigzagged
    active        uint8[units], zeros before: 1 where an element of a unit differs
    moved         uint32[mask + 1], zeros before: how many of each exponent of the base's do
    """
    top = 8 * base.itemsize - 1
    found, before = 0, np.int64(-1)
    for first in range(0, len(base), _AT_ONCE):
        differ = _differing(base, target, first)
        if differ:
            active[first // SUBSET_UNIT] = 1
        while differ:
            if found == len(gaps):
                return BAD
            i = first + np.int64(simd.bit_length(differ & -differ)) - 1
            old = np.int64(base[i])
            gaps[found] = i - before - 1
            distances[found] = difference.distance(old, np.int64(target[i]), top)
            moved[(old >> shift) & mask] += np.uint32(1)
            before = i
            found += 1
            differ &= differ - np.uint32(1)
    return found


@kernel()
def keep_outside(
    base: Elements, shift: int, mask: int, cutoff: int, gaps: Numbers, distances: Elements
) -> int:
    """Keep those changes whose element's exponent is above the cutoff: how many, the first ones now.

    base              unsigned[n]
    gaps, distances   uint32[m]: as of :func:`find_changes`
    """
    kept, place, before = 0, np.int64(-1), np.int64(-1)
    for i in range(len(gaps)):
        place += np.int64(gaps[i]) + 1
        if ((np.int64(base[place]) >> shift) & mask) > cutoff:
            gaps[kept], distances[kept] = place - before - 1, distances[i]
            before = place
            kept += 1
    return kept
