"""Weights in files of other formats: what they are, and how to get safetensors files instead."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

_FROM_PYTORCH = (
    "PyTorch's weights, in pickle files",
    "Load them with transformers and save the model with `save_pretrained(NEW, safe_serialization=True)`, or "
    "save the state dict with safetensors.torch.save_file.",
)
_FROM_THE_SOURCE = (
    "Pass the safetensors checkpoint that it was {} from; on the Hub, its card mostly names it."
)

#: For the end of a file's name: what is in it, and what to do.
_FORMATS: dict[str, tuple[str, str]] = {
    ".gguf": (
        "GGUF, weights that were converted and mostly quantized",
        _FROM_THE_SOURCE.format("converted"),
    ),
    ".bin": _FROM_PYTORCH,
    ".pt": _FROM_PYTORCH,
    ".pth": _FROM_PYTORCH,
    ".ckpt": (
        "a checkpoint of PyTorch Lightning or TensorFlow, with more than weights in it",
        "Load it with what wrote it, and save the model with `save_pretrained(NEW, safe_serialization=True)` "
        "or its state dict with safetensors.torch.save_file.",
    ),
    ".h5": (
        "TensorFlow's or Keras's weights, in an HDF5 file",
        "Load it with Keras or an older transformers (from_tf=True), and save the weights as safetensors.",
    ),
    ".msgpack": (
        "Flax's weights",
        "Load it with Flax or an older transformers (from_flax=True), and save the weights as safetensors.",
    ),
    ".onnx": ("ONNX, a graph for inference", _FROM_THE_SOURCE.format("exported")),
    ".npz": (
        "weights of NumPy or MLX",
        "Load them, and save them with safetensors.numpy.save_file.",
    ),
}

_USUAL = (
    "deltaweights compares safetensors checkpoints.",
    "Check the path; other formats have to be converted first, for example with save_pretrained(...) of "
    "transformers.",
)


def advice(paths: Collection[str]) -> tuple[str, str]:
    """Why a checkpoint with these files and no safetensors file is not read, and what to do."""
    for ending, told in _FORMATS.items():
        found = sorted(path for path in paths if path.lower().endswith(ending) and _has_weights(path))
        if found:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            return f"{found[0]}{more}: {told[0]}.", told[1]
    return _USUAL


def is_weights(path: str) -> bool:
    """Whether a file has weights in one of these formats, by its name."""
    return path.lower().endswith(tuple(_FORMATS))


def _has_weights(path: str) -> bool:
    """Whether a file is one of the model's, by its name: trainers have their own."""
    return not PurePosixPath(path).name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))
