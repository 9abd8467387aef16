"""The colors of heat maps, for light and for dark surroundings, and what can be read on them."""

from __future__ import annotations

from dataclasses import dataclass

from .measures import STEPS


@dataclass(frozen=True, slots=True)
class Palette:
    """Colors as ``#rrggbb``.

    Attributes:
        page: the ground.
        ink: text on it.
        faint: text that matters less.
        line: borders.
        steps: shades 0 to :data:`STEPS`, and the color of text on each.
    """

    page: str
    ink: str
    faint: str
    line: str
    steps: tuple[tuple[str, str], ...]


def _mixed(first: str, second: str, share: float) -> str:
    """A color between two."""
    pairs = ((int(first[k : k + 2], 16), int(second[k : k + 2], 16)) for k in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def luminance(color: str) -> float:
    """The relative luminance of a color, as WCAG 2.2 defines it (https://www.w3.org/TR/WCAG22/), 0 to 1."""
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colors, as WCAG 2.2 defines it, from 1 on."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _shades(page: str, little: str, much: str) -> tuple[tuple[str, str], ...]:
    fills = [page, *(_mixed(little, much, k / (STEPS - 1)) for k in range(STEPS))]
    return tuple((fill, max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, fill))) for fill in fills)


LIGHT = Palette("#ffffff", "#1b1f24", "#59636e", "#c8ced6", _shades("#ffffff", "#dfe9f7", "#0b3d80"))
DARK = Palette("#14181d", "#e6eaef", "#a3adb8", "#3d4650", _shades("#14181d", "#1d2f47", "#a8ccff"))
