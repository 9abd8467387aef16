"""Small models with the names of Llama, and fine-tunes of them in which it is known what moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Array, bf16, weights, write_safetensors

LAYERS, HIDDEN, FFN, VOCAB = 6, 64, 160, 300

#: A tensor's name and values, to those of the fine-tune.
Update = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


def llama(layers: int = LAYERS) -> dict[str, NDArray[np.float32]]:
    """The weights of a model, by name."""
    shapes = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    every: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    every |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}
    every |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: weights(shape, seed) for seed, (name, shape) in enumerate(every.items())}


def moved(values: NDArray[np.float32], std: float = 1e-3, seed: int = 7) -> NDArray[np.float32]:
    """The values, each moved a little."""
    return values + weights(values.shape, seed + values.size, std)


def write_finetune(
    folder: Path,
    update: Update,
    *,
    base: Mapping[str, NDArray[np.float32]] | None = None,
    convert: Callable[[NDArray[np.float32]], Array] = bf16,
) -> tuple[Path, Path]:
    """Write the base and its fine-tune to two folders below ``folder``, and return these."""
    old = llama() if base is None else base
    new = {name: update(name, values) for name, values in old.items()}
    for side, tensors in (("base", old), ("target", new)):
        arrays = {name: convert(values) for name, values in tensors.items()}
        write_safetensors(folder / side / "model.safetensors", arrays)
        (folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder / "base", folder / "target"


def layer_of(name: str) -> int:
    """The number of a tensor's layer; -1 outside of layers."""
    return int(name.split(".")[2]) if ".layers." in name else -1
