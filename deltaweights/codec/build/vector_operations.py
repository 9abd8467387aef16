"""The vector operations that processors do in different ways, written for one target.

Kernels call them by name (:mod:`..kernels.vectors`); :func:`define` gives the definitions that a module
lacks. AVX-512 has instructions for them. Elsewhere one that shuffles bytes does them, in pieces of eight
lanes or of 16 bytes, by a table with an order for each mask. LLVM finds a way for every other target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from ..kernels.vectors import I1, I8, I16, I32, I64, OPERATION, POINTER, Vec, address, call, firm_load, int64
from .targets import CompileTarget


def define(names: Iterable[str], target: CompileTarget) -> str:
    """LLVM assembly that defines these operations."""
    module = ir.Module("operations")
    for name in sorted(names):
        operation, lanes, width = _parsed(name)
        kind = ir.VectorType(ir.IntType(width), lanes)
        mask = ir.VectorType(I1, lanes)
        ways: dict[str, tuple[Callable[..., Any], ir.Type, list[ir.Type]]] = {
            "expand_load": (_expand_load, kind, [POINTER, mask]),
            "compress": (_compress, ir.VoidType(), [kind, mask, POINTER]),
            "compress_before": (_compress_before, I64, [kind, mask, POINTER, I64]),
            "dot_pairs": (_dot_pairs, kind, [kind, kind, kind]),
        }
        emit, result, given = ways[operation]
        function = ir.Function(module, ir.FunctionType(result, given), name)
        function.attributes.add("alwaysinline")
        function.linkage = "linkonce_odr"
        builder = ir.IRBuilder(function.append_basic_block())
        arguments = [Vec(builder, value) if value.type == mask else value for value in function.args]
        found = emit(_Emitter(builder, target), kind, *arguments)
        builder.ret_void() if found is None else builder.ret(found)
    return str(module)


def _parsed(name: str) -> tuple[str, int, int]:
    """(operation, lanes, bits of an element) of a name such as `deltaweights.operation.compress.v16i16`."""
    operation, _, kind = name.removeprefix(OPERATION).partition(".")
    lanes, _, width = kind.removeprefix("v").partition("i")
    return operation, int(lanes), int(width)


class _Emitter(NamedTuple):
    """Where instructions go, and the target that they are for."""

    builder: ir.IRBuilder
    target: CompileTarget


def _expand_load(emitter: _Emitter, kind: ir.VectorType, where: ir.Value, mask: Vec) -> ir.Value:
    """Loading all and expanding in a register takes less than half the time of an expanding load where that
    is microcode (Zen 4: 0.9 ns instead of 2.2)."""
    builder, target = emitter
    name, width = f"v{kind.count}i{kind.element.width}", kind.element.width
    if target.has("avx512vbmi2" if width < 32 else "avx512f"):
        loaded = firm_load(builder, where, kind)
        arguments = [(kind, loaded), (kind, ir.Constant(kind, ir.Undefined)), (mask.value.type, mask.value)]
        return call(builder, f"llvm.x86.avx512.mask.expand.{name}", kind, arguments)
    if target.shuffle:
        found = []
        for piece in _pieces(builder, kind, mask):
            data = builder.load(piece.behind(where), typ=piece.kind, align=width // 8)
            found.append(_reorder(emitter, data, piece, "expand"))
        return _joined(builder, found)
    arguments = [(POINTER, where), (mask.value.type, mask.value), (kind, ir.Constant(kind, ir.Undefined))]
    return call(builder, f"llvm.masked.expandload.{name}", kind, arguments)


def _compress(emitter: _Emitter, kind: ir.VectorType, value: ir.Value, mask: Vec, where: ir.Value) -> None:
    builder, target = emitter
    if target.has("avx512f") or not target.shuffle:
        builder.store(_packed(builder, value, mask), where, align=kind.element.width // 8)
        return
    for piece in _pieces(builder, kind, mask):
        packed = _reorder(emitter, piece.part_of(value), piece, "compress")
        builder.store(packed, piece.behind(where), align=kind.element.width // 8)


def _compress_before(
    emitter: _Emitter, kind: ir.VectorType, words: ir.Value, mask: Vec, base: ir.Value, end: ir.Value
) -> ir.Value:
    """Packing in a register and storing under a mask: a compressing store to memory is many times slower on
    some processors."""
    builder, target = emitter
    bits, at = mask.value.type, builder.sub(end, mask.count())
    if target.has("avx512f") or not target.shuffle:
        one = ir.Constant(I32, 1)
        count = builder.trunc(mask.count(), I32)
        run = builder.bitcast(builder.trunc(builder.sub(builder.shl(one, count), one), I16), bits)
        arguments = [
            (kind, _packed(builder, words, mask)),
            (POINTER, address(builder, base, at, I16)),
            (I32, ir.Constant(I32, 2)),
            (bits, run),
        ]
        call(builder, "llvm.masked.store.v16i16.p0", ir.VoidType(), arguments)
        return at
    for piece in reversed(_pieces(builder, kind, mask)):  # each over what the one behind it has in front
        packed = _reorder(emitter, piece.part_of(words), piece, "compress to the end")
        stop = builder.add(builder.add(at, piece.before), piece.count)
        where = address(builder, base, builder.sub(stop, int64(piece.kind.count)), I16)
        builder.store(packed, where, align=2)
    return at


def _dot_pairs(
    emitter: _Emitter, kind: ir.VectorType, total: ir.Value, left: ir.Value, right: ir.Value
) -> ir.Value:
    builder, target = emitter
    if target.has("avx512vnni"):
        name = f"llvm.x86.avx512.vpdpwssd.{32 * kind.count}"
        return call(builder, name, kind, [(kind, total), (kind, left), (kind, right)])
    lanes, name = next(((n, name) for feature, n, name in _DOT_PRODUCTS if target.has(feature)), (0, ""))
    if lanes:
        part, words = ir.VectorType(I32, lanes), ir.VectorType(I16, 2 * lanes)
        found = []
        for first in range(0, kind.count, lanes):
            pieces = (_picked(builder, value, range(first, first + lanes)) for value in (left, right))
            arguments = [(words, builder.bitcast(piece, words)) for piece in pieces]
            found.append(call(builder, name, part, arguments))
        return builder.add(total, _joined(builder, found))
    words = ir.VectorType(I16, kind.count)
    for shift in (0, 16):
        by = ir.Constant(kind, [shift] * kind.count)
        halves = [builder.sext(builder.trunc(builder.lshr(v, by), words), kind) for v in (left, right)]
        total = builder.add(total, builder.mul(*halves))
    return total


#: The instructions that multiply pairs and add the products: (feature, 32-bit lanes, LLVM's name).
_DOT_PRODUCTS = (
    ("avx512bw", 16, "llvm.x86.avx512.pmaddw.d.512"),
    ("avx2", 8, "llvm.x86.avx2.pmadd.wd"),
    ("ssse3", 4, "llvm.x86.sse2.pmadd.wd"),
)


def _packed(builder: ir.IRBuilder, value: ir.Value, mask: Vec) -> ir.Value:
    """The set lanes first; anything in the others."""
    kind = value.type
    arguments = [(kind, value), (mask.value.type, mask.value), (kind, ir.Constant(kind, ir.Undefined))]
    name = f"llvm.experimental.vector.compress.v{kind.count}i{kind.element.width}"
    return call(builder, name, kind, arguments)


class _Piece(NamedTuple):
    """Some lanes of a vector, and their mask."""

    builder: ir.IRBuilder
    first: int  # lane
    kind: ir.VectorType
    mask: ir.Value  # an integer
    before: ir.Value  # how many lanes in front of these are set,
    count: ir.Value  # and how many of these

    def part_of(self, vector: ir.Value) -> ir.Value:
        """These lanes of a vector."""
        return _picked(self.builder, vector, range(self.first, self.first + self.kind.count))

    def behind(self, where: ir.Value) -> ir.Value:
        """Where these lanes' elements are, those of all set lanes being in a row from `where` on."""
        return address(self.builder, where, self.before, self.kind.element)


def _pieces(builder: ir.IRBuilder, kind: ir.VectorType, mask: Vec) -> list[_Piece]:
    lanes = min(8, 128 // kind.element.width)
    bits = builder.bitcast(mask.value, ir.IntType(kind.count))
    found, before = [], int64(0)
    for first in range(0, kind.count, lanes):
        part = builder.trunc(builder.lshr(bits, ir.Constant(bits.type, first)), ir.IntType(lanes))
        part = builder.zext(part, I64)
        count = builder.ctpop(part)
        found.append(_Piece(builder, first, ir.VectorType(kind.element, lanes), part, before, count))
        before = builder.add(before, count)
    return found


def _reorder(emitter: _Emitter, data: ir.Value, piece: _Piece, way: str) -> ir.Value:
    """The lanes of a piece's data, expanded or compressed."""
    builder, bytes_kind, kind = emitter.builder, ir.VectorType(I8, 16), piece.kind
    shuffle, size = emitter.target.shuffle, kind.count * kind.element.width // 8
    assert shuffle
    table = _orders(builder, kind.count, kind.element.width // 8, way)
    row = address(builder, table, builder.shl(piece.mask, int64(4)), I8)
    order = builder.load(row, typ=bytes_kind, align=16)
    data = builder.bitcast(data, ir.VectorType(I8, size))
    if size < 16:
        data = _picked(builder, data, range(16))
    found = call(builder, shuffle, bytes_kind, [(bytes_kind, data), (bytes_kind, order)])
    return builder.bitcast(found if size == 16 else _picked(builder, found, range(size)), kind)


def _orders(builder: ir.IRBuilder, lanes: int, size: int, way: str) -> ir.Value:
    """The address of the table: 16 bytes a mask, each the place that a byte of the result comes from."""
    name = f"deltaweights.{way.replace(' ', '.')}.{lanes}.{size}"
    if name in builder.module.globals:
        return builder.module.get_global(name)
    rows = bytearray()
    for mask in range(1 << lanes):
        chosen = [lane for lane in range(lanes) if mask >> lane & 1]
        if way == "expand":
            order = [chosen.index(lane) if lane in chosen else 0 for lane in range(lanes)]
        else:
            others = [0] * (lanes - len(chosen))
            order = chosen + others if way == "compress" else others + chosen
        row = [size * lane + byte for lane in order for byte in range(size)]
        rows += bytes(row + [0] * (16 - len(row)))
    content = cgutils.make_bytearray(rows)
    table = cgutils.global_constant(builder, name, content)
    table.align = 16
    return table


def _picked(builder: ir.IRBuilder, vector: ir.Value, lanes: Iterable[int]) -> ir.Value:
    """These lanes of a vector; any content where it has none."""
    kind = vector.type
    places = [ir.Constant(I32, lane if lane < kind.count else 0) for lane in lanes]
    order = ir.Constant(ir.VectorType(I32, len(places)), places)
    return builder.shuffle_vector(vector, vector, order)


def _joined(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Vectors one behind the other, as one."""
    while len(vectors) > 1:
        size = 2 * vectors[0].type.count
        order = ir.Constant(ir.VectorType(I32, size), list(range(size)))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.shuffle_vector(low, high, order) for low, high in pairs]
    return vectors[0]
