"""Counters and timings for platforms, through OpenTelemetry's API where it is installed; nothing otherwise.

An application sets up OpenTelemetry's SDK and its exporter; without one, the API does nothing. What grows
with the bytes is counted in plain integers, which OpenTelemetry asks for when it exports. No attribute holds
a name, a path or a URL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from ._version import __version__

_lock = threading.Lock()

#: Everything since the process began: bytes and chunks.
_totals = dict.fromkeys(("read", "write", "receive", "encode", "decode"), 0)


def add(*, read: int = 0, write: int = 0, receive: int = 0, encode: int = 0, decode: int = 0) -> None:
    """Add bytes that were read, written or received over a network, or chunks that were encoded or decoded.
    From any thread; for many at once, not for each."""
    with _lock:
        _totals["read"] += read
        _totals["write"] += write
        _totals["receive"] += receive
        _totals["encode"] += encode
        _totals["decode"] += decode


def totals() -> dict[str, int]:
    """All that was added since the process began, by the names of :func:`add`."""
    with _lock:
        return dict(_totals)


def count_jobs(verb: str, status: str, count: int = 1) -> None:
    """Count jobs of a batch that are done."""
    if instruments := _instruments():
        attributes = {"deltaweights.operation": verb, "deltaweights.job.status": status}
        instruments.jobs.add(count, attributes)


@contextmanager
def timed_operation(name: str) -> Iterator[None]:
    """Time the block, or each call of the function that this decorates: a verb."""
    instruments = _instruments()
    with _timed(instruments and instruments.operations, {"deltaweights.operation": name}):
        yield


@contextmanager
def timed_stage(name: str) -> Iterator[None]:
    """Time the block, or each call of the function that this decorates: a stage of verbs."""
    instruments = _instruments()
    with _timed(instruments and instruments.stages, {"deltaweights.stage": name}):
        yield


@contextmanager
def _timed(histogram: Any, attributes: dict[str, str]) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    except BaseException as error:
        attributes["error.type"] = type(error).__name__
        raise
    finally:
        if histogram:
            histogram.record(time.perf_counter() - began, attributes)


class _Instruments(NamedTuple):
    operations: Any
    stages: Any
    jobs: Any


#: Seconds, up to hours: OpenTelemetry's own boundaries are for milliseconds.
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 7200, 14400)


@lru_cache(1)
def _instruments() -> _Instruments | None:
    """The instruments, made when something is first timed; None without OpenTelemetry."""
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.metrics") is None:
        return None
    from opentelemetry.metrics import get_meter

    meter = get_meter("deltaweights", __version__)
    _observe(meter)
    return _Instruments(
        meter.create_histogram(
            "deltaweights.operation.duration",
            unit="s",
            description="Duration of one call of a verb.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        ),
        meter.create_histogram(
            "deltaweights.stage.duration",
            unit="s",
            description="Duration of a stage of a verb.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        ),
        meter.create_counter(
            "deltaweights.batch.jobs", unit="{job}", description="Jobs of batches that are done."
        ),
    )


def _observe(meter: Any) -> None:
    """The totals, as counters that are asked for their value."""
    from opentelemetry.metrics import CallbackOptions, Observation

    def observing(attribute: str, totals: tuple[str, ...]) -> Any:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for total in totals:
                yield Observation(_totals[total], {attribute: total})

        return observe

    for name, unit, description, attribute, totals in (
        (
            "deltaweights.io",
            "By",
            "Bytes that were read from files and networks, and written to them.",
            "deltaweights.io.direction",
            ("read", "write"),
        ),
        (
            "deltaweights.network.io",
            "By",
            "Bytes that were fetched over a network, which count as read too.",
            "network.io.direction",
            ("receive",),
        ),
        (
            "deltaweights.chunks",
            "{chunk}",
            "Chunks of tensors that were coded.",
            "deltaweights.codec.direction",
            ("encode", "decode"),
        ),
    ):
        callback = observing(attribute, totals)
        meter.create_observable_counter(name, callbacks=[callback], unit=unit, description=description)
