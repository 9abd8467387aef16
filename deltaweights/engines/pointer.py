"""Pointer folders: what an engine needs of a fine-tune besides its weights, and where those come from.

An engine wants config and tokenizer in a folder before any weights are read. A pointer folder has them, and
a small document instead of the shards that names delta and base.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from .. import canonical
from ..checkpoint import is_weights
from ..delta.chain import MAX_DELTAS, Deltas, links, open_recipe
from ..delta.target import Target
from ..delta.target_recipe import TargetRecipe
from ..errors import CheckpointError, DeltaError, OutputError
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Sha256
from ..patch import check_apart, check_base, check_licenses, license_places, write_file, write_licenses
from ..storage import (
    Location,
    OutputFolder,
    Readable,
    Source,
    local_path,
    open_source,
    output_path,
    sha256_of,
)
from ..workers import Meter, ProgressCallback, Workers

#: The file that makes a folder a pointer folder.
POINTER_NAME = "deltaweights-pointer.json"

#: A hundred deltas with the longest of paths.
_MAX_POINTER_BYTES = 1 << 20
_FORMAT = canonical.Format("deltaweights-pointer", 1, f"The {POINTER_NAME}", _MAX_POINTER_BYTES)

_Path: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*\Z", max_length=4096)]
_Repo: TypeAlias = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?\Z", max_length=256)
]
_Commit: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^\w[\w./-]*\Z", max_length=256)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a delta or a base lies: a path of this machine, or a repository on the Hub at a commit."""

    path: _Path | None = None
    repo_id: _Repo | None = None
    revision: _Commit | None = None

    def location(self) -> str:
        """As every verb takes it."""
        if self.path is not None:
            return self.path
        return f"hf://{self.repo_id}@{self.revision}"


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


@dataclass(frozen=True, slots=True)
class ServeReport:
    """The result of :func:`serve_folder`.

    Attributes:
        out: the folder.
        files: the paths of the target's files that were written, sorted.
        nbytes: their size.
        deltas: where the deltas lie, oldest first.
        base: where the base lies; None: as the (first) delta says.
    """

    out: str
    files: tuple[str, ...]
    nbytes: int
    deltas: tuple[str, ...]
    base: str | None


def serve_folder(
    delta: Deltas,
    out: Location,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ServeReport:
    """Write a folder from which an engine serves the target without its weights on disk.

    It gets the target's config, tokenizer and all its other files that are not weights, each with the SHA-256
    that the manifest has, the license texts, and a document that names delta and base: paths as absolute
    ones, repositories at the commit found now. Engines decode the weights from there.

    Args:
        delta: a folder or a Hub id; or several, oldest first, each made from the target of the one before.
        out: the folder to write; new, empty, or written by this before.
        base: a folder, a file or a Hub id; if None, the repository that the (first) manifest names, at its
            commit.
        keep_base: download the needed files of a base on the Hub into the local Hub cache, for engines that
            start often or have several ranks.
        force: write even if ``out`` holds other files. They stay, unless the target has a file of the same
            name.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase, bytes done and total bytes.

    Raises:
        CheckpointError: base or delta cannot be found, read or downloaded.
        BaseMismatchError: the base is the wrong one; nothing was written.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` holds other files, or cannot be written to.
    """
    root = output_path(out)
    with open_recipe(delta, base) as target, Workers(threads) as workers:
        workers.at_stop(target.cancel)
        pointer = _pointer_to(target, named_base=base is not None)
        check_apart(root, target)
        check_licenses(target)
        check_base(target, workers, keep=keep_base, progress=progress)
        files = [file for file in target.manifest.target.files if _is_wanted(file.path, file.stored)]
        paths = [file.path for file in files]
        nbytes = sum(file.size for file in files)
        meter = Meter(progress, "write", nbytes)
        with OutputFolder(root) as folder:
            folder.require_distinct([*paths, POINTER_NAME, *(place for *_, place in license_places(target))])
            folder.require_apart([*paths, POINTER_NAME], target.sources)
            others = folder.foreign([*paths, POINTER_NAME])
            if others and not force:
                raise OutputError(
                    f"{folder.root} holds other files",
                    f"{others[0]!r} is not the target's, or is weights of it.",
                    "Choose a new folder, or pass force=True to write there; files of other names stay.",
                )
            folder.require_space(nbytes)
            for file in files:
                write_file(target, file, folder, workers, meter)
            write_licenses(target, folder)
            with folder.create(POINTER_NAME) as output:  # last: it makes the folder one to serve from
                output.write_blocks([canonical.encode(pointer)])
                output.commit()
    origins = tuple(one.origin.location() for one in pointer.deltas)
    where = pointer.base.location() if pointer.base else None
    return ServeReport(str(root), tuple(sorted(paths)), nbytes, origins, where)


def _is_wanted(path: str, stored: str) -> bool:
    """Whether a file of the target is none of its weights, in any format, nor an index of them."""
    return stored != "tensors" and not path.endswith(".index.json") and not is_weights(path)


def _pointer_to(target: TargetRecipe, *, named_base: bool) -> Pointer:
    chain = links(target)
    deltas = tuple(
        PointedDelta(_origin_of(link.source), sha256_of(link.source.blocks(MANIFEST_NAME))) for link in chain
    )
    first = chain[0].base
    return Pointer(deltas, _origin_of(first.source) if first and named_base else None)


def _origin_of(source: Source) -> Origin:
    if source.root is not None:
        return Origin(path=_utf8(os.path.abspath(source.root)))
    if source.hub_id.repo_id is None or source.hub_id.revision is None:
        raise OutputError(
            f"{source.where} has no place that could be named",
            "A pointer folder names a folder or a repository, which an engine opens later.",
            "Pass a path or a Hub id.",
        )
    return Origin(repo_id=source.hub_id.repo_id, revision=source.hub_id.revision)


def _utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{path!r} cannot be named", "It is not valid UTF-8.", "Rename it.") from error
    return path


def is_pointer_folder(folder: Location) -> bool:
    """Whether :func:`serve_folder` wrote the folder."""
    return (Path(folder) / POINTER_NAME).is_file()


def read_pointer(folder: Location, *, base: Readable | None = None) -> Target:
    """Open the target that a pointer folder stands for.

    Args:
        folder: what :func:`serve_folder` wrote.
        base: where the base lies now, if it is not where the folder says.

    Raises:
        CheckpointError: the folder is no pointer folder, or what it names cannot be found or read.
        DeltaError: its document is damaged, or the delta is another one by now, incomplete or damaged.
        BaseMismatchError: the base's tensors differ in name, dtype or shape from those that the delta needs.
    """
    return Target(open_pointed(folder, base=base))


def open_pointed(folder: Location, *, base: Readable | None = None) -> TargetRecipe:
    """:func:`read_pointer`, as the recipe that the rest of the package works with."""
    pointer = _read(local_path(folder))
    with ExitStack() as on_error:
        sources = [on_error.enter_context(open_source(one.origin.location())) for one in pointer.deltas]
        for one, source in zip(pointer.deltas, sources, strict=True):
            _check_manifest(one, source, folder)
        if base is None and pointer.base is not None:
            base = pointer.base.location()
        recipe = open_recipe(sources, base)
        on_error.pop_all()
        return recipe


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
