"""Makes the page of fine-tunes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._version import __version__
from ..changes import Grid, Measure, few_digits, tally
from ..changes.measures import STEPS
from ..changes.palette import DARK, LIGHT
from ..pages import fill_in
from ..words import percent, plain, shortened, size
from .maps import heat_maps
from .page import PageList, PageTable

if TYPE_CHECKING:
    from .side_by_side import ComparisonReport

#: Of more deltas, the page has no heat maps for each two of them.
_MOST_PAIRS = 6

_LONGEST_TEXT = 1000


def comparison_page(report: ComparisonReport, grid: Grid, measures: Sequence[Measure]) -> bytes:
    """The page, as UTF-8."""
    shown = list(measures)
    notes = []
    if len(report.pairs) > _MOST_PAIRS:
        shown = shown[: len(report.labels)]
        notes.append("There are too many pairs for a heat map of each; `--json` has their figures.")
    maps = heat_maps(grid, shown)
    maps.notes += notes
    base = next((one.summary.base.repo_id for one in report.reports if one.summary.base.repo_id), None)
    return fill_in(
        "side_by_side.html",
        title=f"{len(report.labels)} fine-tunes of {plain(base or 'one base')}, side by side",
        sentences=[_text(text) for text in report.sentences],
        tables=[_deltas(report), _pairs(report)],
        maps=maps,
        measures=maps.measures,
        lists=[
            PageList(label, tuple(map(_text, one.sentences)))
            for label, one in zip(report.labels, report.reports, strict=True)
        ],
        light=LIGHT,
        dark=DARK,
        steps=STEPS,
        version=__version__,
    )


def _text(text: str) -> str:
    return plain(shortened(text, _LONGEST_TEXT))


def _deltas(report: ComparisonReport) -> PageTable:
    rows = []
    for label, one in zip(report.labels, report.reports, strict=True):
        share = tally(tensor for tensor in one.summary.tensors if tensor.file is not None).changed_share
        sizes = one.summary.size
        adapter = one.summary.adapter
        rows.append(
            (
                label,
                "" if share is None else percent(share),
                size(sizes.delta_bytes),
                percent(sizes.ratio),
                _text(str(adapter)) if adapter else "",
            )
        )
    headings = ("Fine-tune", "Changed", "Delta", "Of the model", "Looks like a merged adapter of")
    return PageTable("The fine-tunes", "", headings, tuple(rows))


def _pairs(report: ComparisonReport) -> PageTable:
    rows = (
        (
            f"{report.labels[pair.first]} and {report.labels[pair.second]}",
            "" if pair.same_tensors is None else percent(pair.same_tensors),
            "" if pair.same_weights is None else percent(pair.same_weights),
            "" if pair.cosine is None else f"{'-' if pair.cosine < 0 else ''}{few_digits(abs(pair.cosine))}",
        )
        for pair in report.pairs
    )
    text = (
        "Of the weights that either moved, the share that both moved; and the cosine of what they added."
        if report.has_base
        else "Of the weights in tensors that either changed, the share in tensors that both changed. With "
        "the base, single weights and directions are compared."
    )
    headings = ("Pair", "Same tensors", "Same weights", "Cosine")
    return PageTable("Each two of them", text, headings, tuple(rows))
