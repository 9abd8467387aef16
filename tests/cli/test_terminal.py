"""A terminal of 80 columns: nothing is wider, and names are shortened in the middle. And pipes."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from deltaweights import make_delta

from ..checkpoints import Array, bf16, weights, write_safetensors
from ..conftest import Trio
from .test_session import shell

LONG = "model.layers.{}.self_attention.a_name_longer_than_usual.{}_projection.weight"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, target and delta, of 40 layers with long names, under a license with long conditions."""
    folder = tmp_path_factory.mktemp("deep")
    base: dict[str, Array] = {}
    target: dict[str, Array] = {}
    for layer in range(40):
        for part, count in (("q", 2000), ("k", 1500)):
            before = weights((count,), layer)
            base[LONG.format(layer, part)] = bf16(before)
            target[LONG.format(layer, part)] = bf16(before * 1.01)
    for k in range(12):
        target[f"added.{'abcdefghijkl'[k]}.weight"] = bf16(weights((300 - k,), k))
    target[LONG.format(1, "q").replace("model", "ema")] = target[LONG.format(1, "q")]
    for side, tensors in (("base", base), ("target", target)):
        write_safetensors(folder / side / "model.safetensors", tensors)
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
    (folder / "base" / "README.md").write_text(card)
    (folder / "target" / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "target" / ("a-file-with-a-name-" * 6 + ".txt")).write_text("x")
    (folder / "target" / "hf_token").write_text("x")
    make_delta(folder / "base", folder / "target", folder / "delta")
    return folder


def on_terminal(*arguments: str, cwd: Path, columns: int = 80, **env: str) -> tuple[int, str]:
    """Exit code, and what a terminal of so many columns shows."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    paths = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaweights", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd,
        env={**kept, "PYTHONPATH": paths, "TERM": "xterm", **env},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


def lines_of(shown: str) -> list[str]:
    """The lines that stood on the screen at any time, without colors and movements."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))


APPLY = ("apply", "delta", "-o", "{out}", "--base", "base", "--accept-license", "qwen")
COMMANDS = {
    "help": ("-h",),
    "diff": ("diff", "base", "target", "-o", "{out}"),
    "diff logged": ("diff", "base", "target", "-o", "{out}", "-vv"),
    "apply": APPLY,
    "plan": ("plan", "delta", "--base", "base", "--bandwidth", "100M", "--bandwidth", "1G"),
    "verify": ("verify", "delta", "--base", "base", "--target", "target"),
    "verify a wrong one": ("verify", "delta", "--target", "base"),
    "inspect": ("inspect", "delta"),
    "inspect files": ("inspect", "delta", "--files"),
    "license": ("license", "delta"),
    "wrong usage": ("diff", "base", "--rename", "x"),
    "wrong base": ("apply", "delta", "-o", "{out}", "--base", "target", "--accept-license", "qwen"),
    "not accepted": ("apply", "delta", "-o", "{out}", "--base", "base", "-q"),
    "nothing there": ("inspect", "no-such-folder"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_wider_than_the_terminal(command: str, deep: Path, tmp_path: Path) -> None:
    out = os.path.relpath(tmp_path / "out", deep)
    assert len(out) < 60, "the test's own names do not fit"
    arguments = [argument.format(out=out) for argument in COMMANDS[command]]
    _, shown = on_terminal(*arguments, cwd=deep)
    assert len(lines_of(shown)) > 1
    # File names of 100 columns and more stand alone in a line: they are whole on purpose.
    assert not [line for line in lines_of(shown) if len(line.rstrip()) > 80 and "a-file-with" not in line]


def test_inspect_puts_layers_into_one_line(deep: Path) -> None:
    code, shown = on_terminal("inspect", "delta", cwd=deep)
    rows = lines_of(shown.partition("largest payloads")[2])[2:]
    assert code == 0
    assert re.match(r" model\.layers.*….*weight  x40  BF16   2000  ", rows[0])
    assert re.match(r" model\.layers.*….*weight  x40  BF16   1500  ", rows[1])
    assert len(list(filter(None, rows))) == 10


@pytest.mark.parametrize("options", [("--tensors",), ("--json",)])
def test_whole_names_are_there_where_they_are_asked_for(options: tuple[str, ...], deep: Path) -> None:
    _, shown = on_terminal("inspect", "delta", *options, cwd=deep)
    text = shown if "--json" in options else " ".join(lines_of(shown)) + " "
    assert all(LONG.format(layer, "q") in text for layer in range(40))


@pytest.mark.parametrize("options", [(), ("--tensors",), ("--files",)])
def test_a_pipe_has_whole_names(options: tuple[str, ...], deep: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltaweights", "inspect", str(deep / "delta"), *options],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert LONG.format("*", "q") in done.stdout or LONG.format(7, "q") in done.stdout
    assert "…" not in done.stdout


def test_a_terminal_without_our_sign_for_what_was_left_out(deep: Path) -> None:
    _, shown = on_terminal("inspect", "delta", cwd=deep, PYTHONIOENCODING="ascii")
    assert re.search(r" model\.layers\S*\.\.\.\S*weight  x40", shown)
    assert "\\u2026" not in shown
    assert not [line for line in lines_of(shown) if len(line) > 80]


def test_a_bar_has_bytes_speed_and_time_left(deep: Path, tmp_path: Path) -> None:
    _, shown = on_terminal(
        "diff", str(deep / "base"), str(deep / "target"), "-o", str(tmp_path / "d"), cwd=deep
    )
    bars = [line for line in lines_of(shown) if line.startswith("diff ")]
    assert re.search(r"\d+% +[\d.]+/[\d.]+ [kKM]B +(\?|[\d.]+ [kKMG]?B/s|[\d.]+ bytes/s) +[\d:-]+", bars[-1])


def test_without_color(deep: Path) -> None:
    _, shown = on_terminal("-h", cwd=deep, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)


def test_a_warning_is_whole_though_a_bar_is_there(deep: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "d")
    _, shown = on_terminal("diff", str(deep / "base"), str(deep / "target"), "-o", out, cwd=deep)
    assert "Warning: The target's hf_token has a name that is usual for secrets." in " ".join(lines_of(shown))


@pytest.mark.parametrize("command", ["inspect {delta} --tensors", "-h", "license {delta} --json"])
def test_a_reader_that_leaves_is_no_traceback(command: str, trio: Trio, tmp_path: Path) -> None:
    for reader in ("| head -1", "| true"):
        done = shell(reader, *command.split(), trio=trio, cwd=tmp_path)
        assert done.stderr == ""
