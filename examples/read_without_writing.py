"""Read a fine-tune's tensors straight from base and delta: no files are written, torch is not needed.

Run it: python examples/read_without_writing.py
It works in a temporary folder and needs no network.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaweights import TensorView, make_delta, open_target


def to_numpy(tensor: TensorView) -> NDArray[np.generic]:
    """The tensor as a NumPy array in its own shape; BF16 becomes float32, which holds it exactly."""
    if tensor.dtype == "BF16":
        bits = tensor.data.view("<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    return tensor.numpy()


def make_pair(folder: Path) -> None:
    """A base and a target of two BF16 tensors each, as safetensors files written by hand."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, (256, 256)).astype(np.float32)
    bias = np.zeros(256, np.float32)
    header = json.dumps(
        {
            "bias": {"dtype": "BF16", "shape": [256], "data_offsets": [0, 512]},
            "weight": {"dtype": "BF16", "shape": [256, 256], "data_offsets": [512, 512 + weights.size * 2]},
        }
    ).encode()
    for side, values in {"base": weights, "tuned": weights * np.float32(1.01)}.items():
        data = b"".join((array.view(np.uint32) >> 16).astype("<u2").tobytes() for array in (bias, values))
        (folder / side).mkdir()
        (folder / side / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pair(folder)
        make_delta(folder / "base", folder / "tuned", folder / "delta")

        with open_target(folder / "delta", folder / "base") as target:
            for key in target:  # names, dtypes and shapes cost nothing: they come from the manifest
                print(f"{key:8} {target.dtype(key)} {target.shape(key)}")
            weight = to_numpy(target["weight"])  # this one tensor is decoded, now
            print(f"weight   as {weight.dtype}: standard deviation {weight.std():.4f}")
        print(f"in the folder: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
