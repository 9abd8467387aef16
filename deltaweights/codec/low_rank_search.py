"""Finds low-rank updates, such as merged adapters, from base and target alone.

A sample of rows tells by its spectrum how many components stand out of the rounding noise. Fitted to the
intervals in which the true values lie (:mod:`.kernels.low_rank_fit`), their factors become so exact that nearly
all weights are predicted to the last bit. Everything here is the encoder's choice: the format knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from .compiled import low_rank_fit as kernels
from .compiled import runs
from .constants import FACTOR_BITS, MOST_RANK, WIDE_FACTOR_BITS
from .kernel_arrays import Floats
from .low_rank import EXPONENTS, HEAD, ITEMSIZES, KIND, MOST_CONTEXTS, NO_GAINS, Part, PartHead
from .methods.chunk import encode_chunk
from .methods.entropy import family, run_space, written
from .tables import DIRECT_BITS

__all__ = ["EFFORTS", "Effort", "find_low_rank"]

Bytes = NDArray[np.uint8]
Bits = NDArray[np.unsignedinteger[Any]]
#: rows `start` to `stop` of a tensor, as uint8
ReadRows = Callable[[int, int], Bytes]

_LEAST_SIDE, _LEAST_ELEMENTS = 64, 1 << 15  # of a matrix worth a look
_LOOK_ROWS, _LOOK_COLUMNS = 64, 2048
_STANDS_OUT = 2.0  # rows of noise would be this much less alike
_FIRST_SAMPLE, _MOST_SAMPLE = 256, 2048  # rows
_SAMPLE_BYTES = 192 << 20  # of base and target
_BLOCK_BYTES = 16 << 20  # of rows that are fitted together at last
_TRIAL_ROWS = 48  # on which grids are compared
_WORTH = 0.97  # of what the tensor would take otherwise


class Effort(NamedTuple):
    """How long to fit.

    Attributes:
        rows: of the sample in which both factors are fitted, at least.
        rounds: how often each factor is.
        turns: Newton's steps for each row at last.
    """

    rows: int
    rounds: int
    turns: int


EFFORTS = {"fast": Effort(512, 3, 3), "default": Effort(1024, 5, 5), "max": Effort(4096, 14, 8)}


@dataclass(frozen=True)
class _Form:
    """A dtype, as the kernels want it."""

    dtype: str
    kind: np.dtype[Any]
    numbers: tuple[int, int, int, int]  # shift, exponents, offset, form

    @classmethod
    def of(cls, dtype: str) -> _Form:
        known = DTYPES[dtype]
        bias = (1 << (known.exponent - 1)) - 1
        number = ("BF16", "F16", "F32").index(dtype)
        offset = 127 - bias - known.mantissa - 1
        return cls(
            dtype,
            np.dtype(f"<u{ITEMSIZES[dtype]}"),
            (known.mantissa, (1 << known.exponent) - 1, offset, number),
        )

    def values(self, bits: Bits) -> Floats:
        """As float32s; 0 for what is not finite."""
        if self.dtype == "BF16":
            found = (bits.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F16":
            found = bits.view(np.float16).astype(np.float32)
        else:
            found = bits.view(np.float32)
        return found if np.isfinite(found).all() else np.where(np.isfinite(found), found, np.float32(0))


class _Rows(NamedTuple):
    """Some rows of a matrix: its target's and its base's."""

    target: Bits  # [rows, columns]
    base: Bits


@dataclass
class _Matrix:
    """A matrix to be read by its rows."""

    read_target: ReadRows
    read_base: ReadRows
    first: int  # in the tensor
    rows: int
    columns: int
    form: _Form

    def read(self, start: int, stop: int) -> _Rows:
        """Some rows in a row."""
        found = (read(self.first + start, self.first + stop) for read in (self.read_target, self.read_base))
        return _Rows(*(np.ascontiguousarray(part).view(self.form.kind).reshape(-1, self.columns) for part in found))

    def spread(self, count: int, columns: int | None = None) -> _Rows:
        """So many rows from all over it, or of each the first `columns` elements."""
        places = np.unique(np.linspace(0, self.rows - 1, min(count, self.rows)).round().astype(np.int64))
        width = columns or self.columns
        found = _Rows(*(np.empty((len(places), width), self.form.kind) for _ in range(2)))
        for k, place in enumerate(places):
            one = self.read(int(place), int(place) + 1)
            found.target[k], found.base[k] = one.target[0, :width], one.base[0, :width]
        return found

    def update(self, rows: _Rows) -> Floats:
        """What was added, to within the rounding."""
        return self.form.values(rows.target) - self.form.values(rows.base)


def find_low_rank(
    read_target_rows: ReadRows, read_base_rows: ReadRows, shape: Sequence[int], dtype: str, effort: str = "default"
) -> bytes | None:
    """Look for low-rank updates in a tensor; the bytes of a :class:`.low_rank.LowRank`, or None.

    Args:
        read_target_rows, read_base_rows: `read(start, stop)` gives rows of the tensor, all dimensions but the
            last taken as one, as uint8. The base's are in the target's dtype. Rows are read more than once.
        shape: the tensor's.
        dtype: its safetensors code.
        effort: "fast", "default" or "max".

    Returns:
        data that should pay for itself, or None.
    """
    if dtype not in ITEMSIZES or len(shape) < 2 or min(shape) < 1:
        return None
    form, columns, rows = _Form.of(dtype), shape[-1], shape[-2]
    count = int(np.prod(shape[:-2], dtype=np.int64))
    parts = []
    for k in range(count):
        matrix = _Matrix(read_target_rows, read_base_rows, k * rows, rows, columns, form)
        parts.append(_find_part(matrix, EFFORTS[effort]))
    if not any(part.head.rank for part in parts):
        return None
    head = HEAD.pack(KIND, 0, columns, len(parts))
    return head + b"".join(part.head.pack() for part in parts) + b"".join(part.data for part in parts)


class _Part(NamedTuple):
    head: PartHead
    data: bytes


def _find_part(matrix: _Matrix, effort: Effort) -> _Part:
    nothing = _Part(PartHead(matrix.rows, 0, 0, 0, NO_GAINS), b"")
    if min(matrix.rows, matrix.columns) < _LEAST_SIDE or matrix.rows * matrix.columns < _LEAST_ELEMENTS:
        return nothing
    if not _is_worth_a_look(matrix):
        return nothing
    right = _first_guess(matrix)
    if right is None:
        return nothing
    sample = matrix.spread(_rows_of_sample(matrix, effort, right.shape[1]))
    left, right = _fit(matrix, sample, right, effort)
    left, right = _balanced(left, right)
    grid = _choose_grid(matrix, sample, left, right, effort)
    if grid is None:
        return nothing
    del sample
    return _write(matrix, right, grid, effort) or nothing


def _is_worth_a_look(matrix: _Matrix) -> bool:
    """Whether rows are more alike than rows of noise."""
    update = matrix.update(matrix.spread(_LOOK_ROWS, min(matrix.columns, _LOOK_COLUMNS)))
    changed = np.count_nonzero(update)
    if changed < update.size // 256:
        return False
    energies = np.einsum("ij,ij->i", update, update)
    update = update[energies > 0] / np.sqrt(energies[energies > 0])[:, None]
    if len(update) < 8:
        return False
    of_columns = np.einsum("ij,ij->j", update, update)
    independent = of_columns.sum() ** 2 / np.square(of_columns).sum()
    alike = update @ update.T
    np.fill_diagonal(alike, 0)
    share = float(np.square(alike).sum()) / (len(update) * (len(update) - 1))
    return bool(share * independent > _STANDS_OUT)


def _first_guess(matrix: _Matrix) -> Floats | None:
    """The right factor, float32[columns, rank], from the spectrum of a sample of rows."""
    rows = _FIRST_SAMPLE
    while True:
        update = matrix.update(matrix.spread(rows))
        found, vectors = np.linalg.eigh(update @ update.T)
        found = np.maximum(found, 0)
        count, wide = len(found), max(update.shape)
        noise = float(np.median(found[: count // 2 + 1])) / wide
        edge = noise * (np.sqrt(wide) + np.sqrt(min(update.shape))) ** 2
        rank = int((found > 1.1 * edge).sum())
        if rank <= count // 4 or rows >= min(matrix.rows, _MOST_SAMPLE):
            break
        rows *= 2
    if rank == 0 or rank > MOST_RANK or rank > count // 2:
        return None
    strongest = vectors[:, ::-1][:, :rank]
    right: Floats = np.ascontiguousarray(update.T @ strongest)
    return right / np.sqrt(np.square(right).mean(axis=0))


def _rows_of_sample(matrix: _Matrix, effort: Effort, rank: int) -> int:
    affordable = _SAMPLE_BYTES // (2 * matrix.columns * matrix.form.kind.itemsize)
    wanted = max(effort.rows, 16 * rank)
    if 2 * wanted >= matrix.rows:
        wanted = matrix.rows
    return max(min(wanted, affordable), 2 * rank)


class _Fitter:
    """Fits rows and columns, with scratch of its own."""

    def __init__(self, matrix: _Matrix, rank: int) -> None:
        self.numbers = matrix.form.numbers
        self.columns, self.rank = matrix.columns, rank
        self.scratch = [np.empty(matrix.columns, np.float32) for _ in range(3)]
        self.hessian, self.gradient = np.empty((rank, rank), np.float32), np.empty(rank, np.float32)
        self.block = min(matrix.columns, max((1 << 20) // (4 * rank * rank), 64))

    def rows(
        self, rows: _Rows, left: Floats, right: Floats, flipped: Floats, ridge: float, part: float, step: float,
        turns: int, *, fresh: bool = False,
    ) -> int:  # fmt: skip
        """Fit left to right, which stays."""
        gains = np.ones(len(left), np.float32)
        inverse = np.linalg.inv(right.T @ right).astype(np.float32) if fresh else self.hessian
        found: int = kernels.fit_rows(
            rows.base.reshape(-1), rows.target.reshape(-1), gains, *self.numbers, left, right, flipped,
            _ridge(right, ridge), inverse, fresh, part, step, turns, *self.scratch, self.hessian, self.gradient,
        )  # fmt: skip
        return found

    def right(
        self, rows: _Rows, left: Floats, right: Floats, flipped: Floats, ridge: float, part: float, step: float
    ) -> int:
        """Fit right and flipped to left, which stays."""
        gains, found = np.ones(len(left), np.float32), 0
        added = _ridge(left, ridge)
        base, target = rows.base.reshape(-1), rows.target.reshape(-1)
        for first in range(0, self.columns, self.block):
            count = min(self.block, self.columns - first)
            hessians = np.zeros((count, self.rank, self.rank), np.float32)
            gradients = np.zeros((count, self.rank), np.float32)
            found += kernels.gather_columns(
                base, target, gains, *self.numbers, self.columns, first, left, flipped, part,
                *(scratch[:count] for scratch in self.scratch), hessians, gradients,
            )  # fmt: skip
            kernels.solve_columns(right, flipped, first, added, step, hessians, gradients)
        return found


def _ridge(factor: Floats, part: float) -> Floats:
    """What is added to Hessians: this part of what they would be if all elements counted."""
    found: Floats = (part * (factor.T @ factor)).astype(np.float32)
    return found


def _fit(matrix: _Matrix, rows: _Rows, right: Floats, effort: Effort) -> tuple[Floats, Floats]:
    """Both factors for some rows, from a guess of the right one."""
    fitter = _Fitter(matrix, right.shape[1])
    update = matrix.update(rows)
    left = np.ascontiguousarray(update @ right @ np.linalg.inv(right.T @ right)).astype(np.float32)
    del update
    flipped = np.ascontiguousarray(right.T)
    for turn in range(effort.rounds):
        part = min(0.9 + 0.1 * turn / max(effort.rounds - 2, 1), 1.0)
        fitter.rows(rows, left, right, flipped, 0.01, part, 1.8 if turn else 1.0, 1)
        fitter.right(rows, left, right, flipped, 0.01, part, 1.8 if turn else 1.0)
    return left, right


def _balanced(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    """The same product by orthogonal components of equally large factors, the strongest first."""
    first, of_first = np.linalg.qr(left.astype(np.float64))
    second, of_second = np.linalg.qr(right.astype(np.float64))
    one, sizes, other = np.linalg.svd(of_first @ of_second.T)
    left, right = first @ one, second @ other.T  # of unit length
    ratio = np.sqrt(len(left) / len(right))
    left, right = left * np.sqrt(sizes * ratio), right * np.sqrt(sizes / ratio)
    return left.astype(np.float32), right.astype(np.float32)


class _Grid(NamedTuple):
    """The numbers that factors are multiples of: for component k, 2**(shifts[k] - exponent / 2)."""

    exponent: int
    shifts: NDArray[np.int64]

    @property
    def steps(self) -> NDArray[np.float64]:
        """One for each component."""
        found: NDArray[np.float64] = 2.0 ** (self.shifts - self.exponent / 2)
        return found

    def numbers(self, factor: Floats) -> NDArray[np.int64]:
        """The nearest multiples, before they are shifted."""
        found: NDArray[np.int64] = np.rint(factor / self.steps).astype(np.int64)
        return found

    def fits(self, left: NDArray[np.int64], right: NDArray[np.int64], form: _Form) -> bool:
        """Whether these multiples can be stored, and their products be added up."""
        largest = [np.abs(numbers << self.shifts).max(axis=0, initial=0) for numbers in (left, right)]
        most = 1 << (FACTOR_BITS if form.kind.itemsize == 2 else WIDE_FACTOR_BITS) - 1
        sums = int((largest[0].astype(object) * largest[1].astype(object)).sum())
        return max(map(max, largest)) < most and (form.kind.itemsize == 4 or sums < 1 << 31)


def _grids(left: Floats, right: Floats, exponent: int) -> _Grid:
    """The grid for an exponent: the weaker a component, the coarser its own."""
    strength = np.sqrt(np.square(left).mean(axis=0) * np.square(right).mean(axis=0))
    shifts = np.rint(0.5 * np.log2(strength[0] / np.maximum(strength, strength[0] * 1e-9)))
    return _Grid(exponent, np.clip(shifts, 0, 12).astype(np.int64))


def _factor_bits(left: Floats, right: Floats, grid: _Grid, rows: int) -> float:
    """What the factors will take, about."""
    bits = 0.0
    for factor, count in ((left, rows), (right, len(right))):
        spread = np.sqrt(np.square(factor).mean(axis=0)) / grid.steps
        bits += count * float(np.log2(1 + 4.13 * spread).sum())
    return bits


def _choose_grid(matrix: _Matrix, sample: _Rows, left: Floats, right: Floats, effort: Effort) -> _Grid | None:
    """The grid by which some rows and their share of the factors take least; None if they take less without."""
    every = max(len(left) // _TRIAL_ROWS, 1)
    rows = _Rows(*(np.ascontiguousarray(part[::every][:_TRIAL_ROWS]) for part in sample))
    known = np.ascontiguousarray(left[::every][:_TRIAL_ROWS])
    share = rows.target.size / (matrix.rows * matrix.columns)
    fitter = _Fitter(matrix, right.shape[1])

    def size(exponent: int) -> float:
        """In bytes; infinite if the factors do not fit."""
        grid = _grids(left, right, exponent)
        given = grid.numbers(right)
        coarse = (given * grid.steps).astype(np.float32)
        here = known.copy()
        fitter.rows(rows, here, coarse, np.ascontiguousarray(coarse.T), 0.02, 1.0, 1.5, 2)
        fitted = grid.numbers(here)
        if not grid.fits(fitted, given, matrix.form):
            return np.inf
        found = _coded(rows.target, _predicted(matrix.form, rows.base, fitted, given, grid), matrix.form)
        return found + share * _factor_bits(left, right, grid, matrix.rows) / 8

    strongest = np.sqrt(np.square(left[:, 0]).mean())
    exponent = round(2 * (9 - np.log2(strongest))) if matrix.form.kind.itemsize == 2 else round(2 * (16 - np.log2(strongest)))
    exponent = min(max(exponent, EXPONENTS[0]), EXPONENTS[1])
    best, least = exponent, size(exponent)
    for way in (-1, 1):
        for tried in range(exponent + way, exponent + 12 * way, way):
            if not EXPONENTS[0] <= tried <= EXPONENTS[1] or (found := size(tried)) >= least:
                break
            best, least = tried, found
        if best != exponent:
            break
    if least > _WORTH * _coded(rows.target, rows.base, matrix.form):
        return None
    return _grids(left, right, best)


def _coded(target: Bits, base: Bits, form: _Form) -> int:
    """How many bytes a target takes against a base."""
    data = encode_chunk(base.reshape(-1).view(np.uint8), target.reshape(-1).view(np.uint8), form.dtype)[1]
    return len(data)


def _predicted(form: _Form, base: Bits, left: NDArray[np.int64], right: NDArray[np.int64], grid: _Grid) -> Bits:
    """What rows are predicted to be."""
    numbers = np.concatenate([left, right]) << grid.shifts
    if form.kind.itemsize == 2 and numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    part = Part.of(np.ascontiguousarray(numbers.astype(form.kind)), np.ones(len(left), np.float32), grid.exponent)
    found = np.empty(base.size, form.kind)
    part.predict(base.reshape(-1), found, 0, form.dtype, rounded=False)
    return found


def _write(matrix: _Matrix, right: Floats, grid: _Grid, effort: Effort) -> _Part | None:
    """Fit all rows to the right factor on its grid, block after block, and code both; None if they do not fit."""
    given = grid.numbers(right)
    coarse = (given * grid.steps).astype(np.float32)
    flipped = np.ascontiguousarray(coarse.T)
    fitter = _Fitter(matrix, right.shape[1])
    block = max(_BLOCK_BYTES // (2 * matrix.columns * matrix.form.kind.itemsize), 1)
    numbers = []
    for first in range(0, matrix.rows, block):
        rows = matrix.read(first, min(first + block, matrix.rows))
        left = np.zeros((len(rows.base), right.shape[1]), np.float32)
        fitter.rows(rows, left, coarse, flipped, 0.02, 1.0, 1.5, effort.turns, fresh=True)
        numbers.append(grid.numbers(left))
    fitted = np.concatenate(numbers)
    if not grid.fits(fitted, given, matrix.form):
        return None
    data, contexts = _coded_factors(np.concatenate([fitted, given]))
    shifts = (grid.shifts * 17).astype(np.uint8).tobytes()
    head = PartHead(matrix.rows, right.shape[1], grid.exponent, contexts, NO_GAINS)
    return _Part(head, shifts + len(data).to_bytes(4, "little") + data)


def _coded_factors(numbers: NDArray[np.int64]) -> tuple[bytes, int]:
    """The shortest run of factors, and how many contexts it has."""
    rank = numbers.shape[1]
    values = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers).astype(np.uint32).reshape(-1)
    best: tuple[bytes, int] = (b"", 0)
    for contexts in sorted({1, min(rank, 4), min(rank, 16), min(rank, MOST_CONTEXTS)}):
        of_each = PartHead(1, rank, 0, contexts, NO_GAINS).context_of_each()
        here = np.ascontiguousarray(np.broadcast_to(of_each, numbers.shape)).reshape(-1)
        space = run_space(len(values), contexts)
        members = np.zeros(contexts, np.int64)
        end = runs.encode_run(here, values, members, family(), DIRECT_BITS, 32, 0, np.inf, space, 0)
        data = written(space, end)
        if not best[1] or len(data) < len(best[0]):
            best = data, contexts
    return best
