"""Progress in a log: the start, the end, and now and then in between, with bytes, speed and the time left."""

from __future__ import annotations

import re
import time

import pytest

from deltaweights.cli.progress import LogLines, Phases
from deltaweights.cli.rendering import byte_rate, duration, elapsed, speed
from deltaweights.workers import Meter

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_the_start_and_the_end_are_lines_with_bytes_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with LogLines(interval=1000) as lines:
        meter = Meter(lines, "apply", 5_000_000)
        for _ in range(5):
            meter.add(1_000_000)
    start, end = capsys.readouterr().err.splitlines()
    assert re.fullmatch(STAMP + "apply: 0 bytes of 5 MB", start)
    assert re.fullmatch(STAMP + r"apply: 5 MB in [\d.e-]+ s, [\d.]+ [KMGT]B/s", end)


def test_in_between_lines_say_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LogLines(interval=0)  # not entered: no line comes by itself
    meter = Meter(lines, "apply", 5_000_000)
    meter.add(1_000_000)
    meter.add(4_000_000)
    _, between, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(STAMP + r"apply: 1 MB of 5 MB, [\d.]+ [KMGT]B/s, less than 1 s left", between)


def test_a_line_comes_even_if_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a log shows that the Hub does not answer."""
    shown = ""
    with LogLines(interval=0.01) as lines:
        Meter(lines, "diff", 10).add(5)
        deadline = time.monotonic() + 30
        while shown.count("\n") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
            shown += capsys.readouterr().err
    assert shown.count("diff: 5 bytes of 10 bytes, ") >= 2


def test_nothing_is_said_when_nothing_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    with LogLines(interval=0.01) as lines:
        Meter(lines, "diff", 10).add(10)
        time.sleep(0.1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_was_done_before_does_not_count() -> None:
    phases = Phases()
    meter = Meter(phases, "diff", 100)
    meter.skip(60)
    meter.add(40)
    Meter(phases, "check base", 7).add(7)
    assert (phases.done("diff"), phases.done("apply"), phases.done()) == (40, 0, 47)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (elapsed(3.21), "3.2 s"),
        (elapsed(0.0123), "0.012 s"),
        (elapsed(0), "0.001 s"),
        (elapsed(9.96), "10 s"),
        (elapsed(3600), "1 h 0 min"),
        (duration(0.5), "less than 1 s"),
        (byte_rate(1.4e9), "1.4 GB/s"),
        (speed(8_390_000, 3.2), "8.39 MB in 3.2 s, 2.62 MB/s"),
        (speed(0, 3.2), "0 bytes in 3.2 s"),
    ],
)
def test_times_and_speeds_are_short(shown: str, expected: str) -> None:
    assert shown == expected
