"""What was made last, held within a bound of bytes, for any number of threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Value = TypeVar("Value", bound=_Sized)


class _Place(Generic[Value]):
    """Where a value is made, by one thread, while others wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Value | None = None


class Recent(Generic[Value]):
    """The values that were asked for last, as many as ``nbytes`` hold, and at least the newest.

    Only threads that ask for the same value wait for each other.
    """

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._held = 0
        self._lock = threading.Lock()
        self._places: OrderedDict[Hashable, _Place[Value]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now or earlier. Do not write to it."""
        with self._lock:
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
        with place.lock:
            if place.value is None:
                place.value = make()
                self._count(key, place, place.value.nbytes)
            return place.value

    def make_room(self, nbytes: int) -> None:
        """Drop the oldest until so many bytes more are within the bound."""
        with self._lock:
            self._drop(self._most - nbytes, None)

    def _count(self, key: Hashable, place: _Place[Value], nbytes: int) -> None:
        with self._lock:
            if self._places.get(key) is not place:  # dropped while it was made
                return
            self._held += nbytes
            self._drop(self._most, place)

    def _drop(self, most: int, but: _Place[Value] | None) -> None:
        for other in list(self._places):
            if self._held <= most:
                break
            dropped = self._places[other]
            if dropped is not but and dropped.value is not None:
                del self._places[other]
                self._held -= dropped.value.nbytes

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._places.clear()
            self._held = 0
