"""Checkpoints in: folders, single files, Hub snapshots; what counts, what is left out, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaWeightsError,
    HeaderError,
    apply_delta,
    make_delta,
    plan_apply,
    verify_delta,
)
from deltaweights.checkpoint import Checkpoint, Tensor, open_checkpoint
from deltaweights.storage import HubId, open_source, sha256_of

from ..checkpoints import Array, random_array, safetensors_bytes, write_safetensors

#: What Git LFS puts in a file's place.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456789\n"

A, B, C = (random_array("BF16", (5, 3), seed) for seed in (1, 2, 3))


# What a checkpoint is --------------------------------------------------------------------------------


def test_a_folder_of_shards_with_an_index(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "model-00001-of-00002.safetensors": safetensors_bytes({"b": B, "a": A}),
            "model-00002-of-00002.safetensors": safetensors_bytes({"c": C}),
            "model.safetensors.index.json": b"{}",
            "config.json": b"{}",
            "sub/vocab.txt": b"x",
        },
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert _tensors(checkpoint) == {"b": B, "a": A, "c": C}
        assert [tensor.info.name for tensor in checkpoint.tensors] == ["b", "a", "c"]
        assert list(checkpoint.shards) == [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
        assert checkpoint.other_files == ["config.json", "model.safetensors.index.json", "sub/vocab.txt"]
        assert checkpoint.source.sizes["config.json"] == 2


def test_an_index_is_not_needed_nor_believed(tmp_path: Path) -> None:
    """It is a file like any other: what counts is what the shards hold."""
    index = b'{"weight_map": {"a": "elsewhere.safetensors", "ghost": "one.safetensors"}}'
    _write(tmp_path, {"one.safetensors": safetensors_bytes({"a": A}), "model.safetensors.index.json": index})
    with open_checkpoint(tmp_path) as checkpoint:
        assert _tensors(checkpoint) == {"a": A}


def test_many_shards(tmp_path: Path) -> None:
    arrays = {f"layer.{k:03d}": random_array("U8", (k,), k) for k in range(200)}
    for name, array in arrays.items():
        write_safetensors(tmp_path / f"{name}.safetensors", {name: array})
    with open_checkpoint(tmp_path) as checkpoint:
        assert _tensors(checkpoint) == arrays


def test_a_single_file_is_a_checkpoint_without_other_files(tmp_path: Path) -> None:
    _write(tmp_path, {"x.safetensors": safetensors_bytes({"a": A}), "beside.txt": b"x"})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert _tensors(checkpoint) == {"a": A}
        assert list(checkpoint.shards) == ["x.safetensors"]
        assert checkpoint.other_files == []
        assert checkpoint.source.left_out == ()


@pytest.mark.parametrize("kind", ["str", "path", "relative", "home", "linked"])
def test_a_location_may_be_given_in_any_form(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "model" / "m.safetensors", {"a": A})
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    locations: dict[str, str | Path] = {
        "str": str(tmp_path / "model"),
        "path": tmp_path / "model",
        "relative": "model",
        "home": "~/model",
        "linked": tmp_path / "link",
    }
    with open_checkpoint(locations[kind]) as checkpoint:
        assert _tensors(checkpoint) == {"a": A}


def test_two_shards_may_hold_tensors_of_one_name(tmp_path: Path) -> None:
    _write(tmp_path, {f"{part}/m.safetensors": safetensors_bytes({"w": A}) for part in ("unet", "vae")})
    with open_checkpoint(tmp_path) as checkpoint:
        assert [tensor.shard.path for tensor in checkpoint.named("w")] == [
            "unet/m.safetensors",
            "vae/m.safetensors",
        ]
        for path, expected in {
            "vae/m.safetensors": "vae/m.safetensors",
            "vae/other.safetensors": "vae/m.safetensors",
            "elsewhere/m.safetensors": "unet/m.safetensors",
        }.items():
            found = checkpoint.find("w", path)
            assert found
            assert found.shard.path == expected
        assert checkpoint.named("v") == []
        assert checkpoint.find("v", "vae/m.safetensors") is None


def test_any_part_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": A, "b": B})
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint.named("b")[0]
        for start in range(30):
            out = np.empty(30 - start, np.uint8)
            tensor.read_into(start, out)
            assert out.tobytes() == B.data[start:]


# The Hub's cache -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds two commits of org/name, as huggingface_hub lays it out; the Hub is not asked."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--name"
    _write(repo, {"refs/main": COMMIT.encode(), "refs/v1": OLDER.encode()})
    _write(repo, {f".no_exist/{COMMIT}/added_tokens.json": b""})
    for commit, array in ((COMMIT, A), (OLDER, B)):
        files = {
            "model.safetensors": safetensors_bytes({"a": array}),
            "config.json": b"{}",
            "sub/vocab.json": b"[]",
        }
        for path, content in files.items():
            digest = sha256_of([content])
            _write(repo, {f"blobs/{digest}": content})
            link = repo / "snapshots" / commit / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(repo / "blobs" / digest, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def test_a_snapshots_links_are_followed(hub_cache: Path) -> None:
    with open_checkpoint(hub_cache / "models--org--name" / "snapshots" / COMMIT) as checkpoint:
        assert _tensors(checkpoint) == {"a": A}
        assert checkpoint.other_files == ["config.json", "sub/vocab.json"]
        assert checkpoint.source.left_out == ()


def test_a_snapshot_knows_its_hub_id(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / OLDER
    for location in (snapshot, snapshot / "model.safetensors"):
        hub_id = open_source(location).hub_id
        assert (hub_id.repo_id, hub_id.revision) == ("org/name", OLDER)
    hub_id = open_source(hub_cache / "models--org--name" / "blobs").hub_id
    assert (hub_id.repo_id, hub_id.revision) == (None, None)


def test_a_repository_in_the_cache_is_its_main_snapshot(hub_cache: Path) -> None:
    repo = hub_cache / "models--org--name"
    for location in (repo, repo / "snapshots"):
        with open_checkpoint(location) as checkpoint:
            assert _tensors(checkpoint) == {"a": A}
            assert checkpoint.source.hub_id == HubId("org/name", COMMIT)


def test_a_place_with_several_snapshots_names_them(hub_cache: Path) -> None:
    repo = hub_cache / "models--org--name"
    (repo / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=f"snapshots/{COMMIT}, .*snapshots/{OLDER}"):
        open_checkpoint(repo)
    with pytest.raises(
        CheckpointError, match=r"is a Hub cache, not a checkpoint(.|\n)*models--org--name/snapshots"
    ):
        open_checkpoint(hub_cache)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("org/name", A),
        ("org/name@main", A),
        ("org/name@v1", B),
        (f"org/name@{OLDER}", B),
        ("hf://org/name", A),
        ("hf://org/name@v1", B),
    ],
)
def test_a_hub_id_is_looked_up_in_the_cache(hub_cache: Path, location: str, expected: Array) -> None:
    with open_checkpoint(location) as checkpoint:
        assert _tensors(checkpoint) == {"a": expected}
        assert checkpoint.source.hub_id.repo_id == "org/name"


def test_a_folder_comes_before_a_hub_id_of_that_name_but_for_a_uri(hub_cache: Path) -> None:
    write_safetensors(hub_cache.parent / "org" / "name" / "m.safetensors", {"c": C})
    write_safetensors(hub_cache.parent / "hf:" / "org" / "name" / "m.safetensors", {"c": C})
    with open_checkpoint("org/name") as checkpoint:
        assert _tensors(checkpoint) == {"c": C}
    with open_checkpoint("hf://org/name") as checkpoint:
        assert _tensors(checkpoint) == {"a": A}


@pytest.mark.parametrize(
    ("location", "what", "fix"),
    [
        (
            "org/missing",
            "There is no file or folder org/missing, and the Hub is not asked",
            "hf download org/missing",
        ),
        (
            "org/name@v9",
            "There is no file or folder org/name@v9, and the Hub is not asked",
            "hf download org/name --revision v9",
        ),
        ("hf://missing", "missing is not here", "hf download missing"),
        ("a..b/c", "'a..b/c' is not a Hub id", "org/name@revision."),
        ("hf://a/b/c", "'hf://a/b/c' is not a Hub id", "hf://org/name@revision."),
        ("hf://../b", "'hf://../b' is not a Hub id", "hf://org/name@revision."),
    ],
)
def test_what_the_cache_lacks_is_an_error_that_says_how_to_get_it(
    hub_cache: Path, location: str, what: str, fix: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(location)
    assert caught.value.what == what
    assert caught.value.fix.endswith(fix)


@pytest.mark.parametrize(
    "location", ["missing", "./org/name", "org/name/", "/org/name", "a/b/c", "org/name@"]
)
def test_what_does_not_look_like_a_hub_id_is_a_path(hub_cache: Path, location: str) -> None:
    with pytest.raises(CheckpointError, match="There is no file or folder"):
        open_checkpoint(location)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_the_hubs_own_variables_say_where_the_cache_is(hub_cache: Path, variable: str) -> None:
    program = "from deltaweights.storage import open_source; print(open_source('org/name').hub_id.revision)"
    place = hub_cache if variable == "HF_HUB_CACHE" else hub_cache.parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, variable: str(place), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == COMMIT


def test_a_snapshot_in_part_says_what_to_download(hub_cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_safetensors(target / "m.safetensors", {"a": A})
    make_delta("org/name", target, tmp_path / "delta")
    (hub_cache / "models--org--name" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"org/name is not whole(.|\n)* --revision {COMMIT}"):
        apply_delta(tmp_path / "delta", tmp_path / "out")
    write_safetensors(hub_cache / "models--org--name" / "snapshots" / COMMIT / "other.safetensors", {"b": B})
    with pytest.raises(BaseMismatchError, match=f"lacks model.safetensors(.|\n)*hf download .* {COMMIT}"):
        apply_delta(tmp_path / "delta", tmp_path / "out")


def test_the_deltas_own_commit_is_found_in_a_cache_without_branches(hub_cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_safetensors(target / "m.safetensors", {"a": A})
    make_delta("org/name", target, tmp_path / "delta")
    (hub_cache / "models--org--name" / "refs" / "main").unlink()
    apply_delta(tmp_path / "delta", tmp_path / "out", base="org/name")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == safetensors_bytes({"a": A})


def test_a_snapshot_whose_blob_is_gone_is_refused(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "config.json").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"Cannot read .*config\.json"):
        open_checkpoint(snapshot)


# What is left out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        (".git/HEAD", ".git/"),
        ("sub/.git/HEAD", "sub/.git/"),
        (".git", ".git"),  # a file, in worktrees and submodules
        (".cache/huggingface/download/x.metadata", ".cache/"),
        ("n.safetensors.incomplete", "n.safetensors.incomplete"),
        ("sub/n.safetensors.part", "sub/n.safetensors.part"),
        ("n.safetensors.crdownload", "n.safetensors.crdownload"),
        ("n.safetensors.aria2", "n.safetensors.aria2"),
        (".deltaweights/x.partial", ".deltaweights/"),
    ],
)
def test_what_belongs_to_tools_is_left_out_and_listed(tmp_path: Path, path: str, listed: str) -> None:
    _write(tmp_path, {"m.safetensors": safetensors_bytes({"a": A}), path: b"not a checkpoint's"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.source.sizes) == ["m.safetensors"]
        assert checkpoint.source.left_out == (listed,)


def test_what_an_operating_system_left_behind_is_no_part_of_a_target_or_base(tmp_path: Path) -> None:
    sidecar = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4000)
    clutter = ("._m.safetensors", "._config.json", ".DS_Store", "sub/Thumbs.db", "__MACOSX/m.safetensors")
    for side in ("base", "target"):
        _write(tmp_path / side, {"m.safetensors": safetensors_bytes({"a": A}), "config.json": b"{}"})
        _write(tmp_path / side, dict.fromkeys(clutter, sidecar))
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert manifest.target.left_out == tuple(sorted(clutter))
    assert [file.path for file in manifest.base.files] == ["config.json", "m.safetensors"]
    _write(tmp_path / "out", {".DS_Store": sidecar})  # whoever looked at the folder meanwhile
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == safetensors_bytes({"a": A})
    assert verify_delta(tmp_path / "delta", target=tmp_path / "target").ok


@pytest.mark.parametrize(
    "path", [".gitattributes", ".gitignore", ".github/x", "cache/x", "x.partial", "a.git/x"]
)
def test_what_only_sounds_alike_is_part_of_the_checkpoint(tmp_path: Path, path: str) -> None:
    _write(tmp_path, {"m.safetensors": safetensors_bytes({"a": A}), path: b"x"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.other_files == [path]
        assert checkpoint.source.left_out == ()


def test_linked_folders_are_left_out_and_linked_files_are_not(tmp_path: Path) -> None:
    """A linked folder may lead anywhere, or in circles."""
    _write(tmp_path, {"model/m.safetensors": safetensors_bytes({"a": A}), "outside/x": b"x"})
    (tmp_path / "model" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "model" / "circle").symlink_to(tmp_path / "model")
    (tmp_path / "model" / "file").symlink_to(tmp_path / "outside" / "x")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.other_files == ["file"]
        assert checkpoint.source.left_out == ("circle/", "folder/")


def test_special_files_are_left_out_and_not_waited_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": A})
    os.mkfifo(tmp_path / "pipe.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.shards) == ["m.safetensors"]
        assert checkpoint.source.left_out == ("pipe.safetensors",)


# What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["nowhere", "no/where/at/all", "/nowhere", "nowhere.safetensors", "", "a/b/c@d"]
)
def test_a_path_to_nothing_is_refused(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        open_checkpoint(location)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"pytorch_model.bin": b"x", "m.safetensors.incomplete": b"y"})
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file") as caught:
        open_checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.fix


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"model.bin": b"x"})
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file"):
        open_checkpoint(tmp_path / "model.bin")


def test_a_clone_without_its_large_files_is_refused(tmp_path: Path) -> None:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n"
    )
    _write(tmp_path, {"m.safetensors": pointer})
    with pytest.raises(HeaderError, match=r"m\.safetensors is a Git LFS pointer") as caught:
        open_checkpoint(tmp_path)
    assert "git lfs pull" in caught.value.fix


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    _write(
        tmp_path, {"a.safetensors": safetensors_bytes({"a": A}), "sub/b.safetensors": b"\2\0\0\0\0\0\0\0[]"}
    )
    with pytest.raises(HeaderError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.what.startswith(f"{tmp_path}/sub/b.safetensors ")


def test_a_broken_single_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path, {"b.safetensors": b"\2\0\0\0\0\0\0\0[]"})
    with pytest.raises(HeaderError) as caught:
        open_checkpoint(tmp_path / "b.safetensors")
    assert caught.value.what.startswith(f"{tmp_path}/b.safetensors has ")


@pytest.fixture
def with_extra(tmp_path: Path) -> Path:
    """A base of two shards with an index, and another file that the target does not need; the target; and
    the delta."""
    base, target = tmp_path / "base", tmp_path / "target"
    for name, array in (("a", A), ("b", B)):
        write_safetensors(base / f"m-{name}.safetensors", {name: array})
    index = {"weight_map": {name: f"m-{name}.safetensors" for name in "ab"}}
    (base / "m.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(base / "extra.safetensors", {"x": C})
    write_safetensors(target / "m.safetensors", {"a": A, "b": B})
    make_delta(base, target, tmp_path / "delta")
    return tmp_path


@pytest.fixture(params=["pointer", "cut", "empty", "dangling", "._"])
def broken(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Breaks a safetensors file."""

    def write(path: Path) -> None:
        if request.param == "dangling":
            path.unlink()
            path.symlink_to("gone")
            return
        cut = path.read_bytes()[:30]
        path.write_bytes(
            {"pointer": POINTER, "cut": cut, "empty": b"", "._": b"\0\5\x16\7\0\2\0\0"}[request.param]
        )

    return write


def test_a_broken_file_of_the_base_that_nobody_needs_is_absent(
    with_extra: Path, broken: Callable[[Path], None]
) -> None:
    base, delta = with_extra / "base", with_extra / "delta"
    broken(base / "extra.safetensors")
    assert plan_apply(delta, base=base).mismatch is None
    assert verify_delta(delta, base=base).ok
    apply_delta(delta, with_extra / "out", base=base)
    if not (base / "extra.safetensors").is_symlink():
        manifest = make_delta(base, with_extra / "target", with_extra / "again")
        assert {entry.status for entry in manifest.tensors} == {"same"}


def test_a_broken_file_of_the_base_is_an_error_where_a_tensor_of_it_is_needed(
    with_extra: Path, broken: Callable[[Path], None]
) -> None:
    base = with_extra / "base"
    broken(base / "m-b.safetensors")
    with pytest.raises(CheckpointError, match=r"m-b\.safetensors"):
        apply_delta(with_extra / "delta", with_extra / "out", base=base)
    with pytest.raises(CheckpointError, match=r"m-b\.safetensors"):
        make_delta(base, with_extra / "target", with_extra / "again")


def test_without_an_index_a_wrong_base_is_refused_with_the_file_that_cannot_be_read(with_extra: Path) -> None:
    base = with_extra / "base"
    (base / "m.safetensors.index.json").unlink()
    (base / "m-b.safetensors").write_bytes(POINTER)
    with pytest.raises(BaseMismatchError, match=r"no tensor 'b' \(.*m-b\.safetensors is a Git LFS pointer"):
        apply_delta(with_extra / "delta", with_extra / "out", base=base)


def test_a_base_of_nothing_but_broken_files_is_refused(with_extra: Path) -> None:
    for path in (with_extra / "base").glob("*.safetensors"):
        path.write_bytes(POINTER)
    with pytest.raises(HeaderError, match="git lfs pull"):
        make_delta(with_extra / "base", with_extra / "target", with_extra / "again")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let such names be")
@pytest.mark.parametrize("name", [b"\xff.txt", b"sub\xfe/x", b"m\xff.safetensors", b".git/\xff"])
def test_a_name_that_is_not_utf8_is_refused_unless_left_out(tmp_path: Path, name: bytes) -> None:
    _write(tmp_path, {"m.safetensors": safetensors_bytes({"a": A})})
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb"):
        pass
    if name.startswith(b".git"):
        open_checkpoint(tmp_path).source.close()
    else:
        with pytest.raises(CheckpointError, match="not valid UTF-8") as caught:
            open_checkpoint(tmp_path)
        str(caught.value).encode()  # can be printed


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": A})
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"Cannot read .*config\.json"):
        open_checkpoint(tmp_path)


def test_a_file_cut_while_it_is_read_is_found(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": A})
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "m.safetensors", (tmp_path / "m.safetensors").stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"m\.safetensors ends too early"):
            checkpoint.tensors[0].read_into(0, np.empty(30, np.uint8))


# Errors ----------------------------------------------------------------------------------------------


def test_every_error_says_what_and_mostly_what_to_do() -> None:
    error = DeltaWeightsError("What", "Why.", "Fix.")
    assert str(error) == "What\nWhy.\nFix."
    assert str(DeltaWeightsError("What")) == "What"


# Helpers ---------------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _array(tensor: Tensor) -> Array:
    out = np.empty(tensor.info.nbytes, np.uint8)
    tensor.read_into(0, out)
    return Array(tensor.info.dtype, tensor.info.shape, out.tobytes())


def _tensors(checkpoint: Checkpoint) -> dict[str, Array]:
    return {tensor.info.name: _array(tensor) for tensor in checkpoint.tensors}
