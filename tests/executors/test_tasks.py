"""Verbs whose shards are worked on in other processes: the same bytes as in one, whatever comes first."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from deltaweights import (
    DeltaError,
    ExecutorError,
    OutputError,
    apply_delta,
    compact_deltas,
    make_delta,
    verify_delta,
)
from deltaweights.errors import HubReadError
from deltaweights.storage import (
    OutputFolder,
    PinnedSource,
    ReadableFile,
    SharedOutput,
    Source,
    join_output,
)

from ..checkpoints import Array, bf16, digests, f32, weights, write_safetensors
from ..conftest import CHUNK_BYTES, Trio
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards that are hashed along with the target's, and others; a merged adapter; a fused tensor; a
    quantized one; a duplicate in another shard."""
    folder = tmp_path_factory.mktemp("pair")
    base, target = folder / "base", folder / "target"
    layers = [weights((256, 256), seed) for seed in range(4)]
    attention = [weights((64, 256), 10 + seed) for seed in range(3)]
    for k in range(2):
        names = {f"layers.{k}.a": bf16(layers[2 * k]), f"layers.{k}.b": bf16(layers[2 * k + 1])}
        write_safetensors(base / f"model-{k}.safetensors", names)
    write_safetensors(
        base / "model-2.safetensors", {n: bf16(w) for n, w in zip("qkv", attention, strict=True)}
    )
    write_safetensors(base / "unused.safetensors", {"other": bf16(weights((300, 100), 30))})
    merged = layers[0] + weights((256, 4), 20, 1.0) @ weights((4, 256), 21, 2e-4)
    tuned = {"layers.0.a": bf16(merged), "layers.0.b": bf16(layers[1] + weights((256, 256), 22, 1e-4))}
    write_safetensors(target / "model-0.safetensors", tuned)
    write_safetensors(
        target / "model-1.safetensors",
        {
            "layers.1.a": bf16(layers[2]),
            "layers.1.b": bf16(layers[3] * 0.999),
            "copy": tuned["layers.0.b"],
        },
    )
    scale = np.abs(attention[0]).max(1, keepdims=True) / 127
    write_safetensors(
        target / "model-2.safetensors",
        {
            "qkv": bf16(np.concatenate(attention) + weights((192, 256), 23, 1e-4)),
            "q": Array("I8", (64, 256), np.round(attention[0] / scale).astype(np.int8).tobytes()),
            "q.scale": f32(scale),
        },
    )
    (target / "config.json").write_text("{}")
    (base / "config.json").write_text("{}")
    return base, target


def test_diff_writes_what_one_process_writes(
    pool: PoolExecutor, pair: tuple[Path, Path], trio: Trio, tmp_path: Path
) -> None:
    """Every byte, the manifest and the card included."""
    for name, (base, target) in {"pair": pair, "trio": (trio.base, trio.target)}.items():
        here, there = tmp_path / name / "here", tmp_path / name / "there"
        one = make_delta(base, target, here, chunk_bytes=CHUNK_BYTES)
        two = make_delta(base, target, there, chunk_bytes=CHUNK_BYTES, executor=pool)
        assert one == two
        assert digests(here) == digests(there)
        assert not (there / ".deltaweights").exists()
        if name == "pair":
            statuses = {(entry.status, entry.prediction and entry.prediction.method) for entry in one.tensors}
            assert {("changed", "low_rank"), ("duplicate", None), ("rearranged", None)} < statuses


def test_diff_goes_on_with_the_shards_that_are_missing(
    pool: PoolExecutor, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair

    def interrupt(_phase: str, count: int, _total: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_delta(base, target, tmp_path / "delta", executor=pool, progress=interrupt)
    (first, *_) = found = sorted((tmp_path / "delta").glob("*.safetensors"))
    assert found
    kept = first.stat().st_mtime_ns
    make_delta(base, target, tmp_path / "delta", executor=pool)
    assert first.stat().st_mtime_ns == kept
    make_delta(base, target, tmp_path / "here")
    assert digests(tmp_path / "delta") == digests(tmp_path / "here")


def test_compact_writes_what_one_process_writes(
    pool: PoolExecutor, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair
    last = shutil.copytree(target, tmp_path / "last")
    write_safetensors(
        last / "model-1.safetensors",
        {f"layers.1.{k}": bf16(weights((256, 256), 40 + n)) for n, k in enumerate("ab")},
    )
    make_delta(base, target, tmp_path / "1")
    make_delta(target, last, tmp_path / "2")
    deltas = [tmp_path / "1", tmp_path / "2"]
    compact_deltas(deltas, tmp_path / "here", base=base)
    compact_deltas(deltas, tmp_path / "there", base=base, executor=pool)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    apply_delta(deltas, tmp_path / "out", base=base, executor=pool)
    assert digests(tmp_path / "out") == digests(last)


def test_verify_finds_what_one_process_finds(pool: PoolExecutor, trio: Trio, tmp_path: Path) -> None:
    assert verify_delta(trio.delta, base=trio.base, target=trio.target, executor=pool) == verify_delta(
        trio.delta, base=trio.base, target=trio.target
    )
    delta, target = shutil.copytree(trio.delta, tmp_path / "delta"), tmp_path / "target"
    shutil.copytree(trio.target, target)
    for path in (next(delta.glob("*.safetensors")), next(target.glob("*.safetensors"))):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    (target / "extra").touch()
    found = verify_delta(delta, base=trio.base, target=target, executor=pool)
    assert found == verify_delta(delta, base=trio.base, target=target)
    assert {problem.place for problem in found.problems} == {"delta", "target", "rebuilt"}


def test_an_error_in_a_task_is_the_one_of_one_process(pool: PoolExecutor, trio: Trio, tmp_path: Path) -> None:
    delta = shutil.copytree(trio.delta, tmp_path / "delta")
    shard = next(delta.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64] + bytes(64))
    errors = list[tuple[type, str]]()
    for executor in (None, pool):
        with pytest.raises(DeltaError) as caught:
            apply_delta(delta, tmp_path / f"out{len(errors)}", base=trio.base, executor=executor)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_what_other_machines_cannot_see_is_refused(pool: PoolExecutor, trio: Trio, tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="cannot be kept"):
        apply_delta(trio.delta, tmp_path / "out", base=trio.base, keep_base=True, executor=pool)
    with pytest.raises(ExecutorError, match="by other machines"):
        PinnedSource.of(InMemory("in memory", {}))


class InMemory(Source):
    """A source that no location opens."""

    def open(self, path: str) -> ReadableFile:
        raise NotImplementedError

    def fingerprint(self, path: str) -> str:
        raise NotImplementedError


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
