"""Vectors as LLVM has them: what instructions do to all lanes, and to some of them.

Some operations have no scalar look:

* `gather` reads sixteen table entries, one per lane;
* `expand_load` reads consecutive elements into those lanes that need one;
* `compress` and `compress_before` pack those of the lanes that have one in a row;
* `dot_pairs` multiplies pairs of 16-bit integers, and adds both products.

All but the first are calls that each target answers in its own way (:mod:`..build.vector_operations`): what
Numba makes of a kernel is the same for all targets.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

WIDTH = 16  # 32-bit elements in a vector
OPERATION = "deltaweights.operation."  # what the names of functions begin with that a target defines
_AHEAD = 4096  # bytes; how far ahead of writing them cache lines are asked for

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()


def vector_of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, WIDTH)


class Vec:
    """Lanes of unsigned integers, or of booleans; the operators emit instructions.

    Sixteen lanes of 32 bits in the entropy coder; elsewhere as many as 512 bits hold.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.b = builder
        self.value = value

    def _lift(self, other: Vec | ir.Value | int) -> ir.Value:
        """A vector of the same type: splat a constant or a scalar."""
        if isinstance(other, Vec):
            return other.value
        if isinstance(other, int):
            return ir.Constant(self.value.type, [other] * self.value.type.count)
        return splat(self.b, other, self.value.type.count).value

    def __add__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.add(self.value, self._lift(other)))

    def __sub__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.sub(self.value, self._lift(other)))

    def __mul__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.mul(self.value, self._lift(other)))

    def __and__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.and_(self.value, self._lift(other)))

    def __or__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.or_(self.value, self._lift(other)))

    def __xor__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.xor(self.value, self._lift(other)))

    def __lshift__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.shl(self.value, self._lift(other)))

    def __rshift__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.lshr(self.value, self._lift(other)))

    def __ge__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.icmp_unsigned(">=", self.value, self._lift(other)))

    def __lt__(self, other: Vec | ir.Value | int) -> Vec:
        return Vec(self.b, self.b.icmp_unsigned("<", self.value, self._lift(other)))

    def negative(self) -> Vec:
        """Lanes that are below zero when read as signed."""
        return Vec(self.b, self.b.icmp_signed("<", self.value, self._lift(0)))

    def nonzero(self) -> Vec:
        return Vec(self.b, self.b.icmp_unsigned("!=", self.value, self._lift(0)))

    def choose(self, yes: Vec | int, no: Vec) -> Vec:
        """`yes` in the lanes where this mask is set, `no` elsewhere."""
        return Vec(self.b, self.b.select(self.value, no._lift(yes), no.value))

    def at_most(self, other: Vec | ir.Value | int) -> Vec:
        return (self < other).choose(self, Vec(self.b, self._lift(other)))

    def less(self, other: Vec | int) -> Vec:
        """The difference, but not below zero."""
        return Vec(self.b, (self < other).choose(other, self).value) - other

    def shift_signed(self, other: ir.Value | int) -> Vec:
        return Vec(self.b, self.b.ashr(self.value, self._lift(other)))

    def clamp_signed(self, last: ir.Value) -> Vec:
        """Into 0..last, both signed."""
        raised = self.negative().choose(0, self)
        return raised.at_most(last)

    def extended(self, low: Vec, count: Vec) -> Vec:
        """`self << count`, filled up with the lowest `count` bits of `low`; count is below 32."""
        first = low._shifted_across("llvm.fshr.v16i32", low, count)  # rotated: those bits come first
        return self._shifted_across("llvm.fshl.v16i32", first, count)

    def _shifted_across(self, name: str, low: Vec, count: Vec) -> Vec:
        kind = self.value.type
        return Vec(self.b, call(self.b, name, kind, [(kind, part.value) for part in (self, low, count)]))

    def floor_log2(self) -> Vec:
        """The place of each lane's highest set bit (31 - leading zeros)."""
        kind = self.value.type
        zeros = call(self.b, "llvm.ctlz.v16i32", kind, [(kind, self.value), (I1, ir.Constant(I1, 0))])
        return Vec(self.b, self._lift(31)) - Vec(self.b, zeros)

    def to_float(self) -> ir.Value:
        return self.b.uitofp(self.value, vector_of(F32))

    def words(self) -> ir.Value:
        return self.b.trunc(self.value, vector_of(I16))

    def count(self) -> ir.Value:
        """How many lanes of a mask are set, as a 64-bit scalar."""
        count = self.value.type.count
        bits = self.b.bitcast(self.value, ir.IntType(count))
        return self.b.ctpop(bits if count == 64 else self.b.zext(bits, I64))

    def any(self) -> ir.Value:
        bits = self.b.bitcast(self.value, I16)
        return self.b.icmp_unsigned("!=", bits, ir.Constant(I16, 0))


def call(
    builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[tuple[ir.Type, ir.Value]]
) -> ir.Value:
    kind = ir.FunctionType(result, [t for t, _ in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [v for _, v in arguments])


def int64(value: int) -> ir.Value:
    """A constant."""
    return ir.Constant(I64, value)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = WIDTH) -> Vec:
    """All lanes equal to one scalar."""
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return Vec(builder, builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros))


def address(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    where = builder.gep(base, [index], source_etype=element)
    where.type = POINTER  # opaque, where llvmlite keeps the pointee of Numba's array
    return where


def load(builder: ir.IRBuilder, element: ir.Type, base: ir.Value, index: ir.Value) -> Vec:
    """Sixteen consecutive elements from `base[index]`, widened to 32 bits."""
    where = address(builder, base, index, element)
    loaded = builder.load(where, typ=vector_of(element), align=element.width // 8)
    if element.width < 32:
        loaded = builder.zext(loaded, vector_of(I32))
    return Vec(builder, loaded)


def load_one(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    """`base[index]`."""
    return builder.load(address(builder, base, index, element), typ=element, align=size_of(element))


def size_of(element: ir.Type) -> int:
    """Its bytes."""
    return {F32: 4, F64: 8}.get(element) or int(element.width) // 8


def store(builder: ir.IRBuilder, vector: Vec, base: ir.Value, index: ir.Value) -> None:
    builder.store(vector.value, address(builder, base, index, I32), align=4)


def gather(builder: ir.IRBuilder, base: ir.Value, index: Vec) -> Vec:
    """`base[index]` for sixteen indexes at once; `base` holds 32-bit entries."""
    kind, mask, places = vector_of(I32), vector_of(I1), vector_of(POINTER)
    where = builder.gep(base, [index.value], source_etype=I32)
    where.type = places  # a vector of indexes makes a vector of pointers; llvmlite types it as one
    arguments = [
        (places, where),
        (I32, ir.Constant(I32, 4)),
        (mask, ir.Constant(mask, [1] * WIDTH)),
        (kind, ir.Constant(kind, [0] * WIDTH)),
    ]
    return Vec(builder, call(builder, "llvm.masked.gather.v16i32.v16p0", kind, arguments))


def prefetch(builder: ir.IRBuilder, out: ir.Value, at: ir.Value, element: ir.Type) -> None:
    """Ask for the cache line that will be written some turns after `out[at]`: waiting for it then would
    stall all lanes."""
    bring(builder, out, builder.add(at, int64(_AHEAD * 8 // element.width)), element)


def bring(
    builder: ir.IRBuilder, data: ir.Value, at: ir.Value, element: ir.Type, *, writes: bool = True
) -> None:
    """Have a cache line brought, to be written to, or as far as the second cache; any address will do."""
    arguments = [(POINTER, address(builder, data, at, element))]
    arguments += [(I32, ir.Constant(I32, flag)) for flag in ((1, 3, 1) if writes else (0, 2, 1))]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def firm_load(builder: ir.IRBuilder, where: ir.Value, kind: ir.Type) -> ir.Value:
    """A load that LLVM neither merges with what uses it nor makes part of a vector's."""
    loaded = _FirmLoad(builder.block, where, typ=kind)
    loaded.align = getattr(kind, "element", kind).width // 8
    builder._insert(loaded)
    return loaded


class _FirmLoad(ir.instructions.LoadInstr):  # type: ignore[misc]
    """A volatile load."""

    def descr(self, buf: list[str]) -> None:
        super().descr(buf)
        buf[-1] = buf[-1].replace("load ", "load volatile ", 1)


def expand_load(builder: ir.IRBuilder, where: ir.Value, kind: ir.VectorType, mask: Vec) -> ir.Value:
    """Consecutive elements from `where` on into the set lanes of `mask`; anything in the others.

    A whole vector must be readable there.
    """
    return _operation(builder, "expand_load", kind, kind, [(POINTER, where), (mask.value.type, mask.value)])


def compress(builder: ir.IRBuilder, value: ir.Value, mask: Vec, where: ir.Value) -> None:
    """The set lanes of a vector in a row from `where` on; up to a whole vector is written there."""
    arguments = [(value.type, value), (mask.value.type, mask.value), (POINTER, where)]
    _operation(builder, "compress", value.type, ir.VoidType(), arguments)


def compress_before(builder: ir.IRBuilder, vector: Vec, mask: Vec, base: ir.Value, end: ir.Value) -> ir.Value:
    """The low words of the set lanes in a row that ends in front of `base[end]`; where it begins.

    Nothing beyond is written, but perhaps some words in front.
    """
    words = vector.words()
    arguments = [(words.type, words), (mask.value.type, mask.value), (POINTER, base), (I64, end)]
    return _operation(builder, "compress_before", words.type, I64, arguments)


def dot_pairs(builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    """In each 32-bit lane: the total and the products of the low and of the high halves, which are signed."""
    arguments = [(value.type, value) for value in (total, left, right)]
    return _operation(builder, "dot_pairs", total.type, total.type, arguments)


def _operation(
    builder: ir.IRBuilder,
    name: str,
    kind: ir.VectorType,
    result: ir.Type,
    arguments: list[tuple[ir.Type, ir.Value]],
) -> ir.Value:
    """Call an operation that :mod:`..build.vector_operations` writes for each kind of processor."""
    return call(builder, f"{OPERATION}{name}.v{kind.count}i{kind.element.width}", result, arguments)
