"""Low-rank predictions: the kernels bit for bit as the reference, and damage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaweights.codec.low_rank import LowRank
from deltaweights.codec.low_rank.prediction import ITEMSIZES
from deltaweights.codec.low_rank.writing import CodedPart, code_part, joined, nothing_for
from deltaweights.codec.predictions import low_rank_predictor
from deltaweights.errors import PayloadError

from .. import independent_reader
from . import reference
from .pairs import Bytes, fine_tune, noise
from .test_damage import damaged

DTYPES = ("BF16", "F16", "F32")


def part_of(
    rows: int, columns: int, rank: int, dtype: str, seed: int = 0, gains: bool = False, spread: float = 300
) -> CodedPart:
    """Rows whose factors are normally distributed, each component less than the one before."""
    rng = np.random.default_rng(seed)
    most = (1 << (15 if dtype != "F32" else 21)) - 1
    sizes = spread * 0.9 ** np.arange(rank)
    left, right = (
        np.clip(np.rint(rng.normal(0, 1, (count, rank)) * sizes), -most, most).astype(np.int64)
        for count in (rows, columns)
    )
    shifts = np.zeros((2, rank), np.int64)
    if spread < 1000:
        shifts = rng.integers(0, 3, (2, rank))
    given = (rng.integers(-200, 200, rows), int(rng.integers(0, 12))) if gains else None
    return code_part(left, right, int(rng.integers(20, 34)), shifts, given)


def some_prediction(
    dtype: str = "BF16", *, rounded: bool = False, gains: bool = False
) -> tuple[bytes, Bytes]:
    """(a prediction of three parts, the base of its tensor)"""
    columns = 70
    parts = [part_of(40, columns, 3, dtype, 1, gains), nothing_for(5), part_of(67, columns, 8, dtype, 2)]
    base = fine_tune(dtype, 112 * columns, 0)[0]
    return joined(columns, parts, rounded=rounded), base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("gains", [False, True])
def test_the_kernels_predict_what_the_reference_does(dtype: str, rounded: bool, gains: bool) -> None:
    data, base = some_prediction(dtype, rounded=rounded, gains=gains)
    for given_base in (base, noise(dtype, 112 * 70), np.zeros_like(base)):
        prediction = LowRank.parse(data, dtype, 112 * 70)
        found = prediction.predict(given_base, 0)
        assert np.array_equal(found, reference.predict(data, given_base, dtype))
    assert prediction.rank == 8


@pytest.mark.parametrize("base_dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reader_written_from_the_document_predicts_the_same(dtype: str, base_dtype: str) -> None:
    numel, size = 112 * 70, ITEMSIZES.get(base_dtype, 8)
    for k in range(4):
        data, _ = some_prediction(dtype, rounded=bool(k & 1), gains=bool(k & 2))
        base = fine_tune(base_dtype, numel, 0, seed=k)[0]
        base[:999] = noise(base_dtype, numel)[:999]
        ours = low_rank_predictor(LowRank.parse(data, dtype, numel), base_dtype)
        theirs = independent_reader.read_low_rank(data, dtype, base_dtype, numel)
        for first in (0, 1, 69, 41 * 70 + 3):
            given_base = base[first * size :]
            assert ours.predict(given_base, first).tobytes() == theirs(given_base.tobytes(), first)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.integers(1, 90),
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9), st.booleans()), min_size=1, max_size=4),
    rounded=st.booleans(),
    spread=st.sampled_from([0.5, 40, 30000]),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_any_part_of_any_tensor(
    dtype: str, columns: int, parts: Any, rounded: bool, spread: float, cuts: Any, seed: int
) -> None:
    """Whatever its shape, wherever it begins and ends."""
    coded = []
    for rows, rank, gains in parts:
        fits = min(rank, rows * columns // (2 * (rows + columns)))
        coded.append(part_of(rows, columns, fits, dtype, seed, gains, spread))
    data, numel = joined(columns, coded, rounded=rounded), columns * sum(rows for rows, *_ in parts)
    base = noise(dtype, numel, seed) if seed % 2 else fine_tune(dtype, numel, 0, seed)[0]
    try:
        prediction = LowRank.parse(data, dtype, numel)
    except PayloadError:
        assert spread == 0.5 or numel < 500  # too few bits to be worth a reader's memory
        return
    size = len(base) // numel
    first, last = sorted(round(cut * numel) for cut in cuts)
    found = prediction.predict(base[first * size : last * size], first)
    assert np.array_equal(found, reference.predict(data, base, dtype)[first * size : last * size])


def test_damage_is_refused_or_predicts_something() -> None:
    data, base = some_prediction(gains=True)
    rng, refused = np.random.default_rng(0), 0
    cut = [data[:length] for length in range(len(data))]
    flipped = [data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :] for k in range(len(data))]
    for broken in [*cut, *flipped, *(damaged(data, rng) for _ in range(500))]:
        try:
            prediction = LowRank.parse(broken, "BF16", 112 * 70)
        except PayloadError:
            refused += 1
        else:
            assert len(prediction.predict(base, 0)) == len(base)
            assert broken not in cut or broken == data
    assert refused > len(cut)


def test_a_prediction_of_another_tensor_is_refused() -> None:
    data, _ = some_prediction()
    for dtype, numel in (("BF16", 112 * 70 + 1), ("BF16", 0), ("I16", 112 * 70), ("F64", 112 * 70)):
        with pytest.raises(PayloadError):
            LowRank.parse(data, dtype, numel)


def test_no_memory_is_made_for_factors_that_are_not_there() -> None:
    huge = 1 << 20
    head = nothing_for(huge).head
    for rank in (1, 512, 513):
        stated = type(head)(huge, rank, 20, 1, 255)
        data = joined(huge, [CodedPart(stated, bytes(600))], rounded=False)
        with pytest.raises(PayloadError):
            LowRank.parse(data, "BF16", huge * huge)


def test_weights_to_which_nothing_is_added_keep_their_bits() -> None:
    base = np.array([0x8000, 0x0000, 0x7FC1, 0xFF80] * 1600, "<u2").view(np.uint8)
    left, right = np.zeros((80, 1), np.int64), np.full((80, 1), 9)
    left[0] = 1000
    data = joined(80, [code_part(left, right, 20)], rounded=False)
    found = LowRank.parse(data, "BF16", 6400).predict(base, 0)
    assert np.array_equal(found[160:], base[160:])
    assert found.view("<u2")[1] != 0
