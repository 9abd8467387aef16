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
from typing import Annotated, Literal, TypeAlias, TypeGuard

import msgspec

from .. import canonical
from ..errors import CheckpointError, DeltaError
from ..manifest import Sha256
from ..signing import manifest_sha256
from ..storage import Location, Source, open_source, store_url
from .opening import read_manifest

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
    """Whether this is the location of a pointer folder, here or in a store."""
    if not isinstance(folder, (str, os.PathLike)):
        return False
    if store_url(folder):
        with open_source(folder) as source:
            return has_pointer(source)
    return os.path.isfile(os.path.join(folder, POINTER_NAME))


def has_pointer(source: Source) -> bool:
    """Whether this is a pointer folder. A repository on the Hub is none: what others publish must not name
    places that are opened with the rights of who reads it."""
    is_ours = source.root is not None or store_url(source.location or "")
    return bool(is_ours) and POINTER_NAME in source.sizes


def pointed(folder: Source) -> tuple[list[Source], str | None]:
    """What a pointer folder names, open: its deltas, oldest first; and where the first one's base lies (None:
    where its manifest says).

    Raises:
        CheckpointError: the folder is no pointer folder, or a delta cannot be found.
        DeltaError: its document is damaged, or the delta is another one by now, or damaged.
    """
    pointer = _read(folder)
    with ExitStack() as on_error:
        sources = [on_error.enter_context(open_source(one.origin.location())) for one in pointer.deltas]
        for one, source in zip(pointer.deltas, sources, strict=True):
            _check_manifest(one, source, folder.where)
        on_error.pop_all()
    return sources, pointer.base.location() if pointer.base else None


def _check_manifest(pointed: PointedDelta, source: Source, folder: str) -> None:
    found = manifest_sha256(read_manifest(source))
    if found != pointed.manifest:
        raise DeltaError(
            f"The delta at {source.where} is not the one that {folder} was written for",
            f"Its manifest's SHA-256 is {found}, not {pointed.manifest}.",
            "Write the folder again, by serve_folder.",
        )


def _read(folder: Source) -> Pointer:
    if not has_pointer(folder):
        raise CheckpointError(
            f"{folder.where} is not a pointer folder",
            f"It has no {POINTER_NAME}.",
            "Write one by serve_folder.",
        )
    nbytes = min(folder.sizes[POINTER_NAME], _MAX_POINTER_BYTES + 1)
    return parse_pointer(folder.open(POINTER_NAME).read(0, nbytes), folder.name(POINTER_NAME))


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
