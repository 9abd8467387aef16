"""Sizes and counts as people read them."""

from __future__ import annotations

import pytest

from deltaweights.cli.rendering import apply_lines
from deltaweights.patch import ApplyReport
from deltaweights.words import size


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(0, "0 bytes"), (1, "1 byte"), (2, "2 bytes"), (4_190, "4.19 KB")]
)
def test_sizes(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown


@pytest.mark.parametrize(
    ("rebuilt", "kept", "shown"),
    [
        (1, 1, "1 file rebuilt and checked, 1 was already there"),
        (2, 3, "2 files rebuilt and checked, 3 were already there"),
        (1, 0, "1 file rebuilt and checked"),
    ],
)
def test_one_file_is_no_plural(rebuilt: int, kept: int, shown: str) -> None:
    report = ApplyReport("out", rebuilt=("a",) * rebuilt, kept=("b",) * kept, nbytes=8000)
    assert list(apply_lines("out", report, 2)) == [f"out: {shown}; 8 KB in 2 s, 4 KB/s"]
