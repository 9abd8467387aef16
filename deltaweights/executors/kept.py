"""What a worker keeps open from one task to the next: headers and manifests are read once, not per shard."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from ..workers import Workers

Thing = TypeVar("Thing")

#: Two: a verb's second kind of task may need what the first one had open.
_MOST = 2


class _Kept:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, tuple[Any, ExitStack]] = OrderedDict()

    def take(self, key: Hashable, opening: Callable[[], AbstractContextManager[Thing]]) -> Thing:
        with self._lock:
            if key not in self._open:
                stack = ExitStack()
                self._open[key] = stack.enter_context(opening()), stack
            self._open.move_to_end(key)
            while len(self._open) > _MOST:
                self._open.popitem(last=False)[1][1].close()
            thing: Thing = self._open[key][0]
            return thing

    def forget(self, key: Hashable) -> None:
        with self._lock:
            found = self._open.pop(key, None)
        if found:
            with suppress(Exception):  # the error that led here is the one to report
                found[1].close()


_kept = _Kept()


@contextmanager
def kept(key: Hashable, opening: Callable[[], AbstractContextManager[Thing]]) -> Iterator[Thing]:
    """What ``opening`` opens; from an earlier task of this process, if that used the same ``key``. An error
    inside the block closes it."""
    try:
        yield _kept.take(key, opening)
    except BaseException:
        _kept.forget(key)
        raise


@contextmanager
def workers_of(threads: int, cancel: Callable[[], None]) -> Iterator[Workers]:
    """Threads for one task. ``cancel`` ends reads over a network if the task fails, and not otherwise: what
    was opened is used again."""
    is_done = False
    with Workers(threads) as workers:
        workers.at_stop(lambda: None if is_done else cancel())
        yield workers
        is_done = True
