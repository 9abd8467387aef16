"""What is said of a fine-tune follows from what it did."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import Manifest, make_delta
from deltaweights.changes import describe_changes, grid_of, tally
from deltaweights.entries import BaseTensor, TensorEntry

from ..checkpoints import f32
from ..finetunes import LAYERS, layer_of, llama, moved, write_finetune

FIXTURES = Path(__file__).parent.parent / "fixtures"


def said(entries: tuple[TensorEntry, ...]) -> list[str]:
    return describe_changes(entries, grid_of(entries))


def attention_of_the_last_half(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if "self_attn" in name and layer_of(name) >= LAYERS // 2 else values


def mlp_of_layer_2(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if "mlp" in name and layer_of(name) == 2 else values


def embeddings_and_head(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if name in ("model.embed_tokens.weight", "lm_head.weight") else values


def everything(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values)


def nothing(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (
            attention_of_the_last_half,
            [
                "Attention of layers 3 to 5 changed most.",
                "MLP, norms, embeddings and head are untouched.",
                "Layers 0 to 2 are untouched.",
            ],
        ),
        (
            mlp_of_layer_2,
            [
                "MLP of layer 2 changed most.",
                "Attention, norms, embeddings and head are untouched.",
                "Layers 0, 1 and 3 to 5 are untouched.",
            ],
        ),
        (
            embeddings_and_head,
            ["Embeddings and head changed most.", "Attention, MLP and norms are untouched."],
        ),
        (everything, ["All layers and parts changed about equally."]),
        (nothing, ["No weight changed.", "All tensors are the base's, bit for bit."]),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_where_a_fine_tune_changed(update: object, expected: list[str], tmp_path: Path) -> None:
    base, target = write_finetune(tmp_path, update)  # type: ignore[arg-type]
    found = said(make_delta(base, target, tmp_path / "delta").tensors)
    assert [text for text in found if not re.search(r"% of the weights changed", text)] == expected


def test_the_share_is_that_of_the_elements(tmp_path: Path) -> None:
    def every_tenth(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        new = values.reshape(-1).copy()
        new[::10] *= 2
        return new.reshape(values.shape)

    base, target = write_finetune(tmp_path, every_tenth, convert=f32)
    entries = make_delta(base, target, tmp_path / "delta").tensors
    assert said(entries)[0] == "10% of the weights changed."
    assert tally(entries).changed_share == pytest.approx(0.1, rel=0.01)


def test_a_merged_adapter_is_named_with_its_layers() -> None:
    manifest = Manifest.from_json((FIXTURES / "v1-low-rank" / "delta" / "deltaweights.json").read_bytes())
    merged = [entry for entry in manifest.tensors if entry.prediction]
    one = replace(merged[0], status="changed", changed=1)
    numbered = [replace(one, name=f"model.layers.{n}.mlp.up_proj.weight") for n in range(3)]
    same = replace(
        numbered[0], status="same", changed=0, prediction=None, name="model.layers.3.mlp.up_proj.weight"
    )
    found = said((*numbered, same))
    rank = merged[0].prediction and merged[0].prediction.rank
    assert f"It looks like a merged adapter of rank {rank} on up_proj, in layers 0 to 2." in found
    assert not any("most" in text for text in found)
    assert "Layer 3 is untouched." in found


def entry(name: str, **fields: object) -> TensorEntry:
    """A tensor of 64 elements in BF16, as the base has it."""
    base = BaseTensor(name, "BF16", (8, 8))
    plain = TensorEntry(name, "a.safetensors", "BF16", (8, 8), "same", base, 128, 0, 24)
    return replace(plain, **fields)  # type: ignore[arg-type]


def test_what_is_new_gone_renamed_and_resized_is_told() -> None:
    found = said(
        (
            entry("a"),
            entry("b", status="added", base=None, shared_bytes=0),
            entry("c", status="removed", file=None, base=None, shared_bytes=0),
            entry("d", status="renamed", base=BaseTensor("old", "BF16", (8, 8))),
            entry("e", status="resized", shape=(9, 8)),
        )
    )
    assert "1 tensor is new: b." in found
    assert "1 tensor is gone: c." in found
    assert "1 tensor is renamed: d." in found
    assert "e was resized from 8 x 8 to 9 x 8." in found
    assert not any(re.search(r"\be\b.*untouched", text) for text in found)


def test_hostile_names_stay_short_and_visible() -> None:
    name = "\u202e\x1b[31m" + "x" * 100_000
    found = said((entry(name, status="added", base=None, shared_bytes=0),))
    assert len("".join(found)) < 1000
    assert "\x1b" not in "".join(found)
    assert r"\u202e" in "".join(found)


def test_layers_are_counted_where_they_are_scattered(tmp_path: Path) -> None:
    def odd(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return moved(values) if "mlp" in name and layer_of(name) % 2 else values

    base, target = write_finetune(tmp_path, odd, base=llama(layers=10))
    found = said(make_delta(base, target, tmp_path / "delta").tensors)
    assert "MLP in 5 of 10 layers changed most." in found
