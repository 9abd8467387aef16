"""Makes a report of a delta: from its manifest, or with the base, weight by weight."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from ..changes import (
    Grid,
    adapter_sentences,
    describe_changes,
    grid_of,
    is_same,
    manifest_measures,
    say_where,
    structure_sentences,
    untouched_sentences,
)
from ..delta.chain import open_recipe
from ..delta.opening import license_texts, read_manifest
from ..delta.target_recipe import TargetRecipe
from ..entries import TensorEntry
from ..inspect import summarize
from ..manifest import Manifest
from ..metrics import timed_operation
from ..patch import check_base
from ..storage import Readable, Source, open_source
from ..words import percent
from ..workers import ProgressCallback, Workers
from .measures import base_measures, movement_of
from .movement import combined
from .reading import Moves, measure_moves
from .results import DeltaReport, MovedRow, MovedTable
from .tokens import token_texts

_log = logging.getLogger(__name__)

#: How many rows of a table are told.
_STRONGEST = 20

#: A share of ‖Δ‖² in few directions from which on it is worth a sentence, where a matrix has many more.
_MUCH, _MANY = 0.5, 512

#: Fewer weights than this share are few.
_FEW = 0.1


@timed_operation("report")
def report_delta(
    delta: Readable,
    *,
    base: Readable | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> DeltaReport:
    """Say what a fine-tune changed: by layers and modules, in figures and in words.

    Without ``base`` only the delta's manifest and license texts are read, which takes a second for a model of
    any size. With it, base and delta are streamed once, as for :func:`verify_delta`, and every weight is
    compared.

    Args:
        delta: a folder, a Hub id, a URL or an open source.
        base: the base: a folder, a file, a Hub id or a URL.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("check base", "measure"), bytes done and total bytes.

    Raises:
        CheckpointError: base or delta cannot be found, read or downloaded.
        ManifestError: the manifest is damaged.
        BaseMismatchError: ``base`` is the wrong one.
        DeltaError: with ``base``, the delta is incomplete or damaged.
    """
    with open_source(delta) as source:
        told = report_manifest(source, read_manifest(source))
        return told if base is None else _with_base(source, base, told, threads, progress)


def report_manifest(source: Source, manifest: Manifest) -> DeltaReport:
    """:func:`report_delta` of an open delta without its base."""
    grid = grid_of(manifest.tensors)
    return DeltaReport(
        delta=source.where,
        summary=summarize(manifest, license_texts(source, manifest)),
        sentences=tuple(describe_changes(manifest.tensors, grid)),
        tables=(),
        has_base=False,
        _grid=grid,
        _measures=tuple(manifest_measures(manifest.tensors)),
        _moves=None,
    )


def _with_base(
    source: Source, base: Readable, told: DeltaReport, threads: int | None, progress: ProgressCallback | None
) -> DeltaReport:
    with open_recipe(source, base) as target, Workers(threads) as workers:
        workers.at_stop(target.cancel)
        check_base(target, workers, progress=progress)
        moves = measure_moves(target, workers, progress)
        _log.info("measured %d tensors of %s", len(moves.tensors), source.where)
        tables = tuple(_tables(target, moves))
        manifest, grid = target.manifest, grid_of(target.manifest.tensors)
    others = [one for one in manifest_measures(manifest.tensors) if one.key != "changed_share"]
    return DeltaReport(
        delta=source.where,
        summary=told.summary,
        sentences=tuple(_sentences(manifest.tensors, grid, moves, tables)),
        tables=tables,
        has_base=True,
        _grid=grid,
        _measures=(*base_measures(moves), *others),
        _moves=moves,
    )


def _tables(target: TargetRecipe, moves: Moves) -> Iterator[MovedTable]:
    """The rows of each embedding that moved most, with their tokens."""
    found = []
    for (file, name), rows in moves.rows.items():
        strongest = np.argsort(-rows.square, kind="stable")[:_STRONGEST]
        found.append((file, name, rows, [int(row) for row in strongest if rows.square[row] > 0]))
    heights = {(entry.file, entry.name): entry.shape[0] for entry in target.manifest.tensors if entry.shape}
    tokens = token_texts(target, {row for *_, chosen in found for row in chosen})
    for file, name, rows, chosen in sorted(found, key=lambda one: one[:2]):
        # A table with fewer rows than there are tokens has positions, or the like.
        texts = tokens.texts if heights[file, name] >= tokens.count else {}
        yield MovedTable(
            tensor=name,
            file=file,
            rows=len(rows.square),
            moved=int(np.count_nonzero(rows.square)),
            strongest=tuple(
                MovedRow(
                    row=row,
                    token=texts.get(row),
                    norm=float(rows.square[row]) ** 0.5,
                    relative=float(rows.square[row] / rows.base_square[row]) ** 0.5
                    if rows.base_square[row] > 0
                    else None,
                )
                for row in chosen
            ),
        )


# Words ---------------------------------------------------------------------------------------------------


def _sentences(
    entries: Sequence[TensorEntry], grid: Grid, moves: Moves, tables: Sequence[MovedTable]
) -> Iterator[str]:
    """What base and delta tell, and what is left of what the manifest tells."""
    whole = combined(moves.tensors.values())
    if whole.elements:
        share = whole.moved / whole.elements
        if not share:
            yield "No weight moved."
        elif share < _FEW:
            yield f"Few weights moved: {percent(share)}."
        else:
            yield f"{percent(share)} of the weights moved."
    if whole.relative:
        yield f"What was added is {percent(whole.relative)} as long as the base's weights (‖Δ‖ / ‖W‖)."
    yield from adapter_sentences(entries, grid)
    yield from say_where(grid, partial(_relative, moves), lambda most: most / 2, "moved")
    yield from _in_few_directions(entries, moves)
    yield from _of_rows(tables)
    yield from untouched_sentences(grid, partial(_are_untouched, moves))
    yield from structure_sentences(entries)


def _are_untouched(moves: Moves, entries: Sequence[TensorEntry]) -> bool:
    """Whether every weight of some tensors is the base's, duplicates of others not counted."""
    own = [entry for entry in entries if not entry.like]
    return bool(own) and all(_is_untouched(moves, entry) for entry in own)


def _is_untouched(moves: Moves, entry: TensorEntry) -> bool:
    found = moves.tensors.get((entry.file or "", entry.name))
    if found is None:
        return is_same(entry)
    return not found.moved and found.elements == math.prod(entry.shape)


def _relative(moves: Moves, entries: Sequence[TensorEntry]) -> float | None:
    found = movement_of(moves, entries)
    return found.relative if found and found.moved else None


def _in_few_directions(entries: Sequence[TensorEntry], moves: Moves) -> Iterator[str]:
    """Whether what was added to large matrices lies in a few directions."""
    large = {
        (entry.file or "", entry.name)
        for entry in entries
        if len(entry.shape) > 1 and min(entry.shape) >= _MANY
    }
    found = combined(moved for key, moved in moves.tensors.items() if key in large)
    if not found.spectrum:
        return
    for count, share in ((8, found.spectrum.share_8), (64, found.spectrum.share_64)):
        if share >= _MUCH:
            yield f"{percent(share)} of it lies in {count} directions of each matrix."
            return


def _of_rows(tables: Sequence[MovedTable]) -> Iterator[str]:
    for table in tables:
        if 0 < table.moved < table.rows:
            first = table.strongest[0]
            token = f", {first.token!r}" if first.token is not None else ""
            rows = f"{table.moved:,} of the {table.rows:,} rows of {table.tensor}"
            yield f"{rows} moved; row {first.row}{token} most."
