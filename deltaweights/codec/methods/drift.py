"""Floats that a training step decayed: the base, moved by what its mantissas tell, in the base's place.

Weight decay multiplies all weights by the same factor, step after step, and rounds each time. A weight that
nothing else moved is then some ULPs nearer to zero, and how many follows from its mantissa alone. So a chunk
may name a *shift* for each stretch of mantissas, and be coded against the base so *drifted*.

u8           log2 of the number of shifts: mantissas are told apart by so many top bits
u8           how the rest is coded: the number of another method
u32, list    the shifts, each zigzagged as the difference from the one before
rest         of that method, the drifted elements being the base's

Elements have 32 bits: narrower ones hardly ever decay by a step that they can hold.
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

_GLANCE_LOG, _LOG = 4, 10  # bits of a mantissa in a first look, and those that the encoder uses
_CLEAR = 0.75  # by how many bits shifts have to be longer than they are vague for a second look
_EACH = 64  # elements that a shift is found from
_BEHIND = np.iinfo(np.int32).max  # sorts behind the moves
_PATCH, _EVERY = 64, 4  # elements in a row, and which of them, on which distances are compared
_GAIN = 0.98  # what drifted distances take, as a part of what the others do, at most


def find_shifts(base: Bytes, target: Bytes, form: FloatFormat) -> Shifts | None:
    """The shifts under which a chunk becomes shorter, by a sample; None where none are worth it."""
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
    """About what the distances take: which octave each is in, by their entropy, and where in the octave."""
    octaves = np.frexp(ulp.distance(base, target).astype(np.float64))[1]
    counts = np.bincount(octaves, minlength=33)
    shares = counts[counts > 0] / len(octaves)
    return float(counts[1:] @ np.arange(32) - len(octaves) * (shares @ np.log2(shares)))


def _fit(before: NDArray[Any], after: NDArray[Any], form: FloatFormat, log: int) -> tuple[Shifts, float]:
    """At most 2**log shifts, and how many bits each carries beyond its uncertainty, on average."""
    log = min(max((len(before) // _EACH).bit_length() - 1, 0), log)
    stride = len(before) // (_EACH << log) | 1  # odd: in step with no row
    moves, counts = np.full((1 << log, _EACH), _BEHIND, np.int32), np.zeros(1 << log, np.int64)
    difference.collect_moves(before, after, stride, form.shift, moves, counts)
    moves.sort(axis=1)
    shifts = np.empty(1 << log, np.uint32)
    return shifts, difference.fit_shifts(moves, counts, shifts) / len(shifts)


def drifted(base: Bytes, shifts: Shifts, form: FloatFormat) -> Bytes:
    """The base's chunk, drifted; in this thread's working memory."""
    before = floats.elements(base, form)
    moved = working_memory.DRIFTED.take(len(before))
    difference.drift(before, shifts, form.shift, form.mask, moved)
    return moved.view(np.uint8)


def put_head(shifts: Shifts, method: int) -> bytes:
    """What stands before a chunk that is coded by `method` against its drifted base."""
    steps = np.diff(shifts, prepend=np.uint32(0))
    numbers = (steps << np.uint32(1)) ^ (np.uint32(0) - (steps >> np.uint32(31)))
    log = len(shifts).bit_length() - 1
    return bytes([log, method]) + floats.sized(entropy.encode_list(numbers))


def take_head(data: Bytes, form: FloatFormat) -> tuple[Shifts, int, Bytes]:
    """(shifts, method, what follows); PayloadError where data does not begin with a head."""
    if form.itemsize != 4 or len(data) < DRIFT_HEAD or data[0] > MOST_SHIFTS_LOG:
        raise PayloadError("the head of a drifted chunk is damaged")
    section, rest = floats.take_section(data[DRIFT_HEAD:])
    numbers = np.empty(1 << int(data[0]), np.uint32)
    entropy.decode_list(section, numbers)
    steps = (numbers >> np.uint32(1)) ^ (np.uint32(0) - (numbers & np.uint32(1)))
    return np.cumsum(steps, dtype=np.uint32), int(data[1]), rest
