"""What the library logs, and how the command line shows it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltaweights import apply_delta, make_delta, verify_delta
from deltaweights.cli.commands import app

from ..conftest import Trio

SHARDS = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|DEBUG) [\w.]+: .+")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def at(level: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_info_is_a_line_for_each_verb_and_shard(
    trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "deltaweights"):
        make_delta(trio.base, trio.target, tmp_path / "delta")
        made = at(logging.INFO, caplog)
        caplog.clear()
        apply_delta(tmp_path / "delta", tmp_path / "out", base=trio.base)
        applied = at(logging.INFO, caplog)
        caplog.clear()
        verify_delta(tmp_path / "delta", base=trio.base)
        verified = at(logging.INFO, caplog)
    assert made[0] == f"the base is {trio.base}: 2 shards, 11 tensors"
    assert made[-1].startswith(f"wrote the delta to {tmp_path / 'delta'}: ")
    assert f"rebuilding {tmp_path / 'delta'} into {tmp_path / 'out'}" in applied
    assert applied[-1] == "rebuilt 7 files, 926899 bytes; 0 files were there"
    assert verified[-1].endswith(": 0 problems")
    for lines in (made, applied, verified):
        assert [sum(line.startswith(f"{shard}: ") for line in lines) for shard in SHARDS] == [1, 1, 1]
        assert len(lines) <= 16


def test_debug_tells_of_each_tensor(trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "deltaweights"):
        make_delta(trio.base, trio.target, tmp_path / "delta")
    lines = at(logging.DEBUG, caplog)
    shown = "model.layers.0.weight: changed, BF16 [300, 200], compared with model.layers.0.weight: "
    assert [line for line in lines if line.startswith(shown)]
    assert [
        line
        for line in lines
        if line.startswith("lm_head: renamed, BF16 [400, 64], compared with model.embed")
    ]
    assert [
        line
        for line in lines
        if re.match("ema.layers.1.weight: duplicate, .* with model.layers.1.weight", line)
    ]


@pytest.mark.parametrize("how", ["-v", "-vv", "info", "debug"])
def test_the_command_line_shows_it_with_the_time(
    how: str, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [how] if how[0] == "-" else []
    if not options:
        monkeypatch.setenv("DELTAWEIGHTS_LOG", how)
    result = run("diff", trio.base, trio.target, "-o", tmp_path / "delta", "-q", *options)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines
    assert all(map(LINE.fullmatch, lines))
    assert any(" INFO diff: the base is " in line for line in lines)
    assert any(" DEBUG " in line for line in lines) == (how in ("-vv", "debug"))


def test_without_being_asked_it_logs_nothing(trio: Trio, tmp_path: Path) -> None:
    result = run("diff", trio.base, trio.target, "-o", tmp_path / "delta")
    assert not [line for line in result.stderr.splitlines() if " INFO " in line]


def test_a_name_in_the_log_controls_no_terminal(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[31mb"
    evil.mkdir()
    result = run("inspect", evil, "-v")
    assert "\x1b" not in result.stderr


def test_loggers_are_as_they_were(trio: Trio) -> None:
    log = logging.getLogger("deltaweights")
    before = log.level, list(log.handlers)
    run("inspect", trio.delta, "-vv")
    assert (log.level, log.handlers) == before
