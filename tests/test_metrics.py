"""What OpenTelemetry is told: bytes, chunks, seconds, jobs; no names; and nothing at all without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaweights import ApplyJob, DeltaError, apply_delta, make_delta, run_batch, verify_delta

from .conftest import CHUNK_BYTES, Trio
from .hub_server import HubServer

pytest.importorskip("opentelemetry.sdk")

Read = Callable[[], dict[tuple[str, ...], Any]]


@pytest.fixture(scope="session")
def _reader() -> Any:
    """OpenTelemetry takes one provider in the life of a process."""
    from opentelemetry.metrics import set_meter_provider
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    set_meter_provider(MeterProvider([reader]))
    return reader


@pytest.fixture
def read(_reader: Any) -> Read:
    """What was added since the fixture was asked for, by the metric's name and its attributes' values: an
    amount, or how often a time was taken."""
    before: dict[tuple[str, ...], Any] = {}

    def collected() -> dict[tuple[str, ...], Any]:
        found = {}
        data = _reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                assert scope.scope.name == "deltaweights"
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        key = (metric.name, *(str(value) for _, value in sorted(point.attributes.items())))
                        found[key] = getattr(point, "count", None) or getattr(point, "value", 0)
        return found

    def since() -> dict[tuple[str, ...], Any]:
        after = {key: amount - before.get(key, 0) for key, amount in collected().items()}
        return {key: amount for key, amount in after.items() if amount}

    before = collected()
    return since


def test_verbs_count_bytes_chunks_and_seconds(trio: Trio, tmp_path: Path, read: Read) -> None:
    manifest = make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    found = read()
    assert found["deltaweights.operation.duration", "diff"] == 1
    assert {key[1] for key in found if key[0] == "deltaweights.stage.duration"} == {"match", "encode"}
    chunks = found["deltaweights.chunks", "encode"]
    sizes = [entry.payload_bytes for entry in manifest.tensors if entry.payload_bytes]
    assert len(sizes) <= chunks < 200
    assert found["deltaweights.io", "write"] >= manifest.delta_bytes
    assert found["deltaweights.io", "read"] >= manifest.target_bytes
    assert ("deltaweights.network.io", "receive") not in found
    apply_delta(tmp_path / "delta", tmp_path / "out", base=trio.base)
    verify_delta(tmp_path / "delta", base=trio.base)
    found = read()
    assert found["deltaweights.chunks", "decode"] >= 2 * len(sizes)
    stages = {key[1] for key in found if key[0] == "deltaweights.stage.duration"}
    assert stages > {"check base", "rebuild", "compare files", "rebuild in memory"}
    operations = {key[1:]: n for key, n in found.items() if key[0] == "deltaweights.operation.duration"}
    assert operations == {("diff",): 1, ("apply",): 1, ("verify",): 1}


def test_what_fails_says_with_which_error(trio: Trio, tmp_path: Path, read: Read) -> None:
    with pytest.raises(DeltaError):
        apply_delta(trio.base, tmp_path / "out")
    assert read() == {("deltaweights.operation.duration", "apply", "ManifestError"): 1} | {
        key: amount for key, amount in read().items() if key[0] == "deltaweights.io"
    }


def test_bytes_from_a_network_count_as_such(shelf: HubServer, tmp_path: Path, read: Read) -> None:
    apply_delta("org/delta", tmp_path / "out")
    found = read()
    assert found["deltaweights.network.io", "receive"] > 1_000_000
    assert found["deltaweights.io", "read"] >= found["deltaweights.network.io", "receive"]


def test_jobs_are_counted_by_verb_and_status(trio: Trio, tmp_path: Path, read: Read) -> None:
    jobs = [
        ApplyJob(delta=str(trio.delta), base=str(base), out=str(tmp_path / out), accept_license=("qwen",))
        for base, out in ((trio.base, "a"), (trio.target, "b"))
    ]
    list(run_batch(jobs))
    found = {key[1:]: amount for key, amount in read().items() if key[0] == "deltaweights.batch.jobs"}
    assert found == {("failed", "apply"): 1, ("ok", "apply"): 1}


def test_nothing_tells_a_name(trio: Trio, tmp_path: Path, read: Read) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta")
    words = " ".join(" ".join(key) for key in read())
    assert "/" not in words
    assert "model" not in words


def test_without_opentelemetry_all_works_and_nothing_is_imported(trio: Trio, tmp_path: Path) -> None:
    script = (
        "import sys, json\n"
        "sys.modules['opentelemetry'] = None\n"
        "from deltaweights import verify_delta\n"
        f"print(json.dumps(verify_delta({str(trio.delta)!r}).ok))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) is True
