"""The command line: verbs, output, exit codes."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_group
from typer.testing import CliRunner, Result

import deltaweights
from deltaweights import Manifest, __version__, estimate_delta, make_delta
from deltaweights.cli.commands import app
from deltaweights.cli.layout import Screen
from deltaweights.cli.rendering import estimate_lines
from deltaweights.cli.session import FLAGS, in_flags
from deltaweights.codec import jit

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import Trio

#: The base of ``trio`` is not under an open license.
ACCEPT = ("--accept-license", "qwen")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parsed(result: Result) -> dict[str, Any]:
    """What ``--json`` printed: exactly one object."""
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_the_whole_way(trio: Trio, tmp_path: Path) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    assert run("diff", trio.base, trio.target, "-o", delta).exit_code == 0
    assert run("apply", delta, "-o", out, "--base", trio.base, *ACCEPT).exit_code == 0
    assert contents(out) == contents(trio.target)
    assert run("verify", delta, "--base", trio.base, "--target", out).exit_code == 0
    assert run("inspect", delta).exit_code == 0


def test_the_module_runs_as_a_program(trio: Trio, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deltaweights", "apply", str(trio.delta)]
    command += ["-o", str(tmp_path / "out"), "--base", str(trio.base), *ACCEPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "files rebuilt and checked" in done.stdout
    assert "license: qwen" in done.stderr
    assert contents(tmp_path / "out") == contents(trio.target)


def test_apply_again_says_that_all_is_there(trio: Trio, tmp_path: Path) -> None:
    for kept in (0, len(contents(trio.target))):
        result = run("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.base, "--json", *ACCEPT)
        report = parsed(result)
        assert len(report["kept"]) == kept


def test_dry_run_estimates_and_writes_nothing(trio: Trio, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    result = run("diff", trio.base, trio.target, "--dry-run", "-o", delta)
    assert result.exit_code == 0
    assert not delta.exists()
    *_, counts, others, last = result.stdout.splitlines()
    assert "model.layers.*.weight" in result.stdout
    assert counts.startswith("tensors: 4 same, 3 changed")
    assert others.startswith("other files, manifest and headers: ")
    assert re.fullmatch(r"estimate: 1\d\d KB, 1\d\.\d\d% of the target's 927 KB; .* coded in .* s", last)
    assert run("diff", trio.base, trio.target, "--dry-run", "--quiet").stdout == ""
    report = parsed(run("diff", trio.base, trio.target, "--dry-run", "--json", "--rename", "nothing=x"))
    assert report["low"] <= report["delta_bytes"] <= report["high"]
    assert report["tensors"][0]["name"] == "model.layers.*.weight"
    assert report["warnings"] == ["The rename rule 'nothing=x' changed no name."]
    assert report["bytes_written"] == 0


def test_an_estimate_fits_a_terminal(trio: Trio) -> None:
    found = estimate_delta(trio.base, trio.target)
    rows = [line for line in estimate_lines(found, 1.0, Screen(80)) if line.startswith(" ")]
    assert len(rows) == len(found.tensors) + 1
    assert max(map(len, rows)) <= 80
    kinds = [replace(found.tensors[0], name=f"layer{k}.weight", low=1) for k in range(30)]
    lines = list(estimate_lines(replace(found, tensors=tuple(kinds), low=1000), 1.0, Screen(80)))
    assert sum("weight" in line for line in lines) == 20
    assert any(line.startswith(" and 30 more tensors: ") for line in lines)
    assert "(1 KB to " in lines[-1]


def test_diff_says_what_it_stores_whole_and_what_is_odd(trio: Trio, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(trio.target, target)
    (target / "optimizer.pt").write_bytes(np.random.default_rng(0).bytes(2_000_000))
    (target / "hf_token").write_text("x")
    warning = "The target's hf_token has a name that is usual for secrets"
    shown = run("diff", trio.base, target, "-o", tmp_path / "d")
    assert "training state 2 MB (optimizer.pt)" in shown.stdout
    assert f"Warning: {warning}" in shown.stderr
    quiet = run("diff", trio.base, target, "-o", tmp_path / "d", "--force", "-q")
    assert quiet.stdout == ""
    assert [line[: 9 + len(warning)] for line in quiet.stderr.splitlines()] == [f"Warning: {warning}"]
    both = run("diff", trio.base, target, "-o", tmp_path / "d", "--force", "-q", "--json")
    assert both.stderr == ""
    assert [text[: len(warning)] for text in parsed(both)["warnings"]] == [warning]
    files = run("inspect", tmp_path / "d", "--files").stdout
    assert all(path in files for path in contents(target))
    assert "optimizer.pt" in run("inspect", tmp_path / "d").stdout
    options = ("--exclude", "*.pt", "--exclude", "hf_token", "--json")
    report = parsed(run("diff", trio.base, target, "-o", tmp_path / "e", *options))
    assert report["warnings"] == []
    assert report["target"]["left_out"] == ["hf_token", "optimizer.pt"]


@pytest.mark.parametrize("kind", ["delta", "adapter", "other"])
def test_a_target_without_anything_of_the_base_is_warned_of(kind: str, trio: Trio, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "delta":
        shutil.copytree(trio.delta, target)
    else:
        name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
        write_safetensors(target / name, {"another.name": bf16(weights((7, 11), 99))})
    result = run("diff", trio.base, target, "-o", tmp_path / "d", "-q")
    assert result.exit_code == 0
    assert "Warning: No tensor of the target was found in the base" in result.stderr
    cause = {
        "delta": "is a delta itself: apply it",
        "adapter": "PEFT adapter",
        "other": "Is the base the right",
    }
    assert cause[kind] in result.stderr


def test_inspect_shows_every_status_and_the_licenses(trio: Trio) -> None:
    shown = run("inspect", trio.delta, "--tensors").stdout
    for text in (
        "same",
        "changed",
        "added",
        "removed",
        "renamed",
        "resized",
        "duplicate of model.layers.1.weight",
        "qwen",
        "model.layers.3.weight",
    ):
        assert text in shown


def test_inspect_shows_the_largest_payloads_first_by_module(trio: Trio) -> None:
    shown = run("inspect", trio.delta).stdout
    heading, *listed = shown.partition("largest payloads")[2].split("\n", 1)[1].splitlines()
    assert heading.split() == ["tensor", "dtype", "shape", "changed", "payload"]
    assert listed[0].split() == [
        "model.layers.*.weight",
        "x3",
        "BF16",
        "300",
        "x",
        "200",
        "83.0%",
        "90",
        "KB",
    ]
    assert listed[1].split()[-4:] == ["resized", "0.0%", "2.11", "KB"]
    for text in ("duplicate", "removed", " 0 bytes"):
        assert not [line for line in listed if text in line]


def test_json_is_one_object_on_stdout(trio: Trio, tmp_path: Path) -> None:
    summary = parsed(run("diff", trio.base, trio.target, "-o", tmp_path / "delta", "--json"))
    assert summary["counts"] == parsed(run("inspect", trio.delta, "--json"))["counts"]
    assert set(summary) >= {"base", "target", "license", "size", "tensors"}
    assert set(summary["size"]) == {"target_bytes", "delta_bytes", "ratio"}
    assert parsed(run("verify", trio.delta, "--json"))["ok"] is True


def test_quiet_prints_nothing(trio: Trio, tmp_path: Path) -> None:
    for arguments in (
        ("diff", trio.base, trio.target, "-o", tmp_path / "delta"),
        ("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.base, *ACCEPT),
        ("verify", trio.delta, "--base", trio.base),
        ("inspect", trio.delta),
    ):
        result = run(*arguments, "-q")
        assert (result.exit_code, result.output) == (0, "")


def test_quiet_says_nothing_of_compiling_either(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_then_diff(*arguments: object, **options: object) -> Manifest:
        jit._announce.__wrapped__()
        return make_delta(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("deltaweights.diff.make_delta", compile_then_diff)
    for out, options in ("loud", []), ("quiet", ["-q"]):
        caplog.clear()
        command = ["diff", str(trio.base), str(trio.target), "-o", str(tmp_path / out), *options]
        assert CliRunner().invoke(app, command).exit_code == 0
        assert [record.name for record in caplog.records] == ["deltaweights.codec"] * (not options)


def test_verify_lists_every_problem_and_exits_1(trio: Trio, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(trio.target, target)
    (target / "config.json").write_text("{}")
    (target / "notes.txt").unlink()
    (target / "extra.txt").write_text("x")
    result = run("verify", trio.delta, "--target", target)
    assert result.exit_code == 1
    for line in (
        "target: config.json: different",
        "target: notes.txt: missing",
        "target: extra.txt: extra",
        "3 problems",
    ):
        assert line in result.stdout
    report = parsed(run("verify", trio.delta, "--target", target, "--json"))
    assert [problem["path"] for problem in report["problems"]] == ["config.json", "extra.txt", "notes.txt"]


def test_an_error_is_what_why_and_fix_without_a_traceback(trio: Trio, tmp_path: Path) -> None:
    result = run("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.target, *ACCEPT)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("error: "))
    assert "is not the base that this delta was made from" in lines[start]
    assert len(lines) - start == 3
    assert not (tmp_path / "out").exists()


def test_an_error_is_an_object_with_json(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "nothing", "--json")
    assert result.exit_code == 1
    assert "no file or folder" in parsed(result)["error"]["what"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deltaweights", "inspect", str(tmp_path / "nothing"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("diff", "base"),
        ("apply", "delta"),
        ("nonsense",),
        ("diff", "base", "target", "-o", "delta", "--rename", "no equals sign"),
        ("apply", "delta", "-o", "out", "--threads", "0"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_rename_rules_from_the_command_line(trio: Trio, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    rule = r"^tower\.a\.weight$=vision.a.weight"
    assert run("diff", trio.base, trio.target, "-o", delta, "--rename", rule).exit_code == 0
    tensors = {tensor["name"]: tensor for tensor in parsed(run("inspect", delta, "--json"))["tensors"]}
    assert tensors["tower.a.weight"]["status"] == "renamed"
    assert tensors["tower.a.weight"]["base"]["name"] == "vision.a.weight"


def test_version() -> None:
    assert run("--version").stdout == f"deltaweights {__version__}\n"


@pytest.mark.parametrize("verb", ["diff", "push", "apply", "plan", "verify", "inspect", "license", "bom"])
def test_every_verb_has_help(verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.exit_code == 0
    assert re.search(r"Usage: .*" + verb, shown.stdout)


def test_progress_in_a_log_is_a_line_now_and_then(trio: Trio, tmp_path: Path) -> None:
    result = run("apply", trio.delta, "-o", tmp_path / "out", "--base", trio.base, *ACCEPT)
    lines = [
        line for line in result.stderr.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)
    ]
    assert [line[20:].split(":")[0] for line in lines] == ["check base", "check base", "apply", "apply"]
    assert re.fullmatch(r"apply: 0 bytes of 927 KB", lines[2][20:])
    assert re.fullmatch(r"apply: 927 KB in [\d.e-]+ s, [\d.]+ [KMG]B/s", lines[3][20:])


# What errors say to do, in Python's words and in the command line's --------------------------------------

COMMANDS = get_group(app).commands
NESTED = [inner for command in COMMANDS.values() for inner in getattr(command, "commands", {}).values()]
ALL_FLAGS = {
    flag
    for command in [*COMMANDS.values(), *NESTED]
    for option in command.params
    for flag in option.opts
    if flag[0] == "-"
}


def library_texts() -> set[str]:
    """Every text in the package's code, without docstrings, the command line and what model cards say."""
    texts = set()
    package = Path(deltaweights.__file__).parent
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("card", "cli", "codec"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts |= {
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
        }
    return texts


def test_each_flag_that_an_error_is_told_in_exists() -> None:
    for words, flag in FLAGS.items():
        _, name, *options = flag.strip("` ").split() if flag.startswith("`") else ("", "apply", flag.strip())
        assert name in COMMANDS
        assert set(options) <= ALL_FLAGS
        assert in_flags(f"Pass {words}.") == f"Pass {flag}."


def test_every_argument_that_a_library_error_names_has_its_flag() -> None:
    """And none of the table's words is out of use."""
    public = [getattr(deltaweights, name) for name in dir(deltaweights)]
    verbs = [one for one in public if inspect.isfunction(one)]
    arguments = "|".join({name for verb in verbs for name in inspect.signature(verb).parameters})
    names = "|".join(verb.__name__ for verb in verbs)
    pattern = re.compile(rf"(?<![\w.])(?:{arguments})=(?:True|False)?|`(?:{names})`")
    named = {found for text in library_texts() for found in pattern.findall(text)}
    assert named - {"out="} == set(FLAGS), "that one is told to programmers"


def test_no_library_error_names_a_flag() -> None:
    others = {"--revision"}  # of the Hub's own program
    for text in library_texts():
        assert not {flag for flag in ALL_FLAGS - others if re.search(rf"(?<!\S){flag}\b", text)}, text
        assert not re.search(r"`deltaweights ", text)


def test_errors_and_plans_name_flags(trio: Trio, tmp_path: Path) -> None:
    occupied = run("diff", trio.base, trio.target, "-o", trio.base.parent, "--json")
    assert "or pass --force to write there" in parsed(occupied)["error"]["fix"]
    assert "or pass --force to write there" in occupied.stderr
    wrong = run("plan", trio.delta, "--base", trio.target, "--json")
    assert "`deltaweights inspect --json` lists the files of the right one" in parsed(wrong)["mismatch"]
    assert "`deltaweights inspect --json` lists the files of the right one" in wrong.stderr
