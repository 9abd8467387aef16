"""The spectrum of an update, from one pass over its rows and in bounded memory.

With rows r of an update Δ, and a random matrix Ω with few columns, the sum of rᵀ(rΩ) is (ΔᵀΔ)Ω. From it
follows the Nyström approximation of ΔᵀΔ, whose eigenvalues are the squared singular values of Δ: never too
large, and close where a few directions hold much.

- N. Halko, P. G. Martinsson, J. A. Tropp: Finding structure with randomness. SIAM Review 53 (2011), 5.5.
- J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher: Fixed-rank approximation of a positive-semidefinite matrix
  from streaming data. NeurIPS 2017, algorithm 3.
- K. L. Clarkson, D. P. Woodruff: Low-rank approximation and regression in input sparsity time. STOC 2013.
- The effective rank is (Σλ)² / Σλ² of these eigenvalues λ: P. L. Bartlett, P. M. Long, G. Lugosi, A. Tsigler:
  Benign overfitting in linear regression. PNAS 117 (2020), definition 3 (R₀).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: The columns of Ω: the directions that are asked for, and some more that make these exact.
_DIRECTIONS, _MORE = 64, 8
_WIDTH = _DIRECTIONS + _MORE

#: Of wide matrices, so many columns are left after the first step.
_BUCKETS = 1024

#: Matrices with longer rows get no spectrum: a sketch takes 288 bytes a column.
MAX_COLUMNS = 1 << 16

#: Where the sketch holds so much of ‖Δ‖², what it does not hold hardly counts for the effective rank.
_NEARLY_ALL = 0.9


@dataclass(frozen=True, slots=True)
class Spectrum:
    """How an update is spread over directions (singular vectors).

    Attributes:
        effective_rank: as many directions of equal strength would have the same spread; from 1 on.
        share_8, share_64: the share of ‖Δ‖² in the strongest 8 and 64 directions, 0 to 1, of the rows that
            were sketched. Never too large for these; too small, by up to a half, where no directions stand
            out.
    """

    effective_rank: float
    share_8: float
    share_64: float


class Sketch:
    """(ΔᵀΔ)Ω of a matrix Δ whose rows come in any order.

    Args:
        columns: its width, at most :data:`MAX_COLUMNS`.
    """

    def __init__(self, columns: int) -> None:
        self._projection = _projection(columns)
        self._sum = np.zeros(self._projection.omega.shape, np.float32)
        self._square = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of a part."""
        return self._sum.nbytes

    def part(self, rows: NDArray[np.float32], out: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
        """What some rows (float32[m, columns]) add, in ``out`` (uint8, :attr:`nbytes`), and their ‖·‖²; any
        thread may work it out."""
        part = out.view(np.float32).reshape(self._sum.shape)
        np.matmul(rows.T, self._projection.apply(rows), out=part)
        flat = rows.reshape(-1)
        return part, float(np.dot(flat, flat))

    def add(self, part: NDArray[np.float32], square: float) -> None:
        """Add what :meth:`part` gave."""
        self._sum += part
        self._square += square

    def spectrum(self) -> Spectrum | None:
        """What the rows so far tell; None where that is nothing."""
        scale, square = float(np.abs(self._sum).max(initial=0)), self._square
        if not (square > 0 and 0 < scale < math.inf):
            return None
        product, omega = self._sum.astype(np.float64) / scale, self._projection.omega.astype(np.float64)
        values = _nystrom(product, omega) * scale
        total = max(square, float(values.sum()))
        squares = float(np.square(values).sum())
        if values.sum() < _NEARLY_ALL * total:  # E‖Aω‖² is ‖A‖² for each column ω of Ω
            squares = max(squares, float(np.square(product).sum()) * scale**2 / omega.shape[1])
        most = math.inf if omega.shape[1] < omega.shape[0] else float(omega.shape[0])
        return Spectrum(
            effective_rank=min(most, max(1.0, total**2 / squares)),
            share_8=min(1.0, float(values[:8].sum()) / total),
            share_64=min(1.0, float(values[:_DIRECTIONS].sum()) / total),
        )


class _Projection:
    """Ω for rows of a width: the same one each time.

    Narrow matrices are not sketched: Ω is the identity. Of wide ones, columns with random signs are added up
    in buckets first, as in a count sketch, and these are multiplied by Gaussian numbers: a fraction of the
    work.
    """

    def __init__(self, columns: int) -> None:
        random = np.random.default_rng(columns)
        groups = max(1, columns // _BUCKETS)
        buckets = columns // groups
        self._signs: NDArray[np.float32] | None = None
        if columns <= _WIDTH:
            self._factor = np.eye(columns, dtype=np.float32)
        else:
            self._factor = random.standard_normal((buckets, _WIDTH), np.float32)
        self.omega = self._factor
        if groups > 1:
            self._signs = random.choice(np.array([-1, 1], np.float32), columns)
            self.omega = self._factor[np.arange(columns) % buckets] * self._signs[:, None]

    def apply(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows times Ω."""
        if self._signs is None:
            return rows @ self._factor
        buckets = len(self._factor)
        whole = rows.shape[1] // buckets * buckets
        folded = np.einsum(
            "rgb,gb->rb",
            rows[:, :whole].reshape(len(rows), -1, buckets),
            self._signs[:whole].reshape(-1, buckets),
        )
        folded[:, : rows.shape[1] - whole] += rows[:, whole:] * self._signs[whole:]
        projected: NDArray[np.float32] = folded @ self._factor
        return projected


@lru_cache(maxsize=8)
def _projection(columns: int) -> _Projection:
    return _Projection(columns)


def _nystrom(product: NDArray[np.float64], omega: NDArray[np.float64]) -> NDArray[np.float64]:
    """The eigenvalues of A, in falling order, from AΩ and Ω."""
    shift = 1e-7 * float(np.linalg.norm(product))  # of float32's rounding, so that the root exists
    core, gram = omega.T @ product, product.T @ product
    squares = omega.T @ omega
    gram += shift * (core + core.T) + shift**2 * squares  # of AΩ + shift Ω
    core = (core + core.T) / 2 + shift * squares
    values, vectors = np.linalg.eigh(core)
    known = values > 1e-12 * values[-1]
    root = vectors[:, known] / np.sqrt(values[known])
    found: NDArray[np.float64] = np.linalg.eigvalsh(root.T @ gram @ root)[::-1] - shift
    return np.maximum(found, 0.0)
