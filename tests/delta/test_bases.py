"""Tensors coded against parts of the base, or what predicts them: from the Hub, in chains, with a base
that is wrong, and as a hostile author would state them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace as changed

from deltaweights import (
    BaseMismatchError,
    DeltaError,
    Manifest,
    ManifestError,
    apply_delta,
    compact_deltas,
    make_delta,
    open_target,
    plan_apply,
    verify_delta,
)
from deltaweights.checkpoint import open_checkpoint
from deltaweights.codec.predictions import seal_prediction
from deltaweights.delta.chain import open_recipe
from deltaweights.entries import BaseParts, PartGroup, PartOfBase, Prediction, TensorEntry
from deltaweights.manifest import MANIFEST_NAME

from ..checkpoints import bf16, contents, digests, weights, write_safetensors
from ..fixtures.make import held
from ..hub_server import HubServer

FIXTURES = Path(__file__).parents[1] / "fixtures"
SETS = ["v1-low-rank", "v1-parts", "v1-quantized"]


@pytest.fixture(params=SETS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A delta and its base, to be edited."""
    folder = shutil.copytree(FIXTURES / request.param, tmp_path / "pair")
    return folder / "delta", folder / "base"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """The one of parts."""
    folder = shutil.copytree(FIXTURES / "v1-parts", tmp_path / "pair")
    return folder / "delta", folder / "base"


@pytest.mark.usefixtures("no_pauses")
def test_from_the_hub_each_byte_comes_once(pair: tuple[Path, Path], hub: HubServer, tmp_path: Path) -> None:
    delta, base = pair
    hub.add_repo("org/base", contents(base))
    hub.add_repo("org/delta", contents(delta))
    apply_delta(delta, tmp_path / "here", base=base)
    plan = plan_apply("org/delta", base="org/base")
    assert plan.base
    hub.log.clear()
    apply_delta("org/delta", tmp_path / "there", base="org/base", threads=1)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert plan.delta.download == hub.bytes_sent("org/delta")
    assert hub.bytes_sent("org/base") == pytest.approx(plan.base.download, rel=0.1)


def test_any_rows_can_be_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    delta, base = pair
    apply_delta(delta, tmp_path / "out", base=base)
    with open_target(delta, base) as target, open_checkpoint(tmp_path / "out") as whole:
        for tensor in whole.tensors:
            rows, view = tensor.info.shape[0], target.get_slice(tensor.name)
            row = tensor.nbytes // rows
            for first, last in ((0, 1), (rows // 2, rows), (rows // 3, min(rows // 3 + 2, rows))):
                expected = np.empty((last - first) * row, np.uint8)
                tensor.read_into(first * row, expected)
                assert view[first:last].data.tobytes() == expected.tobytes()


def test_verify_finds_them_right(pair: tuple[Path, Path]) -> None:
    delta, base = pair
    assert verify_delta(delta, base=base).ok


def test_a_base_that_differs_in_a_part_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    delta, base = pair
    path = base / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BaseMismatchError, match="differ"):
        apply_delta(delta, tmp_path / "out", base=base)


def edit(delta: Path, change: Callable[[TensorEntry], TensorEntry]) -> None:
    """Change the entries, as a hostile author would: with all digests right."""
    manifest = Manifest.from_json((delta / MANIFEST_NAME).read_bytes())
    edited = replace(manifest, tensors=tuple(map(change, manifest.tensors)))
    (delta / MANIFEST_NAME).write_bytes(edited.to_json())


def with_part(**fields: int | str) -> Callable[[TensorEntry], TensorEntry]:
    """The first part of every first group, changed."""

    def change(entry: TensorEntry) -> TensorEntry:
        if not isinstance(entry.base, BaseParts):
            return entry
        first, *rest = entry.base.groups
        part, *others = first.parts
        group = PartGroup((changed(part, **fields), *others), first.repeats)
        return replace(entry, base=replace(entry.base, groups=(group, *rest)))

    return change


def with_groups(*groups: PartGroup) -> Callable[[TensorEntry], TensorEntry]:
    def change(entry: TensorEntry) -> TensorEntry:
        base = entry.base
        return replace(entry, base=replace(base, groups=groups)) if isinstance(base, BaseParts) else entry

    return change


HUGE = 2**62 - 1
HOSTILE = {
    "a name that the base lacks": with_part(name="nowhere"),
    "a start beyond the tensor": with_part(start=1 << 40),
    "a step beyond the tensor": with_part(step=HUGE, start=5),
    "a stride beyond the tensor": with_part(stride=HUGE),
    "a huge count": with_part(count=HUGE),
    "no groups": with_groups(),
    "huge repeats": with_groups(PartGroup((PartOfBase("q", 1),), HUGE)),
    "too few elements": with_groups(PartGroup((PartOfBase("q", 1),))),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_parts_that_the_base_does_not_have_are_refused(
    change: Callable[[TensorEntry], TensorEntry], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    delta, base = parts
    edit(delta, change)
    with pytest.raises((DeltaError, BaseMismatchError)):
        apply_delta(delta, tmp_path / "out", base=base)
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_one_element_repeated_is_no_more_than_other_bytes(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """As many elements as the tensor has, from one: harmless, and wrong."""
    delta, base = parts
    edit(delta, with_groups(PartGroup((PartOfBase("q", 1),), 1 << 40)))
    with pytest.raises(BaseMismatchError):
        apply_delta(delta, tmp_path / "out", base=base)


PREDICTED = {"quantized": "v1-quantized", "low_rank": "v1-low-rank"}


@pytest.mark.parametrize("nbytes", [1, 7, 8, 30])
@pytest.mark.parametrize("method", PREDICTED)
def test_a_prediction_that_is_another_is_refused(method: Any, nbytes: int, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / PREDICTED[method], tmp_path / "pair")

    def change(entry: TensorEntry) -> TensorEntry:
        return replace(entry, prediction=entry.prediction and Prediction(method, nbytes))

    edit(folder / "delta", change)
    with pytest.raises((DeltaError, BaseMismatchError)):
        apply_delta(folder / "delta", tmp_path / "out", base=folder / "base")


@pytest.mark.parametrize(
    ("method", "other"), [("quantized", "low_rank"), ("low_rank", "quantized"), ("low_rank", "later")]
)
def test_a_prediction_by_another_method_is_refused(method: str, other: Any, tmp_path: Path) -> None:
    """It does not read as one of the other method's, and a later method's is not guessed at."""
    folder = shutil.copytree(FIXTURES / PREDICTED[method], tmp_path / "pair")

    def change(entry: TensorEntry) -> TensorEntry:
        found = entry.prediction
        return replace(entry, prediction=found and Prediction(other, found.nbytes))

    edit(folder / "delta", change)
    with pytest.raises((DeltaError, ManifestError)):
        apply_delta(folder / "delta", tmp_path / "out", base=folder / "base")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize("method", PREDICTED)
def test_a_prediction_that_is_sealed_anew_is_refused_or_caught(method: str, tmp_path: Path) -> None:
    """Whatever a hostile author writes in place of one, no file gets its name that is not the target's."""
    folder = shutil.copytree(FIXTURES / PREDICTED[method], tmp_path / "pair")
    manifest = Manifest.from_json((folder / "delta" / MANIFEST_NAME).read_bytes())
    entry, found = next((entry, entry.prediction) for entry in manifest.tensors if entry.prediction)
    assert entry.file
    with open_recipe(folder / "delta", folder / "base") as recipe:
        stored = recipe.shard(entry.file).tensors[entry.name].stored
        path, start, nbytes = folder / "delta" / stored.path, stored.span(0, 0).start, found.nbytes
    expected = json.loads((folder / "target.json").read_text())
    whole, refused = path.read_bytes(), 0
    for place in range(8, nbytes, max(nbytes // 40, 1)):
        data = bytearray(whole[start + 8 : start + nbytes])
        data[place - 8] ^= 0x55
        path.write_bytes(whole[:start] + seal_prediction(bytes(data)) + whole[start + nbytes :])
        try:
            apply_delta(folder / "delta", tmp_path / "out", base=folder / "base", force=True)
        except (DeltaError, BaseMismatchError):
            refused += 1
        else:  # a scale, factor or size of which nothing is left after rounding
            assert digests(tmp_path / "out") == expected
    assert refused > 5


def test_a_chain_leads_through_parts(tmp_path: Path) -> None:
    """Fused, then trained on; compacted, the parts are still found."""
    q, k = weights((64, 64), 1), weights((32, 64), 2)
    fused = np.concatenate([q, k])
    states = {
        "base": {"q": q, "k": k},
        "one": {"qk": fused + weights(fused.shape, 3, 1e-4)},
        "two": {"qk": fused + weights(fused.shape, 3, 1e-4) + weights(fused.shape, 4, 1e-4)},
        "three": {"q": q + weights(q.shape, 5, 1e-4), "k": k},
    }
    for name, tensors in states.items():
        write_safetensors(tmp_path / name / "m.safetensors", {n: bf16(a) for n, a in tensors.items()})
    names = list(states)
    deltas = [tmp_path / f"{name} delta" for name in names[1:]]
    for old, new, delta in zip(names, names[1:], deltas, strict=False):
        make_delta(tmp_path / old, tmp_path / new, delta)
    for count in (1, 2, 3):
        out, whole = tmp_path / f"out {count}", tmp_path / f"whole {count}"
        apply_delta(deltas[:count], out, base=tmp_path / "base")
        assert contents(out) == contents(tmp_path / names[count])
        manifest = compact_deltas(deltas[:count], whole, base=tmp_path / "base")
        if count < 3:
            assert [entry.status for entry in manifest.tensors if entry.file] == ["rearranged"]
        apply_delta(whole, tmp_path / f"again {count}", base=tmp_path / "base")
        assert contents(tmp_path / f"again {count}") == contents(out)


def test_a_chain_leads_through_predictions(tmp_path: Path) -> None:
    """Two adapters merged one after the other; compacted, both are found as one."""
    state = {"a": weights((256, 160), 1), "b": weights((192, 192), 2)}
    write_safetensors(tmp_path / "0" / "m.safetensors", {n: bf16(a) for n, a in state.items()})
    deltas = []
    for step, ranks in enumerate(((2, 0), (3, 4)), start=1):
        for k, (name, rank) in enumerate(zip(state, ranks, strict=True)):
            rows, columns = state[name].shape
            update = weights((rows, rank), 10 * step + k, 0.01) @ weights((rank, columns), 5 * step + k, 0.05)
            state[name] = held(bf16(state[name] + update)).reshape(rows, columns)
        write_safetensors(tmp_path / str(step) / "m.safetensors", {n: bf16(a) for n, a in state.items()})
        deltas.append(tmp_path / f"delta {step}")
        make_delta(tmp_path / str(step - 1), tmp_path / str(step), deltas[-1], chunk_bytes=8192)
    apply_delta(deltas, tmp_path / "out", base=tmp_path / "0")
    assert contents(tmp_path / "out") == contents(tmp_path / "2")
    manifest = compact_deltas(deltas, tmp_path / "whole", base=tmp_path / "0")
    assert [entry.prediction and entry.prediction.rank for entry in manifest.tensors] == [5, 4]
    apply_delta(tmp_path / "whole", tmp_path / "again", base=tmp_path / "0")
    assert contents(tmp_path / "again") == contents(tmp_path / "2")
    with open_target(deltas, tmp_path / "0") as target:
        whole = target["a"].data.tobytes()
        assert target.get_slice("a")[100:103].data.tobytes() == whole[100 * 320 : 103 * 320]
