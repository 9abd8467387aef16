"""Working memory that a thread keeps from chunk to chunk.

Megabytes allocated afresh for every chunk are pages that the system has to hand out and clear each
time, which can take longer than coding the chunk.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEPT = 8 << 20  # bytes; longer arrays are given back
_LINE = 64  # bytes of a cache line: a vector that straddles two costs twice
_local = threading.local()


def scratch(name: str, count: int, dtype: DTypeLike) -> NDArray[Any]:
    """`count` elements of any content, valid until this thread next asks for `name`."""
    size = count * np.dtype(dtype).itemsize
    if size > KEPT:
        return _aligned(size).view(dtype)
    store: dict[str, NDArray[np.uint8]] = _local.__dict__
    room = store.get(name)
    if room is None or len(room) < size:
        room = store[name] = _aligned(max(size, 1 << 16))
    return room[:size].view(dtype)


def _aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes that begin on a cache line."""
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size]
