# mypy: ignore-errors
# LLVM types what is in here.
"""Expanding and compressing vectors: by AVX-512, by shuffles of bytes, and as LLVM does it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

llvm = pytest.importorskip("llvmlite.binding", reason="kernels are built with Numba")
ir = pytest.importorskip("llvmlite.ir")

from deltaweights.codec.build.machine_code import initialize  # noqa: E402
from deltaweights.codec.build.targets import CompileTarget, host  # noqa: E402
from deltaweights.codec.build.vector_operations import define  # noqa: E402
from deltaweights.codec.kernels import vectors  # noqa: E402
from deltaweights.codec.kernels.vectors import OPERATION, Vec, compress, compress_before, expand_load  # noqa: E402

KINDS = ((16, 16), (16, 8), (64, 8), (32, 16), (16, 32))  # lanes, bits: those in use
_FIRST = ir.Constant(ir.IntType(64), 0)
_engines = []  # code lives as long as its engine


@pytest.fixture(params=["usual", "shuffles", "neither"])
def target(request: pytest.FixtureRequest) -> CompileTarget:
    """This processor; one like it without AVX-512; one that has no shuffle either."""
    here = host()
    if request.param == "usual":
        return here
    lacking = "avx512" if request.param == "shuffles" else "+"
    features = ",".join(name for name in here.features.split(",") if lacking not in name)
    return here._replace(features=features, triple=here.triple if request.param == "shuffles" else "x86_64")


def _compiled(target: CompileTarget, lanes: int, bits: int, body):
    """`f(source, bits of the mask, out)`; `body(builder, kind, source, mask, out)` emits it."""
    initialize()
    module, pointer, long = ir.Module(), ir.PointerType(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(long, [pointer, long, pointer]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    source, given, out = function.args
    mask = builder.bitcast(builder.trunc(given, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))
    builder.ret(body(builder, ir.VectorType(ir.IntType(bits), lanes), source, Vec(builder, mask), out))
    whole = llvm.parse_assembly(str(module))
    names = [f.name for f in whole.functions if f.name.startswith(OPERATION)]
    whole.link_in(llvm.parse_assembly(define(names, target)))
    here = host()  # LLVM finds a way for what the target lacks, on the processor that is here
    machine = llvm.Target.from_triple(here.triple).create_target_machine(here.processor, here.features)
    engine = llvm.create_mcjit_compiler(whole, machine)
    engine.finalize_object()
    _engines.append(engine)
    place = engine.get_function_address("f")
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)(place)
    return lambda source, mask, out: call(source.ctypes.data, int(mask), out.ctypes.data)


def _cases(lanes: int, bits: int):
    """(the mask as an integer, as booleans, a vector of elements): all kinds of masks."""
    rng = np.random.default_rng(lanes * bits)
    for share in (0.0, 1.0, *np.linspace(0.05, 0.95, 30)):
        lit = rng.random(lanes) < share
        mask = sum(1 << lane for lane in np.flatnonzero(lit).tolist())
        yield mask, lit, rng.integers(1, 1 << bits, lanes, dtype=f"u{bits // 8}")


@pytest.mark.parametrize(("lanes", "bits"), KINDS)
def test_expanding_puts_a_row_into_the_set_lanes(target: CompileTarget, lanes: int, bits: int) -> None:
    def body(builder, kind, source, mask, out):
        found = expand_load(builder, source, kind, mask)
        builder.store(found, vectors.address(builder, out, _FIRST, kind.element), align=1)
        return mask.count()

    expand = _compiled(target, lanes, bits, body)
    for mask, lit, row in _cases(lanes, bits):
        out = np.zeros_like(row)
        assert expand(row, mask, out) == lit.sum()
        assert np.array_equal(out[lit], row[: lit.sum()])


@pytest.mark.parametrize(("lanes", "bits"), KINDS)
def test_compressing_puts_the_set_lanes_in_a_row(target: CompileTarget, lanes: int, bits: int) -> None:
    def body(builder, kind, source, mask, out):
        where = vectors.address(builder, source, _FIRST, kind.element)
        vector = builder.load(where, typ=kind, align=1)
        compress(builder, vector, mask, vectors.address(builder, out, _FIRST, kind.element))
        return mask.count()

    squeeze = _compiled(target, lanes, bits, body)
    for mask, lit, row in _cases(lanes, bits):
        out = np.zeros(lanes + 64, row.dtype)
        squeeze(row, mask, out)
        assert np.array_equal(out[: lit.sum()], row[lit])
        assert not out[lanes:].any()  # no more than a vector is written


def test_compressing_before_leaves_alone_what_is_behind(target: CompileTarget) -> None:
    end = 24

    def body(builder, kind, source, mask, out):
        vector = vectors.load(builder, ir.IntType(32), source, _FIRST)
        return compress_before(builder, vector, mask, out, ir.Constant(ir.IntType(64), end))

    squeeze = _compiled(target, 16, 32, body)
    for mask, lit, row in _cases(16, 32):
        out = np.full(40, 0xABCD, np.uint16)
        start = squeeze(row, mask, out)
        assert start == end - lit.sum()
        assert np.array_equal(out[start:end], row[lit].astype(np.uint16))
        assert (out[end:] == 0xABCD).all()
        assert (out[: end - 16 - 8] == 0xABCD).all()


def test_neon_shuffles_bytes() -> None:
    """Not run here: that LLVM makes instructions of it."""
    neon = CompileTarget("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon")
    initialize()
    names = [f"{OPERATION}expand_load.v16i16", f"{OPERATION}compress.v16i16"]
    machine = llvm.Target.from_triple(neon.triple).create_target_machine(neon.processor)
    code = machine.emit_assembly(llvm.parse_assembly(define(names, neon).replace("linkonce_odr", "")))
    assert code.count("tbl\t") == 4
