"""Compares fine-tunes of one base side by side: which moved the same weights, and in the same direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations

from ..changes import BITS, Grid, Measure, figures_of, grid_of, is_same
from ..changes.measures import few_digits, in_percent, one_digit
from ..delta.chain import connect
from ..delta.opening import read_manifest, require_whole
from ..entries import TensorEntry
from ..errors import BaseMismatchError, DeltaError
from ..manifest import Manifest
from ..metrics import timed_operation
from ..patch import check_base
from ..storage import Readable, Source, open_source
from ..words import percent, plain, shortened
from ..workers import ProgressCallback, Workers
from .comparison_page import comparison_page
from .making import report_manifest
from .movement import combined
from .overlaps import Overlap, TensorOverlaps, combined_overlap, compare_updates
from .results import DeltaReport

#: How many deltas are compared at once.
MAX_COMPARED = 8

_LONGEST_LABEL = 60

#: From which cosine on two updates are said to point the same way; and below which, at right angles.
_ALIKE, _APART = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class PairReport:
    """What two fine-tunes have in common.

    Attributes:
        first, second: their places in the list of deltas, from 0 on.
        same_tensors: of the weights in tensors that either changed, the share in tensors that both changed;
            None where nothing changed.
        same_weights: of the weights that either moved, the share that both moved; None without the base.
        cosine: the cosine of what they added; None without the base, or where one added nothing.
    """

    first: int
    second: int
    same_tensors: float | None
    same_weights: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """What :func:`report_side_by_side` found.

    Attributes:
        labels: a short name for each delta.
        reports: what each says of itself.
        pairs: what each two have in common.
        sentences: the most important of it, in words.
        has_base: whether bases and deltas were measured, or only manifests were read.
    """

    labels: tuple[str, ...]
    reports: tuple[DeltaReport, ...]
    pairs: tuple[PairReport, ...]
    sentences: tuple[str, ...]
    has_base: bool
    _grid: Grid = field(repr=False)
    _measures: tuple[Measure, ...] = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON, with the figures of every layer and module. One that there is not is
        absent."""
        return {
            "has_base": self.has_base,
            "sentences": list(self.sentences),
            "deltas": [
                {"label": label, **report.to_dict()}
                for label, report in zip(self.labels, self.reports, strict=True)
            ],
            "pairs": [
                {name: value for name, value in _pair_fields(pair).items() if value is not None}
                for pair in self.pairs
            ],
            "layers": list(self._layers()),
        }

    def _layers(self) -> Iterator[dict[str, object]]:
        for stack, module, layer, figures in figures_of(self._grid, self._measures):
            yield {"stack": stack.name, "layer": layer, "module": module.name, **figures}

    def html(self) -> bytes:
        """One page that has it all: UTF-8, with no script, and nothing to load."""
        return comparison_page(self, self._grid, self._measures)


def _pair_fields(pair: PairReport) -> dict[str, object]:
    return {name: getattr(pair, name) for name in pair.__dataclass_fields__}


@timed_operation("report")
def report_side_by_side(
    deltas: Sequence[Readable],
    *,
    base: Readable | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ComparisonReport:
    """Compare fine-tunes of one base: where each changed it, whether they moved the same weights, and whether
    in the same direction.

    Args:
        deltas: two to eight deltas: folders, Hub ids, URLs or open sources.
        base: their base. Without it only manifests are read: then tensors that both changed are told, but not
            weights, and no directions.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("check base", "compare"), bytes done and total bytes.

    Raises:
        CheckpointError: base or a delta cannot be found, read or downloaded.
        ManifestError: a manifest is damaged.
        BaseMismatchError: the deltas were not made from one base, or ``base`` is another one.
        DeltaError: there are fewer than two deltas or more than eight; or one is incomplete or damaged.
    """
    if not 2 <= len(deltas) <= MAX_COMPARED:
        raise DeltaError(
            f"{len(deltas)} deltas cannot be compared side by side",
            f"A comparison has between 2 and {MAX_COMPARED}.",
            "Name fewer, or more.",
        )
    with ExitStack() as opened:
        sources = [opened.enter_context(open_source(delta)) for delta in deltas]
        manifests = [read_manifest(source) for source in sources]
        _require_one_base(sources, manifests)
        reports = tuple(map(report_manifest, sources, manifests))
        compared = None if base is None else _compared(sources, manifests, base, threads, progress)
    labels = _labels(reports)
    entries = [{e.name: e for e in manifest.tensors if e.file is not None} for manifest in manifests]
    every = {name: entry for own in reversed(entries) for name, entry in own.items()}
    pairs = tuple(_pair(i, j, entries, compared) for i, j in combinations(range(len(deltas)), 2))
    return ComparisonReport(
        labels=labels,
        reports=reports,
        pairs=pairs,
        sentences=tuple(_sentences(labels, pairs)),
        has_base=compared is not None,
        _grid=grid_of(list(every.values())),
        _measures=tuple(_measures(labels, entries, compared)),
    )


def _require_one_base(sources: Sequence[Source], manifests: Sequence[Manifest]) -> None:
    """Raise :class:`BaseMismatchError` unless all were made from the same shards, by their SHA-256."""
    bases = [
        {file.sha256 for file in manifest.base.files if file.path.endswith(".safetensors")}
        for manifest in manifests
    ]
    for source, base in zip(sources[1:], bases[1:], strict=True):
        if base != bases[0]:
            raise BaseMismatchError(
                f"{sources[0].where} and {source.where} were not made from one base",
                "The SHA-256 of the bases' shards in their manifests differ.",
                "Compare fine-tunes of the same base; make a delta anew if its copy was sharded differently.",
            )


def _compared(
    sources: Sequence[Source],
    manifests: Sequence[Manifest],
    base: Readable,
    threads: int | None,
    progress: ProgressCallback | None,
) -> dict[str, TensorOverlaps]:
    with ExitStack() as opened, Workers(threads) as workers:
        targets = []
        for source, manifest in zip(sources, manifests, strict=True):
            require_whole(source, manifest)
            targets.append(opened.enter_context(connect([source], [manifest], base)))
            workers.at_stop(targets[-1].cancel)
        for target in targets:
            check_base(target, workers, progress=progress)
        return compare_updates(targets, workers, progress)


def _labels(reports: Sequence[DeltaReport]) -> tuple[str, ...]:
    """The fine-tunes' Hub ids, or the last parts of the deltas' places; told apart by numbers if need be."""
    names = [
        shortened(
            plain(one.summary.target.repo_id or one.delta.rstrip("/").rpartition("/")[2]), _LONGEST_LABEL
        )
        for one in reports
    ]
    return tuple(
        f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)
    )


def _pair(
    first: int,
    second: int,
    entries: Sequence[Mapping[str, TensorEntry]],
    compared: Mapping[str, TensorOverlaps] | None,
) -> PairReport:
    changed = [
        {name: math.prod(one.shape) for name, one in entries[k].items() if not is_same(one) and not one.like}
        for k in (first, second)
    ]
    either = sum((changed[0] | changed[1]).values())
    both = sum(weights for name, weights in changed[0].items() if name in changed[1])
    overlap = combined_overlap(one.pairs[first, second] for one in (compared or {}).values())
    return PairReport(
        first,
        second,
        same_tensors=both / either if either else None,
        same_weights=overlap.share if compared is not None else None,
        cosine=overlap.cosine if compared is not None else None,
    )


def _sentences(labels: Sequence[str], pairs: Sequence[PairReport]) -> Iterator[str]:
    for pair in pairs:
        both = f"{labels[pair.first]} and {labels[pair.second]}"
        if pair.same_weights is not None:
            share = percent(pair.same_weights)
            if not pair.same_weights:
                yield f"{both} moved no weight in common."
                continue
            how = "" if pair.cosine is None else f" {_direction(pair.cosine)}"
            yield f"{both}: of the weights that either moved, both moved {share}.{how}"
        elif pair.same_tensors is not None:
            share = percent(pair.same_tensors)
            yield f"{both}: of the weights in tensors that either changed, {share} are in tensors of both."
        else:
            yield f"{both}: neither changed a weight."


def _direction(cosine: float) -> str:
    if cosine >= _ALIKE:
        how = "point the same way"
    elif cosine <= -_ALIKE:
        how = "point opposite ways"
    elif abs(cosine) < _APART:
        how = "are nearly at right angles"
    else:
        how = "are partly alike" if cosine > 0 else "are partly opposed"
    return f"Their updates {how}: cosine {_signed(cosine)}."


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else ''}{few_digits(abs(value))}"


# Figures of layers and modules ---------------------------------------------------------------------------


def _measures(
    labels: Sequence[str],
    entries: Sequence[Mapping[str, TensorEntry]],
    compared: Mapping[str, TensorOverlaps] | None,
) -> Iterator[Measure]:
    """For each delta how much it changed, and with the base for each two what they have in common."""
    for number, (label, own) in enumerate(zip(labels, entries, strict=True)):
        if compared is None:
            yield Measure(
                f"bits_per_weight_{number}",
                label,
                f"{label}: {BITS.meaning}",
                _of_delta(own),
                one_digit,
                scale="deltas",
            )
        else:
            yield Measure(
                f"relative_{number}",
                label,
                f"{label}: how long what it added is, compared with the base's weights, ‖Δ‖ / ‖W‖.",
                _relative(number, compared),
                in_percent,
                is_percent=True,
                scale="deltas",
            )
    for i, j in combinations(range(len(labels)), 2) if compared is not None else ():
        assert compared is not None
        both = f"{labels[i]} and {labels[j]}"
        yield Measure(
            f"cosine_{i}_{j}",
            f"Cosine: {both}",
            f"{both}: the cosine of what they added. 1 is the same direction, 0 a right angle.",
            _of_pair((i, j), compared, lambda one: one.cosine),
            lambda value: f"{'-' if value < 0 else ''}{one_digit(abs(value))}",
        )
        yield Measure(
            f"same_weights_{i}_{j}",
            f"Same weights: {both}",
            f"{both}: of the weights that either moved, the share that both moved.",
            _of_pair((i, j), compared, lambda one: one.share),
            in_percent,
            is_percent=True,
        )


def _of_delta(own: Mapping[str, TensorEntry]) -> Callable[[Sequence[TensorEntry]], float | None]:
    def value(cell: Sequence[TensorEntry]) -> float | None:
        there = [own[entry.name] for entry in cell if entry.name in own]
        return BITS.value(there) if there else None

    return value


def _relative(
    number: int, compared: Mapping[str, TensorOverlaps]
) -> Callable[[Sequence[TensorEntry]], float | None]:
    def value(cell: Sequence[TensorEntry]) -> float | None:
        there = [compared[entry.name].moved[number] for entry in cell if entry.name in compared]
        return combined(there).relative if there else None

    return value


def _of_pair(
    pair: tuple[int, int], compared: Mapping[str, TensorOverlaps], figure: Callable[[Overlap], float | None]
) -> Callable[[Sequence[TensorEntry]], float | None]:
    def value(cell: Sequence[TensorEntry]) -> float | None:
        there = [compared[entry.name].pairs[pair] for entry in cell if entry.name in compared]
        return figure(combined_overlap(there)) if there else None

    return value
