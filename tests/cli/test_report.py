"""The command `report`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaweights.cli.commands import app

from ..conftest import Trio


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_it_prints_words_and_writes_a_page(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run(trio.delta).splitlines()
    assert lines[0] == "- 50% of the weights changed."
    assert lines[-1].startswith("report.html: ")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    run(trio.delta, "--base", trio.base, "-o", "measured.html", "--svg", "measured.svg", "--quiet")
    assert b"weight by weight" in (tmp_path / "measured.html").read_bytes()
    assert (tmp_path / "measured.svg").read_bytes().startswith(b"<svg")


def test_json_is_one_object_and_no_file(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(run(trio.delta, "--json", "--base", trio.base))
    assert found["has_base"] is True
    assert {"sentences", "layers", "tensors", "tables", "license", "size", "seconds"} <= set(found)
    run(trio.delta, "--svg", "only.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["only.svg"]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(trio: Trio, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "no-delta"), "-o", str(tmp_path / "no" / "x.html")]
    )
    assert result.exit_code == 1
    assert "There is no folder" in result.stderr


def test_a_folder_is_not_overwritten(trio: Trio, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(trio.delta), "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "Cannot write" in result.stderr


def test_a_wrong_base_is_an_error_and_writes_nothing(trio: Trio, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run(trio.delta, "--base", trio.target, "-o", page, code=1)
    assert not page.exists()
