"""What ``inspect`` tells: plain data, ready for JSON, with the fields that scripts may rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaweights import Manifest, ManifestError
from deltaweights.inspect import display_name, inspect_delta, summarise
from deltaweights.manifest import STATUSES

from .checkpoints import contents
from .conftest import Trio


def test_it_is_ready_for_json(trio: Trio) -> None:
    text = json.dumps(inspect_delta(trio.delta))
    assert json.dumps(json.loads(text)) == text


def test_it_has_the_fields_that_were_promised(trio: Trio) -> None:
    summary = inspect_delta(trio.delta)
    assert {"base", "target", "license", "size", "counts", "tensors", "format_version", "tool"} <= set(
        summary
    )
    assert {"repo_id", "revision", "files"} <= set(summary["base"])
    assert {"repo_id", "revision", "files", "left_out"} <= set(summary["target"])
    assert {"target_bytes", "delta_bytes", "ratio"} == set(summary["size"])
    for tensor in summary["tensors"]:
        assert {"name", "dtype", "shape", "status", "payload_bytes", "changed_fraction"} <= set(tensor)


def test_sizes_are_those_of_the_files(trio: Trio) -> None:
    size = inspect_delta(trio.delta)["size"]
    files = contents(trio.delta)
    del files["README.md"]
    assert size["target_bytes"] == sum(map(len, contents(trio.target).values()))
    assert size["delta_bytes"] == sum(map(len, files.values()))
    assert size["ratio"] == size["delta_bytes"] / size["target_bytes"]


def test_counts_are_those_of_the_tensors(trio: Trio) -> None:
    summary = inspect_delta(trio.delta)
    statuses = [tensor["status"] for tensor in summary["tensors"]]
    assert summary["counts"] == {status: statuses.count(status) for status in STATUSES}
    assert list(summary["counts"]) == list(STATUSES)


def test_licenses_are_those_of_both_sides(trio: Trio) -> None:
    license = inspect_delta(trio.delta)["license"]
    assert set(license) == {"base", "target", "expression", "conflicts", "notice", "to_accept"}
    assert (license["base"]["id"], license["base"]["name"], license["base"]["link"]) == (
        "other",
        "qwen",
        "LICENSE",
    )
    assert [file["path"].startswith("licenses/") for file in license["base"]["files"]] == [True]
    assert license["target"]["id"] is None


def test_changed_fraction_is_of_the_elements_that_have_a_base(trio: Trio) -> None:
    tensors = {tensor["name"]: tensor for tensor in inspect_delta(trio.delta)["tensors"]}
    moved = tensors["model.layers.0.weight"]
    assert moved["changed_fraction"] == moved["changed"] / (300 * 200)
    assert 0.5 < moved["changed_fraction"] < 1
    assert tensors["model.embed"]["changed_fraction"] == 0, "all its shared rows are the base's"
    assert tensors["model.scalar"]["changed_fraction"] == 0
    for name in ("model.added", "model.gone", "model.empty"):
        assert tensors[name]["changed_fraction"] is None


def test_a_manifest_in_memory_gives_the_same(trio: Trio) -> None:
    manifest = Manifest.from_json((trio.delta / "deltaweights.json").read_bytes())
    assert summarise(manifest) == inspect_delta(trio.delta)


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
    assert display_name({"repo_id": repo_id, "revision": revision}, "a folder") == expected
