"""Counts the bytes that this process reads from files and the Hub, and those that it writes there.

All reads and writes pass through a few functions (system.py, hub_client.py, hub_upload.py), mostly a megabyte
or more at a time, so that counting costs nothing.
"""

from __future__ import annotations

import threading
from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes read and written. What is read twice counts twice."""

    read: int
    written: int

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after ``earlier``."""
        return Traffic(self.read - earlier.read, self.written - earlier.written)


_lock = threading.Lock()
_total = Traffic(0, 0)


def count(*, read: int = 0, written: int = 0) -> None:
    """Add to the totals, from any thread."""
    global _total  # noqa: PLW0603
    with _lock:
        _total = Traffic(_total.read + read, _total.written + written)


def total() -> Traffic:
    """Everything since the process began."""
    return _total
