"""Working memory that a thread keeps from chunk to chunk.

Megabytes allocated afresh for every chunk are pages that the system has to hand out and clear each
time, which can take longer than coding the chunk.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_KEPT = 8 << 20  # bytes; longer arrays are given back
_local = threading.local()


def scratch(name: str, count: int, dtype: DTypeLike) -> NDArray[Any]:
    """`count` elements of any content, valid until this thread next asks for `name`."""
    size = count * np.dtype(dtype).itemsize
    if size > _KEPT:
        return np.empty(count, dtype)
    store: dict[str, NDArray[np.uint8]] = _local.__dict__
    room = store.get(name)
    if room is None or len(room) < size:
        room = store[name] = np.empty(max(size, 1 << 16), np.uint8)
    return room[:size].view(dtype)
