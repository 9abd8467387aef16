"""Working memory that a thread keeps from chunk to chunk.

Megabytes allocated afresh for every chunk are pages that the system has to hand out and clear each
time, which can take longer than coding the chunk.

Every array is an object here, which a thread holds until it takes it again. So two functions may share one
only where the first is done with it when the second begins.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEPT = 8 << 20  # bytes; longer arrays are given back
_LINE = 64  # bytes of a cache line: a vector that straddles two costs twice


class ThreadArray:
    """An array of each thread's, of one dtype, or of the one that is asked for."""

    def __init__(self, dtype: DTypeLike | None = None) -> None:
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._local = threading.local()

    def take(self, count: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """``count`` elements of any content, valid until this thread takes it again."""
        kind = self._dtype or np.dtype(dtype)
        size = count * kind.itemsize
        if size > KEPT:
            return _aligned(size).view(kind)
        room: NDArray[np.uint8] | None = self._local.__dict__.get("room")
        if room is None or len(room) < size:
            room = self._local.room = _aligned(max(size, 1 << 16))
        return room[:size].view(kind)


def _aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes that begin on a cache line."""
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size]


# What encoding or decoding one chunk passes on from step to step: a chunk is in one of them at a time.
VALUES = ThreadArray(np.uint32)  # one an element
PLANES = ThreadArray(np.uint8)  # byte planes, one behind the other
CONTEXTS = ThreadArray(np.uint8)
SCALES, ABOVE = ThreadArray(np.int64), ThreadArray(np.uint32)  # one a segment
# The elements of a sparse chunk that are coded: the base's, and the target's to be read or written.
CHOSEN, CHANGED, WANTED = ThreadArray(), ThreadArray(), ThreadArray()
DRIFTED = ThreadArray(np.uint32)  # a base moved by weight decay: it outlives all that codes against it
GAPS, DISTANCES = ThreadArray(np.uint32), ThreadArray(np.uint32)  # the changes of a sparse chunk

# A run of tokens: written with LEADING to HEAD, or read with FREQUENCIES and SLOTS.
WORDS = ThreadArray(np.uint16)
LEADING, KEYS = ThreadArray(np.uint32), ThreadArray(np.uint16)
COUNTERS, TABLES = ThreadArray(np.uint32), ThreadArray(np.uint32)
EXPLICIT, ENCODER, HEAD = ThreadArray(np.uint8), ThreadArray(np.uint32), ThreadArray(np.uint8)
FREQUENCIES, SLOTS = ThreadArray(np.uint32), ThreadArray(np.uint32)

# What an encoder looks at to choose its parameters.
SOME, THERE = ThreadArray(), ThreadArray()  # samples of base and target
SUMS, ONE_CONTEXT = ThreadArray(np.float32), ThreadArray(np.uint8)  # one a segment
UPPER_WORDS = ThreadArray(np.uint32)  # one an element

# A row of chunks that a kernel decodes by itself.
ROW_FREQUENCIES, ROW_PLANES = ThreadArray(np.uint32), ThreadArray(np.uint8)
MARKS, ACTIVE = ThreadArray(np.uint8), ThreadArray(np.uint8)
ROW_PLACES, ROW_VALUES, SHIFTS = ThreadArray(np.uint32), ThreadArray(np.uint32), ThreadArray(np.uint32)
