# mypy: ignore-errors
# Numba and LLVM type what is in here.
"""Expanding and compressing vectors: by AVX-512, by shuffles of bytes, and as LLVM does it."""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from deltaweights.codec import vectors
from deltaweights.codec.vectors import Vec, compress, compress_before, expand_load

KINDS = ((16, 16), (16, 8), (64, 8), (32, 16), (16, 32))  # lanes, bits: those in use
WAYS = ("usual", "shuffles", "neither")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Code for this processor; for one without AVX-512; for one that has no shuffle either."""
    has, shuffle_of = vectors._has, vectors._shuffle_of
    if request.param != "usual":
        monkeypatch.setattr(
            vectors, "_has", lambda context, name: has(context, name) and "avx512" not in name
        )
    if request.param == "neither":
        monkeypatch.setattr(vectors, "_shuffle_of", lambda context: None)
    elif request.param == "shuffles" and shuffle_of(_Context()) is None:
        pytest.skip("this processor shuffles no bytes")
    return request.param


class _Context:
    """As much of Numba's as says what processor code is for."""

    def __init__(self, machine: tuple[str, str, str] | None = None) -> None:
        features = llvm.get_host_cpu_features().flatten()
        self._machine = machine or (llvm.get_process_triple(), llvm.get_host_cpu_name(), features)

    def codegen(self) -> _Context:
        return self

    def magic_tuple(self) -> tuple[str, str, str]:
        return self._machine


def _compiled(lanes: int, bits: int, body):
    """`f(source, bits of the mask, out)`; `body(context, builder, kind, source, mask, out)` emits it."""

    @intrinsic
    def emitted(typingctx, source, mask, out):
        def codegen(context, builder, signature, args):
            kind = ir.VectorType(ir.IntType(bits), lanes)
            mask = builder.bitcast(
                builder.trunc(args[1], ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes)
            )
            places = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)]
            return body(context, builder, kind, places[0], Vec(builder, mask), places[1])

        return types.int64(source, types.uint64, out), codegen

    return njit(lambda source, mask, out: emitted(source, np.uint64(mask), out))


def _cases(lanes: int, bits: int):
    """(the mask as an integer, as booleans, a vector of elements): all kinds of masks."""
    rng = np.random.default_rng(lanes * bits)
    for share in (0.0, 1.0, *np.linspace(0.05, 0.95, 30)):
        lit = rng.random(lanes) < share
        mask = np.uint64(sum(1 << lane for lane in np.flatnonzero(lit).tolist()))
        yield mask, lit, rng.integers(1, 1 << bits, lanes, dtype=f"u{bits // 8}")


@pytest.mark.parametrize(("lanes", "bits"), KINDS)
def test_expanding_puts_a_row_into_the_set_lanes(way: str, lanes: int, bits: int) -> None:
    def body(context, builder, kind, source, mask, out):
        found = expand_load(context, builder, source, kind, mask)
        builder.store(
            found, vectors.address(builder, out, ir.Constant(ir.IntType(64), 0), kind.element), align=1
        )
        return mask.count()

    expand = _compiled(lanes, bits, body)
    for mask, lit, row in _cases(lanes, bits):
        out = np.zeros_like(row)
        assert expand(row, mask, out) == lit.sum()
        assert np.array_equal(out[lit], row[: lit.sum()])


@pytest.mark.parametrize(("lanes", "bits"), KINDS)
def test_compressing_puts_the_set_lanes_in_a_row(way: str, lanes: int, bits: int) -> None:
    def body(context, builder, kind, source, mask, out):
        first = ir.Constant(ir.IntType(64), 0)
        where = vectors.address(builder, source, first, kind.element)
        vector = builder.load(where, typ=kind, align=1)
        compress(context, builder, vector, mask, vectors.address(builder, out, first, kind.element))
        return mask.count()

    squeeze = _compiled(lanes, bits, body)
    for mask, lit, row in _cases(lanes, bits):
        out = np.zeros(lanes + 64, row.dtype)
        squeeze(row, mask, out)
        assert np.array_equal(out[: lit.sum()], row[lit])
        assert not out[lanes:].any()  # no more than a vector is written


def test_compressing_before_leaves_alone_what_is_behind(way: str) -> None:
    end = 24

    def body(context, builder, kind, source, mask, out):
        vector = vectors.load(builder, ir.IntType(32), source, ir.Constant(ir.IntType(64), 0))
        stop = ir.Constant(ir.IntType(64), end)
        return compress_before(context, builder, vector, mask, out, stop)

    squeeze = _compiled(16, 32, body)
    for mask, lit, row in _cases(16, 32):
        out = np.full(40, 0xABCD, np.uint16)
        start = squeeze(row, mask, out)
        assert start == end - lit.sum()
        assert np.array_equal(out[start:end], row[lit].astype(np.uint16))
        assert (out[end:] == 0xABCD).all()
        assert (out[: end - 16 - 8] == 0xABCD).all()


def test_neon_shuffles_bytes() -> None:
    """Not run here: that LLVM makes instructions of it."""
    context = _Context(("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon"))
    module = ir.Module()
    kind, pointer = ir.VectorType(ir.IntType(16), 16), ir.PointerType()
    of_three = ir.FunctionType(ir.VoidType(), [pointer, ir.VectorType(ir.IntType(1), 16), pointer])
    function = ir.Function(module, of_three, "f")
    builder = ir.IRBuilder(function.append_basic_block())
    source, mask, out = function.args
    found = expand_load(context, builder, source, kind, Vec(builder, mask))
    compress(context, builder, found, Vec(builder, mask), out)
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(context.magic_tuple()[0])
    except RuntimeError:
        pytest.skip("this LLVM knows no aarch64")
    code = target.create_target_machine("neoverse-n1").emit_assembly(llvm.parse_assembly(str(module)))
    assert code.count("tbl\t") == 4
