"""Merged adapters are found without being told, in every place where one may have been merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import DeltaSummary, apply_delta, inspect_delta, make_delta
from deltaweights.codec.low_rank.writing import code_part, joined
from deltaweights.entries import TensorEntry

from ..checkpoints import Array, bf16, contents, f32, weights, write_safetensors

Floats = NDArray[np.float32]
RANK = 4


def f16(values: Floats) -> Array:
    return Array("F16", values.shape, values.astype("<f2").tobytes())


def held(array: Array) -> Floats:
    """The values that it holds."""
    if array.dtype == "BF16":
        return (np.frombuffer(array.data, "<u2").astype("<u4") << 16).view("<f4").reshape(array.shape)
    return (
        np.frombuffer(array.data, {"F16": "<f2", "F32": "<f4"}[array.dtype])
        .astype(np.float32)
        .reshape(array.shape)
    )


def update(shape: tuple[int, ...], seed: int, rank: int = RANK, std: float = 2e-4) -> Floats:
    """What merging an adapter adds to a matrix, or to each of a stack's."""
    *stacked, rows, columns = shape
    product = weights((*stacked, rows, rank), seed, 1) @ weights((*stacked, rank, columns), seed + 1, 1)
    return (product * np.float32(std / np.sqrt(rank))).astype(np.float32)


class Pair:
    """Writes base and target, and their delta; checks that it gives the target back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, base: dict[str, Array], target: dict[str, Array]) -> dict[str, TensorEntry]:
        write_safetensors(self._folder / "base" / "m.safetensors", base)
        write_safetensors(self._folder / "target" / "m.safetensors", target)
        manifest = make_delta(self._folder / "base", self._folder / "target", self._folder / "delta")
        apply_delta(self._folder / "delta", self._folder / "out", base=self._folder / "base")
        assert contents(self._folder / "out") == contents(self._folder / "target")
        return {entry.name: entry for entry in manifest.tensors}

    def summary(self) -> DeltaSummary:
        return inspect_delta(self._folder / "delta")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.mark.parametrize(("old", "new"), [(bf16, bf16), (f16, f16), (f32, f32), (bf16, f32), (f32, bf16)])
def test_a_merge_in_any_float_dtype_is_found(
    old: Callable[[Floats], Array], new: Callable[[Floats], Array], pair: Pair
) -> None:
    base = old(weights((512, 384), 1))
    found = pair({"q.weight": base}, {"q.weight": new(held(base) + update((512, 384), 2))})["q.weight"]
    assert found.prediction
    assert found.prediction.method == "low_rank"
    assert found.prediction.rank == RANK
    assert found.payload_bytes < 512 * 384 * (2 if new is f32 else 1) // 4


def test_each_matrix_of_a_stack_has_its_own(pair: Pair) -> None:
    base = bf16(weights((3, 256, 256), 1))
    moved = held(base) + update((3, 256, 256), 2)
    moved[1] = held(base)[1]  # nothing was merged into this one
    found = pair({"experts": base}, {"experts": bf16(moved)})["experts"]
    assert found.prediction
    assert found.prediction.rank == RANK


def test_parts_of_a_fused_tensor_have_their_own(pair: Pair) -> None:
    """Ranks of parts do not add up."""
    base = {name: bf16(weights((256, 256), seed)) for seed, name in enumerate("qkv")}
    fused = np.concatenate(
        [held(array) + update((256, 256), 10 + 2 * k) for k, array in enumerate(base.values())]
    )
    found = pair(base, {"qkv": bf16(fused)})["qkv"]
    assert found.status == "rearranged"
    assert found.prediction
    assert found.prediction.rank == RANK


def test_leading_rows_of_a_grown_vocabulary(pair: Pair) -> None:
    base = bf16(weights((512, 256), 1))
    grown = np.concatenate([held(base) + update((512, 256), 2), weights((32, 256), 3)])
    found = pair({"embed": base}, {"embed": bf16(grown)})["embed"]
    assert found.status == "resized"
    assert found.prediction


def test_ranks_of_two_adapters_add_up(pair: Pair) -> None:
    base = bf16(weights((512, 512), 1))
    once = bf16(held(base) + update((512, 512), 2))
    found = pair({"w": base}, {"w": bf16(held(once) + update((512, 512), 4))})["w"]
    assert found.prediction
    assert found.prediction.rank == 2 * RANK


@pytest.mark.parametrize(
    "moved",
    [
        lambda base: base + weights(base.shape, 2, 2e-4),
        lambda base: np.where(weights(base.shape, 2) > 0.05, base + np.float32(1e-3), base),
        lambda base: weights(base.shape, 2),
        lambda base: base * np.float32(0.999),
        lambda base: np.full_like(base, np.nan),
        lambda base: np.full_like(base, 3e38),
        np.zeros_like,
    ],
    ids=["dense", "sparse", "unrelated", "decayed", "NaN", "huge", "zero"],
)
def test_other_training_is_coded_as_before(moved: Callable[[Floats], Floats], pair: Pair) -> None:
    base = bf16(weights((256, 512), 1))
    found = pair({"w": base}, {"w": bf16(moved(held(base)).astype(np.float32))})["w"]
    assert not found.prediction
    assert pair.summary().adapter is None


def test_factors_that_readers_would_refuse_are_not_written(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the search thinks of them."""
    base = bf16(weights((256, 256), 1))
    many = np.ones((256, 200), np.int64)  # two such matrices are more than the tensor
    data = joined(256, [code_part(many, many, 40)], rounded=False)
    monkeypatch.setattr("deltaweights.match.low_rank.find_low_rank", lambda *_: data)
    found = pair({"w": base}, {"w": bf16(held(base) + update((256, 256), 2))})["w"]
    assert not found.prediction


def test_a_summary_says_what_was_merged(pair: Pair) -> None:
    shapes = {"q_proj": (256, 256), "v_proj": (128, 256)}
    base = {
        f"layers.{layer}.{name}.weight": bf16(weights(shape, 10 * layer + k))
        for layer in range(3)
        for k, (name, shape) in enumerate(shapes.items())
    }
    target = {name: bf16(held(array) + update(array.shape, 5)) for name, array in base.items()}
    norm = bf16(weights((256,), 1))
    pair(base | {"norm": norm}, target | {"norm": norm})
    adapter = pair.summary().adapter
    assert adapter
    assert str(adapter) == f"rank {RANK} on q_proj and v_proj"
    assert adapter.tensors == 6
    assert adapter.adapter_bytes == 2 * RANK * 3 * (256 + 256 + 128 + 256)
    fields = json.loads(json.dumps(pair.summary().to_dict()))
    assert fields["adapter"]["ranks"] == [RANK, RANK]
    one = next(tensor for tensor in fields["tensors"] if tensor["name"] == "layers.0.q_proj.weight")
    assert one["prediction"]["rank"] == RANK
    assert one["residual_bytes"] == one["payload_bytes"] - one["prediction"]["nbytes"]
