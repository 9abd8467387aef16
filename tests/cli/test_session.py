"""Streams that are closed, full or of few characters: no traceback, right exit codes, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import Trio

INSPECT = ("inspect", "{delta}")
APPLY = ("apply", "{delta}", "-o", "out", "--base", "{base}")


def shell(
    redirect: str, *arguments: str, trio: Trio, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command line with streams redirected by bash."""
    given = [argument.format(delta=trio.delta, base=trio.base) for argument in arguments]
    command = ["bash", "-c", f'"$0" -m deltaweights "$@" {redirect}', sys.executable, *given]
    paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **env},
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_apply_does_its_work_though_streams_are_closed(redirect: str, trio: Trio, tmp_path: Path) -> None:
    done = shell(redirect, *APPLY, "--accept-license", "qwen", trio=trio, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(trio.target)


def test_nobody_accepts_a_license_on_a_closed_stdin(trio: Trio, tmp_path: Path) -> None:
    done = shell("<&-", *APPLY, trio=trio, cwd=tmp_path)
    assert done.returncode == 3
    assert "The license was not accepted" in done.stderr


@pytest.mark.parametrize("arguments", [INSPECT, (*INSPECT, "--json"), ("--version",)], ids=str)
def test_a_full_stdout_is_an_error(arguments: tuple[str, ...], trio: Trio, tmp_path: Path) -> None:
    done = shell(">/dev/full", *arguments, trio=trio, cwd=tmp_path)
    assert (done.returncode, "Cannot write to stdout" in done.stderr) == (1, True)


def test_json_for_a_closed_stdout_is_an_error(trio: Trio, tmp_path: Path) -> None:
    done = shell(">&-", *INSPECT, "--json", trio=trio, cwd=tmp_path)
    assert (done.returncode, "Cannot write to stdout" in done.stderr) == (1, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminals_encoding_lacks_is_no_error(encoding: str, trio: Trio, tmp_path: Path) -> None:
    for side, seed in (("base", 1), ("target", 2)):
        write_safetensors(tmp_path / side / "m.safetensors", {"gewicht.😀": bf16(weights((4,), seed))})
    for arguments in (("diff", "base", "target", "-o", "d"), ("inspect", "d"), ("inspect", "d", "--json")):
        done = shell("", *arguments, trio=trio, cwd=tmp_path, PYTHONIOENCODING=encoding, LC_ALL="C")
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"][0]["name"] == "gewicht.😀"


@pytest.mark.parametrize("module", ["typer", "numpy", "msgspec"])
def test_ctrl_c_during_imports_ends_without_a_traceback(module: str, trio: Trio, tmp_path: Path) -> None:
    code = (
        "import importlib.abc, os, runpy, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('deltaweights', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", code, "inspect", str(trio.delta)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
