"""A command's talk with whoever runs it: errors and exit codes, questions, what it cost.

Exit codes: 0 done, 1 it failed or differs, 2 wrong usage, 3 a license was not accepted, 130 interrupted.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from ..errors import DeltaWeightsError, LicenseNotAcceptedError
from ..words import plain
from .logs import level_of, logs_shown
from .progress import Phases, progress
from .rendering import license_panel
from .streams import note, report, show_error

if TYPE_CHECKING:
    from ..license.table import Terms
    from ..storage import Source, Traffic

#: Of malloc.h. Blocks of so many bytes have pages of their own.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20

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


class Work:
    """A command at work, and what there is to report of it."""

    def __init__(self, level: int, warnings: Sequence[str], *, as_json: bool, quiet: bool) -> None:
        self.warnings = warnings
        self.seconds = 0.0
        self._is_logged = level < logging.WARNING
        self._as_json = as_json
        self._quiet = quiet
        self._began = time.monotonic()
        self._before = _traffic()
        self._bytes = self._before

    def progress(self) -> AbstractContextManager[Phases]:
        """What shows progress, inside the block. The clock starts here, after imports and questions."""
        self._began = time.monotonic()
        return progress(quiet=self._quiet, as_log=self._is_logged)

    def end(self) -> None:
        """Stop the clock, and count bytes no more."""
        self.seconds = time.monotonic() - self._began
        self._bytes = _traffic().since(self._before)

    def report(
        self,
        fields: Mapping[str, object],
        lines: Iterable[str],
        *,
        with_costs: bool = False,
        always: bool = False,
    ) -> None:
        """Print one JSON object, or lines of text.

        Args:
            with_costs: add to the object how long the work took, the bytes that it read and wrote, and its
                warnings.
            always: print the lines even if the command is to be quiet.
        """
        costs = {
            "seconds": round(self.seconds, 3),
            "bytes_read": self._bytes.read,
            "bytes_written": self._bytes.written,
            "warnings": list(self.warnings),
        }
        fields = {**fields, **(costs if with_costs else {})}
        report(fields, lines, as_json=self._as_json, quiet=self._quiet and not always)


def _traffic() -> Traffic:
    from ..storage import total_traffic

    return total_traffic()


@contextmanager
def working(
    *,
    as_json: bool = False,
    quiet: bool = False,
    verbose: int = 0,
    debug: bool = False,
    resumes: bool = False,
) -> Iterator[Work]:
    """A command's work is done inside the block. An error there becomes its three lines and an exit code.

    Args:
        as_json: also print the error as one JSON object.
        quiet: show no progress and no summary. (Warnings are shown; with ``as_json`` they are in the report.)
        verbose: log what is done, or more of it.
        debug: let an error's traceback through.
        resumes: whether the command, run again, goes on where it was interrupted.
    """
    level = level_of(verbose)
    with (
        _errors_explained(debug, as_json, resumes=resumes),
        logs_shown(level, quiet=quiet, warnings_shown=not (quiet and as_json)) as warnings,
    ):
        _free_at_once()
        work = Work(level, warnings, as_json=as_json, quiet=quiet)
        yield work
        work.end()


def _free_at_once() -> None:
    """Let large blocks of memory go back to the system when they are freed. glibc keeps more and more of them
    in its heaps otherwise, which doubles what the packages of object stores take. It is a setting of a whole
    process, so it is made where that is ours."""
    with suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


@contextmanager
def _errors_explained(debug: bool, as_json: bool, *, resumes: bool) -> Iterator[None]:
    """An error inside the block becomes its three lines and an exit code."""
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
    from ..license.rules import describe, not_accepted, unaccepted

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
        raise not_accepted(missing, _how_to_accept(missing, next(delta for delta in deltas if asked[delta])))


def _how_to_accept(missing: Sequence[Terms], delta: str) -> str:
    options = " ".join(f"--accept-license {terms.spdx}" for terms in missing)
    ids = " ".join(terms.spdx for terms in missing)
    return (
        f"Read it (deltaweights license {delta} --texts), then pass {options} or set "
        f"DELTAWEIGHTS_ACCEPT_LICENSE={ids!r}."
    )


def _confirmed(names: str) -> bool:
    """Ask, if there is somebody to ask. Ctrl-C and Ctrl-D are a no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    note(plain(f"To be accepted: {names}"))
    try:
        return typer.confirm("Do you accept?", err=True)
    except typer.Abort:
        return False
