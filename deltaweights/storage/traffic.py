"""Counts the bytes that this process reads from files and the Hub, and those that it writes there.

All reads and writes pass through a few functions (system.py, hub_client.py, hub_upload.py), mostly a megabyte
or more at a time, so that counting costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from .. import metrics


class Traffic(NamedTuple):
    """Bytes read and written. What is read twice counts twice."""

    read: int
    written: int

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after ``earlier``."""
        return Traffic(self.read - earlier.read, self.written - earlier.written)


def count(*, read: int = 0, written: int = 0, fetched: int = 0) -> None:
    """Add to the totals, from any thread. What was fetched over a network counts as read, too."""
    metrics.add(read=read + fetched, write=written, receive=fetched)


def total() -> Traffic:
    """Everything since the process began."""
    totals = metrics.totals()
    return Traffic(totals["read"], totals["write"])
