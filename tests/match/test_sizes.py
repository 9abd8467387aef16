"""However a fine-tune is laid out, its delta takes about what it takes in the base's own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import apply_delta, make_delta

from ..checkpoints import Array, bf16, contents, weights, write_safetensors

Floats = NDArray[np.float32]
Model = dict[str, Floats]
HIDDEN, LAYERS = 192, 12
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
    "mlp.up_proj": (2 * HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
}


def model(seed: int, std: float = 0.02) -> Model:
    shapes = {
        f"model.layers.{layer}.{name}.weight": s for layer in range(LAYERS) for name, s in SHAPES.items()
    }
    return {name: weights(shape, seed + k, std) for k, (name, shape) in enumerate(shapes.items())}


BASE = model(0)
TUNED = {name: BASE[name] + moved for name, moved in model(1000, 2e-5).items()}


def fused(tuned: Model) -> Model:
    """As Phi-3 has it."""
    found = {}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        for name, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            room = name.partition(".")[0]
            found[f"{here}{name}.weight"] = np.concatenate(
                [tuned[f"{here}{room}.{p}_proj.weight"] for p in parts]
            )
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"{here}{name}.weight"] = tuned[f"{here}{name}.weight"]
    return found


def stacked(tuned: Model) -> Model:
    """A tensor for all layers, as scanned layers are saved."""
    return {
        f"model.layers.{name}": np.stack(
            [tuned[f"model.layers.{layer}.{name}.weight"] for layer in range(LAYERS)]
        )
        for name in SHAPES
    }


def transposed(tuned: Model) -> Model:
    """As Conv1D of GPT-2 has it."""
    return {name: np.ascontiguousarray(matrix.T) for name, matrix in tuned.items()}


def wrapped(tuned: Model) -> Model:
    """As FSDP saves compiled layers."""
    return {
        name.replace("layers.", "layers._fsdp_wrapped_module.").replace(
            ".self_attn", "._orig_mod.self_attn"
        ): matrix
        for name, matrix in tuned.items()
    }


def reordered(tuned: Model) -> Model:
    """The last layers first."""
    return {
        name.replace(f".{name.split('.')[2]}.", f".{LAYERS - 1 - int(name.split('.')[2])}.", 1): matrix
        for name, matrix in tuned.items()
    }


def delta_bytes(folder: Path, base: Model, target: Model) -> int:
    for side, tensors in (("base", base), ("target", target)):
        arrays: dict[str, Array] = {name: bf16(values) for name, values in tensors.items()}
        write_safetensors(folder / side / "model.safetensors", arrays)
    manifest = make_delta(folder / "base", folder / "target", folder / "delta")
    apply_delta(folder / "delta", folder / "out", base=folder / "base")
    assert contents(folder / "out") == contents(folder / "target")
    return manifest.delta_bytes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The delta's bytes where both sides have one layout."""
    return delta_bytes(tmp_path_factory.mktemp("plain"), BASE, TUNED)


@pytest.mark.parametrize("layout", [fused, stacked, transposed, wrapped, reordered])
@pytest.mark.parametrize("is_split", [False, True], ids=["from plain", "to plain"])
def test_another_layout_takes_a_tenth_more_at_most(
    layout: Callable[[Model], Model], is_split: bool, plain: int, tmp_path: Path
) -> None:
    pair = (layout(BASE), TUNED) if is_split else (BASE, layout(TUNED))
    assert delta_bytes(tmp_path, *pair) < 1.1 * plain
