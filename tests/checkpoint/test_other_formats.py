"""Weights in other formats, given as base or target: what they are, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaweights import CheckpointError, make_delta
from deltaweights.checkpoint import open_checkpoint

from ..checkpoints import bf16, weights, write_safetensors

ADVICE = {
    "model-q4.gguf": ("GGUF", "safetensors checkpoint that it was converted from"),
    "pytorch_model.bin": ("pickle", "save_pretrained(NEW, safe_serialization=True)"),
    "consolidated.00.pth": ("pickle", "safetensors.torch.save_file"),
    "model.pt": ("pickle", "safetensors.torch.save_file"),
    "last.ckpt": ("Lightning", "safetensors.torch.save_file"),
    "tf_model.h5": ("HDF5", "from_tf=True"),
    "flax_model.msgpack": ("Flax", "from_flax=True"),
    "model.onnx": ("ONNX", "safetensors checkpoint that it was exported from"),
    "weights.npz": ("NumPy", "safetensors.numpy.save_file"),
}


@pytest.mark.parametrize("name", ADVICE)
@pytest.mark.parametrize("side", ["base", "target"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_other_formats_get_advice_that_fits(name: str, side: str, is_folder: bool, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "good" / "m.safetensors", {"a": bf16(weights((4,), 1))})
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / name).write_bytes(b"GGUF....")
    (folder / "config.json").write_text("{}")
    other = folder if is_folder else folder / name
    pair = (other, tmp_path / "good") if side == "base" else (tmp_path / "good", other)
    with pytest.raises(CheckpointError) as caught:
        make_delta(*pair, tmp_path / "delta")
    assert caught.value.what == f"{other} {'holds' if is_folder else 'is'} no .safetensors file"
    kind, fix = ADVICE[name]
    assert name in caught.value.why
    assert kind in caught.value.why
    assert fix in caught.value.fix


def test_several_files_are_counted_and_those_of_trainers_are_not_weights(tmp_path: Path) -> None:
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin and 1 more"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["training_args.bin", "config.json", "optimizer.pt"])
def test_a_folder_without_weights_is_told_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.fix.startswith("Check the path")


def test_what_stands_beside_safetensors_files_is_no_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": bf16(weights((4,), 1))})
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.shards) == ["m.safetensors"]
