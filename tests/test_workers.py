"""Threads: results in order, a bounded number ahead; the first error ends it all and is the one raised."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltaweights.workers
from deltaweights.workers import Buffers, Lane, MemoryBudget, Meter, Stopped, Workers, usable_cores

#: Far longer than anything here takes: a test that waits so long has failed.
PATIENCE = 5


@pytest.fixture(params=[1, 2, 7])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param) as workers:
        yield workers


# map -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(), max_size=60), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(items: list[int], threads: int) -> None:
    with Workers(threads) as workers:
        assert list(workers.map(lambda item: -item, items)) == [-item for item in items]
        assert workers.each(lambda _, item: -item, items) == [-item for item in items]


def test_results_keep_their_order_where_the_first_item_is_last_to_be_done() -> None:
    others_done = threading.Semaphore(0)

    def work(item: int) -> int:
        if item == 0:
            for _ in range(3):
                assert others_done.acquire(timeout=PATIENCE)
        else:
            others_done.release()
        return item

    with Workers(4) as workers:
        assert list(workers.map(work, range(4))) == [0, 1, 2, 3]


def test_no_more_than_a_window_of_items_is_ahead(workers: Workers) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = workers.map(lambda item: item, items())
    for received in range(50):
        assert next(results) == received
        assert len(taken) <= received + workers.window
    results.close()


def test_all_threads_work_at_once(workers: Workers) -> None:
    together = threading.Barrier(workers.threads)
    for _ in workers.map(lambda _: together.wait(PATIENCE), range(workers.threads)):
        pass
    assert not together.broken


def test_the_consumers_thread_works_too() -> None:
    """While the others are busy, and nothing is there to consume."""
    elsewhere = threading.Event()

    def work(item: int) -> int:
        if threading.current_thread() is threading.main_thread():
            elsewhere.set()
        assert item or elsewhere.wait(PATIENCE)
        return item

    with Workers(2) as workers:
        assert list(workers.map(work, range(3))) == [0, 1, 2]


def test_an_items_error_comes_at_its_place(workers: Workers) -> None:
    def work(item: int) -> int:
        if item == 5:
            raise KeyError(item)
        return item

    results = workers.map(work, range(1000))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="5"):
        next(results)


def test_an_error_of_the_items_themselves_is_raised(workers: Workers) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        list(workers.map(lambda item: item, items()))


def test_ending_early_waits_for_the_work_in_progress() -> None:
    """The consumer may close its files then."""
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)
        done.set()

    def items() -> Iterator[int]:
        yield 0
        assert begun.wait(PATIENCE)
        threading.Timer(0.02, go_on.set).start()
        raise KeyError("source")

    with Workers(2) as workers:
        with pytest.raises(KeyError, match="source"):
            list(workers.map(work, items()))
        assert done.is_set()


def test_no_new_work_begins_after_closing() -> None:
    begun: list[int] = []
    with Workers(1) as workers:
        results = workers.map(begun.append, itertools.count())
        next(results)
        results.close()
        count = len(begun)
        assert list(workers.map(lambda item: item, range(3))) == [0, 1, 2]
        assert len(begun) == count <= 1 + workers.window


def test_stopped_workers_take_no_more(workers: Workers) -> None:
    workers.stop()
    with pytest.raises(Stopped):
        workers.check()
    with pytest.raises(Stopped):
        list(workers.map(lambda item: item, range(3)))
    with pytest.raises(Stopped):
        list(workers.watch([b"block"]))
    assert list(workers.map(lambda item: item, [])) == []


# aside -----------------------------------------------------------------------------------------------


def test_what_goes_on_aside_gives_its_result_whoever_comes_to_it(workers: Workers) -> None:
    results = [workers.aside(lambda item=item: -item) for item in range(50)]  # type: ignore[misc]
    assert [result() for result in results] == [-item for item in range(50)]
    assert results[7]() == -7


def test_what_goes_on_aside_takes_another_thread_where_one_is_free() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def call() -> bool:
        begun.set()
        return go_on.wait(PATIENCE)

    with Workers(2) as workers:
        result = workers.aside(call)
        assert begun.wait(PATIENCE)
        go_on.set()
        assert result()


def test_an_error_aside_is_raised_where_its_result_is_asked_for() -> None:
    def call() -> None:
        raise KeyError("aside")

    with Workers(2) as workers, pytest.raises(KeyError, match="aside"):
        workers.aside(call)()


# Buffers ---------------------------------------------------------------------------------------------


def test_buffers_are_used_again() -> None:
    buffers = Buffers(8)
    first = buffers.take(8)
    other = buffers.take(3)
    assert (first.size, other.size) == (8, 3)
    assert not np.shares_memory(first, other)
    buffers.give(other)
    again = buffers.take(8)
    assert np.shares_memory(again, other)
    assert buffers.take(20).size == 20


# each ------------------------------------------------------------------------------------------------


def test_items_of_each_may_use_map(workers: Workers) -> None:
    def work(lane: Lane, item: int) -> int:
        return sum(lane.map(lambda k: item * k, range(20)))

    assert workers.each(work, range(10)) == [item * 190 for item in range(10)]


def test_items_of_each_share_what_may_run_ahead() -> None:
    """So that memory does not grow with the number of shards at work."""
    together = threading.Barrier(4)

    def work(lane: Lane, _: int) -> int:
        together.wait(PATIENCE)
        window = lane.window
        together.wait(PATIENCE)
        return window

    with Workers(8) as pool:
        assert pool.window == 2 * 8 + 2
        assert pool.each(work, range(4)) == [2 * 2 + 2] * 4


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_the_first_error_stops_the_others_and_is_the_one_raised(failing: int) -> None:
    """Wherever it stands in the order, and though the others then end with Stopped."""
    running = threading.Barrier(4)

    def work(_lane: Lane, item: int) -> None:
        running.wait(PATIENCE)
        if item == failing:
            raise KeyError(item)
        for _ in _until_patience_ends():
            pool.check()

    with Workers(4) as pool, pytest.raises(KeyError, match=str(failing)):
        pool.each(work, range(4))


def test_an_error_stops_the_map_of_another_item() -> None:
    running = threading.Event()

    def work(_lane: Lane, item: int) -> None:
        if item == 1:
            assert running.wait(PATIENCE)
            raise KeyError(item)
        for _ in _lane.map(lambda _: running.set(), _until_patience_ends()):
            pass

    with Workers(2) as pool, pytest.raises(KeyError, match="1"):
        pool.each(work, range(2))


def test_items_that_have_not_begun_never_do() -> None:
    begun: list[int] = []

    def work(_lane: Lane, item: int) -> None:
        begun.append(item)
        raise KeyError(item)

    with Workers(1) as workers, pytest.raises(KeyError, match="0"):
        workers.each(work, range(1000))
    assert len(begun) < 1000


def test_workers_stop_when_their_block_is_left_with_an_error() -> None:
    seen = threading.Event()

    def work(_: int) -> None:
        seen.set()

    def consume() -> None:
        with Workers(2) as workers:
            for _ in workers.map(work, itertools.count()):
                raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert seen.is_set()


def test_stopping_wakes_what_waits_elsewhere() -> None:
    """An item that waits for a network, say, ends with CancelledError; the error that came first counts."""
    waiting, woken = threading.Event(), threading.Event()

    def work(_lane: Lane, item: int) -> None:
        if item == 0:
            waiting.set()
            assert woken.wait(PATIENCE)
            raise CancelledError
        assert waiting.wait(PATIENCE)
        raise KeyError(item)

    with Workers(2) as pool:
        pool.at_stop(woken.set)
        with pytest.raises(KeyError, match="1"):
            pool.each(work, range(2))


def test_ctrl_c_wakes_what_the_other_threads_wait_for() -> None:
    woken = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            raise KeyboardInterrupt
        assert woken.wait(PATIENCE)

    with Workers(2) as pool:
        pool.at_stop(woken.set)
        with pytest.raises(KeyboardInterrupt):
            list(pool.map(work, range(3)))


# Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["each", "map", "aside"])
def test_ctrl_c_that_comes_just_before_the_main_thread_waits_is_seen_soon(way: str) -> None:
    """Python takes note of it and does not wake the thread, just as when another thread gets the signal."""
    begun, stopped = threading.Event(), threading.Event()
    woken: list[bool] = []

    def work(*_: object) -> None:
        if threading.get_ident() == _main_thread():
            _until(begun.is_set)
            return
        begun.set()
        _until(_main_thread_waits)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        woken.append(stopped.wait(PATIENCE))

    def consume() -> None:
        with Workers(2) as pool:
            pool.at_stop(stopped.set)
            if way == "each":
                pool.each(work, range(1))
            elif way == "map":
                list(pool.map(work, range(4)))
            else:
                result = pool.aside(work)
                _until(begun.is_set)
                result()

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert woken == [True]


def test_ctrl_c_before_all_items_are_handed_out_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = threading.Event(), threading.Event()
    woken: list[bool] = []

    class Lanes(ThreadPoolExecutor):
        def submit(self, call: Any, /, *items: Any, **options: Any) -> Any:
            if items == (1,):
                _until(begun.is_set)
                raise KeyboardInterrupt
            return super().submit(call, *items, **options)

    def work(_lane: Lane, _: int) -> None:
        begun.set()
        woken.append(stopped.wait(PATIENCE))

    monkeypatch.setattr(deltaweights.workers, "ThreadPoolExecutor", Lanes)
    with Workers(2) as pool:
        pool.at_stop(stopped.set)
        with pytest.raises(KeyboardInterrupt):
            pool.each(work, range(2))
    assert woken == [True]


def test_ctrl_c_leaves_no_work_in_progress() -> None:
    """The files that it uses are closed next."""
    begun, stopped, ended = threading.Event(), threading.Event(), threading.Event()

    def work(_: int) -> None:
        if threading.get_ident() == _main_thread():
            _until(begun.is_set)
            return
        begun.set()
        _until(_main_thread_waits)
        signal.pthread_kill(_main_thread(), signal.SIGINT)
        assert stopped.wait(PATIENCE)
        ended.set()

    with Workers(2) as pool:
        pool.at_stop(stopped.set)
        with pytest.raises(KeyboardInterrupt):
            list(pool.map(work, range(4)))
        assert ended.is_set()


# watch and Meter -------------------------------------------------------------------------------------


def test_watched_blocks_pass_and_are_counted(workers: Workers) -> None:
    steps: list[tuple[str, int, int]] = []
    meter = Meter(lambda *step: steps.append(step), "phase", 6)
    assert list(workers.watch([b"a", b"", b"bcdef"], meter)) == [b"a", b"", b"bcdef"]
    assert steps == [("phase", 0, 6), ("phase", 1, 6), ("phase", 1, 6), ("phase", 6, 6)]


def test_a_meter_counts_from_many_threads_one_call_at_a_time() -> None:
    inside = threading.Lock()
    done: list[int] = []

    def callback(_phase: str, so_far: int, _total: int) -> None:
        assert inside.acquire(blocking=False), "two calls at once"
        done.append(so_far)
        inside.release()

    meter = Meter(callback, "phase", 800)

    def count(_lane: Lane, _: int) -> None:
        for _ in range(100):
            meter.add(1)

    with Workers(8) as workers:
        workers.each(count, range(8))
    assert done == list(range(801))


def test_a_meter_without_a_callback_does_nothing() -> None:
    Meter(None, "phase", 1).add(1)


def test_an_error_of_the_callback_is_raised() -> None:
    """So that a callback can stop the work."""

    def callback(_phase: str, done: int, _total: int) -> None:
        if done:
            raise KeyError("enough")

    meter = Meter(callback, "phase", 1)
    with Workers(2) as workers, pytest.raises(KeyError, match="enough"):
        workers.each(lambda _, count: meter.add(count), [1, 1, 1])


def test_as_many_threads_as_cores_unless_told() -> None:
    with Workers() as workers:
        assert workers.threads == usable_cores() >= 1
    with Workers(3) as workers:
        assert workers.threads == 3


# Helpers ---------------------------------------------------------------------------------------------


def _until_patience_ends() -> Iterator[None]:
    """Endless, but for a test that fails."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield
    raise TimeoutError("nobody stopped this")


def _until(condition: Callable[[], bool]) -> None:
    for _ in _until_patience_ends():
        if condition():
            return


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _main_thread_waits() -> bool:
    """For work: not merely for a thread to start."""
    stack = {frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[_main_thread()])}
    return threading.Condition.wait.__code__ in stack and threading.Thread.start.__code__ not in stack


def test_a_memory_budget_is_kept_and_one_that_is_larger_goes_alone() -> None:
    budget, lock = MemoryBudget(10), threading.Lock()
    now: list[int] = []
    most = 0

    def call(nbytes: int) -> None:
        nonlocal most
        with budget.taking(nbytes):
            with lock:
                now.append(nbytes)
                assert sum(now) <= 10 or len(now) == 1
                most = max(most, len(now))
            time.sleep(0.001)
            with lock:
                now.remove(nbytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, [3, 3, 3, 11, 5, 5, 10, 1, 20] * 8))
    assert not now
    assert most > 1


def test_a_memory_budget_is_given_back_after_an_error() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(ZeroDivisionError), budget.taking(10):
        raise ZeroDivisionError
    with budget.taking(10):
        pass
