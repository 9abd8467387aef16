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
SPARE = 16  # elements that `choose` may write beyond the last


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


@njit(nogil=True, cache=True)
def choose(base, source, shift, mask, cutoff, active, chosen):
    """The chosen elements of `source` in a row (chosen by `base`); how many.

    base, source   unsigned[n]
    active         uint8[units], 0 or 1
    chosen         unsigned[n + SPARE], written
    """
    at = 0
    for unit in range(len(active)):
        if active[unit] == 0:
            continue
        first, last = unit * UNIT, min((unit + 1) * UNIT, len(base))
        part, wanted = base[first:last], source[first:last]
        done = 0
        if base.itemsize <= 4:
            at = simd.select_vectors(part, shift, mask, cutoff, chosen, at, wanted)
            done = len(part) & ~15
        for i in range(done, len(part)):
            chosen[at] = wanted[i]
            at += ((np.int64(part[i]) >> shift) & mask) <= cutoff
    return at


@njit(nogil=True, cache=True)
def merge(base, shift, mask, cutoff, active, chosen, out):
    """Fill out with the base, the chosen elements replaced by those in `chosen`, in order."""
    at = 0
    for unit in range(len(active)):
        first, last = unit * UNIT, min((unit + 1) * UNIT, len(base))
        part, result = base[first:last], out[first:last]
        if active[unit] == 0:
            result[:] = part
            continue
        done = 0
        if base.itemsize <= 4:
            at = simd.merge_vectors(part, shift, mask, cutoff, chosen, at, result)
            done = len(part) & ~15
        for i in range(done, len(part)):
            inside = ((np.int64(part[i]) >> shift) & mask) <= cutoff
            result[i] = chosen[at] if inside else part[i]
            at += inside
