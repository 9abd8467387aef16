"""Counts and lists in words."""

from __future__ import annotations

import pytest

from deltaweights.words import counted, listed


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1234, "1,234 files")]
)
def test_one_thing_is_no_plural(count: int, words: str) -> None:
    assert counted(count, "file") == words


@pytest.mark.parametrize(
    ("names", "words"),
    [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c"), ("abcd", "a, b, c and 1 more")],
)
def test_a_long_list_is_cut(names: str, words: str) -> None:
    assert listed(list(names), 3) == words
