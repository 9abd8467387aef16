"""Merges a chain of deltas into one, by a diff whose target is never written to disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .checkpoint import Base, Checkpoint, Gathered, Group, HeldExtents, Tensor
from .codec import Effort
from .delta.chain import links, open_recipe
from .delta.rebuilt import RebuiltSource
from .delta.target_recipe import TargetRecipe
from .diff import check_chunk_bytes, check_place, write_delta
from .errors import CheckpointError
from .executors import Executor
from .inputs import CheckpointFacts
from .license import cards
from .license.rules import text_records
from .manifest import BaseRecord, Manifest, TargetRecord
from .match.names import Match, find_named, match_pair
from .metrics import timed_operation
from .patch import check_base, check_licenses
from .payload import CHUNK_BYTES
from .signing import SignatureRequirement
from .storage import Location, Readable, open_output
from .workers import ProgressCallback, Workers

_log = logging.getLogger(__name__)


@timed_operation("compact")
def compact_deltas(
    deltas: Sequence[Location],
    delta: Location,
    *,
    base: Readable | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    effort: Effort = "default",
    force: bool = False,
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write one delta, from the first one's base to the last one's target, to the folder ``delta``.

    Each chunk is decoded through the whole chain and coded against the base. No target is written to disk,
    and memory does not grow with their sizes.

    Args:
        deltas: folders or Hub ids, in the order in which they were made.
        delta: the folder to write, or the URL of a place in a store; new or empty, or an interrupted run's.
        base: the first delta's base; if None, the repository that its manifest names, at its commit.
        chunk_bytes, effort, force, threads, executor: as for :func:`make_delta`.
        require_signature: who must have signed each of the deltas, as for :func:`apply_delta`. The new one is
            not signed.
        progress: called with a phase, bytes done and total bytes: "check base" and "diff".

    Returns:
        The manifest that was written. It takes the base from the first manifest and the target from the last
        one, with Hub ids, commits, licenses and license texts.

    Raises:
        BaseMismatchError: a delta does not follow the one before it, or ``base`` is the wrong one.
        CheckpointError: the base cannot be found, read or downloaded.
        SignatureError: a delta is not signed as required.
        DeltaError: a delta is incomplete or damaged.
        OutputError: the folder cannot be used, or its disk is full.
        ValueError: ``chunk_bytes`` is out of range.
    """
    check_chunk_bytes(chunk_bytes)
    open_output(delta)
    with open_recipe(
        deltas, base, require_signature=require_signature, into_memory=True, progress=progress
    ) as target:
        first = links(target)[0]
        old = first.base
        if old is None:
            raise CheckpointError(
                "The base is needed",
                "The first delta needs none, but the new delta is made from it.",
                "Pass it: base=PATH or base=ORG/NAME",
            )
        new = Checkpoint(RebuiltSource(target))
        check_place(delta, old, new)
        check_licenses(target)
        _log.info("compacting %s", ", ".join(link.source.where for link in links(target)))
        with Workers(threads) as workers:
            try:
                check_base(target, workers, progress=progress)
            except BaseException:
                target.cancel()  # not otherwise: it is read on
                raise
        return write_delta(
            old,
            new,
            delta,
            _trace(target, old, new),
            _side("base", first.manifest.base, first, old),
            _side("target", target.manifest.target, target, new),
            glance=lambda tensor: _checksums(target, tensor),
            chunk_bytes=chunk_bytes,
            effort=effort,
            force=force,
            threads=threads,
            executor=executor,
            progress=progress,
        )


def _side(
    side: Literal["base", "target"],
    record: BaseRecord | TargetRecord,
    link: TargetRecipe,
    checkpoint: Checkpoint,
) -> CheckpointFacts:
    """The facts about one side in the manifest of ``link``, license texts included."""
    wanted = {file.path for file in record.license.files}
    texts = {
        file.path: b"".join(link.source.blocks(file.path))
        for file in text_records(link.manifest)
        if file.path in wanted
    }
    license = cards.recall_license(checkpoint, side, record.license, texts)
    files = record.files if isinstance(record, BaseRecord) else ()
    return CheckpointFacts(record.repo_id, record.revision, license, files)


def _trace(target: TargetRecipe, old: Checkpoint, new: Checkpoint) -> list[Match]:
    """The base tensor of every target tensor: the one that the deltas lead to, whatever its name, or else one
    of the same name."""
    views = links(target)
    traced = []
    held = HeldExtents()
    for tensor in new.tensors:
        base: Base | None = tensor
        for view in reversed(views):
            base = _traced(view, base, held) if base else None
        traced.append(match_pair(tensor, base or find_named(old, tensor.name, tensor)))
    return traced


def _traced(view: TargetRecipe, base: Base, held: HeldExtents) -> Base | None:
    """What a tensor of a delta's target, or parts of several, are made from in the delta's base; None where
    nothing says so."""
    if isinstance(base, Tensor):
        return view.base_of(base.path, base.name)
    found = {tensor: view.base_of(tensor.path, tensor.name) for tensor in base.tensors}
    whole = {
        tensor: other
        for tensor, other in found.items()
        if isinstance(other, Tensor) and (other.dtype, other.nbytes) == (tensor.dtype, tensor.nbytes)
    }
    if len(whole) < len(found):
        return None
    groups = (
        Group(group.repeats, tuple(replace(part, tensor=whole[part.tensor]) for part in group.parts))
        for group in base.groups
    )
    return Gathered(list(groups), held)


def _checksums(target: TargetRecipe, tensor: Tensor) -> bytes:
    """The checksums of the tensor's chunks in the last delta. They rule out most duplicates without decoding.
    (Equal tensors that share different parts with their bases may be cut differently, and are missed.)"""
    records, _ = target.shard(tensor.shard.path).tensors[tensor.info.name].table
    return records["target"].tobytes()
