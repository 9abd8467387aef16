"""Pointer folders, written: what an engine needs of a fine-tune besides its weights."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from .. import canonical
from ..checkpoint import is_weights
from ..delta.chain import Deltas, links, open_recipe
from ..delta.pointer import (
    POINTER_NAME,
    Origin,
    PointedDelta,
    Pointer,
    is_nameable,
    is_pointer_folder,
    pointed,
)
from ..delta.target import Target
from ..delta.target_recipe import TargetRecipe
from ..errors import OutputError
from ..patch import check_apart, check_base, check_licenses, license_places, write_file, write_licenses
from ..signing import SignatureRequirement, manifest_sha256
from ..storage import (
    Location,
    Readable,
    Source,
    open_output,
    open_source,
)
from ..workers import Meter, ProgressCallback, Workers


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
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ServeReport:
    """Write a folder from which an engine serves the target without its weights on disk.

    It gets the target's config, tokenizer and all its other files that are not weights, each with the SHA-256
    that the manifest has, the license texts, and a document that names delta and base: paths as absolute
    ones, repositories at the commit found now, stores by URL. Engines decode the weights from there.

    Args:
        delta: a folder or a Hub id; or several, oldest first, each made from the target of the one before.
        out: the folder to write, or the URL of a place in a store, from which each machine copies it; new,
            empty, or written by this before.
        base: a folder, a file or a Hub id; if None, the repository that the (first) manifest names, at its
            commit.
        keep_base: download the needed files of a base on the Hub into the local Hub cache, for engines that
            start often or have several ranks.
        force: write even if ``out`` holds other files. They stay, unless the target has a file of the same
            name.
        require_signature: who must have signed the delta, as for :func:`deltaweights.apply_delta`. The folder
            has the SHA-256 of its manifest, so that engines take the signed one and no other.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase, bytes done and total bytes.

    Raises:
        CheckpointError: base or delta cannot be found, read or downloaded.
        BaseMismatchError: the base is the wrong one; nothing was written.
        SignatureError: the delta is not signed as required; nothing was written.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` holds other files, or cannot be written to.
    """
    folder = open_output(out)
    opened = open_recipe(delta, base, require_signature=require_signature, progress=progress)
    with opened as target, Workers(threads) as workers:
        workers.at_stop(target.cancel)
        workers.at_stop(folder.cancel)
        pointer = _pointer_to(target, named_base=base is not None or is_pointer_folder(delta))
        check_apart(folder, target)
        check_licenses(target)
        check_base(target, workers, keep=keep_base, progress=progress)
        files = [file for file in target.manifest.target.files if _is_wanted(file.path, file.stored)]
        paths = [file.path for file in files]
        nbytes = sum(file.size for file in files)
        meter = Meter(progress, "write", nbytes)
        with folder:
            folder.require_distinct([*paths, POINTER_NAME, *(place for *_, place in license_places(target))])
            folder.require_apart([*paths, POINTER_NAME], target.sources)
            others = folder.foreign([*paths, POINTER_NAME])
            if others and not force:
                raise OutputError(
                    f"{folder.where} holds other files",
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
    return ServeReport(folder.where, tuple(sorted(paths)), nbytes, origins, where)


def _is_wanted(path: str, stored: str) -> bool:
    """Whether a file of the target is none of its weights, in any format, nor an index of them."""
    return stored != "tensors" and not path.endswith(".index.json") and not is_weights(path)


def _pointer_to(target: TargetRecipe, *, named_base: bool) -> Pointer:
    chain = links(target)
    deltas = tuple(PointedDelta(_origin_of(link.source), manifest_sha256(link.manifest)) for link in chain)
    first = chain[0].base
    return Pointer(deltas, _origin_of(first.source) if first and named_base else None)


def _origin_of(source: Source) -> Origin:
    if source.root is not None:
        return Origin(path=_utf8(os.path.abspath(source.root)))
    if is_nameable(source.location):
        return Origin(path=_utf8(source.location))
    if source.hub_id.repo_id is None or source.hub_id.revision is None:
        raise OutputError(
            f"{source.where} has no place that could be named",
            "A pointer folder names what an engine opens later: a folder, a repository, or a store's URL "
            "without secrets in it.",
            "Pass such a place.",
        )
    return Origin(repo_id=source.hub_id.repo_id, revision=source.hub_id.revision)


def _utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{path!r} cannot be named", "It is not valid UTF-8.", "Rename it.") from error
    return path


def read_pointer(folder: Location, *, base: Readable | None = None) -> Target:
    """Open the target that a pointer folder stands for.

    Args:
        folder: what :func:`serve_folder` wrote, here or in a store.
        base: where the base lies now, if it is not where the folder says.

    Raises:
        CheckpointError: the folder is no pointer folder, or what it names cannot be found or read.
        DeltaError: its document is damaged, or the delta is another one by now, incomplete or damaged.
        BaseMismatchError: the base's tensors differ in name, dtype or shape from those that the delta needs.
    """
    return Target(open_pointed(folder, base=base))


def open_pointed(
    folder: Location,
    *,
    base: Readable | None = None,
    require_signature: SignatureRequirement | None = None,
) -> TargetRecipe:
    """:func:`read_pointer`, as the recipe that the rest of the package works with; of signed deltas only, if
    ``require_signature`` is given, as for :func:`deltaweights.open_target`."""
    with ExitStack() as on_error:
        with open_source(folder) as opened:
            sources, named = pointed(opened)
        for source in sources:
            on_error.enter_context(source)
        recipe = open_recipe(
            sources,
            named if base is None else base,
            require_signature=require_signature,
            into_memory=True,
        )
        on_error.pop_all()
        return recipe
