"""Pointer folders, read: what an engine opens instead of a checkpoint, and where its weights come from.

An engine wants config and tokenizer in a folder before any weights are read. A pointer folder has them, and
a small document instead of the shards that names delta and base.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeGuard

import msgspec

from .. import canonical
from ..errors import CheckpointError, DeltaError
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Sha256
from ..storage import Location, Source, open_source, sha256_of

#: Somewhat below the limit of Python's stack, since each delta adds a few calls to the reading of a chunk.
MAX_DELTAS = 100

#: The file that makes a folder a pointer folder.
POINTER_NAME = "deltaweights-pointer.json"

#: A hundred deltas with the longest of paths.
_MAX_POINTER_BYTES = 1 << 20
_FORMAT = canonical.Format("deltaweights-pointer", 1, f"The {POINTER_NAME}", _MAX_POINTER_BYTES)

#: Only stores by name, no web servers: a folder from elsewhere must not send requests to any host.
_STORE_URL = r"(s3a?://|gs://|gcs://|az://|abfss?://|memory://|hf://buckets/)[^\0?#@]+"
_Path: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^(/[^\0]*|{_STORE_URL})\Z", max_length=4096)]
_Repo: TypeAlias = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?\Z", max_length=256)
]
_Commit: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^\w[\w./-]*\Z", max_length=256)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a delta or a base lies: a path of this machine or a URL of a store, or a repository on the Hub at
    a commit."""

    path: _Path | None = None
    repo_id: _Repo | None = None
    revision: _Commit | None = None

    def location(self) -> str:
        """As every verb takes it."""
        if self.path is not None:
            return self.path
        return f"hf://{self.repo_id}@{self.revision}"


def is_nameable(url: str | None) -> TypeGuard[str]:
    """Whether a pointer folder may name this URL: one of a store, without anything that may be secret."""
    return url is not None and re.fullmatch(_STORE_URL, url) is not None


@dataclass(frozen=True, slots=True)
class PointedDelta:
    """A delta, and the SHA-256 of its manifest: the delta that was accepted is the one that is served."""

    origin: Origin
    manifest: Sha256


@dataclass(frozen=True, slots=True)
class Pointer:
    """The document of a pointer folder: deltas, oldest first, and the base of the first. Without a base, it
    is the one that the delta names, at its commit."""

    deltas: Annotated[tuple[PointedDelta, ...], msgspec.Meta(min_length=1, max_length=MAX_DELTAS)]
    base: Origin | None = None
    format: Literal["deltaweights-pointer"] = "deltaweights-pointer"
    format_version: int = _FORMAT.version


def is_pointer_folder(folder: object) -> TypeGuard[Location]:
    """Whether this is the location of a pointer folder."""
    return isinstance(folder, (str, os.PathLike)) and os.path.isfile(os.path.join(folder, POINTER_NAME))


def pointed(folder: Location) -> tuple[list[Source], str | None]:
    """What a pointer folder names, open: its deltas, oldest first; and where the first one's base lies (None:
    where its manifest says).

    Raises:
        CheckpointError: the folder is no pointer folder, or a delta cannot be found.
        DeltaError: its document is damaged, or the delta is another one by now.
    """
    pointer = _read(Path(folder))
    with ExitStack() as on_error:
        sources = [on_error.enter_context(open_source(one.origin.location())) for one in pointer.deltas]
        for one, source in zip(pointer.deltas, sources, strict=True):
            _check_manifest(one, source, folder)
        on_error.pop_all()
    return sources, pointer.base.location() if pointer.base else None


def _check_manifest(pointed: PointedDelta, source: Source, folder: Location) -> None:
    if source.sizes.get(MANIFEST_NAME, 0) > MAX_MANIFEST_BYTES:
        return  # refused when it is read
    found = sha256_of(source.blocks(MANIFEST_NAME)) if MANIFEST_NAME in source.sizes else "missing"
    if found != pointed.manifest:
        raise DeltaError(
            f"The delta at {source.where} is not the one that {folder} was written for",
            f"Its manifest's SHA-256 is {found}, not {pointed.manifest}.",
            "Write the folder again, by serve_folder.",
        )


def _read(folder: Path) -> Pointer:
    path = folder / POINTER_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_POINTER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a pointer folder",
            f"{POINTER_NAME} cannot be read: {error.strerror}.",
            "Write one by serve_folder.",
        ) from error
    return parse_pointer(data, str(path))


def parse_pointer(data: bytes, where: str) -> Pointer:
    """The document of a pointer folder.

    Args:
        where: its name in messages.

    Raises:
        DeltaError: it is damaged.
        FormatVersionError: its format version is another one.
    """
    damaged = partial(_damaged, where)
    pointer = canonical.decode(data, Pointer, _FORMAT, damaged)
    for origin in (pointer.base, *(one.origin for one in pointer.deltas)):
        if origin is not None and not _is_one_place(origin):
            raise damaged("It names something that is neither a path nor a repository at a commit")
    return pointer


def _is_one_place(origin: Origin) -> bool:
    on_hub: Iterable[object] = (origin.repo_id, origin.revision)
    return all(on_hub) if origin.path is None else not any(on_hub)


def _damaged(path: str, why: str) -> DeltaError:
    return DeltaError(f"{path} is damaged", f"{why}.", "Write the folder again, by serve_folder.")
