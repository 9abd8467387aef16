"""What is measured of a layer's modules, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..entries import TensorEntry
from .grid import Grid, Module, Stack, tally


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that each cell of a grid may have.

    Attributes:
        key: its name in JSON.
        title: its name for people.
        meaning: what it says, in a sentence.
        value: the figure of some tensors; None where there is none.
        shown: the figure as text, in few characters.
        is_percent: whether that text is a number of percent.
        scale: measures that name the same scale are drawn with the same shades; None: this one has its own.
    """

    key: str
    title: str
    meaning: str
    value: Callable[[Sequence[TensorEntry]], float | None]
    shown: Callable[[float], str]
    is_percent: bool = False
    scale: str | None = None


def manifest_measures(entries: Sequence[TensorEntry]) -> list[Measure]:
    """The measures for which a manifest is enough; those that no tensor has are left out.

    Args:
        entries: the manifest's.
    """
    payloads = sum(entry.payload_bytes for entry in entries)
    every = [
        BITS,
        Measure(
            "changed_share",
            "Changed",
            "The share of the weights that differ from the base's. Not known of matrices into which an "
            "adapter was merged.",
            lambda own: tally(own).changed_share,
            in_percent,
            is_percent=True,
        ),
        Measure(
            "payload_share",
            "Share of the delta",
            "The share of the delta's bytes that these weights take.",
            lambda own: tally(own).payload_bytes / payloads if payloads else None,
            in_percent,
            is_percent=True,
        ),
        Measure(
            "rank",
            "Rank",
            "The rank of what was merged into the matrices, where the delta holds it as factors.",
            lambda own: tally(own).rank,
            lambda value: f"{value:.0f}",
        ),
    ]
    there = [entry for entry in entries if entry.file is not None]
    return [one for one in every if any(one.value([entry]) is not None for entry in there)]


def bits_per_weight(entries: Sequence[TensorEntry]) -> float | None:
    """Bits in the delta for each weight; 0 where all are the base's, whose checksums do not count."""
    found = tally(entries)
    return 0.0 if found.is_same else found.bits_per_weight


def few_digits(value: float) -> str:
    """A number from 0 on with two or three digits, as in ``0``, ``1.4e-5``, ``0.03``, ``4.2``, ``13`` or
    ``1.5k``."""
    if 0 < value < 0.001 or value >= 999_500:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if value >= 999.5:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.2g}"


def one_digit(value: float) -> str:
    """The same with one digit where the number is tiny, as in ``1e-5``: it has to fit a cell."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else few_digits(value)


def in_percent(share: float) -> str:
    """A share from 0 to 1 as a number of percent, in few characters."""
    return one_digit(100 * share)


#: The measure that every manifest has.
BITS = Measure(
    "bits_per_weight",
    "Bits a weight",
    "How many bits each weight takes in the delta. One bit more is about twice the update.",
    bits_per_weight,
    few_digits,
)


#: Shades of color, from little to much.
STEPS = 9


def step_of(value: float | None, most: float) -> int | None:
    """The shade of a figure: 0 for nothing, 1 to :data:`STEPS` for more; None where there is none."""
    if value is None:
        return None
    if value <= 0 or most <= 0:
        return 0
    return 1 + min(STEPS - 1, int(STEPS * value / most))


def most_of(grid: Grid, measure: Measure) -> float:
    """The largest figure of any cell."""
    values = (measure.value(own) for stack in grid.every for own in stack.cells.values())
    return max((value for value in values if value is not None), default=0.0)


def figures_of(
    grid: Grid, measures: Sequence[Measure]
) -> Iterator[tuple[Stack, Module, int | None, dict[str, float]]]:
    """Each cell that has tensors: its stack, module and layer, and the figures that it has, by their keys."""
    for stack in grid.every:
        for module in stack.modules:
            for layer in stack.layers:
                if own := stack.cells.get((layer, module.name)):
                    values = ((one.key, one.value(own)) for one in measures)
                    yield stack, module, layer, {key: value for key, value in values if value is not None}
