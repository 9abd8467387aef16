"""A manifest's entries: what it says of each tensor, and how it says that in few bytes.

In the JSON, tensors that are alike share a *kind* (dtype, shape, status, ...), and each takes a row: name,
kind, numbers, and whatever else few tensors have. docs/format.md gives the meaning of every field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from .words import listed

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
Dim: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Shape: TypeAlias = Annotated[tuple[Dim, ...], msgspec.Meta(max_length=64)]
Status: TypeAlias = Literal[
    "same", "changed", "added", "removed", "renamed", "resized", "rearranged", "duplicate"
]

STATUSES: tuple[Status, ...] = (
    *("same", "changed", "added", "removed"),
    *("renamed", "resized", "rearranged", "duplicate"),
)


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """The base tensor that a target tensor is coded against. ``file`` tells apart two base tensors of
    one name; else it is None, since a base may be sharded in any way."""

    name: str
    dtype: str
    shape: Shape
    file: str | None = None


class PartOfBase(msgspec.Struct, frozen=True, omit_defaults=True):
    """In repetition r, ``count`` elements of the base tensor ``name``: those at
    ``start + r * step + k * stride``. ``file`` as for :class:`BaseTensor`."""

    name: str
    count: Count
    start: Size = 0
    step: Size = 0
    stride: Count = 1
    file: str | None = None


class PartGroup(msgspec.Struct, frozen=True, omit_defaults=True):
    """The elements of all ``parts``, one after the other, ``repeats`` times."""

    parts: Annotated[tuple[PartOfBase, ...], msgspec.Meta(min_length=1)]
    repeats: Count = 1


@dataclass(frozen=True, slots=True)
class BaseParts:
    """The elements of base tensors that a target tensor is coded against, all of one dtype, in the target's
    order: for tensors that were fused, split or transposed."""

    dtype: str
    groups: tuple[PartGroup, ...]

    @property
    def name(self) -> str:
        """The names of the tensors, for people."""
        names = list(dict.fromkeys(part.name for group in self.groups for part in group.parts))
        return listed(names, 3)


class Prediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What stands at the start of a payload and makes its base more like the target: its ``method``, its
    length in bytes, and for people the ``rank`` of a low-rank one."""

    method: Literal["quantized", "low_rank"]
    nbytes: Count
    rank: Size | None = None


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """A tensor of the target, as a duplicate refers to it: its name, and the shard that holds it."""

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the target, or (status ``removed``, without a ``file``) one that only the base has.

    ``shared_bytes`` of its bytes, from the first on, are coded against ``base``, as ``prediction`` changes
    it, if there is one; ``changed`` of those bytes' elements differ from it. ``payload_bytes`` is what it
    takes up in the delta shard.

    A ``duplicate`` has none of these: its bytes are those of the tensor ``like``, which has a payload.
    """

    name: str
    file: str | None
    dtype: str
    shape: Shape
    status: Status
    base: BaseTensor | BaseParts | None
    shared_bytes: Size
    changed: Size
    payload_bytes: Size
    like: TargetTensor | None = None
    prediction: Prediction | None = None


# Rules ---------------------------------------------------------------------------------------------------


def check_entries(entries: Iterable[TensorEntry], shards: set[str]) -> None:
    """Check the rules that types cannot tell.

    Args:
        shards: the target's files that are stored as tensors.

    Raises:
        ValueError: one is broken; says which.
    """
    seen: dict[tuple[str | None, str], TensorEntry] = {}
    entries = list(entries)
    for entry in entries:
        if why := _problem(entry, shards):
            raise ValueError(why)
        if (entry.file, entry.name) in seen and entry.file is not None:
            raise ValueError(f"It names tensor {entry.name!r} of {entry.file!r} twice")
        seen[entry.file, entry.name] = entry
    for entry in entries:
        if entry.like and (why := _problem_of_duplicate(entry, seen.get((entry.like.file, entry.like.name)))):
            raise ValueError(why)


def _problem(entry: TensorEntry, shards: set[str]) -> str | None:
    name, status, prediction = repr(entry.name), entry.status, entry.prediction
    has_no_room = prediction and (not entry.shared_bytes or prediction.nbytes > entry.payload_bytes)
    problems = (
        (
            entry.name == "__metadata__",
            "A tensor is called '__metadata__', which is no tensor's name in a safetensors header",
        ),
        (
            (status == "removed") != (entry.file is None),
            f"Tensor {name} is {status} but in file {entry.file!r}",
        ),
        (
            entry.file is not None and entry.file not in shards,
            f"Tensor {name} is in {entry.file!r}, which is not a shard",
        ),
        (entry.changed > entry.shared_bytes, f"Tensor {name} has more changed elements than shared bytes"),
        (entry.shared_bytes and not entry.base, f"Tensor {name} shares bytes with no base tensor"),
        (
            (status == "duplicate") != bool(entry.like),
            f"Tensor {name} is {status}, which does not go with what it is like",
        ),
        (
            (status == "rearranged") != isinstance(entry.base, BaseParts),
            f"Tensor {name} is {status}, which does not go with its base",
        ),
        (has_no_room, f"Tensor {name} has a prediction, but no base or no room for it"),
    )
    return next((why for is_wrong, why in problems if is_wrong), None)


def _problem_of_duplicate(entry: TensorEntry, other: TensorEntry | None) -> str | None:
    """``other`` is the entry that it refers to. It has a payload, so references end there: none leads on to
    another one, or back."""
    if entry.base or entry.shared_bytes or entry.payload_bytes:
        return f"Tensor {entry.name!r} is a duplicate, but has a base or a payload"
    if other is None:
        return f"Tensor {entry.name!r} is like one that the target does not have"
    if other.like:
        return f"Tensor {entry.name!r} is like {other.name!r}, which is a duplicate itself"
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return f"Tensor {entry.name!r} is like {other.name!r}, which has another dtype or shape"
    return None


# Kinds and rows ------------------------------------------------------------------------------------------


class BaseKind(msgspec.Struct, frozen=True):
    """Dtype and shape of the base tensors of a kind; for parts of tensors, which have no shape, None."""

    dtype: str
    shape: Shape | None


class Kind(msgspec.Struct, frozen=True):
    """What tensors that are alike have in common."""

    dtype: str
    shape: Shape
    status: Status
    shared_bytes: Size
    base: BaseKind | None


class More(msgspec.Struct, frozen=True, omit_defaults=True):
    """What few rows have. ``base`` is the base tensor's name, if it is not the target's."""

    base: str | None = None
    base_file: str | None = None
    like: TargetTensor | None = None
    parts: tuple[PartGroup, ...] | None = None
    prediction: Prediction | None = None


class Row(msgspec.Struct, array_like=True, frozen=True):
    """One tensor: name, number of its kind, changed elements, bytes of its payload."""

    name: str
    kind: Size
    changed: Size
    payload_bytes: Size
    more: More | None = None


class EntryRows(msgspec.Struct, frozen=True):
    """The tensors of one shard of the target, or those that only the base has."""

    file: str | None
    rows: tuple[Row, ...]


def to_rows(entries: Sequence[TensorEntry]) -> tuple[list[Kind], list[object]]:
    """The kinds, in the order in which they occur first, and the rows (ready for JSON) of each run of entries
    that are in the same file."""
    kinds: dict[Kind, int] = {}
    found: list[object] = []
    for file, run in groupby(entries, lambda entry: entry.file):
        rows = []
        for entry in run:
            number = kinds.setdefault(_kind(entry), len(kinds))
            row: list[object] = [entry.name, number, entry.changed, entry.payload_bytes]
            more = _more(entry)
            rows.append(row if more is None else [*row, more])
        found.append({"file": file, "rows": rows})
    return list(kinds), found


def _kind(entry: TensorEntry) -> Kind:
    base = entry.base
    known = BaseKind(base.dtype, base.shape if isinstance(base, BaseTensor) else None) if base else None
    return Kind(entry.dtype, entry.shape, entry.status, entry.shared_bytes, known)


def _more(entry: TensorEntry) -> More | None:
    base, more = entry.base, More(like=entry.like, prediction=entry.prediction)
    if isinstance(base, BaseParts):
        more = msgspec.structs.replace(more, parts=base.groups)
    elif base:
        name = base.name if base.name != entry.name else None
        more = msgspec.structs.replace(more, base=name, base_file=base.file)
    return None if more == More() else more


def from_rows(kinds: Sequence[Kind], tables: Iterable[EntryRows]) -> tuple[TensorEntry, ...]:
    """The entries.

    Raises:
        ValueError: a row's kind is not there, or does not go with what else the row says.
    """
    return tuple(_entry(row, table.file, kinds) for table in tables for row in table.rows)


def _entry(row: Row, file: str | None, kinds: Sequence[Kind]) -> TensorEntry:
    if row.kind >= len(kinds):
        raise ValueError(f"Tensor {row.name!r} has kind {row.kind}, which is not there")
    kind, more = kinds[row.kind], row.more or More()
    base: BaseTensor | BaseParts | None = None
    if (more.parts is None) != (kind.base is None or kind.base.shape is not None):
        raise ValueError(f"Tensor {row.name!r} has parts that do not go with its kind")
    if kind.base and kind.base.shape is None:
        base = BaseParts(kind.base.dtype, more.parts or ())
    elif kind.base and kind.base.shape is not None:
        name = row.name if more.base is None else more.base
        base = BaseTensor(name, kind.base.dtype, kind.base.shape, more.base_file)
    return TensorEntry(
        name=row.name,
        file=file,
        dtype=kind.dtype,
        shape=kind.shape,
        status=kind.status,
        base=base,
        shared_bytes=kind.shared_bytes,
        changed=row.changed,
        payload_bytes=row.payload_bytes,
        like=more.like,
        prediction=more.prediction,
    )


# The first form: an object for each tensor ---------------------------------------------------------------


class PlainEntry(msgspec.Struct, frozen=True):
    """An entry as the first manifests have it: every field by name."""

    name: str
    file: str | None
    dtype: str
    shape: Shape
    status: Status
    base: BaseTensor | None
    shared_bytes: Size
    changed: Size
    payload_bytes: Size
    like: TargetTensor | None = None

    def entry(self) -> TensorEntry:
        """The entry that it states."""
        return TensorEntry(**{name: getattr(self, name) for name in self.__struct_fields__})


def to_plain(entry: TensorEntry) -> dict[str, Any]:
    """An entry's fields, ready for JSON. ``like`` came later: it is absent, never null."""
    fields = {name: getattr(entry, name) for name in PlainEntry.__struct_fields__}
    if fields["like"] is None:
        del fields["like"]
    return fields
