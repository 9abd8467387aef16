"""Streams a delta and its base, and measures how far each tensor moved, in bounded memory.

Shards are read side by side, each in the order of its bytes. A tensor that is the base's bit for bit is not
decoded.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..changes.grouping import TensorPlace, place_tensors
from ..codec.low_rank.blas import one_blas_thread
from ..delta.recipes import ShardRecipe, TensorRecipe
from ..delta.target_recipe import TargetRecipe
from ..entries import TensorEntry
from ..metrics import timed_stage
from ..storage import Span
from ..workers import Buffers, Lane, Meter, ProgressCallback, Workers
from .movement import NO_FLOATS, Floats, Movement, float_dtype, has_floats, measure, measure_base
from .spectrum import MAX_COLUMNS, Sketch

#: A tensor, by the target's shard and its name.
TensorKey = tuple[str, str]

#: A batch of chunks has so many bytes at least, where a row of the tensor is long: a sketch costs least if it
#: gets many rows at once.
_ROWS_AT_ONCE, _MOST_AT_ONCE = 64, 4 << 20

#: One batch in so many tells the spectrum of a large matrix, chosen from all over it. They are enough for
#: directions that hold much; and of noise, fewer rows seem to hold a bit more in a direction, and a sketch a
#: bit less.
_SKETCHED, _FEW_BATCHES = 4, 6

#: Of tensors that are one module of a layer, such as its experts, so many tell the spectrum.
_MOST_ALIKE = 8

#: Tables with more rows get no figures for each row.
_MOST_ROWS = 1 << 22

#: Parts of a model whose rows stand for tokens.
_TOKEN_PARTS = ("embeddings", "head")


@dataclass(slots=True)
class RowMoves:
    """Of each row of a table, such as an embedding, the sum of squares of what was added and of the base
    (float64[rows])."""

    square: NDArray[np.float64]
    base_square: NDArray[np.float64]


@dataclass(slots=True)
class Moves:
    """What was measured: for each tensor that has a base, how far it moved; and rows of tables."""

    tensors: dict[TensorKey, Movement]
    rows: dict[TensorKey, RowMoves]


@timed_stage("measure")
def measure_moves(target: TargetRecipe, workers: Workers, progress: ProgressCallback | None) -> Moves:
    """Measure how far every tensor of a target moved.

    Raises:
        BaseMismatchError, DeltaError: base or delta contradicts the manifest.
    """
    entries = [entry for entry in target.manifest.tensors if entry.file is not None and _is_measured(entry)]
    places = place_tensors({entry.name for entry in target.manifest.tensors if entry.file is not None})
    by_file: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        assert entry.file is not None
        by_file.setdefault(entry.file, {})[entry.name] = entry
    sketched = _sketched(entries, places)
    moves, meter = Moves({}, {}), Meter(progress, "measure", sum(entry.shared_bytes for entry in entries))

    def walk(lane: Lane, file: str) -> None:
        tables = {
            name
            for name, entry in by_file[file].items()
            if len(entry.shape) == 2 and places[name].part in _TOKEN_PARTS and places[name].layer is None
        }
        for key, tensor in _walk(target.shard(file), by_file[file], tables, sketched, lane, meter):
            moves.tensors[key] = tensor.found
            if tensor.rows:
                moves.rows[key] = tensor.rows

    with one_blas_thread:
        workers.each(walk, sorted(by_file))
    return moves


def _sketched(entries: Iterable[TensorEntry], places: Mapping[str, TensorPlace]) -> set[str]:
    """The names of tensors whose spectrum is measured: all but most of a layer's experts, and the like."""
    alike: dict[TensorPlace, list[str]] = {}
    for entry in entries:
        alike.setdefault(places[entry.name], []).append(entry.name)
    return {name for names in alike.values() for name in names[:: -(-len(names) // _MOST_ALIKE)]}


def _is_measured(entry: TensorEntry) -> bool:
    """Whether its bytes are compared with base bytes of the same dtype."""
    if not entry.shared_bytes or entry.base is None or entry.like:
        return False
    return entry.base.dtype == entry.dtype or codec.is_convertible(entry.base.dtype, entry.dtype)


def _is_same(recipe: TensorRecipe, entry: TensorEntry) -> bool:
    """Whether a tensor is its base bit for bit, by the checksums in its chunk records."""
    if entry.prediction or entry.base is None or entry.base.dtype != entry.dtype:
        return False
    records = recipe.table[0][: recipe.plan.shared_count]
    return bool((records["base"] == records["target"]).all())


class _Scratch(threading.local):
    """Buffers of each thread, used again for every batch: freshly allocated memory costs a page fault for
    each 4 KiB."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def take(self, use: str, nbytes: int) -> NDArray[np.uint8]:
        """``nbytes`` bytes, valid until this thread asks for the same use again."""
        found = self._buffers.get(use)
        if found is None or found.size < nbytes:
            found = self._buffers[use] = np.empty(nbytes, np.uint8)
        return found[:nbytes]

    def floats(self, use: str, count: int, dtype: str) -> Floats:
        """The same as floats that hold the values of a dtype."""
        kind = np.dtype(float_dtype(dtype))
        return self.take(use, count * kind.itemsize).view(kind)


class _Measured:
    """A tensor whose rows of chunks are measured by several threads, and added up in order."""

    def __init__(
        self,
        recipe: TensorRecipe,
        entry: TensorEntry,
        scratch: _Scratch,
        buffers: Buffers,
        *,
        is_table: bool,
        is_sketched: bool,
    ) -> None:
        self.recipe = recipe
        self.is_same = _is_same(recipe, entry)
        self.found = Movement()
        self.rows: RowMoves | None = None
        self._scratch, self._buffers = scratch, buffers
        self._itemsize = codec.element_bytes(entry.dtype, entry.shared_bytes)
        self._columns = _columns(entry.shape) if has_floats(entry.dtype) else 0
        self._row_bytes = self._itemsize * max(1, self._columns)
        height = entry.shared_bytes // self._row_bytes
        self._sketch: Sketch | None = None
        if (
            is_sketched
            and not self.is_same
            and height > 1
            and 1 < self._columns <= MAX_COLUMNS
            and entry.dtype != "F64"
        ):
            self._sketch = Sketch(self._columns)
        self._sampled = _sample(1)
        if is_table and self._columns == entry.shape[-1] and 0 < height <= _MOST_ROWS:
            self.rows = RowMoves(np.zeros(height), np.zeros(height))
        self._left: list[tuple[Floats, Floats]] = []  # ends of rows whose other end is still to come

    def rows_of_chunks(self, at_once: int) -> list[tuple[int, int]]:
        """The rows of chunks that are measured at once, each of ``at_once`` bytes or more. Chooses those that
        are sketched."""
        nbytes = max(at_once, self._batch_bytes)
        plan = self.recipe.plan
        rows = [row for row in plan.rows(nbytes) if plan.has_base(row[0])]
        self._sampled = _sample(len(rows))
        return rows

    @property
    def _batch_bytes(self) -> int:
        """How many bytes to measure at once, at least."""
        return min(_MOST_AT_ONCE, _ROWS_AT_ONCE * self._row_bytes) if self._sketch else 0

    def measure(self, first: int, end: int, number: int) -> _Part:
        """Decode and measure a row of chunks, the tensor's batch of this number; any thread may."""
        recipe, dtype = self.recipe, self.recipe.dtype
        start, stop = recipe.plan.bounds(first, end)
        low, high = recipe.base_bounds(first, end)
        assert recipe.base is not None
        base = self._scratch.take("base", high - low)
        recipe.read_base(first, end, base)
        self._check_base(first, end, base)
        if self.is_same:
            return _Part(measure_base(base, dtype), stop - start)
        target = self._scratch.take("target", stop - start)
        recipe.decode(first, end, target, base)
        count, is_sketched = (stop - start) // self._itemsize, self._sketch and number in self._sampled
        floats = self._scratch.floats("floats", count, dtype) if self.rows else None
        moves = self._scratch.floats("moves", count, dtype) if self.rows or is_sketched else None
        old = codec.convert(base, recipe.base.dtype, dtype)
        part = _Part(measure(old, target, dtype, floats, moves), stop - start)
        if moves is not None:
            origin = start // self._itemsize
            self._cut(part, origin, moves if floats is None else floats, moves, is_sketched=bool(is_sketched))
        return part

    def _check_base(self, first: int, end: int, base: NDArray[np.uint8]) -> None:
        """Compare the chunks of the base that no decoding compares with the delta's checksums.

        Raises:
            BaseMismatchError: one differs, also when it is read again.
        """
        recipe, origin = self.recipe, self.recipe.base_bounds(first, end)[0]
        for index in range(first, end):
            if self.is_same or not recipe.needs_base(index):
                low, high = recipe.base_bounds(index, index + 1)
                chunk = base[low - origin : high - origin]
                if not recipe.is_from(index, chunk):
                    recipe.require_base(index)
                    recipe.read_base(index, index + 1, chunk)

    def _cut(self, part: _Part, origin: int, floats: Floats, moves: Floats, *, is_sketched: bool) -> None:
        """Measure whole rows, and keep the ends of others."""
        width = self._columns
        head = min(-origin % width, moves.size)
        end = head + (moves.size - head) // width * width
        part.head = floats[:head].copy(), moves[:head].copy()
        part.tail = floats[end:].copy(), moves[end:].copy()
        part.ends_row = head > 0 and (origin + head) % width == 0
        part.first_row = (origin + head) // width
        if end > head:
            rows = floats[head:end].reshape(-1, width), moves[head:end].reshape(-1, width)
            self._measure_rows(part, *rows, is_sketched=is_sketched)

    def _measure_rows(self, part: _Part, floats: Floats, moves: Floats, *, is_sketched: bool) -> None:
        if self._sketch and is_sketched:
            part.buffer = self._buffers.take(self._sketch.nbytes)
            part.sketched = self._sketch.part(moves.astype(np.float32, copy=False), part.buffer)
        if self.rows:
            part.row_squares = np.einsum("ij,ij->i", moves, moves), np.einsum("ij,ij->i", floats, floats)

    def add(self, part: _Part) -> None:
        """Add what :meth:`measure` gave, in the order of the chunks."""
        self.found.add(part.found)
        if part.head[1].size:
            self._left.append(part.head)
        if part.ends_row:
            whole = _Part(Movement(), 0, first_row=part.first_row - 1)
            floats, moves = (np.concatenate(side) for side in zip(*self._left, strict=True))
            self._measure_rows(whole, floats[None], moves[None], is_sketched=False)
            self._add_rows(whole)
            self._left.clear()
        self._add_rows(part)
        if part.tail[1].size:
            self._left.append(part.tail)

    def _add_rows(self, part: _Part) -> None:
        if part.sketched and part.buffer is not None and self._sketch:
            self._sketch.add(*part.sketched)
            self._buffers.give(part.buffer)
        if part.row_squares and self.rows:
            end = part.first_row + len(part.row_squares[0])
            self.rows.square[part.first_row : end] = part.row_squares[0]
            self.rows.base_square[part.first_row : end] = part.row_squares[1]

    def finish(self) -> None:
        """Call it once all is added."""
        if self._sketch:
            self.found.spectrum = self._sketch.spectrum()
            self._sketch = None


@dataclass(slots=True)
class _Part:
    """What was measured of a row of chunks, of ``nbytes``: sums; the whole rows of the matrix, from
    ``first_row`` on; and W and Δ of the ends of rows, before and behind these. ``ends_row``: the one before
    ends a row that began in an earlier part."""

    found: Movement
    nbytes: int
    head: tuple[Floats, Floats] = NO_FLOATS
    tail: tuple[Floats, Floats] = NO_FLOATS
    ends_row: bool = False
    first_row: int = 0
    sketched: tuple[NDArray[np.float32], float] | None = None
    buffer: NDArray[np.uint8] | None = None
    row_squares: tuple[Floats, Floats] | None = None


def _sample(batches: int) -> frozenset[int]:
    """The numbers of the batches that are sketched: all, if they are few."""
    if batches < _FEW_BATCHES:
        return frozenset(range(batches))
    chosen = random.Random(batches).sample(range(batches), -(-batches // _SKETCHED))  # noqa: S311
    return frozenset(chosen)


def _columns(shape: Sequence[int]) -> int:
    """The width of a tensor as a matrix, cut where its sides are most alike; 0 for vectors."""
    cuts = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
    return max(cuts, key=min)[1] if cuts else 0


def _walk(
    shard: ShardRecipe,
    entries: dict[str, TensorEntry],
    tables: set[str],
    sketched: set[str],
    lane: Lane,
    meter: Meter,
) -> Iterator[tuple[TensorKey, _Measured]]:
    """Measure those tensors of a shard that have ``entries``, in their order."""
    recipes = [recipe for name, recipe in shard.tensors.items() if name in entries]
    shard.target.read_tables(recipes)
    decoded = [recipe for recipe in recipes if not _is_same(recipe, entries[recipe.info.name])]
    at_once = lane.batch_bytes

    scratch, buffers = _Scratch(), Buffers(0)

    def jobs() -> Iterator[tuple[_Measured, int, int, int, bool]]:
        for recipe in recipes:
            name = recipe.info.name
            tensor = _Measured(
                recipe, entries[name], scratch, buffers, is_table=name in tables, is_sketched=name in sketched
            )
            rows = tensor.rows_of_chunks(at_once)
            for number, row in enumerate(rows):
                yield tensor, *row, number, row == rows[-1]

    def run(job: tuple[_Measured, int, int, int, bool]) -> tuple[_Measured, _Part, bool]:
        tensor, *batch, is_last = job
        return tensor, tensor.measure(*batch), is_last

    with _expected(shard.target, recipes, decoded):
        for tensor, part, is_last in lane.map(run, jobs()):
            tensor.add(part)
            meter.add(part.nbytes)
            if is_last:
                tensor.finish()
                yield (shard.file.path, tensor.recipe.info.name), tensor


def _expected(
    target: TargetRecipe, recipes: Iterable[TensorRecipe], decoded: Sequence[TensorRecipe]
) -> ExitStack:
    """Announces all that will be read, so that it is fetched ahead: the base's bytes of all recipes, and the
    payloads of those that are decoded."""

    def base_spans() -> Iterator[Span]:
        for recipe in recipes:
            for index in range(recipe.plan.shared_count):
                yield from recipe.base_spans(index)

    def payloads() -> Iterator[Span]:
        for recipe in decoded:
            for index in range(recipe.plan.shared_count):
                yield recipe.data_span(index)

    with ExitStack() as announced:
        if target.is_remote:
            announced.enter_context(target.source.expect(payloads()))
            if target.base:
                announced.enter_context(target.base.source.expect(base_spans()))
        return announced.pop_all()
