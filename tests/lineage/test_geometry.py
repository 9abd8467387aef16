"""Branches, combinations and growth, from scalar products of samples whose places are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.lineage.geometry import Geometry
from deltaweights.lineage.measures import SampledProducts

_ELEMENTS = 4000


def places(seed: int, *models: NDArray[np.float64]) -> Geometry:
    """The geometry of models, each an array [tensors, elements]."""
    samples = []
    for rows in zip(*models, strict=True):
        matrix = np.stack(rows)
        samples.append(SampledProducts(matrix @ matrix.T, 1e-12, _ELEMENTS))
    return Geometry(samples)


def draw(seed: int, size: float = 1.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((6, _ELEMENTS)) * size


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_branches_are_the_lengths_of_updates(one: float, other: float, third: float) -> None:
    base = draw(0)
    models = [base + draw(k, length) for k, length in enumerate((one, other, third), 1)]
    found = places(0, *models).branches(0, 1, 2)
    assert found
    # Each is the sum over six tensors, by the size of the first model's.
    assert np.allclose(np.sqrt(np.array(found) / 6), (one, other, third), rtol=0.5, atol=0.05)


def test_a_base_lies_between_its_fine_tunes_and_no_fine_tune_does() -> None:
    base = draw(0)
    found = places(0, base + draw(1, 0.1), base, base + draw(2, 0.1), base + draw(3, 0.1))
    assert found.is_between(1, 0, 2)
    assert found.is_between(2, 0, 1) is False
    assert [found.is_between(*way) for way in ((0, 2, 3), (2, 0, 3), (3, 0, 2))] == [False] * 3


@given(st.lists(st.floats(0.7, 1.5), min_size=2, max_size=4))
def test_any_combination_is_found_with_its_weights(weights: list[float]) -> None:
    base = draw(0)
    candidates = [base + draw(k, 0.1) for k in range(1, len(weights) + 1)]
    total = sum(weights)
    model = sum((w / total * one for w, one in zip(weights, candidates, strict=True)), np.zeros_like(base))
    found = places(0, model, *candidates, base + draw(9, 0.1)).combination(range(1, len(weights) + 2))
    assert found
    assert found.weights == pytest.approx({k: w / total for k, w in enumerate(weights, 1)}, abs=1e-3)
    assert found.unexplained < 1e-3


def test_what_one_candidate_explains_is_no_combination() -> None:
    base = draw(0)
    one, other = base + draw(1, 0.1), base + draw(2, 0.1)
    assert places(0, one + draw(3, 0.1), one, other).combination([1, 2]) is None
    assert places(0, one, one, other).combination([1, 2]) is None
    assert places(0, one * 0.99, one, other).combination([1, 2]) is None
    assert places(0, one, one).combination([1]) is None


def test_copies_are_one_model() -> None:
    base = draw(0)
    found = places(0, base + draw(1, 0.1), base, base + draw(2, 0.1), base)
    assert found.distinct([1, 2, 3]) == [[1, 3], [2]]


def test_growth_of_candidates_tells_their_order() -> None:
    base = draw(0)
    found = places(0, base + draw(1, 0.1), base, base + draw(2, 0.1))
    later, earlier = found.growth(2, 1), found.growth(1, 2)
    assert later
    assert earlier
    assert later.value == pytest.approx(1, abs=0.4)
    assert later.order() == "after"
    assert earlier.value == -later.value
    assert found.growth(1, 1) is None


def test_tensors_that_one_lacks_are_left_out() -> None:
    base, tuned = draw(0), draw(0) + draw(1, 0.1)
    tuned[0] = np.nan
    found = places(0, base, tuned)
    assert found.squared_distance(0, 1) == pytest.approx(5 * 0.01, rel=0.1)
    assert Geometry([]).distinct([]) == []
