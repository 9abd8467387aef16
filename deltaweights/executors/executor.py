"""The interface of what runs tasks elsewhere. A task is a function and an item, both sent as pickles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

from .carrying import Call, Carried, carry, settle

Item = TypeVar("Item")
Result = TypeVar("Result")
Self = TypeVar("Self", bound="Executor")


class Executor(ABC):
    """Runs tasks in other processes, on this or other machines; a context manager.

    A subclass defines :meth:`run`. Whoever calls a verb with one also closes it: it may serve many verbs.

    Attributes:
        cpus_per_task: the cores that each task may use.
    """

    cpus_per_task: int = 1

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def run(self, call: Call, items: Sequence[bytes]) -> Iterator[tuple[int, Carried | Exception]]:
        """Return ``call(item)`` for each item, in the order in which the results come, each with the index of
        its item.

        A call is small, can be pickled, and returns what can be pickled. It returns also the errors of its
        task, so an exception is one of the machines: a worker that died more often than may be. A call that
        runs twice, also at the same time, does no harm. When the iterator is closed, ends what still runs,
        by :class:`KeyboardInterrupt` where it can, and does not begin the rest.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of machines and connections. Again does nothing."""

    def as_completed(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[tuple[int, Result | Exception], None, None]:
        """Yield ``function`` of each item, or the error that it raised, as they come, each with the index of
        its item. What the tasks log appears in the log of this process; bytes that they read and write count
        here. Closing the iterator ends the work.

        Args:
            function: one of a module, or a :func:`functools.partial` of one; what is large and the same for
                all items belongs into the latter.
            items: what can be pickled.

        An error is a :class:`DeltaWeightsError` if it is one of ours: :class:`ExecutorError` where a task's
        worker died too often, or has another version of deltaweights.
        """
        call, packed = carry(function, items)
        with closing(_closeable(self.run(call, packed))) as results:
            for index, result in results:
                yield index, result if isinstance(result, Exception) else settle(result)

    def each(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[tuple[int, Result], None, None]:
        """:meth:`as_completed` for work that one error ends: raises the first."""
        with closing(self.as_completed(function, items)) as results:
            for index, result in results:
                if isinstance(result, Exception):
                    raise result
                yield index, result


def _closeable(
    results: Iterator[tuple[int, Carried | Exception]],
) -> Generator[tuple[int, Carried | Exception], None, None]:
    yield from results
