"""Runs batches: which jobs are left to do, where they run, and what is written of them."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial

from ..executors import Executor
from ..metrics import count_jobs
from ..storage import output_path
from ..workers import MOST_THREADS, Stopped, next_of, usable_cores
from .job import Planned, Settings, run_job
from .jobs import Job, digest_of, read_jobs, settled
from .results import JobResult, error_of, open_results

#: What copies of bases may take, unless somebody says otherwise.
CACHE_BYTES = 500_000_000_000


def run_batch(
    jobs: str | os.PathLike[str] | Iterable[Job],
    results: str | os.PathLike[str] | None = None,
    *,
    at_once: int = 1,
    threads: int | None = None,
    executor: Executor | None = None,
    accept_license: Iterable[str] = (),
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Generator[JobResult, None, None]:
    """Run many jobs, each of which makes, applies or verifies a delta. A job that fails stops nothing.

    The work is done as the results are taken; closing the iterator ends it. Jobs run in any order, and none
    waits for another: one that needs what another makes belongs into a later batch.

    Args:
        jobs: a file with one job a line, as JSON; or the jobs. Relative paths are relative to the present
            working directory.
        results: a file on this machine to which each result is appended. What it has as done is skipped, so
            that the same call goes on after an interruption; what failed is tried again. None: results are
            only returned.
        at_once: how many jobs run at once in this process.
        threads: how many threads all of these share; if None, the number of usable cores, at most 8.
        executor: where jobs run instead of in this process; each takes ``executor.cpus_per_task`` threads.
        accept_license: licenses that were accepted for all jobs. A delta that somebody would have to be asked
            about fails, as on the command line.
        cache: a folder for copies of bases that are far away, on each machine that runs jobs. Jobs with the
            same base fetch it once. None: every job fetches what it needs.
        cache_bytes: the most bytes of all copies; the oldest ones make room.

    Yields:
        A result for each job, as they come; what was done before comes first, as "skipped".

    Raises:
        DeltaWeightsError: the jobs cannot be read.
        OutputError: another batch writes the same results, or the file is something else.
    """
    read = read_jobs(jobs) if isinstance(jobs, (str, os.PathLike)) else enumerate(jobs, 1)
    planned = [Planned(line, job) for line, job in settled(read)]
    settings = Settings(
        accept_license=tuple(accept_license),
        threads=executor.cpus_per_task if executor else _share(threads, at_once),
        cache=None if cache is None else os.path.abspath(output_path(cache)),
        cache_bytes=cache_bytes,
        is_alone=executor is not None or at_once == 1,
    )
    with ExitStack() as opened:
        kept = opened.enter_context(open_results(results)) if results is not None else None
        skipped, left = _divided(planned, kept.done if kept else {})
        yield from skipped
        for result in opened.enter_context(closing(_run(left, settings, executor, at_once))):
            if kept:
                kept.add(result)
            count_jobs(result.verb or "none", result.status)
            yield result


def _share(threads: int | None, at_once: int) -> int:
    """The threads of each job."""
    return max(1, min(MOST_THREADS, (threads or usable_cores()) // at_once))


def _divided(planned: Iterable[Planned], done: dict[str, JobResult]) -> tuple[list[JobResult], list[Planned]]:
    """What is done, or is the same as an earlier line; and what is left to do."""
    skipped, left = [], []
    seen = set(done)
    for one in planned:
        digest = digest_of(one.job)
        if digest in seen:
            skipped.append(one.result(status="skipped"))
        else:
            seen.add(digest)
            left.append(one)
    return skipped, left


def _run(
    planned: Sequence[Planned], settings: Settings, executor: Executor | None, at_once: int
) -> Generator[JobResult, None, None]:
    if executor is None and at_once == 1:
        for one in planned:
            yield run_job(one, settings)
        return
    function = partial(run_job, settings=settings)
    with closing(
        executor.as_completed(function, planned) if executor else _in_threads(settings, planned, at_once)
    ) as results:
        for index, result in results:
            yield planned[index].failed(error_of(result)) if isinstance(result, Exception) else result


def _in_threads(
    settings: Settings, planned: Sequence[Planned], at_once: int
) -> Generator[tuple[int, JobResult | Exception], None, None]:
    """Several jobs at once. Closing it ends those that run."""
    stopped = threading.Event()
    done = queue.SimpleQueue[tuple[int, JobResult | Exception]]()
    todo, lock = iter(enumerate(planned)), threading.Lock()

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    def work() -> None:
        while True:
            with lock:
                item = None if stopped.is_set() else next(todo, None)
            if item is None:
                return
            with suppress(Stopped):
                done.put((item[0], run_job(item[1], settings, check)))

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for _ in range(min(at_once, len(planned))):
                pool.submit(work)
            for _ in planned:
                yield next_of(done)
        finally:
            stopped.set()
