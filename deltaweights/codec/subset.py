# mypy: ignore-errors
# Numba and LLVM type what is in here.
"""The elements of a chunk worth coding, compiled: what sparse chunks are reduced to.

Where a fine-tune moved few weights, they are those whose ULP is small: the others could not follow
so small an update. Elements are *chosen* by two things that the decoder knows: their unit is marked
active, and the base's exponent is at most a cutoff.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd

UNIT = 256  # elements that are active or not together
SPARE = 64  # elements that `choose` may write beyond the last
_AHEAD = 32  # places; how far ahead of changing them elements are asked for


@njit(nogil=True, cache=True)
def count_exponents(base, shift, mask):
    """How many elements have each exponent: int64[mask + 1]."""
    counts = np.zeros((4, mask + 1), np.uint32)
    whole = len(base) & ~3
    for i in range(0, whole, 4):
        for k in range(4):
            counts[k, (np.int64(base[i + k]) >> shift) & mask] += np.uint32(1)
    for i in range(whole, len(base)):
        counts[0, (np.int64(base[i]) >> shift) & mask] += np.uint32(1)
    total = np.zeros(mask + 1, np.int64)
    for k in range(4):
        for e in range(mask + 1):
            total[e] += counts[k, e]
    return total


@njit(nogil=True, cache=True, inline="always")
def _stretch(active, unit):
    """The unit after the last of those that are active, or inactive, in a row from `unit` on."""
    last = unit + 1
    while last < len(active) and active[last] == active[unit]:
        last += 1
    return last


@njit(nogil=True, cache=True, inline="always")
def _worked(part):
    """How many elements of a stretch the vector loops work."""
    return len(part) - len(part) % (64 // part.itemsize) if part.itemsize <= 4 else 0


@njit(nogil=True, cache=True)
def choose(base, source, shift, mask, cutoff, active, chosen):
    """The chosen elements of `source` in a row (chosen by `base`); how many.

    base, source   unsigned[n]
    cutoff         -1 to mask
    active         uint8[units], 0 or 1
    chosen         unsigned[n + SPARE], written
    """
    at, unit = 0, 0
    while unit < len(active):
        after = _stretch(active, unit)
        if active[unit]:
            part = base[unit * UNIT : min(after * UNIT, len(base))]
            wanted = source[unit * UNIT : min(after * UNIT, len(base))]
            at = simd.select_vectors(part, shift, mask, cutoff, chosen, at, wanted)
            for i in range(_worked(part), len(part)):
                chosen[at] = wanted[i]
                at += ((np.int64(part[i]) >> shift) & mask) <= cutoff
        unit = after
    return at


@njit(nogil=True, cache=True)
def merge(base, shift, mask, cutoff, active, chosen, out):
    """Fill out with the base, the chosen elements replaced by those in `chosen`, in order.

    `out` may be `base` itself.
    """
    at, unit = 0, 0
    while unit < len(active):
        after = _stretch(active, unit)
        part = base[unit * UNIT : min(after * UNIT, len(base))]
        result = out[unit * UNIT : min(after * UNIT, len(base))]
        if active[unit]:
            at = simd.merge_vectors(part, shift, mask, cutoff, chosen, at, result)
            for i in range(_worked(part), len(part)):
                inside = ((np.int64(part[i]) >> shift) & mask) <= cutoff
                result[i] = chosen[at] if inside else part[i]
                at += inside
        else:
            result[:] = part
        unit = after


@njit(nogil=True, cache=True, inline="always")
def _restored(bits, zigzag, top):
    """The element that lies `zigzag` from `bits` (see ulp.restore); `top` is its sign's place, at most 31."""
    magnitude = (1 << top) - 1
    value, sign = np.int64(zigzag), (bits >> top) & 1
    distance = (((value >> 1) & magnitude) ^ -(value & 1) ^ -sign) + sign
    ordered = (bits ^ (-sign & magnitude)) + distance
    return (ordered ^ (-((ordered >> top) & 1) & magnitude)) & ((magnitude << 1) | 1)


@njit(nogil=True, cache=True)
def find_places(gaps, limit):
    """Gaps between places (each the distance from the one before, less one) to places, where they stand.

    False where one is not below `limit`.
    """
    place = np.int64(-1)
    for i in range(len(gaps)):
        place += np.int64(gaps[i]) + 1
        if place >= limit:
            return False
        gaps[i] = place
    return True


@njit(nogil=True, cache=True)
def restore_at(base, places, values):
    """Zigzagged distances from the base's elements at some places to the target's elements there.

    base     unsigned[n], of at most 32 bits
    places   uint32[m], each below n
    values   uint32[m], distances before and elements after
    """
    top = 8 * base.itemsize - 1
    for i in range(len(places)):
        values[i] = _restored(np.int64(base[places[i]]), values[i], top)


@njit(nogil=True, cache=True)
def move(elements, places, values):
    """Bring a base's elements at some places to the target's, where they stand.

    elements  unsigned[n], of at most 32 bits: the base's before, the target's after
    places    uint32[m], rising, each below n
    values    uint32[m]: zigzagged distances before, and after what stood in elements
    """
    top, last = 8 * elements.itemsize - 1, len(places) - 1
    for i in range(len(places)):
        simd.ask_for(elements, np.int64(places[min(i + _AHEAD, last)]))
        before = np.int64(elements[places[i]])
        elements[places[i]] = _restored(before, values[i], top)
        values[i] = before
