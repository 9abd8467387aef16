"""Deltas that earlier versions wrote: every later version must read them, and rebuild the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaweights import apply_delta, verify_delta
from deltaweights.codec import RECORD, Method
from deltaweights.delta.chain import open_recipe
from deltaweights.entries import STATUSES
from deltaweights.manifest import FORMAT_VERSION, Manifest

from . import independent_reader
from .checkpoints import digests

FIXTURES = Path(__file__).parent / "fixtures"
#: The sets of each format version: one of all that it began with, one for each later method, field or layout.
VERSIONS = {
    1: ["v1", "v1-drift", "v1-like", "v1-low-rank", "v1-parts", "v1-quantized", "v1-row", "v1-window"],
}
SETS = [name for names in VERSIONS.values() for name in names]


def test_every_format_version_has_its_fixtures() -> None:
    assert list(VERSIONS) == list(range(1, FORMAT_VERSION + 1))
    assert sorted(path.name for path in FIXTURES.glob("v*")) == SETS


@pytest.mark.parametrize("name", SETS)
def test_a_frozen_delta_gives_the_files_it_always_gave(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / name
    expected = json.loads((folder / "target.json").read_text())
    apply_delta(folder / "delta", tmp_path / "out", base=folder / "base")
    assert digests(tmp_path / "out") == expected
    assert verify_delta(folder / "delta", base=folder / "base", target=tmp_path / "out").ok
    independent_reader.rebuild(folder / "delta", folder / "base", tmp_path / "independent")
    assert digests(tmp_path / "independent") == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_the_frozen_deltas_hold_every_status_and_method(version: int) -> None:
    statuses, stored, methods = set[str](), set[str](), set[int]()
    for name in VERSIONS[version]:
        folder = FIXTURES / name
        manifest = Manifest.from_json((folder / "delta" / "deltaweights.json").read_bytes())
        statuses |= {entry.status for entry in manifest.tensors}
        stored |= {file.stored for file in manifest.target.files}
        with open_recipe(folder / "delta", folder / "base") as target:
            shards = [file.path for file in manifest.target.files if file.stored == "tensors"]
            for recipe in (recipe for path in shards for recipe in target.shard(path).tensors.values()):
                records, _ = recipe.table
                assert records.dtype == RECORD
                methods |= set(records["method"].tolist())
    assert statuses == set(STATUSES)
    assert methods == set(Method)
    assert stored == {"tensors", "verbatim", "zstd", "base"}


def test_fixtures_stay_small() -> None:
    assert all(path.stat().st_size < 100_000 for path in FIXTURES.rglob("*") if path.is_file())
