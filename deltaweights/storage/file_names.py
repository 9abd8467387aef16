"""Finds names that a file system takes for the same file: many ignore case, or the encoding of accents. File
systems differ in this, so the only sure way is to try."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from .system import is_same

_RESERVED = {".git", ".deltaweights"}  # names that no file of a checkpoint may have


def spelling(path: str) -> str:
    """The path without everything that some file system ignores: case, accents, zero-width characters, dots
    and spaces at the end of a name. Paths that are the same file on some system have the same spelling."""
    if path.isascii():
        path = path.casefold()
    else:
        decomposed = unicodedata.normalize("NFD", path).upper().casefold()
        path = "".join(one for one in decomposed if unicodedata.category(one)[0] not in "MC")
    return "/".join(name.rstrip(". ") for name in path.split("/"))


def alike(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Groups of names in the paths that some file system could take for the same file, or for a reserved
    name, each with their folder (with a slash)."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        parent = ""
        for name in path.split("/"):
            found.setdefault((parent, spelling(name)), set()).add(name)
            parent += f"{name}/"
    for (parent, spelled), names in found.items():
        together = names | ({spelled} & _RESERVED)
        if len(together) > 1:
            yield parent, sorted(together)


def same_names(folder: Path, names: Iterable[str]) -> tuple[str, str] | None:
    """Two of the names, in their order, that are the same file in the empty ``folder``; None if all are
    different. The test creates files of these names there and leaves them."""
    made: list[str] = []
    for name in names:
        try:
            os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return next(other for other in made if is_same(folder / other, folder / name)), name
        made.append(name)
    return None
