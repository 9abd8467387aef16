"""The plan is what apply then does, byte for byte, and costs no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deltaweights import CheckpointError, DeltaError, apply_delta, make_delta, plan_apply
from deltaweights.cli.commands import app
from deltaweights.cli.rendering import duration, rate
from deltaweights.patch import sample_chunks
from deltaweights.payload import ChunkPlan
from deltaweights.storage.source import HEAD_BYTES

from .checkpoints import bf16, contents, weights, write_safetensors
from .conftest import Trio
from .hub_server import HubServer

pytestmark = pytest.mark.usefixtures("no_pauses")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def add_mirror(shelf: HubServer, large: Trio, folder: Path) -> None:
    """org/mirror has the base's tensors in four shards instead of three."""
    tensors = {f"layer.{k}": bf16(weights((300, 1000), k)) for k in range(9)}
    for k in range(4):
        shard = {name: tensors[name] for name in sorted(tensors)[k::4]}
        write_safetensors(folder / "mirror" / f"model-0000{k + 1}-of-00004.safetensors", shard)
    shutil.copy(large.base / "config.json", folder / "mirror")
    shelf.add_repo("org/mirror", contents(folder / "mirror"))


def download(repo: str, *patterns: str) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repo, allow_patterns=list(patterns) or None)


# It costs no weights, and is true -----------------------------------------------------------------------


def test_no_weights_are_downloaded(shelf: HubServer, large: Trio, made: Path, tmp_path: Path) -> None:
    """Of the base the first bytes of each shard, with the header; of the delta also the chunk records."""
    plan = plan_apply("org/delta", out=tmp_path / "out")
    assert plan.base_check == "published"
    assert plan.mismatch is None
    base = shelf.requests("org/base", kind="content")
    assert sorted(request.nbytes for request in base) == 3 * [HEAD_BYTES]
    delta = {request.file for request in shelf.requests("org/delta", kind="content")}
    assert delta == {"deltaweights.json", *(path.name for path in made.glob("*.safetensors"))}
    assert shelf.weight_bytes("org/delta") <= 2 * HEAD_BYTES + 9 * 600_000 // 1000
    assert not shelf.requests("org/target")
    assert not (tmp_path / "out").exists()
    assert not Path(shelf.env["HF_HUB_CACHE"]).exists()


@pytest.mark.parametrize(
    "case",
    [
        "streamed",
        "kept",
        "resharded",
        "resharded and kept",
        "no digests",
        "cached",
        "resumed",
        "no digests, resumed",
        "base on disk",
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_apply_downloads_what_the_plan_says(
    shelf: HubServer, large: Trio, tmp_path: Path, case: str, threads: int
) -> None:
    options: dict[str, Any] = {"keep_base": "kept" in case, "threads": threads}
    out = tmp_path / "out"
    if "resharded" in case:
        add_mirror(shelf, large, tmp_path)
        options["base"] = "org/mirror"
    if case == "base on disk":
        options["base"] = large.base
    if "no digests" in case:
        for repo in shelf.repos.values():
            repo.lfs_metadata = False
    if case == "cached":
        download("org/base", "model-00001*", "config.json")
        download("org/delta", "delta-00002*")
    if "resumed" in case:
        apply_delta("org/delta", out)
        (out / "model-00002-of-00002.safetensors").unlink()
        (out / "config.json").unlink()
    plan = plan_apply("org/delta", out=out, **options)
    assert plan.base
    shelf.log.clear()
    report = apply_delta("org/delta", out, **options)
    assert contents(out) == contents(large.target)
    assert plan.disk[0].needed == report.nbytes
    assert plan.delta.download == shelf.bytes_sent("org/delta")
    assert plan.base.download == shelf.bytes_sent("org/base") + shelf.bytes_sent("org/mirror")
    assert plan.download == plan.delta.download + plan.base.download
    checks = {"resharded": "headers", "no": "headers", "base": "sampled"}
    assert plan.base_check == checks.get(case.split(maxsplit=1)[0], "published")


def test_long_license_texts_are_counted_as_often_as_they_are_read(
    hub: HubServer, trio: Trio, tmp_path: Path
) -> None:
    """Once to compare, once to write: of files that are not large, the Hub publishes no SHA-256."""
    shutil.copytree(trio.base, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("An agreement.\n" * 10_000)
    hub.add_repo("org/base", contents(tmp_path / "base"))
    make_delta("org/base", trio.target, tmp_path / "delta")
    hub.add_repo("org/delta", contents(tmp_path / "delta"))
    plan = plan_apply("org/delta")
    assert plan.base
    hub.log.clear()
    apply_delta("org/delta", tmp_path / "out")
    assert plan.delta.download == hub.bytes_sent("org/delta")
    assert plan.base.download == hub.bytes_sent("org/base")


def test_a_file_that_was_cut_is_to_be_made_again(trio: Trio, tmp_path: Path) -> None:
    out = shutil.copytree(trio.target, tmp_path / "out")
    assert plan_apply(trio.delta, base=trio.base, out=out).disk[0].needed == 0
    size = (out / "model-00001-of-00003.safetensors").stat().st_size
    (out / "model-00001-of-00003.safetensors").write_bytes(b"cut")
    (out / "notes.txt").unlink()
    assert plan_apply(trio.delta, base=trio.base, out=out).disk[0].needed == size + len("ours\n")


def test_what_is_needed_does_not_depend_on_where_it_is(shelf: HubServer, large: Trio, made: Path) -> None:
    here, there = plan_apply(made, base=large.base), plan_apply("org/delta")
    assert here.base
    assert there.base
    assert (here.delta.needed, here.base.needed) == (there.delta.needed, there.base.needed)
    assert here.base.needed == 7 * 600_000 + 2  # of nine tensors; and config.json
    assert (here.download, here.base_check) == (0, "sampled")
    commit = shelf.repos["org/base"].branches["main"].id
    assert (there.base.where, there.base.repo_id, there.base.revision) == (
        f"org/base@{commit}",
        "org/base",
        commit,
    )
    assert (here.base.where, here.base.repo_id) == (str(large.base), None)


def test_what_is_kept_takes_space_in_the_cache(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    plan = plan_apply("org/delta", keep_base=True, out=tmp_path / "out")
    result, cache = plan.disk
    assert (cache.use, cache.folder) == ("cache", shelf.env["HF_HUB_CACHE"])
    assert cache.needed == sum(len(data) for data in contents(large.base).values())
    assert (result.use, result.folder) == ("result", str(tmp_path / "out"))
    download("org/base")
    assert len(plan_apply("org/delta", keep_base=True).disk) == 1


def test_where_space_is_short_it_says_so(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    plan = plan_apply(trio.delta, base=trio.base, out=tmp_path / "not" / "yet")
    assert (plan.disk[0].free, plan.disk[0].is_enough) == (1000, False)
    assert plan_apply(trio.delta, base=trio.base).disk[0].is_enough
    shown = run("plan", trio.delta, "--base", trio.base, "-o", tmp_path / "out").stdout
    assert ", 1 KB are free: TOO LITTLE\n" in shown


def test_transfers_are_bits_by_bandwidth(shelf: HubServer) -> None:
    plan = plan_apply("org/delta", bandwidth=[1e6, 8e6])
    assert [one.seconds for one in plan.transfers] == [plan.download / 125_000, plan.download / 1_000_000]


def test_memory_is_that_of_the_threads_and_of_what_runs_ahead(shelf: HubServer, made: Path) -> None:
    """benchmarks/memory.py holds it against what a process takes."""
    one, four = (plan_apply(made, threads=threads).memory for threads in (1, 4))
    assert 64 << 20 < one < four < plan_apply("org/delta", threads=4).memory < 768 << 20


# The base -----------------------------------------------------------------------------------------------


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_a_wrong_base_is_told_by_its_published_digests(shelf: HubServer) -> None:
    path = "model-00002-of-00003.safetensors"
    shelf.commit("org/base", {path: flip(shelf.files("org/base")[path], 900_000)})
    plan = plan_apply("org/delta", base="org/base@main")
    assert plan.mismatch
    assert f"Its file '{path}' has SHA-256" in plan.mismatch
    assert (plan.base_check, plan.download) == (None, 0)


@pytest.mark.parametrize(
    ("path", "data", "why"),
    [
        ("model-00001-of-00002.safetensors", None, "It has no tensor"),
        ("config.json", b"{}", "Its file 'config.json' has a different size"),
        ("config.json", b'{"model_type": "qwen3"}', "Its file 'config.json' differs"),
    ],
)
def test_a_wrong_base_on_disk_is_told_from_the_right_one(
    trio: Trio, tmp_path: Path, path: str, data: bytes | None, why: str
) -> None:
    shutil.copytree(trio.base, tmp_path / "base")
    if data is None:
        (tmp_path / "base" / path).unlink()
    else:
        (tmp_path / "base" / path).write_bytes(data)
    plan = plan_apply(trio.delta, base=tmp_path / "base")
    assert why in str(plan.mismatch)


def test_a_file_that_the_base_lacks_on_the_hub_is_found(shelf: HubServer) -> None:
    shelf.commit("org/base", {}, delete=["config.json"])
    assert "It lacks 'config.json'" in str(plan_apply("org/delta", base="org/base@main").mismatch)


def test_a_wrong_weight_on_disk_is_sampled(shelf: HubServer, large: Trio, made: Path, tmp_path: Path) -> None:
    shutil.copytree(large.base, tmp_path / "base")
    shard = tmp_path / "base" / "model-00001-of-00003.safetensors"
    shard.write_bytes(flip(shard.read_bytes(), 10_000))
    assert "1 differs: 'layer.0'" in str(plan_apply(made, base=tmp_path / "base").mismatch)


def test_what_keeps_apply_from_starting_is_an_error(shelf: HubServer, made: Path, tmp_path: Path) -> None:
    shelf.repos["org/base"].gated = "manual"
    with pytest.raises(CheckpointError, match="org/base is gated"):
        plan_apply("org/delta")
    shutil.copytree(made, tmp_path / "delta")
    (tmp_path / "delta" / "delta-00001-of-00002.safetensors").unlink()
    with pytest.raises(DeltaError, match="is not a whole delta"):
        plan_apply(tmp_path / "delta")


def test_a_delta_that_needs_no_base(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "base" / "a.safetensors", {"x": bf16(weights((9,), 1))})
    write_safetensors(tmp_path / "target" / "a.safetensors", {"y": bf16(weights((500, 3), 2))})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    plan = plan_apply(tmp_path / "delta")
    assert (plan.base, plan.base_check, plan.mismatch, plan.download) == (None, None, None, 0)


def test_of_the_base_only_what_chunks_need_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    """Whatever a thread does at once."""
    old = weights((2 << 20,), 1)
    new = old + weights(old.shape, 2, 1e-4)
    for start in range(0, len(old), 1 << 18):  # every other chunk
        new[start : start + (1 << 17)] = weights((1 << 17,), start, 0.5)
    for side, values in (("base", old), ("target", new)):
        write_safetensors(tmp_path / side / "model.safetensors", {"w": bf16(values)})
    hub.add_repo("org/base", contents(tmp_path / "base"))
    delta = tmp_path / "delta"
    make_delta(tmp_path / "base", tmp_path / "target", delta, base_repo="org/base", chunk_bytes=1 << 18)
    plan = plan_apply(delta)
    assert plan.base
    assert plan.base.needed == old.nbytes // 4
    before = hub.bytes_sent("org/base")
    apply_delta(delta, tmp_path / "out", threads=4)
    assert hub.bytes_sent("org/base") - before <= 1.05 * plan.base.download


# The command line ---------------------------------------------------------------------------------------


def test_plan_shows_it_all(shelf: HubServer) -> None:
    result = run("plan", "org/delta", "--bandwidth", "8M", "--bandwidth", "1.6k")
    assert result.exit_code == 0, result.output
    facts = {line[:14].strip(): line[14:] for line in result.stdout.splitlines()}
    commit = shelf.repos["org/base"].branches["main"].id
    assert facts["base"] == f"org/base@{commit}, 4.2 MB needed, 4.2 MB to download"
    assert facts["base check"] == "the SHA-256 that the Hub publishes are those of the right base"
    assert re.fullmatch(r"5\.\d+ MB: 6 s at 8 Mbit/s, 7 h \d+ min at 1\.6 kbit/s", facts["download"])
    assert facts["memory"].startswith("about ")
    assert facts["license"] == "not stated"
    assert facts["to accept"] == "nothing"


def test_dry_run_is_plan(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [trio.delta, "-o", out, "--base", trio.base, "--threads", 1]
    for more in ([], ["--json"], ["--quiet"]):
        dry, plan = run("apply", "--dry-run", *arguments, *more), run("plan", *arguments, *more)
        assert dry.exit_code == plan.exit_code == 0
        assert (dry.stdout == "") == ("--quiet" in more)
        said, planned = (re.sub(r'[\d.]+ \wB are free|"free": \d+', "", r.stdout) for r in (dry, plan))
        assert said == planned
    assert not out.exists()
    assert "--accept-license LicenseRef-scancode-qwen-2024" in run("plan", *arguments).stdout


def test_the_wrong_base_is_exit_code_1_and_the_rest_is_still_told(trio: Trio, tmp_path: Path) -> None:
    result = run("plan", trio.delta, "--base", trio.target)
    assert result.exit_code == 1
    assert "base check    it is the wrong one\n" in result.stdout
    assert f"error: {trio.target} is not the base that this delta was made from\n" in result.stderr
    assert "LicenseRef-scancode-qwen-2024" in result.stdout
    result = run("apply", "--dry-run", trio.delta, "-o", tmp_path / "out", "--base", trio.target, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["ok"], told["download"], told["base_check"]) == (False, 0, None)
    assert "is not the base" in told["mismatch"]
    assert told["license"]["to_accept"] == ["LicenseRef-scancode-qwen-2024"]


@pytest.mark.parametrize("bandwidth", ["0", "fast", "-1M", "1MB", "1e9", "", "1." + 99 * "0"])
def test_what_is_no_bandwidth_is_wrong_usage(trio: Trio, bandwidth: str) -> None:
    result = run("plan", trio.delta, "--base", trio.base, "--bandwidth", bandwidth)
    assert result.exit_code == 2
    assert "is not a number of bits" in result.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than 1 s"),
        (22.4, "22 s"),
        (99.9, "100 s"),
        (119, "2 min"),
        (3599, "1 h 0 min"),
        (13_800, "3 h 50 min"),
        (1e6, "277 h 47 min"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_are_for_people() -> None:
    assert [rate(bits) for bits in (1, 64_000, 1e8, 2.5e9, 1e13)] == [
        "1 bit/s",
        "64 kbit/s",
        "100 Mbit/s",
        "2.5 Gbit/s",
        "10 Tbit/s",
    ]


def test_of_many_tensors_the_last_chunk_is_sampled_unless_it_is_short() -> None:
    lengths = [4096 * 9 + 4, 4096 * 9 + 255, 4096 * 9 + 256, 4096 * 9, 4, 0] * 30
    recipes: list[Any] = [
        SimpleNamespace(plan=ChunkPlan(nbytes, nbytes, 4096), needs_base=lambda index: True)
        for nbytes in lengths
    ]
    found = {id(recipe): index for recipe, index in sample_chunks(_with_base(False), recipes)}
    assert len(found) == 150
    for recipe, nbytes in zip(recipes, lengths, strict=True):
        index, last = found.get(id(recipe)), recipe.plan.shared_count - 1
        if nbytes % 4096 in (0, 256) and nbytes:
            assert index == last
    short = [
        found[id(recipe)] for recipe, nbytes in zip(recipes, lengths, strict=True) if nbytes % 4096 == 255
    ]
    assert len(set(short)) > 3


def _with_base(is_remote: bool) -> Any:
    source = SimpleNamespace(is_remote=is_remote)
    return SimpleNamespace(base=SimpleNamespace(source=source), read_tables=list)


@pytest.mark.parametrize(
    ("tensors", "chunks", "sampled"), [(5, 1, 5), (40, 8, 16), (400, 8, 64), (20, 80, 32)]
)
def test_of_a_remote_base_a_fiftieth_of_the_chunks_is_sampled(
    tensors: int, chunks: int, sampled: int
) -> None:
    """What is sampled is fetched again when it is decoded."""
    nbytes = 4096 * chunks
    recipes: list[Any] = [
        SimpleNamespace(plan=ChunkPlan(nbytes, nbytes, 4096), needs_base=lambda index: True)
        for _ in range(tensors)
    ]
    found = sample_chunks(_with_base(True), recipes)
    assert len(found) == sampled
    assert len({id(recipe) for recipe, _ in found}) > min(tensors, sampled) // 3
    assert len(sample_chunks(_with_base(False), recipes)) >= max(tensors, min(128, tensors * chunks))
