"""deltaweights stream export and import: what they print, and how they fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deltaweights.cli.commands import app

from .test_disk_export import publish, run_of
from .test_disk_writer import bits, read_all, save_model, small_state


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["stream", *(str(argument) for argument in arguments)])


def parsed(result: Result) -> dict[str, Any]:
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A stream of steps 0, 10 and 20, and the engine's folder."""
    save_model(tmp_path / "model", small_state())
    publish(tmp_path / "stream", run_of(3), [0, 10, 20])
    return tmp_path


def test_there_and_back(place: Path) -> None:
    out = place / "out"
    done = run("export", place / "stream", "-o", out, "--encoding", "overwrite", "--checksum", "adler32")
    assert done.exit_code == 0, done.output
    first, second, third = done.stdout.splitlines()
    assert re.fullmatch(
        rf"{out}: versions 1 to 2 \(steps 10 to 20\), [\d.]+ KB, [\d.]+% of whole states", first
    )
    assert second == "Version 0, which the engines begin with, is step 0."
    assert third.startswith("Exported ")
    assert read_all(out, small_state()) == [bits(state) for state in run_of(3)[1:]]
    again = run("export", place / "stream", "-o", out)
    assert again.stdout == f"{out}: version 2 is the newest state, nothing to do\n"
    done = run("import", out, place / "back", "--base", place / "model")
    assert re.match(
        rf"{place / 'back'}: versions 1 to 2, \d+ bytes published of [\d.]+ KB read\nImported ", done.stdout
    )
    again = run("import", out, place / "back", "--base", place / "model")
    assert again.stdout == f"{place / 'back'}: it is at version 2, nothing to do\n"


def test_json_has_what_was_done_and_what_it_cost(place: Path) -> None:
    options = ("--base", place / "model", "--full-every", 2, "--run-id", "run-7", "--json", "--quiet")
    done = parsed(run("export", place / "stream", "-o", place / "out", *options))
    assert [(one["version"], one["step"], one["is_full"]) for one in done["written"]] == [
        (1, 10, False),
        (2, 20, True),
    ]
    assert done["bytes_written"] >= done["nbytes"] > 0
    assert (place / "out" / "latest").read_text() == "run-7/weight_v000002"
    back = parsed(
        run("import", place / "out" / "run-7", place / "back", "--base", place / "model", "--json", "--quiet")
    )
    assert (back["versions"], back["version"]) == ([1, 2], 2)


def test_errors_say_what_to_do(place: Path) -> None:
    missing = run("export", place / "nowhere", "-o", place / "out", "--json")
    assert missing.exit_code == 1
    assert "There is no weight stream" in parsed(missing)["error"]["what"]
    assert not (place / "out").exists()
    wrong = run("export", place / "stream", "-o", place / "out", "--run-id", "../x", "--json")
    assert wrong.exit_code == 2
    assert "is no plain name" in wrong.output
    assert run("import", place / "out", place / "back").exit_code == 2  # without --base
    assert run("import", place / "out", place / "back", "--base", place / "model").exit_code == 1
