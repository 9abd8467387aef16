"""What others do is waited for as long as it moves."""

from __future__ import annotations

import itertools
import threading

import pytest

from deltaweights.errors import HubReadError
from deltaweights.storage.patience import within


def test_a_result_and_an_error_come_through() -> None:
    assert within(60, lambda: 5, what="It from") == 5
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0, what="It from")


def test_what_moves_is_waited_for_and_what_does_not_is_given_up() -> None:
    go = threading.Event()
    steps = itertools.count()

    def progress() -> int:
        step = next(steps)
        if step == 5:
            go.set()
        return step

    assert within(0.01, go.wait, what="It from", progress=progress)
    with pytest.raises(HubReadError, match=r"It from .* does not end") as caught:
        within(0.01, threading.Event().wait, what="It from")
    assert caught.value.retryable


def test_a_result_that_comes_too_late_is_handed_over() -> None:
    go, came = threading.Event(), threading.Event()
    late: list[int] = []

    def action() -> int:
        go.wait()
        return 5

    def take(value: int) -> None:
        late.append(value)
        came.set()

    with pytest.raises(HubReadError):
        within(0.01, action, what="It from", late=take)
    go.set()
    assert came.wait(60)
    assert late == [5]
