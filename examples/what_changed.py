"""What did a fine-tune change? Three fine-tunes of one base, and what their deltas tell.

One moved the attention of the last layers, one taught the embedding two new tokens, and one merged an adapter
of rank 4 into every MLP. Each delta is reported with the base; then they are compared side by side.

    python examples/what_changed.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from deltaweights import make_delta, report_delta, report_side_by_side

LAYERS, HIDDEN, VOCAB = 6, 512, 1000


def base_model(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A small model with the usual names."""
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = (HIDDEN, HIDDEN)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in tensors.items()}


def attention_of_the_last_layers(name: str, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Full training, of some matrices."""
    if not any(f"layers.{layer}.self_attn" in name for layer in range(LAYERS // 2, LAYERS)):
        return weight
    return weight + rng.normal(0, 1e-3, weight.shape)


def two_tokens(name: str, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two rows of the embedding."""
    if "embed" not in name:
        return weight
    new = weight.copy()
    new[[7, 999]] += rng.normal(0, 0.05, (2, HIDDEN))
    return new


def merged_adapter(name: str, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An update of rank 4."""
    if "mlp" not in name:
        return weight
    return weight + rng.normal(0, 0.02, (HIDDEN, 4)) @ rng.normal(0, 0.02, (4, HIDDEN))


def main() -> None:
    rng = np.random.default_rng(0)
    base = base_model(rng)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "base").mkdir()
        save_file(base, folder / "base" / "model.safetensors")
        deltas = []
        for update in (attention_of_the_last_layers, two_tokens, merged_adapter):
            name = update.__name__
            (folder / name).mkdir()
            tuned = {
                tensor: update(tensor, weight, rng).astype(np.float32) for tensor, weight in base.items()
            }
            save_file(tuned, folder / name / "model.safetensors")
            deltas.append(folder / f"{name}-delta")
            make_delta(folder / "base", folder / name, deltas[-1], target_repo=f"example/{name}")
            report = report_delta(deltas[-1], base=folder / "base")
            print(f"\n{name}:", *report.sentences, sep="\n  ")
            print(f"  (a page of {len(report.html()):,} bytes, a picture of {len(report.svg()):,})")
        together = report_side_by_side(deltas, base=folder / "base")
        print("\nside by side:", *together.sentences, sep="\n  ")


if __name__ == "__main__":
    main()
