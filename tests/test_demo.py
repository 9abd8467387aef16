"""The demonstration that ``make demo`` runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from deltaweights.cli import app

from .checkpoints import contents


def test_demo_rebuilds_a_really_trained_model(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "deltaweights", "demo", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in (
        "$ deltaweights diff",
        "$ deltaweights inspect",
        "$ deltaweights apply",
        "$ deltaweights verify",
    ):
        assert line in done.stdout
    assert done.stdout.rstrip().endswith("7 of 7 files identical")
    assert contents(folder / "rebuilt") == contents(folder / "fine-tune")
    assert "loss" in done.stdout


def test_demo_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    result = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not empty" in result.output
    assert contents(tmp_path) == {"mine.txt": b"x"}
