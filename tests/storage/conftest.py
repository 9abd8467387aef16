"""Places to read from and write to, for the tests of storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    import fsspec  # type: ignore[import-untyped]

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
