"""Finds low-rank updates, such as merged adapters, from base and target alone.

A sample of rows tells by its spectrum how many components stand out of the rounding noise. :mod:`.fit` makes
their factors exact. Everything here is the encoder's choice: the format knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..constants import FACTOR_BITS, MOST_RANK, WIDE_FACTOR_BITS
from ..kernel_arrays import Floats
from ..methods.chunk import encode_chunk
from .blas import one_blas_thread
from .efforts import EFFORTS, Effort, Schedule
from .fit import GAIN_SHIFT, GAIN_STEPS, Factor, Fitter, Form, Rows, balanced, least_squares, strengths
from .prediction import EXPONENTS, ITEMSIZES, MOST_FACTORS, LowRankPart
from .writing import CodedPart, code_part, joined, nothing_for

__all__ = ["find_low_rank"]

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
#: rows `start` to `stop` of a tensor, as uint8
ReadRows = Callable[[int, int], Bytes]

_LEAST_SIDE, _LEAST_ELEMENTS = 64, 1 << 15  # of a matrix worth a look
_LOOK_PLACES, _LOOK_ROWS, _LOOK_COLUMNS = 2, 12, 2048  # rows at each place: reads take most of a look's time
_LEAST_GAIN = 1e-4  # from 1, of gains that are more than noise
_MULTIPLIED = 8.0  # rows of a base would be this much less like what was added to them
_STANDS_OUT = 2.0  # rows of noise would be this much less alike
_TOGETHER = 4  # rows of a sample that follow each other
_MOST_SAMPLE = 2048  # rows of which the spectrum is taken
_SAMPLE_BYTES = 96 << 20  # of base and target; there is a transposed copy
_UPDATE_BYTES = 64 << 20  # of the update in such a sample
_BLOCK_BYTES = 8 << 20  # of rows that are fitted together at last
_TRIAL_ROWS = 48  # on which grids are compared
#: Added to Hessians, as a part of what they would be if all elements counted; how far Newton's steps go.
_RIDGE, _STEP = 0.01, 1.8
_GAP = 3.0  # between the strengths of two components in a row, where the rest may be noise
_FACTOR_BITS, _ULP_BITS = 9, 7  # what a factor costs, and a weight that is not predicted, about
_COARSER = 3  # how many grids are tried, each coarser than the one before, if factors do not fit
_WORTH = 0.97  # of what the tensor would take otherwise


@dataclass
class _Matrix:
    """A matrix to be read by its rows."""

    read_target: ReadRows
    read_base: ReadRows
    first: int  # in the tensor
    rows: int
    columns: int
    form: Form
    numel: int  # of the tensor

    def read(self, start: int, stop: int) -> Rows:
        """Some rows in a row."""
        found = Rows(stop - start, self.columns, self.form)
        found.target.reshape(-1).view(np.uint8)[:] = self.read_target(self.first + start, self.first + stop)
        found.base.reshape(-1).view(np.uint8)[:] = self.read_base(self.first + start, self.first + stop)
        return found

    def glance(self) -> Rows:
        """A few rows from a few places, or the first elements of them."""
        width, size = min(self.columns, _LOOK_COLUMNS), self.columns * self.form.kind.itemsize
        found = Rows(_LOOK_PLACES * _LOOK_ROWS, width, self.form)
        for k in range(_LOOK_PLACES):
            first = self.first + (self.rows - _LOOK_ROWS) * (2 * k + 1) // (2 * _LOOK_PLACES)
            here = slice(k * _LOOK_ROWS, (k + 1) * _LOOK_ROWS)
            for into, read in ((found.target, self.read_target), (found.base, self.read_base)):
                rows = read(first, first + _LOOK_ROWS).reshape(_LOOK_ROWS, size)
                into[here].view(np.uint8)[:] = rows[:, : width * self.form.kind.itemsize]
        return found

    def spread(self, count: int) -> Rows:
        """About so many rows from all over it, a few together: reads take time."""
        if count >= self.rows:
            return self.read(0, self.rows)
        places = -(-count // _TOGETHER)
        starts = np.linspace(0, self.rows - _TOGETHER, places).round().astype(np.int64)
        chosen = np.unique(starts[:, None] + np.arange(_TOGETHER))
        ends = np.flatnonzero(np.diff(chosen, append=-1) != 1) + 1
        found, at = Rows(len(chosen), self.columns, self.form), 0
        for end in ends.tolist():
            first, stop = self.first + int(chosen[at]), self.first + int(chosen[end - 1]) + 1
            for into, read in ((found.target, self.read_target), (found.base, self.read_base)):
                into[at:end].reshape(-1).view(np.uint8)[:] = read(first, stop)
            at = end
        return found


def find_low_rank(
    read_target_rows: ReadRows,
    read_base_rows: ReadRows,
    shape: Sequence[int],
    dtype: str,
    effort: Effort = "default",
    heights: Sequence[int] | None = None,
) -> bytes | None:
    """Look for low-rank updates in a tensor; the bytes of a :class:`.LowRank`, or None.

    Args:
        read_target_rows, read_base_rows: `read(start, stop)` gives rows of the tensor, all dimensions but the
            last taken as one, as uint8. The base's are in the target's dtype. Rows are read more than once.
        shape: the tensor's.
        dtype: its safetensors code.
        effort: "fast", "default" or "max".
        heights: the rows of each matrix that may have been merged by itself, in order; if None, those of a
            stack's matrices.

    Returns:
        data that should pay for itself, or None.
    """
    if dtype not in ITEMSIZES or len(shape) < 2 or min(shape) < 1:
        return None
    *stacked, rows, columns = shape
    parts, first, saved, form, numel = [], 0, 0.0, Form(dtype), math.prod(shape)
    with np.errstate(all="ignore"):  # weights may be anything; what overflows is no update of low rank
        for height in heights or [rows] * math.prod(stacked):
            matrix = _Matrix(read_target_rows, read_base_rows, first, height, columns, form, numel)
            part, by_rounding = _find_part(matrix, EFFORTS[effort])
            parts.append(part)
            first, saved = first + height, saved + by_rounding
    if not any(part.head.rank for part in parts):
        return None
    return joined(columns, parts, rounded=saved > 0)


def _find_part(matrix: _Matrix, effort: Schedule) -> tuple[CodedPart, float]:
    """What is predicted of a matrix; and the bytes that it saves to round products before they are added."""
    found = None
    if min(matrix.rows, matrix.columns) >= _LEAST_SIDE and matrix.rows * matrix.columns >= _LEAST_ELEMENTS:
        # Weights that are no update of low rank may have no fit that converges.
        with one_blas_thread, suppress(np.linalg.LinAlgError):
            found = _find_product(matrix, effort) if _is_worth_a_look(matrix) else None
    return found or (nothing_for(matrix.rows), 0.0)


def _find_product(matrix: _Matrix, effort: Schedule) -> tuple[CodedPart, float] | None:
    guess = _first_guess(matrix, effort.first)
    if guess is None:
        return None
    right, has_gains = guess
    elements, factors = matrix.rows * matrix.columns, right.shape[1] * (matrix.rows + matrix.columns)
    if factors > min(effort.most_factors * elements, MOST_FACTORS * elements // matrix.numel):
        return None
    sample = matrix.spread(_rows_of_sample(matrix, effort, right.shape[1]))
    if has_gains:
        sample.fit_gains()
    sample, left, right = _fit(sample, matrix.rows, right, effort, has_gains)
    has_gains = float(np.square(sample.gains - 1).mean()) > _LEAST_GAIN**2
    if not has_gains:
        sample.gains[:] = 1
    chosen = _choose_grid(matrix, sample, left, right)
    if chosen is None:
        return None
    del sample, left
    grid, saved = chosen
    for coarser in range(_COARSER):  # rows that are in no sample may have larger factors
        exponent = max(grid.exponent - coarser, EXPONENTS[0])
        if part := _write(matrix, right, grid._replace(exponent=exponent), effort, has_gains):
            return part, saved
    return None


def _is_worth_a_look(matrix: _Matrix) -> bool:
    """Whether rows are more alike than rows of noise."""
    rows = matrix.glance()
    update = rows.update()
    if np.count_nonzero(update) < update.size // 256:
        return False
    if _has_gains(rows, update):
        rows.fit_gains()
        update = rows.update()
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


def _has_gains(rows: Rows, update: Floats) -> bool:
    """Whether rows were multiplied, as DoRA does: the first ones gained what is too much like the base."""
    base = rows.form.values(rows.base[: len(update)])
    sizes = np.einsum("ij,ij->i", update, update) * np.einsum("ij,ij->i", base, base)
    known = (sizes > 0) & np.isfinite(sizes)
    if not known.any():
        return False
    alike = np.square(np.einsum("ij,ij->i", update, base)[known]) / sizes[known]
    return bool(alike.mean() * update.shape[1] > _MULTIPLIED)


def _leaves_gains(rows: Rows, left: Floats, right: Floats) -> bool:
    """Whether a product leaves something that looks as if rows were multiplied as well."""
    every = max(len(rows) // _TRIAL_ROWS, 1)
    few = rows.some(every, _TRIAL_ROWS)
    return _has_gains(few, few.update() - left[::every][: len(few)] @ right.T)


def _first_guess(matrix: _Matrix, rows: int) -> tuple[Floats, bool] | None:
    """The right factor, float32[columns, rank], from the spectrum of a sample of rows; and whether rows were
    multiplied as well."""
    most = min(matrix.rows, _MOST_SAMPLE, _UPDATE_BYTES // (4 * matrix.columns))
    while True:
        sample = matrix.spread(rows)
        update: NDArray[Any] = sample.update()
        if has_gains := _has_gains(sample, sample.update()):
            sample.fit_gains()
            update = sample.update()
        if matrix.form.dtype == "F32":
            update = update.astype(np.float64)  # the rounding is less than a millionth of the update
        found, vectors = np.linalg.eigh(update @ update.T)
        found, vectors = np.maximum(found[::-1], 0), vectors[:, ::-1]
        count, wide = len(found), max(update.shape)
        noise = float(np.median(found[count // 2 :])) / wide
        edge = noise * (np.sqrt(wide) + np.sqrt(min(update.shape))) ** 2
        rank = min(int((found > edge).sum()), count // 4)
        signs = _random_signs(update)
        for _ in range(4):
            if 0 < rank <= count // 2:
                known, rank = rank, int((found > _edge_of_noise(update, vectors[:, :rank], signs)).sum())
                if rank == known:
                    break
        if rank <= count // 4 or rows >= most:
            break
        rows = min(2 * rows, most)
    if rank == 0 or rank > MOST_RANK or rank > count // 2:
        return None
    right: Floats = (update.T @ vectors[:, :rank]).astype(np.float32)
    right /= np.sqrt(np.square(right).mean(axis=0))
    return right, has_gains


def _random_signs(update: NDArray[Any]) -> NDArray[Any]:
    """0 or the sign bit for each element."""
    kind = np.dtype(f"u{update.itemsize}")
    bits = np.unpackbits(np.frombuffer(np.random.default_rng(0).bytes(-(-update.size // 8)), np.uint8))
    shift = kind.type(8 * update.itemsize - 1)
    signs: NDArray[Any] = bits[: update.size].reshape(update.shape).astype(kind) << shift
    return signs


def _edge_of_noise(update: NDArray[Any], strongest: NDArray[Any], signs: NDArray[Any]) -> float:
    """The largest eigenvalue that noise has: of what the strongest components leave, with signs at random. It
    has the same variances, which differ from weight to weight, but no structure."""
    left = update - strongest @ (strongest.T @ update)
    bits = left.view(signs.dtype)
    np.bitwise_xor(bits, signs, out=bits)
    alike = left @ left.T
    vector, size = np.ones(len(left), left.dtype), 0.0
    for _ in range(12):
        vector = alike @ vector
        size = float(np.linalg.norm(vector))
        if not size:
            return 0.0
        vector /= left.dtype.type(size)
    taken = strongest.shape[1] / len(left)  # of the noise, by components that fit it
    return float(1.1 * size / (1 - taken))


def _rows_of_sample(matrix: _Matrix, effort: Schedule, rank: int) -> int:
    affordable = _SAMPLE_BYTES // (2 * matrix.columns * matrix.form.kind.itemsize)
    wanted = max(effort.stages[-1][0], 16 * rank)
    if 1.5 * wanted >= matrix.rows:
        wanted = matrix.rows
    return max(min(wanted, affordable), 2 * rank)


def _fit(
    sample: Rows, whole: int, right: Floats, effort: Schedule, has_gains: bool
) -> tuple[Rows, Floats, Floats]:
    """Some of the rows of a sample of the whole ones, with their gains, and both factors for them, from a
    guess of the right one."""
    known, first = Factor(right), True
    for count, turns in effort.stages:
        every = max(round(len(sample) / max(count, 8 * known.rank)), 1)
        rows = sample.some(every, len(sample)) if every > 1 else sample
        across, left = rows.transposed(), least_squares(rows, known)
        fitter, other = Fitter(rows.columns, known.rank), Fitter(len(rows), known.rank)
        if not first:
            fitter.fit(rows, left, known, ridge=_RIDGE, step=1.0)
        for _ in range(turns):
            step = 1.0 if first else _STEP
            fitter.fit(rows, left, known, ridge=_RIDGE, step=step)
            if first and not has_gains:
                has_gains = _leaves_gains(rows, left.values, known.values)
            if has_gains:
                rows.fit_gains(left.values, known.values)
                across.others[: len(rows)] = rows.gains
            other.fit(across, known, left, ridge=_RIDGE, step=step)
            if first:
                left, known = _without_weak(rows, whole, left, known)
                fitter, other = Fitter(rows.columns, known.rank), Fitter(len(rows), known.rank)
                first = False
    return rows, *balanced(left.values, known.values)


def _without_weak(rows: Rows, whole: int, left: Factor, right: Factor) -> tuple[Factor, Factor]:
    """Both factors, balanced, perhaps without the components behind the widest gap of their strengths. An
    update smaller than most weights' rounding leaves shadows of itself, which cost more than they save."""
    left, right = map(Factor, balanced(left.values, right.values))
    strong = strengths(left.values, right.values)
    ratios = strong[:-1] / np.maximum(strong[1:], strong[0] * 1e-9)
    if not len(ratios) or ratios.max() < _GAP:
        return left, right
    kept = int(ratios.argmax()) + 1
    fewer = Factor(left.values[:, :kept]), Factor(right.values[:, :kept])
    outside = []
    for known in (right, fewer[1]):
        fitter, fitted = Fitter(rows.columns, known.rank), least_squares(rows, known)
        outside += [fitter.fit(rows, fitted, known, ridge=_RIDGE, step=1.0) for _ in range(3)][-1:]
    cost = (right.rank - kept) * (whole + rows.columns) * _FACTOR_BITS
    saved = (outside[1] - outside[0]) / rows.target.size * whole * rows.columns * _ULP_BITS
    return fewer if saved < cost else (left, right)


class _Grid(NamedTuple):
    """The numbers that factors are multiples of: for component k, 2**(shifts[k] - exponent / 2)."""

    exponent: int
    shifts: Integers

    @classmethod
    def of(cls, left: Floats, right: Floats, exponent: int) -> _Grid:
        """The grid for an exponent: the weaker a component, the coarser its own."""
        strong = strengths(left, right)
        shifts = np.rint(0.5 * np.log2(strong[0] / np.maximum(strong, strong[0] * 1e-9)))
        return _Grid(exponent, np.clip(shifts, 0, 12).astype(np.int64))

    @property
    def steps(self) -> NDArray[np.float64]:
        """One for each component."""
        found: NDArray[np.float64] = np.exp2(self.shifts - self.exponent / 2)
        return found

    def numbers(self, factor: Floats) -> Integers:
        """The nearest multiples, before they are shifted."""
        found: Integers = np.rint(factor / self.steps).astype(np.int64)
        return found

    def fits(self, left: Integers, right: Integers, form: Form) -> bool:
        """Whether these multiples can be stored, and their products be added up."""
        shifted = [(numbers << self.shifts).astype(np.float64) for numbers in (left, right)]
        largest = max(float(np.abs(numbers).max(initial=0)) for numbers in shifted)
        longest = [float(np.einsum("ij,ij->i", numbers, numbers).max(initial=0)) for numbers in shifted]
        if form.kind != np.uint16:
            return largest < 1 << WIDE_FACTOR_BITS - 1
        return largest < 1 << FACTOR_BITS - 1 and longest[0] * longest[1] < 1 << 62  # a sum is below 2**31


def _choose_grid(matrix: _Matrix, sample: Rows, left: Floats, right: Floats) -> tuple[_Grid, float] | None:
    """The grid by which some rows and their share of factors take least, and the bytes that rounded products
    would save; None if they take less without."""
    every = max(len(left) // _TRIAL_ROWS, 1)
    rows, known = sample.some(every, _TRIAL_ROWS), left[::every][:_TRIAL_ROWS]
    fitter = Fitter(matrix.columns, right.shape[1])

    share = rows.target.size / (matrix.rows * matrix.columns)

    def size(exponent: int, *, rounded: bool = False) -> float:
        """In bytes; infinite if the factors do not fit."""
        grid = _Grid.of(left, right, exponent)
        given = grid.numbers(right)
        fitted_to = Factor(known)
        fitter.fit(rows, fitted_to, Factor(given * grid.steps), ridge=_RIDGE, step=_STEP)
        fitted = grid.numbers(fitted_to.values)
        if not grid.fits(fitted, given, matrix.form):
            return np.inf
        predicted = _predicted(rows, fitted, given, grid, rounded=rounded)
        found = _coded(rows.target, predicted, matrix.form)
        return found + share * _factor_bytes(left, right, grid, matrix.rows)

    bits = 9 if matrix.form.kind == np.uint16 else 16
    guess = round(2 * (bits - np.log2(np.sqrt(np.square(left[:, 0]).mean()))))
    best, least = _smallest(size, min(max(guess, EXPONENTS[0]), EXPONENTS[1]))
    of_rounded = size(best, rounded=True)
    if min(least, of_rounded) > _WORTH * _coded(rows.target, rows.base, matrix.form):
        return None
    return _Grid.of(left, right, best), (least - of_rounded) / share


def _smallest(size: Callable[[int], float], start: int) -> tuple[int, float]:
    """The exponent of the smallest size, going downhill from one, and that size."""
    best, least = start, size(start)
    for way in (-1, 1):
        tried = start + way
        while EXPONENTS[0] <= tried <= EXPONENTS[1] and (found := size(tried)) < least:
            best, least, tried = tried, found, tried + way
        if best != start:
            break
    return best, least


def _factor_bytes(left: Floats, right: Floats, grid: _Grid, rows: int) -> float:
    """What the factors will take, about."""
    bits = 0.0
    for factor, count in ((left, rows), (right, len(right))):
        spread = np.sqrt(np.square(factor).mean(axis=0)) / grid.steps
        bits += count * float(np.log2(1 + 4.13 * spread).sum())
    return bits / 8


def _coded(target: Any, base: Any, form: Form) -> int:
    """How many bytes a target takes against a base."""
    before, after = (bits.reshape(-1).view(np.uint8) for bits in (base, target))
    return len(encode_chunk(before, after, form.dtype)[1])


def _predicted(rows: Rows, left: Integers, right: Integers, grid: _Grid, *, rounded: bool) -> Any:
    """What rows are predicted to be."""
    numbers = np.concatenate([left, right]) << grid.shifts
    if rows.form.kind == np.uint16 and numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    factors = np.ascontiguousarray(numbers.astype(rows.form.kind))
    part = LowRankPart.of(factors, rows.gains, grid.exponent)
    found = np.empty(rows.base.size, rows.form.kind)
    part.predict(rows.base.reshape(-1), found, 0, rows.form.dtype, rounded=rounded)
    return found


def _write(
    matrix: _Matrix, right: Floats, grid: _Grid, effort: Schedule, has_gains: bool
) -> CodedPart | None:
    """Fit all rows, in blocks, to the right factor on its grid, and code both; None if they do not fit it."""
    given = grid.numbers(right)
    fitter, known = Fitter(matrix.columns, right.shape[1]), Factor(given * grid.steps)
    block = max(_BLOCK_BYTES // (2 * matrix.columns * matrix.form.kind.itemsize), 16)
    numbers, gains = [], []
    for first in range(0, matrix.rows, block):
        rows = matrix.read(first, min(first + block, matrix.rows))
        if has_gains:
            rows.fit_gains()
        left = least_squares(rows, known)
        for number, share in enumerate(effort.shares):
            columns = max(int(share * matrix.columns), min(matrix.columns, 32 * known.rank))
            if has_gains and number in (0, len(effort.shares) - 1):
                rows.fit_gains(left.values, known.values)
            fitter.fit(rows, left, known, ridge=_RIDGE, step=_STEP, columns=columns)
        gains.append(np.rint((rows.gains - 1) * np.float32(GAIN_STEPS)).astype(np.int64))
        numbers.append(grid.numbers(left.values))
    fitted = np.concatenate(numbers)
    if not grid.fits(fitted, given, matrix.form):
        return None
    coded_gains = (np.concatenate(gains), GAIN_SHIFT) if has_gains else None
    part = code_part(fitted, given, grid.exponent, np.stack([grid.shifts, grid.shifts]), coded_gains)
    return part if part.is_dense(matrix.columns) else None
