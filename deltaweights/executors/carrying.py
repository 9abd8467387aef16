"""How a task gets to another process and its result back: versions compared, errors, log and traffic along
with it."""

from __future__ import annotations

import logging
import pickle
import platform
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import metrics
from .._version import __version__
from ..errors import ExecutorError

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROOT = "deltaweights"


@dataclass(frozen=True, slots=True)
class Carried:
    """What came of a task.

    Attributes:
        result: what it returned, pickled; or its error.
        is_error: which of the two.
        trace: the error's traceback, as text.
        records: what it logged.
        totals: the bytes that it read and wrote, and the chunks that it coded, as :func:`metrics.add` takes
            them.
    """

    result: bytes
    is_error: bool
    trace: str
    records: tuple[logging.LogRecord, ...]
    totals: dict[str, int]


@dataclass(frozen=True, slots=True)
class Call:
    """The function of tasks, with what their processes need to know. Calling it with an item runs one.

    ``function`` is pickled, so that it is not looked for before versions were compared."""

    function: bytes
    version: str
    level: int

    def __call__(self, item: bytes) -> Carried:
        """Run the task. An error is returned, like a result."""
        before = metrics.totals()
        error, trace, result = None, "", b""
        with _recorded(self.level) as records:
            try:
                if self.version != __version__:
                    raise ExecutorError(
                        f"A worker has another version of deltaweights on {platform.node()}",
                        f"It has {__version__}; this process has {self.version}.",
                        "Install the same version on every machine.",
                    )
                # Only the caller's own process makes these pickles; no file or delta ever holds one.
                function = pickle.loads(self.function)  # noqa: S301
                result = pickle.dumps(function(pickle.loads(item)))  # noqa: S301
            except Exception as caught:
                error, trace = caught, traceback.format_exc()
        packed = _pack(error) if error else result
        return Carried(packed, error is not None, trace, tuple(records), _since(before))


def carry(function: Callable[[Item], Result], items: Iterable[Item]) -> tuple[Call, list[bytes]]:
    """The call for ``function``, and the items as it takes them."""
    level = logging.getLogger(_ROOT).getEffectiveLevel()
    return Call(pickle.dumps(function), __version__, level), [pickle.dumps(item) for item in items]


def settle(carried: Carried) -> Any:
    """Log what the task logged, count its traffic, and return its result or its error."""
    for record in carried.records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    metrics.add(**carried.totals)
    found = pickle.loads(carried.result)  # noqa: S301
    if carried.is_error:
        found.__cause__ = _FarTraceback(carried.trace)
    return found


class _FarTraceback(Exception):  # noqa: N818
    """The traceback of an error in another process, to be shown above the error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _since(before: dict[str, int]) -> dict[str, int]:
    return {name: amount - before[name] for name, amount in metrics.totals().items()}


def _pack(error: Exception) -> bytes:
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)  # noqa: S301
    except Exception:  # one of another library, with arguments of its own
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed


@contextmanager
def _recorded(level: int) -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged inside the block, and show it nowhere else."""
    logger, records = logging.getLogger(_ROOT), list[logging.LogRecord]()
    handler = _Collecting(records)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Collecting(logging.Handler):
    """Keeps records in a form that can be pickled."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        self._records.append(record)
