"""SVG pictures of what codec.py and lowrank.py wrote with --json.

    python benchmarks/picture.py codec.json docs/images/codec.svg
    python benchmarks/picture.py lowrank.json docs/images/lowrank.svg

The first has size against decoding speed, one point a tool: of the real pair in bf16 if that was measured,
else of the simulated one with updates of 2e-4. The second has the sizes of merged adapters, one bar a tool.
"""

from __future__ import annotations

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any

_TABLES = ("MiniLM BF16", "simulated BF16, update std 0.0002")
_OURS = "deltaweights"
_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 690, 60, 380
_LABEL = (140, 16)  # pixels that a point's label takes at most
_TICK = 0.25  # GB/s
#: Of lowrank.py's columns: what a bar is called, and its color.
_BARS = {
    "zstd": ("XOR + planes + zstd-3", "#a0aec0"),
    "lmzip": ("lmzip", "#718096"),
    "without": ("deltaweights without the prediction", "#2b6cb0"),
    "with": ("deltaweights", "#d4380d"),
}
_BAR, _GAP, _BARS_LEFT = 15, 14, 200  # pixels
_GREY, _PALE, _BLUE, _RED = "#666", "#ddd", "#2b6cb0", "#d4380d"


def draw(results: dict[str, Any]) -> str:
    """The picture's text, of size against speed.

    Raises:
        StopIteration: the results have none of the tables to be shown.
    """
    tables = {table["title"]: table for table in results["tables"]}
    table = next(tables[title] for title in _TABLES if title in tables)
    rows: list[dict[str, Any]] = table["rows"]
    sha256: float = table["sha256_gb_s"]
    widest: int = math.ceil(max(row["bits_per_weight"] for row in rows) * 1.2)
    ticks: int = math.ceil(max(sha256, *(row["decode_gb_s"] for row in rows)) * 1.1 / _TICK)

    def x(bits: float) -> float:
        return _LEFT + bits / widest * (_RIGHT - _LEFT)

    def y(speed: float) -> float:
        return _BOTTOM - speed / (ticks * _TICK) * (_BOTTOM - _TOP)

    parts = [
        *_begin(_HEIGHT),
        _text(_LEFT, 24, f"{table['title']}: size of the delta and speed of decoding, one thread"),
        _text(_LEFT, 44, f"left is smaller, up is faster; {results['machine']}", _GREY),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 20, "bits a weight", anchor="middle"),
        _text(12, _TOP - 16, "GB/s"),
    ]
    for bits in range(widest + 1):
        parts.append(_line(x(bits), _BOTTOM, x(bits), _TOP, _PALE))
        parts.append(_text(x(bits), _BOTTOM + 18, str(bits), _GREY, "middle"))
    for tick in range(ticks + 1):
        level = y(tick * _TICK)
        parts.append(_line(_LEFT, level, _RIGHT, level, _PALE))
        parts.append(_text(_LEFT - 8, level + 4, f"{tick * _TICK:.2f}", _GREY, "end"))
    parts.append(_line(_LEFT, y(sha256), _RIGHT, y(sha256), _GREY))
    parts.append(_text(_RIGHT, y(sha256) - 5, "SHA-256", _GREY, "end"))
    points = [(x(row["bits_per_weight"]), y(row["decode_gb_s"])) for row in rows]
    for row, (across, down), level in zip(rows, points, _label_levels(points), strict=True):
        color = _RED if row["coder"] == _OURS else _BLUE
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5" fill="{color}"/>')
        parts.append(_text(across + 9, level + 4, row["coder"], color))
    return "\n".join([*parts, "</svg>", ""])


def draw_merged(matrices: dict[str, dict[str, float | None]]) -> str:
    """The picture's text, of bits a weight by matrix and column of lowrank.py."""
    group = len(_BARS) * _BAR + _GAP
    bottom = _TOP + 10 + group * len(matrices)
    widest = math.ceil(max(row[column] or 0 for row in matrices.values() for column in _BARS) * 1.1)

    def x(bits: float) -> float:
        return _BARS_LEFT + bits / widest * (_RIGHT - _BARS_LEFT)

    parts = [
        *_begin(bottom + 50),
        _text(12, 24, "Simulated merged adapters in bf16: size of the delta"),
        _text((_BARS_LEFT + _RIGHT) / 2, bottom + 36, "bits a weight", anchor="middle"),
    ]
    for (title, color), left in zip(_BARS.values(), (12, 190, 260, 520), strict=True):
        parts.append(_bar(left, 36, 12, color))
        parts.append(_text(left + 18, 46, title, _GREY))
    for bits in range(widest + 1):
        parts.append(_line(x(bits), bottom, x(bits), _TOP, _PALE))
        parts.append(_text(x(bits), bottom + 18, str(bits), _GREY, "middle"))
    for number, (name, row) in enumerate(matrices.items()):
        top = _TOP + 10 + group * number
        matrix, _, update = name.partition(", ")
        parts.append(_text(_BARS_LEFT - 10, top + 2 * _BAR - 3, matrix, anchor="end"))
        parts.append(_text(_BARS_LEFT - 10, top + 3 * _BAR - 1, update, _GREY, "end"))
        for place, (column, (_, color)) in enumerate(_BARS.items()):
            size, level = row[column], top + place * _BAR
            if size is not None:
                parts.append(_bar(_BARS_LEFT, level, x(size) - _BARS_LEFT, color))
            label = "not installed" if size is None else f"{size:.2f}"
            parts.append(_text(x(size or 0) + 6, level + _BAR - 4, label, _GREY))
    return "\n".join([*parts, "</svg>", ""])


def _begin(height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]


def _label_levels(points: list[tuple[float, float]]) -> list[float]:
    """How far down each point's label is, so that none lies on another."""
    width, height = _LABEL
    levels = [down for _, down in points]
    order = sorted(range(len(points)), key=lambda index: levels[index])
    for place, index in enumerate(order):
        for above in order[:place]:
            if abs(points[index][0] - points[above][0]) < width:
                levels[index] = max(levels[index], levels[above] + height)
    return levels


def _text(x: float, y: float, text: str, color: str = "black", anchor: str = "start") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}"'
    return f"<text {attributes}>{escape(text)}</text>"


def _bar(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR - 3}" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, metavar="JSON")
    parser.add_argument("picture", type=Path, metavar="SVG")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    options.picture.write_text(draw_merged(results["matrices"]) if "matrices" in results else draw(results))


if __name__ == "__main__":
    main()
