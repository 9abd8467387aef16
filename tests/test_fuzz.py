"""The fuzz targets take their own seeds, and the engine that is always there finds what they would not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fuzz.by_hypothesis import attack
from fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds(name: str) -> None:
    seeds = list(TARGETS[name].seeds())
    assert seeds
    for data in seeds[::20] if name == "chunk" else seeds:
        TARGETS[name].run(data)


def test_what_fails_is_found_and_kept(tmp_path: Path) -> None:
    def run(data: bytes) -> None:
        assert b"e" not in data  # as most inputs that a seed is changed to have it

    target = Target(run, lambda: iter([b"seed"]))
    with pytest.raises(SystemExit, match="crash"):
        attack(target, list(target.seeds()), tmp_path, time.monotonic() + 60)
    assert (tmp_path / "crash").read_bytes() == b"e"
