"""Fitting low-rank updates, compiled: for the encoder only.

A weight of the target says in which interval its update lies: the base plus the update rounds to the target.
Rows (or columns) of one factor are fitted, the other one given, so that as few products as possible leave their
intervals: Newton's method on the squares of what they exceed them by, in which only those that do count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ..kernel_arrays import Elements, Floats
from .kernel import array, intrinsic, kernel

_floats, _matrix = array(types.float32), array(types.float32, 2)


@intrinsic
def _single_of(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


_tiny_scale = np.float32(2.0**112)
_least, _above_zero = np.float32(1e-6), np.float32(1e-30)  # no pivot becomes smaller than that part of what was added
_one, _quarter, _three_quarters, _never = np.float32(1), np.float32(0.25), np.float32(0.75), np.float32(1e38)


@kernel(inline="always")
def _value(bits: Any, form: int) -> Any:
    """A finite element as a float32; form is 0 for BF16, 1 for F16, 2 for F32."""
    whole = np.uint32(bits)
    if form == 0:
        return _single_of(np.uint32(whole << np.uint32(16)))
    if form == 1:
        magnitude = _single_of(np.uint32((whole & np.uint32(0x7FFF)) << np.uint32(13))) * _tiny_scale
        return -magnitude if whole & np.uint32(0x8000) else magnitude
    return _single_of(whole)


@kernel()
def _intervals(
    base: Elements, target: Elements, first: int, gain: Any, shift: int, exponents: int, offset: int, form: int,
    centre: Floats, half: Floats,
) -> None:  # fmt: skip
    """The intervals of updates, for len(centre) elements from `first` on, as their centres and half widths."""
    mantissa = np.uint32((1 << shift) - 1)
    top = np.uint32(exponents)
    for j in range(len(centre)):
        b, t = np.uint32(base[first + j]), np.uint32(target[first + j])
        exponent, before = (t >> np.uint32(shift)) & top, (b >> np.uint32(shift)) & top
        field = max(np.int32(max(exponent, np.uint32(1))) + np.int32(offset), np.int32(1))
        width = _single_of(np.uint32(np.uint32(field) << np.uint32(23)))
        value = _value(t, form)
        middle = value - gain * _value(b, form)
        lopsided = (t & mantissa) == np.uint32(0) and exponent > np.uint32(1)
        quarter = width * _quarter
        shifted = middle + (-quarter if value < np.float32(0) else quarter)
        finite = exponent != top and before != top
        centre[j] = (shifted if lopsided else middle) if finite else np.float32(0)
        half[j] = (width * _three_quarters if lopsided else width) if finite else _never


@kernel(types.void(_floats, _matrix, types.int64, _floats))
def _products(row: Floats, right: Floats, first: int, out: Floats) -> None:
    """What the update is, for len(out) columns from `first` on."""
    for j in range(len(out)):
        out[j] = np.float32(0)
    for k in range(len(row)):
        factor, column = row[k], right[k]
        for j in range(len(out)):
            out[j] += factor * column[first + j]


@kernel(types.void(_floats, _floats, _floats, types.float32))
def _excess(product: Floats, centre: Floats, half: Floats, part: Any) -> None:
    """What the products lack of the intervals, of which only the inner part counts."""
    for j in range(len(product)):
        off, room = centre[j] - product[j], half[j] * part
        product[j] = max(off - room, np.float32(0)) + min(off + room, np.float32(0))


@kernel(types.void(types.float32, _floats, _floats, _matrix))
def _gather(excess: Any, factors: Floats, gradient: Floats, hessian: Floats) -> None:
    """Add one element's part to the lower half of a Hessian, and to a gradient."""
    for a in range(len(factors)):
        factor, row = factors[a], hessian[a]
        gradient[a] += excess * factor
        for b in range(a + 1):
            row[b] += factor * factors[b]


@kernel(types.void(_matrix, _matrix, _floats))
def _solve(hessian: Floats, ridge: Floats, values: Floats) -> None:
    """values = (hessian + ridge)^-1 values; the hessian's lower half becomes its factors L and D of L D L^T."""
    size = len(values)
    for i in range(size):
        row = hessian[i]
        for j in range(i):  # first L D,
            total = row[j] + ridge[i, j]
            for k in range(j):
                total -= row[k] * hessian[j, k]
            row[j] = total
        total = row[i] + ridge[i, i]
        for k in range(i):  # then L
            scaled = row[k] / hessian[k, k]
            total -= scaled * row[k]
            row[k] = scaled
        row[i] = max(total, ridge[i, i] * _least, _above_zero)
    for i in range(size):
        total = values[i]
        for k in range(i):
            total -= hessian[i, k] * values[k]
        values[i] = total
    for i in range(size - 1, -1, -1):
        total = values[i] / hessian[i, i]
        for k in range(i + 1, size):
            total -= hessian[k, i] * values[k]
        values[i] = total


@kernel(types.void(_floats, _matrix, _matrix, _floats, _floats))
def _least_squares(values: Floats, factors: Floats, inverse: Floats, sums: Floats, out: Floats) -> None:
    """out = inverse (factors^T values)"""
    size = len(sums)
    sums[:] = np.float32(0)
    for j in range(len(values)):
        value, row = values[j], factors[j]
        for k in range(size):
            sums[k] += value * row[k]
    for k in range(size):
        total = np.float32(0)
        for a in range(size):
            total += inverse[k, a] * sums[a]
        out[k] = total


@kernel()
def fit_rows(
    base: Elements, target: Elements, gains: Floats, shift: int, exponents: int, offset: int, form: int,
    left: Floats, right: Floats, flipped: Floats, ridge: Floats, inverse: Floats, fresh: bool, part: float,
    step: float, turns: int, centre: Floats, half: Floats, product: Floats, hessian: Floats, gradient: Floats,
) -> int:  # fmt: skip
    """Fit the rows of `left`; how many elements were outside their intervals before the last turn.

    base, target   elements of rows x columns
    gains          float32[rows], by which base is multiplied
    shift, exponents   of the elements' exponents: (bits >> shift) & exponents
    offset         the exponent field of a float32 of half an ULP is an element's and this
    left           float32[rows, rank]; changed
    right, flipped float32[columns, rank] and the same as [rank, columns]
    ridge          float32[rank, rank], added to each Hessian
    inverse        float32[rank, rank], of right^T right
    fresh          whether to begin with the least squares instead of with what left holds
    part           what part of the intervals counts
    step           how far to go in each turn
    centre, half, product, hessian, gradient   scratch: float32[columns] three times, [rank, rank], [rank]
    """
    columns, found = len(right), 0
    for i in range(len(left)):
        _intervals(base, target, i * columns, gains[i], shift, exponents, offset, form, centre, half)
        row = left[i]
        if fresh:
            _least_squares(centre, right, inverse, gradient, row)
        for turn in range(turns):
            _products(row, flipped, 0, product)
            _excess(product, centre, half, np.float32(part))
            hessian[:] = np.float32(0)
            gradient[:] = np.float32(0)
            outside = 0
            for j in range(columns):
                if product[j] != np.float32(0):
                    outside += 1
                    _gather(product[j], right[j], gradient, hessian)
            if outside == 0:
                break
            _solve(hessian, ridge, gradient)
            for k in range(len(row)):
                row[k] += np.float32(step) * gradient[k]
            if turn == turns - 1:
                found += outside
    return found


@kernel()
def gather_columns(
    base: Elements, target: Elements, gains: Floats, shift: int, exponents: int, offset: int, form: int,
    columns: int, first: int, left: Floats, flipped: Floats, part: float,
    centre: Floats, half: Floats, product: Floats, hessians: Floats, gradients: Floats,
) -> int:  # fmt: skip
    """Add to Hessians and gradients, float32[n, rank, rank] and [n, rank], of n columns from `first` on; how
    many elements are outside their intervals. The others as in :func:`fit_rows`, with scratch of n elements."""
    found = 0
    for i in range(len(left)):
        _intervals(base, target, i * columns + first, gains[i], shift, exponents, offset, form, centre, half)
        _products(left[i], flipped, first, product)
        _excess(product, centre, half, np.float32(part))
        for j in range(len(product)):
            if product[j] != np.float32(0):
                found += 1
                _gather(product[j], left[i], gradients[j], hessians[j])
    return found


@kernel()
def solve_columns(
    right: Floats, flipped: Floats, first: int, ridge: Floats, step: float, hessians: Floats, gradients: Floats
) -> None:
    """Move the columns from `first` on, whose factors are in `right` and `flipped`, by what was gathered."""
    for j in range(len(gradients)):
        _solve(hessians[j], ridge, gradients[j])
        for k in range(gradients.shape[1]):
            right[first + j, k] += np.float32(step) * gradients[j, k]
            flipped[k, first + j] = right[first + j, k]


@kernel()
def count_outside(
    base: Elements, target: Elements, gains: Floats, shift: int, exponents: int, offset: int, form: int,
    left: Floats, flipped: Floats, centre: Floats, half: Floats, product: Floats,
) -> int:  # fmt: skip
    """How many elements are outside their intervals; arguments as in :func:`fit_rows`."""
    found, columns = 0, flipped.shape[1]
    for i in range(len(left)):
        _intervals(base, target, i * columns, gains[i], shift, exponents, offset, form, centre, half)
        _products(left[i], flipped, 0, product)
        _excess(product, centre, half, _one)
        for j in range(columns):
            found += product[j] != np.float32(0)
    return found
