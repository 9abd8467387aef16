"""Threads for diff and apply: work runs ahead, results come back in order, memory is bounded and reused."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Called with the name of a phase, how much is done and how much there is (bytes, or chunks where a phase
#: says so); from any thread, one at a time.
ProgressCallback = Callable[[str, int, int], None]


def batches(items: Iterable[Item], nbytes: int, nbytes_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, so many at a time as have together at most ``nbytes``, or one."""
    batch: list[Item] = []
    room = nbytes
    for item in items:
        if batch and nbytes_of(item) > room:
            yield batch
            batch, room = [], nbytes
        batch.append(item)
        room -= nbytes_of(item)
    if batch:
        yield batch


class Stopped(CancelledError):  # noqa: N818
    """Another thread failed first; its error is the one to report."""


class _Task(Generic[Result]):
    """A call for a pool of threads, or for whoever waits for its result: the first who comes to it."""

    def __init__(self, pool: ThreadPoolExecutor, call: Callable[[], Result]) -> None:
        self._call = call
        self.future = pool.submit(call)

    def take(self) -> bool:
        """Make the call in this thread, unless it was begun before. Returns whether it was made now."""
        if self.future.cancelled() or not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self._call())
        except Exception as error:  # it is raised where the result is asked for
            self.future.set_exception(error)
        return True

    def result(self) -> Result:
        self.take()
        return result_of(self.future)


#: What is best for how many threads was measured on 16 cores (docs/benchmarks.md, "Many cores") and on 2
#: (docs/codec.md, "What pays, what does not").
_FEW_THREADS, _MOST_THREADS = 2, 8
_SMALL_BATCH_BYTES, _BATCH_BYTES = 2 << 20, 4 << 20


class _Crew:
    """The threads that lanes share."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.lanes = 1  # that are at work
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(max(1, threads - 1))  # used only if there are two or more
        self.stopped = threading.Event()
        self.at_stop: list[Callable[[], None]] = []


class Lane:
    """One line of work, item after item in order, with its share of the threads.

    While there is a lane for every thread, nothing runs ahead in any of them: one thread does all of an item,
    and what it just decoded is still in its core's cache when it hashes it.
    """

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew

    @property
    def threads(self) -> int:
        """How many threads all lanes share."""
        return self._crew.threads

    def stop(self) -> None:
        """Make all work that goes on, in all lanes, end with :class:`Stopped`."""
        self._crew.stopped.set()
        for wake in self._crew.at_stop:
            wake()

    def check(self) -> None:
        """Raise :class:`Stopped` where the work is to end."""
        if self._crew.stopped.is_set():
            raise Stopped

    def watch(self, blocks: Iterable[bytes], meter: Meter | None = None) -> Iterator[bytes]:
        """The blocks, counted, until the work is to end."""
        for block in blocks:
            self.check()
            yield block
            if meter:
                meter.add(len(block))

    @property
    def batch_bytes(self) -> int:
        """How much to do at once: a few threads do best with what their caches hold; the more there are, the
        longer each one waits for Python's lock whenever it has to have it."""
        return _BATCH_BYTES if self.threads > _FEW_THREADS else _SMALL_BATCH_BYTES

    @property
    def window(self) -> int:
        """How many items :meth:`map` works on or holds at once: enough for its share of the threads."""
        return 2 * -(-self.threads // max(1, self._crew.lanes)) + 2

    @property
    def _is_alone(self) -> bool:
        """Whether all other threads have work of their own."""
        return self.threads == 1 or self._crew.lanes >= self.threads

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """``function`` of each item, in order, at most ``window`` of them ahead of the consumer, whose thread
        works as well while it would have to wait."""
        ahead: deque[_Task[Result]] = deque()
        try:
            for item in items:
                self.check()
                if not ahead and self._is_alone:
                    yield function(item)
                    continue
                ahead.append(_Task(self._crew.pool, partial(function, item)))
                if len(ahead) >= self.window:
                    yield _first(ahead)
            while ahead:
                yield _first(ahead)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:  # nothing may still use the consumer's files when its error is handled
            _cancel(task.future for task in ahead)

    def aside(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Have ``call`` made by another thread, if one is free before the function that is returned is called
        for the result."""
        if self._is_alone:
            result = call()
            return lambda: result
        return _Task(self._crew.pool, call).result


class Workers(Lane):
    """Threads to work with, that of the caller being one; a context manager, and a lane that has all of them.
    Any error inside it stops all the work.

    Args:
        threads: how many; the number of usable cores, but no more than 8, if None: more would wait for
            Python's lock, and take memory.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(_Crew(threads or min(usable_cores(), _MOST_THREADS)))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._crew.pool.shutdown(cancel_futures=True)

    def at_stop(self, wake: Callable[[], None]) -> None:
        """Have :meth:`stop` call ``wake``, perhaps more than once, to end what threads wait for elsewhere."""
        self._crew.at_stop.append(wake)

    def each(self, function: Callable[[Lane, Item], Result], items: Iterable[Item]) -> list[Result]:
        """``function`` of a lane and an item, for each item: several at once, each in a lane of its own, so
        that one core's sequential work (SHA-256 of a shard) does not hold up the others."""
        items, crew = list(items), self._crew
        crew.lanes = len(items)
        lane = Lane(crew)

        def run(item: Item) -> Result:
            lane.check()
            try:
                return function(lane, item)
            except BaseException:
                self.stop()  # at once: before another item begins
                raise
            finally:
                with crew.lock:
                    crew.lanes -= 1

        futures: list[Future[Result]] = []
        with ThreadPoolExecutor(min(self.threads, max(1, len(items)))) as threads:
            try:
                for item in items:  # one by one: Ctrl-C may come while the first are at work
                    futures.append(threads.submit(run, item))
                _wait_for(futures)  # not long after an error: it stops the others
                return [future.result() for future in futures]
            except BaseException:
                self.stop()
                _cancel(futures)
                _raise_first(futures)
                raise
            finally:
                crew.lanes = 1


def _first(ahead: deque[_Task[Result]]) -> Result:
    """The first task's result. Until it is there, this thread takes tasks that nobody has begun."""
    while not ahead[0].future.done() and any(task.take() for task in ahead):
        pass
    _wait_for([ahead[0].future])  # it stays in there: after Ctrl-C it is to be waited for
    return ahead.popleft().future.result()


def _cancel(futures: Iterable[Future[Result]]) -> None:
    """Cancel what has not begun, wait for what has."""
    _wait_for([future for future in futures if not future.cancel()])


def result_of(future: Future[Result]) -> Result:
    """The future's result, waited for as long as it takes, or until Ctrl-C."""
    _wait_for([future])
    return future.result()


def _wait_for(futures: list[Future[Result]]) -> None:
    """Wait until all are done or cancelled. (A pool that was shut down never says that they were cancelled.)

    Python misses a signal that comes just before its main thread begins to wait, so it begins anew now and
    then.
    """
    while unfinished := [future for future in futures if not future.done()]:
        wait(unfinished, timeout=0.5)


def _raise_first(futures: list[Future[Result]]) -> None:
    """Raise the first error that is not merely the echo of another."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error and not isinstance(error, CancelledError):
            raise error


def usable_cores() -> int:
    """How many cores this process may use (a container's or batch job's share, where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Buffers:
    """Arrays that are used again and again, by any thread: memory given back to the system and asked for
    again costs a page fault for each 4 KiB.

    Args:
        nbytes: how long they usually are.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[NDArray[np.uint8]] = []  # the one that was used last is in the cache

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """An array of so many bytes, to be given back when it is no longer used."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(max(nbytes, self._nbytes), np.uint8)
        return (buffer if buffer.size >= nbytes else np.empty(nbytes, np.uint8))[:nbytes]

    def give(self, array: NDArray[np.uint8]) -> None:
        """Take back what :meth:`take` gave."""
        self._free.append(array if array.base is None else array.base)


class Meter:
    """Counts what is done, from any thread, and passes the sum on to a callback."""

    def __init__(self, callback: ProgressCallback | None, phase: str, total: int) -> None:
        self._callback = callback
        self._phase = phase
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        if self._callback:
            with self._lock:
                self._done += count
                self._callback(self._phase, self._done, self._total)
