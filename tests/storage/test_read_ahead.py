"""Bytes fetched ahead: right in any order, fetched once, in bounded memory, and nobody waits for ever."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from types import CodeType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaweights.storage import Span
from deltaweights.storage.read_ahead import Window

#: Long enough for any machine; no test waits for it.
PATIENCE = 30

FILES = {name: np.random.default_rng(seed).bytes(40_000) for seed, name in enumerate("ab")}
REQUEST = 1000


class Remote:
    """Files that come in pieces, and a record of what was fetched. ``gate`` holds all back until set."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.fetched: list[Span] = []
        self.failing: set[str] = set()

    def fetch(self, path: str, start: int, end: int) -> Generator[bytes, None, None]:
        self.fetched.append(Span(path, start, end))
        if path in self.failing:
            raise KeyError(path)
        for piece in range(start, end, 300):
            if self.gate:
                assert self.gate.wait(PATIENCE)
            yield FILES[path][piece : min(piece + 300, end)]

    @property
    def nbytes(self) -> int:
        return sum(span.end - span.start for span in self.fetched)


def window(remote: Remote, requests: int = 8, connections: int = 4) -> Window:
    return Window(remote.fetch, nbytes=requests * REQUEST, request_bytes=REQUEST, connections=connections)


def read(source: Window, span: Span) -> bytes:
    out = np.empty(span.end - span.start, np.uint8)
    source.read_into(span.path, span.start, out)
    return out.tobytes()


def is_right(source: Window, span: Span) -> bool:
    return read(source, span) == FILES[span.path][span.start : span.end]


def chunks(path: str, start: int, end: int, nbytes: int) -> list[Span]:
    return [Span(path, at, min(at + nbytes, end)) for at in range(start, end, nbytes)]


spans = st.builds(
    lambda path, start, length: Span(path, start, min(start + length, 40_000)),
    st.sampled_from("ab"),
    st.integers(0, 40_000),
    st.integers(0, 6000),
)


@settings(max_examples=60)
@given(
    announced=st.lists(spans, max_size=12),
    others=st.lists(spans, max_size=4),
    step=st.integers(200, 3000),
    requests=st.integers(1, 12),
    threads=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
def test_whatever_is_announced_and_read_in_whatever_order_the_bytes_are_right(
    announced: list[Span], others: list[Span], step: int, requests: int, threads: int, order: object
) -> None:
    """Spans may overlap; some are read that were not announced, some are announced and not read."""
    remote = Remote()
    source = window(remote, requests)
    wanted = [part for span in announced[1:] for part in chunks(*span, step)] + others
    order.shuffle(wanted)  # type: ignore[attr-defined]
    with source.expect(announced), ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(lambda span: is_right(source, span), wanted))
    assert source.peak <= (requests + threads + 1) * REQUEST
    until(lambda: source.held == 0)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("requests", [1, 3, 8])
def test_what_is_announced_is_fetched_once(requests: int, threads: int) -> None:
    remote = Remote()
    source = window(remote, requests)
    plan = [*chunks("a", 123, 20_000, 700), *chunks("b", 5000, 9000, 700), *chunks("a", 30_000, 40_000, 700)]
    with source.expect(plan), ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(lambda span: is_right(source, span), plan))
        until(lambda: source.held == 0)  # each request's memory went back with its last byte
    assert remote.nbytes == sum(span.end - span.start for span in plan)
    assert max(span.end - span.start for span in remote.fetched) <= REQUEST


def test_neighbors_share_requests() -> None:
    remote = Remote()
    plan = chunks("a", 0, 4000, 100)
    source = window(remote)
    with source.expect(plan):
        assert all(is_right(source, span) for span in plan)
    assert len(remote.fetched) == 4


def test_small_gaps_are_fetched_too_and_large_ones_are_not() -> None:
    remote = Remote()
    source = window(remote, requests=20)
    plan = [Span("a", 0, 300), Span("a", 310, 600), Span("a", 30_000, 30_500)]
    with source.expect(plan):
        assert all(is_right(source, span) for span in plan)
        until(lambda: source.held == 0)
    assert sorted(remote.fetched) == [Span("a", 0, 600), Span("a", 30_000, 30_500)]


def test_it_runs_ahead_of_its_reader_as_far_as_there_is_room() -> None:
    remote = Remote()
    source = window(remote, requests=3)
    with source.expect([Span("a", 0, 40_000)]):
        until(lambda: len(remote.fetched) == 3)
        assert is_right(source, Span("a", 0, 1000))
        until(lambda: len(remote.fetched) == 4)
        assert source.peak == 3 * REQUEST


def test_several_connections_fetch_at_once() -> None:
    gate = threading.Event()
    remote = Remote(gate)
    with window(remote, connections=4).expect([Span("a", 0, 40_000)]):
        until(lambda: len(remote.fetched) == 4)
        gate.set()


def test_bytes_are_handed_over_before_their_request_is_whole() -> None:
    gate = threading.Event()

    def fetch(path: str, start: int, end: int) -> Generator[bytes, None, None]:
        yield FILES[path][start : start + 10]
        assert gate.wait(PATIENCE)
        yield FILES[path][start + 10 : end]

    source = Window(fetch)
    with source.expect([Span("a", 0, 1000)]):
        assert is_right(source, Span("a", 0, 10))
        gate.set()
        assert is_right(source, Span("a", 10, 1000))


def test_what_nobody_announced_is_fetched_as_it_is_read() -> None:
    remote = Remote()
    source = window(remote)
    assert is_right(source, Span("a", 17, 4017))
    assert is_right(source, Span("b", 0, 0))
    assert remote.nbytes == 4000
    until(lambda: source.held == 0)


def test_what_is_read_again_is_fetched_again() -> None:
    """So that a reader who finds wrong bytes gets others the second time."""
    remote = Remote()
    source = window(remote)
    with source.expect([Span("a", 0, 1000)]):
        assert is_right(source, Span("a", 0, 500))
        assert is_right(source, Span("a", 0, 500))
        assert remote.nbytes == 1500
        assert is_right(source, Span("a", 500, 1000))
    assert remote.nbytes == 1500


def test_announced_twice_is_fetched_twice_and_read_twice() -> None:
    remote = Remote()
    source = window(remote)
    plan = chunks("a", 0, 3000, 100) * 2
    with source.expect(plan):
        assert all(is_right(source, span) for span in plan)
    assert remote.nbytes == 6000


# Many readers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 2, 5])
@pytest.mark.parametrize("lanes", [2, 7])
def test_readers_that_need_two_full_windows_in_turn_all_get_on(requests: int, lanes: int) -> None:
    """Base and delta each have a window, shared by all shards at work: a shard must not wait for room in one
    that is full of bytes for a shard that waits for room in the other."""
    remotes = Remote(), Remote()
    one, two = (window(remote, requests, connections=2) for remote in remotes)

    def lane(number: int) -> bool:
        start = number * 5000
        first, second = chunks("a", start, start + 5000, 450), chunks("b", start, start + 5000, 450)
        if number % 2:
            first, second = second, first
        with one.expect(first), two.expect(second):
            return all(is_right(one, a) and is_right(two, b) for a, b in zip(first, second, strict=True))

    with ThreadPoolExecutor(lanes) as pool:
        assert all(pool.map(lane, range(lanes), timeout=PATIENCE))
    for remote, source in zip(remotes, (one, two), strict=True):
        assert remote.nbytes == lanes * 5000
        assert source.peak <= (requests + lanes + 1) * REQUEST


def test_a_reader_far_ahead_of_the_others_is_served() -> None:
    source = window(Remote(), requests=1)
    with source.expect([Span("a", 0, 40_000)]):
        assert is_right(source, Span("a", 35_000, 36_000))
        assert is_right(source, Span("a", 0, 35_000))
        assert is_right(source, Span("a", 36_000, 40_000))


def test_what_another_reader_announced_comes_though_that_one_left() -> None:
    gate = threading.Event()
    remote = Remote(gate)
    source = window(remote)
    with ThreadPoolExecutor(1) as pool:
        with source.expect([Span("a", 0, 1000)]):
            reader = pool.submit(is_right, source, Span("a", 0, 1000))
            until(lambda: bool(remote.fetched))
        gate.set()
        assert reader.result(PATIENCE)
    until(lambda: source.held == 0)
    assert remote.fetched == [Span("a", 0, 1000)]


def test_many_readers_share_the_window_in_shorter_requests() -> None:
    remote = Remote()
    source = window(remote, requests=4)
    with ExitStack() as stack:
        for number in range(8):
            stack.enter_context(source.expect([Span("a", number * 5000, number * 5000 + 5000)]))
        assert is_right(source, Span("a", 35_000, 40_000))
    last = [span for span in remote.fetched if span.start >= 35_000]
    assert max(span.end - span.start for span in last) <= REQUEST // 2


# Ends -------------------------------------------------------------------------------------------------


def test_cancelling_ends_all_reads_at_once() -> None:
    gate = threading.Event()
    source = window(Remote(gate), requests=2, connections=2)
    plan = chunks("a", 0, 8000, 1000)
    with source.expect(plan), ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, source, span) for span in (*plan, Span("b", 0, 10))]
        source.cancel()
        for reader in readers:
            with pytest.raises(CancelledError):
                reader.result(PATIENCE)
        with pytest.raises(CancelledError):
            read(source, plan[0])
    gate.set()  # only now do the connections get on, and they end with their next piece
    until(lambda: source.held == 0)


def test_ctrl_c_that_comes_just_before_a_reader_waits_is_seen_soon() -> None:
    """Python takes note of it and does not wake the main thread, as when another thread gets the signal."""
    gate, over = threading.Event(), threading.Event()
    source = window(Remote(gate))
    woken: list[bool] = []

    def interrupt() -> None:
        until(lambda: {threading.Condition.wait.__code__, Window._wait.__code__} <= main_thread())
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        woken.append(over.wait(5))
        gate.set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(source, Span("a", 0, 100))
        over.set()
    assert woken == [True]


def test_closing_waits_for_connections_that_can_end() -> None:
    gate = threading.Event()
    source = window(Remote(gate))
    with source.expect([Span("a", 0, 8000)]):
        until(lambda: source.held > 0)
        threading.Timer(0.05, gate.set).start()
        source.close()
    assert source.held == 0


def test_an_error_is_raised_to_the_readers_of_these_bytes_only() -> None:
    remote = Remote()
    remote.failing = {"b"}
    source = window(remote)
    with source.expect([Span("b", 0, 500), Span("a", 0, 500)]):
        assert is_right(source, Span("a", 0, 500))
        for _ in range(2):
            with pytest.raises(KeyError, match="b"):
                read(source, Span("b", 0, 100))
    with pytest.raises(KeyError, match="b"):
        read(source, Span("b", 0, 100))
    remote.failing = set()
    assert is_right(source, Span("b", 0, 100))
    until(lambda: source.held == 0)


def test_where_no_thread_can_be_started_a_reader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = window(Remote())
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"), source.expect([Span("a", 0, 5000)]):
        read(source, Span("a", 0, 5000))
    assert source.held == 0


def test_leaving_with_bytes_unread_gives_their_memory_back() -> None:
    source = window(Remote())
    for _ in range(3):
        with source.expect([Span("a", 0, 40_000)]):
            assert is_right(source, Span("a", 0, 10))
        until(lambda: source.held == 0)


@settings(max_examples=60)
@given(
    starts=st.lists(st.integers(0, 8).map(lambda k: k * 700), min_size=2, max_size=4),
    step=st.sampled_from([350, 700, 1400]),
    requests=st.integers(1, 12),
    order=st.randoms(use_true_random=False),
)
def test_what_several_announce_is_fetched_for_each_whoever_takes_whose(
    starts: list[int], step: int, requests: int, order: random.Random
) -> None:
    """Readers do not say for whom they read. Whose bytes were taken by others gets what those leave."""
    remote = Remote()
    source = window(remote, requests)
    readers = [chunks("a", start, start + 5600, step) for start in starts]
    blocks = [ExitStack() for _ in readers]
    for block, plan in zip(blocks, readers, strict=True):
        block.enter_context(source.expect(plan))
    turns = [k for k, plan in enumerate(readers) for _ in plan]
    order.shuffle(turns)
    ahead = [list(plan) for plan in readers]
    for turn in turns:
        assert is_right(source, ahead[turn].pop(0))
        if not ahead[turn]:
            blocks[turn].close()
    until(lambda: source.held == 0)
    assert remote.nbytes == 5600 * len(readers)


def test_after_an_error_nothing_is_left_to_others() -> None:
    remote = Remote()
    source = window(remote)
    with source.expect([Span("a", 0, 5000)]):
        with pytest.raises(KeyError), source.expect([Span("a", 0, 5000)]):
            raise KeyError
        assert is_right(source, Span("a", 0, 5000))
        until(lambda: source.held == 0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def main_thread() -> set[CodeType]:
    """The functions that the main thread is in."""
    ident = threading.main_thread().ident
    assert ident is not None
    return {frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[ident])}


def test_spans_may_come_from_a_generator() -> None:
    def plan() -> Iterable[Span]:
        yield from chunks("a", 0, 2000, 500)

    source = window(Remote())
    with source.expect(plan()):
        assert is_right(source, Span("a", 0, 2000))
