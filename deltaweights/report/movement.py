"""How far weights moved from the base's: sums over a run of elements, which add up to those of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from .spectrum import Spectrum

#: float32; float64 for F64.
Floats: TypeAlias = NDArray[np.floating[Any]]

NO_FLOATS: tuple[Floats, Floats] = np.empty(0, np.float32), np.empty(0, np.float32)

#: Elements that are worked on at once: their floats fit a core's cache, and sums in float32 stay exact to
#: some parts in a million.
_PIECE = 1 << 16

#: Squares of larger numbers, which only F64 has, may be infinite.
_TOO_LARGE = 1e140


@dataclass(slots=True)
class Movement:
    """How far weights moved. W are the base's, Δ is what the target adds. Norms are Frobenius norms.

    Attributes:
        elements: how many were compared.
        moved: how many differ, as bytes.
        base_square: ‖W‖².
        square: ‖Δ‖².
        dot: the sum of W times Δ.
        largest: the largest |Δ|.
        not_finite: elements of which base or target is infinite, NaN or absurdly large; other sums leave them
            out.
        spectrum: of Δ, where it is a matrix.
    """

    elements: int = 0
    moved: int = 0
    base_square: float = 0.0
    square: float = 0.0
    dot: float = 0.0
    largest: float = 0.0
    not_finite: int = 0
    spectrum: Spectrum | None = field(default=None, compare=False)

    @property
    def norm(self) -> float:
        """‖Δ‖."""
        return math.sqrt(self.square)

    @property
    def relative(self) -> float | None:
        """‖Δ‖ / ‖W‖; None where all W are 0."""
        return math.sqrt(self.square / self.base_square) if self.base_square > 0 else None

    @property
    def moved_share(self) -> float | None:
        """The share of the elements that moved."""
        return self.moved / self.elements if self.elements else None

    @property
    def angle_part(self) -> float | None:
        """1 - cosine of W and W + Δ, exact also where it is tiny; None where one of them is 0."""
        target_square = max(0.0, self.base_square + 2 * self.dot + self.square)
        both = math.sqrt(self.base_square) * math.sqrt(target_square)
        if not both > 0:
            return None
        lengths = (2 * self.dot + self.square) / (math.sqrt(target_square) + math.sqrt(self.base_square))
        return min(2.0, max(0.0, (self.square - lengths * lengths) / (2 * both)))

    @property
    def cosine(self) -> float | None:
        """The cosine of W and W + Δ; None where one of them is 0."""
        part = self.angle_part
        return None if part is None else 1 - part

    def add(self, other: Movement) -> None:
        """Count another run of elements in. Spectra are left as they are."""
        self.elements += other.elements
        self.moved += other.moved
        self.base_square += other.base_square
        self.square += other.square
        self.dot += other.dot
        self.largest = max(self.largest, other.largest)
        self.not_finite += other.not_finite


def combined(movements: Iterable[Movement]) -> Movement:
    """Those of several tensors as one. Its spectrum is the mean of theirs, weighted by ‖Δ‖²."""
    every, whole = list(movements), Movement()
    for one in every:
        whole.add(one)
    spectra = [(one.spectrum, one.square) for one in every if one.spectrum and one.square > 0]
    total = sum(weight for _, weight in spectra)
    if spectra:
        whole.spectrum = Spectrum(
            *(
                sum(getattr(one, name) * weight for one, weight in spectra) / total
                for name in ("effective_rank", "share_8", "share_64")
            )
        )
    return whole


def has_floats(dtype: str) -> bool:
    """Whether :func:`measure` gives more than counts for a dtype."""
    known = DTYPES.get(dtype)
    return known is not None and known.exponent > 0


def measure(
    base: NDArray[np.uint8],
    target: NDArray[np.uint8],
    dtype: str,
    keep_base: Floats | None = None,
    keep_moves: Floats | None = None,
) -> Movement:
    """Measure a run of whole elements.

    Args:
        base, target: their bytes (uint8, little-endian), of the same length and dtype.
        dtype: a safetensors code.
        keep_base, keep_moves: where W, and Δ, are written to as floats (1-D, of :func:`float_dtype`); what is
            not finite is 0 in both. None: nowhere.
    """
    found = Movement()
    if not has_floats(dtype):
        known = DTYPES.get(dtype)
        size = (known and known.itemsize) or 1
        size = size if target.size % size == 0 else 1
        found.elements = target.size // size
        found.moved = int(np.count_nonzero((base != target).reshape(-1, size).any(axis=1)))
        return found
    word = f"<u{DTYPES[dtype].bits // 8}"
    old_words, new_words = base.view(word), target.view(word)
    count = old_words.size
    spare = np.empty((2, min(_PIECE, count)), float_dtype(dtype))
    for start in range(0, count, _PIECE):
        end = min(start + _PIECE, count)
        old = spare[0, : end - start] if keep_base is None else keep_base[start:end]
        new = spare[1, : end - start] if keep_moves is None else keep_moves[start:end]
        _to_floats(old_words[start:end], dtype, old)
        _to_floats(new_words[start:end], dtype, new)
        found.add(_measure_piece(old, new))
        found.moved += int(np.count_nonzero(old_words[start:end] != new_words[start:end]))
    return found


def measure_base(base: NDArray[np.uint8], dtype: str) -> Movement:
    """:func:`measure` where the target has the base's bytes."""
    if not has_floats(dtype):
        return measure(base, base, dtype)
    words = base.view(f"<u{DTYPES[dtype].bits // 8}")
    found, spare = Movement(elements=words.size), np.empty(min(_PIECE, words.size), float_dtype(dtype))
    for start in range(0, words.size, _PIECE):
        end = min(start + _PIECE, words.size)
        floats = spare[: end - start]
        _to_floats(words[start:end], dtype, floats)
        with np.errstate(invalid="ignore", over="ignore"):
            square = float(np.dot(floats, floats))
        if not math.isfinite(square):
            bad = _unusable(floats)
            found.not_finite += int(np.count_nonzero(bad))
            floats[bad] = 0
            wide = floats.astype(np.float64)
            square = float(np.dot(wide, wide))
        found.base_square += square
    return found


def float_dtype(dtype: str) -> type[np.floating[Any]]:
    """The dtype of floats that hold the values of a dtype exactly."""
    return np.float64 if dtype == "F64" else np.float32


def _measure_piece(old: Floats, new: Floats) -> Movement:
    """Turns ``new`` into Δ."""
    with np.errstate(invalid="ignore", over="ignore"):
        moves = np.subtract(new, old, out=new)
        squares = [float(np.dot(a, b)) for a, b in ((old, old), (moves, moves), (old, moves))]
    not_finite = 0
    if not all(map(math.isfinite, squares)):
        bad = _unusable(old) | _unusable(moves)
        not_finite = int(np.count_nonzero(bad))
        old[bad] = moves[bad] = 0
        wide, far = old.astype(np.float64), moves.astype(np.float64)
        squares = [float(np.dot(a, b)) for a, b in ((wide, wide), (far, far), (wide, far))]
    largest = max(float(moves.max()), -float(moves.min())) if moves.size else 0.0
    return Movement(old.size, 0, squares[0], squares[1], squares[2], largest, not_finite)


def _unusable(floats: Floats) -> NDArray[np.bool_]:
    bad = ~np.isfinite(floats)
    return bad | (np.abs(floats) > _TOO_LARGE) if floats.dtype == np.float64 else bad


def _to_floats(words: NDArray[Any], dtype: str, out: Floats) -> None:
    if dtype == "BF16":
        np.left_shift(words, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif dtype in ("F16", "F32", "F64"):
        out[:] = words.view(np.dtype(DTYPES[dtype].numpy))
    else:
        np.take(_table(dtype), words, out=out)


@cache
def _table(dtype: str) -> NDArray[np.float32]:
    """The value of each byte of an 8-bit float, by the layouts of https://arxiv.org/abs/2209.05433: E4M3 has
    no infinities and one NaN, E5M2 is as in IEEE 754."""
    exponent, mantissa = DTYPES[dtype].exponent, DTYPES[dtype].mantissa
    codes = np.arange(256)
    power, rest = (codes >> mantissa) & ((1 << exponent) - 1), codes & ((1 << mantissa) - 1)
    bias, top = (1 << (exponent - 1)) - 1, (1 << exponent) - 1
    normal = np.ldexp(1 + rest / (1 << mantissa), power - bias)
    values = np.where(power > 0, normal, np.ldexp(rest / (1 << mantissa), 1 - bias))
    if dtype == "F8_E4M3":
        values[(power == top) & (rest == (1 << mantissa) - 1)] = np.nan
    else:
        values[power == top] = np.where(rest[power == top] == 0, np.inf, np.nan)
    return np.where(codes < 128, values, -values).astype(np.float32)
