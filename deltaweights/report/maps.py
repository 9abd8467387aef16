"""Heat maps as the page has them: tables with a row for each layer, and a shade for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..changes import Grid, Measure, Stack, most_of, step_of
from ..changes.measures import STEPS
from ..entries import TensorEntry
from ..words import counted, plain, shortened

#: What one page shows, at most: a page stays small whatever a manifest says.
_MOST_CELLS, _MOST_LAYERS, _MOST_MODULES, _MOST_OUTSIDE = 2000, 200, 40, 60
_LONGEST_NAME = 48


@dataclass(frozen=True, slots=True)
class MapRow:
    """A row: its name, and the shade (None: no figure) and text of each cell."""

    name: str
    cells: tuple[tuple[int | None, str], ...]


@dataclass(frozen=True, slots=True)
class MapTable:
    """A stack of layers, or what is outside of layers, in one measure."""

    heading: str
    label: str
    caption: str
    modules: tuple[str, ...]
    rows: tuple[MapRow, ...]
    is_outside: bool = False


@dataclass(frozen=True, slots=True)
class MeasureMap:
    """All tables of one measure."""

    title: str
    meaning: str
    most: str
    unit: str
    unit_text: str
    stacks: tuple[MapTable, ...]


@dataclass(slots=True)
class HeatMaps:
    """What the page shows by layers and modules; ``notes`` say what it leaves out."""

    measures: list[MeasureMap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = STEPS


def heat_maps(grid: Grid, measures: Sequence[Measure]) -> HeatMaps:
    """The tables of all measures."""
    maps = HeatMaps()
    stacks = [_cut(stack, maps) for stack in _that_fit(grid, maps)]
    own = [most_of(grid, measure) for measure in measures]
    scales: dict[str, float] = {}
    for measure, most in zip(measures, own, strict=True):
        if measure.scale:
            scales[measure.scale] = max(most, scales.get(measure.scale, 0.0))
    for measure, largest in zip(measures, own, strict=True):
        most = scales[measure.scale] if measure.scale else largest
        tables = [_table(stack, measure, most) for stack in stacks]
        if grid.outside:
            tables.append(_outside(grid.outside, measure, most))
        maps.measures.append(
            MeasureMap(
                title=measure.title,
                meaning=measure.meaning,
                most=measure.shown(most),
                unit="%" if measure.is_percent else "",
                unit_text=", in percent" if measure.is_percent else "",
                stacks=tuple(tables),
            )
        )
    if grid.outside and len(grid.outside.modules) > _MOST_OUTSIDE:
        left = len(grid.outside.modules) - _MOST_OUTSIDE
        maps.notes.append(f"{counted(left, 'module')} outside of layers not shown.")
    return maps


def _that_fit(grid: Grid, maps: HeatMaps) -> list[Stack]:
    """The largest stacks, until the page is full."""
    room, chosen = _MOST_CELLS, list[Stack]()
    for stack in grid.stacks:
        room -= min(len(stack.layers), _MOST_LAYERS) * min(len(stack.modules), _MOST_MODULES)
        if chosen and room < 0:
            break
        chosen.append(stack)
    if left := len(grid.stacks) - len(chosen):
        maps.notes.append(f"{counted(left, 'smaller stack')} of layers not shown.")
    return chosen


def _cut(stack: Stack, maps: HeatMaps) -> Stack:
    modules = stack.modules[:_MOST_MODULES]
    layers = stack.layers[: min(_MOST_LAYERS, max(1, _MOST_CELLS // len(modules)))]
    left = []
    if more := len(stack.layers) - len(layers):
        left.append(counted(more, "layer"))
    if more := len(stack.modules) - len(modules):
        left.append(counted(more, "module"))
    if left:
        maps.notes.append(f"{' and '.join(left)} of {_name(stack.name)} not shown.")
    return Stack(stack.name, layers, modules, stack.cells)


def _table(stack: Stack, measure: Measure, most: float) -> MapTable:
    name = _name(stack.name)
    rows = (
        MapRow(
            str(layer),
            tuple(_cell(stack.cells.get((layer, one.name)), measure, most) for one in stack.modules),
        )
        for layer in stack.layers
    )
    return MapTable(
        heading=name,
        label=f"layers of {name}",
        caption=f"{measure.title}, layers of {name}",
        modules=tuple(_name(module.name) for module in stack.modules),
        rows=tuple(rows),
    )


def _outside(stack: Stack, measure: Measure, most: float) -> MapTable:
    rows = (
        MapRow(_name(one.name), (_cell(stack.cells.get((None, one.name)), measure, most),))
        for one in stack.modules[:_MOST_OUTSIDE]
    )
    return MapTable(
        heading="Outside of layers",
        label="outside of layers",
        caption=f"{measure.title}, outside of layers",
        modules=(),
        rows=tuple(rows),
        is_outside=True,
    )


def _cell(entries: Sequence[TensorEntry] | None, measure: Measure, most: float) -> tuple[int | None, str]:
    value = measure.value(entries) if entries else None
    return step_of(value, most), "·" if value is None else measure.shown(value)


def _name(name: str) -> str:
    return plain(shortened(name, _LONGEST_NAME))
