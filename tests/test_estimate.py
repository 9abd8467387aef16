"""An estimate is close to the delta that diff then writes, but codes only a sample, and writes nothing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights import DeltaEstimate, Manifest, estimate_delta, make_delta
from deltaweights.delta.sampling import _spread

from .checkpoints import bf16, contents, weights, write_safetensors
from .conftest import Trio
from .hub_server import HubServer

Weights = dict[str, NDArray[np.float32]]

#: How far an estimate from a sample may be from the delta's size.
TOLERANCE = 0.1

#: Far less than the pairs have, so that most of what is estimated was not coded.
SAMPLE_BYTES = 1 << 20

LAYERS, WIDTH = 24, 256


def base_weights() -> Weights:
    found = {"model.embed.weight": weights((8 * WIDTH, WIDTH), 1)}
    for layer in range(LAYERS):
        for number, name in enumerate(("q_proj", "k_proj", "v_proj", "down_proj")):
            rows = WIDTH // 4 if name in ("k_proj", "v_proj") else 2 * WIDTH
            found[f"model.layers.{layer}.{name}.weight"] = weights((rows, WIDTH), 10 * layer + number + 2)
        found[f"model.layers.{layer}.norm.weight"] = weights((WIDTH,), 10 * layer + 9)
    return found


def layer_of(name: str) -> int:
    words = name.split(".")
    return int(words[2]) if words[1] == "layers" else 0


def moved(old: Weights, std: float) -> Weights:
    return {name: w + weights(w.shape, 1000 + k, std) for k, (name, w) in enumerate(old.items())}


def dense(old: Weights) -> Weights:
    """Later layers moved further."""
    return {
        name: w + weights(w.shape, 1000 + k, 2e-5 * (1 + layer_of(name) / 4))
        for k, (name, w) in enumerate(old.items())
    }


def sparse(old: Weights) -> Weights:
    """One weight in a hundred moved."""
    found = {}
    for k, (name, w) in enumerate(old.items()):
        is_moved = np.random.default_rng(k).random(w.shape) < 0.01
        found[name] = w + is_moved.astype(np.float32) * weights(w.shape, 1000 + k, 2e-3)
    return found


def frozen(old: Weights) -> Weights:
    """Only some layers moved."""
    return {name: new if layer_of(name) > 14 else old[name] for name, new in moved(old, 1e-4).items()}


def fused(old: Weights) -> Weights:
    new = dense(old)
    for layer in range(LAYERS):
        parts = [new.pop(f"model.layers.{layer}.{name}_proj.weight") for name in "qkv"]
        new[f"model.layers.{layer}.qkv_proj.weight"] = np.concatenate(parts)
    return new


def unrelated(old: Weights) -> Weights:
    return {name: weights(w.shape, 5000 + k) for k, (name, w) in enumerate(old.items())}


def write(folder: Path, tensors: Weights) -> Path:
    names = list(tensors)
    for number in range(2):
        path = folder / f"model-{number + 1:05d}-of-00002.safetensors"
        write_safetensors(path, {name: bf16(tensors[name]) for name in names[number::2]})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("estimate") / "base", base_weights())


def assert_close(found: DeltaEstimate, made: Manifest) -> None:
    assert abs(found.delta_bytes / made.delta_bytes - 1) < TOLERANCE
    assert found.low <= found.delta_bytes <= found.high
    assert found.target_bytes == made.target_bytes
    assert found.counts == dict(Counter(entry.status for entry in made.tensors))


@pytest.mark.parametrize("change", [dense, sparse, frozen, fused, unrelated])
def test_a_sample_tells_the_size(base: Path, tmp_path: Path, change: Callable[[Weights], Weights]) -> None:
    target = write(tmp_path / "target", change(base_weights()))
    found = estimate_delta(base, target, sample_bytes=SAMPLE_BYTES)
    assert 0 < found.sampled_bytes < 0.6 * found.target_bytes
    made = make_delta(base, target, tmp_path / "delta")
    assert_close(found, made)
    assert found.low * 0.99 <= made.delta_bytes <= found.high * 1.01


def test_more_is_coded_for_a_smaller_error(base: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "target", dense(base_weights()))
    few, more, every = (
        estimate_delta(base, target, sample_bytes=nbytes) for nbytes in (1 << 20, 8 << 20, 1 << 30)
    )
    assert few.sampled_bytes < more.sampled_bytes < every.sampled_bytes
    assert few.high - few.low > more.high - more.low > every.high - every.low
    made = make_delta(base, target, tmp_path / "delta")
    assert every.delta_bytes == pytest.approx(made.delta_bytes, rel=1e-3)


def test_every_status_is_estimated(trio: Trio, tmp_path: Path) -> None:
    """The pair is small, so all of it is coded; files beside the weights count as diff stores them."""
    found = estimate_delta(trio.base, trio.target)
    made = make_delta(trio.base, trio.target, tmp_path / "delta")
    assert_close(found, made)
    assert found.delta_bytes == pytest.approx(made.delta_bytes, abs=20)
    assert json.loads(json.dumps(found.to_dict()))["counts"] == found.counts
    assert found.other_bytes + sum(one.delta_bytes for one in found.tensors) == found.delta_bytes
    by_name = {(one.name, one.status): one for one in found.tensors}
    layers = by_name["model.layers.*.weight", "changed"]
    assert (layers.count, layers.compared_with) == (3, ("model.layers.*.weight",))
    assert by_name["ema.layers.1.weight", "duplicate"].delta_bytes == 0
    assert by_name["model.added", "added"].compared_with == ()
    assert by_name["lm_head", "renamed"].compared_with == ("model.embed",)
    assert by_name["lm_head", "renamed"].changed_fraction == 0
    sizes = [one.delta_bytes for one in found.tensors]
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_files_give_the_same_estimate_and_stay_as_they_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write(tmp_path / "target", dense(base_weights()))
    before = contents(base), contents(target)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    one, two = (
        estimate_delta(base, target, sample_bytes=SAMPLE_BYTES, threads=threads) for threads in (1, 3)
    )
    assert one == two
    assert (contents(base), contents(target)) == before
    assert not list(empty.iterdir())


def test_large_files_beside_the_weights_are_sampled(base: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "base", {"a": weights((64, 64))})
    target = write(tmp_path / "target", {"a": weights((64, 64))})
    random = np.random.default_rng(0)
    vocabulary = json.dumps({f"token{k}": int(random.integers(1 << 30)) for k in range(300_000)})
    assert len(vocabulary) > 6_000_000
    noise = random.bytes(5_000_000)
    for folder in (source, target):
        (folder / "same.bin").write_bytes(noise[::-1])
    (source / "other.bin").write_bytes(noise[:-1] + b"\0")  # of that size, but another one
    (target / "tokenizer.json").write_text(vocabulary)
    (target / "optimizer.pt").write_bytes(noise)
    (target / "notes.txt").write_text("ours\n")
    found = estimate_delta(source, target)
    made = make_delta(source, target, tmp_path / "delta")
    assert_close(found, made)
    assert found.tensors[0].status == "same"


def test_arguments_are_those_of_diff(base: Path, tmp_path: Path) -> None:
    new = {f"tower.{name}": w for name, w in dense(base_weights()).items()}
    target = write(tmp_path / "target", new | {"tower.model.embed.weight": weights((7, 3))})
    (target / "log.bin").write_bytes(np.random.default_rng(0).bytes(1_000_000))
    found = estimate_delta(
        base, target, rename=[(r"^tower\.", "")], exclude=["*.bin"], sample_bytes=SAMPLE_BYTES, threads=1
    )
    assert found.counts["renamed"] == len(new) - 1
    assert found.other_bytes < 100_000


def test_a_merged_adapter_is_found(tmp_path: Path) -> None:
    """In one tensor of a kind, which stands for the others."""
    shape = (512, 384)
    held = {f"layers.{k}.q.weight": weights(shape, k) for k in range(4)}
    moved = weights((512, 4), 10, 1) @ weights((4, 384), 11, 1e-4)
    base = write(tmp_path / "base", held)
    target = write(tmp_path / "target", {name: values + moved for name, values in held.items()})
    found, manifest = estimate_delta(base, target), make_delta(base, target, tmp_path / "delta")
    assert found.delta_bytes < found.target_bytes / 10
    assert_close(found, manifest)


def test_strangers_are_told_of(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = write(tmp_path / "target", {"other": weights((30, 30))})
    with caplog.at_level(logging.WARNING, "deltaweights.inputs"):
        estimate_delta(base, target)
    assert any("No tensor of the target was found in the base" in text for text in caplog.messages)


@pytest.mark.usefixtures("no_pauses")
def test_a_sample_is_all_that_is_fetched(hub: HubServer, base: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "target", dense(base_weights()))
    hub.add_repo("org/base", contents(base))
    hub.add_repo("org/target", contents(target))
    found = estimate_delta("org/base", "org/target", sample_bytes=SAMPLE_BYTES)
    for repo in ("org/base", "org/target"):
        assert hub.weight_bytes(repo) < 2.5 * found.sampled_bytes
        assert hub.weight_bytes(repo) < found.target_bytes / 2
    assert_close(found, make_delta(base, target, tmp_path / "delta"))


@given(st.integers(1, 3000), st.integers(2, 300))
def test_the_first_of_a_sample_lie_all_over(count: int, first: int) -> None:
    order = list(_spread(count))
    assert sorted(order) == list(range(count))
    places = [-1, *sorted(order[:first]), count]
    widest = max(b - a for a, b in pairwise(places))
    assert widest <= 3 * count / min(first, count) + 1
