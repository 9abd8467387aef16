"""What a manifest says of a tensor that was just coded."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint import Base, Checkpoint, Gathered, Tensor, tensors_of
from ..entries import (
    BaseParts,
    BaseTensor,
    PartGroup,
    PartOfBase,
    Prediction,
    Status,
    TargetTensor,
    TensorEntry,
)
from ..match.names import Match
from ..payload import WrittenPayload


def entry_of(match: Match, written: WrittenPayload | None, old: Checkpoint) -> TensorEntry:
    """The entry of a target tensor.

    Args:
        match: the tensor, and what it was coded against.
        written: its payload; None for a duplicate.
        old: the base.
    """
    new, found = match.target.info, match.prediction
    return TensorEntry(
        name=new.name,
        file=match.target.shard.path,
        dtype=new.dtype,
        shape=new.shape,
        status=_status(match, written),
        base=_reference(match.base, old) if match.base and match.shared_bytes else None,
        shared_bytes=match.shared_bytes,
        changed=written.changed if written else 0,
        payload_bytes=written.nbytes if written else 0,
        like=TargetTensor(match.like.info.name, match.like.shard.path) if match.like else None,
        prediction=Prediction(found.method, len(found.stored), found.rank) if found and written else None,
    )


def _reference(base: Base, old: Checkpoint) -> BaseTensor | BaseParts:
    """A base as the manifest names it."""

    def file_of(tensor: Tensor) -> str | None:
        return tensor.path if len(old.named(tensor.name)) > 1 else None

    if isinstance(base, Tensor):
        return BaseTensor(base.name, base.dtype, base.info.shape, file_of(base))
    groups = []
    for group in base.groups:
        parts = (
            PartOfBase(part.tensor.name, part.count, part.start, part.step, part.stride, file_of(part.tensor))
            for part in group.parts
        )
        groups.append(PartGroup(tuple(parts), group.repeats))
    return BaseParts(base.dtype, tuple(groups))


def _status(match: Match, written: WrittenPayload | None) -> Status:
    if match.like or match.base is None:
        return "duplicate" if match.like else "added"
    if isinstance(match.base, Gathered):
        return (
            "rearranged" if match.shared_bytes else "added"
        )  # else of a dtype that it cannot be coded against
    if match.base.info.shape != match.target.info.shape:
        return "resized"
    if match.base.info.name != match.target.info.name:
        return "renamed"
    if not match.shared_bytes and match.target.info.nbytes:
        return "changed"  # a dtype without a rule to convert
    return "same" if written and written.is_same and not match.prediction else "changed"


def removed_entries(old: Checkpoint, matches: Iterable[Match]) -> list[TensorEntry]:
    """Entries for the base tensors that no target tensor is compared with."""
    used = {tensor for match in matches if match.base for tensor in tensors_of(match.base)}
    return [
        TensorEntry(t.info.name, None, t.info.dtype, t.info.shape, "removed", None, 0, 0, 0)
        for t in old.tensors
        if t not in used
    ]
