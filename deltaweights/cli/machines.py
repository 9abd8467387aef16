"""The machines that ``--ray`` names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..executors import Executor


@contextmanager
def machines(address: str | None, threads: int | None) -> Iterator[Executor | None]:
    """The executor for a command, inside the block; None without an address.

    Args:
        threads: for each task; 1 if None.
    """
    if address is None:
        yield None
        return
    from ..executors import RayExecutor

    # What Ray says of its workers is no part of a report.
    with redirect_stdout(sys.stderr), RayExecutor(address, cpus_per_task=threads or 1) as executor:
        yield executor
