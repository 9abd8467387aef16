"""Low-rank updates are found where there are some, and nothing where there are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from deltaweights.codec import encode_chunk
from deltaweights.codec.low_rank import EFFORTS, Effort, LowRank
from deltaweights.codec.low_rank.prediction import NO_GAINS
from deltaweights.codec.low_rank.search import find_low_rank
from deltaweights.codec.low_rank.writing import code_part, joined

from .pairs import Bytes, to_bits, values_of

DTYPES = {"BF16": 2, "F16": 2, "F32": 4}


def rows_of(tensor: Bytes, row_bytes: int) -> Callable[[int, int], Bytes]:
    return lambda start, stop: tensor[start * row_bytes : stop * row_bytes]


def merge(
    rows: int,
    columns: int,
    rank: int,
    dtype: str,
    std: float = 4e-4,
    seed: int = 0,
    *,
    gains: float = 0,
    rounded: bool = False,
) -> tuple[Bytes, Bytes]:
    """(base, target): weights of std 0.02 and what a merge makes of them. It may multiply rows, by gains that
    deviate so much from 1, as DoRA does; or round products before it adds them."""
    rng = np.random.default_rng(seed)
    base = to_bits(rng.normal(0, 0.02, rows * columns), dtype)
    product = rng.normal(0, 1, (rows, rank)) @ rng.normal(0, std / max(rank, 1) ** 0.5, (rank, columns))
    if rounded:
        product = values_of(to_bits(product.reshape(-1), dtype), dtype).reshape(rows, columns)
    merged = values_of(base, dtype).reshape(rows, columns) + product
    merged *= 1 + rng.normal(0, gains, (rows, 1))
    target = to_bits(merged.reshape(-1), dtype)
    return base.view(np.uint8), target.view(np.uint8)


def found(
    base: Bytes, target: Bytes, shape: tuple[int, ...], dtype: str, effort: Effort = "fast"
) -> bytes | None:
    row_bytes = shape[-1] * DTYPES[dtype]
    return find_low_rank(rows_of(target, row_bytes), rows_of(base, row_bytes), shape, dtype, effort)


def size(base: Bytes, target: Bytes, dtype: str) -> int:
    return len(encode_chunk(base, target, dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_found(dtype: str) -> None:
    base, target = merge(256, 320, 4, dtype)
    data = found(base, target, (256, 320), dtype)
    assert data is not None
    prediction = LowRank.parse(data, dtype, 256 * 320)
    assert prediction.rank == 4
    left = size(prediction.predict(base, 0), target, dtype)
    assert len(data) + left < 0.45 * size(base, target, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["multiplied", "multiplied by nearly 1", "rounded"])
def test_other_merges_are_found_as_well(dtype: str, kind: str) -> None:
    gains = {"multiplied": 0.02, "multiplied by nearly 1": 0.003}.get(kind, 0.0)
    base, target = merge(384, 512, 4, dtype, gains=gains, rounded=kind == "rounded", std=2e-3)
    data = found(base, target, (384, 512), dtype, "default")
    assert data is not None
    prediction = LowRank.parse(data, dtype, 384 * 512)
    assert prediction.rank == 4
    assert (prediction.heads[0].shift != NO_GAINS) == (kind != "rounded")
    left = size(prediction.predict(base, 0), target, dtype)
    assert len(data) + left < 0.5 * size(base, target, dtype)


def test_products_are_rounded_where_that_is_smaller() -> None:
    flags = []
    for rounded in (False, True):
        data = found(*merge(384, 512, 4, "BF16", std=5e-3, rounded=rounded), (384, 512), "BF16", "default")
        assert data is not None
        flags.append(data[1])
    assert flags == [0, 1]


def test_every_matrix_of_a_stack_has_its_own() -> None:
    parts = [merge(128, 256, rank, "BF16", seed=rank) for rank in (3, 0, 5)]
    base, target = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    data = found(base, target, (3, 128, 256), "BF16")
    assert data is not None
    prediction = LowRank.parse(data, "BF16", 3 * 128 * 256)
    assert [head.rank for head in prediction.heads] == [3, 0, 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_found_in_noise(dtype: str) -> None:
    base, _ = merge(256, 320, 0, dtype)
    steps = np.random.default_rng(1).laplace(0, 3e-4, 256 * 320)
    target = to_bits(values_of(base.view(f"<u{DTYPES[dtype]}"), dtype) + steps, dtype).view(np.uint8)
    assert found(base, target, (256, 320), dtype) is None
    assert found(base, base, (256, 320), dtype) is None


def test_weights_that_are_no_numbers_do_no_harm() -> None:
    base, target = (part.copy() for part in merge(256, 320, 4, "BF16"))
    rng = np.random.default_rng(2)
    for part in (base, target):
        part.view("<u2")[rng.integers(0, 256 * 320, 100)] = [0x7F80, 0xFFC1] * 50
    data = found(base, target, (256, 320), "BF16")
    assert data is not None
    assert LowRank.parse(data, "BF16", 256 * 320).rank >= 4


@pytest.mark.parametrize("shape", [(4096,), (0, 8), (3, 0, 4), (4, 8192), (64, 64)])
def test_there_is_nothing_to_look_for(shape: tuple[int, ...]) -> None:
    tensor = np.zeros(2 * int(np.prod(shape)), np.uint8)
    assert found(tensor, tensor, shape, "BF16") is None
    assert found(tensor, tensor, shape, "F16", "max") is None


def test_more_effort_is_not_worse_and_repeats_itself() -> None:
    base, target = merge(320, 256, 4, "BF16")
    sizes = {}
    for effort in EFFORTS:
        data = found(base, target, (320, 256), "BF16", effort)
        assert data is not None
        assert data == found(base, target, (320, 256), "BF16", effort)
        left = LowRank.parse(data, "BF16", 320 * 256).predict(base, 0)
        sizes[effort] = len(data) + size(left, target, "BF16")
    assert sizes["max"] <= 1.02 * sizes["default"] <= 1.04 * sizes["fast"]


def test_only_the_most_effort_fits_many_components() -> None:
    """Which takes many times as long as to code the tensor."""
    base, target = merge(256, 256, 40, "BF16", 2e-3)
    assert found(base, target, (256, 256), "BF16", "default") is None
    assert found(base, target, (256, 256), "BF16", "max") is not None


@pytest.mark.parametrize("seed", range(12))
def test_factors_of_any_strengths_are_read_back(seed: int) -> None:
    """Of many components, some of which have next to none: few numbers in many contexts."""
    rng = np.random.default_rng(seed)
    rank, rows, columns = int(rng.integers(17, 41)), 96, 160
    strengths = np.exp(rng.uniform(-1, 6, rank)) * (rng.random(rank) > 0.3)
    left, right = (
        np.clip(np.rint(rng.standard_normal((side, rank)) * strengths), -2000, 2000).astype(np.int64)
        for side in (rows, columns)
    )
    data = joined(columns, [code_part(left, right, 10)], rounded=False)
    prediction = LowRank.parse(data, "BF16", rows * columns)
    assert prediction.rank == rank


def test_factors_that_take_less_than_a_bit_are_not_written() -> None:
    shape = (320, 384)
    for std in (1e-6, 4e-6, 1e-5, 2e-5):
        base, target = merge(*shape, 2, "BF16", std=std, seed=3)
        data = found(base, target, shape, "BF16")
        assert data is None or LowRank.parse(data, "BF16", 320 * 384).rank


def test_parts_that_readers_refuse_are_known() -> None:
    zeros = np.zeros((300, 8), np.int64)
    assert not code_part(zeros, zeros, 30).is_dense(300)
    some = np.random.default_rng(0).integers(-9, 9, (300, 8))
    assert code_part(some, some, 30).is_dense(300)
    assert not code_part(some, some, 30, None, (zeros[:, 0], 5)).is_dense(300)
    assert code_part(some, some, 30, None, (some[:, 0], 5)).is_dense(300)
