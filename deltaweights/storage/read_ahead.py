"""Fetches bytes of remote files ahead of their readers, over several connections, in bounded memory.

A reader announces the spans that it will read, in order (:meth:`Window.expect`). Adjacent spans are merged
and cut into requests, which run ahead as far as the window has room. A request's memory is freed as it is
read, from its start. Unannounced bytes are fetched when they are read.

No reader waits for ever: a request with a waiting reader begins even if the window is full of other readers'
bytes, and a request that has begun depends only on its connection. The window can overflow by at most one
request for each waiting reader, who is about to take it, and one besides.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .source import Span
from .system import give_pages_back, pages

#: The most bytes fetched and not yet read, for each source: a base and a delta together hold twice as much.
WINDOW_BYTES = 80 << 20

#: Long enough that a round trip for each costs little, short enough for one per connection in the window.
REQUEST_BYTES = 8 << 20

CONNECTIONS = 8

#: Spans with gaps up to this many bytes share a request.
_GAP_BYTES = 4096

#: Yields all bytes of a file from ``start`` to ``end``, in pieces; called in any thread.
Fetch = Callable[[str, int, int], Generator[bytes, None, None]]


@dataclass(slots=True)
class _Run:
    """Announced spans of one file, close enough together to share requests."""

    path: str
    spans: list[tuple[int, int]]

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[-1][1]

    def cut(self, position: int) -> list[_Run]:
        """The parts before and after byte ``position`` of the file, without empty ones."""
        before = [(start, min(end, position)) for start, end in self.spans if start < position]
        after = [(max(start, position), end) for start, end in self.spans if end > position]
        return [_Run(self.path, spans) for spans in (before, after) if spans]


class _Request:
    """One range of a file, on its way or in memory. Access to any attribute except ``buffer`` needs the
    window's lock."""

    def __init__(self, run: _Run, lock: threading.Lock) -> None:
        self.path = run.path
        self.start, self.end = run.start, run.end
        self.unread = run.spans  # announced, and not yet claimed by a reader
        self.arrived = threading.Condition(lock)
        self.memory: mmap.mmap | None = None  # from its begin until it is dropped
        self.buffer: NDArray[np.uint8] | None = None  # the same
        self.released = 0  # bytes of it that are read, and were freed
        self.filled = 0  # bytes
        self.awaited = self.end  # the nearest byte that a reader waits for
        self.error: BaseException | None = None
        self.users = 0  # threads that fill or read the buffer
        self.readers = 0  # those of them that read it
        self.is_dropped = False

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def held(self) -> int:
        """Its bytes in memory, or on their way there."""
        return self.nbytes - self.released if self.memory else 0

    def release(self) -> int:
        """Free what was read at its start. Returns the bytes."""
        assert self.memory
        read = min(start for start, _ in self.unread) - self.start
        before, self.released = self.released, max(self.released, read // mmap.PAGESIZE * mmap.PAGESIZE)
        give_pages_back(self.memory, before, self.released)
        return self.released - before

    def claim(self, position: int, limit: int) -> int:
        """Claim the unread bytes from ``position`` up to ``limit`` for one reader. Returns their end."""
        for index, (start, end) in enumerate(self.unread):
            if start <= position < end:
                limit = min(limit, end)
                rest = [(start, position), (limit, end)]
                self.unread[index : index + 1] = [(first, last) for first, last in rest if first < last]
                return limit
        return position


@dataclass(slots=True, eq=False)
class _Schedule:
    """The announcement of one ``expect``: its spans, the runs that have not begun, in order, and the requests
    that have."""

    runs: deque[_Run]
    announced: list[Span]
    requests: list[_Request] = field(default_factory=list)

    @property
    def held(self) -> int:
        """The bytes in memory, or on their way there."""
        return sum(request.held for request in self.requests)

    def add(self, runs: Iterable[_Run]) -> None:
        """Announce more. What is next to the last run that has not begun shares its requests."""
        for run in runs:
            self.announced.append(Span(run.path, run.start, run.end))
            last = self.runs[-1] if self.runs else None
            if last and last.path == run.path and 0 <= run.start - last.end <= _GAP_BYTES:
                last.spans += run.spans
            else:
                self.runs.append(run)


class Window:
    """Serves the bytes from ``fetch`` to any number of readers.

    Attributes:
        held: bytes of memory in use now.
        peak: the most bytes ever in use.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        nbytes: int = WINDOW_BYTES,
        request_bytes: int = REQUEST_BYTES,
        connections: int = CONNECTIONS,
    ) -> None:
        self.held = self.peak = 0
        self._fetch = fetch
        self._nbytes = nbytes
        self._longest = request_bytes
        self._connections = connections
        self._lock = threading.Lock()
        self._schedules: list[_Schedule] = []
        self._urgent: deque[_Request] = deque()  # wanted now, and waiting for a connection
        self._running: set[_Request] = set()
        self._ended = threading.Condition(self._lock)  # notified when a connection ends
        self._is_cancelled = False

    @contextmanager
    def expect(self, spans: Iterable[Span]) -> Iterator[None]:
        """Announce that ``spans`` will be read within the block, each byte once, in about this order. Bytes
        announced in several blocks are fetched for each."""
        with self.announcing() as announce:
            announce(spans)
            yield

    @contextmanager
    def announcing(self) -> Iterator[Callable[[Iterable[Span]], None]]:
        """:meth:`expect` for spans that become known within the block: call what this gives with them."""
        schedule = _Schedule(deque(), [])

        def announce(spans: Iterable[Span]) -> None:
            runs = _merge(spans)
            with self._lock:
                schedule.add(runs)
                self._begin()

        with self._lock:
            self._schedules.append(schedule)
        try:
            yield announce
        except BaseException:
            with self._lock:
                self._end_schedule(schedule, [])
            raise
        with self._lock:
            self._end_schedule(schedule, self._schedules)

    def read_into(self, path: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the file's bytes, beginning at byte ``offset``.

        Raises:
            CancelledError: :meth:`cancel` was called, before or during the read.
            Exception: the error of ``fetch``.
        """
        position, end = offset, offset + len(out)
        while position < end:
            with self._lock:
                request = self._find(path, position, end) or self._ask(path, position, end)
                stop = request.claim(position, end)
                request.users += 1
                request.readers += 1
                try:
                    is_there = self._wait(request, stop)
                except BaseException:
                    self._leave(request, is_reader=True)
                    raise
            if is_there:
                assert request.buffer is not None
                source = request.buffer[position - request.start : stop - request.start]
                out[position - offset : stop - offset] = source
                position = stop
            with self._lock:
                self._leave(request, is_reader=True)

    def halve(self) -> None:
        """Take half the memory from now on."""
        with self._lock:
            self._nbytes //= 2

    def cancel(self) -> None:
        """End all waiting and later reads, and all connections at their next byte."""
        with self._lock:
            self._is_cancelled = True
            begun = (request for schedule in self._schedules for request in schedule.requests)
            for request in (*self._urgent, *self._running, *begun):
                request.arrived.notify_all()
            self._urgent.clear()

    def close(self) -> None:
        """:meth:`cancel`, and wait briefly for the connections. A stalled one ends by itself later."""
        self.cancel()
        with self._lock:
            self._ended.wait_for(lambda: not self._running, timeout=1)

    # All methods below need the lock, except _run and _fill, which run in the connections' threads.

    def _end_schedule(self, schedule: _Schedule, heirs: Sequence[_Schedule]) -> None:
        """Free the unread bytes. If one of ``heirs`` announced the same bytes, this schedule's readers took
        the heir's copy, so the heir gets this schedule's."""
        self._schedules.remove(schedule)
        for request in schedule.requests:
            if heir := _heir(request.path, request.unread, heirs):
                heir.requests.append(request)
            elif request.unread:
                self._drop(request)
            # Else another schedule's reader waits for all that is left of it, and frees it.
        for run in schedule.runs:
            if heir := _heir(run.path, run.spans, heirs):
                heir.runs.append(run)
        self._begin()

    def _find(self, path: str, position: int, end: int) -> _Request | None:
        """The request for the byte at ``position``, if it was announced and is unread."""
        for schedule in self._schedules:
            for request in schedule.requests:
                if request.path == path and any(a <= position < b for a, b in request.unread):
                    return request
            for index, run in enumerate(schedule.runs):
                if run.path == path and any(a <= position < b for a, b in run.spans):
                    return self._pull(schedule, index, position, end)
        return None

    def _pull(self, schedule: _Schedule, index: int, position: int, end: int) -> _Request:
        """Begin a request at ``position`` of a run immediately, out of turn. If there is no room, and this is
        not the first one, limit it to the bytes that the reader wants, and some more: a request for each few
        bytes would cost more."""
        length = self._request_bytes
        if self.held + length > self._nbytes and schedule.held:
            more = min(self._longest // 2, self._nbytes + self._longest - self.held)
            length = min(length, max(end - position, more))
        *before, rest = schedule.runs[index].cut(position)
        wanted, *after = rest.cut(position + length)
        del schedule.runs[index]
        for run in (*after, *before):
            schedule.runs.insert(index, run)
        request = _Request(wanted, self._lock)
        schedule.requests.append(request)
        self._hurry(request)
        return request

    def _ask(self, path: str, position: int, end: int) -> _Request:
        """A request for unannounced bytes."""
        end = min(end, position + self._longest)
        request = _Request(_Run(path, [(position, end)]), self._lock)
        self._hurry(request)
        return request

    def _hurry(self, request: _Request) -> None:
        self._urgent.append(request)
        self._begin()

    @property
    def _request_bytes(self) -> int:
        """The length of a request, shorter if many readers share the window, so that each has room for two,
        one of them half read."""
        share = 4 * self._nbytes // (5 * max(1, len(self._schedules)))
        return max(self._longest // 8, min(self._longest, share))

    def _begin(self) -> None:
        """Begin as many requests as there are connections and room for."""
        while len(self._running) < self._connections and (request := self._next()):
            try:
                threading.Thread(target=self._run, args=(request,), name="fetch", daemon=True).start()
            except RuntimeError as error:  # the system has no more threads
                self._end(request, error)

    def _next(self) -> _Request | None:
        """The request to begin now, with its memory: one with a waiting reader, or else the next one of the
        reader that holds least."""
        request = None
        while self._urgent and request is None:
            first = self._urgent.popleft()
            request = None if first.is_dropped else first
        if request is None and not self._is_cancelled:
            request = self._read_ahead()
        if request:
            self._take(request)
            request.users += 1
            self._running.add(request)
        return request

    def _read_ahead(self) -> _Request | None:
        waiting = [schedule for schedule in self._schedules if schedule.runs]
        if not waiting:
            return None
        schedule = min(waiting, key=lambda schedule: schedule.held)
        first, *rest = schedule.runs[0].cut(schedule.runs[0].start + self._request_bytes)
        if self.held + first.end - first.start > self._nbytes:
            return None
        schedule.runs.popleft()
        schedule.runs.extendleft(rest)
        request = _Request(first, self._lock)
        schedule.requests.append(request)
        return request

    def _run(self, request: _Request | None) -> None:
        """A connection's thread: handles requests, one after the other, until none is left."""
        while request:
            error = None
            try:
                self._fill(request)
            except BaseException as problem:  # raised by the reader, if one comes
                error = problem
            with self._lock:
                self._end(request, error)
                request = self._next()

    def _fill(self, request: _Request) -> None:
        buffer = request.buffer
        assert buffer is not None
        with closing(self._fetch(request.path, request.start, request.end)) as pieces:
            for piece in pieces:
                end = request.filled + len(piece)
                buffer[request.filled : end] = np.frombuffer(piece, np.uint8)
                with self._lock:
                    request.filled = end
                    if self._is_cancelled or request.is_dropped:
                        return
                    if request.start + end >= request.awaited:
                        request.awaited = request.end
                        request.arrived.notify_all()
        assert request.filled == request.nbytes

    def _end(self, request: _Request, error: BaseException | None) -> None:
        """Note that a connection finished the request or failed."""
        request.error = error
        self._running.remove(request)
        self._ended.notify_all()
        request.arrived.notify_all()
        self._leave(request)

    def _wait(self, request: _Request, stop: int) -> bool:
        """Wait for the bytes before ``stop``. Returns False if they will not come, since another reader's
        request was dropped with its schedule."""
        while request.start + request.filled < stop:
            if self._is_cancelled:
                raise CancelledError
            if request.error:
                raise request.error
            if request.is_dropped:
                return False
            request.awaited = min(request.awaited, stop)
            request.arrived.wait(0.5)  # restarted: Python misses a Ctrl-C just before the wait
        if self._is_cancelled:
            raise CancelledError
        return True

    def _leave(self, request: _Request, *, is_reader: bool = False) -> None:
        """Note that a thread no longer uses the request. The last reader frees what was read, and the last
        user all of it."""
        request.users -= 1
        request.readers -= is_reader
        if request.unread and not request.is_dropped:
            if request.memory and not request.readers:
                self.held -= request.release()
                self._begin()
            return
        if request.users:
            return
        request.is_dropped = True
        for schedule in self._schedules:
            if request in schedule.requests:
                schedule.requests.remove(request)
        self._give_back(request)
        self._begin()

    def _drop(self, request: _Request) -> None:
        """Drop a request whose other bytes will not be read."""
        request.is_dropped = True
        request.arrived.notify_all()
        if not request.users:
            self._give_back(request)

    def _take(self, request: _Request) -> None:
        self.held += request.nbytes
        self.peak = max(self.peak, self.held)
        request.memory = pages(request.nbytes)
        request.buffer = np.frombuffer(request.memory, np.uint8)

    def _give_back(self, request: _Request) -> None:
        self.held -= request.held
        request.memory = request.buffer = None


def _heir(path: str, spans: Sequence[tuple[int, int]], schedules: Sequence[_Schedule]) -> _Schedule | None:
    """The first of ``schedules`` that announced any of these bytes."""
    for schedule in schedules:
        for other, start, end in schedule.announced:
            if path == other and any(start < stop and first < end for first, stop in spans):
                return schedule
    return None


def ranges_of(spans: Iterable[Span]) -> list[Span]:
    """The ranges that :meth:`Window.expect` would fetch for the spans, before they are cut into requests."""
    return [Span(run.path, run.start, run.end) for run in _merge(spans)]


def _merge(spans: Iterable[Span]) -> list[_Run]:
    runs: list[_Run] = []
    for path, start, end in spans:
        if start >= end:
            continue
        last = runs[-1] if runs else None
        if last is None or last.path != path or not 0 <= start - last.end <= _GAP_BYTES:
            runs.append(_Run(path, [(start, end)]))
        elif start == last.end:
            last.spans[-1] = (last.spans[-1][0], end)
        else:
            last.spans.append((start, end))
    return runs
