"""Links in the fine-tune's text: led to where its files are, or only their text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.card.links import relocate

FILES = {"a.md": "files/a.md", "dir/b.png": "https://hub/resolve/dir/b.png", "c d.png": "files/c d.png"}


def find(path: str, is_shown: bool) -> str | None:
    return FILES.get(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[x](a.md)", "[x](files/a.md)"),
        ("[x](./a.md#part)", "[x](files/a.md#part)"),
        ("[x](dir/../a.md)", "[x](files/a.md)"),
        ('![x](dir/b.png "title")', '![x](https://hub/resolve/dir/b.png "title")'),
        ("![x](c%20d.png) ![x](<c d.png>)", "![x](files/c%20d.png) ![x](files/c%20d.png)"),
        ("[x](missing.md), ![y](missing.png)", "x, y"),
        ("[x](../a.md) [x](..) [x](.)", "x x x"),
        ("[![b](dir/b.png)](a.md)", "[![b](https://hub/resolve/dir/b.png)](files/a.md)"),
        ("[![b](missing.png)](a.md)", "[b](files/a.md)"),
        ("[![b](dir/b.png)](missing)", "![b](https://hub/resolve/dir/b.png)"),
        ("[a [b] c](missing.md)", "a [b] c"),
        ("[x][r] [r] [y][]\n\n[r]: a.md 'T'\n", "[x][r] [r] [y][]\n\n[r]: files/a.md 'T'\n"),
        ("[x][R] ![r] [r][] [s]\n\n[r]: missing.md\n", "x r r [s]\n\n"),
        ("[^1]\n\n[^1]: missing.md\n", "[^1]\n\n[^1]: missing.md\n"),
        ("[1][2](a.md)", "[1][2](files/a.md)"),
        ("`[x](a.md)` ``[x](`a.md)``", "`[x](a.md)` ``[x](`a.md)``"),
        ("`` [x](a.md)", "`` [x](files/a.md)"),
        ("```\n[x](a.md)\n```\n[x](a.md)", "```\n[x](a.md)\n```\n[x](files/a.md)"),
        ("~~~\n```\n[x](a.md)\n~~~\n", "~~~\n```\n[x](a.md)\n~~~\n"),
        ("<!-- [x](a.md) --> [x](a.md)", "<!-- [x](a.md) --> [x](files/a.md)"),
        (r"\[x](a.md)", r"\[x](a.md)"),
        ('<img alt="A" src="dir/b.png">', '<img alt="A" src="https://hub/resolve/dir/b.png">'),
        ("<img src='missing.png' alt='A'/>", "A"),
        (
            "<a href=a.md>x</a> <a class='k' href='no'>y</a>",
            "<a href=\"files/a.md\">x</a> <a class='k'>y</a>",
        ),
        ("<a href='a.md?\"onclick=\"x'>", '<a href="files/a.md?%22onclick=%22x">'),
        ("3 < 4 [x](a.md) > 2", "3 < 4 [x](files/a.md) > 2"),
        ("[x]( a.md )", "[x](files/a.md)"),
    ],
)
def test_relative_links(text: str, expected: str) -> None:
    assert relocate(text, find) == expected


@pytest.mark.parametrize(
    "link", ["https://x.org/a.md", "#part", "/org/other", "//x.org", "mailto:a@b.c", "data:,x"]
)
def test_other_links_stay(link: str) -> None:
    for text in (
        f"[x]({link}) ![x]({link} 'y')",
        f'<a href="{link}"><img src="{link}">',
        f"[x]: {link} 'y'\n",
    ):
        assert relocate(text, find) == text


PIECES = ["[", "]", "(", ")", "![", "](", "`", "```", "\n", "<a href=", ">", "<!--", "-->", '"', "'", "\\"]
pieces = st.lists(st.sampled_from([*PIECES, "a.md", "missing", " ", "[r]: ", "~~~", "é"]), max_size=30)


@given(pieces.map("".join))
def test_a_text_without_relative_links_stays_as_it_is(text: str) -> None:
    asked: list[str] = []
    made = relocate(text, lambda path, is_shown: asked.append(path))
    assert made == text or asked


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "]",
        "](",
        "](a",
        "](<",
        "![",
        "`",
        "` `` ",
        "<a ",
        "<a href=",
        "<!--",
        "[a]: b\n",
        "[a](a 'x",
        "\\",
        "```\n",
    ],
)
def test_a_hostile_text_is_read_once(piece: str) -> None:
    """A scan that begins anew at every piece would take minutes for this."""
    text = "[lost]: no\n\n" + piece * (200_000 // len(piece))
    assert len(relocate(text, find)) <= len(text)
