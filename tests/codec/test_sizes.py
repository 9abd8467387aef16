"""How small chunks become: near the conditional entropy, and never larger than alone."""

from __future__ import annotations

import numpy as np
import pytest

from deltaweights.codec import Method, encode_chunk

from .pairs import decayed, fine_tune, to_bits, values_of

COUNT = 1 << 19


@pytest.mark.parametrize(
    ("update", "bits"),
    [(3e-6, 0.163), (1e-5, 0.512), (5e-5, 1.92), (2e-4, 3.80), (1e-3, 6.17)],
)
def test_simulated_fine_tunes(update: float, bits: float) -> None:
    base, target = fine_tune("BF16", COUNT, update)
    _, data = encode_chunk(base, target, "BF16")
    assert 8 * len(data) / COUNT < bits


def test_a_base_that_does_not_help_does_not_hurt() -> None:
    base, target = fine_tune("BF16", COUNT, 0.05)
    alone, delta = (len(encode_chunk(b, target, "BF16")[1]) for b in (None, base))
    assert delta <= alone


def test_standalone_weights() -> None:
    _, data = encode_chunk(None, fine_tune("BF16", COUNT, 0.0)[0], "BF16")
    assert len(data) < 0.661 * 2 * COUNT


def test_small_tensors_pay_little_beyond_their_entropy() -> None:
    base, target = fine_tune("BF16", COUNT, 1e-4)
    whole = len(encode_chunk(base, target, "BF16")[1]) / len(target)
    for size in (768, 8192):
        parts = range(0, 20 * size, size)
        coded = sum(len(encode_chunk(base[i:][:size], target[i:][:size], "BF16")[1]) for i in parts)
        assert coded / (20 * size) < 1.06 * whole + 40 / size


@pytest.mark.parametrize(("count", "most"), [(1 << 16, 275), (1 << 17, 500), (1 << 19, 1850)])
def test_one_small_step_of_an_optimizer(count: int, most: int) -> None:
    """All weights move by the same, up or down, which few can follow: each of these has a sign to code."""
    rng = np.random.default_rng(0)
    base = to_bits(rng.normal(0, 0.02, count), "BF16")
    target = to_bits(values_of(base, "BF16") + rng.choice([-1e-6, 1e-6], count), "BF16")
    method, data = encode_chunk(base.view(np.uint8), target.view(np.uint8), "BF16")
    assert method == Method.SPARSE
    assert len(data) < most


def test_low_bits_that_are_zero_cost_nothing() -> None:
    wide = to_bits(np.random.default_rng(0).normal(0, 0.02, 100_000), "BF16").astype("<u4") << 16
    _, data = encode_chunk(None, wide.astype("<u4").view(np.uint8), "F32")
    assert 8 * len(data) / 100_000 < 10.8


def test_repeated_rows_are_found() -> None:
    row = np.random.default_rng(0).normal(0, 0.02, 4096)
    target = np.tile(to_bits(row, "BF16"), 64).view(np.uint8)
    method, data = encode_chunk(None, target, "BF16")
    assert (method, len(data) < 10_000) == (Method.ZSTD, True)


def test_weight_decay_is_seen() -> None:
    rng = np.random.default_rng(0)
    base = to_bits(rng.normal(0, 0.02, COUNT), "BF16")
    weights = values_of(base, "BF16")
    moved = weights + rng.laplace(0, 5e-5, COUNT)
    plain, decayed = (
        len(encode_chunk(base.view(np.uint8), to_bits(t, "BF16").view(np.uint8), "BF16")[1])
        for t in (moved, 0.99 * moved)
    )
    assert decayed < 1.12 * plain


@pytest.mark.parametrize(
    ("rate", "steps", "moved", "bits"),
    [
        (2e-7, 1, 0.0, 0.02),
        (2e-7, 1000, 0.0, 0.05),
        (2e-7, 1000, 0.1, 2.5),  # what moved besides takes 2.0
        (1e-6, 1000, 0.1, 3.0),
        (1e-5, 1000, 0.1, 7.5),
    ],
)
def test_weights_that_only_decayed_take_next_to_nothing(
    rate: float, steps: int, moved: float, bits: float
) -> None:
    _, data = encode_chunk(*decayed(COUNT // 2, rate, steps, moved), "F32")
    assert 8 * len(data) / (COUNT // 2) < bits
