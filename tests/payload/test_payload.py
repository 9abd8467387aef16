"""The codec's law: what was encoded comes back bit for bit, or there is a PayloadError; never other bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights import PayloadError
from deltaweights.codec import (
    RECORD,
    Method,
    checksum,
    compare_row,
    compress_blocks,
    decode_chunk,
    decode_row,
    decompress_blocks,
    element_bytes,
    encode_chunk,
)
from deltaweights.codec.constants import HEAD
from deltaweights.codec.methods import floats, planes, ulp
from deltaweights.codec.methods.ulp import FORMATS
from deltaweights.dtypes import DTYPE_BITS
from deltaweights.payload import ChunkPlan, check_records, decode, encode

from ..checkpoints import Array, bf16, f32, weights
from ..codec.pairs import decayed, fine_tune

Bytes = NDArray[np.uint8]

dtypes = st.sampled_from([*DTYPE_BITS, "A_DTYPE_OF_THE_FUTURE"])
lengths = st.integers(0, 700) | st.sampled_from([4096, 4097, 8192, 20_000])
chunk_sizes = st.sampled_from([1, 2, 3, 7, 8, 64, 100, 4096, 1 << 20])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def arrays(draw: st.DrawFn, length: int) -> Bytes:
    """``length`` bytes: noise, a few distinct values, zeros, or every element alike."""
    generator = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["noise", "zeros", "few values", "repeated word"]))
    if kind == "zeros":
        return np.zeros(length, np.uint8)
    if kind == "few values":
        return generator.choice(np.array([0, 1, 0x3C, 0x7F, 0x80, 0xFF], np.uint8), length)
    if kind == "repeated word":
        return np.resize(generator.integers(0, 256, 8, np.uint8), length)
    return generator.integers(0, 256, length, np.uint8)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bytes | None, Bytes]:
    """A base (or none) and a target of one length: equal, slightly changed, or unrelated."""
    length = draw(lengths)
    target = draw(arrays(length))
    kind = draw(st.sampled_from(["none", "equal", "changed", "unrelated"]))
    if kind == "none":
        return None, target
    if kind == "equal":
        return target.copy(), target
    if kind == "unrelated":
        return draw(arrays(length)), target
    generator = np.random.default_rng(draw(seeds))
    base = target.copy()
    places = generator.random(length) < draw(st.sampled_from([0.001, 0.1, 0.9]))
    base[places] ^= generator.integers(0, 256, np.count_nonzero(places), np.uint8)
    return base, target


@settings(max_examples=400)
@given(pairs(), dtypes, chunk_sizes)
def test_any_bytes_come_back(pair: tuple[Bytes | None, Bytes], dtype: str, chunk_bytes: int) -> None:
    base, target = pair
    payload = encode(base, target, dtype, chunk_bytes=max(chunk_bytes, target.size // 100))
    decoded = decode(
        base, payload, dtype, nbytes=target.size, chunk_bytes=max(chunk_bytes, target.size // 100)
    )
    assert decoded.tobytes() == target.tobytes()


@given(pairs(), dtypes)
def test_out_is_filled_and_returned(pair: tuple[Bytes | None, Bytes], dtype: str) -> None:
    base, target = pair
    out = np.full(target.size, 0xA5, np.uint8)
    assert decode(base, encode(base, target, dtype), dtype, out) is out
    assert out.tobytes() == target.tobytes()


@given(pairs(), dtypes)
def test_a_payload_is_no_larger_than_the_bytes_and_their_records(
    pair: tuple[Bytes | None, Bytes], dtype: str
) -> None:
    base, target = pair
    payload = encode(base, target, dtype, chunk_bytes=4096)
    assert len(payload) <= target.size + -(-target.size // 4096) * RECORD.itemsize


@given(pairs(), dtypes)
def test_the_same_input_gives_the_same_payload(pair: tuple[Bytes | None, Bytes], dtype: str) -> None:
    base, target = pair
    assert encode(base, target, dtype) == encode(base, target, dtype)


@given(lengths.flatmap(arrays), dtypes)
def test_equal_bytes_take_up_only_their_records(data: Bytes, dtype: str) -> None:
    assert len(encode(data, data, dtype, chunk_bytes=4096)) == -(-data.size // 4096) * RECORD.itemsize


@settings(max_examples=400)
@given(pairs(), dtypes)
def test_a_chunk_comes_back_alone(pair: tuple[Bytes | None, Bytes], dtype: str) -> None:
    base, target = pair
    before = target.copy()
    method, data = encode_chunk(base, target, dtype)
    out = np.full(target.size, 0x5A, np.uint8)
    decode_chunk(int(method), data, base, dtype, out)
    assert out.tobytes() == target.tobytes() == before.tobytes()
    assert len(data) <= target.size


def test_bytes_and_memoryviews_are_taken_too() -> None:
    base, target = b"0123456789", b"0123456780"
    payload = encode(base, target, "U8")
    assert payload == encode(np.frombuffer(base, np.uint8), np.frombuffer(target, np.uint8), "U8")
    assert decode(base, payload, "U8").tobytes() == target


@pytest.mark.parametrize(("make", "update"), [(bf16, 1e-4), (f32, 1e-6)], ids=["BF16", "F32"])
def test_trained_weights_cost_less_against_their_base_than_alone(
    make: Callable[[NDArray[np.float32]], Array], update: float
) -> None:
    old = weights((256, 256), 1)
    base, target = make(old), make(old + weights((256, 256), 2, update))
    alone = len(encode(None, target.data, target.dtype))
    against = len(encode(base.data, target.data, target.dtype))
    assert against < 0.7 * alone < 0.7 * len(target.data)


def test_a_base_of_another_length_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="base has 3 bytes, target 4"):
        encode(b"abc", b"abcd", "U8")
    with pytest.raises(ValueError, match="base has 3 bytes, target 4"):
        decode(b"abc", encode(b"abcd", b"abcd", "U8"), "U8", np.empty(4, np.uint8))


def test_the_length_must_be_known() -> None:
    with pytest.raises(ValueError, match="out= or nbytes="):
        decode(None, encode(None, b"abcd", "U8"), "U8")


# Damage and wrong bases ------------------------------------------------------------------------------


@given(pairs().filter(lambda pair: pair[0] is not None and pair[0].size > 0), dtypes, st.data())
def test_one_flipped_bit_in_the_base_is_found(
    pair: tuple[Bytes, Bytes], dtype: str, data: st.DataObject
) -> None:
    base, target = pair
    payload = encode(base, target, dtype, chunk_bytes=4096)
    position = data.draw(st.integers(0, base.size - 1))
    base[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(PayloadError, match="base"):
        decode(base, payload, dtype, chunk_bytes=4096)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "U8"])
def test_a_payload_cut_anywhere_is_found(dtype: str, with_base: bool) -> None:
    base, target, payload = _example(dtype, with_base)
    assert decode(base, payload, dtype, nbytes=len(target), chunk_bytes=512).tobytes() == target
    for length in range(len(payload)):
        with pytest.raises(PayloadError):
            decode(base, payload[:length], dtype, nbytes=len(target), chunk_bytes=512)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_payload_with_bytes_added_is_found(with_base: bool) -> None:
    base, target, payload = _example("BF16", with_base)
    for more in (b"\0", payload):
        with pytest.raises(PayloadError):
            decode(base, payload + more, "BF16", nbytes=len(target), chunk_bytes=512)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "U8"])
def test_a_flipped_bit_never_gives_other_bytes(dtype: str, with_base: bool) -> None:
    base, target, payload = _example(dtype, with_base)
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << (position % 8)
        _check_never_wrong(base, bytes(damaged), dtype, target)


@settings(max_examples=400)
@given(
    st.sampled_from(["BF16", "F32", "U8", "F64", "F4"]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=30),
    st.booleans(),
)
def test_random_damage_never_gives_other_bytes(
    dtype: str, with_base: bool, changes: list[tuple[int, int]], keep_records: bool
) -> None:
    base, target, payload = _example(dtype, with_base)
    damaged = bytearray(payload)
    first = -(-len(target) // 512) * RECORD.itemsize if keep_records else 0
    for position, value in changes:
        damaged[first + position % (len(payload) - first)] = value
    _check_never_wrong(base, bytes(damaged), dtype, target)


@given(st.binary(max_size=400), st.integers(0, 255), st.booleans(), dtypes, st.sampled_from([0, 1, 8, 100]))
def test_a_hostile_chunk_is_decoded_or_refused(
    data: bytes, method: int, with_base: bool, dtype: str, length: int
) -> None:
    base = np.zeros(length, np.uint8) if with_base else None
    out = np.empty(length, np.uint8)
    with suppress(PayloadError):
        decode_chunk(method, data, base, dtype, out)


@given(st.binary(max_size=300), st.sampled_from([0, 1, 100, 5000]))
def test_a_hostile_payload_is_refused(payload: bytes, nbytes: int) -> None:
    if nbytes or payload:
        with pytest.raises(PayloadError):
            decode(None, payload, "BF16", nbytes=nbytes)


def test_a_method_that_nobody_knows_is_refused() -> None:
    with pytest.raises(PayloadError, match="a later version"):
        decode_chunk(255, b"", np.zeros(4, np.uint8), "U8", np.empty(4, np.uint8))


def test_a_chunk_that_needs_a_base_is_refused_without_one() -> None:
    base, target, payload = _example("BF16", with_base=True)
    with pytest.raises(PayloadError):
        decode(None, payload, "BF16", nbytes=len(target), chunk_bytes=512)
    payload = encode(None, target, "BF16")
    with pytest.raises(PayloadError, match="base"):
        decode(base, payload, "BF16")


# The chunk plan and its records ----------------------------------------------------------------------


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(1, 700))
@example(5000, 1.0, 5000)
def test_the_chunks_tile_the_tensor(nbytes: int, share: float, chunk_bytes: int) -> None:
    shared = int(nbytes * share)
    plan = ChunkPlan(nbytes, shared, chunk_bytes)
    spans = list(plan)
    assert len(spans) == plan.count
    assert [plan.span(index) for index in range(plan.count)] == spans
    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), nbytes]
    assert all(0 < end - start <= chunk_bytes for start, end in spans)
    for index, (_, end) in enumerate(spans):
        assert plan.has_base(index) == (end <= shared) == (index < plan.shared_count)
    assert all((start < shared) == (end <= shared) for start, end in spans), "a chunk crosses `shared`"


@given(st.integers(0, 2**45), st.integers(0, 2**45), st.sampled_from([4096, 1 << 20]))
def test_a_plan_for_a_huge_tensor_costs_nothing(nbytes: int, shared: int, chunk_bytes: int) -> None:
    plan = ChunkPlan(nbytes, min(shared, nbytes), chunk_bytes)
    if plan.count:
        assert plan.span(0)[0] == 0
        assert plan.span(plan.count - 1)[1] == nbytes
    for index in (1, plan.shared_count - 1, plan.shared_count, plan.shared_count + 1, plan.count - 1):
        if 0 < index < plan.count:
            assert plan.span(index - 1)[1] == plan.span(index)[0]


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_records_say_where_each_chunk_lies(sizes: list[int]) -> None:
    records = np.zeros(len(sizes), RECORD)
    records["length"] = sizes
    plan = ChunkPlan(len(sizes) * 10, 0, 10)
    total = records.nbytes + sum(sizes)
    found, starts = check_records(records.tobytes(), plan, total)
    assert found["length"].tolist() == sizes
    edges = [*starts.tolist(), total]
    assert edges[0] == records.nbytes
    assert [after - before for before, after in pairwise(edges)] == sizes
    for wrong in (total - 1, total + 1):
        with pytest.raises(PayloadError, match="add up"):
            check_records(records.tobytes(), plan, wrong)
    with pytest.raises(PayloadError, match="too short"):
        check_records(records.tobytes()[:-1] or b"?", plan, total)


def test_lengths_that_would_overflow_are_refused() -> None:
    records = np.zeros(3, RECORD)
    records["length"] = 0xFFFFFFFF
    with pytest.raises(PayloadError, match="add up"):
        check_records(records.tobytes(), ChunkPlan(3, 0, 1), records.nbytes + (3 * 0xFFFFFFFF) % 2**32)


def test_a_record_has_24_bytes_little_endian() -> None:
    assert RECORD.itemsize == 24
    assert RECORD.fields is not None
    assert {name: field[1] for name, field in RECORD.fields.items()} == {
        "method": 0,
        "reserved": 1,
        "length": 4,
        "base": 8,
        "target": 16,
    }
    payload = encode(b"abcd", b"abce", "U8")
    assert payload[1:4] == b"\0\0\0"
    assert int.from_bytes(payload[4:8], "little") == len(payload) - 24
    assert int.from_bytes(payload[8:16], "little") == checksum(np.frombuffer(b"abcd", np.uint8))
    assert int.from_bytes(payload[16:24], "little") == checksum(np.frombuffer(b"abce", np.uint8))


def test_the_checksum_is_xxh3_64() -> None:
    assert checksum(np.empty(0, np.uint8)) == 0x2D06800538D394C2  # the reference implementation's value


@given(
    st.integers(1, 9000),
    st.sampled_from([*DTYPE_BITS, "A_DTYPE_OF_THE_FUTURE"]),
    st.sampled_from([64, 256, 4096, 1 << 20]),
    st.integers(0, 2),
    seeds,
)
def test_rows_are_compared_chunk_by_chunk(
    nbytes: int, dtype: str, chunk_bytes: int, offset: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 256, nbytes + offset, np.uint8)[offset:]
    target = base.copy()
    target[generator.random(nbytes) < 0.1] ^= np.uint8(0x81)
    found = compare_row(base, target, dtype, chunk_bytes)
    spans = [slice(start, start + chunk_bytes) for start in range(0, nbytes, chunk_bytes)]
    size = element_bytes(dtype, nbytes)
    differ = (base != target).reshape(-1, size).any(axis=1).repeat(size)
    assert found.base.tolist() == [checksum(base[span]) for span in spans]
    assert found.target.tolist() == [checksum(target[span]) for span in spans]
    assert found.changed.tolist() == [int(differ[span].sum()) // size for span in spans]


def test_bits_are_compared_not_values() -> None:
    zero, minus_zero, nan = (np.frombuffer(x, np.uint8) for x in (b"\0\0", b"\0\x80", b"\xc0\x7f"))
    assert compare_row(zero, minus_zero, "BF16", 64).changed.tolist() == [1]
    assert compare_row(nan, nan, "BF16", 64).changed.tolist() == [0]
    with pytest.raises(ValueError, match="2 bytes, target 1"):
        compare_row(zero, nan[:1], "BF16", 64)


# rows ------------------------------------------------------------------------------------------------


def row_of(base: Bytes, target: Bytes, dtype: str, chunk_bytes: int) -> tuple[NDArray[np.void], Bytes]:
    """(records, data) of all of a tensor's chunks."""
    payload = np.frombuffer(encode(base, target, dtype, chunk_bytes=chunk_bytes), np.uint8)
    plan = ChunkPlan(target.size, target.size, chunk_bytes)
    table = payload[: plan.count * RECORD.itemsize]
    return check_records(table.tobytes(), plan, payload.size)[0], payload[table.size :]


_IN_ROWS = [Method.SAME, Method.DELTA, Method.SPARSE, Method.DRIFT]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F32", "C64"])
@pytest.mark.parametrize("update", [0, 1e-7, 2e-6, 1e-5, 2e-4, 1e-2])
def test_what_floats_of_at_most_32_bits_become_is_decoded_in_one_call(dtype: str, update: float) -> None:
    base, target = fine_tune(dtype, 70_000, update, seed=1)
    records, data = row_of(base, target, dtype, 1 << 15)
    out = np.zeros_like(target)
    is_done = decode_row(records, data, base, dtype, out, 1 << 15)
    simple = np.isin(records["method"], _IN_ROWS)
    assert is_done.tolist() == simple.tolist()
    assert simple.any()
    span = np.repeat(is_done, 1 << 15)[: out.size]
    assert np.array_equal(out[span], target[span])


@pytest.mark.parametrize(("rate", "steps"), [(2e-7, 1), (2e-7, 1000), (1e-6, 1000)])
@pytest.mark.parametrize("moved", [0, 0.02, 0.3])
def test_so_is_what_decayed(rate: float, steps: int, moved: float) -> None:
    base, target = decayed(100_000, rate, steps, moved)
    records, data = row_of(base, target, "F32", 1 << 18)
    out = np.zeros_like(target)
    assert decode_row(records, data, base, "F32", out, 1 << 18).all()
    assert (records["method"] == Method.DRIFT).all()
    assert np.array_equal(out, target)


@pytest.mark.parametrize("kind", planes.Plane)
def test_planes_of_all_kinds_are_decoded_in_one_call(kind: planes.Plane) -> None:
    generator, size, form = np.random.default_rng(0), 1 << 14, FORMATS["F32"]
    plane = {
        planes.Plane.RAW: generator.integers(0, 256, size, np.uint8),
        planes.Plane.FILL: np.full(size, 7, np.uint8),
        planes.Plane.ZSTD: np.resize(generator.permutation(128).astype(np.uint8), size),
        planes.Plane.RANS: generator.integers(0, 50, size, np.uint8),
    }[kind]
    before = np.full(size, 0x3F800000, np.uint32)  # all alike: each has a byte in the lowest plane
    after = ulp.restore(before, plane.astype(np.uint32) | np.uint32(1 << 20))
    base, target = before.view(np.uint8), after.view(np.uint8)
    data = np.frombuffer(floats.encode_delta(base, target, form) or b"", np.uint8)
    _, behind = floats.take_section(data[HEAD:])
    assert behind[0] == kind
    records = np.array([(Method.DELTA, 0, len(data), checksum(base), checksum(target))], RECORD)
    out = np.zeros_like(target)
    assert decode_row(records, data, base, "F32", out, base.size).all()
    assert np.array_equal(out, target)
    assert np.array_equal(decode(base, records.tobytes() + data.tobytes(), "F32"), target)


@given(pairs(), dtypes, chunk_sizes, seeds, st.sampled_from(["nothing", "data", "base", "records"]))
def test_chunks_of_a_row_are_done_only_if_they_are_right(
    pair: tuple[Bytes | None, Bytes], dtype: str, chunk_bytes: int, seed: int, damage: str
) -> None:
    base, target = pair
    if base is None or not target.size:
        return
    records, data = row_of(base, target, dtype, chunk_bytes)
    records, data, base = records.copy(), data.copy(), base.copy()
    generator = np.random.default_rng(seed)
    raw = {"data": data, "base": base, "records": records.view(np.uint8)}.get(damage, data[:0])
    if raw.size:
        raw[generator.integers(0, raw.size)] ^= np.uint8(1 << generator.integers(0, 8))
    records["length"] = np.minimum(records["length"], chunk_bytes)  # as their reader makes sure
    out = np.zeros_like(target)
    is_done = decode_row(records, data, base, dtype, out, chunk_bytes)
    for index in np.flatnonzero(is_done):
        span = slice(index * chunk_bytes, (index + 1) * chunk_bytes)
        assert np.array_equal(out[span], target[span])


def test_what_a_row_cannot_be_written_to_is_refused() -> None:
    base, target = fine_tune("BF16", 3000, 1e-4)
    records, data = row_of(base, target, "BF16", 4096)
    read_only = target.copy()
    read_only.flags.writeable = False
    words: NDArray[Any] = target.copy().view(np.uint16)
    for old, out, chunk_bytes in (
        (base, read_only, 4096),
        (base[:-2], target.copy(), 4096),
        (base, target.copy(), 2048),
        (base, words, 4096),
    ):
        with pytest.raises(ValueError, match=r"read-only|chunks"):
            decode_row(records, data, old, "BF16", out, chunk_bytes)


@given(dtypes, st.integers(0, 1000))
def test_an_element_divides_its_chunk(dtype: str, nbytes: int) -> None:
    size = element_bytes(dtype, nbytes)
    assert nbytes % size == 0
    assert size in {1, max(1, DTYPE_BITS.get(dtype, 8) // 8)}


# Opaque bytes ----------------------------------------------------------------------------------------

blocks = st.lists(st.binary(max_size=2000), max_size=8)


@given(blocks, st.sampled_from([1, 3, 9]))
def test_compressed_blocks_come_back(parts: list[bytes], level: int) -> None:
    packed = list(compress_blocks(parts, level))
    assert b"".join(decompress_blocks(packed)) == b"".join(parts)


@given(blocks, st.integers(1, 50))
def test_how_the_frame_is_cut_into_blocks_does_not_matter(parts: list[bytes], size: int) -> None:
    packed = b"".join(compress_blocks(parts))
    pieces = [packed[k : k + size] for k in range(0, len(packed), size)]
    assert b"".join(decompress_blocks(pieces)) == b"".join(parts)


def test_zstandard_reads_what_we_write() -> None:
    packed = b"".join(compress_blocks([b"abc" * 1000]))
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == b"abc" * 1000


def test_a_bomb_comes_out_in_blocks_of_a_mebibyte() -> None:
    packed = b"".join(compress_blocks(bytes(1 << 20) for _ in range(64)))
    assert len(packed) < 16_384
    lengths = [len(block) for block in decompress_blocks([packed])]
    assert sum(lengths) == 64 << 20
    assert max(lengths) <= 1 << 20


def test_a_frame_cut_anywhere_is_found() -> None:
    content = zlib.compress(bytes(range(256)) * 4)
    packed = b"".join(compress_blocks([content]))
    for length in range(len(packed)):
        with pytest.raises(PayloadError):
            _check_incomplete(packed[:length], content)


def test_a_frame_that_asks_for_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(bytes(1000)) + compressor.flush()
    with pytest.raises(PayloadError, match="does not decompress"):
        list(decompress_blocks([packed]))


@given(st.binary(min_size=1, max_size=100))
def test_what_is_not_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        _check_incomplete(data, None)


# Helpers ---------------------------------------------------------------------------------------------


def _example(dtype: str, with_base: bool) -> tuple[bytes | None, bytes, bytes]:
    """A small payload of several chunks, some equal to the base, some changed, some noise."""
    old = bf16(weights((32, 16), 1)).data + np.random.default_rng(2).bytes(512) + bytes(400)
    new = bf16(weights((32, 16), 1) + weights((32, 16), 3, 1e-4)).data[:512] + old[512:]
    new = new[:-600] + np.random.default_rng(4).bytes(200) + new[-400:]
    base = old if with_base else None
    return base, new, encode(base, new, dtype, chunk_bytes=512)


def _check_never_wrong(base: bytes | None, payload: bytes, dtype: str, target: bytes) -> None:
    try:
        decoded = decode(base, payload, dtype, nbytes=len(target), chunk_bytes=512)
    except PayloadError:
        return
    assert decoded.tobytes() == target


def _check_incomplete(packed: bytes, content: bytes | None) -> None:
    """As the callers do: what comes out must be all there. A frame that ends early may just stop."""
    decompressed = b"".join(decompress_blocks([packed]))
    if decompressed != content:
        raise PayloadError("It does not hold the whole content")
