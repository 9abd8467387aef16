"""Working memory that a thread keeps from chunk to chunk.

Allocating megabytes for every chunk makes the system map and clear pages each time, which can take longer
than coding the chunk.

Each object here is one array of a thread, valid until the thread takes it again. So two functions may share
one only if the first is done with it when the second begins.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEPT = 8 << 20  # bytes; longer arrays are freed
_LINE = 64  # bytes of a cache line: a vector across two lines costs twice


class ThreadArray:
    """An array for each thread, of one dtype, or of the dtype requested."""

    def __init__(self, dtype: DTypeLike | None = None) -> None:
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._local = threading.local()

    def take(self, count: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return ``count`` elements with arbitrary content, valid until this thread takes the array again."""
        kind = self._dtype or np.dtype(dtype)
        size = count * kind.itemsize
        if size > KEPT:
            return _aligned(size).view(kind)
        room: NDArray[np.uint8] | None = self._local.__dict__.get("room")
        if room is None or len(room) < size:
            room = self._local.room = _aligned(max(size, 1 << 16))
        return room[:size].view(kind)


def _aligned(size: int) -> NDArray[np.uint8]:
    """``size`` bytes that begin on a cache line."""
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size]


# Data passed between the steps of coding one chunk; a chunk is in one array at a time.
VALUES = ThreadArray(np.uint32)  # one per element
PLANES = ThreadArray(np.uint8)  # byte planes, one after the other
CONTEXTS = ThreadArray(np.uint8)
SCALES, ABOVE = ThreadArray(np.int64), ThreadArray(np.uint32)  # one per segment
# The coded elements of a sparse chunk: the base's, and the target's to read or write.
CHOSEN, CHANGED, WANTED = ThreadArray(), ThreadArray(), ThreadArray()
DRIFTED = ThreadArray(np.uint32)  # a base moved by weight decay; it outlives the coding against it
GAPS, DISTANCES = ThreadArray(np.uint32), ThreadArray(np.uint32)  # the changes of a sparse chunk

# A run of tokens: written with LEADING to HEAD, read with FREQUENCIES and SLOTS.
WORDS = ThreadArray(np.uint16)
LEADING, KEYS = ThreadArray(np.uint32), ThreadArray(np.uint16)
COUNTERS, TABLES = ThreadArray(np.uint32), ThreadArray(np.uint32)
EXPLICIT, ENCODER, HEAD = ThreadArray(np.uint8), ThreadArray(np.uint32), ThreadArray(np.uint8)
FREQUENCIES, SLOTS = ThreadArray(np.uint32), ThreadArray(np.uint32)

# The samples from which an encoder chooses its parameters.
SOME, THERE = ThreadArray(), ThreadArray()  # samples of base and target
SUMS, ONE_CONTEXT = ThreadArray(np.float32), ThreadArray(np.uint8)  # one per segment
UPPER_WORDS = ThreadArray(np.uint32)  # one per element

# A row of chunks that a kernel decodes in one call.
ROW_FREQUENCIES, ROW_PLANES = ThreadArray(np.uint32), ThreadArray(np.uint8)
MARKS, ACTIVE = ThreadArray(np.uint8), ThreadArray(np.uint8)
ROW_PLACES, ROW_VALUES, SHIFTS = ThreadArray(np.uint32), ThreadArray(np.uint32), ThreadArray(np.uint32)
