"""The tensors of a target as layers and modules, and what the manifest says of each of these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import codec
from ..entries import TensorEntry
from .grouping import TensorPlace, place_tensors


@dataclass(frozen=True, slots=True)
class Tally:
    """What the entries of some tensors of a target say together.

    Attributes:
        tensors: how many they are.
        weights: their elements.
        payload_bytes: what they take in the delta.
        compared: those of their elements of which the manifest tells whether they changed: the ones that were
            compared with the base as it is. A merged adapter's were not.
        changed: of these, those that did.
        rank: the highest rank of what was merged into them; None where nothing was.
        is_same: whether they all are the base's, bit for bit, duplicates of others not counted.
    """

    tensors: int
    weights: int
    payload_bytes: int
    compared: int
    changed: int
    rank: int | None
    is_same: bool

    @property
    def changed_share(self) -> float | None:
        """Of the compared elements, the share that changed, 0 to 1; None where none was compared."""
        return self.changed / self.compared if self.compared else None

    @property
    def bits_per_weight(self) -> float | None:
        """Bits in the delta for each element; None where there is none."""
        return 8 * self.payload_bytes / self.weights if self.weights else None


def tally(entries: Iterable[TensorEntry]) -> Tally:
    """Add up what entries say."""
    entries = list(entries)
    own = [entry for entry in entries if not entry.like]
    compared = [entry for entry in entries if entry.shared_bytes and not entry.prediction]
    ranks = [entry.prediction.rank for entry in entries if entry.prediction and entry.prediction.rank]
    return Tally(
        tensors=len(entries),
        weights=sum(math.prod(entry.shape) for entry in entries),
        payload_bytes=sum(entry.payload_bytes for entry in entries),
        compared=sum(map(shared_elements, compared)),
        changed=sum(entry.changed for entry in compared),
        rank=max(ranks, default=None),
        is_same=bool(own) and all(map(is_same, own)),
    )


def shared_elements(entry: TensorEntry) -> int:
    """How many of a tensor's elements have a base."""
    return entry.shared_bytes // codec.element_bytes(entry.dtype, entry.shared_bytes)


def is_same(entry: TensorEntry) -> bool:
    """Whether a tensor of the target is the base's, bit for bit, whatever its name."""
    if entry.prediction or entry.changed:
        return False
    return entry.status == "same" or (entry.status == "renamed" and entry.shared_bytes > 0)


@dataclass(frozen=True, slots=True)
class Module:
    """A column of a stack's layers: its name, and what it is for (:class:`TensorPlace`)."""

    name: str
    part: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that follow one another.

    Attributes:
        name: the words before their numbers; empty for what is outside of layers.
        layers: their numbers, in order; (None,) outside of layers.
        modules: what they are made of.
        cells: by layer and module, the entries of its tensors.
    """

    name: str
    layers: tuple[int | None, ...]
    modules: tuple[Module, ...]
    cells: dict[tuple[int | None, str], tuple[TensorEntry, ...]]

    def entries(self, layers: Iterable[int | None], modules: Iterable[Module]) -> list[TensorEntry]:
        """Those of some layers and modules."""
        names = [module.name for module in modules]
        return [entry for layer in layers for name in names for entry in self.cells.get((layer, name), ())]


@dataclass(frozen=True, slots=True)
class Grid:
    """A target's tensors by layers and modules.

    Attributes:
        stacks: those with layers, the one with most weights first.
        outside: what is in no layer, such as embeddings; None where there is nothing.
    """

    stacks: tuple[Stack, ...]
    outside: Stack | None

    @property
    def every(self) -> tuple[Stack, ...]:
        """All stacks, the one outside of layers last."""
        return (*self.stacks, self.outside) if self.outside else self.stacks


def grid_of(entries: Sequence[TensorEntry]) -> Grid:
    """Sort a manifest's entries into layers and modules. Tensors that only the base has are left out."""
    there = [entry for entry in entries if entry.file is not None]
    places = place_tensors({entry.name for entry in there})
    by_stack: dict[str, list[tuple[TensorPlace, TensorEntry]]] = {}
    for entry in there:
        place = places[entry.name]
        by_stack.setdefault(place.stack if place.layer is not None else "", []).append((place, entry))
    found = {name: _stack(name, members) for name, members in by_stack.items()}
    outside = found.pop("", None)
    weights = {name: sum(math.prod(e.shape) for _, e in by_stack[name]) for name in found}
    return Grid(tuple(sorted(found.values(), key=lambda one: (-weights[one.name], one.name))), outside)


def _stack(name: str, members: Sequence[tuple[TensorPlace, TensorEntry]]) -> Stack:
    cells: dict[tuple[int | None, str], list[TensorEntry]] = {}
    for place, entry in members:
        cells.setdefault((place.layer, place.module), []).append(entry)
    places = sorted({place.module: place for place, _ in members}.values(), key=lambda place: place.order)
    return Stack(
        name=name,
        layers=tuple(sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)),
        modules=tuple(Module(place.module, place.part) for place in places),
        cells={key: tuple(own) for key, own in cells.items()},
    )
