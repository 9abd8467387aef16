"""Says in sentences what a fine-tune changed. Each follows from the manifest's entries, or is not said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..adapters import merged_adapter
from ..entries import Status, TensorEntry
from ..words import counted, listed, percent, plain, shortened
from .grid import Grid, Stack, is_same, tally

#: A part of a model with a smaller share of its weights is never said to have changed most.
#: Nor is one with fewer weights in a layer, whose checksums take as much as they do.
_LEAST_SHARE, _LEAST_WEIGHTS = 1e-3, 1024

#: Layers that are in more runs than this are counted instead.
_MOST_RUNS = 3

#: How many names are given.
_MOST_NAMES, _MOST_PARTS, _LONGEST_NAME = 3, 8, 60

_DID: dict[Status, str] = {
    "added": "new",
    "removed": "gone",
    "renamed": "renamed",
    "rearranged": "fused, split or transposed",
    "duplicate": "equal to others of the model",
}


@dataclass(frozen=True, slots=True)
class WherePart:
    """How much one part of a model changed in one layer.

    Attributes:
        stack: the layer's stack.
        layer: its number; None outside of layers.
        part: such as "attention".
        amount: how much, in any unit.
    """

    stack: Stack
    layer: int | None
    part: str
    amount: float


def describe_changes(entries: Sequence[TensorEntry], grid: Grid) -> list[str]:
    """All that can be said from a manifest alone.

    Args:
        entries: the manifest's.
        grid: the same, by layers and modules.
    """
    merged = adapter_sentences(entries, grid)
    where = merged or say_where(grid, _bits, lambda most: max(most - 1, most / 2))
    much = _how_much(entries, is_merged=bool(merged))
    return [*much, *where, *untouched_sentences(grid), *structure_sentences(entries)]


def adapter_sentences(entries: Sequence[TensorEntry], grid: Grid) -> list[str]:
    """Which adapter seems to have been merged, if any."""
    adapter = merged_adapter(entries)
    if not adapter:
        return []
    merged = [entry for entry in entries if entry.prediction and entry.prediction.rank]
    return [f"It looks like a merged adapter of {plain(str(adapter))}{_layers_of(grid, merged)}."]


def _bits(entries: Sequence[TensorEntry]) -> float | None:
    """Bits a weight: one bit more is about twice the update, seen from the base's own precision."""
    return None if all(map(is_same, entries)) else tally(entries).bits_per_weight


def _how_much(entries: Sequence[TensorEntry], *, is_merged: bool) -> Iterator[str]:
    found = tally(entry for entry in entries if entry.file is not None)
    share = found.changed_share
    if share is None:
        return
    whose = " outside of the merged matrices" if is_merged else ""
    if not found.changed:
        yield f"No weight{whose} changed."
        return
    yield f"{_capital(percent(share))} of the weights{whose} changed."


# Where it changed most -----------------------------------------------------------------------------------


def say_where(
    grid: Grid,
    amount: Callable[[Sequence[TensorEntry]], float | None],
    enough: Callable[[float], float],
    verb: str = "changed",
) -> list[str]:
    """The sentence that says which parts of which layers changed most; none where nothing did.

    Args:
        amount: how much tensors changed; None where that is not known, or they did not.
        enough: what counts as much, given the largest amount.
        verb: what they did.
    """
    found = list(_amounts(grid, amount))
    most = max((one.amount for one in found), default=0.0)
    if not most > 0:
        return []
    chosen = [one for one in found if one.amount >= enough(most)]
    if 1 < len(chosen) == sum(1 for _ in _amounts(grid, lambda _: 0.0)):
        return [f"All layers and parts {verb} about equally."]
    groups: dict[tuple[str, tuple[int | None, ...]], list[str]] = {}
    for (stack, part), own in groupby(chosen, lambda one: (one.stack.name, one.part)):
        groups.setdefault((stack, tuple(one.layer for one in own)), []).append(part)
    stacks = {stack.name: stack for stack in grid.every}
    places = [
        f"{_listed(parts)}{_of_layers(grid, stacks[name], layers)}"
        for (name, layers), parts in groups.items()
    ]
    more = [f"{len(places) - _MOST_PARTS} more places"] if places[_MOST_PARTS:] else []
    return [f"{_capital('; '.join([*places[:_MOST_PARTS], *more]))} {verb} most."]


def _amounts(grid: Grid, amount: Callable[[Sequence[TensorEntry]], float | None]) -> Iterator[WherePart]:
    """Part by part, and layer by layer in each; parts with next to no weights left out."""
    total = sum(tally(entries).weights for stack in grid.every for entries in stack.cells.values())
    for stack in grid.every:
        for part in dict.fromkeys(module.part for module in stack.modules):
            modules = [module for module in stack.modules if module.part == part]
            weights = tally(stack.entries(stack.layers, modules)).weights
            if weights < max(_LEAST_SHARE * total, _LEAST_WEIGHTS * len(stack.layers)):
                continue
            for layer in stack.layers:
                entries = [one for one in stack.entries([layer], modules) if not one.like]
                value = amount(entries) if entries else None
                if value is not None and math.isfinite(value):
                    yield WherePart(stack, layer, part, value)


def _of_layers(grid: Grid, stack: Stack, layers: Sequence[int | None]) -> str:
    """As in `` of layers 40 to 79``; nothing outside of layers."""
    known = [layer for layer in layers if layer is not None]
    if not known:
        return ""
    whose = f" of {_name(stack.name)}" if grid.stacks[1:] else ""
    if len(known) == len(stack.layers):
        return f" of all layers{whose}"
    runs = list(_runs(stack, known))
    if len(runs) > _MOST_RUNS:
        return f" in {len(known)} of {len(stack.layers)} layers{whose}"
    return f" of {_layers(runs)}{whose}"


def _layers(runs: Sequence[tuple[int, int]]) -> str:
    """As in ``layer 3``, ``layers 3 and 5`` or ``layers 40 to 79``."""
    texts: list[str] = []
    for first, last in runs:
        texts += [f"{first} to {last}"] if last - first > 1 else map(str, dict.fromkeys((first, last)))
    noun = "layer" if len(runs) == 1 and runs[0][0] == runs[0][1] else "layers"
    return f"{noun} {listed(texts, len(texts))}"


def _runs(stack: Stack, layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of layers that follow one another in the stack."""
    order = [layer for layer in stack.layers if layer is not None]
    wanted = set(layers)
    for is_in, run in groupby(order, wanted.__contains__):
        if is_in:
            first, *more = run
            yield first, more[-1] if more else first


def _layers_of(grid: Grid, entries: Iterable[TensorEntry]) -> str:
    """In which layers some tensors are, as in ``, in layers 0 to 79``."""
    wanted = {(entry.file, entry.name) for entry in entries}
    texts = []
    for stack in grid.stacks:
        cells = stack.cells.items()
        layers = {layer for (layer, _), own in cells if any((e.file, e.name) in wanted for e in own)}
        if known := sorted(layer for layer in layers if layer is not None):
            texts.append(_of_layers(grid, stack, known).removeprefix(" of ").removeprefix(" in "))
    return f", in {'; '.join(texts[:_MOST_PARTS])}" if texts else ""


# What did not change, and what else there is ---------------------------------------------------------------


def _all_same(entries: Sequence[TensorEntry]) -> bool:
    return tally(entries).is_same


def untouched_sentences(
    grid: Grid, are_untouched: Callable[[Sequence[TensorEntry]], bool] = _all_same
) -> list[str]:
    """The parts and the layers in which every tensor is the base's.

    Args:
        are_untouched: whether some tensors are; by default, by what their entries say.
    """
    members: dict[str, list[TensorEntry]] = {}
    for stack in grid.every:
        for module in stack.modules:
            members.setdefault(module.part, []).extend(stack.entries(stack.layers, [module]))
    same = [part for part, entries in members.items() if are_untouched(entries)]
    if not same and not members:
        return []
    if len(same) == len(members):
        return ["All tensors are the base's, bit for bit."]
    said = [f"{_capital(_listed(same))} {_are(same)} untouched."] if same else []
    for stack in grid.stacks:
        others = [module for module in stack.modules if module.part not in same]
        alike = [
            layer
            for layer in stack.layers
            if layer is not None and are_untouched(stack.entries([layer], others))
        ]
        runs = list(_runs(stack, alike))
        if others and alike and len(runs) <= _MOST_RUNS:
            whose = f" of {_name(stack.name)}" if grid.stacks[1:] else ""
            if len(alike) == len(stack.layers):
                said.append(f"All layers{whose} are untouched.")
            else:
                is_one = len(alike) == 1
                said.append(f"{_capital(_layers(runs))}{whose} {'is' if is_one else 'are'} untouched.")
    return said


def _are(parts: Sequence[str]) -> str:
    return "are" if parts[1:] or parts[0].endswith("s") else "is"


def structure_sentences(entries: Sequence[TensorEntry]) -> Iterator[str]:
    """What was added, removed, renamed and so on; and what grew."""
    counts = Counter(entry.status for entry in entries)
    for status, did in _DID.items():
        if counts[status]:
            names = [_name(entry.name) for entry in entries if entry.status == status]
            verb = "is" if counts[status] == 1 else "are"
            yield f"{counted(counts[status], 'tensor')} {verb} {did}: {listed(names, _MOST_NAMES)}."
    resized = [entry for entry in entries if entry.status == "resized"]
    for entry in resized[:_MOST_NAMES]:
        old = getattr(entry.base, "shape", ())
        yield f"{_name(entry.name)} was resized from {_shape(old)} to {_shape(entry.shape)}."
    if resized[_MOST_NAMES:]:
        yield f"{counted(len(resized) - _MOST_NAMES, 'more tensor')} changed in size."


def _listed(parts: Sequence[str]) -> str:
    return listed([_name(part) for part in parts], _MOST_PARTS)


def _name(name: str) -> str:
    return plain(shortened(name, _LONGEST_NAME))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
