"""Bytes read and written are counted, as ``--json`` reports them."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltaweights import Manifest, make_delta
from deltaweights.cli.commands import app
from deltaweights.manifest import MANIFEST_NAME
from deltaweights.storage import LocalSource, traffic

from ..checkpoints import contents
from ..conftest import Trio
from ..hub_server import HubServer

ACCEPT = ("--accept-license", "qwen")


def costs(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json", "-q")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["seconds"] > 0
    assert found["warnings"] == []
    assert isinstance(found, dict)
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_verify_reads_each_file_of_a_delta_once(trio: Trio) -> None:
    found = costs("verify", trio.delta)
    manifest = Manifest.from_json((trio.delta / MANIFEST_NAME).read_bytes())
    assert found["bytes_read"] == manifest.delta_bytes
    assert found["bytes_written"] == 0


def test_apply_writes_the_target_and_the_license_texts(trio: Trio, tmp_path: Path) -> None:
    found = costs("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.base, *ACCEPT)
    assert found["bytes_written"] == size_of(tmp_path / "out")
    assert size_of(trio.delta) < found["bytes_read"] < 3 * (size_of(trio.delta) + size_of(trio.base))
    again = costs("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.base, *ACCEPT)
    assert again["bytes_written"] == size_of(tmp_path / "out" / ".deltaweights")


def test_diff_and_compact_write_a_delta_and_read_both_sides(trio: Trio, tmp_path: Path) -> None:
    found = costs("diff", trio.base, trio.target, "-o", tmp_path / "delta")
    assert found["bytes_written"] == size_of(tmp_path / "delta")
    assert found["bytes_read"] >= size_of(trio.target)
    found = costs("compact", tmp_path / "delta", "-o", tmp_path / "one", "--base", trio.base)
    assert found["bytes_written"] == size_of(tmp_path / "one")
    assert found["bytes_read"] >= size_of(tmp_path / "delta")


def test_push_and_the_hub_count_too(
    hub: HubServer, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.add_user("someone", orgs=["org"]))
    shutil.copytree(trio.base, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("a text\n")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    make_delta(tmp_path / "base", trio.target, tmp_path / "delta", target_license="mit")
    found = costs("push", tmp_path / "delta", "org/delta")
    assert found["bytes_written"] == found["nbytes"] == size_of(tmp_path / "delta")
    assert found["bytes_read"] >= found["nbytes"]
    again = costs("push", tmp_path / "delta", "org/delta")
    assert again["bytes_written"] == 0
    verified = costs("verify", "hf://org/delta")
    assert 0 < verified["bytes_read"] < size_of(tmp_path / "delta") + 10_000


def test_threads_lose_no_count(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    with LocalSource(tmp_path / "file") as source:
        file = source.open("file")
        before = traffic.total()

        def read() -> None:
            for _ in range(500):
                file.read(0, 10)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert traffic.total().since(before) == (8 * 500 * 10, 0)


def test_what_is_kept_of_the_target_is_what_was_there(trio: Trio, tmp_path: Path) -> None:
    """A file that is whole is read, to be compared, and not written."""
    out = tmp_path / "out"
    shutil.copytree(trio.target, out)
    found = costs("apply", trio.delta, "-o", out, "--base", trio.base, *ACCEPT)
    assert found["kept"] == sorted(contents(trio.target))
    assert found["bytes_read"] >= size_of(trio.target)
