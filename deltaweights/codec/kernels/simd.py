"""The two loops that must be fast, written as LLVM vector operations for Numba.

`decode_64`, `encode_64` and the like do the bulk of every token run for :mod:`.runs`.
One *step* codes 64 (or 16) consecutive values, lane `i` taking value `i`; a step is worked in four
(or one) vectors of sixteen 32-bit elements, which is what an AVX-512 register holds. LLVM lowers
the same operations to AVX2 or NEON, where a register holds fewer.

The arithmetic is that of tests/codec/reference.py, line for line; the operations on vectors are in
:mod:`.vectors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import Signature

from ..constants import RING, WAYS
from .kernel import intrinsic
from .vectors import (
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    WIDTH,
    Vec,
    address,
    bring,
    compress,
    compress_before,
    expand_load,
    firm_load,
    gather,
    int64,
    load,
    load_one,
    prefetch,
    splat,
    store,
    vector_of,
)

#: How many vectors after they were written keys are counted: what was written has to have arrived.
_BEHIND = 4


class _Loop:
    """What both directions share: array pointers, lane states and the word cursor."""

    names: tuple[str, ...]  # of the arguments, which become attributes
    words: ir.Value
    table: ir.Value
    states: ir.Value
    at: ir.Value
    steps: ir.Value
    precision: ir.Value

    def __init__(
        self,
        context: Any,
        builder: ir.IRBuilder,
        signature: Signature,
        args: list[ir.Value],
        vectors: int,
    ) -> None:
        self.b = builder
        self.vectors = range(vectors)
        for name, kind, value in zip(self.names, signature.args, args, strict=True):
            if isinstance(kind, types.Array):
                value = context.make_array(kind)(context, builder, value).data  # noqa: PLW2901
            setattr(self, name, value)
        self.cell = cgutils.alloca_once_value(builder, self.at)
        self.lanes = []
        for v in self.vectors:
            start = load(builder, I32, self.states, int64(v * WIDTH))
            self.lanes.append(cgutils.alloca_once_value(builder, start.value))
        self.bits = splat(builder, builder.trunc(self.precision, I32))
        #: Raw bits that follow a token without a refill in between.
        self.inline = Vec(builder, self.bits._lift(16)) - self.bits

    def get(self, v: int) -> Vec:
        return Vec(self.b, self.b.load(self.lanes[v], typ=vector_of(I32)))

    def set(self, v: int, state: Vec) -> None:
        self.b.store(state.value, self.lanes[v])

    def cursor(self) -> ir.Value:
        return self.b.load(self.cell, typ=I64)

    def finish(self) -> ir.Value:
        """Write the lane states back and return the cursor."""
        for v in self.vectors:
            store(self.b, self.get(v), self.states, int64(v * WIDTH))
        return self.cursor()

    def refill(self, v: int, state: Vec) -> None:
        """Decoding: every lane below 2**16 takes one word of the stream."""
        mask = state < 65536
        where = address(self.b, self.words, self.cursor(), I16)
        words = expand_load(self.b, where, vector_of(I16), mask)
        word = self.b.zext(words, vector_of(I32))
        self.set(v, mask.choose((state << 16) | Vec(self.b, word), state))
        self.b.store(self.b.add(self.cursor(), mask.count()), self.cell)

    def spill(self, state: Vec, mask: Vec) -> Vec:
        """Encoding: every lane in `mask` puts its low word in front of the stream."""
        at = compress_before(self.b, state, mask, self.words, self.cursor())
        self.b.store(at, self.cell)
        return mask.choose(state >> 16, state)


class _ReadLoop(_Loop, ABC):
    """Decoding."""

    end: ir.Value
    tail: ir.Value  # only where values come from an array of contexts

    @abstractmethod
    def begin(self, place: Callable[[int], ir.Value]) -> None:
        """Prepare a step."""

    @abstractmethod
    def context(self, v: int, place: ir.Value) -> Vec:
        """The contexts of vector `v`, whose first value is at `place`."""

    @abstractmethod
    def put(self, values: list[Vec], place: Callable[[int], ir.Value]) -> None:
        """Take a step's values."""


class _ValueLoop(_ReadLoop):
    """Decoding: contexts come from an array, values go to one."""

    names = ("words", "table", "contexts", "values", "states", "at", "end", "steps", "precision", "tail")
    contexts: ir.Value
    values: ir.Value

    def begin(self, place: Callable[[int], ir.Value]) -> None:
        """Nothing to prepare for a step."""

    def context(self, v: int, place: ir.Value) -> Vec:
        return load(self.b, I8, self.contexts, place)

    def put(self, values: list[Vec], place: Callable[[int], ir.Value]) -> None:
        for v, value in zip(self.vectors, values, strict=True):
            store(self.b, value, self.values, place(v))


class _FloatLoop(_ReadLoop):
    """Decoding: contexts come from the base's elements, and the target's go out; nothing else is stored.

    Elements have 8 or 16 bits and are worked 32 at a time, in lanes of 16 bits.
    """

    names = ("words", "table", "base", "out", "states", "at", "end", "steps", "precision", "shift",
             "mask", "scales", "log_segment", "first", "lowest", "step", "last", "ahead")  # fmt: skip
    base: ir.Value
    out: ir.Value
    shift: ir.Value
    mask: ir.Value
    scales: ir.Value
    log_segment: ir.Value
    first: ir.Value
    lowest: ir.Value
    step: ir.Value
    last: ir.Value
    ahead: ir.Value

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Signature, args: list[ir.Value],
                 vectors: int) -> None:  # fmt: skip
        super().__init__(context, builder, signature, args, vectors)
        self.element = ir.IntType(signature.args[self.names.index("base")].dtype.bitwidth)
        self.kind = ir.VectorType(I16, 2 * WIDTH)
        self.elements: list[Vec] = []
        self.contexts: list[Vec] = []

    def begin(self, place: Callable[[int], ir.Value]) -> None:
        """Load the step's elements; their contexts (see `context_vectors`)."""
        at = [place(v) for v in self.vectors[::2]]
        self.elements = [_load_as(self.b, (self.base, self.element), where, self.kind) for where in at]
        arguments = (self.shift, self.mask, self.scales, self.log_segment, self.first, self.lowest,
                     self.step, self.last)  # fmt: skip
        self.contexts = [
            _contexts_of(self.b, bits, where, *arguments)
            for bits, where in zip(self.elements, at, strict=True)
        ]
        for where in at:
            prefetch(self.b, self.out, where, self.element)
            bring(self.b, self.base, self.b.add(where, self.ahead), self.element, writes=False)

    def context(self, v: int, place: ir.Value) -> Vec:
        half = self.contexts[v // 2].value
        first = WIDTH * (v % 2)
        places = ir.Constant(vector_of(I32), list(range(first, first + WIDTH)))
        part = self.b.shuffle_vector(half, half, places)
        return Vec(self.b, self.b.zext(part, vector_of(I32)))

    def put(self, values: list[Vec], place: Callable[[int], ir.Value]) -> None:
        words = ir.Constant(ir.VectorType(I32, 2 * WIDTH), list(range(0, 4 * WIDTH, 2)))
        for half, bits in enumerate(self.elements):
            low, high = (self.b.bitcast(value.value, self.kind) for value in values[2 * half : 2 * half + 2])
            zigzag = Vec(self.b, self.b.shuffle_vector(low, high, words))
            restored = _restored(bits, zigzag, self.element.width)
            _store_as(self.b, restored, (self.out, self.element), place(2 * half))


def _any(loop: _Loop, masks: list[Vec]) -> ir.Value:
    total = masks[0]
    for mask in masks[1:]:
        total = total | mask
    return total.any()


def _decode_slot(loop: _ReadLoop, v: int, place: ir.Value) -> Vec:
    """What each lane of vector `v` holds next (see runs.fill_slots)."""
    one = Vec(loop.b, loop.bits._lift(1))
    low = loop.get(v) & ((one << loop.bits) - 1)
    return gather(loop.b, loop.table, (loop.context(v, place) << loop.bits) | low)


def _take_token(loop: _ReadLoop, v: int, slot: Vec) -> None:
    loop.set(v, ((slot >> 11) & 4095) * (loop.get(v) >> loop.bits) + (slot & 2047))


def _decode_step_wide(loop: _ReadLoop, place: Callable[[int], ir.Value]) -> None:
    """One step whose tokens may carry raw bits."""
    b = loop.b
    slots, values = _decode_inline(loop, place)
    cells = [cgutils.alloca_once_value(b, value.value) for value in values]
    most = slots[0]
    for slot in slots[1:]:
        most = (most < slot).choose(slot, most)
    with b.if_then((most >= ((loop.inline + 1) << 27)).any(), likely=False):
        first, second = _beyond_inline(loop, slots)
        _decode_raw(loop, cells, first)
        with b.if_then(_any(loop, [s.nonzero() for s in second]), likely=False):
            _decode_raw(loop, cells, second)
    loop.put([Vec(b, b.load(cell, typ=vector_of(I32))) for cell in cells], place)


def _decode_step_raw(loop: _ReadLoop, place: Callable[[int], ir.Value]) -> None:
    """The same where many tokens carry more raw bits than are inline.

    No branch has to be foreseen: to have been wrong costs as much as the gathers that were begun for nothing.
    """
    slots, values = _decode_inline(loop, place)
    first, second = _beyond_inline(loop, slots)
    values = [_take_bits(loop, v, values[v], first[v]) for v in loop.vectors]
    cells = [cgutils.alloca_once_value(loop.b, value.value) for value in values]
    with loop.b.if_then(_any(loop, [s.nonzero() for s in second]), likely=False):
        _decode_raw(loop, cells, second)
    loop.put([Vec(loop.b, loop.b.load(cell, typ=vector_of(I32))) for cell in cells], place)


def _decode_inline(loop: _ReadLoop, place: Callable[[int], ir.Value]) -> tuple[list[Vec], list[Vec]]:
    """(slots, values) of a step, of the values' raw bits those that are inline."""
    loop.begin(place)
    slots = [_decode_slot(loop, v, place(v)) for v in loop.vectors]  # gathers first: they overlap
    values = []
    for v, slot in zip(loop.vectors, slots, strict=True):
        _take_token(loop, v, slot)
        count = (slot >> 27).at_most(loop.inline)
        values.append(_take_bits(loop, v, (slot >> 23) & 15, count))
    return slots, values


def _beyond_inline(loop: _ReadLoop, slots: list[Vec]) -> tuple[list[Vec], list[Vec]]:
    """How many raw bits the second and the third pull take."""
    rest = [(slot >> 27).less(loop.inline) for slot in slots]
    first = [r.at_most(16) for r in rest]
    return first, [r - f for r, f in zip(rest, first, strict=True)]


def _decode_raw(loop: _ReadLoop, values: list[ir.Value], counts: list[Vec]) -> None:
    """Pull up to 16 more raw bits a lane and append them to the values."""
    for v in loop.vectors:
        value = Vec(loop.b, loop.b.load(values[v], typ=vector_of(I32)))
        loop.b.store(_take_bits(loop, v, value, counts[v]).value, values[v])


def _take_bits(loop: _ReadLoop, v: int, value: Vec, count: Vec) -> Vec:
    """`value << count`, filled up with the states' lowest bits, which they lose."""
    state = loop.get(v)
    rest = state >> count
    loop.refill(v, rest)
    return ((value - rest) << count) + state


def _decode_step_direct(loop: _ReadLoop, place: Callable[[int], ir.Value]) -> None:
    """One step in which every token is its own value."""
    loop.begin(place)
    slots = [_decode_slot(loop, v, place(v)) for v in loop.vectors]  # gathers first: they overlap
    for v, slot in zip(loop.vectors, slots, strict=True):
        _take_token(loop, v, slot)
        loop.refill(v, loop.get(v))
    loop.put([slot >> 23 for slot in slots], place)


def _decode_step_tail(loop: _ReadLoop, place: Callable[[int], ir.Value]) -> None:
    """One step in which every token carries as many raw bits: `tail`, all inline."""
    loop.begin(place)
    slots = [_decode_slot(loop, v, place(v)) for v in loop.vectors]
    for v, slot in zip(loop.vectors, slots, strict=True):
        _take_token(loop, v, slot)
    tail = splat(loop.b, loop.b.trunc(loop.tail, I32))
    loop.put([_take_bits(loop, v, slot >> 23, tail) for v, slot in enumerate(slots)], place)


def _encode_step(loop: _WriteLoop, step: ir.Value, place: Callable[[int], ir.Value]) -> None:
    """The mirror image of decoding a step: raw bits last to first, then tokens last to first."""
    b = loop.b
    values = [load(b, I32, loop.values, place(v)) for v in loop.vectors]
    entries = [load(b, I32, loop.entries, b.add(loop.slot(step), int64(v * WIDTH))) for v in loop.vectors]
    raws = [(entry >> 11) & 31 for entry in entries]
    inline = [raw.at_most(loop.inline) for raw in raws]
    rest = [raw - i for raw, i in zip(raws, inline, strict=True)]
    with b.if_then(_any(loop, [r.nonzero() for r in rest]), likely=False):
        first = [r.at_most(16) for r in rest]
        second = [r - f for r, f in zip(rest, first, strict=True)]
        with b.if_then(_any(loop, [s.nonzero() for s in second]), likely=False):
            _encode_raw(loop, values, second)
        _encode_raw(loop, [v >> s for v, s in zip(values, second, strict=True)], first)
    for v in reversed(loop.vectors):
        _encode_token(loop, v, entries[v], values[v] >> rest[v], inline[v])
        loop.look_up(b.sub(step, int64(RING - 1)), v)


def _encode_raw(loop: _Loop, values: list[Vec], counts: list[Vec]) -> None:
    for v in reversed(loop.vectors):
        state, count = loop.get(v), counts[v]
        sixteen = Vec(loop.b, state._lift(16))
        full = ((state >> 16) >> (sixteen - count)).nonzero()
        state = loop.spill(state, full)
        loop.set(v, state.extended(values[v], count))


def _encode_token(loop: _Loop, v: int, entry: Vec, value: Vec, inline: Vec) -> None:
    """Put one token and its inline raw bits, the low ones of `value`, onto each lane of vector `v`."""
    b, state = loop.b, loop.get(v)
    frequency, start = entry >> 16, entry & 2047
    room = Vec(b, state._lift(32)) - loop.bits - inline
    state = loop.spill(state, (state >> room) >= frequency)
    state = state.extended(value, inline)
    # quotient << precision | remainder + start
    quotient = _underestimate(b, state, frequency)
    remainder = state - quotient * frequency
    coded = (quotient << loop.bits) + remainder + start
    step = (Vec(b, state._lift(1)) << loop.bits) - frequency
    for times in (1, 2):
        short = remainder >= (frequency if times == 1 else frequency << 1)
        coded = short.choose(coded + step, coded)
    loop.set(v, coded)


def _underestimate(b: ir.IRBuilder, state: Vec, frequency: Vec) -> Vec:
    """state // frequency, or up to two less, in floats of 24 bits.

    Holds for quotients below 2**22, which renormalisation guarantees with probabilities of ten bits or
    more. The reciprocal is made smaller by 2**-22; three roundings of at most 2**-24 leave the product too
    small, but by less than 7 * 2**-24 of it: by less than two.
    """
    almost_one = ir.Constant(vector_of(F32), [1.0 - 2.0**-22] * WIDTH)
    reciprocal = b.fdiv(almost_one, frequency.to_float())
    return Vec(b, b.fptoui(b.fmul(state.to_float(), reciprocal), vector_of(I32)))


def _place(loop: _Loop, step: ir.Value) -> Callable[[int], ir.Value]:
    first = loop.b.mul(step, int64(WIDTH * len(loop.vectors)))
    return lambda v: loop.b.add(first, int64(v * WIDTH))


class _WriteLoop(_Loop):
    """Encoding."""

    names = ("words", "table", "keys", "entries", "values", "states", "at", "steps", "precision")
    keys: ir.Value
    entries: ir.Value
    values: ir.Value

    def slot(self, step: ir.Value) -> ir.Value:
        """Where in the ring a step's entries begin."""
        return self.b.mul(self.b.and_(step, int64(RING - 1)), int64(WIDTH * len(self.vectors)))

    def look_up(self, step: ir.Value, v: int) -> None:
        """Put vector `v` of a step's entries into the ring; of the first step's if there is no such step.

        By loads of their own, which LLVM makes no gather of, and two a store, of which a processor makes one
        at a time.
        """
        b = self.b
        step = b.select(b.icmp_signed("<", step, int64(0)), int64(0), step)
        first, into = b.mul(step, int64(WIDTH * len(self.vectors))), self.slot(step)

        def entry(lane: int) -> ir.Value:
            key = b.zext(load_one(b, self.keys, b.add(first, int64(lane)), I16), I64)
            return b.zext(firm_load(b, address(b, self.table, key, I32), I32), I64)

        for lane in range(v * WIDTH, (v + 1) * WIDTH, 2):
            pair = b.or_(entry(lane), b.shl(entry(lane + 1), int64(32)))
            b.store(pair, address(b, self.entries, b.add(into, int64(lane)), I32), align=4)


def _make_decoder(
    step: Callable[[_ReadLoop, Callable[[int], ir.Value]], None], kind: type[_ReadLoop], vectors: int
) -> Callable[..., int]:
    def typer(typingctx: Any, *kinds: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = kind(context, builder, signature, args, vectors)
            with cgutils.for_range(builder, loop.steps) as turn:
                step(loop, _place(loop, turn.index))
                past = builder.icmp_signed(">", loop.cursor(), loop.end)
                with builder.if_then(past, likely=False):
                    turn.do_break()
            return loop.finish()

        return types.int64(*kinds), codegen

    return _intrinsic(typer, kind.names)


def _make_encoder(vectors: int) -> Callable[..., int]:
    def typer(typingctx: Any, *kinds: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = _WriteLoop(context, builder, signature, args, vectors)
            last = builder.sub(loop.steps, int64(1))
            for ahead in range(RING - 1):
                for v in loop.vectors:
                    loop.look_up(builder.sub(last, int64(ahead)), v)
            with cgutils.for_range(builder, loop.steps) as turn:
                step = builder.sub(last, turn.index)
                _encode_step(loop, step, _place(loop, step))
            return loop.finish()

        return types.int64(*kinds), codegen

    return _intrinsic(typer, _WriteLoop.names)


def _intrinsic(typer: Callable[..., Any], names: Iterable[str]) -> Callable[..., int]:
    """`typer` as an intrinsic. Numba reads the number of parameters off a function, so it is spelled out."""
    listed = ", ".join(names)
    scope: dict[str, Any] = {"typer": typer}
    exec(f"def fixed(typingctx, {listed}): return typer(typingctx, {listed})", scope)  # noqa: S102
    made: Callable[..., int] = intrinsic(scope["fixed"])
    return made


# ------------------------------------------------------------------------------ float transforms


def _lane_type(width: int) -> ir.VectorType:
    """A vector register's worth of lanes of `width` bits."""
    return ir.VectorType(ir.IntType(width), 512 // width)


def _load_as(builder: ir.IRBuilder, array: tuple[Any, ir.Type], at: ir.Value, kind: ir.VectorType) -> Vec:
    """`kind.count` consecutive elements of an array from `at`, cut or zero-extended to `kind`."""
    data, element = array
    where = address(builder, data, at, element)
    loaded = builder.load(where, typ=ir.VectorType(element, kind.count), align=element.width // 8)
    if element.width > kind.element.width:
        loaded = builder.trunc(loaded, kind)
    elif element.width < kind.element.width:
        loaded = builder.zext(loaded, kind)
    return Vec(builder, loaded)


def _store_as(builder: ir.IRBuilder, vector: Vec, array: tuple[Any, ir.Type], at: ir.Value) -> None:
    """The mirror image of `_load_as`."""
    data, element = array
    value, width = vector.value, vector.value.type.element.width
    kind = ir.VectorType(element, value.type.count)
    if width > element.width:
        value = builder.trunc(value, kind)
    elif width < element.width:
        value = builder.zext(value, kind)
    builder.store(value, address(builder, data, at, element), align=element.width // 8)


def _elementwise(body: Callable[..., None], arity: int, least_width: int = 8) -> Callable[..., int]:
    """An intrinsic `f(count, *arrays and scalars)` that works whole vectors of its arrays.

    `body(builder, kind, at, *arguments)` handles the elements at..at + kind.count, `kind` being
    as many lanes as a register has of the first array's width (or of `least_width`, if that is
    more); arrays come as (pointer, element type), scalars as 64-bit values. The result is how many
    elements were done; none at all for arrays of 64-bit elements.
    """

    def typer(typingctx: Any, count: Any, first: Any, *rest: Any) -> Any:
        kinds = (first, *rest)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if kinds[0].dtype.bitwidth > 32:
                return ir.Constant(I64, 0)
            arguments = []
            for kind, value in zip(kinds, args[1:], strict=True):
                if isinstance(kind, types.Array):
                    data = context.make_array(kind)(context, builder, value).data
                    arguments.append((data, ir.IntType(kind.dtype.bitwidth)))
                else:
                    arguments.append(value)
            lanes = _lane_type(max(kinds[0].dtype.bitwidth, least_width))
            size = ir.Constant(I64, lanes.count)
            steps = builder.udiv(args[0], size)
            with cgutils.for_range(builder, steps) as turn:
                body(builder, lanes, builder.mul(turn.index, size), *arguments)
            return builder.mul(steps, size)

        return types.int64(count, *kinds), codegen

    return _intrinsic(typer, ["count", *(f"a{i}" for i in range(arity))])


def _sign(vector: Vec) -> Vec:
    """All ones in the lanes whose highest bit is set."""
    return vector.shift_signed(vector.value.type.element.width - 1)


def _mirror(vector: Vec) -> Vec:
    """Bits in numeric order: negative numbers have their magnitude bits flipped. Self-inverse."""
    magnitude: int = (1 << (vector.value.type.element.width - 1)) - 1
    return vector ^ (_sign(vector) & magnitude)


def _distance_body(builder: Any, kind: Any, at: Any, base: Any, target: Any, values: Any) -> None:
    b, t = _load_as(builder, base, at, kind), _load_as(builder, target, at, kind)
    sign = _sign(b)
    distance = ((_mirror(t) - _mirror(b)) ^ sign) - sign
    _store_as(builder, (distance << 1) ^ _sign(distance), values, at)


def _restored(bits: Vec, zigzag: Vec, width: int) -> Vec:
    """The elements of `width` bits that lie `zigzag` from `bits`, in lanes at least as wide.

    Worked in the lanes' upper bits, where overflow and sign are the elements' own.
    """
    spare = bits.value.type.element.width - width
    if spare:
        bits, zigzag = bits << spare, zigzag & ((1 << width) - 1)
    sign = _sign(bits)
    odd = (zigzag & 0) - (zigzag & 1)
    distance = ((zigzag >> 1) ^ odd ^ sign) - sign
    restored = _mirror(_mirror(bits) + (distance << spare if spare else distance))
    return restored >> spare if spare else restored


def _restore_body(builder: Any, kind: Any, at: Any, base: Any, values: Any, out: Any) -> None:
    b, zigzag = _load_as(builder, base, at, kind), _load_as(builder, values, at, kind)
    _store_as(builder, _restored(b, zigzag, kind.element.width), out, at)


def _contexts_of(
    builder: Any, bits: Vec, at: Any, shift: Any, mask: Any, scales: Any, log_segment: Any, first: Any,
    lowest: Any, step: Any, last: Any,
) -> Vec:  # fmt: skip
    """The contexts of elements in lanes of 16 bits or more, the first being number first + at of all."""
    element = bits.value.type.element
    segment = builder.ashr(builder.add(first, at), log_segment)
    scale = builder.load(address(builder, scales, segment, I64), typ=I64)
    # Places are far below 1024 in either direction before they are clamped: offsets may be clamped
    # there as well, which lets them fit into 16 bits.
    offset = builder.add(scale, lowest)
    for sign, bound in ((">", int64(1 << 10)), ("<", int64(-(1 << 10)))):
        offset = builder.select(builder.icmp_signed(sign, offset, bound), bound, offset)
    shift, mask, offset, step, last = (builder.trunc(a, element) for a in (shift, mask, offset, step, last))
    exponent = (bits >> shift) & mask
    place: Vec = ((exponent << 1) - offset).shift_signed(step)
    return place.clamp_signed(last)


def _context_body(
    builder: Any, kind: Any, at: Any, base: Any, contexts: Any, shift: Any, mask: Any,
    scales: Any, log_segment: Any, first: Any, lowest: Any, step: Any, last: Any,
) -> None:  # fmt: skip
    found = _contexts_of(
        builder, _load_as(builder, base, at, kind), at, shift, mask, scales[0], log_segment, first, lowest,
        step, last,
    )  # fmt: skip
    _store_as(builder, found, contexts, at)


def _move_body(
    builder: Any, kind: Any, at: Any, base: Any, values: Any, moves: Any, shift: Any, mask: Any
) -> None:
    shift, mask = (builder.trunc(a, I32) for a in (shift, mask))
    exponent = (_load_as(builder, base, at, kind) >> shift) & mask
    steps = (_load_as(builder, values, at, kind) + 1) >> 1
    power = builder.bitcast((exponent.at_most(190) << 23).value, vector_of(F32))
    move = builder.fmul(steps.to_float(), power)
    builder.store(move, address(builder, moves[0], at, F32), align=4)


def _key_body(
    builder: Any, kind: Any, at: Any, values: Any, contexts: Any, keys: Any, direct_bits: Any, span: Any
) -> None:
    value = _load_as(builder, values, at, kind)
    bits = splat(builder, builder.trunc(direct_bits, I32))
    direct = (bits & 0 | 1) << bits
    wide = value >= direct
    octave = (value | 1).floor_log2()
    bucket = direct + ((octave - bits) << 2) + ((value >> (octave - 2)) & 3)
    token = wide.choose(bucket, value)
    key = (_load_as(builder, contexts, at, kind) << builder.trunc(span, I32)) | token
    _store_as(builder, key, keys, at)


@intrinsic
def count_vectors(typingctx: Any, values: Any, contexts: Any, keys: Any, counts: Any, width: Any,
                  direct_bits: Any, span: Any) -> Any:  # fmt: skip
    """Keys (uint16, context << span | token) of whole vectors of values, and each key counted, in WAYS rows
    of `width` (uint32); how many values were done.

    Neighbours have counters of their own: adding to the one just written has to wait for it. Keys are counted
    some vectors after they were written, so that the processor is busy with both.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, data = signature.args[:4], []
        for kind, value in zip(kinds, args[:4], strict=True):
            data.append(context.make_array(kind)(context, builder, value))
        pairs = [
            (array.data, ir.IntType(kind.dtype.bitwidth)) for kind, array in zip(kinds, data, strict=True)
        ]
        (key_data, counter_data), size = (pairs[2][0], pairs[3][0]), int64(WIDTH)
        steps = builder.udiv(cgutils.unpack_tuple(builder, data[2].shape)[0], size)

        def count(step: ir.Value) -> None:
            for lane in range(WIDTH):
                place = builder.add(builder.mul(step, size), int64(lane))
                key = builder.zext(load_one(builder, key_data, place, I16), I64)
                key = builder.add(key, builder.mul(args[4], int64(lane % WAYS)))
                found = load_one(builder, counter_data, key, I32)
                more = builder.add(found, ir.Constant(I32, 1))
                builder.store(more, address(builder, counter_data, key, I32), align=4)

        with cgutils.for_range(builder, builder.add(steps, int64(_BEHIND))) as turn:
            behind = builder.sub(turn.index, int64(_BEHIND))
            with builder.if_then(builder.icmp_signed("<", turn.index, steps)):
                at = builder.mul(turn.index, size)
                _key_body(builder, vector_of(I32), at, *pairs[:3], *args[5:])
            with builder.if_then(builder.icmp_signed(">=", behind, int64(0))):
                count(behind)
        return builder.mul(steps, size)

    return types.int64(values, contexts, keys, counts, width, direct_bits, span), codegen


# distance_vectors(count, base, target, values): see ulp.distance
# restore_vectors(count, base, values, out): see ulp.restore
# context_vectors(count, base, contexts, shift, mask, scales, log_segment, first, lowest, step, last):
#     clamp((2 * exponent - scales[(first + i) >> log_segment] - lowest) >> step, 0, last), where
#     segments begin at multiples of 64
# move_vectors(count, base, values, moves, shift, mask): float32 |distance| * 2**exponent
distance_vectors = _elementwise(_distance_body, 3)
restore_vectors = _elementwise(_restore_body, 3)
context_vectors = _elementwise(_context_body, 10, 16)
move_vectors = _elementwise(_move_body, 5, 32)


def _make_sift(merge: bool) -> Callable[[Any, int, int, int, Any, int, Any], int]:
    """`select_vectors` and, with `merge`, `merge_vectors`: the two ways through a subset."""

    def typer(typingctx: Any, base: Any, shift: Any, mask: Any, cutoff: Any, chosen: Any,
              at: Any, other: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            cursor = cgutils.alloca_once_value(builder, args[5])
            if base.dtype.bitwidth > 32:
                return args[5]
            kind = _lane_type(base.dtype.bitwidth)
            element = kind.element
            array = context.make_array(base)(context, builder, args[0])
            chosen_data, other_data = (
                context.make_array(a)(context, builder, value).data
                for a, value in ((chosen, args[4]), (other, args[6]))
            )
            shift_, mask_, bound = (
                builder.trunc(a, element) for a in (*args[1:3], builder.add(args[3], int64(1)))
            )
            size = int64(kind.count)
            steps = builder.udiv(cgutils.unpack_tuple(builder, array.shape)[0], size)
            with cgutils.for_range(builder, steps) as turn:
                first = builder.mul(turn.index, size)
                bits = _load_as(builder, (array.data, element), first, kind)
                inside = ((bits >> shift_) & mask_) < bound
                now = builder.load(cursor, typ=I64)
                there = address(builder, chosen_data, now, element)
                if merge:
                    prefetch(builder, other_data, first, element)
                    taken = expand_load(builder, there, kind, inside)
                    merged = inside.choose(Vec(builder, taken), bits)
                    _store_as(builder, merged, (other_data, element), first)
                else:
                    data = _load_as(builder, (other_data, element), first, kind).value
                    compress(builder, data, inside, there)
                builder.store(builder.add(now, inside.count()), cursor)
            return builder.load(cursor, typ=I64)

        return types.int64(base, shift, mask, cutoff, chosen, at, other), codegen

    return intrinsic(typer)


# select_vectors(base, shift, mask, cutoff, chosen, at, source) -> at: the elements of source where
# base's exponent is at most `cutoff` (-1 to mask), in a row into chosen[at:], which must have a
# vector's elements to spare. merge_vectors(..., out): out is base with those elements taken from
# chosen[at:]. Both work whole vectors, 64 bytes, and nothing where elements have 64 bits.
select_vectors = _make_sift(merge=False)
merge_vectors = _make_sift(merge=True)


def _make_byte_mover(push: bool) -> Callable[[Any, Any, int, Any, int], int]:
    """`push_bytes` and `pop_bytes`: low bytes from or to a plane, in the lanes of low contexts."""

    def typer(typingctx: Any, values: Any, contexts: Any, limit: Any, plane: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value_array = context.make_array(values)(context, builder, args[0])
            context_data = context.make_array(contexts)(context, builder, args[1]).data
            plane_data = context.make_array(plane)(context, builder, args[3]).data
            limit32 = builder.trunc(args[2], I32)
            cursor = cgutils.alloca_once_value(builder, args[4])
            kind = vector_of(I8)
            length = cgutils.unpack_tuple(builder, value_array.shape)[0]
            with cgutils.for_range(builder, builder.lshr(length, int64(4))) as turn:
                first = builder.shl(turn.index, int64(4))
                mask = load(builder, I8, context_data, first) < limit32
                value = load(builder, I32, value_array.data, first)
                now = builder.load(cursor, typ=I64)
                there = address(builder, plane_data, now, I8)
                if push:
                    low = expand_load(builder, there, kind, mask)
                    longer = (value << 8) | Vec(builder, builder.zext(low, vector_of(I32)))
                    moved = mask.choose(longer, value)
                else:
                    compress(builder, builder.trunc(value.value, kind), mask, there)
                    moved = mask.choose(value >> 8, value)
                store(builder, moved, value_array.data, first)
                builder.store(builder.add(now, mask.count()), cursor)
            return builder.load(cursor, typ=I64)

        return types.int64(values, contexts, limit, plane, at), codegen

    return intrinsic(typer)


# push_bytes(values, contexts, limit, plane, at) -> at: each uint32 value whose uint8 context is
# below `limit` takes the next byte of plane[at:] as its new low byte. pop_bytes is the inverse; it
# may write up to 16 bytes beyond the new `at`. Both work whole vectors of 16 values.
push_bytes = _make_byte_mover(push=True)
pop_bytes = _make_byte_mover(push=False)


@intrinsic
def differing(typingctx: Any, first: Any, second: Any, place: Any) -> Any:
    """Which of 32 elements from `place` on differ between two arrays: a uint32, its lowest bit the first."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.IntType(first.dtype.bitwidth), 32)

        def loaded(array: Any, value: Any) -> ir.Value:
            data = context.make_array(array)(context, builder, value).data
            return _load_as(builder, (data, kind.element), args[2], kind).value

        differ = builder.icmp_unsigned("!=", loaded(first, args[0]), loaded(second, args[1]))
        return builder.bitcast(differ, I32)

    return types.uint32(first, second, types.int64), codegen


@intrinsic
def ask_for(typingctx: Any, array: Any, place: Any) -> Any:
    """Have the cache line of array[place] brought, to be written to later; nothing else happens."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        bring(builder, data, args[1], ir.IntType(array.dtype.bitwidth))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def bit_length(typingctx: Any, value: Any) -> Any:
    """How many bits a uint32 needs: 0 for 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = builder.ctlz(args[0], ir.Constant(I1, 0))
        return builder.sub(ir.Constant(I32, 32), zeros)

    return types.uint32(types.uint32), codegen


@intrinsic
def bits_set(typingctx: Any, value: Any) -> Any:
    """How many bits of a uint32 are 1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(args[0]), I64)

    return types.int64(types.uint32), codegen


# decode_64(words, table, contexts, values, states, at, end, steps, precision, tail) -> at
#
#   words      uint16, readable up to 3 * 64 + 16 words past `end`
#   table      uint32, contexts << precision entries (runs.fill_slots)
#   contexts   uint8, steps * 64, each below the number of tables
#   values     uint32, steps * 64, written
#   states     uint32, 64, updated
#
# Stops early, with a cursor beyond `end`, once the stream is exhausted. The `direct` ones are for
# tables whose tokens carry no raw bits, the `tail` one for runs in which each carries `tail`.
decode_64 = _make_decoder(_decode_step_wide, _ValueLoop, 4)
decode_16 = _make_decoder(_decode_step_wide, _ValueLoop, 1)
decode_64_direct = _make_decoder(_decode_step_direct, _ValueLoop, 4)
decode_16_direct = _make_decoder(_decode_step_direct, _ValueLoop, 1)
decode_64_tail = _make_decoder(_decode_step_tail, _ValueLoop, 4)

# decode_floats(words, table, base, out, states, at, end, steps, precision, shift, mask, scales,
# log_segment, first, lowest, step, last, ahead) -> at: decode_64, contexts_vectors and restore_vectors in
# one, for elements of 8 or 16 bits. Of the base, what lies `ahead` of each element is asked for.
# decode_floats_raw is for many tokens with more raw bits than are inline.
decode_floats_raw = _make_decoder(_decode_step_raw, _FloatLoop, 4)
decode_floats = _make_decoder(_decode_step_wide, _FloatLoop, 4)
decode_floats_direct = _make_decoder(_decode_step_direct, _FloatLoop, 4)

# encode_64(words, table, keys, entries, values, states, at, steps, precision) -> at: from the last step, of
# one or more, to the first, writing words in front of `at`, where the caller leaves room for 3 words a value.
#
#   table      uint32, frequency << 16 | raw bit count << 11 | start by key
#   keys       uint16, steps * 64
#   entries    uint32[RING * 64], scratch: looked up some steps ahead, while the processor waits for vectors
#   precision  10 or 11
encode_64 = _make_encoder(4)
encode_16 = _make_encoder(1)
