"""Size against decoding speed, one point a tool, as an SVG picture of what codec.py wrote with --json.

    python benchmarks/picture.py codec.json docs/images/codec.svg

It shows the real pair in bf16 if that was measured, else the simulated one with updates of 2e-4.
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
_GREY, _PALE, _BLUE, _RED = "#666", "#ddd", "#2b6cb0", "#d4380d"


def draw(results: dict[str, Any]) -> str:
    """The picture's text.

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
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
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


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, metavar="JSON")
    parser.add_argument("picture", type=Path, metavar="SVG")
    options = parser.parse_args()
    options.picture.write_text(draw(json.loads(options.results.read_text())))


if __name__ == "__main__":
    main()
