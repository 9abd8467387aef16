"""Ray itself: nodes, workers and drivers that die in mid-run, and tasks that are cancelled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deltaweights import ApplyJob, ExecutorError, RayExecutor, apply_delta, make_delta, run_batch
from deltaweights.errors import HubReadError

from ..checkpoints import bf16, contents, digests, weights, write_safetensors
from ..conftest import Trio
from ..s3_server import S3Server
from . import jobs
from .conftest import add_node

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    # Ray leaves processes and sockets to the end of the process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

_SHARDS = 8


@pytest.fixture(scope="module")
def ray(cluster: Any) -> Iterator[RayExecutor]:
    with RayExecutor(cluster.address) as executor:
        yield executor


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Work that takes a while: a pair in eight shards, and its delta as one process writes it."""
    folder = tmp_path_factory.mktemp("large")
    trio = Trio(folder / "base", folder / "target", folder / "delta")
    for k in range(_SHARDS):
        old = weights((1024, 1024), k)
        for side, moved in ((trio.base, old), (trio.target, old + weights((1024, 1024), 50 + k, 2e-4))):
            write_safetensors(side / f"model-{k}.safetensors", {f"layers.{k}": bf16(moved)})
    (trio.target / "config.json").write_text("{}")
    make_delta(trio.base, trio.target, trio.delta)
    return trio


def test_tasks_bring_results_errors_and_records(ray: RayExecutor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "deltaweights"):
        found = dict(ray.as_completed(jobs.square, [3, -1, 4]))
    error = found.pop(1)
    assert found == {0: 9, 2: 16}
    assert isinstance(error, HubReadError)
    assert error.retryable
    assert "the square of 4" in caplog.messages


def test_a_task_whose_worker_died_is_run_again(ray: RayExecutor, cluster: Any, tmp_path: Path) -> None:
    assert dict(ray.each(partial(jobs.die_once, tmp_path), [5, 6])) == {0: 5, 1: 6}
    once = RayExecutor(cluster.address, retries=0)
    with pytest.raises(ExecutorError, match="died more often"):
        list(once.each(jobs.die, [None]))


def test_closing_the_results_ends_the_tasks(ray: RayExecutor, tmp_path: Path) -> None:
    results = ray.as_completed(partial(jobs.wait_for_end, tmp_path), ["a", "b", "c", "d"])
    interrupting = threading.Thread(target=_interrupt_when, args=[tmp_path])
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    interrupting.join()
    began = {path.stem for path in tmp_path.glob("*.began")}
    assert began
    assert {path.stem for path in tmp_path.glob("*.interrupted")} == began


def _interrupt_when(folder: Path) -> None:
    _wait_until(lambda: any(folder.glob("*.began")))
    signal.raise_signal(signal.SIGINT)


def test_a_node_that_dies_in_mid_run_changes_nothing(
    ray: RayExecutor, cluster: Any, large: Trio, tmp_path: Path
) -> None:
    nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]

    def kill(_phase: str, count: int, _total: int) -> None:
        if count and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    try:
        make_delta(large.base, large.target, tmp_path / "delta", executor=ray, progress=kill)
    finally:
        add_node(cluster)
    assert not nodes
    assert digests(tmp_path / "delta") == digests(large.delta)


def test_a_driver_that_dies_goes_on_where_it_was(cluster: Any, large: Trio, tmp_path: Path) -> None:
    """And Ctrl-C ends the tasks, with nothing half-written left."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.executors.driver", "apply", str(large.delta), "-o", str(out)]
    command += ["--base", str(large.base), "--ray", cluster.address, "--json"]
    for shards, ending, code in ((1, signal.SIGKILL, -signal.SIGKILL), (3, signal.SIGINT, 130)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            _wait_until(partial(_has_shards, out, shards))
            process.send_signal(ending)
            process.communicate(timeout=60)
        assert process.returncode == code
        there = {path: one for path, one in digests(out).items() if not path.startswith(".deltaweights/")}
        assert there.items() <= digests(large.target).items()
    assert not list(out.rglob("*.partial"))
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    report = json.loads(done.stdout)
    assert report["kept"]
    assert digests(out) == digests(large.target)


def test_clusters_that_cannot_be_used_are_errors_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"pip install 'deltaweights\[ray\]'"):
        list(RayExecutor().each(jobs.square, [1]))


def test_apply_writes_what_one_process_writes(ray: RayExecutor, trio: Trio, tmp_path: Path) -> None:
    apply_delta(trio.delta, tmp_path / "out", base=trio.base, executor=ray)
    assert digests(tmp_path / "out") == digests(trio.target)


@pytest.fixture
def there(s3: S3Server, large: Trio) -> str:
    """The work in a store."""
    for side in ("base", "target", "delta"):
        s3.system.put(str(getattr(large, side)), f"bucket/{side}", recursive=True)
    s3.log.clear()
    return "s3://bucket"


def _stored(s3: S3Server, place: str) -> dict[str, bytes]:
    return {path.removeprefix(f"{place}/"): s3.system.cat_file(path) for path in s3.system.find(place)}


def test_from_a_store_to_a_store(ray: RayExecutor, there: str, s3: S3Server, large: Trio) -> None:
    """By tasks that read and write there; nothing but the results is left."""
    base, out = f"{there}/base", f"{there}/out"
    make_delta(base, f"{there}/target", f"{out}/delta", executor=ray)
    assert _stored(s3, "bucket/out/delta") == contents(large.delta)
    report = apply_delta(f"{there}/delta", f"{out}/model", base=base, executor=ray)
    assert len(report.rebuilt) == _SHARDS + 1
    assert _stored(s3, "bucket/out/model") == contents(large.target)
    assert not s3.system.list_multipart_uploads("bucket")


def test_a_base_in_a_store_is_fetched_once_for_the_nodes_of_a_machine(
    ray: RayExecutor, there: str, s3: S3Server, large: Trio, tmp_path: Path
) -> None:
    jobs = [
        ApplyJob(delta=f"{there}/delta", base=f"{there}/base", out=f"{there}/out-{number}")
        for number in range(3)
    ]
    results = list(run_batch(jobs, executor=ray, cache=tmp_path / "cache"))
    assert [one.error for one in results] == [None] * 3
    sizes = {path.name: path.stat().st_size for path in large.base.iterdir()}
    fetched = [request for request in s3.log if request.method == "GET" and "/base/" in request.path]
    assert sum(request.nbytes for request in fetched) == sum(sizes.values())
    for number in range(3):
        assert _stored(s3, f"bucket/out-{number}") == contents(large.target)


def _has_shards(folder: Path, least: int) -> bool:
    return len(list(folder.glob("*.safetensors"))) >= least


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
