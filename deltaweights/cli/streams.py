"""stdin, stdout and stderr: made fit to be used, and written to."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress

import typer

from ..words import UNSEEN, plain
from .layout import fold, screen_of

#: The streams that were closed when the program began.
_CLOSED: set[str] = set()


def open_streams() -> None:
    """Make stdin, stdout and stderr fit to be used, whatever they are.

    One that is closed becomes the null device: else the next file that is opened would get its number, and
    messages. What the terminal's encoding lacks is shown as ``\\u202e``.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            _CLOSED.add(name)
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stdout_failed(error: OSError) -> None:
    """Say that the report could not be written, and leave nothing for Python to write once more."""
    show_error(
        f"Cannot write to stdout\n{error.strerror}.\nWhat was asked for is done, but was not reported."
    )
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def leave_stderr() -> None:
    """Leave nothing on stderr for Python to write at the end: what cannot be written is no failure."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def report(fields: Mapping[str, object], lines: Iterable[str], *, as_json: bool, quiet: bool = False) -> None:
    """What a command found or did: one JSON object, or lines of text, or nothing."""
    if as_json:
        if "stdout" in _CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        is_utf = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        text = json.dumps(fields, ensure_ascii=not is_utf)
        typer.echo(UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text))
    elif not quiet:
        width = screen_of(sys.stdout).width
        for line in lines:
            for part in fold(line, width):
                typer.echo(part)


def show_error(text: str) -> None:
    """Lines of an error, on stderr."""
    for line in f"error: {text}".splitlines():
        note(plain(line))


def note(text: str) -> None:
    """Lines on stderr. That nobody can read them is no reason to stop the work."""
    with suppress(OSError):
        width = screen_of(sys.stderr).width
        for line in text.splitlines():
            for part in fold(line, width):
                typer.echo(part, err=True)
