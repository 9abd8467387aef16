"""Fits the factors of a low-rank update to some rows of base and target, for :mod:`.search`.

Least squares find a product that is right to within a part of the rounding. But the rounding also says in
which interval each weight's update lies. Of two factors fitted in turns, so that few products leave these
intervals, the product predicts nearly all weights to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiled import low_rank_fit
from ..kernel_arrays import Floats
from .prediction import ITEMSIZES

__all__ = [
    "GAIN_SHIFT",
    "GAIN_STEPS",
    "Factor",
    "Fitter",
    "Form",
    "Rows",
    "balanced",
    "least_squares",
    "strengths",
]

Bits = NDArray[Any]
_LANES = 16  # components of a vector, which the kernels take together
_FORMS = ("BF16", "F16", "F32")  # as the kernels number them
GAIN_SHIFT = 5  # of what gains are multiples of
GAIN_STEPS, MOST_GAIN = 1 << 23 - GAIN_SHIFT, 0.4  # how many of them make 1; how far gains are from 1
_TILE = 128  # rows and columns that are transposed together
_LEAST_SQUARES = 24  # columns for each component that a row's fit begins with


@dataclass(frozen=True)
class Form:
    """A dtype."""

    dtype: str

    @property
    def kind(self) -> np.dtype[Any]:
        """The unsigned integers that hold its bits."""
        return np.dtype(f"u{ITEMSIZES[self.dtype]}")

    @property
    def number(self) -> int:
        """The kernels' number of it."""
        return _FORMS.index(self.dtype)

    def values(self, bits: Bits) -> Floats:
        """As float32s."""
        if self.dtype == "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.view(np.float16).astype(np.float32) if self.dtype == "F16" else bits.view(np.float32)


class Rows:
    """Some rows of a matrix, as unsigned integers: its target's and its base's.

    Attributes:
        gains: float32[rows], what rows of the base are multiplied by.
        others: float32[columns and a vector more], the same for columns: in a transposed copy.
    """

    def __init__(self, rows: int, columns: int, form: Form) -> None:
        """Room for them, and for a vector more, which the kernels may read."""
        self.form, self.columns = form, columns
        self.flat_target, self.flat_base = (np.zeros(rows * columns + _LANES, form.kind) for _ in range(2))
        self.gains, self.others = np.ones(rows, np.float32), np.ones(columns + _LANES, np.float32)
        self.target = self.flat_target[: rows * columns].reshape(rows, columns)
        self.base = self.flat_base[: rows * columns].reshape(rows, columns)

    def __len__(self) -> int:
        """How many rows."""
        return len(self.target)

    def some(self, every: int, most: int) -> Rows:
        """A copy of one row in so many."""
        places = range(0, len(self), every)[:most]
        found = Rows(len(places), self.columns, self.form)
        found.target[:], found.base[:] = self.target[places], self.base[places]
        found.gains[:] = self.gains[places]
        return found

    def transposed(self) -> Rows:
        """A copy in which columns are rows."""
        found = Rows(self.columns, len(self), self.form)
        for into, bits in ((found.target, self.target), (found.base, self.base)):
            _transpose(bits, into)
        found.others[: len(self)] = self.gains
        return found

    def update(self, columns: int | None = None) -> Floats:
        """What was added, to within the rounding, or 0 if that is no number; of the first columns, if so many
        are named."""
        target, base = (self.form.values(bits[:, :columns]) for bits in (self.target, self.base))
        with np.errstate(invalid="ignore", over="ignore"):
            found: Floats = target - base * self.gains[:, None]
        return _finite(found)

    def fit_gains(self, left: Floats | None = None, right: Floats | None = None) -> None:
        """Set the gains by least squares, the product of these factors, if any, being added."""
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            target, base = self.form.values(self.target), _finite(self.form.values(self.base))
            rest = target - base
            if left is not None and right is not None:
                rest -= left @ right.T
            found = np.einsum("ij,ij->i", _finite(rest), base) / np.einsum("ij,ij->i", base, base)
        found[~(np.abs(found) < MOST_GAIN)] = 0
        self.gains[:] = 1 + np.rint(found * GAIN_STEPS) / GAIN_STEPS


def _finite(values: Floats) -> Floats:
    """The values, or 0 for those that are no numbers."""
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, np.float32(0))


def _transpose(bits: Bits, into: Bits) -> None:
    """In tiles that stay in the cache."""
    for first in range(0, bits.shape[0], _TILE):
        for column in range(0, bits.shape[1], _TILE):
            tile = bits[first : first + _TILE, column : column + _TILE]
            into[column : column + _TILE, first : first + _TILE] = tile.copy().T


class Factor:
    """One factor, as the kernels want it: with whole vectors of components, those behind its own being 0.

    Attributes:
        rank: without them.
        rows: float32[rows + 1, whole vectors]; in the last row are zeros.
        flipped: float32[whole vectors, rows and a vector more], the same.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        count, self.rank = values.shape
        width = -(-self.rank // _LANES) * _LANES
        self.rows = np.zeros((count + 1, width), np.float32)
        self.rows[:count, : self.rank] = values
        self.flipped = np.zeros((width, count + _LANES), np.float32)
        self.flip()

    def flip(self) -> None:
        """Make `flipped` say what `rows` says."""
        self.flipped[:, : len(self.rows)] = self.rows.T

    @property
    def values(self) -> Floats:
        """float32[rows, rank]"""
        return self.rows[:-1, : self.rank]


class Fitter:
    """Fits one factor to the other, with scratch of its own."""

    def __init__(self, columns: int, rank: int) -> None:
        width = -(-rank // _LANES) * _LANES
        self._places = np.empty((4, columns + _LANES), np.uint32)
        self._excesses = np.empty((4, columns + _LANES), np.float32)
        self._hessian, self._gradient = np.empty((width, width), np.float32), np.empty(width, np.float32)

    def fit(
        self,
        rows: Rows,
        left: Factor,
        right: Factor,
        *,
        ridge: float,
        step: float,
        columns: int | None = None,
    ) -> int:
        """Move left by one step, right being given; by the first columns, if so many are named.

        Returns:
            how many elements were outside their intervals.
        """
        # to each Hessian this part is added of what it would be if all elements counted
        added = (ridge * (right.rows.T @ right.rows)).astype(np.float32)
        found: int = low_rank_fit.fit_rows(
            rows.flat_base, rows.flat_target, rows.gains, rows.others, rows.form.number, left.rows[:-1],
            right.rows, right.flipped, min(columns or rows.columns, rows.columns), added, step, self._places,
            self._excesses, self._hessian, self._gradient,
        )  # fmt: skip
        left.flip()
        return found


def least_squares(rows: Rows, right: Factor) -> Factor:
    """The left factor of a product that is close to the update in some columns."""
    columns = min(rows.columns, max(_LEAST_SQUARES * right.rank, 256))
    known = right.values[:columns]
    gram = (known.T @ known).astype(np.float64)
    gram += np.diag(1e-6 * np.diag(gram) + 1e-30)
    return Factor((rows.update(columns) @ known) @ np.linalg.inv(gram).astype(np.float32))


def balanced(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    """The same product by orthogonal components of equally large factors, the strongest first."""
    first, of_first = np.linalg.qr(left.astype(np.float64))
    second, of_second = np.linalg.qr(right.astype(np.float64))
    one, sizes, other = np.linalg.svd(of_first @ of_second.T)
    ratio = np.sqrt(len(left) / len(right))
    left_sizes, right_sizes = np.sqrt(sizes * ratio), np.sqrt(sizes / ratio)
    return (first @ one * left_sizes).astype(np.float32), (second @ other.T * right_sizes).astype(np.float32)


def strengths(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Of the balanced factors' components: the standard deviation of what they add."""
    found: NDArray[np.float64] = np.sqrt(np.square(left).mean(axis=0) * np.square(right).mean(axis=0))
    return found
