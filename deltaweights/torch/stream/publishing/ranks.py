"""The processes that publish a state together: all of them go on, or none does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from ....errors import DeltaWeightsError, OutputError
from ....workers import MOST_THREADS, usable_cores
from ...tensors import first_line

Result = TypeVar("Result")


class RankLostError(OutputError):
    """Another rank cannot be reached. What it does is not known."""


class Told:
    """What the ranks said at the end of a block of :meth:`Ranks.together`; on rank 0 only, elsewhere nothing.

    Attributes:
        heard: one message of every rank, in order.
    """

    def __init__(self) -> None:
        self.said: Any = None
        self.heard: list[Any] = []

    def say(self, message: object) -> None:
        """Tell rank 0 this, if the block ends well on every rank."""
        self.said = message


class Ranks:
    """The processes of a group, in which each has to call the same methods in the same order; without a
    group, this process alone.

    Raises:
        ValueError: this process does not belong to the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("this process is not in process_group")
            self._first = dist.get_global_rank(group, 0)

    @property
    def is_alone(self) -> bool:
        """Whether there is no group."""
        return self._group is None

    def share_of_cores(self) -> int | None:
        """How many threads each of the machine's ranks should have; None: as many as one alone."""
        if self.is_alone:
            return None
        here = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun tells
        ranks = int(here) if here.isdecimal() and int(here) else self.size
        return max(1, min(usable_cores() // ranks, MOST_THREADS))

    @contextmanager
    def together(self) -> Iterator[Told]:
        """Do the block on every rank. Wherever an error ends it, every rank gets one.

        Raises:
            OutputError: the block failed on another rank, or another rank cannot be reached.
        """
        told = Told()
        try:
            yield told
        except BaseException as error:
            if not self.is_alone:
                self._exchange(_Failure.of(self.rank, error), cause=error)
            raise
        if self.is_alone:
            told.heard = [told.said]
        else:
            told.heard = self._exchange(told.said)

    def first(self, work: Callable[[], Result]) -> Result:
        """Do the work on rank 0 alone. Every rank gets its result, or an error like that of
        :meth:`together`."""
        if self.is_alone:
            return work()
        result: Result | _Failure
        if self.rank:
            result = self._from_first(None)
        else:
            try:
                result = work()
            except BaseException as error:
                self._from_first(_Failure.of(0, error), cause=error)
                raise
            self._from_first(result)
        if isinstance(result, _Failure):
            raise result.told()
        return result

    def _exchange(self, message: object, cause: BaseException | None = None) -> list[Any]:
        """Every rank's message, on rank 0. Raises the first failure among them that is another rank's."""
        heard: list[Any] | None = None if self.rank else [None] * self.size
        with _connected(cause):
            dist.gather_object(message, heard, dst=self._first, group=self._group)
        failed = next((one for one in heard or () if isinstance(one, _Failure)), None)
        failed = self._from_first(failed, cause=cause)
        if failed is not None and cause is None:
            raise failed.told()
        return heard or []

    def _from_first(self, message: object, cause: BaseException | None = None) -> Any:
        """Rank 0's message, on every rank."""
        box = [message]
        with _connected(cause):
            dist.broadcast_object_list(box, src=self._first, group=self._group)
        return box[0]


class _Failure:
    """What a rank says instead of its message."""

    def __init__(self, rank: int, what: str, why: str, fix: str) -> None:
        self._rank, self._what, self._why, self._fix = rank, what, why, fix

    @classmethod
    def of(cls, rank: int, error: BaseException) -> _Failure:
        if isinstance(error, DeltaWeightsError):
            return cls(rank, error.what, error.why, error.fix)
        return cls(rank, f"{type(error).__name__}: {error}".partition("\n")[0], "", "See its own error.")

    def told(self) -> OutputError:
        """The error on the other ranks."""
        return OutputError(
            f"Rank {self._rank} failed, so that nothing is published",
            f"{self._what.rstrip('.')}. {self._why}".strip(),
            self._fix,
        )


@contextmanager
def _connected(cause: BaseException | None) -> Iterator[None]:
    """Explain that a rank cannot be reached; after a failure here, that failure is raised."""
    try:
        yield
    except RuntimeError as error:
        if cause is not None:
            return
        raise RankLostError(
            "Another rank cannot be reached",
            f"{first_line(error)}.",
            "Start all ranks again: they go on from the last state that was published.",
        ) from error
