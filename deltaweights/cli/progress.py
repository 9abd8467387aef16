"""How far a command is: bars on a terminal, lines with a time stamp in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..words import size
from .logs import stamp
from .rendering import byte_rate, duration, speed
from .streams import note

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds between two lines about one phase.
_INTERVAL = 10.0


class Phases:
    """A :data:`ProgressCallback` that shows nothing and knows how far each phase is."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._done[phase] = done

    def done(self, *phases: str) -> int:
        """The bytes that were dealt with in these phases, or in all."""
        return sum(done for phase, done in self._done.items() if phase in phases or not phases)


class LogLines(Phases):
    """A line at the start and the end of each phase, and every ten seconds in between, whether or not there
    was any progress."""

    def __init__(self, interval: float = _INTERVAL) -> None:
        super().__init__()
        self._interval = interval
        self._lock = threading.Lock()
        self._phase, self._now, self._total = "", 0, 0
        self._began = self._shown = 0.0
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> LogLines:
        self._ticker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._ticker.join()

    def __call__(self, phase: str, done: int, total: int) -> None:
        super().__call__(phase, done, total)
        with self._lock:
            now = time.monotonic()
            is_new = phase != self._phase
            if is_new:
                self._phase, self._began = phase, now
            is_end = done >= total and (is_new or self._now < self._total)
            self._now, self._total = done, total
            if is_new or is_end or now - self._shown > self._interval:
                self._show(now)

    def _tick(self) -> None:
        while not self._ended.wait(self._interval / 10):
            with self._lock:
                now = time.monotonic()
                if self._now < self._total and now - self._shown > self._interval:
                    self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        took, done, total = now - self._began, self._now, self._total
        if done >= total:
            facts = speed(done, took)
        elif not done or not took:
            facts = f"{size(done)} of {size(total)}"
        else:
            left = duration((total - done) * took / done)
            facts = f"{size(done)} of {size(total)}, {byte_rate(done / took)}, {left} left"
        note(f"{stamp()} {self._phase}: {facts}")


class _Bars(Phases):
    """A bar for each phase, on a terminal, from the first progress on."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        super().__call__(phase, done, total)
        with self._lock:
            if self._bars is None:
                self._bars = _progress()
                self._bars.start()
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total)
            self._bars.update(self._tasks[phase], completed=done, total=total)


def _progress() -> Progress:
    """Bars that fit 80 columns."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description:14}"),
        BarColumn(bar_width=18),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def progress(*, quiet: bool, as_log: bool) -> Iterator[Phases]:
    """What shows progress inside the block.

    Args:
        quiet: show nothing.
        as_log: show lines, even on a terminal, since there are other lines.
    """
    if quiet:
        yield Phases()
    elif as_log or not sys.stderr.isatty():
        with LogLines() as lines:
            yield lines
    else:
        with _Bars() as bars:
            yield bars
