"""The whole way: diff, apply, and the files are the same."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from deltaweights import apply_delta, verify_delta

from .checkpoints import contents
from .conftest import Trio


def test_target_comes_back_byte_for_byte(trio: Trio, tmp_path: Path) -> None:
    report = apply_delta(trio.delta, tmp_path / "out", base=trio.base)
    assert contents(tmp_path / "out") == contents(trio.target)
    assert sorted(report.rebuilt) == sorted(contents(trio.target))


def test_rebuilt_shards_open_in_the_safetensors_library(trio: Trio, tmp_path: Path) -> None:
    apply_delta(trio.delta, tmp_path / "out", base=trio.base)
    for path in trio.target.glob("*.safetensors"):
        with (
            safe_open(path, "numpy") as published,
            safe_open(tmp_path / "out" / path.name, "numpy") as rebuilt,
        ):
            assert list(rebuilt.keys()) == list(published.keys())
            assert rebuilt.metadata() == published.metadata()


def test_verify_finds_nothing_wrong(trio: Trio) -> None:
    report = verify_delta(trio.delta, base=trio.base, target=trio.target)
    assert report.ok
    assert report.checked == len(contents(trio.delta)) - 2 + 2 * len(contents(trio.target))
