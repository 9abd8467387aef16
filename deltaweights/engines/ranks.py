"""What the ranks of one engine tell each other, so that all of them take an update or none does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import errors
from ..errors import DeltaWeightsError

_Result = TypeVar("_Result")


class NewElements(NamedTuple):
    """New elements of a tensor.

    Attributes:
        name: the tensor's.
        indices: int64, ascending, in the flat tensor; None: all of them.
        values: the new values, in one dimension, on the CPU.
    """

    name: str
    indices: Tensor | None
    values: Tensor


class Ranks:
    """The ranks that serve one model together. The first one fetches for all.

    Args:
        group: theirs, with a backend for the CPU's memory such as gloo; None: there is one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = None if group is None or dist.get_world_size(group) == 1 else group
        self._first = 0 if self._group is None else dist.get_global_rank(self._group, 0)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that fetches."""
        return self._group is None or dist.get_rank(self._group) == 0

    def from_first(self, work: Callable[[], _Result]) -> _Result:
        """Do ``work`` on the first rank, and return its result on all of them.

        Raises:
            DeltaWeightsError: it failed there. This is raised on all.
        """
        if self._group is None:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                told[0] = work()
            except Exception as error:  # of any kind: the other ranks wait
                failure, told[1] = error, _told(error)
        dist.broadcast_object_list(told, self._first, self._group)
        if failure is not None:
            raise failure
        if told[1] is not None:
            kind, text = told[1]
            raise getattr(errors, kind)(*text)
        result: _Result = told[0]
        return result

    def all(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""
        if self._group is None:
            return holds
        found = torch.tensor(holds, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MIN, self._group)
        return bool(found)

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any of the ranks has, sorted."""
        mine = sorted(names)
        if self._group is None:
            return mine
        found: list[list[str]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(found, mine, self._group)
        return sorted(set().union(*found))

    def each(self, first: Iterable[NewElements], work: Callable[[Iterator[NewElements]], None]) -> None:
        """Do ``work`` on all ranks, with what the first one has.

        Args:
            first: elements, tensor by tensor; those of other ranks are not looked at.
            work: takes them one after the other. It may stop early.

        Raises:
            DeltaWeightsError: it failed on another rank. What it raises on this one is raised here.
        """
        passed = self._passed(iter(first))

        def take_all() -> None:
            try:
                work(passed)
            finally:
                deque(passed, maxlen=0)  # the other ranks wait

        self.together(take_all)

    def together(self, work: Callable[[], object]) -> None:
        """Do ``work`` on all ranks.

        Raises:
            DeltaWeightsError: it failed on another rank. What it raises on this one is raised here.
        """
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # of any kind: the other ranks wait
            failure = error
        if not self.all(failure is None):
            raise failure or DeltaWeightsError(
                "Another rank could not take the update", "Its own error says why.", "See its log."
            )

    def _passed(self, first: Iterator[NewElements]) -> Iterator[NewElements]:
        """NewElements, passed on from the first rank to all."""
        if self._group is None:
            yield from first
            return
        here: NewElements | None = None

        def take() -> tuple[str, torch.dtype, int, bool] | None:
            nonlocal here
            here = next(first, None)
            return here and (here.name, here.values.dtype, here.values.numel(), here.indices is None)

        while (told := self.from_first(take)) is not None:
            name, dtype, count, is_whole = told
            if not self.is_first:
                indices = None if is_whole else torch.empty(count, dtype=torch.int64)
                here = NewElements(name, indices, torch.empty(count, dtype=dtype))
            assert here is not None
            here = here._replace(values=here.values.contiguous())
            for tensor in (here.indices, here.values.view(torch.uint8)):
                if tensor is not None and count:
                    dist.broadcast(tensor, self._first, self._group)
            yield here


def _told(error: Exception) -> tuple[str, tuple[str, ...]]:
    """An error, as the other ranks raise it."""
    if isinstance(error, DeltaWeightsError) and hasattr(errors, type(error).__name__):
        return type(error).__name__, (error.what, error.why, error.fix)
    return "DeltaWeightsError", ("The first rank failed", f"{type(error).__name__}: {error}", "See its log.")
