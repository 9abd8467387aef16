"""Both readers of this project pass the kit, and the kit finds those that do not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from . import damage, kit

READERS = {
    "deltaweights": ["-m", "deltaweights", "apply", "{delta}", "--base", "{base}", "-o", "{out}", "-q"],
    "independent reader": ["-m", "tests.independent_reader"],
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_reader_of_this_project_does_right(reader: list[str]) -> None:
    outcomes = list(kit.run([sys.executable, *reader], threads=2))
    assert len(outcomes) > 50
    assert [outcome for outcome in outcomes if outcome.why] == []


BAD = {
    "it accepts all": ("pass", "it was accepted"),
    "it refuses all": ("sys.exit('no')", "it was refused: no"),
    "it dies": ("os.kill(os.getpid(), 9)", "it died of signal 9"),
    "it writes what is wrong": (
        "os.mkdir(sys.argv[3]); open(sys.argv[3] + '/config.json', 'w').write('x')",
        "it wrote a wrong 'config.json'",
    ),
}


@pytest.mark.parametrize(("code", "why"), BAD.values(), ids=BAD)
def test_the_kit_finds_what_is_wrong(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"v1": {"no manifest": damage.DAMAGES["v1"]["no manifest"]}}
    monkeypatch.setattr(damage, "DAMAGES", few)
    found = [outcome.why for outcome in kit.run([sys.executable, "-c", f"import os, sys; {code}"])]
    assert why in found


def test_every_damage_changes_something(tmp_path: Path) -> None:
    for fixture, name, change in damage.cases():
        folder = tmp_path / fixture / name.replace("/", "")
        for side in ("delta", "base"):
            shutil.copytree(kit.FIXTURES / fixture / side, folder / side)
        before = kit.digests(folder)
        change(folder / "delta", folder / "base")
        assert kit.digests(folder) != before, name


def test_sealing_alone_changes_nothing(tmp_path: Path) -> None:
    for fixture in kit.FIXTURES.glob("v*"):
        delta = Path(shutil.copytree(fixture / "delta", tmp_path / fixture.name))
        before = kit.digests(delta)
        damage.seal(delta, damage._read(delta))
        assert kit.digests(delta) == before
