"""A delta to the Hub and what may go wrong: the real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import zstandard
from huggingface_hub import ModelCard
from typer.testing import CliRunner, Result

from deltaweights import (
    CheckpointError,
    DeltaError,
    HubError,
    OutputError,
    PushReport,
    apply_delta,
    make_delta,
    push_delta,
    verify_delta,
)
from deltaweights.card import address_card
from deltaweights.checkpoint import TensorInfo, open_checkpoint
from deltaweights.cli.commands import app
from deltaweights.manifest import FileRecord, Manifest
from deltaweights.words import size as size_text

from .checkpoints import Array, bf16, contents, weights, write_safetensors
from .conftest import Trio
from .hub_server import HubServer
from .s3_server import S3Server

pytestmark = pytest.mark.usefixtures("no_pauses", "no_waiting")

REPO = "org/delta"
SHARDS = [f"delta-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]


class Release(NamedTuple):
    """A delta whose three shards are sent one by one, and a later one with a single small shard."""

    base: Path
    target: Path
    delta: Path
    later: Path


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("release")
    base, target, small = folder / "base", folder / "target", folder / "small"
    write_safetensors(base / "model.safetensors", {"layer": bf16(weights((300, 100), 1))})
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "LICENSE").write_text("MIT License\n\nPermission is granted.\n")
    for k in range(3):
        path = target / f"model-0000{k + 1}-of-00003.safetensors"
        data = np.random.default_rng(k).bytes(1_200_000)
        write_safetensors(path, {f"new.{k}": Array("U8", (len(data),), data)})
    (target / "config.json").write_text("{}")
    (target / "tokenizer.json").write_text("[1, 2, 3]")
    write_safetensors(small / "model.safetensors", {"layer": bf16(weights((300, 100), 2))})
    (small / "config.json").write_text('{"later": true}')
    for side, delta in ((target, "delta"), (small, "later")):
        make_delta(base, side, folder / delta, base_repo="org/base", target_license="mit")
    return Release(base, target, folder / "delta", folder / "later")


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, on which we may write to org."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("writer", orgs=["org"]))
    return hub


def published(hub: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """What a revision holds, but for the file that the Hub makes itself."""
    return {path: data for path, data in hub.files(repo, revision).items() if path != ".gitattributes"}


def as_published(delta: Path, place: str = REPO) -> dict[str, bytes]:
    """The files of a delta, the page as it is at ``place`` on the Hub."""
    files = contents(delta)
    return files | {"README.md": address_card(files["README.md"], place)}


def titles(hub: HubServer, repo: str = REPO, branch: str = "main") -> list[str]:
    """Its commits, the newest first."""
    return [commit.title for commit in hub.repos[repo].branches[branch].history()]


def count_uploads(hub: HubServer) -> int:
    """Large files of which some bytes were sent and taken."""
    return len([request for request in hub.requests(kind="upload") if request.status == 200])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


# What is published ----------------------------------------------------------------------------------------


def test_a_new_repository_is_private_and_gets_all_in_one_commit(
    writer: HubServer, release: Release, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    phases: dict[str, tuple[int, int]] = {}
    report = push_delta(
        release.delta, REPO, progress=lambda phase, done, total: phases.update({phase: (done, total)})
    )
    files = as_published(release.delta)
    assert published(writer) == files
    assert "README.md" in files
    assert writer.repos[REPO].private
    assert titles(writer) == ["What the target adds to org/base", "initial commit"]
    nbytes = sum(map(len, files.values()))
    commit = writer.repos[REPO].branches["main"].id
    url = f"{writer.endpoint}/{REPO}"
    assert report == PushReport(REPO, commit, url, True, report.uploaded, (), nbytes, ())
    assert sorted(report.uploaded) == sorted(files)
    assert phases["upload"] == (nbytes, nbytes)
    assert phases["verify delta"][0] == phases["verify delta"][1] > 0
    assert capfd.readouterr() == ("", "")


def test_the_page_s_commands_work_as_they_stand(
    writer: HubServer, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add_repo("org/base", contents(release.base))
    push_delta(release.delta, REPO)
    page = published(writer)["README.md"].decode()
    (shell,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert shell == f"deltaweights apply {REPO} -o OUT\n"
    result = CliRunner().invoke(app, shlex.split(shell)[1:])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "OUT") == contents(release.target)
    shutil.rmtree(tmp_path / "OUT")
    exec(python, {})  # noqa: S102
    assert contents(tmp_path / "OUT") == contents(release.target)


def test_the_hub_takes_the_page_of_any_fine_tune(writer: HubServer, release: Release, tmp_path: Path) -> None:
    """Metadata that it would refuse are left out, not sent."""
    target = shutil.copytree(release.target, tmp_path / "target")
    (target / "README.md").write_text(
        "---\nlanguage: no\nlanguage: en\nx: !!python/name:os.system ''\nbase_model: ./base\nmodel-index: 5\n"
        "self: a\n1: b\ndate: 2024-13-45\npipeline_tag: fill-mask\n---\n# Mine\n\n---\nlicense: none\n---\n"
    )
    make_delta(release.base, target, tmp_path / "delta", base_repo="org/base", target_license="mit")
    push_delta(tmp_path / "delta", REPO)
    page = ModelCard(published(writer)["README.md"].decode())
    fields: dict[str, Any] = page.data.to_dict()  # type: ignore[no-untyped-call]
    assert (fields["pipeline_tag"], fields["base_model"], fields["license"]) == (
        "fill-mask",
        "org/base",
        "mit",
    )
    assert page.text.lstrip().startswith("# Mine\n")


def test_a_delta_that_was_on_the_hub_gets_its_new_place(
    writer: HubServer, release: Release, tmp_path: Path
) -> None:
    push_delta(release.delta, REPO)
    for path, data in published(writer).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    push_delta(tmp_path, "org/copy")
    assert published(writer, "org/copy") == as_published(release.delta, "org/copy")


def test_what_was_pushed_gives_the_target_back(writer: HubServer, release: Release, tmp_path: Path) -> None:
    writer.add_repo("org/base", contents(release.base))
    push_delta(release.delta, REPO)
    assert verify_delta(REPO, base="org/base").ok
    apply_delta(REPO, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(release.target)


def test_a_delta_in_a_store_is_published_as_from_a_folder(
    writer: HubServer, release: Release, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays on the disk; what is damaged is refused by the store's name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    s3.system.put(str(release.delta), "bucket/delta", recursive=True)
    s3.system.pipe_file("bucket/delta/notes.txt", b"no part of it")
    push_delta("s3://bucket/delta", REPO)
    assert published(writer) == as_published(release.delta)
    assert not list(tmp_path.iterdir())
    data = bytearray((release.delta / SHARDS[0]).read_bytes())
    data[-1] ^= 1
    s3.system.pipe_file(f"bucket/delta/{SHARDS[0]}", bytes(data))
    with pytest.raises(DeltaError, match="s3://bucket/delta is not a whole delta"):
        push_delta("s3://bucket/delta", "org/other")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_part_of_the_delta_stay_here(
    writer: HubServer, release: Release, tmp_path: Path
) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")
    (delta / "password.txt").write_text("secret")
    push_delta(delta, REPO)
    assert published(writer) == as_published(release.delta)


def test_public_only_if_asked_for(writer: HubServer, release: Release) -> None:
    report = push_delta(release.delta, REPO, private=False)
    assert not report.private
    assert not writer.repos[REPO].private


def test_a_public_repository_is_refused_unless_asked_for(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {"README.md": b"mine"})
    with pytest.raises(OutputError, match=f"{REPO} is public") as caught:
        push_delta(release.delta, REPO)
    assert "private=False" in caught.value.fix
    assert published(writer) == {"README.md": b"mine"}
    assert not writer.requests(kind="upload")
    push_delta(release.delta, REPO, private=False)
    assert published(writer) == as_published(release.delta)


def test_a_private_repository_stays_private(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {"README.md": b"mine"}, private=True)
    report = push_delta(release.delta, REPO, private=False)
    assert report.private
    assert writer.repos[REPO].private
    assert published(writer) == as_published(release.delta)


def test_a_renamed_repository_is_followed(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {}, private=True)
    writer.rename(REPO, "org/new-name")
    assert push_delta(release.delta, REPO).repo_id == "org/new-name"
    assert published(writer, "org/new-name") == as_published(release.delta, "org/new-name")


def test_a_branch_is_made_and_the_main_one_left_alone(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {"README.md": b"mine"}, private=True)
    report = push_delta(release.delta, REPO, revision="v2", message="The second")
    assert report.url == f"{writer.endpoint}/{REPO}/tree/v2"
    assert published(writer, revision="v2") == as_published(release.delta, f"{REPO}@v2")
    assert published(writer) == {"README.md": b"mine"}
    assert titles(writer, branch="v2") == ["The second", "initial commit"]
    again = push_delta(release.delta, REPO, revision="v2")
    assert (again.commit, again.uploaded) == (report.commit, ())


def test_a_pull_request_changes_nothing_yet(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {"README.md": b"mine"}, private=True)
    report = push_delta(release.delta, REPO, create_pr=True)
    assert report.url == f"{writer.endpoint}/{REPO}/discussions/1"
    assert published(writer) == {"README.md": b"mine"}
    assert published(writer, revision="refs/pr/1") == as_published(release.delta)
    assert report.commit == writer.repos[REPO].branches["refs/pr/1"].id


# Again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lfs_metadata", [True, False])
def test_nothing_is_sent_twice(writer: HubServer, release: Release, lfs_metadata: bool) -> None:
    """Also where the Hub does not say what a large file's SHA-256 is: git's id of its pointer tells."""
    first = push_delta(release.delta, REPO)
    writer.repos[REPO].lfs_metadata = lfs_metadata
    writer.log.clear()
    second = push_delta(release.delta, REPO)
    assert (second.commit, second.uploaded, second.nbytes) == (first.commit, (), 0)
    assert not writer.requests(kind="upload")
    assert len(titles(writer)) == 2


def test_only_what_is_missing_is_sent(writer: HubServer, release: Release) -> None:
    push_delta(release.delta, REPO)
    writer.commit(REPO, {"NOTICE": b"broken"}, delete=[SHARDS[1], "README.md"])
    writer.log.clear()
    report = push_delta(release.delta, REPO)
    assert sorted(report.uploaded) == ["NOTICE", "README.md", SHARDS[1]]
    assert published(writer) == as_published(release.delta)
    assert not count_uploads(writer)  # the Hub still had its bytes


def test_an_interrupted_upload_goes_on(writer: HubServer, release: Release) -> None:
    """The second large file fails: nobody sees the first, and it is not sent again."""
    writer.fail(REPO, on="upload", status=403, times=None, skip=1)
    with pytest.raises(OutputError):
        push_delta(release.delta, REPO)
    assert titles(writer) == ["initial commit"]
    assert published(writer) == {}
    assert count_uploads(writer) == 1
    writer.heal()
    writer.log.clear()
    push_delta(release.delta, REPO)
    assert count_uploads(writer) == 2
    assert published(writer) == as_published(release.delta)
    assert len(titles(writer)) == 2


def test_what_an_earlier_delta_leaves_over_is_removed(writer: HubServer, release: Release) -> None:
    push_delta(release.delta, REPO)
    writer.commit(REPO, {"results.md": b"by hand", "delta-00009-of-00009.safetensors": b"by hand too"})
    report = push_delta(release.later, REPO)
    gone = set(contents(release.delta)) - set(contents(release.later))
    assert {*SHARDS, "files/tokenizer.json"} <= gone
    assert report.removed == tuple(sorted(gone))
    by_hand = {"results.md": b"by hand", "delta-00009-of-00009.safetensors": b"by hand too"}
    assert published(writer) == as_published(release.later) | by_hand
    assert len(titles(writer)) == 4  # the first, two pushes, and what was done by hand


@pytest.mark.parametrize(
    "manifest", [b"", b"{}", b'{"format": "deltaweights", "format_version": 99}', b"\xff"]
)
def test_a_manifest_that_nobody_can_read_removes_nothing(
    writer: HubServer, release: Release, manifest: bytes
) -> None:
    old = {"deltaweights.json": manifest, SHARDS[2]: b"old", "notes.txt": b"mine"}
    writer.add_repo(REPO, old, private=True)
    report = push_delta(release.later, REPO)
    assert report.removed == ()
    assert published(writer) == old | as_published(release.later)


def test_a_killed_push_goes_on(writer: HubServer, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second file is on its way."""
    writer.fail(REPO, on="upload", times=None, skip=1, delay=60)
    env = writer.env | {"HF_TOKEN": "hf_writer"}
    command = [sys.executable, "-m", "deltaweights", "push", str(release.delta), REPO, "-q"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        waiting = threading.Event()
        while len(writer.requests(kind="upload")) < 2:
            assert process.poll() is None, process.communicate()
            waiting.wait(0.01)
    finally:
        process.kill()
        process.communicate()
    assert published(writer) == {}
    writer.heal()
    writer.log.clear()
    push_delta(release.delta, REPO)
    assert count_uploads(writer) == 2
    assert published(writer) == as_published(release.delta)


# What is refused ------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(writer: HubServer) -> Iterator[HubServer]:
    """Nothing is asked of the Hub, let alone made there."""
    yield writer
    assert not writer.log
    assert not writer.repos


def test_a_damaged_delta_is_refused(untouched: HubServer, release: Release, tmp_path: Path) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")
    data = bytearray((delta / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (delta / SHARDS[1]).write_bytes(data)
    (delta / "NOTICE").unlink()
    with pytest.raises(DeltaError, match="is not a whole delta") as caught:
        push_delta(delta, REPO)
    assert (
        caught.value.why == f"NOTICE: missing: {caught.value.why.split(': ')[2].split(',')[0]}, and 1 more."
    )
    with pytest.raises(DeltaError, match="is not a delta"):
        push_delta(release.base, REPO)
    with pytest.raises(CheckpointError, match="There is no file or folder"):
        push_delta(tmp_path / "nothing", REPO)


def test_a_delta_without_a_card_is_refused(untouched: HubServer, release: Release, tmp_path: Path) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")
    (delta / "README.md").unlink()
    with pytest.raises(DeltaError, match="has no model card"):
        push_delta(delta, REPO)


@pytest.mark.parametrize("repo", ["delta", "org/delta@main", "hf://org/delta", "a/b/c", "", "org/dé"])
def test_only_hub_ids_can_be_pushed_to(untouched: HubServer, release: Release, repo: str) -> None:
    with pytest.raises(OutputError, match="is not a Hub id"):
        push_delta(release.delta, repo)


def test_a_pull_request_has_no_branch(untouched: HubServer, release: Release) -> None:
    with pytest.raises(OutputError, match="goes to the main branch"):
        push_delta(release.delta, REPO, revision="v2", create_pr=True)
    assert run(release.delta, REPO, "--create-pr", "--revision", "v2").exit_code == 2


def test_a_delta_that_lacks_the_text_of_the_base_s_license_is_refused(
    untouched: HubServer, release: Release, tmp_path: Path
) -> None:
    base = shutil.copytree(release.base, tmp_path / "base")
    (base / "LICENSE").unlink()
    make_delta(base, release.target, tmp_path / "delta")
    with pytest.raises(DeltaError, match="lacks the text of its base's license: MIT License") as caught:
        push_delta(tmp_path / "delta", REPO)
    assert "as LICENSE.base (https://spdx.org/licenses/MIT.html), and run the diff again" in caught.value.fix


def test_a_text_that_the_target_has_is_enough(writer: HubServer, release: Release, tmp_path: Path) -> None:
    """Where it is recognized as the base's license; any other text is not."""
    base = shutil.copytree(release.base, tmp_path / "base")
    (base / "LICENSE").unlink()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for k, (text, is_enough) in enumerate([("Apache License, more or less", False), (apache_text(), True)]):
        target = shutil.copytree(release.target, tmp_path / f"target-{k}")
        (target / "LICENSE.base").write_text(text)
        make_delta(base, target, tmp_path / f"delta-{k}")
        if is_enough:
            push_delta(tmp_path / f"delta-{k}", REPO)
        else:
            with pytest.raises(DeltaError, match="lacks the text of its base's license"):
                push_delta(tmp_path / f"delta-{k}", REPO)


def apache_text() -> str:
    """This project's own license."""
    return (Path(__file__).parent.parent / "LICENSE").read_text()


def test_a_base_that_states_no_license_wants_no_text(
    writer: HubServer, release: Release, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(release.base / "model.safetensors", base)
    make_delta(base, release.target, tmp_path / "delta")
    assert push_delta(tmp_path / "delta", REPO).uploaded


def edit_manifest(delta: Path, change: Callable[[Manifest], Manifest]) -> None:
    path = delta / "deltaweights.json"
    path.write_bytes(change(Manifest.from_json(path.read_bytes())).to_json())


@pytest.mark.parametrize("other", ["shape", "bytes", "lacks"])
def test_a_base_that_is_not_the_named_one_is_refused(
    other: str, writer: HubServer, release: Release, tmp_path: Path
) -> None:
    """``--base-repo`` of another model: whoever applies the delta would be told of the wrong base."""
    base, delta = release.base, release.later
    found = contents(base)
    shard = next(path for path in found if path.endswith(".safetensors"))
    (name,) = (tensor.name for tensor in parse_header_of(base / shard))
    write_safetensors(
        tmp_path / "other.safetensors",
        {
            "shape": {name: bf16(weights((30, 100), 5))},
            "bytes": {name: bf16(weights((300, 100), 5))},
            "lacks": {"else": bf16(weights((300, 100), 5))},
        }[other],
    )
    writer.add_repo("org/base", {**found, shard: (tmp_path / "other.safetensors").read_bytes()})
    result = run(delta, REPO)
    assert result.exit_code == 1
    assert "org/base is not the base that this delta was made from" in result.stderr
    assert "--base-repo" in result.stderr
    assert REPO not in writer.repos


def test_the_named_base_is_compared_and_right(writer: HubServer, release: Release) -> None:
    writer.add_repo("org/base", contents(release.base))
    assert run(release.later, REPO).exit_code == 0


def parse_header_of(path: Path) -> tuple[TensorInfo, ...]:
    with open_checkpoint(path) as checkpoint:
        return next(iter(checkpoint.shards.values())).header.tensors


@pytest.mark.parametrize("stored", ["verbatim", "zstd"])
def test_a_copy_of_a_file_of_the_base_is_refused(
    untouched: HubServer, trio: Trio, tmp_path: Path, stored: Literal["verbatim", "zstd"]
) -> None:
    """Which `diff` does not make: it refers to the base's config.json."""
    delta = shutil.copytree(trio.delta, tmp_path / "delta")
    data = (trio.base / "config.json").read_bytes()
    packed = data if stored == "verbatim" else zstandard.compress(data)
    (delta / "files").mkdir(exist_ok=True)
    (delta / "files" / "copy").write_bytes(packed)
    record = FileRecord("files/copy", len(packed), hashlib.sha256(packed).hexdigest())

    def hold_config(manifest: Manifest) -> Manifest:
        files = tuple(
            replace(file, stored=stored, source="files/copy") if file.path == "config.json" else file
            for file in manifest.target.files
        )
        return replace(
            manifest, target=replace(manifest.target, files=files), files=(*manifest.files, record)
        )

    edit_manifest(delta, hold_config)
    assert verify_delta(delta, base=trio.base).ok
    with pytest.raises(DeltaError, match="holds copies of its base's files") as caught:
        push_delta(delta, REPO)
    assert caught.value.why == "files/copy is one."


def test_a_shard_of_the_base_coded_alone_is_refused(
    untouched: HubServer, release: Release, tmp_path: Path
) -> None:
    """A delta to which the base's weights were given as new ones: anybody could rebuild them from it."""
    other = tmp_path / "other"
    write_safetensors(other / "x.safetensors", {"x": bf16(weights((3, 3), 7))})
    (other / "LICENSE").write_text("MIT License")
    make_delta(other, release.base, tmp_path / "delta")
    records = [
        FileRecord(path, len(data), hashlib.sha256(data).hexdigest())
        for path, data in contents(release.base).items()
        if path.endswith(".safetensors")
    ]

    def claim(manifest: Manifest) -> Manifest:
        return replace(manifest, base=replace(manifest.base, files=(*manifest.base.files, *records)))

    edit_manifest(tmp_path / "delta", claim)
    with pytest.raises(DeltaError, match="holds copies of its base's files") as caught:
        push_delta(tmp_path / "delta", REPO)
    assert caught.value.why == "delta-00001-of-00001.safetensors is one."


def test_a_shard_that_is_only_named_in_the_delta_is_no_copy(
    writer: HubServer, release: Release, tmp_path: Path
) -> None:
    """The target has the base's shard unchanged: its bytes are not in the delta."""
    target = shutil.copytree(release.base, tmp_path / "target")
    (target / "more.txt").write_text("more")
    make_delta(release.base, target, tmp_path / "delta")
    assert push_delta(tmp_path / "delta", REPO).uploaded


def test_what_does_not_fit_together_is_not_made_public(writer: HubServer, trio: Trio, tmp_path: Path) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta", target_license="mit")
    with pytest.raises(DeltaError, match="licenses do not fit together") as caught:
        push_delta(tmp_path / "delta", REPO, private=False)
    assert "but its base is under LicenseRef-scancode-qwen-2024" in caught.value.why
    assert "accept_conflicts=True" in caught.value.fix
    assert not writer.repos
    report = push_delta(tmp_path / "delta", REPO)
    assert (report.private, len(report.conflicts)) == (True, 1)
    report = push_delta(tmp_path / "delta", "org/other", private=False, accept_conflicts=True)
    assert (report.private, len(report.conflicts)) == (False, 1)


# Who may push ---------------------------------------------------------------------------------------------


def test_without_a_token_it_says_how_to_log_in(hub: HubServer, release: Release) -> None:
    with pytest.raises(OutputError, match="You are not logged in") as caught:
        push_delta(release.delta, REPO)
    assert "hf auth login" in caught.value.fix
    assert not hub.log


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("token", "what"),
    [
        ("hf_nobody", "The Hub does not accept your token"),
        ("hf_reader_read", f"You may not write to {REPO}"),
        ("hf_stranger", f"You may not write to {REPO}"),
    ],
)
def test_who_may_not_write_is_told(
    hub: HubServer, release: Release, monkeypatch: pytest.MonkeyPatch, token: str, what: str, exists: bool
) -> None:
    hub.add_user("reader", orgs=["org"], can_write=False)
    hub.add_user("stranger")
    if exists:
        hub.add_repo(REPO, {"README.md": b"theirs"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=what) as caught:
        push_delta(release.delta, REPO, private=False)
    assert "hf auth login" in caught.value.fix
    assert not exists or published(hub) == {"README.md": b"theirs"}


def test_a_private_repository_of_others_is_neither_found_nor_made(
    hub: HubServer, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, {"README.md": b"theirs"}, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    with pytest.raises(OutputError) as caught:
        push_delta(release.delta, REPO)
    assert REPO in caught.value.what
    assert "hf auth" in caught.value.fix
    assert published(hub) == {"README.md": b"theirs"}


def test_offline_nothing_can_be_pushed(
    writer: HubServer, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        push_delta(release.delta, REPO)
    assert not writer.log


def test_a_hub_that_cannot_be_reached(writer: HubServer, release: Release) -> None:
    writer.close()
    with pytest.raises(OutputError, match="Cannot reach the Hub") as caught:
        push_delta(release.delta, REPO)
    assert writer.endpoint in caught.value.why
    assert isinstance(caught.value, HubError)
    assert caught.value.retryable


# Faults ---------------------------------------------------------------------------------------------------


PASSING: dict[str, dict[str, Any]] = {
    "500 of the API": {"on": "api", "times": 2, "status": 500},
    "503 of the storage": {"on": "upload", "times": 3, "status": 503},
    "429": {"on": "api", "times": 2, "status": 429, "retry_after": 0},
    "429 of the storage": {"on": "upload", "times": 2, "status": 429, "retry_after": 0},
    "cut": {"on": "api", "times": 2, "drop": True},
    "cut while sending": {"on": "upload", "times": 2, "drop": True},
    "lost answers of the storage": {"on": "upload", "times": 2, "lose_answer": True},
    "502 of the commit": {"on": "api", "times": 2, "status": 502, "path": "/commit/main"},
    "cut at the commit": {"on": "api", "times": 2, "drop": True, "path": "/commit/main"},
}


@pytest.mark.parametrize("fault", PASSING)
def test_push_goes_on_after_faults(writer: HubServer, release: Release, fault: str) -> None:
    writer.fail(None, **PASSING[fault])
    push_delta(release.delta, REPO)
    assert published(writer) == as_published(release.delta)
    assert len(titles(writer)) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(writer: HubServer, release: Release) -> None:
    """The second attempt is refused, since the branch has moved: by the first."""
    writer.fail(REPO, on="api", path="/commit/main", lose_answer=True)
    report = push_delta(release.delta, REPO)
    assert report.commit == writer.repos[REPO].branches["main"].id
    assert len(titles(writer)) == 2


def test_a_pull_request_is_never_opened_twice(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {}, private=True)
    writer.fail(REPO, on="api", path="/commit/main", lose_answer=True)
    with pytest.raises(OutputError, match="Cannot reach the Hub"):
        push_delta(release.delta, REPO, create_pr=True)
    assert [name for name in writer.repos[REPO].branches if "pr" in name] == ["refs/pr/1"]


STAYING: dict[str, tuple[dict[str, Any], str]] = {
    "503": ({"status": 503, "on": "api"}, "It answers 503 Service Unavailable"),
    "503 of the storage": ({"status": 503, "on": "upload"}, "It answers 503 Service Unavailable"),
    "429": ({"status": 429, "retry_after": 0, "on": "api"}, "The Hub asks for a pause"),
    "429 for long": ({"status": 429, "retry_after": 4000, "on": "api"}, "The Hub asks for a pause"),
    "401": ({"status": 401, "on": "upload"}, "The Hub does not accept your token"),
    "403": ({"status": 403, "path": "/preupload/main"}, f"You may not write to {REPO}"),
    "402": ({"status": 402, "path": "/commit/main"}, f"You may not write to {REPO}"),
    "400": ({"status": 400, "path": "/commit/main"}, f"The Hub refuses the files for {REPO}"),
    "413": ({"status": 413, "path": "/commit/main"}, f"The Hub refuses the files for {REPO}"),
    "cut": ({"drop": True, "path": "/commit/main"}, "Cannot reach the Hub"),
}


@pytest.mark.parametrize("fault", STAYING)
def test_a_fault_that_stays_is_a_clear_error_and_nothing_is_seen(
    writer: HubServer, release: Release, fault: str
) -> None:
    what, message = STAYING[fault]
    writer.add_repo(REPO, {"README.md": b"before"}, private=True)
    writer.fail(None, times=None, **what)
    with pytest.raises(OutputError) as caught:
        push_delta(release.delta, REPO)
    assert message in str(caught.value)
    assert caught.value.fix
    assert published(writer) == {"README.md": b"before"}
    writer.heal()
    push_delta(release.delta, REPO)
    assert published(writer) == as_published(release.delta)


def test_somebody_else_s_commit_is_not_overwritten(writer: HubServer, release: Release) -> None:
    def interfere(phase: str, done: int, total: int) -> None:
        if phase == "upload" and not done:
            writer.commit(REPO, {"README.md": b"theirs"})

    with pytest.raises(OutputError, match=f"{REPO} changed during the push") as caught:
        push_delta(release.delta, REPO, progress=interfere)
    assert "Run the same command again" in caught.value.fix
    assert published(writer) == {"README.md": b"theirs"}
    push_delta(release.delta, REPO)
    assert published(writer) == as_published(release.delta)


def test_files_that_the_repository_ignores_are_missed(writer: HubServer, release: Release) -> None:
    writer.add_repo(REPO, {".gitignore": b"*.json\n"}, private=True)
    with pytest.raises(OutputError, match="does not publish the files that were sent") as caught:
        push_delta(release.delta, REPO)
    assert ".gitignore" in caught.value.fix


def test_a_card_that_the_hub_does_not_take(writer: HubServer, release: Release, tmp_path: Path) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")
    (delta / "README.md").write_text("---\n{unclosed: [\n---\n")
    with pytest.raises(OutputError, match="refuses the files") as caught:
        push_delta(delta, REPO)
    assert "README" in caught.value.why
    assert published(writer) == {}


def test_a_file_that_goes_away_meanwhile(writer: HubServer, release: Release, tmp_path: Path) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")

    def interfere(phase: str, done: int, total: int) -> None:
        if phase == "upload" and not done:
            (delta / SHARDS[2]).unlink()

    with pytest.raises(OutputError, match="Cannot read"):
        push_delta(delta, REPO, progress=interfere)
    assert published(writer) == {}


@pytest.mark.parametrize("name", [*SHARDS[:1], "NOTICE"])
def test_a_file_that_is_changed_after_it_was_checked_is_not_published(
    writer: HubServer, release: Release, tmp_path: Path, name: str
) -> None:
    delta = shutil.copytree(release.delta, tmp_path / "delta")

    def interfere(phase: str, done: int, total: int) -> None:
        if phase == "upload" and not done:
            data = (delta / name).read_bytes()
            (delta / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(OutputError, match=f"{name} changed during the push"):
        push_delta(delta, REPO, progress=interfere)
    assert published(writer) == {}


# The command line -----------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(writer: HubServer, trio: Trio, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    make_delta(trio.base, trio.target, delta, target_license="mit")
    result = run(delta, REPO)
    assert result.exit_code == 0, result.output
    commit = writer.repos[REPO].branches["main"].id[:12]
    conflict, line = result.stdout.splitlines()
    count, nbytes = len(contents(delta)), sum(map(len, as_published(delta).values()))
    page, sent = f"{writer.endpoint}/{REPO}", rf"{size_text(nbytes)} in [\d.]+ s, [\d.]+ [KM]B/s"
    assert re.fullmatch(f"{page}: commit {commit}, private, {count} files; {sent}", line)
    assert conflict.startswith("License: The target is stated to be under MIT")
    assert f"upload: {size_text(nbytes)} in " in result.stderr
    again = run(delta, REPO)
    assert f"{REPO}: commit {commit}, private, all was there; " in again.stdout.splitlines()[-1]
    refused = run(delta, "org/other", "--public")
    assert refused.exit_code == 1
    assert "error: The licenses do not fit together\n" in refused.stderr
    public = run(delta, "org/other", "--public", "--accept-conflicts", "--message", "Hello", "-q")
    assert (public.exit_code, public.output) == (0, "")
    assert titles(writer, "org/other")[0] == "Hello"


def test_the_command_gives_its_report_as_json(writer: HubServer, release: Release) -> None:
    push_delta(release.delta, REPO)
    result = run(release.later, REPO, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    costs = {"seconds", "bytes_read", "bytes_written", "warnings"}
    assert set(report) == {field.name for field in fields(PushReport)} | costs
    assert report["private"] is True
    assert set(SHARDS) <= set(report["removed"])
    assert "deltaweights.json" in report["uploaded"]
    result = run(release.later, "nothing", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["what"] == "'nothing' is not a Hub id"


def test_the_command_says_what_it_removed(writer: HubServer, release: Release) -> None:
    push_delta(release.delta, REPO)
    gone = len(set(contents(release.delta)) - set(contents(release.later)))
    assert f", {gone} removed; " in run(release.later, REPO).stdout
