"""What the library logs, as lines on stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import typer

from ..words import plain
from .streams import note

#: The variable that says how much is logged, without an option on every command line.
VARIABLE = "DELTAWEIGHTS_LOG"
_CODEC = "deltaweights.codec"
_LEVELS = {"": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


def level_of(verbose: int) -> int:
    """The level to log at, by the number of ``-v`` and the environment.

    Raises:
        typer.BadParameter: the variable has no such value.
    """
    named = os.environ.get(VARIABLE, "")
    if named.lower() not in _LEVELS:
        raise typer.BadParameter(f"{named!r} is neither info nor debug.", param_hint=VARIABLE)
    asked = logging.WARNING if not verbose else logging.INFO if verbose == 1 else logging.DEBUG
    return min(asked, _LEVELS[named.lower()])


def stamp(seconds: float | None = None) -> str:
    """A time (seconds since 1970; now if None) as log lines begin with it."""
    time = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return time.strftime("%Y-%m-%d %H:%M:%S")


class _Lines(logging.Handler):
    """Warnings as sentences, which are kept too; everything else as lines with a time stamp."""

    def __init__(self, *, warnings_shown: bool) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self._warnings_shown = warnings_shown

    def emit(self, record: logging.LogRecord) -> None:
        text = plain(record.getMessage())
        if record.name == _CODEC:  # it tells when it has to be compiled
            note(text)
            return
        if record.levelno < logging.WARNING:
            where = record.name.removeprefix("deltaweights.")
            note(f"{stamp(record.created)} {record.levelname} {where}: {text}")
            return
        self.warnings.append(record.getMessage())
        if self._warnings_shown:
            note(f"Warning: {text}")


@contextmanager
def logs_shown(level: int, *, quiet: bool, warnings_shown: bool) -> Iterator[list[str]]:
    """Show what the library logs inside the block.

    Args:
        level: show what is at least this grave.
        quiet: do not say that the codec is being compiled.
        warnings_shown: show warnings; else they are only kept.

    Yields:
        The warnings so far, for the report.
    """
    log, codec, lines = (
        logging.getLogger("deltaweights"),
        logging.getLogger(_CODEC),
        _Lines(warnings_shown=warnings_shown),
    )
    before = log.level, codec.level
    log.addHandler(lines)
    log.setLevel(level)
    if quiet:
        codec.setLevel(logging.ERROR)
    try:
        yield lines.warnings
    finally:
        log.removeHandler(lines)
        log.setLevel(before[0])
        codec.setLevel(before[1])
