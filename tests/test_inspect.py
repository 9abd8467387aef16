"""What ``inspect`` tells: its attributes, and as JSON the fields that scripts may rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaweights import Manifest, ManifestError, inspect_delta
from deltaweights.cli.rendering import display_name
from deltaweights.entries import STATUSES
from deltaweights.inspect import summarize
from deltaweights.manifest import License, TargetRecord

from .checkpoints import contents
from .conftest import Trio
from .independent_reader import read_manifest


def test_it_is_ready_for_json(trio: Trio) -> None:
    text = json.dumps(inspect_delta(trio.delta).to_dict())
    assert json.dumps(json.loads(text)) == text


def test_the_json_has_the_fields_that_were_promised(trio: Trio) -> None:
    summary = json.loads(json.dumps(inspect_delta(trio.delta).to_dict()))
    wanted = ["base", "target", "license", "size", "counts", "tensors", "adapter", "format_version", "tool"]
    assert list(summary) == wanted
    assert list(summary["base"]) == ["repo_id", "revision", "files"]
    assert list(summary["target"]) == ["repo_id", "revision", "files", "left_out"]
    assert list(summary["size"]) == ["target_bytes", "delta_bytes", "ratio"]
    assert list(summary["tool"]) == ["name", "version"]
    license = summary["license"]
    assert list(license) == ["base", "target", "expression", "conflicts", "notice", "to_accept"]
    for side in ("base", "target"):
        words = ["repo_id", "revision", "id", "name", "link", "expression"]
        assert list(license[side]) == [*words, "licenses", "obligations", "files"]
        assert {tuple(one) for one in license[side]["licenses"]} <= {
            ("id", "name", "open", "dated", "source")
        }


def test_the_json_of_a_tensor_is_its_entry_and_a_fraction(trio: Trio) -> None:
    entries = read_manifest(trio.delta)["tensors"]  # spelled out, by the independent reader
    found = json.loads(json.dumps(inspect_delta(trio.delta).to_dict()))["tensors"]
    assert any("like" in entry for entry in entries)
    assert [{k: v for k, v in one.items() if k != "changed_fraction"} for one in found] == entries
    assert all("changed_fraction" in one for one in found)


def test_sizes_are_those_of_the_files(trio: Trio) -> None:
    size = inspect_delta(trio.delta).size
    files = contents(trio.delta)
    del files["README.md"]
    assert size.target_bytes == sum(map(len, contents(trio.target).values()))
    assert size.delta_bytes == sum(map(len, files.values()))
    assert size.ratio == size.delta_bytes / size.target_bytes


def test_counts_are_those_of_the_tensors(trio: Trio) -> None:
    summary = inspect_delta(trio.delta)
    statuses = [tensor.status for tensor in summary.tensors]
    assert summary.counts == {status: statuses.count(status) for status in STATUSES if status in statuses}
    assert list(summary.counts) == [status for status in STATUSES if status in statuses]
    assert set(STATUSES) - set(statuses) <= {"rearranged"}


def test_licenses_are_those_of_both_sides(trio: Trio) -> None:
    license = inspect_delta(trio.delta).license
    assert (license.base.id, license.base.name, license.base.link) == ("other", "qwen", "LICENSE")
    assert [file.path.startswith("licenses/") for file in license.base.files] == [True]
    assert license.target.id is None
    assert license.texts is None


def test_changed_fraction_is_of_the_elements_that_have_a_base(trio: Trio) -> None:
    tensors = {tensor.name: tensor for tensor in inspect_delta(trio.delta).tensors}
    moved = tensors["model.layers.0.weight"]
    assert moved.changed_fraction == moved.changed / (300 * 200)
    assert 0.5 < moved.changed_fraction < 1
    assert tensors["model.embed"].changed_fraction == 0, "all its shared rows are the base's"
    assert tensors["model.scalar"].changed_fraction == 0
    for name in ("model.added", "model.gone", "model.empty"):
        assert tensors[name].changed_fraction is None


def test_a_manifest_in_memory_gives_the_same(trio: Trio) -> None:
    manifest = Manifest.from_json((trio.delta / "deltaweights.json").read_bytes())
    assert summarize(manifest) == inspect_delta(trio.delta)


def test_what_is_no_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a delta"):
        inspect_delta(tmp_path)


@pytest.mark.parametrize(
    ("repo_id", "revision", "expected"),
    [
        ("org/name", "0123456789abcdef", "org/name@0123456789ab"),
        ("org/name", None, "org/name"),
        (None, None, "a folder"),
        (None, "0123456789abcdef", "a folder@0123456789ab"),
    ],
)
def test_a_checkpoint_is_shown_by_its_hub_id(
    repo_id: str | None, revision: str | None, expected: str
) -> None:
    assert display_name(TargetRecord(repo_id, revision, License(), ()), "a folder") == expected
