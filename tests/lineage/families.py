"""Families of small models of random weights: a base, its fine-tunes, and what else is made of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Array, bf16, f32, write_safetensors

#: A model: names and weights.
Weights: TypeAlias = dict[str, NDArray[np.float32]]

#: Names of a layer's matrices, and their rows and columns in widths.
_MATRICES = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (0.5, 1),
    "self_attn.v_proj": (0.5, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (3, 1),
    "mlp.up_proj": (3, 1),
    "mlp.down_proj": (1, 3),
}


def draw_model(seed: int, hidden: int = 64, layers: int = 2, vocabulary: int = 300) -> Weights:
    """A model with random matrices, norms of ones, and biases of zeros."""
    source = np.random.default_rng(seed)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (source.standard_normal(shape) * 0.02).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocabulary, hidden)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for name, (rows, columns) in _MATRICES.items():
            found[f"{stem}.{name}.weight"] = matrix(int(rows * hidden), int(columns * hidden))
        found[f"{stem}.self_attn.q_proj.bias"] = np.zeros(hidden, np.float32)
        found[f"{stem}.input_layernorm.weight"] = np.ones(hidden, np.float32)
    found["model.norm.weight"] = np.ones(hidden, np.float32)
    found["lm_head.weight"] = matrix(vocabulary, hidden)
    return found


def tune(model: Weights, seed: int, std: float = 1e-3) -> Weights:
    """The model with every matrix moved at random."""
    source = np.random.default_rng([seed, 1])
    return {
        name: value
        if value.ndim < 2
        else value + (source.standard_normal(value.shape) * std).astype(np.float32)
        for name, value in model.items()
    }


def merge_adapter(model: Weights, seed: int, rank: int = 4, std: float = 2e-3) -> Weights:
    """The model with an update of low rank added to the matrices of its layers."""
    source = np.random.default_rng([seed, 2])
    found = dict(model)
    for name, value in model.items():
        if ".layers." in name and value.ndim == 2:
            rows, columns = (source.standard_normal((size, rank)) for size in value.shape)
            update = rows @ columns.T * std / rank**0.5
            found[name] = (value + update).astype(np.float32)
    return found


def mix(parts: Mapping[float, Weights] | list[tuple[float, Weights]]) -> Weights:
    """The weighted sum of models."""
    pairs = parts if isinstance(parts, list) else list(parts.items())
    return {
        name: np.sum([weight * model[name].astype(np.float64) for weight, model in pairs], axis=0).astype(
            np.float32
        )
        for name in pairs[0][1]
    }


def slerp(one: Weights, other: Weights, part: float) -> Weights:
    """The two interpolated on a sphere, tensor by tensor, as mergers do."""
    found = {}
    for name, value in one.items():
        a, b = value.astype(np.float64), other[name].astype(np.float64)
        sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
        angle = np.arccos(np.clip(float((a * b).sum()) / sizes, -1, 1)) if sizes else 0.0
        if angle < 1e-6:
            found[name] = ((1 - part) * a + part * b).astype(np.float32)
        else:
            weights = np.sin((1 - part) * angle) / np.sin(angle), np.sin(part * angle) / np.sin(angle)
            found[name] = (weights[0] * a + weights[1] * b).astype(np.float32)
    return found


def rename_layers(model: Weights, number_of: Callable[[int], int | None]) -> Weights:
    """The model with its layers renumbered; those that get None are left out."""
    found = {}
    for name, value in model.items():
        words = name.split(".")
        if words[:2] == ["model", "layers"]:
            number = number_of(int(words[2]))
            if number is None:
                continue
            words[2] = str(number)
        found[".".join(words)] = value
    return found


def f16(values: NDArray[np.float32]) -> Array:
    """The values as F16."""
    return Array("F16", values.shape, values.astype("<f2").tobytes())


def write_model(
    folder: Path,
    model: Weights,
    dtype: Callable[[NDArray[np.float32]], Array] = bf16,
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
    card: str = "",
) -> Path:
    """Write the model into a folder, in so many shards."""
    names = list(model)
    for shard in range(shards):
        path = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(path, {name: dtype(model[name]) for name in names[shard::shards]})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if card:
        (folder / "README.md").write_text(card)
    return folder


__all__ = [
    "bf16",
    "draw_model",
    "f16",
    "f32",
    "merge_adapter",
    "mix",
    "rename_layers",
    "slerp",
    "tune",
    "write_model",
]
