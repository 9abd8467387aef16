"""Lines that fit the terminal: tables, long names, long sentences. Nothing here prints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO
from unicodedata import category, east_asian_width

#: Two columns are this far apart.
_GAP = 2

#: No column of names becomes narrower than this.
_LEAST = 12

#: What begins a line whose further lines are indented as much: an item of a list, or a heading and its fact.
_HANGING = re.compile(r" *- |\S[^:]{0,13}\S {2,}|\S+: (?=\S)")


@dataclass(frozen=True, slots=True)
class Screen:
    """What a text is shown on.

    Attributes:
        width: its columns; None for a pipe or a file, where every name stays whole.
        ellipsis: stands for what was left out of a name.
    """

    width: int | None = None
    ellipsis: str = "…"


def screen_of(stream: IO[str]) -> Screen:
    """The terminal behind the stream, if it is one."""
    if not stream.isatty():
        return Screen()
    try:
        columns = int(os.environ.get("COLUMNS", "")) or 0
    except ValueError:
        columns = 0
    try:
        columns = columns or os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    encoding = (getattr(stream, "encoding", None) or "ascii").lower()
    return Screen(columns or 80, "…" if encoding.startswith("utf") else "...")


def cells(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int, ellipsis: str = "…") -> str:
    """The text in at most ``width`` columns: the middle of a long one is left out, since names differ most at
    both ends."""
    if cells(text) <= width:
        return text
    room = max(0, width - len(ellipsis))
    head = _fitting(text, room // 2)
    tail = _fitting(text[::-1], room - room // 2)[::-1]
    return f"{head}{ellipsis}{tail}"


def _fitting(text: str, width: int) -> str:
    """As much of the text's start as fits."""
    for count, character in enumerate(text):
        width -= _cells_of(character)
        if width < 0:
            return text[:count]
    return text


def fold(line: str, width: int | None) -> Iterator[str]:
    """The line, or several where it is longer than ``width``: cut between words, the further ones indented.

    What stands in backquotes is a command to be copied, and stays in one line, as does a long path.
    """
    if width is None or cells(line) <= width:
        yield line
        return
    start = _HANGING.match(line)
    lead = line[: len(line) - len(line.lstrip())]
    indent = " " * min(len(start[0]) if start and start[0][-2:] != ": " else len(lead) + 2, width // 2)
    here = ""
    for word in re.findall(r"\s*(?:`[^`]*`\S*|\S+)", line):
        if here.strip() and cells(here) + cells(word) > width:
            yield here
            here = indent + word.lstrip()
        else:
            here += word
    yield here


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    screen: Screen,
    *,
    right: Iterable[str] = (),
    names: Iterable[str] = (),
    whole: bool = False,
) -> Iterator[str]:
    """Rows below headings, in columns, indented by one. A column with nothing in it is left out.

    Args:
        right: headings of columns of numbers.
        names: headings of columns that may be shortened where the screen is too narrow.
        whole: say in a line of its own what had to be shortened: the first column's text above the row, any
            other below it.
    """
    right, names = set(right), set(names)
    used = [k for k, column in enumerate(zip(headings, *rows, strict=True)) if any(column)]
    headings, rows = [headings[k] for k in used], [[row[k] for k in used] for row in rows]
    widths = [max(map(cells, column)) for column in zip(headings, *rows, strict=True)]
    room = None if screen.width is None else screen.width - 1 - _GAP * (len(widths) - 1)
    if room is not None:
        _narrow(widths, [k for k, heading in enumerate(headings) if heading in names], room)
    for first, *others in (headings, *rows):
        is_cut = whole and cells(first) > widths[0]
        if is_cut:
            yield f" {first}"
        shown = [
            shorten(text, width, screen.ellipsis)
            for text, width in zip(("" if is_cut else first, *others), widths, strict=True)
        ]
        padded = (
            " " * (width - cells(text)) + text if name in right else text + " " * (width - cells(text))
            for name, text, width in zip(headings, shown, widths, strict=True)
        )
        yield f" {(' ' * _GAP).join(padded)}".rstrip()
        if whole:
            yield from (f"   {text}" for text, short in zip(others, shown[1:], strict=True) if text != short)


def _narrow(widths: list[int], columns: Sequence[int], room: int) -> None:
    """Take from the widest of the ``columns`` until all fit, or none can give more."""
    while (surplus := sum(widths) - room) > 0:
        widest = max(columns, key=lambda k: widths[k])
        rest = max((widths[k] for k in columns if k != widest), default=_LEAST)
        new = max(_LEAST, min(widths[widest] - 1, max(widths[widest] - surplus, rest)))
        if new >= widths[widest]:
            return
        widths[widest] = new
