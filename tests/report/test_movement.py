"""How far weights moved, against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.codec.low_rank.blas import one_blas_thread
from deltaweights.dtypes import DTYPES
from deltaweights.report.movement import Movement, combined, has_floats, measure, measure_base
from deltaweights.report.spectrum import Sketch, Spectrum

from ..checkpoints import bf16, f32, random_array, weights

FLOATS = sorted(code for code in DTYPES if has_floats(code))


def bf16_values(data: bytes) -> NDArray[np.float64]:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


@pytest.mark.parametrize("shape", [(1,), (7, 3), (300, 700)])
def test_figures_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    old = bf16(weights(shape, 1))
    new = bf16(weights(shape, 1) + weights(shape, 2, 1e-3))
    found = measure(np.frombuffer(old.data, np.uint8), np.frombuffer(new.data, np.uint8), "BF16")
    base, target = bf16_values(old.data), bf16_values(new.data)
    moves = target - base
    assert found.elements == moves.size
    assert found.moved == np.count_nonzero(moves)
    assert found.norm == pytest.approx(np.linalg.norm(moves), rel=1e-5)
    assert found.relative == pytest.approx(np.linalg.norm(moves) / np.linalg.norm(base), rel=1e-5)
    assert found.largest == pytest.approx(np.abs(moves).max())
    cosine = base @ target / np.linalg.norm(base) / np.linalg.norm(target)
    assert found.cosine == pytest.approx(cosine, abs=1e-8)
    if shape == (300, 700):
        assert found.angle_part == pytest.approx(1 - cosine, rel=1e-3)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_any_bits_of_any_dtype_give_finite_figures(dtype: str) -> None:
    """NaN and infinities are counted, and left out; differences are those of bytes."""
    shape = (64, 96)
    old, new = (np.frombuffer(random_array(dtype, shape, seed).data, np.uint8) for seed in (1, 2))
    found = measure(old, new, dtype)
    for value in (found.norm, found.relative, found.cosine, found.largest, found.moved_share):
        assert value is None or math.isfinite(value)
    assert 0 <= found.moved <= found.elements
    if dtype in ("F16", "BF16", "F8_E5M2", "F8_E4M3"):
        assert found.not_finite > 0
    same = measure(old, old, dtype)
    assert same.moved == 0
    assert same.square == 0
    alone = measure_base(old, dtype)
    assert (alone.elements, alone.moved, alone.square) == (same.elements, 0, 0)
    assert alone.base_square == pytest.approx(same.base_square, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_byte_of_a_small_float_has_its_value(dtype: str) -> None:
    """Against ml_dtypes' definition, written out: sign, exponent, mantissa."""
    known = DTYPES[dtype]
    bias = 2 ** (known.exponent - 1) - 1
    codes = np.arange(256, dtype=np.uint8)
    out = np.empty(256, np.float32)
    measure(codes, np.zeros(256, np.uint8), dtype, keep_base=out)
    for code in range(256):
        power = (code >> known.mantissa) & (2**known.exponent - 1)
        rest = (code & (2**known.mantissa - 1)) / 2**known.mantissa
        value = (1 + rest) * 2.0 ** (power - bias) if power else rest * 2.0 ** (1 - bias)
        is_special = power == 2**known.exponent - 1 and (dtype == "F8_E5M2" or rest == 7 / 8)
        assert out[code] == (0 if is_special else value * (-1 if code >= 128 else 1)), code


def test_floats_that_are_kept_are_those_of_base_and_move() -> None:
    old, new = f32(weights((3, 50_000), 1)), f32(weights((3, 50_000), 2))
    base, moves = np.empty(150_000, np.float32), np.empty(150_000, np.float32)
    sides = [np.frombuffer(side.data, np.uint8) for side in (old, new)]
    measure(sides[0], sides[1], "F32", base, moves)
    assert base.tobytes() == old.data
    np.testing.assert_array_equal(moves, np.frombuffer(new.data, np.float32) - base)


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=5))
def test_parts_add_up(seeds: list[int]) -> None:
    sides = [np.random.default_rng(seed).standard_normal((2, 40)).astype(np.float32) for seed in seeds]
    parts = [measure(a.view(np.uint8), b.view(np.uint8), "F32") for a, b in sides]
    whole = np.concatenate(sides, axis=1)
    expected = measure(whole[0].view(np.uint8), whole[1].view(np.uint8), "F32")
    found = combined(parts)
    assert (found.elements, found.moved) == (expected.elements, expected.moved)
    assert found.largest == expected.largest
    for name in ("base_square", "square", "dot"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-5)


def test_spectra_are_weighted_by_what_was_added() -> None:
    first, second = Spectrum(2.0, 1.0, 1.0), Spectrum(100.0, 0.1, 0.5)
    movements = [Movement(square=1.0, spectrum=first), Movement(square=3.0, spectrum=second), Movement()]
    found = combined(movements).spectrum
    assert found is not None
    assert (found.effective_rank, found.share_8, found.share_64) == pytest.approx((75.5, 0.325, 0.625))


def sketched(matrix: NDArray[np.float32]) -> Spectrum:
    sketch = Sketch(matrix.shape[1])
    for start in range(0, len(matrix), 100):
        with one_blas_thread:
            sketch.add(*sketch.part(matrix[start : start + 100], np.empty(sketch.nbytes, np.uint8)))
    found = sketch.spectrum()
    assert found is not None
    return found


def exact(matrix: NDArray[np.float32]) -> Spectrum:
    matrix = matrix if len(matrix) < matrix.shape[1] else matrix.T
    with one_blas_thread:
        values = np.linalg.eigvalsh(matrix.astype(np.float64) @ matrix.T.astype(np.float64))[::-1]
    total = values.sum()
    return Spectrum(total**2 / np.square(values).sum(), values[:8].sum() / total, values[:64].sum() / total)


def spectrum_cases() -> dict[str, NDArray[np.float32]]:
    def noise(*shape: int) -> NDArray[np.float32]:
        return weights(shape, sum(shape), 1.0)

    falling = np.arange(1, 601) ** -1.0
    return {
        "rank 1": noise(600, 1) @ noise(1, 900),
        "rank 16": noise(500, 16) @ noise(16, 700),
        "rank 16 and noise": noise(500, 16) @ noise(16, 700) + noise(500, 700),
        "rank 30, wide": noise(400, 30) @ noise(30, 2500) + noise(400, 2500),
        "falling": (noise(600, 600) * falling).astype(np.float32),
        "narrow": noise(300, 40),
        "low": noise(20, 300),
        "tiny numbers": noise(300, 300) * np.float32(1e-18),
        "few columns": np.pad(noise(200, 10), ((0, 0), (1500, 1490))),
    }


@pytest.mark.parametrize("name", spectrum_cases())
def test_a_sketch_knows_the_directions_that_hold_much(name: str) -> None:
    matrix = spectrum_cases()[name]
    found, true = sketched(matrix), exact(matrix)
    if name != "tiny numbers":
        assert found.share_8 == pytest.approx(true.share_8, abs=0.02)
        assert found.share_64 == pytest.approx(true.share_64, abs=0.05)
    assert found.share_8 <= true.share_8 + 1e-4
    assert found.share_64 <= true.share_64 + 1e-4
    assert found.effective_rank == pytest.approx(true.effective_rank, rel=0.1)


def test_noise_is_never_taken_for_a_low_rank() -> None:
    found = sketched(weights((600, 700), 1))
    assert found.share_64 < exact(weights((600, 700), 1)).share_64 < 0.35
    assert found.effective_rank > 250


def test_nothing_has_no_spectrum() -> None:
    sketch = Sketch(100)
    assert sketch.spectrum() is None
    sketch.add(*sketch.part(np.zeros((5, 100), np.float32), np.empty(sketch.nbytes, np.uint8)))
    assert sketch.spectrum() is None
