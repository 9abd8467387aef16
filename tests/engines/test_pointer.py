"""Pointer folders: what is in them, what they name, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from deltaweights import apply_delta, canonical, make_delta, open_target
from deltaweights.checkpoint import open_checkpoint
from deltaweights.cli.commands import app
from deltaweights.delta.pointer import POINTER_NAME, is_pointer_folder
from deltaweights.engines import read_pointer, serve_folder
from deltaweights.errors import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    FormatVersionError,
    OutputError,
)

from ..checkpoints import contents
from ..conftest import Trio


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pointer(trio: Trio, tmp_path: Path) -> Path:
    """A pointer folder of ``trio``."""
    serve_folder(trio.delta, tmp_path / "model", base=trio.base)
    return tmp_path / "model"


def test_it_has_all_files_but_weights(trio: Trio, pointer: Path) -> None:
    expected = {
        path: data
        for path, data in contents(trio.target).items()
        if not path.endswith((".safetensors", ".index.json"))
    }
    assert "config.json" in expected
    written = contents(pointer)
    document = json.loads(written.pop(POINTER_NAME))
    assert written == expected
    assert [path.name for path in (pointer / ".deltaweights" / "licenses").iterdir()]
    assert document["base"] == {"path": str(trio.base), "repo_id": None, "revision": None}
    assert [one["origin"]["path"] for one in document["deltas"]] == [str(trio.delta)]
    assert is_pointer_folder(pointer)
    assert not is_pointer_folder(trio.delta)


def test_it_stands_for_its_delta_and_base(trio: Trio, pointer: Path, tmp_path: Path) -> None:
    apply_delta(pointer, tmp_path / "rebuilt")
    assert contents(tmp_path / "rebuilt") == contents(trio.target) | {
        path: data
        for path, data in contents(tmp_path / "rebuilt").items()
        if path.startswith(".deltaweights/")
    }
    serve_folder(pointer, tmp_path / "again")
    assert (tmp_path / "again" / POINTER_NAME).read_bytes() == (pointer / POINTER_NAME).read_bytes()


def test_the_target_is_read_from_it(trio: Trio, pointer: Path) -> None:
    with read_pointer(pointer) as target, open_target(trio.delta, trio.base) as expected:
        assert list(target) == list(expected)
        for name, view in expected.items():
            assert np.array_equal(target[name].data, view.data)


def test_written_again_it_is_the_same(trio: Trio, pointer: Path) -> None:
    before = contents(pointer)
    report = serve_folder(trio.delta, pointer, base=trio.base)
    assert contents(pointer) == before
    assert POINTER_NAME not in report.files


def test_a_chain(trio: Trio, tmp_path: Path) -> None:
    make_delta(trio.target, trio.base, tmp_path / "back")
    serve_folder([trio.delta, tmp_path / "back"], tmp_path / "model", base=trio.base)
    with read_pointer(tmp_path / "model") as target:
        with open_checkpoint(trio.base) as base:
            stored = {tensor.info.name: tensor.info.nbytes for tensor in base.tensors}
        assert {name: view.data.nbytes for name, view in target.items()} == stored


def test_the_command(trio: Trio, tmp_path: Path) -> None:
    command = ("serve-folder", trio.delta, "-o", tmp_path / "out", "--base", trio.base)
    refused = run(*command)
    assert refused.exit_code == 3
    assert not (tmp_path / "out").exists()
    done = run(*command, "--accept-license", "qwen", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["base"] == str(trio.base)
    assert is_pointer_folder(tmp_path / "out")
    said = run(*command, "--accept-license", "qwen")
    assert f"weights come from {trio.delta} and {trio.base}" in said.stdout


def test_paths_are_absolute(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trio.base.parent)
    serve_folder(trio.delta.name, tmp_path / "model", base=trio.base.name)
    monkeypatch.chdir(tmp_path)
    with read_pointer(tmp_path / "model") as target:
        assert len(target)


def test_a_wrong_base_is_refused_before_anything_is_written(trio: Trio, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError):
        serve_folder(trio.delta, tmp_path / "model", base=trio.target)
    assert not (tmp_path / "model").exists()


def test_a_rebuilt_target_is_no_place_to_write_to(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.target, tmp_path / "model")
    before = contents(tmp_path / "model")
    with pytest.raises(OutputError, match=r"holds other files\n.*or is weights of it"):
        serve_folder(trio.delta, tmp_path / "model", base=trio.base)
    assert contents(tmp_path / "model") == before
    with pytest.raises(OutputError, match="inside"):
        serve_folder(trio.delta, trio.base / "inner", base=trio.base)


def test_another_delta_in_the_same_place_is_refused(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.delta, tmp_path / "delta")
    serve_folder(tmp_path / "delta", tmp_path / "model", base=trio.base)
    shutil.rmtree(tmp_path / "delta")
    with pytest.raises(CheckpointError, match="There is no file or folder"):
        read_pointer(tmp_path / "model")
    make_delta(trio.base, trio.base, tmp_path / "delta")
    with pytest.raises(DeltaError, match="is not the one that"):
        read_pointer(tmp_path / "model")


def test_a_base_that_was_moved_is_named_when_it_is_read(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.base, tmp_path / "base")
    serve_folder(trio.delta, tmp_path / "model", base=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError):
        read_pointer(tmp_path / "model")
    with read_pointer(tmp_path / "model", base=tmp_path / "moved") as target:
        assert len(target)


def test_what_is_no_pointer_folder(trio: Trio) -> None:
    with pytest.raises(CheckpointError, match="is not a pointer folder"):
        read_pointer(trio.target)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["deltas"].clear(),
        lambda value: value["deltas"].extend(value["deltas"] * 100),
        lambda value: value["base"].update(path="relative/base"),
        lambda value: value["base"].update(path="/a\0b"),
        lambda value: value["base"].update(path="/" + "a" * 5000),
        lambda value: value["base"].update(path=None),
        lambda value: value["base"].update(repo_id="org/name"),
        lambda value: value["base"].update(path=None, repo_id="../..", revision="main"),
        lambda value: value["base"].update(path=None, repo_id="org/name"),
        lambda value: value["deltas"][0].update(manifest="0" * 63),
        lambda value: value.update(format="deltaweights-stream"),
        lambda value: value.update(more=1),
    ],
)
def test_damaged_documents_are_refused(pointer: Path, change: Any) -> None:
    path = pointer / POINTER_NAME
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(canonical.encode(value))
    with pytest.raises(DeltaError, match=f"{POINTER_NAME} is damaged"):
        read_pointer(pointer)


def test_other_bytes_are_refused(pointer: Path) -> None:
    path = pointer / POINTER_NAME
    data = path.read_bytes()
    for other in (
        b"",
        b"{",
        data[:-1],
        data + b"\n",
        b" " + data,
        b"[" * 100_000,
        b"\xff" + data,
        data * 9000,
    ):
        path.write_bytes(other)
        with pytest.raises(DeltaError, match="is damaged"):
            read_pointer(pointer)
    path.write_bytes(data.replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(FormatVersionError, match="has format version 2"):
        read_pointer(pointer)
