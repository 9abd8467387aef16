"""Draws a heat map of layers and modules as a small SVG: columns are layers, rows are modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..entries import TensorEntry
from ..pages import fill_in
from ..words import plain, shortened
from .grid import Grid, Stack, grid_of
from .measures import BITS, STEPS, Measure, most_of, step_of
from .palette import DARK, LIGHT
from .sentences import describe_changes

#: The picture in a delta's folder.
PICTURE_NAME = "changes.svg"

#: What is drawn of a model, at most.
_MOST_STACKS, _MOST_MODULES, _MOST_LAYERS = 4, 24, 256

#: Pixels.
_WIDTH, _ROW, _LEFT, _TOP, _GAP, _MARGIN = 720, 16, 190, 52, 26, 14
_WIDEST_CELL, _SHADE = 40, 14
_MOST_LABEL = 25


@dataclass(frozen=True, slots=True)
class _Label:
    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class _Shade:
    """The cells of one shade, as the data of one path."""

    step: int | None
    path: str


class _Drawing:
    """What was drawn so far, from the top down."""

    def __init__(self) -> None:
        self.y = float(_TOP)
        self.labels: list[_Label] = []
        self.headings: list[_Label] = []
        self.ticks: list[_Label] = []
        self._paths: dict[int | None, list[str]] = {}

    def add(self, stack: Stack, measure: Measure, most: float) -> None:
        """Draw a stack's layers below what there is."""
        layers, modules = stack.layers[:_MOST_LAYERS], stack.modules[:_MOST_MODULES]
        if stack.name:
            self.headings.append(_Label(_MARGIN, self.y + 11, shortened(plain(stack.name), 80)))
            self.y += 18
        width = min(_WIDEST_CELL, (_WIDTH - _LEFT - _MARGIN) // max(1, len(layers)) or 1)
        gap = 1 if width > 2 else 0
        for module in modules:
            label = shortened(plain(module.name), _MOST_LABEL)
            self.labels.append(_Label(_LEFT - 8, self.y + _ROW - 4, label))
            for index, layer in enumerate(layers):
                if own := stack.cells.get((layer, module.name)):
                    self._cell(_LEFT + index * width, width - gap, step_of(measure.value(own), most))
            self.y += _ROW
        if layers[0] is not None:
            for index in _ticks(len(layers)):
                self.ticks.append(_Label(_LEFT + (index + 0.5) * width, self.y + 12, str(layers[index])))
            self.y += 14
        self.y += _GAP - 14

    def _cell(self, x: float, width: float, step: int | None) -> None:
        height = _ROW - 2
        self._paths.setdefault(step, []).append(f"M{x:g} {self.y + 1:g}h{width:g}v{height}h-{width:g}z")

    def shades(self) -> list[_Shade]:
        """The cells by shade: nothing known first."""
        order = sorted(self._paths, key=lambda step: -1 if step is None else step)
        return [_Shade(step, "".join(self._paths[step])) for step in order]


def _ticks(count: int) -> Iterator[int]:
    """The layers whose number is written: about ten, and the last."""
    every = max(1, -(-count // 10))
    for index in range(0, count, every):
        if count - 1 - index >= every or index == count - 1:
            yield index
    if (count - 1) % every:
        yield count - 1


def delta_picture(entries: Sequence[TensorEntry]) -> bytes | None:
    """The picture that a delta holds: bits a weight, by layers and modules. None for a model with fewer than
    two layers, of which a picture says nothing.

    Args:
        entries: those of the delta's manifest.
    """
    grid = grid_of(entries)
    if not any(stack.layers[1:] for stack in grid.stacks):
        return None
    return draw_changes(grid, BITS, describe_changes(entries, grid))


def draw_changes(grid: Grid, measure: Measure, sentences: Sequence[str] = ()) -> bytes:
    """Draw a measure of a model's layers and modules.

    Args:
        sentences: what those hear who do not see the picture.

    Returns:
        An SVG of some KB. It adapts to dark surroundings, and needs no fonts, scripts or network. The same
        arguments give the same bytes.
    """
    most, drawing = most_of(grid, measure), _Drawing()
    for stack in (*grid.stacks[:_MOST_STACKS], *([grid.outside] if grid.outside else [])):
        drawing.add(stack, measure, most)
    legend = [(step, _LEFT + _SHADE * (step - 1)) for step in range(1, STEPS + 1)]
    return fill_in(
        "changes.svg",
        title=f"{measure.title}, by module (down) and layer (across)",
        description=" ".join(plain(shortened(text, 500)) for text in sentences),
        width=_WIDTH,
        height=round(drawing.y),
        margin=_MARGIN,
        legend=legend,
        legend_left="little to much",
        legend_end=legend[-1][1] + _SHADE + 6,
        legend_right=f"up to {measure.shown(most)}{'%' if measure.is_percent else ''}; no color: nothing",
        shades=drawing.shades(),
        labels=drawing.labels,
        headings=drawing.headings,
        ticks=drawing.ticks,
        light=LIGHT,
        dark=DARK,
    )
