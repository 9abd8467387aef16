"""Names that a file system takes for one: many take no notice of upper and lower case, or of how accents are
encoded. Which ones do, and how far they go, only they can tell: so they are asked."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from .system import is_same

_RESERVED = {".git", ".deltaweights"}  # names that no file of a checkpoint may have


def spelling(path: str) -> str:
    """The path without all that one file system or another overlooks: case, accents, characters of no width,
    dots and spaces at the end of a name. Paths that are one file somewhere have one spelling."""
    if path.isascii():
        path = path.casefold()
    else:
        decomposed = unicodedata.normalize("NFD", path).upper().casefold()
        path = "".join(one for one in decomposed if unicodedata.category(one)[0] not in "MC")
    return "/".join(name.rstrip(". ") for name in path.split("/"))


def alike(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The names among the paths' that some file system could take for one, or for a reserved one, and the
    folder that they are in (with a slash)."""
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
    """Two of the names, in their order, that stand for one file in the empty ``folder``; None if there are no
    such two. To find out, files of these names are made there, and stay."""
    made: list[str] = []
    for name in names:
        try:
            os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return next(other for other in made if is_same(folder / other, folder / name)), name
        made.append(name)
    return None
