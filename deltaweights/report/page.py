"""Makes the page of a report: chooses what it shows, and how that is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._version import __version__
from ..changes import Grid, Measure, few_digits, tally
from ..changes.measures import STEPS, bits_per_weight
from ..changes.palette import DARK, LIGHT
from ..entries import TensorEntry
from ..inspect import DeltaSummary, TensorSummary
from ..license.rules import SideLicense
from ..manifest import BaseRecord, TargetRecord
from ..pages import fill_in
from ..words import counted, percent, plain, shortened, size
from .maps import heat_maps
from .movement import Movement
from .reading import Moves

if TYPE_CHECKING:
    from .results import DeltaReport, MovedTable

#: What one page names, at most, and in how many characters.
_LARGEST, _MOST_NAMES, _LONGEST_NAME, _LONGEST_TEXT = 10, 100, 120, 1000
_MOST_TABLES = 6

#: Tensors with fewer elements are no weight matrices: a norm's few numbers move by much, and mean little.
_SMALL = 1 << 12


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table: the first column has names, the others numbers."""

    title: str
    text: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_narrow: bool = False


@dataclass(frozen=True, slots=True)
class PageList:
    """Names below a title; ``more`` is how many are left out."""

    title: str
    names: tuple[str, ...]
    more: int = 0


@dataclass(frozen=True, slots=True)
class Licenses:
    """The panel of licenses."""

    facts: tuple[tuple[str, str], ...]
    lists: tuple[PageList, ...]


def report_page(report: DeltaReport, grid: Grid, measures: Sequence[Measure], moves: Moves | None) -> bytes:
    """The page, as UTF-8."""
    summary = report.summary
    maps = heat_maps(grid, measures)
    return fill_in(
        "report.html",
        title=f"What {_name_of(summary.target, 'this fine-tune')} changed",
        sentences=[_text(text) for text in report.sentences],
        facts=list(_facts(report)),
        maps=maps,
        measures=maps.measures,
        tables=list(_tables(report, moves)),
        lists=list(_lists(summary)),
        licenses=licenses_of(summary),
        meanings=[(one.title, one.meaning) for one in measures],
        light=LIGHT,
        dark=DARK,
        steps=STEPS,
        version=__version__,
    )


def _name_of(side: BaseRecord | TargetRecord, fallback: str) -> str:
    return plain(side.repo_id or fallback)


def _text(text: str) -> str:
    return plain(shortened(text, _LONGEST_TEXT))


def _name(name: str) -> str:
    return plain(shortened(name, _LONGEST_NAME))


def _facts(report: DeltaReport) -> Iterator[tuple[str, str]]:
    summary = report.summary
    there = [tensor for tensor in summary.tensors if tensor.file is not None]
    whole = tally(there)
    for name, side in (("Base", summary.base), ("Fine-tune", summary.target)):
        at = f" at commit {side.revision[:12]}" if side.revision else ""
        yield name, f"{_name_of(side, 'a local folder')}{plain(at)}"
    yield "Weights", f"{_number(whole.weights)} in {counted(len(there), 'tensor')}"
    counts = (f"{count:,} {status}" for status, count in summary.counts.items())
    yield "Tensors", ", ".join(counts) or "none"
    sizes = summary.size
    yield "Delta", f"{size(sizes.delta_bytes)}, {percent(sizes.ratio)} of {size(sizes.target_bytes)}"
    how = "base and delta, weight by weight" if report.has_base else "the delta's manifest alone"
    yield "Measured from", how


def _number(count: int) -> str:
    text = f"{count:,}"
    return text if len(text) < 40 else "too many to be true"


# Tables --------------------------------------------------------------------------------------------------


def _tables(report: DeltaReport, moves: Moves | None) -> Iterator[PageTable]:
    if moves:
        yield _by_movement(report.summary, moves)
        yield from map(_rows_of, [table for table in report.tables if table.moved][:_MOST_TABLES])
    else:
        yield _by_payload(report.summary)


def _by_movement(summary: DeltaSummary, moves: Moves) -> PageTable:
    def found(tensor: TensorEntry) -> Movement | None:
        return moves.tensors.get((tensor.file or "", tensor.name))

    def relative(tensor: TensorEntry) -> float:
        moved = found(tensor)
        return (moved.relative or 0.0) if moved else 0.0

    every = [tensor for tensor in summary.tensors if relative(tensor) > 0]
    large = [tensor for tensor in every if (m := found(tensor)) and m.elements >= _SMALL] or every
    rows = []
    for tensor in sorted(large, key=lambda one: (-relative(one), one.name))[:_LARGEST]:
        moved = moves.tensors[tensor.file or "", tensor.name]
        spectrum = moved.spectrum
        rows.append(
            (
                _name(tensor.name),
                _shape(tensor),
                f"{few_digits(100 * relative(tensor))}%",
                percent(moved.moved_share or 0),
                few_digits(moved.largest),
                few_digits(spectrum.effective_rank) if spectrum else "",
                percent(spectrum.share_64) if spectrum else "",
            )
        )
    return PageTable(
        "The largest changes",
        f"Of tensors with at least {_SMALL:,} weights, by ‖Δ‖ / ‖W‖.",
        ("Tensor", "Shape", "‖Δ‖ / ‖W‖", "Moved", "Largest", "Effective rank", "In 64 directions"),
        tuple(rows),
    )


def _by_payload(summary: DeltaSummary) -> PageTable:
    largest = sorted(summary.tensors, key=lambda one: (-one.payload_bytes, one.name))[:_LARGEST]
    rows = (
        (
            _name(tensor.name),
            _shape(tensor),
            _status(tensor),
            "" if tensor.changed_fraction is None or tensor.prediction else percent(tensor.changed_fraction),
            few_digits(bits_per_weight([tensor]) or 0),
            size(tensor.payload_bytes),
        )
        for tensor in largest
        if tensor.payload_bytes
    )
    return PageTable(
        "The largest changes",
        "By what they take in the delta. With the base at hand, the report measures how far they moved.",
        ("Tensor", "Shape", "Status", "Changed", "Bits a weight", "In the delta"),
        tuple(rows),
    )


def _shape(tensor: TensorEntry) -> str:
    return shortened(" x ".join(map(str, tensor.shape)) or "scalar", _LONGEST_NAME)


def _status(tensor: TensorSummary) -> str:
    rank = tensor.prediction.rank if tensor.prediction else None
    return f"{tensor.status}, rank {rank}" if rank else tensor.status


def _rows_of(table: MovedTable) -> PageTable:
    has_tokens = any(row.token is not None for row in table.strongest)
    rows = (
        (
            *((_token(row.token),) if has_tokens else ()),
            str(row.row),
            few_digits(row.norm),
            "" if row.relative is None else f"{few_digits(100 * row.relative)}%",
        )
        for row in table.strongest
    )
    first = ("Token", "Row") if has_tokens else ("Row",)
    return PageTable(
        f"Rows of {_name(table.tensor)} that moved most",
        f"{table.moved:,} of {counted(table.rows, 'row')} moved.",
        (*first, "‖Δ‖", "‖Δ‖ / ‖W‖"),
        tuple(rows),
        is_narrow=True,
    )


def _token(text: str | None) -> str:
    """A token between quotes, so that its spaces are seen."""
    return "" if text is None else f"“{_name(text)}”"


# Lists ---------------------------------------------------------------------------------------------------


def _lists(summary: DeltaSummary) -> Iterator[PageList]:
    titles = {
        "added": "Tensors that the base does not have",
        "removed": "Tensors that only the base has",
        "renamed": "Tensors with a new name",
        "resized": "Tensors of another size",
        "rearranged": "Tensors made of parts of the base's: fused, split or transposed",
        "duplicate": "Tensors equal to others of the fine-tune",
    }
    for status, title in titles.items():
        chosen = [tensor for tensor in summary.tensors if tensor.status == status]
        if chosen:
            names = tuple(map(_described, chosen[:_MOST_NAMES]))
            yield PageList(f"{title}: {len(chosen):,}", names, max(0, len(chosen) - _MOST_NAMES))
    if left_out := summary.target.left_out:
        names = tuple(map(_name, left_out[:_MOST_NAMES]))
        yield PageList(f"Files left out: {len(left_out):,}", names, max(0, len(left_out) - _MOST_NAMES))


def _described(tensor: TensorSummary) -> str:
    name, base = _name(tensor.name), tensor.base
    if tensor.status == "renamed" and base:
        return f"{name}, in the base {_name(base.name)}"
    if tensor.status == "resized" and base:
        old = shortened(" x ".join(map(str, getattr(base, "shape", ()))), _LONGEST_NAME)
        return f"{name}: {old or 'scalar'} in the base, {_shape(tensor)} here"
    if tensor.status == "rearranged" and base:
        return f"{name}, from {_name(base.name)}"
    if tensor.like:
        return f"{name}, equal to {_name(tensor.like.name)}"
    return f"{name}: {_shape(tensor)}"


def licenses_of(summary: DeltaSummary) -> Licenses:
    """The panel of both licenses: what they are, what they ask, what does not fit together."""
    found = summary.license
    facts = (
        ("Base", _license(found.base)),
        ("Fine-tune", _license(found.target)),
        ("Together", _text(found.expression or "not stated")),
        ("To accept", _text(" ".join(found.to_accept)) or "nothing"),
    )
    lists = (
        ("What the base's license asks (listed, not legal advice)", found.base.obligations),
        ("What the fine-tune's license asks (listed, not legal advice)", found.target.obligations),
        ("What does not fit together", found.conflicts),
    )
    chosen = tuple(PageList(title, tuple(map(_text, texts[:_MOST_NAMES]))) for title, texts in lists if texts)
    return Licenses(facts, chosen)


def _license(side: SideLicense) -> str:
    known = [side.name or side.id or side.expression or "not stated", side.link]
    return _text(", ".join(filter(None, known)))
