"""Verbs whose shards are worked on in other processes: the same bytes as in one, whatever comes first."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deltaweights import ExecutorError, OutputError, apply_delta
from deltaweights.errors import HubReadError
from deltaweights.storage import OutputFolder, SharedOutput, join_output

from ..checkpoints import digests
from ..conftest import Trio
from . import jobs
from .pool import PoolExecutor


def _shuffled(indexes: Sequence[int]) -> list[int]:
    order = list(indexes)
    random.Random(1).shuffle(order)
    return order


@pytest.fixture(scope="module")
def pool() -> Iterator[PoolExecutor]:
    with PoolExecutor(2, _shuffled) as executor:
        yield executor


def test_tasks_bring_results_errors_and_records(pool: PoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deltaweights"):
        found = dict(pool.as_completed(jobs.square, [3, -1, 4]))
    error = found.pop(1)
    assert found == {0: 9, 2: 16}
    assert isinstance(error, HubReadError)
    assert (error.why, error.retryable) == ("-1 is negative.", True)
    assert "in square" in str(error.__cause__)
    assert {(r.name, r.getMessage()) for r in caplog.records} == {
        ("deltaweights.jobs", f"the square of {number}") for number in (3, -1, 4)
    }


def test_a_worker_of_another_version_is_refused(pool: PoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaweights.executors.carrying.__version__", "0.0.1")
    with pytest.raises(ExecutorError, match=r"another version") as caught:
        list(pool.each(jobs.square, [3]))
    assert "this process has 0.0.1" in caught.value.why


def test_apply_writes_what_one_process_writes(pool: PoolExecutor, trio: Trio, tmp_path: Path) -> None:
    done = []
    report = apply_delta(
        trio.delta,
        tmp_path / "out",
        base=trio.base,
        executor=pool,
        progress=lambda phase, count, total: done.append((phase, count, total)),
    )
    assert digests(tmp_path / "out") == digests(trio.target)
    assert set(report.rebuilt) == set(digests(trio.target))
    assert done[-1][:1] == ("apply",)
    assert done[-1][1] == done[-1][2]
    again = apply_delta(trio.delta, tmp_path / "out", base=trio.base, executor=pool)
    assert not again.rebuilt


def test_inputs_that_changed_since_they_were_planned_are_refused(
    pool: PoolExecutor, trio: Trio, tmp_path: Path
) -> None:
    """A worker that sees other files of the same name, as on a folder that is not shared."""
    base = shutil.copytree(trio.base, tmp_path / "base")
    shard = next(base.glob("*.safetensors"))

    def touch(phase: str, count: int, _total: int) -> None:
        if phase == "apply" and not count:
            os.utime(shard, ns=(1, 1))

    with pytest.raises(ExecutorError, match="is not the same"):
        apply_delta(trio.delta, tmp_path / "out", base=base, executor=pool, progress=touch)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_output_that_a_worker_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaweights.storage.joined._SOON", 0)
    with pytest.raises(OutputError, match=r"(?s)cannot write to .*no such folder.*all machines share"):
        join_output(SharedOutput(str(tmp_path / "none"), "run")).__enter__()
    with OutputFolder(tmp_path / "out") as folder:
        shared = folder.share()
        with pytest.raises(OutputError, match="A later run"):
            join_output(SharedOutput(shared.location, "run")).__enter__()
        with join_output(shared) as joined, joined.create("a") as file:
            file.write_at(0, b"a")
            folder.share()
            with pytest.raises(OutputError, match="A later run"):
                file.commit()
    assert not list((tmp_path / "out").iterdir())
