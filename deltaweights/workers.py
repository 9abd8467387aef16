"""Threads for diff and apply: work runs ahead, results come back in order, memory is bounded and reused."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Called with the name of a phase, the bytes done and the bytes in total, from any thread, one call at a
#: time. The total becomes smaller if an earlier run turns out to have done a part.
ProgressCallback = Callable[[str, int, int], None]


def batches(items: Iterable[Item], nbytes: int, nbytes_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group the items, in order, into batches of at most ``nbytes`` bytes or of a single item."""
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


class MemoryBudget:
    """Bounds the memory that calls in several threads take together.

    Args:
        nbytes: what they may take. A call that takes more is made while no other one is.
    """

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room for so many bytes; within the block, they are taken."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._most)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


class Stopped(CancelledError):  # noqa: N818
    """Another thread failed first; its error is the one to report."""


class _Task(Generic[Result]):
    """A call that is made by a pool thread or by the thread that waits for its result, whichever is first."""

    def __init__(self, pool: ThreadPoolExecutor, call: Callable[[], Result]) -> None:
        self._call = call
        self.future = pool.submit(call)

    def take(self) -> bool:
        """Make the call in this thread, unless another thread began it. Returns whether this thread made
        it."""
        if self.future.cancelled() or not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self._call())
        except Exception as error:  # raised again by result()
            self.future.set_exception(error)
        return True

    def result(self) -> Result:
        self.take()
        return result_of(self.future)


#: The best values for each number of threads, measured on 16 cores (docs/benchmarks.md, "Many cores") and on
#: 2 (docs/codec.md, "What pays, what does not").
_FEW_THREADS, MOST_THREADS = 2, 8
_SMALL_BATCH_BYTES, _BATCH_BYTES = 2 << 20, 4 << 20


class _Crew:
    """The threads that lanes share."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.lanes = 1  # at work now
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(max(1, threads - 1))  # used only if there are two or more
        self.stopped = threading.Event()
        self.at_stop: list[Callable[[], None]] = []


class Lane:
    """One line of work, item after item in order, with its share of the threads.

    While every thread has a lane of its own, no lane runs ahead: one thread does all the work on an item, so
    the bytes that it decoded are still in its core's cache when it hashes them.
    """

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew

    @property
    def threads(self) -> int:
        """The number of threads that all lanes share."""
        return self._crew.threads

    def stop(self) -> None:
        """End the work in all lanes with :class:`Stopped`."""
        self._crew.stopped.set()
        for wake in self._crew.at_stop:
            wake()

    def check(self) -> None:
        """Raise :class:`Stopped` if :meth:`stop` was called."""
        if self._crew.stopped.is_set():
            raise Stopped

    def watch(self, blocks: Iterable[bytes], meter: Meter | None = None) -> Iterator[bytes]:
        """Yield the blocks and count them, until :meth:`stop` is called."""
        for block in blocks:
            self.check()
            yield block
            if meter:
                meter.add(len(block))

    @property
    def batch_bytes(self) -> int:
        """Bytes to work on at once. A few threads are fastest with batches that fit their caches. Many
        threads need larger batches, since each wait for Python's lock takes longer."""
        return _BATCH_BYTES if self.threads > _FEW_THREADS else _SMALL_BATCH_BYTES

    @property
    def window(self) -> int:
        """The number of items that :meth:`map` works on or holds at once: enough for its share of the
        threads."""
        return 2 * -(-self.threads // max(1, self._crew.lanes)) + 2

    @property
    def _is_alone(self) -> bool:
        """Whether all other threads are busy with their own lanes."""
        return self.threads == 1 or self._crew.lanes >= self.threads

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """Yield ``function`` of each item, in order. At most ``window`` items run ahead of the consumer,
        whose thread helps instead of waiting."""
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
        finally:  # no task may use the consumer's files once its error is handled
            _cancel(task.future for task in ahead)

    def aside(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Let another thread make ``call``, if one becomes free in time. Call the returned function for the
        result."""
        if self._is_alone:
            result = call()
            return lambda: result
        return _Task(self._crew.pool, call).result


class Workers(Lane):
    """The threads that do the work, including the caller's. A context manager, and a lane with all the
    threads. Any error inside it stops all the work.

    Args:
        threads: number of threads; if None, the number of usable cores, at most 8, since more would wait for
            Python's lock and take memory.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(_Crew(threads or min(usable_cores(), MOST_THREADS)))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._crew.pool.shutdown(cancel_futures=True)

    def at_stop(self, wake: Callable[[], None]) -> None:
        """Let :meth:`stop` call ``wake``, possibly more than once, to end other waits of the threads."""
        self._crew.at_stop.append(wake)

    def each(self, function: Callable[[Lane, Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return ``function`` of a lane and an item, for each item. Several run at once, each in its own
        lane, so that sequential work on one core (SHA-256 of a shard) does not hold up the others."""
        items, crew = list(items), self._crew
        crew.lanes = len(items)
        lane = Lane(crew)

        def run(item: Item) -> Result:
            lane.check()
            try:
                return function(lane, item)
            except BaseException:
                self.stop()  # immediately, before the next item begins
                raise
            finally:
                with crew.lock:
                    crew.lanes -= 1

        futures: list[Future[Result]] = []
        with ThreadPoolExecutor(min(self.threads, max(1, len(items)))) as threads:
            try:
                for item in items:  # one by one: Ctrl-C may come while the first are at work
                    futures.append(threads.submit(run, item))
                _wait_for(futures)  # short after an error, which stops the others
                return [future.result() for future in futures]
            except BaseException:
                self.stop()
                _cancel(futures)
                _raise_first(futures)
                raise
            finally:
                crew.lanes = 1


def _first(ahead: deque[_Task[Result]]) -> Result:
    """The first task's result. While it is pending, this thread takes tasks that no thread has begun."""
    while not ahead[0].future.done() and any(task.take() for task in ahead):
        pass
    _wait_for([ahead[0].future])  # kept in `ahead`, so that it is awaited after Ctrl-C
    return ahead.popleft().future.result()


def _cancel(futures: Iterable[Future[Result]]) -> None:
    """Cancel the futures that have not begun, and wait for the others."""
    _wait_for([future for future in futures if not future.cancel()])


#: Seconds after which a wait restarts: see :func:`_wait_for`.
_LOOK = 0.5


def result_of(future: Future[Result]) -> Result:
    """Wait for the future's result, without a time limit, but open to Ctrl-C."""
    _wait_for([future])
    return future.result()


def next_of(queue: SimpleQueue[Item]) -> Item:
    """Wait for the next item of a queue, without a time limit, but open to Ctrl-C, as :func:`_wait_for`."""
    while True:
        with suppress(Empty):
            return queue.get(timeout=_LOOK)


def _wait_for(futures: list[Future[Result]]) -> None:
    """Wait until all are done or cancelled. (A pool that was shut down does not report cancelled futures.)

    Python misses a signal that arrives just before its main thread begins to wait, so the wait restarts twice
    a second.
    """
    while unfinished := [future for future in futures if not future.done()]:
        wait(unfinished, timeout=_LOOK)


def _raise_first(futures: list[Future[Result]]) -> None:
    """Raise the first error that is not merely the consequence of an earlier one."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error and not isinstance(error, CancelledError):
            raise error


def usable_cores() -> int:
    """The number of cores that this process may use (a container's or batch job's share, if the system
    tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Buffers:
    """Arrays reused by all threads, since freshly allocated memory costs a page fault for each 4 KiB.

    Args:
        nbytes: their usual length.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[NDArray[np.uint8]] = []  # a stack: the last one used is in the cache

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """An array of ``nbytes`` bytes. Pass it to :meth:`give` after use."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(max(nbytes, self._nbytes), np.uint8)
        return (buffer if buffer.size >= nbytes else np.empty(nbytes, np.uint8))[:nbytes]

    def give(self, array: NDArray[np.uint8]) -> None:
        """Take back an array from :meth:`take`."""
        self._free.append(array if array.base is None else array.base)


class Meter:
    """Counts progress, from any thread, and passes the sum to a callback."""

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

    def skip(self, count: int) -> None:
        """Count no more on what was done before, so that the speed is that of the work."""
        with self._lock:
            self._total -= count
        self.add(0)
