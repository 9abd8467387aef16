"""Fitting low-rank updates, compiled: for the encoder only.

A weight of the target says in which interval its update lies: the base plus the update rounds to the target.
The rows of one factor are fitted, the other one given, so that as few products as possible leave their
intervals: Newton's method on the squares of what they exceed them by. Only those that do so count.

Factors have whole vectors of components, so their rank is a multiple of 16 here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..kernel_arrays import Elements, Floats, Numbers
from .kernel import array, intrinsic, kernel, room
from .low_rank import Float16
from .vectors import (
    F32,
    I16,
    I32,
    I64,
    WIDTH,
    Vec,
    address,
    call,
    compress,
    int64,
    load_one,
    size_of,
    splat,
    vector_of,
)

_TOGETHER = 4  # elements added to a Hessian
_ENOUGH = 8  # elements for each component in a Hessian
_ROWS = 4  # worked together: each vector of the right factor is loaded once for them
_floats, _matrix = array(types.float32), array(types.float32, 2)
_counts = room(types.int64, _ROWS)
#: No pivot becomes smaller than this part of what was added, or than this.
_LEAST, _ABOVE_ZERO = np.float32(1e-6), np.float32(1e-30)

#: Of each form: where the exponent is and its mask, and the exponent field of a float32 of half an ULP, less
#: the element's. The forms are BF16, F16 and F32.
_FORMS = ((7, 0xFF, -8), (10, 0x1F, 101), (23, 0xFF, -24))


class _Search:
    """Which elements of some rows are outside their intervals, vector after vector of columns."""

    names = ("base", "target", "at", "stride", "gains", "others", "left", "row", "rank", "flipped", "width",
             "count", "form", "places", "excesses", "spare", "counts")  # fmt: skip
    base: ir.Value
    target: ir.Value
    at: ir.Value
    stride: ir.Value
    gains: ir.Value
    others: ir.Value
    left: ir.Value
    row: ir.Value
    rank: ir.Value
    flipped: ir.Value
    width: ir.Value
    count: ir.Value
    form: ir.Value
    places: ir.Value
    excesses: ir.Value
    spare: ir.Value
    counts: ir.Value

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any, rows: int) -> None:
        self.b, self.rows = builder, range(rows)
        for name, kind, value in zip(self.names, signature.args, args, strict=True):
            given = value
            if isinstance(kind, types.Array):
                given = context.make_array(kind)(context, builder, value).data
            setattr(self, name, given)
        self.element = ir.IntType(signature.args[0].dtype.bitwidth)

    def search(self, form: int) -> None:
        b, kind = self.b, vector_of(F32)
        cells = [cgutils.alloca_once_value(b, int64(0)) for _ in self.rows]
        vectors = b.udiv(b.add(self.count, int64(WIDTH - 1)), int64(WIDTH))
        iota = Vec(b, ir.Constant(vector_of(I32), list(range(WIDTH))))
        with cgutils.for_range(b, vectors) as turn:
            column = b.mul(turn.index, int64(WIDTH))
            products = self.products(column, kind)
            place = iota + b.trunc(column, I32)
            inside = place < b.trunc(self.count, I32)
            for r, (product, cell) in enumerate(zip(products, cells, strict=True)):
                excess, mask = self.excess(form, r, column, product)
                mask = mask & inside
                found = b.load(cell, typ=I64)
                into = b.add(b.mul(self.spare, int64(r)), found)
                compress(b, place.value, mask, address(b, self.places, into, I32))
                bits = b.bitcast(excess, vector_of(I32))
                compress(b, bits, mask, address(b, self.excesses, into, I32))
                b.store(b.add(found, mask.count()), cell)
        for r, cell in enumerate(cells):
            b.store(b.load(cell, typ=I64), address(b, self.counts, int64(r), I64), align=8)

    def products(self, column: ir.Value, kind: ir.VectorType) -> list[ir.Value]:
        """What the update of these columns is, in each row."""
        b = self.b
        cells = [cgutils.alloca_once(b, kind) for _ in self.rows]
        for cell in cells:
            b.store(ir.Constant(kind, [0.0] * WIDTH), cell)
        with cgutils.for_range(b, self.rank) as turn:
            where = b.add(b.mul(turn.index, self.width), column)
            right = self.loaded(self.flipped, where, F32)
            for r, cell in enumerate(cells):
                at = b.add(b.mul(b.add(self.row, int64(r)), self.rank), turn.index)
                left = splat(b, load_one(b, self.left, at, F32)).value
                b.store(_sum(b, b.load(cell, typ=kind), left, right), cell)
        return [b.load(cell, typ=kind) for cell in cells]

    def loaded(self, array: ir.Value, at: ir.Value, element: ir.Type) -> ir.Value:
        where = address(self.b, array, at, element)
        return self.b.load(where, typ=vector_of(element), align=size_of(element))

    def excess(self, form: int, r: int, column: ir.Value, product: ir.Value) -> tuple[ir.Value, Vec]:
        """What the products lack of their intervals; and which lack any."""
        b, single = self.b, vector_of(F32)
        at = b.add(b.add(self.at, b.mul(self.stride, int64(r))), column)
        before, after = (Vec(b, self._bits(array, at)) for array in (self.base, self.target))
        shift, top, offset = _FORMS[form]
        exponent = (after >> shift) & top
        field = (exponent < 1).choose(1, exponent) + offset % (1 << 32)
        field = field.negative().choose(1, field)
        width = b.bitcast(((field < 1).choose(1, field) << 23).value, single)
        gain = splat(b, load_one(b, self.gains, b.add(self.row, int64(r)), F32)).value
        gain = b.fmul(gain, self.loaded(self.others, column, F32))
        middle = b.fsub(self._value(after, form), b.fmul(gain, self._value(before, form)))
        lopsided = ((after & ((1 << shift) - 1)) < 1) & (exponent >= 2)
        sign = after & 0x80000000 if form == 2 else (after & 0x8000) << 16
        quarter = Vec(b, b.bitcast(b.fmul(width, _constant(0.25)), vector_of(I32))) | sign
        centre = b.select(lopsided.value, b.fadd(middle, b.bitcast(quarter.value, single)), middle)
        half = b.select(lopsided.value, b.fmul(width, _constant(0.75)), width)
        off = b.fsub(centre, product)
        size = call(b, "llvm.fabs.v16f32", single, [(single, off)])
        outside = Vec(b, b.fcmp_ordered(">", size, half))
        outside = outside & (exponent < top) & (((before >> shift) & top) < top)
        signed = Vec(b, b.bitcast(half, vector_of(I32))) | (
            Vec(b, b.bitcast(off, vector_of(I32))) & 0x80000000
        )
        return b.fsub(off, b.bitcast(signed.value, single)), outside

    def _bits(self, array: ir.Value, at: ir.Value) -> ir.Value:
        found = self.loaded(array, at, self.element)
        return found if self.element == I32 else self.b.zext(found, vector_of(I32))

    def _value(self, bits: Vec, form: int) -> ir.Value:
        if form == 2:
            return self.b.bitcast(bits.value, vector_of(F32))
        return Float16(self.b, half=form == 1).widen(bits)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(vector_of(F32), [value] * WIDTH)


def _sum(builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    kind = total.type
    return call(builder, "llvm.fmuladd.v16f32", kind, [(kind, left), (kind, right), (kind, total)])


def _search(rows: int) -> Callable[..., None]:
    """An intrinsic with the arguments that :class:`_Search` names."""

    @intrinsic
    def f(
        typingctx: Any,
        base: Any,
        target: Any,
        at: Any,
        stride: Any,
        gains: Any,
        others: Any,
        left: Any,
        row: Any,
        rank: Any,
        flipped: Any,
        width: Any,
        count: Any,
        form: Any,
        places: Any,
        excesses: Any,
        spare: Any,
        counts: Any,
    ) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            search = _Search(context, builder, signature, args, rows)
            for form_number in (0, 1) if search.element == I16 else (2,):
                with builder.if_then(builder.icmp_unsigned("==", search.form, int64(form_number))):
                    search.search(form_number)
            return context.get_dummy_value()

        i = types.int64
        first = (base, target, i, i, gains, others, left, i, i, flipped, i, i, i)
        return types.void(*first, places, excesses, i, counts), codegen

    return f


_search_row, _search_rows = _search(1), _search(_ROWS)


@intrinsic
def _add_gradient(
    typingctx: Any, excesses: Any, places: Any, row: Any, count: Any, factors: Any, out: Any
) -> Any:
    """out += what the first `count` of a row's excesses make of the factors at their places."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b, given = builder, _Given(context, builder, signature, args)
        numbers, found, rows, into = (given.data[k] for k in (0, 1, 4, 5))
        first, size = b.mul(args[2], given.width(0)), given.width(4)
        with cgutils.for_range(b, args[3]) as turn:
            at = b.add(first, turn.index)
            scale = splat(b, load_one(b, numbers, at, F32)).value
            place = b.mul(b.zext(load_one(b, found, at, I32), I64), size)
            with cgutils.for_range(b, b.udiv(size, int64(WIDTH))) as block:
                column = b.mul(block.index, int64(WIDTH))
                total, where = given.vector(into, column)
                own, _ = given.vector(rows, b.add(place, column))
                b.store(_sum(b, total, scale, own), where, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(excesses, places, i, i, factors, out), codegen


@intrinsic
def _add_hessian(
    typingctx: Any, places: Any, row: Any, groups: Any, every: Any, factors: Any, out: Any
) -> Any:
    """out += the outer squares of the factors at a row's places, one in `every`, four at a time: of its
    blocks of 16 x 16, those on the diagonal and above."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b, given = builder, _Given(context, builder, signature, args)
        found, rows, into = (given.data[k] for k in (0, 4, 5))
        first, size = b.mul(args[1], given.width(0)), given.width(4)
        end = b.udiv(size, int64(WIDTH))
        with cgutils.for_range(b, args[2]) as group:
            start = b.add(first, b.mul(group.index, b.mul(args[3], int64(_TOGETHER))))
            chosen = [
                b.mul(b.zext(load_one(b, found, b.add(start, b.mul(args[3], int64(k))), I32), I64), size)
                for k in range(_TOGETHER)
            ]
            with cgutils.for_range(b, end) as upper:
                above = b.mul(upper.index, int64(WIDTH))
                with cgutils.for_range_slice(b, upper.index, end, int64(1)) as (block, _):
                    behind = b.mul(block, int64(WIDTH))
                    others = [given.vector(rows, b.add(place, behind))[0] for place in chosen]
                    for lane in range(WIDTH):
                        line = b.add(above, int64(lane))
                        total, where = given.vector(into, b.add(b.mul(line, size), behind))
                        for place, other in zip(chosen, others, strict=True):
                            one = splat(b, load_one(b, rows, b.add(place, line), F32)).value
                            total = _sum(b, total, one, other)
                        b.store(total, where, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(places, i, i, i, factors, out), codegen


class _Given:
    """The arguments of an intrinsic: addresses of arrays, and the lengths of their rows."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        self.b = builder
        self.arrays: list[Any] = [
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else None
            for kind, value in zip(signature.args, args, strict=True)
        ]
        self.data = [known.data if known else None for known in self.arrays]

    def width(self, number: int) -> ir.Value:
        return self.b.extract_value(self.arrays[number].shape, 1)

    def vector(self, array: ir.Value, index: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Sixteen floats, and where they are."""
        where = address(self.b, array, index, F32)
        return self.b.load(where, typ=vector_of(F32), align=4), where


@intrinsic
def _eliminate(typingctx: Any, hessian: Any, values: Any, pivot: Any, inverse: Any, size: Any) -> Any:
    """Subtract row `pivot` from all below it, so that they have 0 in its column; and likewise its value."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b, kind = builder, vector_of(F32)
        matrix, vector = (
            context.make_array(k)(context, b, v).data
            for k, v in zip(signature.args[:2], args[:2], strict=True)
        )
        row, scale, width = args[2:]
        own, end = b.mul(row, width), b.udiv(width, int64(WIDTH))
        value = load_one(b, vector, row, F32)

        def load(line: ir.Value, block: ir.Value) -> tuple[ir.Value, ir.Value]:
            where = address(b, matrix, b.add(line, b.mul(block, int64(WIDTH))), F32)
            return b.load(where, typ=kind, align=4), where

        with cgutils.for_range_slice(b, b.add(row, int64(1)), width, int64(1)) as (other, _):
            factor = b.fneg(b.fmul(load_one(b, matrix, b.add(own, other), F32), scale))
            factors, line = splat(b, factor).value, b.mul(other, width)
            where = address(b, vector, other, F32)
            b.store(b.fadd(b.load(where, typ=F32, align=4), b.fmul(factor, value)), where, align=4)
            with cgutils.for_range_slice(b, b.udiv(other, int64(WIDTH)), end, int64(1)) as (block, _):
                total, where = load(line, block)
                b.store(_sum(b, total, factors, load(own, block)[0]), where, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(hessian, values, i, types.float32, i), codegen


@kernel(types.void(_matrix, _matrix, _floats, types.float32))
def _solve(hessian: Floats, ridge: Floats, values: Floats, weight: Any) -> None:
    """values = (weight * hessian + ridge)^-1 values, by elimination: both are positive."""
    size = len(values)
    for i in range(size):
        for j in range(size):
            hessian[i, j] = weight * hessian[i, j] + ridge[i, j]
    for k in range(size):
        pivot = max(hessian[k, k], ridge[k, k] * _LEAST, _ABOVE_ZERO)
        hessian[k, k] = pivot
        _eliminate(hessian, values, k, np.float32(1) / pivot, size)
    for k in range(size - 1, -1, -1):
        total = values[k]
        for i in range(k + 1, size):
            total -= hessian[k, i] * values[i]
        values[k] = total / hessian[k, k]


@kernel()
def fit_rows(
    base: Elements,
    target: Elements,
    gains: Floats,
    others: Floats,
    form: int,
    left: Floats,
    right: Floats,
    flipped: Floats,
    columns: int,
    ridge: Floats,
    step: float,
    places: Numbers,
    excesses: Floats,
    hessian: Floats,
    gradient: Floats,
) -> int:
    """Move the rows of `left` by one step; how many elements were outside their intervals before.

    base, target   elements of rows x (len(right) - 1), with a vector more
    gains, others  float32[rows] and float32[columns and a vector more], by which base is multiplied
    form           0: BF16, 1: F16, 2: F32
    left           float32[rows, rank]
    right, flipped float32[columns + 1, rank], of which the last are zeros, and the same as [rank, columns and
                   a vector more]
    columns        how many columns are looked at, the first ones
    ridge          float32[rank, rank], added to each Hessian
    step           how far to go
    places, excesses, hessian, gradient   scratch: uint32 and float32 [4, columns and a vector more],
                   float32[rank, rank] and [rank]
    """
    rank, width, stride, found, counts = left.shape[1], flipped.shape[1], len(right) - 1, 0, _counts()
    row, most, spare = 0, _ENOUGH * left.shape[1], places.shape[1]
    while row < len(left):
        rows = _ROWS if row + _ROWS <= len(left) else 1
        if rows == _ROWS:
            _search_rows(base, target, row * stride, stride, gains, others, left, row, rank, flipped, width,
                         columns, form, places, excesses, spare, counts)  # fmt: skip
        else:
            _search_row(base, target, row * stride, stride, gains, others, left, row, rank, flipped, width,
                        columns, form, places, excesses, spare, counts)  # fmt: skip
        for r in range(rows):
            count = counts[r]
            if count == 0:
                continue
            found += count
            hessian[:] = np.float32(0)
            gradient[:] = np.float32(0)
            _add_gradient(excesses, places, r, count, right, gradient)
            every = max(count // most, 1)
            while every == 1 and count % _TOGETHER:
                places[r, count] = stride  # of zeros
                count += 1
            _add_hessian(places, r, count // (_TOGETHER * every), every, right, hessian)
            _solve(hessian, ridge, gradient, np.float32(every))
            far = (
                step if every == 1 else min(step, 1.0)
            )  # a Hessian by sample is not sure enough to go farther
            for k in range(rank):
                left[row + r, k] += np.float32(far) * gradient[k]
        row += rows
    return found
