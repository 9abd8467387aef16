"""Chains of deltas: the rebuilt target of each delta is the base of the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeAlias

from ..errors import BaseMismatchError, DeltaError
from ..manifest import FileRecord, Manifest
from ..signing import SignatureRequirement
from ..storage import Readable, Source, open_source
from ..words import counted
from ..workers import ProgressCallback
from .opening import open_base, read_manifest, require_whole
from .pointer import MAX_DELTAS, has_pointer, pointed
from .rebuilt import RebuiltSource
from .signed import require_signatures
from .target_recipe import TargetRecipe

#: One delta, or several, oldest first.
Deltas: TypeAlias = "Readable | Sequence[Readable]"


def open_recipe(
    deltas: Deltas,
    base: Readable | None = None,
    *,
    require_signature: SignatureRequirement | None = None,
    into_memory: bool = False,
    progress: ProgressCallback | None = None,
) -> TargetRecipe:
    """Open a delta, or a chain of several, and its base.

    Args:
        deltas: a folder, a Hub id, a URL or an open source; or several, oldest first, each made from the
            target of the one before; or a pointer folder, here or in a store, which names deltas and base.
        base: the (first) delta's base: a folder, a file, a Hub id or an open source; if None, the repository
            that the manifest names, at its commit.
        require_signature: who must have signed each of them; None: nobody.
        into_memory: the target will stay in memory, so that signed files are compared before they are used.
        progress: called with a phase ("check signed", if a signature is required), bytes done and total
            bytes.

    Returns:
        The recipe for the last delta's target. Closing it closes all its sources.

    Raises:
        BaseMismatchError: a delta does not follow the one before it, or ``base`` is the wrong one.
        SignatureError: a delta is not signed as required; the base was not looked for yet.
        DeltaError: a delta is incomplete or damaged, or there are too many.
        CheckpointError: the base cannot be found or read.
    """
    with ExitStack() as on_error:
        sources = [on_error.enter_context(open_source(delta)) for delta in listed(deltas)]
        if len(sources) == 1 and has_pointer(sources[0]):
            with sources[0] as pointer:
                sources, named = pointed(pointer)
            for source in sources:
                on_error.enter_context(source)
            base = named if base is None else base
        manifests = [read_manifest(source) for source in sources]
        for source, manifest in zip(sources, manifests, strict=True):
            require_whole(source, manifest)
        check_continuity(sources, manifests)
        if require_signature is not None:
            sources = require_signatures(
                sources, manifests, require_signature, into_memory=into_memory, progress=progress
            )
            for source in sources:
                on_error.callback(source.close)
        recipe = connect(sources, manifests, base)
        on_error.pop_all()
        return recipe


def listed(deltas: Deltas) -> list[Readable]:
    """The deltas as a list, also if there is only one."""
    return [deltas] if isinstance(deltas, (str, os.PathLike, Source)) else list(deltas)


def connect(sources: Sequence[Source], manifests: Sequence[Manifest], base: Readable | None) -> TargetRecipe:
    """:func:`open_recipe` for open deltas that passed :func:`check_continuity`."""
    with ExitStack() as on_error:
        for source, manifest in zip(sources, manifests, strict=True):
            opened = open_base(manifest, base)
            if opened:
                on_error.enter_context(opened)
            target = TargetRecipe(source, manifest, opened)
            base = RebuiltSource(target)
        on_error.pop_all()
        return target


def links(target: TargetRecipe) -> list[TargetRecipe]:
    """The recipes in the chain of ``target``, from the first delta's to its own."""
    found = [target]
    while found[0].base and isinstance(found[0].base.source, RebuiltSource):
        found.insert(0, found[0].base.source.target)
    return found


def check_continuity(sources: Sequence[Source], manifests: Sequence[Manifest]) -> None:
    """Check that each delta was made from the target of the one before.

    Raises:
        BaseMismatchError: one was not.
        DeltaError: there is none, or there are more than :data:`MAX_DELTAS`.
    """
    if not 1 <= len(sources) <= MAX_DELTAS:
        raise DeltaError(
            f"{len(sources)} deltas cannot be read as one chain",
            f"A chain has between 1 and {MAX_DELTAS}.",
            "Merge some of them first: deltaweights compact",
        )
    for k in range(1, len(sources)):
        _check_follows(sources[k - 1], manifests[k - 1], sources[k], manifests[k])


def files_of_base(manifest: Manifest) -> list[FileRecord]:
    """The files of the base that the target can depend on: its shards, and what is taken from it whole."""
    taken = {file.source for file in manifest.target.files if file.stored == "base"}
    return [one for one in manifest.base.files if one.path.endswith(".safetensors") or one.path in taken]


def _check_follows(earlier: Source, made: Manifest, later: Source, manifest: Manifest) -> None:
    """Raise :class:`BaseMismatchError` unless the base of one delta is the target of the one before, by the
    SHA-256 of every shard and every file taken from it."""
    there = {file.path: file.sha256 for file in made.target.files}
    asked = {file.path: file.sha256 for file in files_of_base(manifest)}
    wrong = sorted(path for path, sha256 in asked.items() if there.get(path) != sha256)
    if not wrong:
        return
    path = wrong[0]
    found = f"one with {there[path]}" if path in there else "no such file"
    more = f" ({counted(len(wrong) - 1, 'more file')} missing or different)" if wrong[1:] else ""
    raise BaseMismatchError(
        f"{later.where} does not follow {earlier.where}",
        f"It needs {path!r} with SHA-256 {asked[path]}; the delta before it makes {found}{more}.",
        "Name all deltas of the chain, oldest first.",
    )
