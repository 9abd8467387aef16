"""Quantized predictions: exact rounding, any part of a tensor alike, and damage that is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights import PayloadError
from deltaweights.codec import QUANTIZED, Quantized, parse_prediction, quantize, seal_prediction

from ..checkpoints import bf16, weights
from ..independent_reader import EIGHT_BITS

floats = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32))
#: Between two neighbours, where ties and the change to subnormal numbers are.
near = st.builds(
    lambda bits, half: np.float32(np.ldexp(bits / 32 + half, -12)),
    st.integers(-4096, 4096),
    st.sampled_from([0, 1 / 64]),
)


@given(st.sampled_from(QUANTIZED), st.lists(floats | near, min_size=1, max_size=50))
def test_floats_are_rounded_to_the_nearest(dtype: str, drawn: list[np.float32]) -> None:
    values = np.array(drawn, np.float32)
    expected = b"".join(EIGHT_BITS[dtype](float(value)) for value in values)
    assert quantize(values, dtype).tobytes() == expected


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    largest = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[dtype]
    values = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.clip(values[~np.isnan(values)], -largest, largest)
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    expected = torch.from_numpy(values).to(kind).view(torch.uint8).numpy()
    assert np.array_equal(quantize(values, dtype), expected)


def made(scales: NDArray[np.float32], block: tuple[int, int], columns: int, dtype: str = "I8") -> Quantized:
    return Quantized(dtype, "BF16", columns, block, scales)


@given(
    dtype=st.sampled_from(QUANTIZED),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_part_is_predicted_as_the_whole_is(
    dtype: str, rows: int, columns: int, block: tuple[int, int], cuts: tuple[float, float]
) -> None:
    shape = -(-rows // block[0]), -(-columns // block[1])
    scales = (np.abs(weights(shape, 1)) / 100 + 1e-6).astype(np.float32)
    base = np.frombuffer(bf16(weights((rows, columns), 2)).data, np.uint8)
    found = Quantized.parse(made(scales, block, columns, dtype).to_bytes(), dtype, "BF16", rows * columns)
    assert np.array_equal(found.scales, scales)
    whole = found.predict(base, 0)
    values = (base.view("<u2").astype("<u4") << 16).view("<f4")
    expected = [
        EIGHT_BITS[dtype](float(values[i] / scales[i // columns // block[0], i % columns // block[1]]))
        for i in range(rows * columns)
    ]
    assert whole.tobytes() == b"".join(expected)
    first, last = sorted(int(cut * rows * columns) for cut in cuts)
    assert found.predict(base[2 * first : 2 * last], first).tobytes() == whole[first:last].tobytes()


def test_a_damaged_prediction_is_refused() -> None:
    sealed = seal_prediction(made(np.abs(weights((4, 1), 1)), (1, 6), 6).to_bytes())
    parse_prediction("quantized", sealed, "I8", "BF16", 24)
    for length in range(len(sealed)):
        with pytest.raises(PayloadError):
            parse_prediction("quantized", sealed[:length], "I8", "BF16", 24)
    for place in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(PayloadError):
            parse_prediction("quantized", bytes(damaged), "I8", "BF16", 24)


@pytest.mark.parametrize(
    ("method", "dtype", "base_dtype", "numel"),
    [
        ("oracle", "I8", "BF16", 24),
        ("quantized", "U8", "BF16", 24),
        ("quantized", "I8", "I8", 24),
        ("quantized", "I8", "BF16", 25),
        ("quantized", "I8", "BF16", 30),
    ],
)
def test_a_prediction_for_another_tensor_is_refused(
    method: str, dtype: str, base_dtype: str, numel: int
) -> None:
    sealed = seal_prediction(made(np.ones((4, 1), np.float32), (1, 6), 6).to_bytes())
    with pytest.raises(PayloadError):
        parse_prediction(method, sealed, dtype, base_dtype, numel)


@pytest.mark.parametrize("head", [(0, 1, 1), (6, 0, 1), (6, 1, 0), (2**63, 1, 1), (1, 1, 1), (24, 2**31, 1)])
def test_what_a_hostile_author_states_is_bounded(head: tuple[int, int, int]) -> None:
    good = made(np.ones((4, 1), np.float32), (1, 6), 6).to_bytes()
    data = head[0].to_bytes(8, "little") + b"".join(n.to_bytes(4, "little") for n in head[1:]) + good[16:]
    with pytest.raises(PayloadError):
        Quantized.parse(data, "I8", "BF16", 24)


@pytest.mark.parametrize(
    ("shape", "block", "columns"),
    [((64, 1), (1, 2**32 - 1), 32), ((1, 2), (1, 1 << 29), 1 << 30), ((2, 1), (1, 2**32 - 1), 1 << 31)],
    ids=["wide blocks", "long rows", "both"],
)
def test_memory_grows_with_what_is_predicted(
    shape: tuple[int, int], block: tuple[int, int], columns: int
) -> None:
    """Not with the rows and blocks that an author states."""
    data = made(np.ones(shape, np.float32), block, columns).to_bytes()
    found = Quantized.parse(data, "I8", "BF16", columns * shape[0])
    tracemalloc.start()
    assert not found.predict(np.zeros(64, np.uint8), columns - 32).any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_predict_something(data: bytes) -> None:
    try:
        found = Quantized.parse(data, "F8_E4M3", "BF16", 24)
    except PayloadError:
        return
    assert found.predict(np.zeros(48, np.uint8), 0).size == 24
