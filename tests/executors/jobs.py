"""Tasks for tests: functions of a module, which workers import."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from deltaweights.errors import HubReadError

_log = logging.getLogger("deltaweights.jobs")


def square(number: int) -> int:
    """The square; an error of ours for negative numbers, and one of Python's for a text."""
    _log.info("the square of %s", number)
    if number < 0:
        raise HubReadError("No square", f"{number} is negative.", "Pass another.", retryable=True)
    return number**2


def wait_for_end(folder: Path, name: str) -> None:
    """Write a file, and another one when interrupted, after a minute at most."""
    (folder / f"{name}.began").touch()
    try:
        for _ in range(600):
            time.sleep(0.1)
    except KeyboardInterrupt:
        (folder / f"{name}.interrupted").touch()
        raise


def die(_: object) -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(folder: Path, number: int) -> int:
    """Die the first time, and return the number the second time."""
    try:
        (folder / f"{number}.died").touch(exist_ok=False)
    except FileExistsError:
        return number
    die(None)
    return -1
