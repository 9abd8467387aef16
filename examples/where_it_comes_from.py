"""Find out which of several models another one was made from, by a sample of their weights.

Run it: python examples/where_it_comes_from.py
It makes a small family of models in a temporary folder, and needs no network. With folders or Hub ids as
arguments, the model in question first, it compares these:

    python examples/where_it_comes_from.py ./model org/base org/other
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaweights import Comparison, compare_models

Model = dict[str, NDArray[np.float32]]


def draw(seed: int, size: float) -> Model:
    """Random weights of that size."""
    rng = np.random.default_rng(seed)
    return {f"layers.{k}.weight": rng.normal(0, size, (256, 256)).astype(np.float32) for k in range(8)}


def add(model: Model, update: Model) -> Model:
    """The model with an update, as a training leaves it."""
    return {name: weights + update[name] for name, weights in model.items()}


def save(folder: Path, model: Model) -> Path:
    """The model as a folder with one safetensors file, written by hand."""
    header, offset = {}, 0
    for name, weights in model.items():
        end = offset + weights.nbytes
        header[name] = {"dtype": "F32", "shape": weights.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    folder.mkdir()
    data = b"".join(weights.astype("<f4").tobytes() for weights in model.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def show(found: Comparison) -> None:
    """The verdicts, and why."""
    print(f"{found.model}: {found.sampled_bytes:,} of {found.model_bytes:,} bytes were compared")
    for one in found.candidates:
        print(f"  {one.name}: {one.verdict}")
        for reason in one.reasons:
            print(f"    {reason}")


def main() -> None:
    if sys.argv[2:]:
        show(compare_models(sys.argv[1], sys.argv[2:]))
        return
    with tempfile.TemporaryDirectory() as place:
        base = draw(0, 0.02)
        first, second = add(base, draw(1, 0.001)), add(base, draw(2, 0.001))
        models: dict[str, Model] = {
            "base": base,
            "first": first,
            "second": second,
            "mixed": {name: (first[name] + second[name]) * np.float32(0.5) for name in base},
            "stranger": draw(3, 0.02),
        }
        folders = {name: save(Path(place, name), model) for name, model in models.items()}
        show(compare_models(folders["first"], [folders[name] for name in ("base", "second", "stranger")]))
        show(compare_models(folders["mixed"], [folders["first"], folders["second"]]))


if __name__ == "__main__":
    main()
