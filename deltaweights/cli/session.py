"""A command's talk with whoever runs it: progress, questions, reports, errors and exit codes.

Exit codes: 0 done, 1 it failed or differs, 2 wrong usage, 3 a license was not accepted, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DeltaWeightsError, LicenseNotAcceptedError
from .rendering import UNSEEN, license_panel, plain

if TYPE_CHECKING:
    from ..license.table import Terms
    from ..storage import Source
    from ..workers import ProgressCallback

#: What errors tell to do, in Python's words and in the command line's.
FLAGS = {
    "base=": "--base ",
    "base_repo=": "--base-repo ",
    "base_revision=": "--base-revision ",
    "keep_base=True": "--keep-base",
    "force=True": "--force",
    "private=False": "--public",
    "accept_conflicts=True": "--accept-conflicts",
    "`make_delta`": "`deltaweights diff`",
    "`verify_delta`": "`deltaweights verify`",
    "`inspect_delta`": "`deltaweights inspect --json`",
}
_IN_PYTHON = re.compile("|".join(rf"(?<!\w){re.escape(words)}" for words in FLAGS))


def in_flags(fix: str) -> str:
    """An error's *fix* in the words of the command line."""
    return _IN_PYTHON.sub(lambda found: FLAGS[found[0]], fix)


# Streams -------------------------------------------------------------------------------------------------


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


# Reports and errors --------------------------------------------------------------------------------------


def report(fields: Mapping[str, object], lines: Iterable[str], *, as_json: bool, quiet: bool = False) -> None:
    """What a command found or did: one JSON object, or lines of text, or nothing."""
    if as_json:
        if "stdout" in _CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        is_utf = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        text = json.dumps(fields, ensure_ascii=not is_utf)
        typer.echo(UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text))
    elif not quiet:
        for line in lines:
            typer.echo(line)


def show_error(text: str) -> None:
    """Lines of an error, on stderr."""
    note("\n".join(map(plain, f"error: {text}".splitlines())))


def note(text: str) -> None:
    """A line on stderr. That nobody can read it is no reason to stop the work."""
    with suppress(OSError):
        typer.echo(text, err=True)


@contextmanager
def errors_explained(debug: bool, as_json: bool, *, resumes: bool = False) -> Iterator[None]:
    """An error inside the block becomes its three lines and an exit code.

    Args:
        debug: let the traceback through instead.
        as_json: also print the error as one JSON object.
        resumes: whether the command, run again, goes on where it was interrupted.
    """
    hint = " Run the same command again to go on." if resumes else ""
    try:
        yield
    except DeltaWeightsError as error:
        if debug:
            raise
        told = {"what": error.what, "why": error.why, "fix": in_flags(error.fix)}
        show_error("\n".join(filter(None, told.values())))
        report({"error": told}, (), as_json=as_json)
        raise typer.Exit(3 if isinstance(error, LicenseNotAcceptedError) else 1) from error
    except KeyboardInterrupt:
        note(f"Interrupted.{hint}")
        raise typer.Exit(130) from None
    except ImportError as error:  # some libraries turn Ctrl-C while they are imported into this
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        note(f"Interrupted.{hint}")
        raise typer.Exit(130) from None


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """What is told of odd inputs inside the block: it belongs into the report."""
    kept: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    log, keeper = logging.getLogger("deltaweights.inputs"), Keeper()
    before = log.level, log.propagate
    log.addHandler(keeper)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield kept
    finally:
        log.removeHandler(keeper)
        log.setLevel(before[0])
        log.propagate = before[1]


# Licenses ------------------------------------------------------------------------------------------------


def settle_license(
    deltas: list[str], sources: list[Source], accepted: list[str], *, quiet: bool, may_ask: bool
) -> None:
    """Show bases and licenses. Where somebody has to accept one and nobody has, ask, or raise.

    Args:
        deltas: the deltas' names, for messages.
        sources: the same deltas, opened.
        accepted: the licenses that were accepted on the command line.
        quiet: show nothing.
        may_ask: whether to ask where there is a terminal.

    Raises:
        LicenseNotAcceptedError: nobody accepted a license that is not an open one.
    """
    from ..delta.opening import license_texts, read_manifest
    from ..license.rules import describe, unaccepted

    manifests = [read_manifest(source) for source in sources]
    if not quiet:
        panels = ("\n".join(license_panel(describe(manifest))) for manifest in manifests)
        for panel in dict.fromkeys(panels):  # the licenses of a chain are mostly the same ones
            note(panel)
    asked = {
        delta: unaccepted(manifest, accepted, license_texts(source, manifest))
        for delta, source, manifest in zip(deltas, sources, manifests, strict=True)
    }
    missing = list({terms.spdx: terms for every in asked.values() for terms in every}.values())
    if not missing:
        return
    if not (may_ask and _confirmed(", ".join(f"{terms.name} ({terms.spdx})" for terms in missing))):
        raise _not_accepted(missing, next(delta for delta in deltas if asked[delta]))


def _confirmed(names: str) -> bool:
    """Ask, if there is somebody to ask. Ctrl-C and Ctrl-D are a no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(plain(f"Do you accept {names}?"), err=True)
    except typer.Abort:
        return False


def _not_accepted(missing: Sequence[Terms], delta: str) -> LicenseNotAcceptedError:
    """The error says exactly what to pass."""
    options = " ".join(f"--accept-license {terms.spdx}" for terms in missing)
    return LicenseNotAcceptedError(
        f"The license was not accepted: {', '.join(terms.name for terms in missing)}",
        "It is not an open license, or not known to be one. No weights were read, nothing was written.",
        f"Read it (deltaweights license {delta} --texts), then pass {options} or set "
        f"DELTAWEIGHTS_ACCEPT_LICENSE={' '.join(terms.spdx for terms in missing)!r}.",
    )


# Progress ------------------------------------------------------------------------------------------------


@contextmanager
def progress(quiet: bool) -> Iterator[ProgressCallback | None]:
    """A bar for each phase on a terminal, a line now and then in a log."""
    if quiet:
        log = logging.getLogger("deltaweights")
        before = log.level
        log.setLevel(logging.ERROR)  # it tells when the codec has to be compiled
        try:
            yield None
        finally:
            log.setLevel(before)
    elif not sys.stderr.isatty():
        yield _LogLines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done)

            yield show


class _LogLines:
    """Progress as lines: the start and the end of each phase, and every ten seconds in between."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase or now - self._shown > 10 or done >= total > 0:
            self._phase, self._shown = phase, now
            note(f"{phase}: {done / max(1, total):.0%}")
