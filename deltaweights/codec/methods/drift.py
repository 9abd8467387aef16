"""Codes floats after weight decay against a base that is moved in the same way, by its mantissas.

Weight decay multiplies all weights by the same factor at each step, and rounds each time. A weight that
nothing else moved is then some ULPs nearer to zero, and their number depends only on its mantissa. So a chunk
may name a *shift* for each range of mantissas, and be coded against the base so *drifted*.

u8           log2 of the number of shifts: the top mantissa bits that select the shift
u8           the number of the method that codes the rest
u32, list    the shifts, each zigzagged as the difference from the one before
rest         by that method, against the drifted base

Elements have 32 bits: in narrower ones, a decay step is hardly ever large enough to change the value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import difference
from ..constants import DRIFT_HEAD, MOST_SHIFTS_LOG
from . import entropy, floats, ulp
from .ulp import FloatFormat

Bytes = NDArray[np.uint8]
Shifts = NDArray[np.uint32]  # modulo 2**32, added to the bits: away from zero

_GLANCE_LOG, _LOG = 4, 10  # mantissa bits for the first look, and for the encoder
_CLEAR = 0.75  # bits that shifts must exceed their uncertainty by for a second look
_EACH = 64  # elements from which a shift is found
_BEHIND = np.iinfo(np.int32).max  # sorts after the moves
_PATCH, _EVERY = 64, 4  # elements in a row for comparing distances, and the stride
_GAIN = 0.98  # the most bits of drifted distances, as a part of the plain ones


def find_shifts(base: Bytes, target: Bytes, form: FloatFormat) -> Shifts | None:
    """The shifts that make a chunk shorter, judged by a sample; None if none do."""
    if form.itemsize != 4:
        return None
    before, after = floats.elements(base, form), floats.elements(target, form)
    if _fit(before, after, form, _GLANCE_LOG)[1] < _CLEAR:
        return None
    shifts, _ = _fit(before, after, form, _LOG)
    near, there = (floats.sample(side, _PATCH)[::_EVERY].copy() for side in (before, after))
    moved = np.empty_like(near)
    difference.drift(near, shifts, form.shift, form.mask, moved)
    share = len(before) / len(near)
    less = share * _bits(moved, there) + 8 * len(put_head(shifts, 0))
    return shifts if less < _GAIN * share * _bits(near, there) else None


def _bits(base: NDArray[Any], target: NDArray[Any]) -> float:
    """The approximate bits of the distances: the entropy of their octaves, and the place in the octave."""
    octaves = np.frexp(ulp.distance(base, target).astype(np.float64))[1]
    counts = np.bincount(octaves, minlength=33)
    shares = counts[counts > 0] / len(octaves)
    return float(counts[1:] @ np.arange(32) - len(octaves) * (shares @ np.log2(shares)))


def _fit(before: NDArray[Any], after: NDArray[Any], form: FloatFormat, log: int) -> tuple[Shifts, float]:
    """At most 2**log shifts, and the bits by which each exceeds its uncertainty, on average."""
    log = min(max((len(before) // _EACH).bit_length() - 1, 0), log)
    stride = len(before) // (_EACH << log) | 1  # odd, so not in step with rows
    moves, counts = np.full((1 << log, _EACH), _BEHIND, np.int32), np.zeros(1 << log, np.int64)
    difference.collect_moves(before, after, stride, form.shift, moves, counts)
    moves.sort(axis=1)
    shifts = np.empty(1 << log, np.uint32)
    return shifts, difference.fit_shifts(moves, counts, shifts) / len(shifts)


def drifted(base: Bytes, shifts: Shifts, form: FloatFormat) -> Bytes:
    """The drifted chunk of the base, in this thread's working memory."""
    before = floats.elements(base, form)
    moved = working_memory.DRIFTED.take(len(before))
    difference.drift(before, shifts, form.shift, form.mask, moved)
    return moved.view(np.uint8)


def put_head(shifts: Shifts, method: int) -> bytes:
    """The head of a chunk that is coded by `method` against its drifted base."""
    steps = np.diff(shifts, prepend=np.uint32(0))
    numbers = (steps << np.uint32(1)) ^ (np.uint32(0) - (steps >> np.uint32(31)))
    log = len(shifts).bit_length() - 1
    return bytes([log, method]) + floats.sized(entropy.encode_list(numbers))


def take_head(data: Bytes, form: FloatFormat) -> tuple[Shifts, int, Bytes]:
    """(shifts, method, remaining data); PayloadError if data does not begin with a head."""
    if form.itemsize != 4 or len(data) < DRIFT_HEAD or data[0] > MOST_SHIFTS_LOG:
        raise PayloadError("the head of a drifted chunk is damaged")
    section, rest = floats.take_section(data[DRIFT_HEAD:])
    numbers = np.empty(1 << int(data[0]), np.uint32)
    entropy.decode_list(section, numbers)
    steps = (numbers >> np.uint32(1)) ^ (np.uint32(0) - (numbers & np.uint32(1)))
    return np.cumsum(steps, dtype=np.uint32), int(data[1]), rest
