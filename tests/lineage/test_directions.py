"""What a growth means: orders and their odds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.lineage.directions import Growth, growth_of, prior_odds

GROWTHS = st.builds(Growth, st.floats(-50, 50), st.floats(1e-3, 50), st.floats(0, 10), st.booleans())


@given(GROWTHS, st.sampled_from([None, True, False]))
def test_odds_are_odds(growth: Growth, is_newer: bool | None) -> None:
    odds = growth.odds(is_newer)
    assert sum(odds.values()) == pytest.approx(1)
    assert min(odds.values()) >= 0
    assert growth.order(is_newer) in ("after", "before", "apart", None)


@given(GROWTHS)
def test_a_growth_that_is_lost_in_its_error_decides_nothing(growth: Growth) -> None:
    silent = Growth(growth.value / 50, 50.0, growth.spread, growth.is_even)
    assert silent.order() is None
    assert silent.odds() == pytest.approx(prior_odds(), abs=0.05)


@pytest.mark.parametrize(
    ("value", "order"), [(1.0, "after"), (-1.0, "before"), (0.0, "apart"), (0.3, "apart")]
)
def test_where_tensors_agree_the_theory_holds(value: float, order: str) -> None:
    found = growth_of([(value + 0.01 * (k % 5 - 2), 0.05) for k in range(20)])
    assert found
    assert found.is_even
    assert found.order() == order


def test_where_they_do_not_a_little_growth_decides_nothing() -> None:
    found = growth_of([(0.9 + 0.4 * (k % 5 - 2), 0.05) for k in range(20)])
    assert found
    assert not found.is_even
    assert found.order() is None
    assert found.order(is_newer=True) == "after"


def test_few_tensors_tell_nothing_and_equal_ones_do_not_count() -> None:
    assert growth_of([(1.0, 0.1)] * 3) is None
    assert growth_of([(1.0, 0.1)] * 3 + [(0.0, 0.0)] * 9) is None
