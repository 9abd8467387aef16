"""What is held is made once, and stays within its bound."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.recent import Recent


class Maker:
    """Makes arrays, and counts them."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def make(self, key: int) -> NDArray[np.uint8]:
        self.made.append(key)
        return np.full(10, key, np.uint8)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6))
def test_the_values_asked_for_last_are_held(keys: list[int], room: int) -> None:
    maker, held = Maker(), Recent[NDArray[np.uint8]](10 * room + 5)
    expected: list[int] = []
    recent: list[int] = []
    for key in keys:
        assert held.get(key, partial(maker.make, key))[0] == key
        expected += [] if key in recent else [key]
        recent = [*(k for k in recent if k != key), key][-room:]
    assert maker.made == expected


def test_one_larger_than_the_bound_is_held_alone() -> None:
    maker, held = Maker(), Recent[NDArray[np.uint8]](5)
    for key in (1, 1, 2, 1):
        held.get(key, partial(maker.make, key))
    assert maker.made == [1, 2, 1]
    held.clear()
    held.get(1, partial(maker.make, 1))
    assert maker.made == [1, 2, 1, 1]


def test_threads_wait_only_for_the_same_value() -> None:
    held, begun, go_on = Recent[NDArray[np.uint8]](100), threading.Event(), threading.Event()

    def slow() -> NDArray[np.uint8]:
        begun.set()
        assert go_on.wait(60)
        return np.zeros(1, np.uint8)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(held.get, "slow", slow)
        assert begun.wait(60)
        second = pool.submit(held.get, "slow", lambda: np.ones(1, np.uint8))
        assert held.get("quick", lambda: np.full(1, 2, np.uint8))[0] == 2  # while the other is made
        go_on.set()
        assert first.result() is second.result()


def test_a_failure_is_not_held() -> None:
    held = Recent[NDArray[np.uint8]](100)
    for _ in range(2):
        try:
            held.get(1, partial(int, "x"))  # type: ignore[arg-type]
        except ValueError:
            continue
        raise AssertionError("the failure was swallowed")
    assert held.get(1, lambda: np.ones(1, np.uint8))[0] == 1
