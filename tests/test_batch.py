"""Batches: real jobs, one a line; what is done is not done again, and what fails stops nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltaweights import ApplyJob, DiffJob, JobResult, OutputError, VerifyJob, make_delta, run_batch
from deltaweights.batch import base_cache
from deltaweights.batch.base_cache import BaseCache
from deltaweights.cli.commands import app
from deltaweights.storage import LocalSource

from .checkpoints import bf16, contents, weights, write_safetensors
from .conftest import Trio
from .executors.pool import PoolExecutor
from .hub_server import HubServer
from .s3_server import S3Server


@pytest.fixture
def tunes(tmp_path: Path) -> list[Path]:
    """Five small fine-tunes of ``tmp_path / "base"``."""
    old = weights((128, 256), 0)
    write_safetensors(tmp_path / "base" / "model.safetensors", {"w": bf16(old)})
    (tmp_path / "base" / "config.json").write_text("{}")
    folders = []
    for k in range(5):
        folders.append(tmp_path / f"tuned-{k}")
        new = {"w": bf16(old + weights(old.shape, 1 + k, 1e-4))}
        write_safetensors(folders[-1] / "model.safetensors", new)
    return folders


def write_jobs(path: Path, jobs: Iterable[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join(f"{job if isinstance(job, str) else json.dumps(job)}\n" for job in jobs))
    return path


def diffs(tunes: list[Path], base: str | Path, **more: object) -> list[dict[str, Any]]:
    return [
        {"id": one.name, "verb": "diff", "base": str(base), "target": str(one), "delta": f"{one}-delta"}
        | more
        for one in tunes
    ]


def by_id(results: Iterable[JobResult]) -> dict[str | None, JobResult]:
    return {result.id: result for result in results}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_batch_does_what_its_verbs_do(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    jobs: list[dict[str, Any]] = [
        {"id": "d", "verb": "diff", "base": f"{trio.base}", "target": f"{trio.target}", "delta": "delta"},
        {"id": "a", "verb": "apply", "delta": str(trio.delta), "base": f"{trio.base}", "out": "out"},
        {"id": "v", "verb": "verify", "delta": [str(trio.delta)], "base": f"{trio.base}"},
    ]
    monkeypatch.chdir(tmp_path)
    made = make_delta(trio.base, trio.target, tmp_path / "one")
    kept = tmp_path / "results.jsonl"
    options: Any = {"at_once": at_once, "accept_license": ["qwen"]}
    found = by_id(run_batch(write_jobs(tmp_path / "jobs.jsonl", jobs), kept, **options))
    assert {name: (one.verb, one.status, one.error) for name, one in found.items()} == {
        "d": ("diff", "ok", None),
        "a": ("apply", "ok", None),
        "v": ("verify", "ok", None),
    }
    assert contents(tmp_path / "delta") == contents(tmp_path / "one")
    assert contents(tmp_path / "out") == contents(trio.target)
    assert (found["d"].delta_bytes, found["d"].target_bytes) == (made.delta_bytes, made.target_bytes)
    assert (found["a"].bytes_read is None) == (at_once > 1)
    assert {line["id"]: line["status"] for line in lines_of(kept)} == dict.fromkeys("dav", "ok")


def test_jobs_of_python_are_those_of_a_file(tunes: list[Path], tmp_path: Path) -> None:
    target, delta = str(tunes[0]), str(tmp_path / "delta")
    jobs = [DiffJob(base=str(tmp_path / "base"), target=target, delta=delta)]
    assert [one.status for one in run_batch(jobs)] == ["ok"]
    later = [ApplyJob(delta=delta, base=str(tmp_path / "base"), out=str(tmp_path / "out"))]
    later_still = [VerifyJob(delta=delta, target=str(tmp_path / "out"))]
    assert [one.status for one in (*run_batch(later), *run_batch(later_still))] == ["ok", "ok"]
    assert contents(tmp_path / "out") == contents(tunes[0])


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(tunes: list[Path], tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", diffs(tunes, tmp_path / "base"))
    hidden = tunes[2].rename(tmp_path / "hidden")
    kept = tmp_path / "results.jsonl"
    first = by_id(run_batch(jobs, kept))
    assert {name: one.status for name, one in first.items() if one.status != "ok"} == {"tuned-2": "failed"}
    error = first["tuned-2"].error
    assert error
    assert (error.kind, "tuned-2" in error.what, error.retryable) == ("CheckpointError", True, False)
    hidden.rename(tunes[2])
    stamps = {
        one: (tmp_path / f"{one}-delta" / "deltaweights.json").stat().st_ino for one in (tunes[0].name,)
    }
    second = by_id(run_batch(jobs, kept))
    assert {name for name, one in second.items() if one.status == "skipped"} == set(first) - {"tuned-2"}
    assert second["tuned-2"].status == "ok"
    assert stamps[tunes[0].name] == (tmp_path / "tuned-0-delta" / "deltaweights.json").stat().st_ino
    assert [line["status"] for line in lines_of(kept)].count("ok") == 5
    assert {one.status for one in run_batch(jobs, kept)} == {"skipped"}


def test_bad_lines_are_told_by_their_number_and_stop_nothing(tunes: list[Path], tmp_path: Path) -> None:
    good = diffs(tunes, tmp_path / "base")
    jobs = write_jobs(
        tmp_path / "jobs.jsonl",
        [
            good[0],
            "{",
            "",
            {**good[1], "thread": 3},
            {**good[1], "verb": "push"},
            {**good[1], "base": 7},
            {**good[1], "effort": "huge"},
            {"verb": "apply", "delta": "x"},
            "[" * 2000,
            json.dumps(good[1] | {"exclude": ["x" * 1_100_000]}),
            {**good[2], "delta": good[0]["delta"]},
            {**good[3], "id": good[0]["id"]},
            {**good[0], "id": "the same", "effort": "default", "exclude": []},
            {**good[4], "delta": "s3:/lost/slash"},
            good[1],
        ],
    )
    found = {one.line: one for one in run_batch(jobs, tmp_path / "results.jsonl")}
    assert {line for line, one in found.items() if one.status == "ok"} == {1, 15}
    assert {line for line, one in found.items() if one.status == "skipped"} == {13}
    whys = {line: one.error.why for line, one in found.items() if one.error}
    assert sorted(whys) == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]
    assert all(one.error.what == f"Line {line} is no job" for line, one in found.items() if one.error)
    for line, words in {
        4: "thread",
        5: "push",
        8: "out",
        10: "1,048,576",
        11: "line 1",
        12: "line 1",
    }.items():
        assert words in whys[line]


def test_a_verified_delta_with_problems_is_a_failed_job(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.delta, tmp_path / "delta")
    shard = next((tmp_path / "delta").glob("delta-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (found,) = run_batch([VerifyJob(delta=str(tmp_path / "delta"))], tmp_path / "results.jsonl")
    assert found.status == "failed"
    assert found.error
    assert found.error.kind == "Problems"
    assert [(one.path, one.kind) for one in found.problems] == [(shard.name, "different")]
    assert lines_of(tmp_path / "results.jsonl")[0]["problems"][0]["path"] == shard.name


def test_a_license_that_nobody_accepted_fails_its_job_only(trio: Trio, tmp_path: Path) -> None:
    def jobs(name: str) -> list[ApplyJob]:
        common: Any = {"delta": str(trio.delta), "base": str(trio.base)}
        return [
            ApplyJob(id="no", out=str(tmp_path / f"{name}-no"), **common),
            ApplyJob(id="yes", out=str(tmp_path / f"{name}-yes"), accept_license=("qwen",), **common),
        ]

    found = by_id(run_batch(jobs("a")))
    assert found["no"].error
    assert found["no"].error.kind == "LicenseNotAcceptedError"
    assert found["yes"].status == "ok"
    assert not (tmp_path / "a-no").exists()
    assert {one.status for one in run_batch(jobs("b"), accept_license=["qwen"])} == {"ok"}


def test_a_batch_goes_to_an_executor(tunes: list[Path], tmp_path: Path) -> None:
    kept, cache = tmp_path / "results.jsonl", tmp_path / "cache"
    jobs = write_jobs(tmp_path / "jobs.jsonl", [*diffs(tunes, tmp_path / "base"), "{"])
    with PoolExecutor(2) as pool:
        found = list(run_batch(jobs, kept, executor=pool, cache=cache))
        again = list(run_batch(jobs, kept, executor=pool, cache=cache))
    assert sorted(one.status for one in found) == ["failed", *["ok"] * 5]
    assert sorted(one.status for one in again) == ["failed", *["skipped"] * 5]
    assert all(one.bytes_read and one.bytes_written for one in found if one.status == "ok")
    assert len(lines_of(kept)) == 7
    make_delta(tmp_path / "base", tunes[4], tmp_path / "right")
    assert contents(tmp_path / "tuned-4-delta") == contents(tmp_path / "right")


# The results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 40, 3000], ids=["all but the end", "some", "nearly all"])
def test_a_torn_last_line_is_repaired(tunes: list[Path], tmp_path: Path, cut: int) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", diffs(tunes[:3], tmp_path / "base"))
    kept = tmp_path / "results.jsonl"
    list(run_batch(jobs, kept))
    whole = kept.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    kept.write_bytes(whole[: -min(cut, len(last) - 3)])
    again = [one.status for one in run_batch(jobs, kept)]
    assert sorted(again) == (["skipped"] * 3 if cut == 1 else ["ok", "skipped", "skipped"])
    assert [line["id"] for line in lines_of(kept)] == ["tuned-0", "tuned-1", "tuned-2"]


@pytest.mark.parametrize("text", [b"notes\n", b"notes", b'{"verb": "diff"}\n', b"\xff\n"])
def test_a_file_that_is_something_else_stays_as_it_is(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "notes").write_bytes(text)
    with pytest.raises(OutputError, match="is not the results of a batch"):
        list(run_batch([], tmp_path / "notes"))
    assert (tmp_path / "notes").read_bytes() == text


def test_results_are_a_local_file_of_one_run(tunes: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a URL"):
        list(run_batch([], "s3://bucket/results.jsonl"))
    jobs = write_jobs(tmp_path / "jobs.jsonl", diffs(tunes, tmp_path / "base"))
    running = run_batch(jobs, tmp_path / "results.jsonl")
    next(running)
    with pytest.raises(OutputError, match="Another batch writes to"):
        list(run_batch(jobs, tmp_path / "results.jsonl"))
    assert [one.status for one in running] == ["ok"] * 4


# The command line ---------------------------------------------------------------------------------------


def test_the_command_says_what_became_of_each_job(tunes: list[Path], tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", [*diffs(tunes[:2], tmp_path / "base"), "{"])
    done = CliRunner().invoke(app, ["batch", str(jobs), "--jobs", "2"])
    assert done.exit_code == 1, done.output
    assert "2 ok, 1 failed, 0 skipped" in " ".join(done.stdout.split())
    assert "ok, tuned-0, diff" in done.stderr
    assert "Line 3 is no job" in done.stderr
    assert len(lines_of(tmp_path / "jobs.results.jsonl")) == 3
    jobs.write_text(jobs.read_text().rpartition("{\n")[0])
    again = CliRunner().invoke(app, ["batch", str(jobs), "--json", "--quiet"])
    assert again.exit_code == 0
    assert {name: json.loads(again.stdout)[name] for name in ("ok", "failed", "skipped")} == {
        "ok": 0,
        "failed": 0,
        "skipped": 2,
    }


def test_jobs_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["batch", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 1
    assert "No such file" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_size_of_the_cache_is_a_number(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["batch", "jobs", "--cache-size", "much"])
    assert done.exit_code == 2
    assert "'much' is not a number of bytes" in done.stderr


def started(jobs: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deltaweights", "batch", str(jobs), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], kept: Path, lines: int) -> None:
    while not kept.exists() or kept.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_killed_and_run_again_it_goes_on(tmp_path: Path, at_once: str) -> None:
    jobs, targets = many_jobs(tmp_path, 8)
    kept = tmp_path / "jobs.results.jsonl"
    for lines in (1, 4):
        with started(jobs, "--jobs", at_once) as process:
            wait_for(process, kept, lines)
            process.kill()
    done = {line["job"] for line in lines_of(kept)[: kept.read_bytes().count(b"\n")]}
    with started(jobs, "--jobs", at_once) as process:
        assert process.wait() == 0
    found = [line["job"] for line in lines_of(kept)]
    assert len(found) == len(set(found)) == 8
    assert done < set(found)
    for target in targets:
        assert [
            one.status for one in run_batch([VerifyJob(delta=f"{target}-delta", target=f"{target}")])
        ] == ["ok"]


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, at_once: str) -> None:
    jobs, _ = many_jobs(tmp_path, 40)
    kept = tmp_path / "jobs.results.jsonl"
    with started(jobs, "--jobs", at_once) as process:
        wait_for(process, kept, 2)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr
        assert process.stderr.read().endswith("Interrupted. Run the same command again to go on.\n")
    assert {line["status"] for line in lines_of(kept)} == {"ok"}


def many_jobs(folder: Path, count: int) -> tuple[Path, list[Path]]:
    old = weights((512, 512), 0)
    write_safetensors(folder / "base" / "model.safetensors", {"w": bf16(old)})
    targets = [folder / f"tuned-{k}" for k in range(count)]
    for k, target in enumerate(targets):
        new = old + weights(old.shape, 1 + k % 3, 1e-4 * (1 + k))
        write_safetensors(target / "model.safetensors", {"w": bf16(new)})
    return write_jobs(folder / "jobs.jsonl", diffs(targets, folder / "base")), targets


def test_results_in_a_store(s3: S3Server, tunes: list[Path], tmp_path: Path) -> None:
    """Base, target, delta and output may each be a URL."""
    for folder in (tmp_path / "base", tunes[0]):
        for path, data in contents(folder).items():
            s3.system.pipe_file(f"bucket/{folder.name}/{path}", data)
    url = "s3://bucket"
    made = [DiffJob(base=f"{url}/base", target=f"{url}/tuned-0", delta=f"{url}/delta")]
    assert [one.error for one in run_batch(made)] == [None]
    assert [one.error for one in run_batch(made)] == [None]  # as after a kill before the result was written
    used = [ApplyJob(delta=f"{url}/delta", base=f"{url}/base", out=f"{url}/out")]
    assert [one.error for one in run_batch(used)] == [None]
    rebuilt = s3.system.cat_file("bucket/out/model.safetensors")
    assert rebuilt == (tunes[0] / "model.safetensors").read_bytes()


# Copies of bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["one by one", "threads", "processes"])
def test_a_base_in_a_store_is_fetched_once(
    s3: S3Server, tunes: list[Path], tmp_path: Path, where: str
) -> None:
    for path, data in contents(tmp_path / "base").items():
        s3.system.pipe_file(f"bucket/base/{path}", data)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    jobs = write_jobs(tmp_path / "jobs.jsonl", diffs(tunes, "s3://bucket/base"))
    s3.log.clear()
    with ExitStack() as opened:
        options: Any = {"cache": tmp_path / "cache", "at_once": 3 if where == "threads" else 1}
        if where == "processes":
            options["executor"] = opened.enter_context(PoolExecutor(2))
        assert [one.error for one in run_batch(jobs, **options)] == [None] * 5
        assert s3.bytes_sent("model.safetensors") == size
        made = make_delta(tmp_path / "base", tunes[0], tmp_path / "one")
        assert made.to_json() == (tmp_path / "tuned-0-delta" / "deltaweights.json").read_bytes()
        later = [
            ApplyJob(delta=f"{one}-delta", base="s3://bucket/base", out=str(tmp_path / f"out-{one.name}"))
            for one in tunes
        ]
        assert [one.error for one in run_batch(later, **options)] == [None] * 5
    assert s3.bytes_sent("model.safetensors") == size
    assert contents(tmp_path / "out-tuned-3") == contents(tunes[3])


def test_a_base_that_changed_is_fetched_again(s3: S3Server, tunes: list[Path], tmp_path: Path) -> None:
    for k in range(2):
        data = (tunes[k] / "model.safetensors").read_bytes()
        s3.system.pipe_file("bucket/base/model.safetensors", data)
        (job,) = diffs(tunes[2:3], "s3://bucket/base", delta=str(tmp_path / f"delta-{k}"))
        (found,) = run_batch(write_jobs(tmp_path / "jobs", [job]), cache=tmp_path / "cache")
        assert found.status == "ok"
        make_delta(tunes[k], tunes[2], tmp_path / f"right-{k}")
        assert contents(tmp_path / f"delta-{k}") == contents(tmp_path / f"right-{k}")


@pytest.mark.parametrize("verb", ["diff", "apply", "verify"])
def test_a_damaged_copy_is_fetched_again(s3: S3Server, tunes: list[Path], tmp_path: Path, verb: str) -> None:
    for path, data in contents(tmp_path / "base").items():
        s3.system.pipe_file(f"bucket/base/{path}", data)
    make_delta(tmp_path / "base", tunes[0], tmp_path / "right")
    cache = tmp_path / "cache"
    list(run_batch(write_jobs(tmp_path / "jobs", diffs(tunes[:1], "s3://bucket/base")), cache=cache))
    copy = max(cache.iterdir(), key=lambda path: path.stat().st_size)
    damaged = bytearray(copy.read_bytes())
    damaged[-500:] = bytes(500)
    copy.write_bytes(damaged)
    places: dict[str, Any] = {
        "diff": DiffJob(base="s3://bucket/base", target=str(tunes[0]), delta=str(tmp_path / "delta")),
        "apply": ApplyJob(base="s3://bucket/base", delta=str(tmp_path / "right"), out=str(tmp_path / "out")),
        "verify": VerifyJob(base="s3://bucket/base", delta=str(tmp_path / "right")),
    }
    (found,) = run_batch([places[verb]], cache=cache)
    assert (found.status, found.error) == ("ok", None)
    assert not copy.exists()
    if verb == "diff":
        assert contents(tmp_path / "delta") == contents(tmp_path / "right")


def test_a_base_on_the_hub_is_fetched_once(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    """Also one that only the deltas name."""
    jobs = [ApplyJob(delta="org/delta", out=str(tmp_path / f"out-{k}")) for k in range(3)]
    assert [one.error for one in run_batch(jobs, cache=tmp_path / "cache")] == [None] * 3
    for k in range(3):
        assert contents(tmp_path / f"out-{k}") == contents(large.target)
    copies = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("lock")]
    assert sum(path.stat().st_size for path in copies) == sum(map(len, contents(large.base).values()))


class Far(LocalSource):
    """A folder that counts as far away."""

    @property
    def is_remote(self) -> bool:
        return True

    def full_path(self, path: str) -> None:  # type: ignore[override]
        return None


def test_the_copies_stay_within_their_bound(tmp_path: Path) -> None:
    """The oldest ones go, but none that is in use; what does not fit is read from where it is."""
    for k in range(4):
        (tmp_path / "far" / str(k)).mkdir(parents=True)
        (tmp_path / "far" / str(k) / "file").write_bytes(bytes([k]) * 1000)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{base_cache._PARTIAL}x").write_bytes(bytes(900))  # a killed run's
    cache = BaseCache(tmp_path / "cache", 2500)

    def copies() -> set[bytes]:
        return {path.read_bytes()[:1] for path in (tmp_path / "cache").glob("*-*") if "lock" not in path.name}

    opened = [cache.open(Far(tmp_path / "far" / str(k))) for k in range(4)]
    for k in (0, 1):
        assert opened[k].open("file").read(0, 9) == bytes([k]) * 9
    assert copies() == {b"\0", b"\1"}
    assert opened[2].open("file").read(0, 9) == b"\2" * 9
    assert copies() == {b"\0", b"\1"}
    opened[0].close()  # which lets go of the oldest one
    assert opened[3].open("file").read(0, 9) == b"\3" * 9
    assert copies() == {b"\1", b"\3"}
    for source in opened:
        source.close()
