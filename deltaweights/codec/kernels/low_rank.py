"""Low-rank predictions, compiled: what a base becomes when the product of two matrices is added to it.

Factors are integers, and so is every dot product: exact, in whatever order it is summed. What then happens to
floats is the same few operations, each rounded to nearest even, for every element on every machine.
tests/codec/reference.py says the same in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..constants import BLOCK, FACTOR_BITS, GUARD, LANES, PREDICTED_AT_ONCE, TAIL, WIDE_FACTOR_BITS
from ..kernel_arrays import Bytes, Doubles, Elements, Floats, Longs, Numbers, Words
from ..tables import DIRECT_BITS
from . import runs
from .kernel import intrinsic, kernel, room
from .vectors import F32, F64, I16, I32, Vec, address, call, dot_pairs, int64, load_one, size_of, splat

_ROWS = 4  # worked together: each vector of the right factor is loaded once for them
_LANES, _WIDE_LANES = PREDICTED_AT_ONCE, PREDICTED_AT_ONCE // 2
_states, _settings, _rest = room(types.uint32, 64), room(types.int64, 4), room(types.int64, 64)
_block_of_bytes, _block_of_numbers = room(types.uint8, BLOCK), room(types.uint32, BLOCK)
_some_words, _other_words = room(types.uint16, _LANES), room(types.uint16, _LANES)
_some_numbers, _other_numbers = room(types.uint32, _WIDE_LANES), room(types.uint32, _WIDE_LANES)


@kernel()
def decode_factors(
    data: Bytes,
    shifts: Bytes,
    contexts: Bytes,
    members: Longs,
    family: Numbers,
    frequencies: Numbers,
    slots: Numbers,
    words: Words,
    first_rows: int,
    out: Elements,
) -> bool:
    """Fill the first columns of out (unsigned[rows, at least rank]) from a run; False where it is none.

    data         uint8, all of the run
    shifts       uint8[rank], by how much factors are shifted: in the low four bits those in the first rows,
                 so many as `first_rows` says, and in the high four bits the others
    contexts     uint8[rank], the context of each column, below len(members)
    members      int64, each context's member of the family
    frequencies, slots, words   scratch, as in :func:`.runs.open_run`
    """
    states, settings, rest = _states(), _settings(), _rest()
    settings[TAIL] = 0
    rest[:] = 0
    count = runs.open_run(data, members, family, DIRECT_BITS, frequencies, slots, states, settings, words)
    if count < 0:
        return False
    words = words[:count]
    here, values, cursor = _block_of_bytes(), _block_of_numbers(), 0
    rank, bits = len(contexts), FACTOR_BITS if out.itemsize == 2 else WIDE_FACTOR_BITS
    row, column, total = 0, 0, len(out) * rank
    for first in range(0, total, BLOCK):
        length = min(BLOCK, total - first)
        at = column
        for i in range(length):
            here[i] = contexts[at]
            at = at + 1 if at + 1 < rank else 0
        cursor = runs.decode_values(words, cursor, slots, here[:length], values, settings, states, rest)
        if cursor > len(words) - GUARD:
            return False
        for i in range(length):
            value, shift = np.int64(values[i]), np.int64(shifts[column])
            shift = shift & 15 if row < first_rows else shift >> 4
            if value >> (bits - shift):
                return False
            out[row, column] = ((value >> 1) ^ -(value & 1)) << shift
            column += 1
            if column == rank:
                row, column = row + 1, 0
    return runs.ended_well(words, cursor, settings[LANES], states)


class Float16(NamedTuple):
    """Lanes of 32 bits that hold elements of 16."""

    builder: ir.IRBuilder
    half: bool  # F16; else BF16

    @property
    def not_finite(self) -> int:
        """The magnitude from which on elements are infinite, or no number."""
        return 0x7C00 if self.half else 0x7F80

    def widen(self, bits: Vec) -> ir.Value:
        """Finite elements as float32s."""
        b = self.builder
        if not self.half:
            return b.bitcast((bits << 16).value, _vector(F32, bits))
        magnitude = b.bitcast(((bits & 0x7FFF) << 13).value, _vector(F32, bits))
        scaled = b.fmul(magnitude, ir.Constant(magnitude.type, [2.0**112] * bits.value.type.count))
        whole = Vec(b, b.bitcast(scaled, bits.value.type)) | ((bits & 0x8000) << 16)
        return b.bitcast(whole.value, scaled.type)

    def narrow(self, value: ir.Value) -> Vec:
        """Float32s rounded to nearest even; those too large become infinite."""
        b = self.builder
        bits = Vec(b, b.bitcast(value, ir.VectorType(I32, value.type.count)))
        if not self.half:
            return (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
        raised = b.fadd(
            b.bitcast(magnitude.value, value.type), ir.Constant(value.type, [0.5] * value.type.count)
        )
        tiny = Vec(b, b.bitcast(raised, bits.value.type)) - 0x3F000000
        usual = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13
        found = (magnitude < 0x38800000).choose(tiny, usual)
        found = (magnitude >= 0x47800000).choose(0x7C00, found)
        return found | sign

    def rounded(self, value: ir.Value) -> ir.Value:
        """Float32s, rounded to the elements' type."""
        b, found = self.builder, self.narrow(value)
        if not self.half:
            return self.widen(found)
        infinite = (found & 0x7FFF) >= 0x7C00
        bits = Vec(b, b.bitcast(self.widen(found), found.value.type))
        limit = ((found & 0x8000) << 16) | 0x7F800000
        return b.bitcast(infinite.choose(limit, bits).value, value.type)


def _vector(element: ir.Type, like: Vec) -> ir.VectorType:
    return ir.VectorType(element, like.value.type.count)


class _Tile:
    """Some rows of a matrix, vector after vector of columns."""

    names = ("base", "at", "out", "into", "stride", "left", "row", "right", "column", "width", "pairs",
             "gains", "factor", "mode", "vectors")  # fmt: skip
    base: ir.Value
    at: ir.Value
    out: ir.Value
    into: ir.Value
    stride: ir.Value
    left: ir.Value
    row: ir.Value
    right: ir.Value
    column: ir.Value
    width: ir.Value
    pairs: ir.Value
    gains: ir.Value
    factor: ir.Value
    mode: ir.Value
    vectors: ir.Value

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any, rows: int) -> None:
        self.b, self.rows = builder, range(rows)
        for name, kind, value in zip(self.names, signature.args, args, strict=True):
            given = value
            if isinstance(kind, types.Array):
                given = context.make_array(kind)(context, builder, value).data
            setattr(self, name, given)

    def row_of(self, r: int) -> ir.Value:
        return self.b.add(self.row, int64(r))

    def place(self, first: ir.Value, r: int, column: ir.Value) -> ir.Value:
        return self.b.add(self.b.add(first, self.b.mul(self.stride, int64(r))), column)

    def loaded(self, array: ir.Value, at: ir.Value, kind: ir.VectorType) -> ir.Value:
        where = address(self.b, array, at, kind.element)
        return self.b.load(where, typ=kind, align=size_of(kind.element))

    def sums(
        self, column: ir.Value, start: ir.Constant, step: Callable[[ir.Value, ir.Value, ir.Value], ir.Value]
    ) -> list[ir.Value]:
        """For each row what `step(sum, factor of the row, factors of the columns)` adds up to."""
        b, kind = self.b, start.type
        cells = [cgutils.alloca_once(b, kind) for _ in self.rows]
        for cell in cells:
            b.store(start, cell)
        with cgutils.for_range(b, self.pairs) as turn:
            where = b.add(b.mul(turn.index, self.width), b.add(self.column, column))
            right = self.loaded(self.right, where, kind)
            for r, cell in zip(self.rows, cells, strict=True):
                at = b.add(b.mul(self.row_of(r), self.pairs), turn.index)
                left = splat(b, load_one(b, self.left, at, kind.element), kind.count)
                b.store(step(b.load(cell, typ=kind), left.value, right), cell)
        return [b.load(cell, typ=kind) for cell in cells]

    def gain(self, r: int, lanes: int) -> ir.Value:
        return splat(self.b, load_one(self.b, self.gains, self.row_of(r), F32), lanes).value

    def predict_16(self, *, half: bool, rounded: bool) -> None:
        b, form = self.b, Float16(self.b, half)
        factor = splat(b, b.fptrunc(self.factor, F32), _LANES).value
        zeros = ir.Constant(ir.VectorType(I32, _LANES), [0] * _LANES)
        with cgutils.for_range(b, self.vectors) as turn:
            column = b.mul(turn.index, int64(_LANES))
            sums = self.sums(column, zeros, lambda total, left, right: dot_pairs(b, total, left, right))
            for r, total in zip(self.rows, sums, strict=True):
                bits = self.loaded(self.base, self.place(self.at, r, column), ir.VectorType(I16, _LANES))
                before = Vec(b, b.zext(bits, zeros.type))
                gain = self.gain(r, _LANES)
                product = b.fmul(b.sitofp(total, factor.type), factor)
                if rounded:
                    product = form.rounded(product)
                after = form.narrow(b.fadd(b.fmul(form.widen(before), gain), product))
                kept = Vec(b, b.icmp_unsigned("==", total, zeros))
                kept &= Vec(b, b.fcmp_ordered("==", gain, ir.Constant(gain.type, [1.0] * _LANES)))
                kept |= (before & 0x7FFF) >= form.not_finite
                found = b.trunc(kept.choose(before, after).value, bits.type)
                b.store(found, address(b, self.out, self.place(self.into, r, column), I16), align=2)

    def predict_32(self, *, rounded: bool) -> None:
        b, lanes = self.b, _WIDE_LANES
        kind, single = ir.VectorType(F64, lanes), ir.VectorType(F32, lanes)
        factor, zeros = splat(b, self.factor, lanes).value, ir.Constant(kind, [0.0] * lanes)

        def add_product(total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
            """In one operation where the processor has it: nothing is rounded."""
            name = f"llvm.fmuladd.v{lanes}f64"
            return call(b, name, kind, [(kind, left), (kind, right), (kind, total)])

        with cgutils.for_range(b, self.vectors) as turn:
            column = b.mul(turn.index, int64(lanes))
            for r, total in zip(self.rows, self.sums(column, zeros, add_product), strict=True):
                bits = self.loaded(self.base, self.place(self.at, r, column), ir.VectorType(I32, lanes))
                before, gain = Vec(b, bits), self.gain(r, lanes)
                product = b.fmul(total, factor)
                if rounded:
                    product = b.fpext(b.fptrunc(product, single), kind)
                scaled = b.fmul(b.fpext(b.bitcast(bits, single), kind), b.fpext(gain, kind))
                after = Vec(b, b.bitcast(b.fptrunc(b.fadd(scaled, product), single), bits.type))
                kept = Vec(b, b.fcmp_ordered("==", total, zeros))
                kept &= Vec(b, b.fcmp_ordered("==", gain, ir.Constant(single, [1.0] * lanes)))
                kept |= (before & 0x7FFFFFFF) >= 0x7F800000
                where = address(b, self.out, self.place(self.into, r, column), I32)
                b.store(kept.choose(before, after).value, where, align=4)


#: What `mode` says: F16 instead of BF16, and whether products are rounded.
_HALF, _ROUNDED = 1, 2


def _tile(rows: int, wide: bool) -> Callable[..., None]:
    """An intrinsic with the arguments that :class:`_Tile` names."""

    @intrinsic
    def f(
        typingctx: Any,
        base: Any,
        at: Any,
        out: Any,
        into: Any,
        stride: Any,
        left: Any,
        row: Any,
        right: Any,
        column: Any,
        width: Any,
        pairs: Any,
        gains: Any,
        factor: Any,
        mode: Any,
        vectors: Any,
    ) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            tile = _Tile(context, builder, signature, args, rows)
            for number in (0, _ROUNDED) if wide else range(4):
                with builder.if_then(builder.icmp_unsigned("==", tile.mode, int64(number))):
                    if wide:
                        tile.predict_32(rounded=bool(number & _ROUNDED))
                    else:
                        tile.predict_16(half=bool(number & _HALF), rounded=bool(number & _ROUNDED))
            return context.get_dummy_value()

        i = types.int64
        kinds = (base, i, out, i, i, left, i, right, i, i, i, gains, types.float64, i, i)
        return types.void(*kinds), codegen

    return f


_one_row, _four_rows = _tile(1, wide=False), _tile(_ROWS, wide=False)
_one_wide_row, _four_wide_rows = _tile(1, wide=True), _tile(_ROWS, wide=True)


@kernel()
def predict(
    base: Words,
    out: Words,
    start: int,
    columns: int,
    left: Numbers,
    right: Numbers,
    gains: Floats,
    factor: float,
    half: bool,
    rounded: bool,
) -> None:
    """Fill out from base: elements of 16 bits of a matrix, the first of them element number `start`.

    left     uint32[rows, pairs], pairs of 16-bit factors
    right    uint32[pairs, columns + PREDICTED_AT_ONCE], likewise
    gains    float32[rows], what the base is multiplied by
    factor   what the dot products are multiplied by: a power of two
    half     whether elements are F16; else they are BF16
    rounded  whether products are rounded to the elements' type before they are added
    """
    mode = (_HALF if half else 0) + (_ROUNDED if rounded else 0)
    pairs, width, at = left.shape[1], right.shape[1], 0
    some, found = _some_words(), _other_words()
    while at < len(base):
        row, column = (start + at) // columns, (start + at) % columns
        rows = _ROWS if column == 0 and len(base) - at >= _ROWS * columns else 1
        length = min(columns - column, len(base) - at)
        vectors = length // _LANES
        if rows == _ROWS:
            _four_rows(
                base, at, out, at, columns, left, row, right, 0, width, pairs, gains, factor, mode, vectors
            )
        else:
            _one_row(
                base,
                at,
                out,
                at,
                columns,
                left,
                row,
                right,
                column,
                width,
                pairs,
                gains,
                factor,
                mode,
                vectors,
            )
        whole = vectors * _LANES
        if whole < length:
            for r in range(rows):
                first = at + r * columns + whole
                for i in range(length - whole):
                    some[i] = base[first + i]
                _one_row(some, 0, found, 0, columns, left, row + r, right, column + whole, width, pairs,
                         gains, factor, mode, 1)  # fmt: skip
                for i in range(length - whole):
                    out[first + i] = found[i]
        at += rows * length


@kernel()
def predict_wide(
    base: Numbers,
    out: Numbers,
    start: int,
    columns: int,
    left: Doubles,
    right: Doubles,
    gains: Floats,
    factor: float,
    rounded: bool,
) -> None:
    """:func:`predict` for elements of 32 bits, with factors as doubles: float64[rows, rank] and
    float64[rank, columns + PREDICTED_AT_ONCE]."""
    mode = _ROUNDED if rounded else 0
    pairs, width, at = left.shape[1], right.shape[1], 0
    some, found = _some_numbers(), _other_numbers()
    while at < len(base):
        row, column = (start + at) // columns, (start + at) % columns
        rows = _ROWS if column == 0 and len(base) - at >= _ROWS * columns else 1
        length = min(columns - column, len(base) - at)
        vectors = length // _WIDE_LANES
        if rows == _ROWS:
            _four_wide_rows(
                base, at, out, at, columns, left, row, right, 0, width, pairs, gains, factor, mode, vectors
            )
        else:
            _one_wide_row(
                base,
                at,
                out,
                at,
                columns,
                left,
                row,
                right,
                column,
                width,
                pairs,
                gains,
                factor,
                mode,
                vectors,
            )
        whole = vectors * _WIDE_LANES
        if whole < length:
            for r in range(rows):
                first = at + r * columns + whole
                for i in range(length - whole):
                    some[i] = base[first + i]
                _one_wide_row(some, 0, found, 0, columns, left, row + r, right, column + whole, width, pairs,
                              gains, factor, mode, 1)  # fmt: skip
                for i in range(length - whole):
                    out[first + i] = found[i]
        at += rows * length
