"""Processes run and measured, and plain tables: what the benchmarks share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TypeAlias

MIB = 1 << 20

Command: TypeAlias = "Sequence[str | os.PathLike[str]]"


@dataclass(frozen=True)
class Usage:
    """What one child process took, from its start to its end, the interpreter's own share included."""

    wall: float  #: seconds
    cpu: float  #: seconds, user and system, of all its threads
    peak: int  #: bytes of resident memory at most
    written: int = 0  #: bytes to disks, as far as the system counts them


def run_measured(command: Command, output: IO[bytes] | None = None) -> Usage:
    """Run a program to its end; its output goes to the file ``output`` or is dropped, its errors are shown.

    Raises:
        SystemExit: it failed.
    """
    # Modules are compiled once, as they are where a package is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=output or subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed with status {child.returncode}: {' '.join(map(str, command))}")
    written = usage.ru_oublock * 512
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, written)


def deltaweights(*arguments: str | os.PathLike[str]) -> Command:
    """The command line of ``deltaweights``, run by this interpreter."""
    return [sys.executable, "-m", "deltaweights", *arguments]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The rows in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print(flush=True)


def finish(missed: Sequence[str]) -> None:
    """Say whether the figures hold, and exit with 1 where one does not."""
    for line in missed:
        print(f"MISSED: {line}")
    if missed:
        raise SystemExit(1)
    print("All figures hold.")
