"""The kernels, bit for bit what the NumPy reference says."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaweights.codec import Method, encode_chunk
from deltaweights.codec.constants import APART, BAD, SUBSET_UNIT, WAYS
from deltaweights.codec.methods import drift, exponent_window, floats, ulp
from deltaweights.codec.methods.ulp import FORMATS
from deltaweights.codec.tables import (
    DIRECT_BITS,
    SCALES,
    TOKENS,
    laplace_family,
    lead_of,
    raw_bits_of,
    token_of,
)

from . import reference
from .pairs import decayed, fine_tune, noise

#: Kernels that only other kernels call are in no library: they are compiled for the test.
compiles = pytest.mark.skipif(find_spec("numba") is None, reason="kernels are compiled by Numba")


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("update", [0.0, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("count", [5, 300, 9001])
def test_deltas(dtype: str, update: float, count: int) -> None:
    """The reference decodes the kernels' delta, and encodes its values to the same bytes."""
    form = FORMATS[dtype]
    base, target = fine_tune(dtype, count, update, seed=count)
    if update == 1.0:
        target = noise(dtype, count)
    data = floats.encode_delta(base, target, form)
    if data is None:
        return
    found, before = np.frombuffer(data, np.uint8), base.view(form.dtype)
    assert np.array_equal(reference.decode_delta(found, before, form), target.view(form.dtype))
    delta = reference.parse_delta(found, before, form)
    values = reference.decode_values(delta.run, delta.contexts)
    again = reference.encode_values(delta.run, delta.contexts, values)
    assert np.array_equal(again.states, delta.run.states)
    assert np.array_equal(again.words, delta.run.words)


@pytest.mark.parametrize("dtype", FORMATS)
def test_standalone(dtype: str) -> None:
    form = FORMATS[dtype]
    for target in (fine_tune(dtype, 20_000, 0)[0], noise(dtype, 5000)):
        data = np.frombuffer(floats.encode_alone(target, form), np.uint8)
        count = len(target) // form.itemsize
        assert np.array_equal(reference.decode_alone(data, count, form), target.view(form.dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype, form in FORMATS.items() if form.itemsize > 1])
@pytest.mark.parametrize("count", [3, 700, 20_000])
def test_windows(dtype: str, count: int) -> None:
    """Everything inside, some outside (zeros and infinities), and nearly everything outside."""
    form = FORMATS[dtype]
    weights = fine_tune(dtype, count, 0)[0]
    some = weights.view(form.dtype).copy()
    some[::7] = 0
    some[1::50] = form.mask << form.shift
    for target in (weights, some.view(np.uint8), noise(dtype, count)):
        data = np.frombuffer(exponent_window.encode_window(target, form), np.uint8)
        assert np.array_equal(reference.decode_window(data, count, form), target.view(form.dtype))
        out = np.empty_like(target)
        exponent_window.decode_window(data, form, out)
        assert np.array_equal(out, target)


@pytest.mark.parametrize("log", [0, 1, 7, 12])
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 4096])
def test_drifted_bases(log: int, steps: int) -> None:
    """Of any bits, by any shifts, which differ from those before at most so often."""
    form = FORMATS["F32"]
    base = noise("F32", 5000)
    base.view("<u4")[::9] &= np.uint32(0x807FFFFF)  # zeros and subnormals: they stay
    shifts = np.random.default_rng(log).integers(0, 1 << 32, 1 << log, np.uint32)
    shifts = shifts[np.arange(1 << log) * (steps + 1) >> log] if steps < 1 << log else shifts
    data = np.frombuffer(drift.put_head(shifts, Method.SPARSE) + b"rest", np.uint8)
    moved, method, rest = reference.decode_drift(data, base.view("<u4"), form)
    assert np.array_equal(moved, drift.drifted(base, shifts, form).view("<u4"))
    assert np.array_equal(moved[::9], base.view("<u4")[::9])
    assert (method, rest.tobytes()) == (Method.SPARSE, b"rest")


@pytest.mark.parametrize("count", [5000, 80_000])
def test_drifts(count: int) -> None:
    form = FORMATS["F32"]
    base, target = decayed(count, 2e-7, 300, moved=0.2)
    method, data = encode_chunk(base, target, "F32")
    assert method == Method.DRIFT
    moved, under, rest = reference.decode_drift(np.frombuffer(data, np.uint8), base.view("<u4"), form)
    assert under == Method.DELTA
    assert np.array_equal(reference.decode_delta(rest, moved, form), target.view("<u4"))


@pytest.mark.parametrize("tail", [0, 1, 5])
@pytest.mark.parametrize("count", [17, 300, 9001])
def test_runs_with_tails(tail: int, count: int) -> None:
    """The reference encodes a run of long values to the kernels' bytes."""
    from deltaweights.codec.methods import entropy

    values = np.random.default_rng(tail).binomial(255 << tail, 0.4, count).astype(np.uint32)
    run = reference.parse_run(
        np.frombuffer(entropy.encode_list(values, 8, tail), np.uint8), np.zeros(1, np.int64)
    )
    contexts = np.zeros(count, np.uint8)
    assert np.array_equal(reference.decode_values(run, contexts, 8, tail), values)
    again = reference.encode_values(run, contexts, values.astype(np.int64), 8, tail)
    assert np.array_equal(again.states, run.states)
    assert np.array_equal(again.words, run.words)


@compiles
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "F8_E4M3"])
def test_transforms(dtype: str) -> None:
    from deltaweights.codec.compiled import difference

    form = FORMATS[dtype]
    base, target = (noise(dtype, 4099, seed).view(form.dtype) for seed in (1, 2))
    wide = np.uint64 if form.itemsize == 8 else np.uint32
    values = np.empty(len(base), wide)
    difference.distances(base, target, values)
    assert np.array_equal(values, ulp.distance(base, target).astype(wide))
    out = np.empty_like(target)
    difference.restore(base, values, out)
    assert np.array_equal(out, target)
    assert np.array_equal(ulp.restore(base, ulp.distance(base, target)), target)


@given(
    dtype=st.sampled_from([dtype for dtype, form in FORMATS.items() if form.itemsize <= 4]),
    count=st.integers(0, 800),
    changed=st.integers(0, 40),
    seed=st.integers(0, 1 << 32),
)
@settings(deadline=None)
def test_changes_by_place(dtype: str, count: int, changed: int, seed: int) -> None:
    """Found, restored and moved as NumPy does; and refused where there is no room or a place is beyond."""
    from deltaweights.codec.compiled import subset

    form = FORMATS[dtype]
    base = noise(dtype, count, seed).view(form.dtype)
    target = base.copy()
    target[:changed] = noise(dtype, count, seed + 1).view(form.dtype)[:changed]
    np.random.default_rng(seed).shuffle(order := np.arange(count))
    base, target = base[order], target[order]
    places = np.flatnonzero(base != target)
    gaps, distances = (np.empty(len(places), np.uint32) for _ in range(2))
    active, moved = np.zeros(-(-count // SUBSET_UNIT), np.uint8), np.zeros(form.mask + 1, np.uint32)
    rates = form.shift, form.mask
    assert subset.find_changes(base, target, *rates, gaps, distances, active, moved) == len(places)
    exponents = ulp.exponent(base[places], form)
    assert np.flatnonzero(active).tolist() == sorted(set((places // SUBSET_UNIT).tolist()))
    assert moved.tolist() == np.bincount(exponents, minlength=form.mask + 1).tolist()
    assert np.array_equal(np.cumsum(gaps.astype(np.int64) + 1) - 1, places)
    assert np.array_equal(distances, ulp.distance(base[places], target[places]))

    found, values = gaps.copy(), distances.copy()
    assert subset.restore_at(base, found, values)
    assert np.array_equal(found, places)
    assert np.array_equal(values, target[places])
    elements, found, values = base.copy(), gaps.copy(), distances.copy()
    assert subset.move(elements, found, values)
    assert np.array_equal(elements, target)
    assert np.array_equal(found, places)
    assert np.array_equal(values, base[places])
    if len(places):
        room = gaps[1:].copy(), distances[1:].copy(), active, moved
        assert subset.find_changes(base, target, *rates, *room) == BAD
        cutoff = int(exponents[seed % len(places)])
        kept = subset.keep_outside(base, *rates, cutoff, found := gaps.copy(), values := distances.copy())
        outside = exponents > cutoff
        assert np.array_equal(np.cumsum(found[:kept].astype(np.int64) + 1) - 1, places[outside])
        assert np.array_equal(values[:kept], distances[outside])
        short = base[: places[-1]].copy()
        assert not subset.move(short, gaps.copy(), distances.copy())
        assert np.array_equal(short, base[: places[-1]])
        assert not subset.restore_at(short, gaps.copy(), distances.copy())


def test_distance_counts_floats() -> None:
    """Neighboring floats are one apart, zeros included, and the direction is away from zero."""
    one = np.array([1.0, -1.0], np.float32)
    away = np.nextafter(one, 2 * one).view(np.uint32)
    assert ulp.distance(one.view(np.uint32), away).tolist() == [2, 2]
    zeros = np.array([0.0, -0.0], np.float32).view(np.uint32)
    assert ulp.distance(zeros, zeros[::-1]).tolist() == [1, 1]


@compiles
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_tokens(value: int) -> None:
    from deltaweights.codec.compiled import runs

    token = token_of(value)
    assert lead_of(token) == value >> raw_bits_of(token)
    contexts, keys = np.zeros(17, np.uint8), np.empty(17, np.uint16)
    span = runs.log_span(DIRECT_BITS, 32)
    counts, total = np.empty(WAYS * ((1 << span) + APART), np.uint32), np.empty((1, TOKENS), np.uint32)
    runs.count_tokens(contexts, np.full(17, value, np.uint32), DIRECT_BITS, span, keys, counts, total)
    assert set(keys.tolist()) == {token}
    assert total[0, token] == total.sum() == 17


@compiles
@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=256), st.integers(8, 11))
@settings(max_examples=200, deadline=None)
def test_frequencies(weights: list[int], precision: int) -> None:
    from deltaweights.codec.compiled import runs

    padded = np.zeros(256, np.uint32)
    padded[: len(weights)] = weights
    if np.count_nonzero(padded) > 1 << precision:
        return
    found = np.empty(256, np.uint32)
    runs.fit_frequencies(padded, precision, found)
    expected = reference.fit_frequencies(padded.astype(np.int64), precision)
    assert np.array_equal(found, expected)
    assert found.sum() in (0, 1 << precision)
    assert ((found > 0) == (padded > 0)).all()


def test_the_family_is_what_the_format_says() -> None:
    family = laplace_family()
    b = 2.0 ** ((np.arange(SCALES) - 10) / 2)
    assert np.allclose(family[:, 0] / 2**20, 1 - np.exp(-1 / (2 * b)), atol=2**-19)
    two_sided = np.exp(-1 / (2 * b)) - np.exp(-3 / (2 * b))
    assert np.allclose((family[:, 1] + 0.0 + family[:, 2]) / 2**20, two_sided, atol=2**-18)
