"""An executor over processes of this machine: what a task is can be tested without a cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from deltaweights.executors import Call, Carried, Executor


class PoolExecutor(Executor):
    """Runs tasks in ``processes`` processes.

    Args:
        order: puts what is to be done in another order; as it comes if None.
    """

    def __init__(
        self, processes: int = 2, order: Callable[[Sequence[int]], Sequence[int]] | None = None
    ) -> None:
        # Not forked: a fork would have what this process has open.
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        self._order = order or list

    def run(self, call: Call, items: Sequence[bytes]) -> Iterator[tuple[int, Carried | Exception]]:
        order = self._order(range(len(items)))
        futures = {self._pool.submit(call, items[index]): index for index in order}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()  # type: ignore[misc]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
