"""The Hub in place of folders: the real client against a Hub on loopback, and all that goes wrong there."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    HubError,
    apply_delta,
    make_delta,
    open_target,
    verify_delta,
)
from deltaweights.checkpoint import Checkpoint, open_checkpoint
from deltaweights.cli.commands import app
from deltaweights.delta.chain import open_recipe
from deltaweights.delta.opening import read_manifest
from deltaweights.delta.target_recipe import TargetRecipe
from deltaweights.errors import HubReadError, HubWriteError
from deltaweights.license import rules
from deltaweights.patch import rebuild_shard
from deltaweights.storage import HubSource, hub_client, hub_upload, open_hub, open_source
from deltaweights.storage.hub_client import RemoteFile, Repository
from deltaweights.storage.hub_errors import http_error, may_pass
from deltaweights.workers import Meter, Workers

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import CHUNK_BYTES, Trio
from ..hub_server import HubServer

pytestmark = pytest.mark.usefixtures("no_pauses")


def needed_bytes(delta: Path, base: Path) -> int:
    """How many of the base's bytes it takes to decode the delta."""
    with open_recipe(delta, base) as target:
        spans = [
            recipe.base_spans(index)[0]
            for file in target.manifest.target.files
            if file.stored == "tensors"
            for recipe, index in target.shard(file.path).chunks()
            if recipe.needs_base(index)
        ]
    return sum(span.end - span.start for span in spans)


def cached_files(hub: HubServer) -> list[str]:
    """What lies in the local Hub cache."""
    snapshots = Path(hub.env["HF_HUB_CACHE"])
    return sorted(path.name for path in snapshots.rglob("snapshots/*/**/*") if path.is_file())


# Everything that takes a folder takes a Hub id ---------------------------------------------------------


@pytest.mark.parametrize(
    "where", [(b, t) for b in ("base", "org/base") for t in ("target", "hf://org/target@main")]
)
def test_diff_takes_base_and_target_from_anywhere(
    hub: HubServer, trio: Trio, tmp_path: Path, where: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trio.base.parent)
    commits = {
        name: hub.add_repo(f"org/{name}", contents(getattr(trio, name))) for name in ("base", "target")
    }
    manifest = make_delta(*where, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    base, target = (("org/" in place) for place in where)
    assert (manifest.base.repo_id, manifest.base.revision) == (
        ("org/base", commits["base"]) if base else (None, None)
    )
    assert (manifest.target.repo_id, manifest.target.revision) == (
        ("org/target", commits["target"]) if target else (None, None)
    )
    for path, data in contents(trio.delta).items():
        if path.endswith((".safetensors", ".zst")):
            assert (tmp_path / "delta" / path).read_bytes() == data
    assert {file.path: file.sha256 for file in manifest.base.files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in contents(trio.base).items()
    }


@pytest.mark.parametrize("delta", ["delta", "org/delta"])
@pytest.mark.parametrize("base", ["base", "org/base", None])
def test_apply_and_verify_take_delta_and_base_from_anywhere(
    shelf: HubServer, large: Trio, tmp_path: Path, delta: str, base: str | None, made: Path
) -> None:
    """Without a base, the one that the delta names, at the commit that it names."""
    shelf.commit("org/base", {"model-00001-of-00003.safetensors": b"later"})
    commit = next(iter(shelf.repos["org/base"].commits))
    place = {"base": large.base, "org/base": f"org/base@{commit}", None: None}[base]
    where = made if delta == "delta" else delta
    apply_delta(where, tmp_path / "out", base=place)
    assert contents(tmp_path / "out") == contents(large.target)
    if place:
        report = verify_delta(where, base=place, target=tmp_path / "out")
        assert report.ok
        assert report.published == (3 if delta == "org/delta" else 0)


def test_open_target_reads_one_tensor_from_the_hub(shelf: HubServer, large: Trio) -> None:
    with open_target("org/delta") as target, open_checkpoint(large.target) as whole:
        shelf.log.clear()
        data = target["layer.2"].data
        expected = np.empty(data.size, np.uint8)
        whole.named("layer.2")[0].read_into(0, expected)
        assert np.array_equal(data, expected)
    assert shelf.weight_bytes("org/base") == data.nbytes


def test_a_renamed_repository_is_followed_and_pinned_under_its_new_name(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    shelf.rename("org/base", "new-org/base-2")
    manifest = make_delta("org/base", large.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    assert manifest.base.repo_id == "new-org/base-2"
    apply_delta("org/delta", tmp_path / "out")  # its manifest has the old name
    assert contents(tmp_path / "out") == contents(large.target)


def test_a_commit_is_not_pinned_to_another_repository(shelf: HubServer, tmp_path: Path) -> None:
    manifest = make_delta(
        "org/base", "org/target", tmp_path / "delta", base_repo="org/mirror", target_repo="org/target"
    )
    assert (manifest.base.repo_id, manifest.base.revision) == ("org/mirror", None)
    assert manifest.target.revision == shelf.repos["org/target"].branches["main"].id


def test_tools_files_are_left_out_on_the_hub_too(hub: HubServer) -> None:
    hub.add_repo(
        "org/base", {"a.safetensors": b"", "x/.cache/y": b"1", ".gitattributes": b"2", "b.part": b"3"}
    )
    source = open_hub("org/base")
    assert list(source.sizes) == [".gitattributes", "a.safetensors"]
    assert source.left_out == ("b.part", "x/.cache/y")


# What is fetched --------------------------------------------------------------------------------------


def test_apply_fetches_what_it_needs_and_that_once(
    shelf: HubServer, large: Trio, tmp_path: Path, made: Path
) -> None:
    """The base is sharded otherwise than the target, and its tensors are in another order."""
    apply_delta("org/delta", tmp_path / "out", threads=2)
    assert contents(tmp_path / "out") == contents(large.target)
    needed = needed_bytes(made, large.base)
    assert needed == 7 * 600_000  # not the tensors that only the base has, or that were coded without it
    assert needed <= shelf.weight_bytes("org/base") <= 1.05 * needed
    payloads = sum(path.stat().st_size for path in (made).glob("*.safetensors"))
    assert shelf.weight_bytes("org/delta") <= 1.005 * payloads
    assert not cached_files(shelf)


def test_with_the_base_sharded_by_somebody_else_too(
    shelf: HubServer, large: Trio, tmp_path: Path, made: Path
) -> None:
    """The manifest's digests say nothing then: a sample of chunks is read before anything is written."""
    with open_checkpoint(large.base) as base:
        names = [tensor.info.name for tensor in base.tensors]
    tensors = {f"layer.{k}": bf16(weights((300, 1000), k)) for k in range(9)}
    for k in range(4):
        write_safetensors(
            tmp_path / "mirror" / f"model-0000{k + 1}-of-00004.safetensors",
            {name: tensors[name] for name in names[k::4]},
        )
    shutil.copy(large.base / "config.json", tmp_path / "mirror")
    shelf.add_repo("org/mirror", contents(tmp_path / "mirror"))
    phases: dict[str, int] = {}
    apply_delta(
        "org/delta",
        tmp_path / "out",
        base="org/mirror",
        progress=lambda phase, _, total: phases.update({phase: total}),
    )
    assert contents(tmp_path / "out") == contents(large.target)
    sampled = phases["check base"]
    assert 0 < shelf.weight_bytes("org/mirror") <= 1.05 * needed_bytes(made, large.base) + sampled


def test_diff_fetches_what_it_compares_and_what_it_hashes(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    """The base is sharded differently. What does not pass in the order of a shard is read once more, since a
    published SHA-256 says nothing of the bytes that came."""
    make_delta("org/base", "org/target", tmp_path / "delta", threads=2)
    compared = sum(600_000 for _ in range(8))  # all but layer.5
    whole = sum(path.stat().st_size for path in large.base.rglob("*.safetensors"))
    assert compared <= shelf.weight_bytes("org/base") <= compared + whole
    size = sum(path.stat().st_size for path in large.target.glob("*.safetensors"))
    assert size <= shelf.weight_bytes("org/target") <= 1.001 * size


def test_neighboring_tensors_share_requests(shelf: HubServer, tmp_path: Path) -> None:
    """The target is one run of bytes for each shard, shorter than the longest request: header, then rest.
    Before that, a few bytes of each tensor that might be a duplicate, by its dtype and shape."""
    make_delta("org/base", "org/target", tmp_path / "delta", threads=1)
    ranges = [
        r for r in shelf.requests("org/target", kind="content") if (r.file or "").endswith("safetensors")
    ]
    assert len([r for r in ranges if r.nbytes > 512]) == 4
    assert len(ranges) <= 4 + 8


def test_the_hub_is_asked_once_for_each_file(shelf: HubServer, tmp_path: Path) -> None:
    """It counts requests; further ones go to the signed link that the first was sent to."""
    with open_checkpoint("org/base") as base:
        shelf.log.clear()
        for tensor in base.tensors:
            tensor.read_into(100_000, np.empty(1000, np.uint8))
        assert len(shelf.requests("org/base", kind="content")) == 9
        assert not shelf.requests("org/base", kind="resolve")


def test_memory_for_what_is_fetched_ahead_is_bounded(
    shelf: HubServer, large: Trio, tmp_path: Path, made: Path
) -> None:
    """Bytes held, however many shards are at work; all are given back in the end."""
    delta = open_source(made)
    source = HubSource("org/base", window_bytes=400_000)
    with TargetRecipe(delta, read_manifest(delta), Checkpoint(source)) as target, Workers(2) as workers:
        files = [file for file in target.manifest.target.files if file.stored == "tensors"]
        digests = workers.each(
            lambda lane, file: rebuild_shard(target.shard(file.path), lane, Meter(None, "", 0)), files
        )
        assert digests == [file.sha256 for file in files]
    readers = workers.threads + len(files)  # each takes a tensor, which is shorter than what they do at once
    assert 200_000 < source.window.peak <= 400_000 + readers * 600_000
    assert source.window.held == 0


# Before any weights are read --------------------------------------------------------------------------


def test_a_wrong_base_is_refused_by_its_published_digests(shelf: HubServer, tmp_path: Path) -> None:
    """One bit differs, in the middle of one file."""
    data = bytearray(shelf.files("org/base")["model-00002-of-00003.safetensors"])
    data[len(data) // 2] ^= 1
    shelf.commit("org/base", {"model-00002-of-00003.safetensors": bytes(data)})
    with pytest.raises(BaseMismatchError, match=r"Its file 'model-00002-of-00003\.safetensors' has SHA-256"):
        apply_delta("org/delta", tmp_path / "out", base="org/base@main")
    assert not (tmp_path / "out").exists()
    assert shelf.weight_bytes("org/base") <= 3 << 16  # headers


def test_base_files_that_are_not_needed_may_differ(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    shelf.commit("org/base", {"README.md": b"changed", "extra.bin": bytes(2000)})
    apply_delta("org/delta", tmp_path / "out", base="org/base@main")
    assert contents(tmp_path / "out") == contents(large.target)


def test_a_base_whose_digests_agree_is_not_sampled(shelf: HubServer, tmp_path: Path) -> None:
    phases: dict[str, int] = {}
    apply_delta("org/delta", tmp_path / "out", progress=lambda phase, _, total: phases.update({phase: total}))
    assert phases["check base"] == 0


@pytest.mark.parametrize("is_wrong", [False, True])
def test_where_no_digests_are_published_chunks_are_sampled(
    shelf: HubServer, large: Trio, tmp_path: Path, is_wrong: bool
) -> None:
    shelf.repos["org/base"].lfs_metadata = False
    if is_wrong:
        tensors = {f"layer.{k}": bf16(weights((300, 1000), k + (k == 4))) for k in (3, 4, 5)}
        write_safetensors(tmp_path / "wrong.safetensors", tensors)
        shelf.commit(
            "org/base", {"model-00002-of-00003.safetensors": (tmp_path / "wrong.safetensors").read_bytes()}
        )
        with pytest.raises(BaseMismatchError, match=r"tensors sampled, 1 differs: 'layer\.4'"):
            apply_delta("org/delta", tmp_path / "out", base="org/base@main")
    else:
        apply_delta("org/delta", tmp_path / "out")
        assert contents(tmp_path / "out") == contents(large.target)


def test_a_delta_that_is_published_otherwise_than_its_manifest_says_is_refused(
    shelf: HubServer, tmp_path: Path
) -> None:
    path = "delta-00001-of-00002.safetensors"
    data = bytearray(shelf.files("org/delta")[path])
    data[-1] ^= 1
    shelf.commit("org/delta", {path: bytes(data)})
    with pytest.raises(DeltaError, match=f"'{path}' is published with a different SHA-256"):
        apply_delta("org/delta", tmp_path / "out")
    report = verify_delta("org/delta")
    assert [(problem.path, problem.kind) for problem in report.problems] == [(path, "different")]


# verify -----------------------------------------------------------------------------------------------


def test_verify_compares_published_digests_without_reading(shelf: HubServer) -> None:
    report = verify_delta("org/delta", target="org/target")
    assert report.ok
    assert report.published == 6  # of each side two shards and a file of more than a mebibyte or of that kind
    assert shelf.weight_bytes("org/target") == shelf.weight_bytes("org/delta") == 0


def test_verify_with_the_base_compares_what_the_targets_repository_publishes(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    commit = shelf.repos["org/target"].branches["main"].id
    before = contents(tmp_path)
    report = verify_delta("org/delta", base="org/base")
    assert report.ok
    assert report.target_repo == f"org/target@{commit[:12]}"
    assert contents(tmp_path) == before
    assert not cached_files(shelf)
    other = shelf.repos["org/target"]
    files = dict(other.commits[commit].files)
    files["model-00001-of-00002.safetensors"] = shelf.blob("x.safetensors", b"other")
    del files["config.json"]
    other.commits[commit] = type(other.commits[commit])(commit, files, "", "", None)
    report = verify_delta("org/delta", base="org/base")
    assert [(p.place, p.path, p.kind) for p in report.problems] == [
        ("published", "config.json", "missing"),
        ("published", "model-00001-of-00002.safetensors", "different"),
    ]
    del shelf.repos["org/target"]
    assert verify_delta("org/delta", base="org/base").target_repo is None


def test_verify_lists_what_a_target_on_the_hub_has_wrong(shelf: HubServer) -> None:
    shelf.commit("org/target", {"extra.txt": b"x", ".gitattributes": b"y"}, delete=["tokenizer.bin"])
    report = verify_delta("org/delta", target="org/target")
    assert [(p.path, p.kind) for p in report.problems] == [
        ("extra.txt", "extra"),
        ("tokenizer.bin", "missing"),
    ]


def test_verify_does_not_take_a_broken_network_for_a_broken_delta(
    shelf: HubServer, tmp_path: Path, made: Path
) -> None:
    shelf.fail("org/base", on="content", times=None, status=500)
    with pytest.raises(CheckpointError, match="It answers 500"):
        verify_delta(made, base="org/base")


# Faults that pass -------------------------------------------------------------------------------------


FAULTS: dict[str, dict[str, Any]] = {
    "cut": {"on": "content", "times": 25, "cut_after": 40_000},
    "cut at once": {"on": "content", "times": 5, "cut_after": 0},
    "500": {"on": "content", "times": 4, "status": 500},
    "503 of the Hub": {"on": "resolve", "times": 4, "status": 503},
    "503 of the list": {"on": "api", "times": 3, "status": 503},
    "429": {"on": "resolve", "times": 3, "status": 429, "retry_after": 0},
    "408": {"on": "content", "times": 3, "status": 408},
    "more announced than there is": {"on": "content", "times": 3, "cut_after": 10},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_apply_goes_on_after_faults(
    shelf: HubServer, large: Trio, tmp_path: Path, fault: str, made: Path
) -> None:
    shelf.fail(None, **FAULTS[fault])
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)
    # What had come before a connection broke is not fetched again.
    assert shelf.weight_bytes("org/base") <= 1.05 * needed_bytes(made, large.base)


@pytest.mark.parametrize("fault", ["cut", "500"])
def test_diff_goes_on_after_faults(shelf: HubServer, tmp_path: Path, fault: str, made: Path) -> None:
    shelf.fail(None, **FAULTS[fault])
    make_delta("org/base", "org/target", tmp_path / "again", chunk_bytes=CHUNK_BYTES)
    assert contents(tmp_path / "again") == contents(made)


def test_slow_answers_are_asked_for_again(
    shelf: HubServer, large: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    shelf.fail("org/base", on="content", times=2, delay=1)
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)


def test_signed_links_that_expire_are_asked_for_again(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    with open_target("org/delta") as target, open_checkpoint(large.target) as whole:
        for name in target:
            shelf.expire_links()
            expected = np.empty(target[name].data.size, np.uint8)
            whole.named(name)[0].read_into(0, expected)
            assert np.array_equal(target[name].data, expected)


def test_the_pause_that_a_server_asks_for_is_made(shelf: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    pause = hub_client._pause

    def record(*arguments: Any) -> float:
        pauses.append(pause(*arguments))
        return 0.0

    monkeypatch.setattr(hub_client, "_pause", record)
    shelf.fail("org/base", on="content", times=2, status=429, retry_after=17)
    shelf.fail("org/base", on="content", times=1, status=503, retry_after=3)
    with open_checkpoint("org/base"):
        pass
    assert sorted(pauses) == [3.0, 17.0, 17.0]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "-1"}, 0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=7;t=55'}, 0),
        ({"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "5"}, 5),
        ({"RateLimit": "nonsense"}, 0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], seconds: float) -> None:
    assert hub_client._asked_to_wait(headers) == seconds


@pytest.mark.parametrize("repo", ["org/base", "org/delta"])
def test_a_byte_that_goes_wrong_on_the_way_is_fetched_again(
    shelf: HubServer, large: Trio, tmp_path: Path, repo: str
) -> None:
    """In the base's weights, or in a payload: the chunk's checksum finds it."""
    file = "model-00001-of-00003.safetensors" if repo == "org/base" else "delta-00001-of-00002.safetensors"
    shelf.fail(repo, file, on="content", flip_byte=300_000)
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)


# Faults that stay -------------------------------------------------------------------------------------


STAYING: dict[str, tuple[dict[str, Any], str, bool]] = {
    "503": ({"status": 503}, "The Hub refuses to serve org/base\nIt answers 503 Service Unavailable.", True),
    "429": ({"status": 429, "retry_after": 0}, "The Hub asks for a pause", True),
    "429 for long": ({"status": 429, "retry_after": 4000}, "The Hub asks for a pause", True),
    "418": ({"status": 418}, "The Hub refuses to serve org/base\nIt answers 418", False),
    "403": (
        {"status": 403, "on": "resolve"},
        "The Hub refuses to serve org/base\nIt answers 403 Forbidden",
        False,
    ),
    "no answer": ({"drop": True}, "Cannot reach the Hub", True),
    "cut": ({"cut_after": 0}, "Cannot reach the Hub", True),
    "ranges ignored": ({"ignore_range": True}, "all of the file comes", False),
    "too much": ({"extra_length": 5}, "65541 are announced", False),
    "too little": ({"extra_length": -5}, "65531 are announced", False),
}


@pytest.mark.parametrize("fault", STAYING)
def test_a_fault_that_stays_is_a_clear_error(shelf: HubServer, tmp_path: Path, fault: str) -> None:
    what, message, retryable = STAYING[fault]
    shelf.fail("org/base", **{"on": "content", "times": None, **what})
    with pytest.raises(CheckpointError) as caught:
        apply_delta("org/delta", tmp_path / "out")
    assert message in str(caught.value)
    assert caught.value.fix
    assert isinstance(caught.value, HubError)
    assert caught.value.retryable == retryable
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [400, 402, 404, 409, 416, 451, 501, 511])
@pytest.mark.parametrize("on", ["api", "resolve", "content"])
def test_whatever_the_hub_answers_the_error_is_ours(hub: HubServer, status: int, on: Any) -> None:
    hub.add_repo("org/base", {"a.safetensors": bytes(100)})
    hub.fail("org/base", on=on, times=None, status=status)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/base")
    assert caught.value.why
    assert caught.value.fix


def test_bytes_that_are_wrong_each_time_are_never_taken(shelf: HubServer, tmp_path: Path) -> None:
    shelf.fail("org/base", "model-00001-of-00003.safetensors", on="content", times=None, flip_byte=300_000)
    with pytest.raises(CheckpointError, match=r"tensor 'layer\.0' arrived damaged twice"):
        apply_delta("org/delta", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-00001-*"))


def test_what_a_base_damaged_in_transit_led_to_is_not_gone_on_with(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    path = "model-00001-of-00003.safetensors"
    shelf.fail("org/base", path, on="content", times=None, flip_byte=300_000)
    with pytest.raises(CheckpointError, match="was damaged in transit"):
        make_delta("org/base", large.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    shelf._faults.clear()
    make_delta("org/base", large.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    apply_delta(tmp_path / "delta", tmp_path / "out", base=large.base)
    assert contents(tmp_path / "out") == contents(large.target)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.bin"])
def test_diff_finds_bytes_of_the_target_that_are_wrong(shelf: HubServer, tmp_path: Path, file: str) -> None:
    """Nothing else could: they would become part of the delta."""
    shelf.fail("org/target", file, on="content", times=None, flip_byte=150_000)
    with pytest.raises(CheckpointError, match="was damaged in transit"):
        make_delta("org/base", "org/target", tmp_path / "delta")
    assert not (tmp_path / "delta" / "deltaweights.json").exists()


def test_what_is_no_hub_is_said_to_be_none(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/base", {"config.json": b"{}"})
    monkeypatch.setattr(hub_client, "_whole_answer", lambda url: b'{"no such field": 1}')
    with pytest.raises(CheckpointError, match="does not answer as the Hub does"):
        open_hub("org/base")


# Who may read what ------------------------------------------------------------------------------------


class _Endless(BaseHTTPRequestHandler):
    """Answers without end: much, much when decompressed, or little by little; or an error of such a text."""

    form = ""

    def do_GET(self) -> None:
        self.send_response(404 if self.form == "error" else 200)
        self.send_header("Content-Type", "application/json")
        block = b" " * (1 if self.form == "slow" else 1 << 20)
        if self.form == "compressed":
            self.send_header("Content-Encoding", "gzip")
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(packer.compress(block) if self.form == "compressed" else block)
                time.sleep(0.1 if self.form == "slow" else 0)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("form", ["long", "compressed", "slow", "error"])
def test_a_listing_that_does_not_end_is_given_up(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(_Endless, "form", form)
    monkeypatch.setattr(hub_client, "_LISTING_SECONDS", 2 if form == "slow" else 25)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        start = time.monotonic()
        with pytest.raises(HubReadError, match="does not end"):
            hub_client.find_repository("org/base", None)
        assert time.monotonic() - start < 20
        server.shutdown()


class _Dripping(BaseHTTPRequestHandler):
    """Begins an answer, and sends a byte of it now and then: of its head, or of its body. Nothing but a clock
    of our own ends that."""

    part = ""

    def do_HEAD(self) -> None:
        start, end = map(int, self.headers.get("Range", "bytes=0-4999999")[6:].split("-"))
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in (
            ("X-Repo-Commit", "a" * 40),
            ("ETag", '"b"'),
            ("Content-Length", str(end - start + 1)),
            ("Content-Range", f"bytes {start}-{end}/5000000"),
        ):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.part == "body":
            self.do_HEAD()
        elif self.part == "head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        else:
            self.send_error(404)
        with suppress(OSError):
            while self.part:
                self.wfile.write(b"a")
                time.sleep(0.05)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dripping(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """A repository on a server that drips, and clocks that run fast."""
    for module, name in (
        (hub_client, "_HEAD_SECONDS"),
        (hub_client, "_STILL_SECONDS"),
        (hub_upload, "_MOST_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield Repository("org/base", "a" * 40, {"a.safetensors": RemoteFile(5_000_000, "b", None)})
        monkeypatch.setattr(_Dripping, "part", "")  # what was given up ends now, and disturbs no other test
        for thread in threading.enumerate():
            if thread.name == "deltaweights-hub":
                thread.join(30)
        server.shutdown()


@pytest.mark.parametrize("part", ["head", "body"])
def test_nothing_asked_of_the_hub_waits_for_ever(
    dripping: Repository, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(_Dripping, "part", part)
    for name in ("_LISTING_SECONDS", "_SLOW_SECONDS"):
        monkeypatch.setattr(hub_client, name, 0.5)
    with pytest.raises(HubReadError, match=r"An answer of .* does not end"):
        hub_client.find_repository("org/base", None)
    with pytest.raises(HubReadError, match=r"An answer of .* does not end"):
        b"".join(hub_client.Downloader(dripping).fetch("a.safetensors", 0, 5_000_000))
    with pytest.raises(HubReadError, match=r"The download of a\.safetensors from .* does not end"):
        hub_client.download(dripping, "a.safetensors")
    with pytest.raises(HubWriteError, match=r"A request to .* does not end"):
        hub_upload.find_branch("org/base", None, private=True)
    data = bytes(2 << 20)
    files = [hub_upload.Outgoing("a.bin", data, len(data), hashlib.sha256(data).hexdigest())]
    monkeypatch.setattr(hub_upload, "_LEAST_RATE", 1 << 30)
    branch = hub_upload.Branch(dripping, None, is_private=True)
    with pytest.raises(HubWriteError, match=r"A request to .* does not end"):
        hub_upload.upload(branch, files, [], message="", create_pr=False, sent=print)


def test_bytes_that_come_too_slowly_are_given_up(shelf: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_SLOW_SECONDS", 0)
    monkeypatch.setattr(hub_client, "_LEAST_RATE", 1)
    assert b"".join(hub_client._Pace().watch(iter([b"a", b"b"]))) == b"ab"
    monkeypatch.setattr(hub_client, "_SLOW_SECONDS", 0.2)
    monkeypatch.setattr(hub_client, "_LEAST_RATE", 1000)

    def dripping() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"a"

    with pytest.raises(HubReadError, match="does not end"):
        b"".join(hub_client._Pace().watch(dripping()))


def test_a_gated_repository_is_told_from_a_missing_one(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/gated", {"a.safetensors": bytes(10)}, gated="manual")
    for token in (None, hub.add_user("stranger")):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match="org/gated is gated") as caught:
            open_checkpoint("org/gated")
        assert not caught.value.retryable
        assert (
            caught.value.fix
            == f"Ask for access: {hub.endpoint}/org/gated and log in with that account: hf auth login"
        )


def test_a_private_or_missing_repository_cannot_be_found(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/private", {"a.safetensors": bytes(10)}, private=True)
    for token in (None, hub.add_user("stranger")):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        for name in ("org/private", "org/missing"):
            with pytest.raises(HubError, match=f"{name} cannot be found") as caught:
                open_checkpoint(f"hf://{name}")
            assert not caught.value.retryable
            assert "hf auth login" in caught.value.fix
            with pytest.raises(HubError, match=f"no file or folder {name}, and no such repository") as caught:
                open_checkpoint(name)
            assert not caught.value.retryable
            assert "hf auth login" in caught.value.fix


def test_who_has_access_reads_private_and_gated_repositories(
    hub: HubServer, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signed links get no token: the server refuses them with one."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("someone", orgs=["org"]))
    hub.add_repo("org/base", contents(trio.base), private=True)
    hub.add_repo("org/delta", contents(trio.delta), gated="auto")
    apply_delta("org/delta", tmp_path / "out", base="org/base")
    assert contents(tmp_path / "out") == contents(trio.target)


def test_a_token_that_is_not_valid(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/base", {"a.safetensors": bytes(10)})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept your token") as caught:
        open_checkpoint("org/base")
    assert not caught.value.retryable
    assert "hf auth login" in caught.value.fix


def test_a_revision_that_is_not_there(shelf: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="org/base has no revision v9"):
        open_checkpoint("org/base@v9")
    commit = shelf.repos["org/base"].commits.popitem()[0]
    shelf.repos["org/base"].branches.clear()
    with pytest.raises(CheckpointError, match=f"org/base has no revision {commit}") as caught:
        apply_delta("org/delta", tmp_path / "out")
    assert "a copy of the right one can be passed" in caught.value.fix


def test_a_hub_that_cannot_be_reached(hub: HubServer) -> None:
    hub.close()
    for location, what in (
        ("hf://org/base", "Cannot reach the Hub"),
        ("org/base", "There is no file or folder org/base, and the Hub cannot be reached"),
    ):
        with pytest.raises(HubError, match=what) as caught:
            open_checkpoint(location)
        assert caught.value.retryable
        assert hub.endpoint in caught.value.why


# The cache --------------------------------------------------------------------------------------------


def download(repo: str, *files: str) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repo, allow_patterns=list(files) or None)


def test_what_is_in_the_cache_is_read_from_there(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    download("org/base", "config.json", "model-00001*", "model-00003*")
    shelf.log.clear()
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)
    sent = {r.file for r in shelf.requests("org/base", kind="content")}
    assert sent == {"model-00002-of-00003.safetensors"}


def test_a_file_that_is_not_whole_in_the_cache_is_not_read_from_there(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    download("org/base")
    blob = next(Path(shelf.env["HF_HUB_CACHE"]).glob("**/model-00001*")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)


@pytest.mark.parametrize("how", ["offline", "unreachable", "private", "gone"])
def test_without_the_hub_the_cache_serves(
    shelf: HubServer, large: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    download("org/base")
    download("org/delta")
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        shelf.close()
    elif how == "private":
        for repo in shelf.repos.values():
            repo.private = True
    else:
        shelf.repos.clear()
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)


def test_offline_with_a_part_of_the_base_in_the_cache(
    shelf: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    download("org/base", "model-00001*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseMismatchError, match="it has no tensor"):
        apply_delta(made, tmp_path / "out")
    with pytest.raises(CheckpointError, match="org/target is not here") as caught:
        open_checkpoint("hf://org/target")
    assert "hf download org/target" in caught.value.fix


def test_keep_base_downloads_what_is_needed_into_the_ordinary_cache(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    shelf.commit("org/base", {"pytorch_model.bin": bytes(5000)})
    phases: list[tuple[str, int, int]] = []
    apply_delta(
        "org/delta",
        tmp_path / "out",
        base="org/base",
        keep_base=True,
        progress=lambda *report: phases.append(report),
    )
    assert contents(tmp_path / "out") == contents(large.target)
    assert cached_files(shelf) == [
        "config.json",
        *sorted(path.name for path in large.base.glob("*.safetensors")),
    ]
    total = sum(path.stat().st_size for path in large.base.iterdir())
    assert [report for report in phases if report[0] == "download base"][-1] == (
        "download base",
        total,
        total,
    )
    shelf.log.clear()
    assert verify_delta("org/delta", base="org/base", keep_base=True).ok
    assert not shelf.requests("org/base", kind="content")


def test_keep_base_asks_for_space_first(
    shelf: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="disk of the local Hub cache is too small") as caught:
        apply_delta("org/delta", tmp_path / "out", keep_base=True)
    assert "1,000 are free" in caught.value.why
    assert not cached_files(shelf)


def test_a_cache_that_fills_up_meanwhile_is_our_error(
    shelf: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(CheckpointError, match="disk of the local Hub cache is too small"):
        apply_delta("org/delta", tmp_path / "out", keep_base=True)


def test_a_wrong_base_is_found_before_it_is_downloaded(shelf: HubServer, tmp_path: Path) -> None:
    shelf.commit("org/base", {"model-00003-of-00003.safetensors": b"\x02\0\0\0\0\0\0\0{}"})
    with pytest.raises(BaseMismatchError):
        apply_delta("org/delta", tmp_path / "out", base="org/base", keep_base=True)
    assert not cached_files(shelf)


@pytest.mark.parametrize("how", ["offline", "by its folder"])
def test_the_names_in_the_cache_tell_another_version_of_the_base(
    shelf: HubServer, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It differs in one bit, in a tensor of which nothing is sampled: only the SHA-256 shows it."""
    path = "model-00002-of-00003.safetensors"
    data = bytearray(shelf.files("org/base")[path])
    data[-100_000] ^= 1
    shelf.commit("org/base", {path: bytes(data)})
    download("org/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = next(Path(shelf.env["HF_HUB_CACHE"]).glob("models--org--base/snapshots/*"))
    base = "org/base@main" if how == "offline" else str(snapshot)
    with pytest.raises(BaseMismatchError, match=f"Its file '{path}' has SHA-256 "):
        apply_delta(made, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_right_name_in_the_cache_proves_nothing(
    shelf: HubServer, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes may have gone wrong since: chunks are sampled all the same."""
    download("org/base")
    path = next(Path(shelf.env["HF_HUB_CACHE"]).glob("**/model-00001*")).resolve()
    data = bytearray(path.read_bytes())
    data[10_000] ^= 1
    path.write_bytes(bytes(data))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseMismatchError, match="tensors sampled, 1 differ"):
        apply_delta(made, tmp_path / "out", base="org/base")


# Interrupted ------------------------------------------------------------------------------------------


def test_apply_goes_on_with_the_shard_that_failed(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    path = "delta-00002-of-00002.safetensors"
    shelf.fail("org/delta", path, on="content", times=None, status=500)
    with pytest.raises(CheckpointError):
        apply_delta("org/delta", tmp_path / "out", threads=1)
    shelf.heal()
    shelf.log.clear()
    report = apply_delta("org/delta", tmp_path / "out", threads=1)
    assert report.kept == ("model-00001-of-00002.safetensors",)
    assert contents(tmp_path / "out") == contents(large.target)
    assert not shelf.requests("org/delta", "delta-00001-of-00002.safetensors")


def test_diff_goes_on_with_the_shard_that_failed(shelf: HubServer, tmp_path: Path, made: Path) -> None:
    path = "model-00002-of-00002.safetensors"
    shelf.fail("org/target", path, on="content", times=None, flip_byte=300_000)
    with pytest.raises(CheckpointError):
        make_delta("org/base", "org/target", tmp_path / "again", chunk_bytes=CHUNK_BYTES, threads=1)
    shelf.heal()
    shelf.log.clear()
    make_delta("org/base", "org/target", tmp_path / "again", chunk_bytes=CHUNK_BYTES, threads=1)
    assert contents(tmp_path / "again") == contents(made)
    seen = shelf.bytes_sent("org/target", "model-00001-of-00002.safetensors")
    assert seen <= (1 << 16) + 4 * 512  # its header, and what might tell duplicates


@pytest.fixture
def stalled(shelf: HubServer, large: Trio, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts `apply`, which then waits for a base that never comes."""
    verify_delta(large.delta, base=large.base)  # else it may compile kernels meanwhile, which takes seconds
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        shelf.fail(
            "org/base",
            "model-00003-of-00003.safetensors",
            on="content",
            times=None,
            cut_after=70_000,
            delay=60,
        )
        arguments = ["apply", "org/delta", "-o", str(tmp_path / "out"), "--quiet"]
        process = subprocess.Popen(
            [sys.executable, "-m", "deltaweights", *arguments],
            env=shelf.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        waiting = threading.Event()
        while not any(
            r.file == "model-00003-of-00003.safetensors" and r.nbytes == 70_000 for r in list(shelf.log)
        ):
            assert process.poll() is None, process.communicate()
            waiting.wait(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_all_that_waits_for_the_network_at_once(
    stalled: Callable[[], subprocess.Popen[str]],
) -> None:
    """The server would go on to send in a minute, and the client wait for ten seconds and try again."""
    process = stalled()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=8)
    assert process.returncode == 130
    assert errors == "Interrupted. Run the same command again to go on.\n"


def test_apply_killed_while_it_streams_goes_on(
    shelf: HubServer, large: Trio, tmp_path: Path, stalled: Callable[[], subprocess.Popen[str]]
) -> None:
    process = stalled()
    process.kill()
    process.wait()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    shelf.heal()
    apply_delta("org/delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(large.target)


def test_an_error_ends_the_other_shards_at_once(shelf: HubServer) -> None:
    """One shard's payloads cannot be had while another waits for its base: the error is not held up."""
    raised: list[BaseException] = []

    def rebuild(target: TargetRecipe, workers: Workers) -> None:
        shards = [
            target.shard(file.path) for file in target.manifest.target.files if file.stored == "tensors"
        ]
        shelf.fail("org/base", on="content", times=None, cut_after=1000, delay=60)
        shelf.fail("org/delta", shards[1].file.source, on="content", times=None, status=418)
        try:
            workers.each(lambda lane, shard: rebuild_shard(shard, lane, Meter(None, "", 0)), shards)
        except CheckpointError as error:
            raised.append(error)

    with open_recipe("org/delta") as target, Workers(2) as workers:
        workers.at_stop(target.cancel)
        thread = threading.Thread(target=rebuild, args=(target, workers), daemon=True)
        thread.start()
        thread.join(8)
    assert "It answers 418" in str(raised[0])


# The command line -------------------------------------------------------------------------------------


def test_the_commands_take_hub_ids(shelf: HubServer, large: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["apply", "org/delta", "-o", str(out), "--keep-base", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kept"] == []
    assert contents(out) == contents(large.target)
    done = CliRunner().invoke(app, ["verify", "org/delta", "--base", "org/base", "--target", str(out)])
    assert done.exit_code == 0, done.output
    assert "3 of them by the SHA-256 that the Hub publishes" in done.stdout
    done = CliRunner().invoke(app, ["inspect", "org/delta", "--json"])
    assert json.loads(done.stdout)["base"]["repo_id"] == "org/base"
    done = CliRunner().invoke(app, ["apply", "org/missing", "-o", str(out)])
    assert done.exit_code == 1
    assert "no file or folder org/missing, and no such repository on the Hub" in done.stderr


def test_the_environment_counts_in_a_process_of_its_own(
    shelf: HubServer, large: Trio, tmp_path: Path
) -> None:
    """`HF_ENDPOINT` and the cache's place come from there; with `HF_HUB_OFFLINE` nothing is asked."""

    def apply(name: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deltaweights", "apply", "org/delta", "-o", str(tmp_path / name)]
        env = {**shelf.env, **env}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    done = apply("never", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "error: There is no file or folder org/delta, and the Hub is not asked\n" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not shelf.log
    done = apply("online")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "online") == contents(large.target)
    assert shelf.weight_bytes("org/base")
    download("org/base")
    download("org/delta")
    shelf.log.clear()
    done = apply("offline", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "offline") == contents(large.target)
    assert not shelf.log


# Licenses ---------------------------------------------------------------------------------------------


@pytest.fixture
def licensed(hub: HubServer, trio: Trio, tmp_path: Path) -> HubServer:
    """The Hub with org/base, whose license is not an open one until it is said to be MIT; and org/delta."""
    texts = {"Notice": b"the notice\n", "USE_POLICY.md": b"the policy\n"}
    commit = hub.add_repo("org/base", contents(trio.base) | texts)
    hub.commit("org/base", {"README.md": b"---\nlicense: mit\n---\n"}, delete=["LICENSE", *texts])
    make_delta(f"org/base@{commit}", trio.target, tmp_path / "delta")
    hub.add_repo("org/delta", contents(tmp_path / "delta"))
    hub.log.clear()
    return hub


def test_licenses_are_read_at_the_pinned_commit(licensed: HubServer, trio: Trio, tmp_path: Path) -> None:
    manifest = read_manifest(open_source(tmp_path / "delta"))
    license = manifest.base.license
    assert (license.id, license.name, license.link) == ("other", "qwen", "LICENSE")
    texts = {
        file.path.partition("-")[2]: (tmp_path / "delta" / file.path).read_bytes() for file in license.files
    }
    assert texts == {
        "LICENSE": (trio.base / "LICENSE").read_bytes(),
        "Notice": b"the notice\n",
        "USE_POLICY.md": b"the policy\n",
    }
    assert manifest.base.revision == next(iter(licensed.repos["org/base"].commits))


def test_without_acceptance_no_more_than_manifest_and_license_texts_are_downloaded(
    licensed: HubServer, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["apply", "org/delta", "-o", str(tmp_path / "out")])
    assert done.exit_code == 3, done.output
    read = {request.file for request in licensed.requests(kind="content")}
    assert all(path in ("deltaweights.json", "NOTICE") or str(path).startswith("licenses/") for path in read)
    assert not licensed.requests("org/base")
    assert not cached_files(licensed)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(
        app, ["apply", "org/delta", "-o", str(tmp_path / "out"), "--accept-license", "qwen"]
    )
    assert done.exit_code == 0, done.output
    kept = {path.name.partition("-")[2] for path in (tmp_path / "out/.deltaweights/licenses").iterdir()}
    assert kept >= {"LICENSE", "Notice", "USE_POLICY.md"}


def test_license_and_bom_read_no_weights(licensed: HubServer) -> None:
    for arguments in (["license", "org/delta", "--texts"], ["bom", "org/delta"]):
        licensed.log.clear()
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "the policy" in done.stdout
        assert licensed.weight_bytes("org/delta") == 0
        assert not licensed.requests("org/base")


def test_the_delta_whose_license_was_settled_is_the_one_that_is_applied(
    shelf: HubServer, large: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its publisher commits another one, under another license, in between."""
    terms = {"base_license": "llama3.1", "target_license": "llama3.1"}
    make_delta("org/base", "org/target", tmp_path / "closed", **terms)  # type: ignore[arg-type]
    settle = rules.unaccepted

    def settle_and_move(*arguments: Any) -> Any:
        found = settle(*arguments)
        shelf.commit("org/delta", contents(tmp_path / "closed"))
        return found

    command = ["apply", "org/delta", "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(rules, "unaccepted", settle_and_move)
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    landed = tmp_path / "out" / ".deltaweights" / "licenses" / "NOTICE"
    assert not landed.exists() or b"Llama" not in landed.read_bytes()
    assert contents(tmp_path / "out") == contents(large.target)
    assert len(shelf.requests("org/delta", kind="api")) == 1
    shutil.rmtree(tmp_path / "out")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3
    assert "llama3.1" in done.output


@pytest.mark.parametrize("name", ["TooManyRedirects", "UnsupportedProtocol"])
def test_redirects_that_lead_nowhere_are_not_followed_again(name: str) -> None:
    """A circle, or a file:// address: asking again for a minute changes nothing."""
    client = importlib.import_module(http_error().__module__.partition(".")[0])
    error = vars(client)[name]("nowhere")
    assert isinstance(error, http_error())
    assert not may_pass(error)
    assert may_pass(vars(client)["ConnectError"]("down"))
