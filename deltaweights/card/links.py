"""Links and images of a Markdown text, led to where its files are now."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from typing import TypeAlias
from urllib.parse import quote, unquote

#: The new place of a file of the text's repository, or None; and whether it is shown, or only linked to.
Finder: TypeAlias = Callable[[str, bool], "str | None"]

_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})(?P<info>[^\n]*)")
_DEFINITION = re.compile(
    r" {0,3}\[(?P<label>[^\[\]^][^\[\]]{0,200})\]:[ \t]*(?P<link><[^<>\n]*>|\S+)"
    r"(?P<rest>([ \t]+(\"[^\"]*\"|'[^']*'|\([^()]*\)))?\s*)"
)
_TOKEN = re.compile(r"\\.|`+|<!--|<[A-Za-z][^<>]*>|!?\[|\]", re.DOTALL)
#: What follows the ``]`` of a link.
_INLINE = re.compile(
    r"\(\s*(?P<link><[^<>\n]{0,2000}>|(?:[^\s()<>]|\([^\s()<>]{0,500}\)){0,2000})"
    r"(?P<title>\s+(?:\"[^\"]{0,500}\"|'[^']{0,500}'|\([^()]{0,500}\)))?\s*\)"
)
_LABEL = re.compile(r"\[(?P<label>[^\[\]]{0,200})\](?!\()")
_ATTRIBUTE = re.compile(
    r"(?P<name>\s(?:src|href|poster|srcset))\s*=\s*(?P<value>\"[^\"]*\"|'[^']*'|[^\s>\"']+)", re.IGNORECASE
)
_ALT = re.compile(r"\salt\s*=\s*(?:\"([^\"]*)\"|'([^']*)')", re.IGNORECASE)
_IMAGE = re.compile(r"\.(png|jpe?g|gif|svg|webp|avif|bmp|mp4|webm|mp3|wav)", re.IGNORECASE)

_IN_A_QUERY = "/:@?#=&;%+,!*$~"


def relocated(link: str, find: Finder, is_shown: bool = False) -> str | None:
    """A link's new destination: the same for one that is not relative, None for one that leads nowhere."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|[/#?]|$", link):
        return link
    path, mark, rest = re.fullmatch(r"([^?#]*)([?#]?)(.*)", link, re.DOTALL).groups()  # type: ignore[union-attr]
    path = posixpath.normpath(unquote(path))
    if path.startswith(".") and path.partition("/")[0] in (".", ".."):
        return None
    is_shown = is_shown or bool(_IMAGE.fullmatch(posixpath.splitext(path)[1]))
    found = find(path, is_shown)
    return None if found is None else quote(found, safe="/:@") + mark + quote(rest, safe=_IN_A_QUERY)


def relocate(text: str, find: Finder) -> str:
    """``text`` with every relative link and image led to what ``find`` gives; where that is None, only the
    link's text or the image's description stays. Code and comments stay as they are."""
    blocks = list(_blocks(text))
    lost = {
        _key(found["label"])
        for block, is_code in blocks
        if not is_code
        for line in block.splitlines()
        if (found := _DEFINITION.fullmatch(line)) and relocated(found["link"].strip("<>"), find) is None
    }
    return "".join(block if is_code else _Inline(block, find, lost).run() for block, is_code in blocks)


def _key(label: str) -> str:
    return " ".join(label.split()).casefold()


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts, and whether each is a fenced block of code. Definitions of links stand alone."""
    part: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence:
            part.append(line)
            if mark and mark["marks"].startswith(fence) and not mark["info"].strip():
                yield "".join(part), True
                part, fence = [], ""
        elif mark and not (mark["marks"][0] == "`" and "`" in mark["info"]):
            yield "".join(part), False
            part, fence = [line], mark["marks"]
        elif _DEFINITION.fullmatch(line):
            yield "".join(part), False
            yield line, False
            part = []
        else:
            part.append(line)
    yield "".join(part), bool(fence)


class _Inline:
    """One pass over a part of a text that is no block of code."""

    def __init__(self, text: str, find: Finder, lost: set[str]) -> None:
        self._text = text
        self._find = find
        self._lost = lost
        self._out: list[str] = []
        self._openers: list[int] = []  # where in the output the brackets are that are still open
        self._unclosed = set[str]()  # runs of backticks that have no second one

    def run(self) -> str:
        """The text, relocated."""
        if definition := _DEFINITION.fullmatch(self._text):
            found = relocated(definition["link"].strip("<>"), self._find)
            return f"[{definition['label']}]: {found}{definition['rest']}" if found is not None else ""
        position = 0
        while token := _TOKEN.search(self._text, position):
            self._out.append(self._text[position : token.start()])
            position = self._take(token[0], token.end())
        return "".join([*self._out, self._text[position:]])

    def _take(self, found: str, end: int) -> int:
        """Write a found, and what belongs to it. Returns the position behind that."""
        if found[0] == "`":
            return self._code(found, end)
        if found == "<!--":
            stop = self._text.find("-->", end)
            return self._copy(found, end, len(self._text) if stop < 0 else stop)
        if found == "]" and self._openers:
            return self._close(self._openers.pop(), end)
        if found in ("[", "!["):
            self._openers.append(len(self._out))
        self._out.append(self._tag(found) if found[0] == "<" else found)
        return end

    def _copy(self, token: str, start: int, end: int) -> int:
        self._out += [token, self._text[start:end]]
        return end

    def _code(self, ticks: str, end: int) -> int:
        if ticks not in self._unclosed:
            close = re.compile(rf"(?<!`){ticks}(?!`)").search(self._text, end)
            if close:
                return self._copy(ticks, end, close.end())
            self._unclosed.add(ticks)
        return self._copy(ticks, end, end)

    def _close(self, opener: int, end: int) -> int:
        """The end of a link or an image, or of brackets that are neither."""
        if inline := _INLINE.match(self._text, end):
            link = inline["link"].strip("<>")
            found = relocated(link, self._find, self._out[opener] == "![")
            if found == link:
                return self._copy("]", end, inline.end())
            self._end(opener, None if found is None else f"]({found}{inline['title'] or ''})")
            return inline.end()
        label = _LABEL.match(self._text, end)
        inner = self._out[opener + 1 : opener + 50] if self._lost else []
        named = (label and label["label"]) or "".join(inner)
        if _key(named) in self._lost:
            self._end(opener, None)
            return label.end() if label else end
        return self._copy("]", end, label.end() if label else end)

    def _end(self, opener: int, link: str | None) -> None:
        if link is None:
            self._out[opener] = ""
        self._out.append(link or "")

    def _tag(self, tag: str) -> str:
        """An HTML tag with its links relocated; the description in place of an image that is not there."""
        is_lost = False

        def attribute(match: re.Match[str]) -> str:
            nonlocal is_lost
            value = match["value"].strip("\"'").strip()
            if re.search(r"[\s,]", value) and match["name"].strip().casefold() == "srcset":
                return match[0] if "://" in value else ""
            found = relocated(value, self._find, match["name"].strip().casefold() != "href")
            is_lost = is_lost or found is None
            if found == value:
                return match[0]
            return "" if found is None else f'{match["name"]}="{found}"'

        made = _ATTRIBUTE.sub(attribute, tag)
        if is_lost and re.match(r"<(img|source)\b", tag, re.IGNORECASE):
            alt = _ALT.search(tag)
            return (alt[1] or alt[2] or "") if alt else ""
        return made
