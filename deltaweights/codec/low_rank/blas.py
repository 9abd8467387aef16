"""NumPy's BLAS, told to use one thread.

diff has a thread for each core already. OpenBLAS would start as many again for each product of small
matrices, and have them wait for each other in loops: two to three times the processor time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

__all__ = ["one_blas_thread"]

# as NumPy's wheels name OpenBLAS's functions, and as others do; another BLAS is left as it is
_AFFIXES = (("scipy_openblas", "64_"), ("scipy_openblas", ""), ("openblas", "64_"), ("openblas", ""))


class _OneThread:
    """A context in which BLAS has one thread, in the whole process. Any number of threads may be in it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, 0
        self._get, self._set = _functions()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = self._get()
                self._set(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._before)


def _functions() -> tuple[Callable[[], int], Callable[[int], Any]]:
    """Those that tell and set the number of BLAS's threads."""
    try:
        library: Any = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    except (AttributeError, OSError):
        library = None
    for start, end in _AFFIXES:
        names = f"{start}_get_num_threads{end}", f"{start}_set_num_threads{end}"
        if all(hasattr(library, name) for name in names):
            get, put = (getattr(library, name) for name in names)
            put.argtypes, put.restype = (ctypes.c_int,), None
            return get, put
    return (lambda: 1), (lambda _: None)


one_blas_thread = _OneThread()
