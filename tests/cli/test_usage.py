"""Wrong usage: three lines, an object with ``--json``, exit code 2; and the help that says what is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.main import get_group
from typer.testing import CliRunner

from deltaweights.cli.commands import app

WRONG = {
    "unknown option": (
        ("diff", "base", "target", "-o", "delta", "--treads", "2"),
        "No such option: --treads",
    ),
    "missing argument": (("diff", "base"), "Missing argument 'TARGET'"),
    "missing option": (("apply", "delta"), "Missing option '--output'"),
    "nowhere to write": (("diff", "base", "target"), "Missing option '--output' (or --dry-run)"),
    "unknown command": (("difff",), "No such command 'difff'. Did you mean 'diff'?"),
    "too many": (("inspect", "a", "b"), "Got unexpected extra argument"),
    "out of range": (("apply", "delta", "-o", "out", "--threads", "0"), "0 is not in the range"),
    "our own check": (("diff", "a", "b", "-o", "d", "--rename", "x"), "'x' has no '='"),
    "no rate": (("plan", "delta", "--bandwidth", "fast"), "'fast' is not a number of bits"),
    "two deltas": (("apply", "a", "b", "-o", "out", "--dry-run"), "It takes one delta"),
    "a branch and a request": (
        ("push", "a", "b/c", "--create-pr", "--revision", "x"),
        "goes to the main branch",
    ),
    "no such format": (("bom", "delta", "--format", "xml"), "'xml' is not one of"),
    "an option of no command": (("--threads",), "No such option: --threads"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_told_like_every_other_error(case: str) -> None:
    arguments, what = WRONG[case]
    plainly = CliRunner().invoke(app, arguments)
    assert (plainly.exit_code, plainly.stdout) == (2, "")
    first, usage, fix = plainly.stderr.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert re.match(r"Usage: \S+", usage)
    assert re.fullmatch(r"`.* --help` shows all options, with examples\.", fix)


@pytest.mark.parametrize("case", [case for case in WRONG if case != "no such format"])
def test_wrong_usage_is_an_object_with_json(case: str) -> None:
    arguments, what = WRONG[case]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert list(error) == ["what", "why", "fix"]
    assert what in error["what"]
    assert f"error: {error['what']}" in result.stderr


def test_a_log_level_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAWEIGHTS_LOG", "everything")
    result = CliRunner().invoke(app, ["inspect", "delta"])
    assert result.exit_code == 2
    assert "'everything' is neither info nor debug" in result.stderr


def test_no_argument_at_all_shows_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "deltaweights diff" in result.stdout
    assert "error" not in result.output


COMMANDS = get_group(app).commands
#: The commands with those of groups, such as "stream export".
ALL_COMMANDS = {
    **COMMANDS,
    **{
        f"{name} {inner}": command
        for name, group in COMMANDS.items()
        for inner, command in getattr(group, "commands", {}).items()
    },
}


@pytest.mark.parametrize("command", sorted(ALL_COMMANDS))
def test_the_help_has_examples_that_name_real_options(command: str) -> None:
    short, long = (
        CliRunner().invoke(app, [*command.split(), flag], env={"COLUMNS": "100"}) for flag in ("-h", "--help")
    )
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    examples = re.findall(rf"^ deltaweights ({command} .*?)\s*$", short.stdout, re.MULTILINE)
    assert examples
    for example in examples:
        shown = ALL_COMMANDS.get(" ".join(example.split()[:2])) or COMMANDS[command]
        options = {option for parameter in shown.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--?[a-z][\w-]*", f" {example.partition('|')[0]}")) <= options


def test_the_first_help_is_a_tour() -> None:
    shown = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "80"}).stdout
    toured = re.findall(r"^ deltaweights (\w+) ", shown, re.MULTILINE)
    assert toured == ["diff", "inspect", "push", "plan", "apply", "verify"]
    assert all(re.search(rf"\b{name}\b", shown) for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from deltaweights.cli import main\n"
        "sys.argv = ['deltaweights', 'diff', '-h']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'huggingface_hub', 'msgspec', 'zstandard'} & set(sys.modules)\n"
        "print(*heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
