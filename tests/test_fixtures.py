"""Deltas that earlier versions wrote: every later version must read them, and rebuild the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaweights import apply_delta, open_target, verify_delta
from deltaweights.codec import RECORD, Method
from deltaweights.manifest import FORMAT_VERSION, STATUSES, Manifest

from .checkpoints import digests

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ["v1"]


def test_every_format_version_has_its_fixtures() -> None:
    assert len(VERSIONS) == FORMAT_VERSION
    assert sorted(path.name for path in FIXTURES.glob("v*")) == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_delta_gives_the_files_it_always_gave(version: str, tmp_path: Path) -> None:
    folder = FIXTURES / version
    expected = json.loads((folder / "target.json").read_text())
    apply_delta(folder / "delta", tmp_path / "out", base=folder / "base")
    assert digests(tmp_path / "out") == expected
    assert verify_delta(folder / "delta", base=folder / "base", target=tmp_path / "out").ok


@pytest.mark.parametrize("version", VERSIONS)
def test_the_frozen_deltas_hold_every_status_and_method(version: str) -> None:
    folder = FIXTURES / version
    manifest = Manifest.from_json((folder / "delta" / "deltaweights.json").read_bytes())
    assert {entry.status for entry in manifest.tensors} == set(STATUSES)
    methods: set[int] = set()
    with open_target(folder / "delta", folder / "base") as target:
        for file in manifest.target.files:
            if file.stored == "tensors":
                for recipe in target.shard(file.path).tensors.values():
                    records, _ = recipe.table
                    assert records.dtype == RECORD
                    methods |= set(records["method"].tolist())
    assert methods == set(Method)
    assert {file.stored for file in manifest.target.files} == {"tensors", "verbatim", "zstd", "base"}


def test_fixtures_stay_small() -> None:
    assert all(path.stat().st_size < 100_000 for path in FIXTURES.rglob("*") if path.is_file())
