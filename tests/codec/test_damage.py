"""Damaged payloads: PayloadError or wrong bytes, never a crash, a hang or a huge allocation."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from deltaweights.codec import Method, decode_chunk, encode_chunk, patch_chunk, read_patch
from deltaweights.codec.methods import drift
from deltaweights.errors import PayloadError

from .pairs import Bytes, decayed, fine_tune, noise, to_bits

Case = tuple[str, Bytes | None, Bytes]


def cases() -> dict[str, Case]:
    base, target = fine_tune("BF16", 3000, 1e-4)
    long_base, long_target = fine_tune("BF16", 40_000, 3e-4)
    sparse_base, sparse_target = fine_tune("BF16", 60_000, 2e-6)
    wide_base, wide_target = fine_tune("F32", 3000, 1e-4)
    double_base, double_target = fine_tune("F64", 1000, 1e-4)
    integers = np.random.default_rng(0).normal(0, 50, 3000).astype("<i4").view(np.uint8)
    with_zeros = long_target.copy()
    with_zeros.view("<u2")[::50] = 0
    return {
        "delta": ("BF16", base, target),
        "long delta": ("BF16", long_base, long_target),
        "sparse": ("BF16", sparse_base, sparse_target),
        "wide": ("F32", wide_base, wide_target),
        "double": ("F64", double_base, double_target),
        "drift": ("F32", *decayed(9000, 2e-7, 1000, moved=0.3)),
        "rare drift": ("F32", *decayed(60_000, 2e-7, 1000, moved=0.02)),
        "alone": ("F8_E5M2", None, fine_tune("F8_E5M2", 9000, 1e-3)[1]),
        "window": ("BF16", None, with_zeros),
        "planes": ("I32", integers, integers[::-1].copy()),
        "zstd": ("BF16", None, np.tile(target[:512], 20)),
        "eight bits": ("F8_E4M3", *fine_tune("F8_E4M3", 3000, 1e-3)),
    }


def test_mutated_places_are_refused_or_can_be_put_back() -> None:
    base, _ = fine_tune("BF16", 60_000, 1e-6)
    rng = np.random.default_rng(3)
    target = (base.view("<u2") ^ (rng.random(60_000) < 0.01)).view(np.uint8)
    method, data = encode_chunk(base, target, "BF16", quick=True)
    refused = 0
    for _ in range(600):
        room = np.full(len(target) + 64, 0x5A, np.uint8)
        chunk = room[32:-32]
        chunk[:] = base
        try:
            overwritten = patch_chunk(method, damaged(data, rng), chunk, "BF16")
        except PayloadError:
            refused += 1
        else:
            if overwritten:
                overwritten.put_back(chunk)
        assert np.array_equal(chunk, base)
        assert (room[:32] == 0x5A).all()
        assert (room[-32:] == 0x5A).all()
    assert refused > 100


def test_the_cases_are_of_every_method() -> None:
    found = {encode_chunk(base, target, dtype)[0] for dtype, base, target in cases().values()}
    assert found == set(Method) - {Method.RAW, Method.SAME}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Data with a few bytes changed, cut, doubled or filled, mostly near its beginning."""
    kind = rng.integers(5)
    where = int(len(data) * rng.random() ** 3)
    if kind == 0:
        return data[:where]
    if kind == 1:
        return data[:where] + data[where + int(rng.integers(1, 9)) :]
    if kind == 2:
        return data[:where] + rng.bytes(int(rng.integers(1, 9))) + data[where:]
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(len(data) * rng.random() ** 3)
        changed[at] = int(rng.integers(256)) if kind == 3 else (0, 255)[int(rng.integers(2))]
    return bytes(changed)


@pytest.mark.parametrize("name", cases())
def test_mutated_payloads(name: str) -> None:
    dtype, base, target = cases()[name]
    method, data = encode_chunk(base, target, dtype)
    assert method not in (Method.RAW, Method.SAME)
    rng = np.random.default_rng(list(cases()).index(name))
    refused = 0
    for _ in range(600):
        room = np.full(len(target) + 64, 0x5A, np.uint8)
        out = room[32:-32]
        try:
            decode_chunk(method, damaged(data, rng), base, dtype, out)
        except PayloadError:
            refused += 1
        assert (room[:32] == 0x5A).all()
        assert (room[-32:] == 0x5A).all()
    assert refused > 100


def test_mutated_places_that_others_write_to_are_within_their_chunk() -> None:
    """A GPU writes to what `read_patch` gives, unchecked."""
    base, target = fine_tune("BF16", 60_000, 1e-6)
    method, data = encode_chunk(base, target, "BF16", quick=True)
    rng, read = np.random.default_rng(5), 0
    for _ in range(600):
        try:
            patch = read_patch(method, np.frombuffer(damaged(data, rng), np.uint8), len(target), "BF16")
        except PayloadError:
            continue
        if patch:
            read += 1
            assert len(patch.places) == len(patch.distances)
            assert (np.diff(patch.places, prepend=-1) > 0).all()
            assert (patch.places < 60_000).all()
    assert read > 5


@pytest.mark.parametrize("name", ["delta", "sparse", "wide", "drift", "alone", "window", "planes", "zstd"])
def test_payloads_cut_anywhere(name: str) -> None:
    dtype, base, target = cases()[name]
    method, data = encode_chunk(base, target, dtype)
    out = np.zeros_like(target)
    for end in {*range(min(len(data), 200)), *range(0, len(data), 101)}:
        with pytest.raises(PayloadError):
            decode_chunk(method, data[:end], base, dtype, out)


@pytest.mark.parametrize("method", list(Method))
def test_random_payloads(method: Method) -> None:
    rng = np.random.default_rng(int(method))
    base = noise("F32", 2000)
    out = np.zeros_like(base)
    for dtype in ("BF16", "F32", "F64", "F8_E5M2", "I16"):
        for _ in range(150):
            payload = rng.bytes(int(rng.integers(0, 400)))
            for before in (base, None):
                try:
                    decode_chunk(method, payload, before, dtype, out)
                except PayloadError:
                    continue


def test_no_allocation_is_sized_by_the_payload() -> None:
    """A zstd frame that would expand to gigabytes, and lengths near 2**32."""
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    out = np.zeros(4096, np.uint8)
    tracemalloc.start()
    with pytest.raises(PayloadError):
        decode_chunk(Method.ZSTD, bomb, None, "BF16", out)
    with pytest.raises(PayloadError):
        decode_chunk(Method.PLANES, b"\0" + b"\1" + b"\xff" * 8 + b"\0", None, "U8", out)
    with pytest.raises(PayloadError):
        decode_chunk(Method.SPARSE, b"\x10\0" + b"\xff" * 40, out.copy(), "BF16", out)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_infinite_and_missing_numbers_survive() -> None:
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, 3e38])
    base = to_bits(np.resize(special, 5000), "BF16")
    target = np.roll(base, 1)
    method, data = encode_chunk(base.view(np.uint8), target.view(np.uint8), "BF16")
    out = np.zeros(10_000, np.uint8)
    decode_chunk(method, data, base.view(np.uint8), "BF16", out)
    assert np.array_equal(out.view(np.uint16), target)


@pytest.mark.parametrize(
    ("highest", "message"), [(127, "delta of a chunk"), (128, "head of a run"), (255, "head of a run")]
)
def test_tokens_of_longer_values_are_refused(highest: int, message: str) -> None:
    """The vector loops shift lanes of 32 bits by a token's raw bits, of which no 32-bit value has more."""
    base = np.zeros(256, np.uint8)
    head = struct.pack("<BBBhhb", 0, 0, 1, 0, 0, 0)
    states = (1 << 16).to_bytes(4, "little") * 16
    run = bytes([3 | 2 << 3, highest, 0]) + states  # 16 lanes, one table of the family
    with pytest.raises(PayloadError, match=message):
        decode_chunk(Method.DELTA, head + run, base, "BF16", base.copy())


@pytest.mark.parametrize(
    ("cutoff", "exceptions"), [(-2, 0), (-32768, 0), (-1, 9), (-1, 128), (-1, 2**32 - 1)]
)
def test_impossible_heads_of_sparse_chunks(cutoff: int, exceptions: int) -> None:
    """Below -1 vectors and single elements would differ; lists longer than a chunk would cost memory."""
    base = noise("BF16", 128)
    out = np.zeros_like(base)
    marks = struct.pack("<BII", 1, 1, 1) + b"\1"
    decode_chunk(Method.SPARSE, struct.pack("<hBI", -1, 0, 0) + marks, base, "BF16", out)
    assert np.array_equal(out, base)
    with pytest.raises(PayloadError, match="head of a sparse chunk"):
        decode_chunk(Method.SPARSE, struct.pack("<hBI", cutoff, 0, exceptions) + marks, base, "BF16", out)


@pytest.mark.parametrize("method", [Method.RAW, Method.ZSTD, Method.DRIFT, 255])
def test_drifted_chunks_are_coded_by_few_methods(method: int) -> None:
    """A drift under a drift, and so on, would be a recursion as deep as the payload is long."""
    base, _ = decayed(100, 1e-7, 1)
    head = drift.put_head(np.zeros(4, np.uint32), method)
    with pytest.raises(PayloadError, match="a drifted chunk"):
        decode_chunk(Method.DRIFT, head * 100, base, "F32", base.copy())


@pytest.mark.parametrize("dtype", ["BF16", "F64", "I32"])
def test_only_elements_of_32_bits_drift(dtype: str) -> None:
    base, _ = decayed(100, 1e-7, 1)
    shifts = np.zeros(4, np.uint32)
    with pytest.raises(PayloadError):
        decode_chunk(Method.DRIFT, drift.put_head(shifts, Method.SAME), base, dtype, base.copy())


@pytest.mark.parametrize("log", [13, 32, 255])
def test_more_shifts_than_mantissas_are_refused_before_there_is_room_for_them(log: int) -> None:
    base, _ = decayed(100, 1e-7, 1)
    data = bytes([log, Method.SAME]) + drift.put_head(np.zeros(4096, np.uint32), Method.SAME)[2:]
    tracemalloc.start()
    with pytest.raises(PayloadError, match="head of a drifted chunk"):
        decode_chunk(Method.DRIFT, data, base, "F32", base.copy())
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()
    decode_chunk(Method.DRIFT, bytes([12]) + data[1:], base, "F32", out := base.copy())
    assert np.array_equal(out, base)


def test_frames_that_want_a_long_window_are_refused() -> None:
    block = (100 << 3 | 2 | 1).to_bytes(3, "little") + b"A"  # one byte, a hundred times; the last block
    for log, fits in ((17, True), (23, True), (24, False), (27, False)):
        frame = bytes.fromhex("28b52ffd") + bytes([0, (log - 10) << 3]) + block
        out = np.zeros(100, np.uint8)
        if fits:
            decode_chunk(Method.ZSTD, frame, None, "U8", out)
            assert (out == ord("A")).all()
        else:
            with pytest.raises(PayloadError):
                decode_chunk(Method.ZSTD, frame, None, "U8", out)


def test_nothing_may_follow_a_frame() -> None:
    data = np.tile(np.arange(50, dtype=np.uint8), 20)
    method, frame = encode_chunk(None, data, "U8")
    assert method == Method.ZSTD
    out = np.zeros_like(data)
    for behind in (b"\0", frame, b"\x50\x2a\x4d\x18\0\0\0\0"):
        with pytest.raises(PayloadError):
            decode_chunk(method, frame + behind, None, "U8", out)


def test_states_that_no_encoder_leaves_are_refused() -> None:
    head = struct.pack("<BBBhhb", 0, 0, 1, 0, 0, 0)
    run = bytes([3 | 2 << 3, 20, 0]) + ((1 << 16) - 1).to_bytes(4, "little") * 16
    base = np.zeros(256, np.uint8)
    with pytest.raises(PayloadError, match="head of a run"):
        decode_chunk(Method.DELTA, head + run, base, "BF16", base.copy())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as Linux does it")
def test_kernels_stay_inside_their_arrays() -> None:
    subprocess.run([sys.executable, "-m", "tests.codec.guarded"], check=True)
