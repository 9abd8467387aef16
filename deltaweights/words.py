"""Counts and lists, as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """A count of things, as in ``1 file`` and ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """The first ``most`` of some names, as in ``a``, ``a and b`` and ``a, b and 3 more``."""
    more = len(names) - most
    shown = names if more <= 0 else [*names[:most], f"{more} more"]
    *first, last = shown
    return f"{', '.join(first)} and {last}" if first else last
