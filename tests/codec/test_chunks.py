"""encode_chunk and decode_chunk: exact for all bytes, lengths, dtypes and alignments."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaweights.codec import MAX_CHUNK, Method, decode_chunk, encode_chunk, patch_chunk
from deltaweights.codec.methods import drift, floats, sparse
from deltaweights.codec.methods.ulp import FORMATS
from deltaweights.errors import PayloadError

from .pairs import Bytes, decayed, fine_tune, noise, numpy_free_alignment, to_bits

OTHERS = ["F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "BOOL", "I8", "U8", "I16", "U16", "I32", "U32"]
DTYPES = [*FORMATS, *OTHERS, "I64", "U64", "NEW_TYPE"]


def round_trip(base: Bytes | None, target: Bytes, dtype: str) -> tuple[Method, bytes]:
    method, data = encode_chunk(base, target, dtype)
    out = np.full(len(target), 0xA5, np.uint8)
    decode_chunk(method, data, base, dtype, out)
    assert np.array_equal(out, target)
    assert len(data) <= len(target)
    if base is not None:
        in_place(method, data, base, target, dtype)
    return method, data


def in_place(method: Method, data: bytes, base: Bytes, target: Bytes, dtype: str) -> None:
    """The base's own memory may get the target; where only places are written, it can be had back."""
    chunk = base.copy()
    decode_chunk(method, data, chunk, dtype, chunk)
    assert np.array_equal(chunk, target)
    chunk = base.copy()
    overwritten = patch_chunk(method, data, chunk, dtype)
    assert np.array_equal(chunk, base if overwritten is None else target)
    if overwritten:
        assert overwritten.nbytes <= 8 * np.count_nonzero(base != target)
        overwritten.put_back(chunk)
        assert np.array_equal(chunk, base)


@given(
    dtype=st.sampled_from(DTYPES),
    base=st.none() | st.binary(max_size=300),
    target=st.binary(max_size=300),
    changes=st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_any_bytes_round_trip(
    dtype: str, base: bytes | None, target: bytes, changes: list[tuple[int, int]]
) -> None:
    there = np.frombuffer(target, np.uint8)
    if base is None:
        round_trip(None, there, dtype)
        return
    before = np.resize(np.frombuffer(base or b"\0", np.uint8), len(there))
    round_trip(before, there, dtype)
    near = before.copy()
    for place, value in changes:
        if place < len(near):
            near[place] = value
    round_trip(before, near, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("share", [1e-4, 0.01, 0.019, 0.03, 0.5])
def test_quick_chunks_round_trip(dtype: str, share: float) -> None:
    """And are not much longer, nor at all where more changed."""
    rng = np.random.default_rng(0)
    base, _ = fine_tune(dtype, 100_000, 1e-3, seed=1)
    word = base.view(f"<u{FORMATS[dtype].itemsize}")
    target = word ^ (rng.random(len(word)) < share).astype(word.dtype)
    method, data = encode_chunk(base, target.view(np.uint8), dtype, quick=True)
    out = np.zeros_like(base)
    decode_chunk(method, data, base, dtype, out)
    assert np.array_equal(out, target.view(np.uint8))
    least = len(encode_chunk(base, target.view(np.uint8), dtype)[1])
    assert len(data) <= (1.6 * least + 64 if share < 0.02 else least)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [1, 15, 64, 1000, 4096, 20_001, 150_000])
def test_fine_tunes_round_trip(dtype: str, count: int) -> None:
    for update in (1e-6, 1e-4, 1e-2, 1.0):
        base, target = fine_tune(dtype, count, update, seed=count)
        round_trip(base, target, dtype)
    round_trip(None, target, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_round_trips(dtype: str) -> None:
    for count in (3, 4096, 30_000):
        target = noise(dtype, count, seed=1)
        round_trip(None, target, dtype)
        round_trip(noise(dtype, count, seed=2), target, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_pattern_against_every_kind_of_base(dtype: str) -> None:
    form = FORMATS[dtype]
    if form.itemsize > 2:
        pytest.skip("too many patterns")
    patterns = np.arange(1 << 8 * form.itemsize).astype(form.dtype)
    for shift in (0, 1, 12345):
        round_trip(np.roll(patterns, shift).view(np.uint8), patterns.view(np.uint8), dtype)
    for one in (0, 1 << 8 * form.itemsize - 1, form.mask << form.shift):
        base = np.full_like(patterns, one)
        round_trip(base.view(np.uint8), patterns.view(np.uint8), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_rare_changes_are_sparse_wherever_they_are(dtype: str) -> None:
    rng = np.random.default_rng(5)
    form = FORMATS[dtype]
    base = to_bits(rng.normal(0, 0.02, 100_003), dtype)
    for places in ([0], [100_002], [7, 8, 9], rng.choice(100_003, 300, replace=False)):
        target = base.copy()
        target[places] ^= rng.integers(1, 1 << 8, len(places)).astype(form.dtype)
        method, data = round_trip(base.view(np.uint8), target.view(np.uint8), dtype)
        assert method == Method.SPARSE
        assert len(data) < 100 + 4 * len(places)


@pytest.mark.parametrize("dtype", ["F32", "C64"])
@pytest.mark.parametrize("count", [1000, 20_002, 150_000])
@pytest.mark.parametrize(("rate", "steps"), [(2e-7, 1), (2e-7, 1000), (1e-5, 100)])
@pytest.mark.parametrize("moved", [0.0, 0.1, 0.7, 1.0])
def test_decayed_weights_round_trip(dtype: str, count: int, rate: float, steps: int, moved: float) -> None:
    base, target = decayed(count, rate, steps, moved)
    base.view("<u4")[::100] = target.view("<u4")[::100] = 0  # as rows of padding are
    method, _ = round_trip(base, target, dtype)
    if count > 20_000 and moved < 0.2:
        assert method == Method.DRIFT


@given(
    base=st.binary(min_size=4, max_size=400),
    target=st.binary(min_size=4, max_size=400),
    shifts=st.integers(0, 5).flatmap(
        lambda log: st.lists(
            st.integers(0, 2**32 - 1) | st.integers(0, 3), min_size=1 << log, max_size=1 << log
        )
    ),
    near=st.sampled_from(["SAME", "SPARSE", "DELTA"]),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_drift_by_any_shifts(base: bytes, target: bytes, shifts: list[int], near: str) -> None:
    form = FORMATS["F32"]
    there = np.frombuffer(target[: len(target) // 4 * 4], np.uint8)
    before = np.resize(np.frombuffer(base, np.uint8), len(there))
    numbers = np.array(shifts, np.uint32)
    moved = drift.drifted(before, numbers, form).copy()
    method, data = Method.SAME, b""
    if near == "SPARSE":
        there = moved.copy()
        there[:4] ^= 1
        method, found = Method.SPARSE, sparse.encode_sparse(moved, there, form, quick=True)
    if near == "DELTA":
        method, found = Method.DELTA, floats.encode_delta(moved, there, form)
    if near != "SAME":
        if found is None:
            return
        data = found
    out = np.zeros_like(there)
    decode_chunk(Method.DRIFT, drift.put_head(numbers, method) + data, before, "F32", out)
    assert np.array_equal(out, moved if near == "SAME" else there)


def test_unaligned_and_read_only_arrays() -> None:
    base, target = fine_tune("F32", 5000, 1e-3)
    for offset in (0, 1, 2, 3):
        there, before = numpy_free_alignment(target, offset), numpy_free_alignment(base, 3 - offset)
        there.flags.writeable = False
        method, data = encode_chunk(before, there, "F32")
        out = numpy_free_alignment(np.zeros_like(target), offset)
        decode_chunk(method, memoryview(data), before, "F32", out)
        assert np.array_equal(out, target)
    base, target = decayed(30_000, 2e-7, 100)
    before, out = numpy_free_alignment(base, 1), numpy_free_alignment(np.zeros_like(target), 2)
    method, data = encode_chunk(before, numpy_free_alignment(target, 3), "F32")
    assert method == Method.DRIFT
    decode_chunk(method, data, before, "F32", out)
    assert np.array_equal(out, target)


def test_float32_with_compressible_planes_alone_and_against_a_base() -> None:
    rng = np.random.default_rng(2)
    base = to_bits(rng.normal(0, 0.02, 60_000), "F32") & np.uint32(0xFFFFFF00)
    target = base + rng.integers(0, 3, 60_000).astype("<u4") * np.uint32(0x2100)
    for before in (None, base.view(np.uint8)):
        _, data = round_trip(before, target.view(np.uint8), "F32")
        assert len(data) < 0.72 * 4 * 60_000


def test_equal_chunks_cost_nothing() -> None:
    base, _ = fine_tune("BF16", 1000, 0)
    assert encode_chunk(base, base.copy(), "BF16") == (Method.SAME, b"")
    assert encode_chunk(None, base[:0], "BF16") == (Method.RAW, b"")


def test_noise_stays_raw() -> None:
    target = noise("BF16", 10_000)
    assert encode_chunk(None, target, "U8") == (Method.RAW, target.tobytes())


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="the base has"):
        encode_chunk(np.zeros(2, np.uint8), np.zeros(4, np.uint8), "BF16")
    big = np.zeros(MAX_CHUNK + 1, np.uint8)
    with pytest.raises(ValueError, match="longer"):
        encode_chunk(None, big, "BF16")


def test_what_kernels_could_write_or_read_wrongly_is_refused() -> None:
    """They are given addresses: of bytes that nothing may change, or of elements where bytes are counted."""
    base, target = fine_tune("BF16", 5000, 1e-4)
    few = base.copy()
    few.view("<u2")[7] ^= 1
    for there in (target, few):
        method, data = encode_chunk(base, there, "BF16")
        frozen = bytes(len(base))
        out = np.frombuffer(frozen, np.uint8)
        with pytest.raises(ValueError, match="read-only"):
            decode_chunk(method, data, base, "BF16", out)
        with pytest.raises(ValueError, match="read-only"):
            patch_chunk(method, data, out, "BF16")
        assert frozen == bytes(len(base))
        with pytest.raises(ValueError, match="uint8"):
            decode_chunk(method, data, base, "BF16", np.zeros(len(base), np.uint16))
        with pytest.raises(ValueError, match="uint8"):
            encode_chunk(base, np.zeros(len(base), np.uint16), "BF16")


def test_a_base_that_is_missing_or_unwanted_is_an_error() -> None:
    base, target = fine_tune("BF16", 5000, 1e-4)
    method, data = encode_chunk(base, target, "BF16")
    out = np.zeros_like(target)
    with pytest.raises(PayloadError):
        decode_chunk(method, data, None, "BF16", out)
    with pytest.raises(PayloadError):
        decode_chunk(99, data, base, "BF16", out)
    with pytest.raises(PayloadError):
        decode_chunk(Method.SAME, b"", None, "BF16", out)


def test_encoding_is_deterministic_and_thread_safe() -> None:
    pairs = [fine_tune("BF16", 40_000, 10.0**-k, seed=k) for k in range(2, 7)] * 4
    alone = [encode_chunk(base, target, "BF16") for base, target in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: encode_chunk(pair[0], pair[1], "BF16"), pairs))
    assert together == alone


def test_importing_the_codec_does_not_import_numba() -> None:
    code = "import sys, deltaweights.codec; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
