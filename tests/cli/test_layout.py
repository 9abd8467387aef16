"""Lines that fit a terminal: nothing is wider than it, and nothing is lost but the middle of long names."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.cli.layout import Screen, cells, fold, screen_of, shorten, table

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60)


@given(TEXTS, st.integers(3, 40))
def test_a_shortened_name_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert cells(short) <= width
    if cells(text) <= width:
        assert short == text
    else:
        head, _, tail = short.partition("…") if "…" not in text else ("", "", "")
        assert text.startswith(head)
        assert text.endswith(tail)


def test_the_middle_is_what_a_name_loses() -> None:
    assert shorten("model.layers.0.mlp.down_proj.weight", 20) == "model.lay…roj.weight"
    assert shorten("model.layers.0.mlp.down_proj.weight", 20, "...") == "model.la...oj.weight"


def test_wide_characters_take_two_columns() -> None:
    assert cells("重み.weight") == 11
    assert cells("e\u0301") == 1
    assert cells(shorten("重重重重重重重重", 9)) <= 9


@given(
    st.lists(TEXTS.filter(lambda text: " " not in text and "`" not in text), max_size=12), st.integers(20, 80)
)
def test_a_folded_line_has_all_words_and_is_no_wider_than_it_must_be(words: list[str], width: int) -> None:
    line = " ".join(filter(None, map(str.strip, words)))
    parts = list(fold(line, width))
    assert " ".join(part.strip() for part in parts).split() == line.split()
    for part in parts:
        assert cells(part) <= width or len(part.split()) == 1


def test_a_command_is_not_torn_apart() -> None:
    line = "Read it, then say `deltaweights license delta --texts` to see all of the texts."
    assert list(fold(line, 42)) == [
        "Read it, then say",
        "  `deltaweights license delta --texts` to",
        "  see all of the texts.",
    ]


@pytest.mark.parametrize(
    ("line", "indent"),
    [
        ("- an item that is long enough", 2),
        ("memory        about as much as that", 14),
        ("plain words that are as long", 2),
    ],
)
def test_further_lines_are_indented_like_the_first_word(line: str, indent: int) -> None:
    _, *further = fold(line, 24)
    assert further
    assert all(re.match(rf" {{{min(indent, 12)}}}\S", part) for part in further)


def test_without_a_screen_nothing_is_folded_or_shortened() -> None:
    long = "x" * 300 + " y"
    assert list(fold(long, None)) == [long]
    _, row = table(["name"], [[long]], Screen())
    assert row.strip() == long


ROWS = [
    ["model.layers.*.mlp.down_proj.weight" + "x" * 30, "BF16", "duplicate of " + "y" * 40, "1.2 MB"],
    ["short", "F32", "changed", "3 KB"],
]
HEADINGS = ["tensor", "dtype", "status", "payload"]


@given(st.integers(50, 130))
def test_a_table_fits_the_screen(width: int) -> None:
    lines = list(table(HEADINGS, ROWS, Screen(width), right=["payload"], names=["tensor", "status"]))
    assert len(lines) == 3
    assert max(map(cells, lines)) <= width
    assert {
        line.index(word) + len(word) for line, word in zip(lines, ("payload", "MB", "KB"), strict=True)
    } == {cells(lines[0])}


def test_a_whole_table_shortens_nothing_silently() -> None:
    lines = list(table(HEADINGS, ROWS, Screen(80), right=["payload"], names=["tensor", "status"], whole=True))
    assert f" {ROWS[0][0]}" in lines
    assert f"   {ROWS[0][2]}" in lines
    assert max(map(cells, lines)) <= 80


def test_an_empty_column_is_left_out() -> None:
    assert list(table(["a", "", "b"], [["1", "", "2"]], Screen(80))) == [" a  b", " 1  2"]


def test_a_stream_that_is_no_terminal_has_no_width() -> None:
    assert screen_of(io.StringIO()) == Screen(None)
