"""Bytes of remote files, fetched ahead of their readers by several connections, in bounded memory.

A reader announces which spans it will read, in order (:meth:`Window.expect`); adjacent spans are merged and
cut into requests, which run ahead of it as far as the window has room. A request's memory is given back when
its last announced byte was read. What nobody announced is fetched when it is read.

No reader can wait for ever: a request that somebody waits for is begun though the window be full (of other
readers' bytes), and a request that has begun needs nothing but its connection to finish. What is held beyond
the window is what such readers are about to take: no more than one request for each of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .source import Span

#: Bytes fetched and not yet read, for each source: a base and a delta at once hold twice as much.
WINDOW_BYTES = 80 << 20

#: So long that a round trip for each costs little, so short that the window has room for one per connection.
REQUEST_BYTES = 8 << 20

CONNECTIONS = 8

#: Spans with no more bytes than this between them share a request.
_GAP_BYTES = 4096

#: Yields the bytes of a file from ``start`` to ``end``, all of them, in pieces; called in any thread.
Fetch = Callable[[str, int, int], Generator[bytes, None, None]]


@dataclass(slots=True)
class _Run:
    """Announced spans of one file that lie so close together that requests may cover them all."""

    path: str
    spans: list[tuple[int, int]]

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[-1][1]

    def cut(self, position: int) -> list[_Run]:
        """The part before byte ``position`` of the file, and the part from there on, if there are such."""
        before = [(start, min(end, position)) for start, end in self.spans if start < position]
        after = [(max(start, position), end) for start, end in self.spans if end > position]
        return [_Run(self.path, spans) for spans in (before, after) if spans]


class _Request:
    """One range of a file, on its way or here. All but ``buffer`` is for those who hold the window's lock."""

    def __init__(self, run: _Run, lock: threading.Lock) -> None:
        self.path = run.path
        self.start, self.end = run.start, run.end
        self.unread = run.spans  # announced, and no reader has come for it yet
        self.arrived = threading.Condition(lock)
        self.buffer: NDArray[np.uint8] | None = None  # from when it begins until it is dropped
        self.filled = 0  # bytes
        self.awaited = self.end  # the nearest byte that a reader waits for
        self.error: BaseException | None = None
        self.users = 0  # threads that fill the buffer or copy from it
        self.is_dropped = False

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def claim(self, position: int, limit: int) -> int:
        """Take the unread bytes from ``position`` on, up to ``limit``, for one reader. Returns their end."""
        for index, (start, end) in enumerate(self.unread):
            if start <= position < end:
                limit = min(limit, end)
                rest = [(start, position), (limit, end)]
                self.unread[index : index + 1] = [(first, last) for first, last in rest if first < last]
                return limit
        return position


@dataclass(slots=True, eq=False)
class _Schedule:
    """What one ``expect`` announced: where it lies, the runs that have not begun, in order, and requests that
    have."""

    runs: deque[_Run]
    announced: list[Span]
    requests: list[_Request] = field(default_factory=list)


class Window:
    """The bytes that ``fetch`` gets, for any number of readers.

    Attributes:
        held: bytes of memory in use now.
        peak: the most that was ever in use.
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
        self._ended = threading.Condition(self._lock)  # a connection has
        self._spare: list[NDArray[np.uint8]] = []  # to use again: fresh memory costs page faults
        self._is_cancelled = False

    @contextmanager
    def expect(self, spans: Iterable[Span]) -> Iterator[None]:
        """Within the block, ``spans`` will be read, each of their bytes once, in about this order. Bytes that
        are announced in several blocks are fetched for each."""
        runs = _merge(spans)
        schedule = _Schedule(deque(runs), [Span(run.path, run.start, run.end) for run in runs])
        with self._lock:
            self._schedules.append(schedule)
            self._begin()
        try:
            yield
        except BaseException:
            with self._lock:
                self._end_schedule(schedule, [])
            raise
        with self._lock:
            self._end_schedule(schedule, self._schedules)

    def read_into(self, path: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) from byte ``offset`` of the file on.

        Raises:
            CancelledError: :meth:`cancel` was called, before or meanwhile.
            Exception: what ``fetch`` raised.
        """
        position, end = offset, offset + len(out)
        while position < end:
            with self._lock:
                request = self._find(path, position, end) or self._ask(path, position, end)
                stop = request.claim(position, end)
                request.users += 1
                try:
                    is_there = self._wait(request, stop)
                except BaseException:
                    self._leave(request)
                    raise
            if is_there:
                assert request.buffer is not None
                source = request.buffer[position - request.start : stop - request.start]
                out[position - offset : stop - offset] = source
                position = stop
            with self._lock:
                self._leave(request)

    def cancel(self) -> None:
        """End all reads that wait, and those to come, and all connections at their next byte."""
        with self._lock:
            self._is_cancelled = True
            begun = (request for schedule in self._schedules for request in schedule.requests)
            for request in (*self._urgent, *self._running, *begun):
                request.arrived.notify_all()
            self._urgent.clear()
            self._spare.clear()

    def close(self) -> None:
        """:meth:`cancel`, and wait a moment for the connections: one that is stalled ends by itself."""
        self.cancel()
        with self._lock:
            self._ended.wait_for(lambda: not self._running, timeout=1)

    # All that follows is for those who hold the lock, but for _run and _fill, the connections' threads.

    def _end_schedule(self, schedule: _Schedule, heirs: Sequence[_Schedule]) -> None:
        """Give back what is left unread. Where one of ``heirs`` announced the same bytes, this schedule's
        readers took those of the heir: they are the heir's from now on."""
        self._schedules.remove(schedule)
        for request in schedule.requests:
            if heir := _heir(request.path, request.unread, heirs):
                heir.requests.append(request)
            else:
                self._drop(request)
        for run in schedule.runs:
            if heir := _heir(run.path, run.spans, heirs):
                heir.runs.append(run)
        self._begin()

    def _find(self, path: str, position: int, end: int) -> _Request | None:
        """The request for the byte at ``position``, if it was announced and nobody has read it yet."""
        for schedule in self._schedules:
            for request in schedule.requests:
                if request.path == path and any(a <= position < b for a, b in request.unread):
                    return request
            for index, run in enumerate(schedule.runs):
                if run.path == path and any(a <= position < b for a, b in run.spans):
                    return self._pull(schedule, index, position, end)
        return None

    def _pull(self, schedule: _Schedule, index: int, position: int, end: int) -> _Request:
        """Begin at ``position`` of a run at once, out of turn. Where there is no room, take no more than the
        reader wants, who gives it back at once."""
        length = self._request_bytes
        if self.held + length > self._nbytes:
            length = min(length, end - position)
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
        """A request for bytes that nobody announced."""
        end = min(end, position + self._longest)
        request = _Request(_Run(path, [(position, end)]), self._lock)
        self._hurry(request)
        return request

    def _hurry(self, request: _Request) -> None:
        self._urgent.append(request)
        self._begin()

    @property
    def _request_bytes(self) -> int:
        """Shorter where many readers share the window, so that there is room for two of each."""
        share = self._nbytes // (2 * max(1, len(self._schedules)))
        return max(self._longest // 8, min(self._longest, share))

    def _begin(self) -> None:
        """Begin as many requests as there are connections and room for."""
        while len(self._running) < self._connections and (request := self._next()):
            try:
                threading.Thread(target=self._run, args=(request,), name="fetch", daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads
                self._end(request, error)

    def _next(self) -> _Request | None:
        """The request to begin now, its memory taken: one that is waited for, or else the next one of the
        reader for whom least is held."""
        request = None
        while self._urgent and request is None:
            first = self._urgent.popleft()
            request = None if first.is_dropped else first
        if request is None and not self._is_cancelled:
            request = self._read_ahead()
        if request:
            request.buffer = self._take(request.nbytes)
            request.users += 1
            self._running.add(request)
        return request

    def _read_ahead(self) -> _Request | None:
        waiting = [schedule for schedule in self._schedules if schedule.runs]
        if not waiting:
            return None
        schedule = min(waiting, key=lambda schedule: sum(r.nbytes for r in schedule.requests))
        first, *rest = schedule.runs[0].cut(schedule.runs[0].start + self._request_bytes)
        if self.held + first.end - first.start > self._nbytes:
            return None
        schedule.runs.popleft()
        schedule.runs.extendleft(rest)
        request = _Request(first, self._lock)
        schedule.requests.append(request)
        return request

    def _run(self, request: _Request | None) -> None:
        """A connection's thread: it takes one request after the other, while there are any."""
        while request:
            error = None
            try:
                self._fill(request)
            except BaseException as problem:  # for the reader, if there will be one
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
        """A connection is done with the request, or it failed."""
        request.error = error
        self._running.remove(request)
        self._ended.notify_all()
        request.arrived.notify_all()
        self._leave(request)

    def _wait(self, request: _Request, stop: int) -> bool:
        """Wait until the bytes before ``stop`` are there. Returns whether they are: they will not be, where
        another reader's request was dropped with its schedule."""
        while request.start + request.filled < stop:
            if self._is_cancelled:
                raise CancelledError
            if request.error:
                raise request.error
            if request.is_dropped:
                return False
            request.awaited = min(request.awaited, stop)
            request.arrived.wait(0.5)  # and again: Python misses a Ctrl-C just before it begins to wait
        if self._is_cancelled:
            raise CancelledError
        return True

    def _leave(self, request: _Request) -> None:
        """One thread less uses the request; the last one out gives its memory back."""
        request.users -= 1
        if request.users or (request.unread and not request.is_dropped):
            return
        request.is_dropped = True
        for schedule in self._schedules:
            if request in schedule.requests:
                schedule.requests.remove(request)
        self._give_back(request)
        self._begin()

    def _drop(self, request: _Request) -> None:
        """Nobody will read the rest of it."""
        request.is_dropped = True
        request.arrived.notify_all()
        if not request.users:
            self._give_back(request)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        for index, buffer in enumerate(self._spare):
            if len(buffer) == nbytes:
                return self._spare.pop(index)
        while self._spare and self.held + sum(map(len, self._spare)) > self._nbytes:
            self._spare.pop()
        return np.empty(nbytes, np.uint8)

    def _give_back(self, request: _Request) -> None:
        buffer, request.buffer = request.buffer, None
        if buffer is None:
            return
        self.held -= len(buffer)
        self._spare = [spare for spare in (*self._spare, buffer) if len(spare) == self._request_bytes]


def _heir(path: str, spans: Sequence[tuple[int, int]], schedules: Sequence[_Schedule]) -> _Schedule | None:
    """The first of ``schedules`` that announced any of these bytes."""
    for schedule in schedules:
        for other, start, end in schedule.announced:
            if path == other and any(start < stop and first < end for first, stop in spans):
                return schedule
    return None


def ranges_of(spans: Iterable[Span]) -> list[Span]:
    """What :meth:`Window.expect` would fetch for the spans, but for the cuts between requests."""
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
