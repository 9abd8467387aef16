"""Tasks on the machines of a Ray cluster. Ray places them, and runs them again when a worker or node dies."""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

from ..errors import ExecutorError
from ..workers import next_of
from .carrying import Call, Carried
from .executor import Executor

_log = logging.getLogger(__name__)

#: Seconds that a cancelled task has to clean up; then its worker is ended.
_GRACE = 10.0


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster. Needs the extra ``ray``, and deltaweights in the same version on each
    machine.

    It connects at the beginning of its ``with`` block, or else when it is first used. If this process uses
    Ray already, it works there, and leaves that connection open.

    Args:
        address: ``"auto"`` for the cluster that runs on this machine or that ``RAY_ADDRESS`` names;
            ``"local"`` to start one on this machine, which ends with the executor; ``"host:port"`` of a
            cluster that this machine is a part of; ``"ray://host:port"`` of any.
        cpus_per_task: the cores that each task takes, and its threads.
        retries: how often a task is run again whose worker or node died.
    """

    def __init__(self, address: str = "auto", *, cpus_per_task: int = 1, retries: int = 3) -> None:
        self.cpus_per_task = cpus_per_task
        self._address = address
        self._retries = retries
        self._ray: ModuleType | None = None
        self._is_ours = False

    def __enter__(self) -> RayExecutor:
        """Connect at once: an error then comes before any work."""
        self._connected()
        return self

    def close(self) -> None:
        """Disconnect; end the cluster that was started for this executor."""
        ray, self._ray = self._ray, None
        if ray and self._is_ours:
            ray.shutdown()
            self._is_ours = False

    def run(self, call: Call, items: Sequence[bytes]) -> Iterator[tuple[int, Carried | Exception]]:
        """As :meth:`Executor.run` says: one Ray task an item."""
        ray = self._connected()
        task = ray.remote(
            num_cpus=self.cpus_per_task, max_retries=self._retries, scheduling_strategy="SPREAD"
        )(_run)
        shared = ray.put(call)
        done = queue.SimpleQueue[int]()
        refs: dict[int, Any] = {}
        futures: dict[int, Any] = {}
        try:
            for index, item in enumerate(items):
                refs[index] = task.remote(shared, item)
                futures[index] = refs[index].future()
                futures[index].add_done_callback(partial(_report, done, index))
            while futures:
                index = next_of(done)
                future = futures.pop(index)
                del refs[index]
                error = future.exception()
                yield index, _explained(error) if error else future.result()
        finally:
            _end(ray, list(refs.values()), list(futures.values()))

    def _connected(self) -> ModuleType:
        if self._ray is None:
            self._ray = self._connect()
        return self._ray

    def _connect(self) -> ModuleType:
        try:
            import ray
        except ImportError as error:
            raise ExecutorError(
                "Ray is not installed",
                f"{error}.",
                "Install it on every machine: pip install 'deltaweights[ray]'",
            ) from error
        if not ray.is_initialized():
            is_local = self._address == "local"
            if is_local:  # nobody asked to tell others of it
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(
                    self._address,
                    log_to_driver=False,  # tasks bring their records along
                    configure_logging=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False if is_local else None,
                )
            except Exception as error:
                raise ExecutorError(
                    f"The Ray cluster {self._address!r} cannot be reached",
                    f"{_first_line(error)}.",
                    "Free some of this machine's cores, and try again."
                    if is_local
                    else "Check its address, or start one: ray start --head",
                ) from error
            self._is_ours = True
        self._tell(ray)
        return ray

    def _tell(self, ray: Any) -> None:
        """Log what there is to work with."""
        cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        _log.info("the Ray cluster %s has %d nodes, %d cores", self._address, len(cores), sum(cores))
        if max(cores, default=0) < self.cpus_per_task:
            _log.warning(
                "No node of the Ray cluster has %d cores now, as each task needs: tasks wait for one.",
                self.cpus_per_task,
            )


def _run(call: Call, item: bytes) -> Carried:
    """The remote function."""
    return call(item)


def _report(done: queue.SimpleQueue[int], index: int, _future: object) -> None:
    done.put(index)


def _end(ray: Any, refs: list[Any], futures: list[Any]) -> None:
    """Cancel tasks, and wait until they have let go of their files."""
    for is_forced in (False, True):
        for ref, future in zip(refs, futures, strict=True):
            if not future.done():
                with suppress(Exception):  # it ended meanwhile, or the cluster did
                    ray.cancel(ref, force=is_forced)
        if not wait(futures, timeout=_GRACE).not_done:
            return


def _explained(error: BaseException) -> ExecutorError:
    """What Ray says of a task that came to no result, as an error of ours."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):  # our function returns errors: this one was before it
        why, fix = _last_line(error), "Install deltaweights, in this version, on every machine."
        return ExecutorError("A task could not begin on its worker", f"{why}.", fix)
    if isinstance(error, exceptions.OutOfMemoryError):
        what, fix = (
            "A worker had too little memory",
            "Give tasks more cores each, so that fewer run on one machine at once.",
        )
    elif isinstance(error, exceptions.TaskCancelledError):
        what, fix = "A task was cancelled", "Run the same command again to go on."
    else:
        what = "A task's worker or node died more often than it is tried again"
        fix = "Look into the cluster's logs, then run the same command again to go on."
    return ExecutorError(what, f"{type(error).__name__}: {_first_line(error)}.", fix)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
