"""Copies of the base with 8 bits are found by their scales, whatever these are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import apply_delta, make_delta
from deltaweights.codec import quantize

from ..checkpoints import Array, bf16, contents, f32, weights, write_safetensors

ROWS, COLUMNS = 256, 384
Floats = NDArray[np.float32]


def held(values: Floats) -> Floats:
    """What BF16 holds of them."""
    return (np.frombuffer(bf16(values).data, "<u2").astype("<u4") << 16).view("<f4").reshape(values.shape)


def largest(values: Floats, *axes: int) -> Floats:
    return np.asarray(np.abs(values).max(axis=axes, keepdims=True), np.float32)


def by_tensor(values: Floats) -> tuple[str, Floats, Array]:
    scale = np.float32(np.abs(values).max() / 448)
    return "F8_E4M3", values / scale, f32(np.full((1,), scale))


def by_inverse(values: Floats) -> tuple[str, Floats, Array]:
    scale = np.float32(np.abs(values).max() / 448)
    return "F8_E4M3", values / scale, f32(np.full((), 1 / scale, np.float32))


def by_row(values: Floats) -> tuple[str, Floats, Array]:
    scales = held(largest(values, 1) / np.float32(448))
    return "F8_E4M3", values / scales, bf16(scales)


def by_block(values: Floats) -> tuple[str, Floats, Array]:
    blocks = values.reshape(ROWS // 128, 128, COLUMNS // 128, 128)
    scales = largest(blocks, 1, 3) / np.float32(448)
    return "F8_E5M2", (blocks / scales).reshape(values.shape), f32(scales.reshape(2, 3))


def by_absmax(values: Floats) -> tuple[str, Floats, Array]:
    """As bitsandbytes does it."""
    return "I8", values * np.float32(127) / largest(values, 1), f32(largest(values, 1).reshape(-1))


def by_column(values: Floats) -> tuple[str, Floats, Array]:
    scales = largest(values, 0) / np.float32(127)
    return "I8", values / scales, f32(scales)


WAYS: list[Callable[[Floats], tuple[str, Floats, Array]]] = [
    *(by_tensor, by_inverse, by_row),
    *(by_block, by_absmax, by_column),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["weight_scale", "qdata.s"])
def test_a_quantized_copy_takes_little(
    way: Callable[[Floats], tuple[str, Floats, Array]], name: str, tmp_path: Path
) -> None:
    base, target = {}, {}
    for layer in range(2):
        values = held(weights((ROWS, COLUMNS), layer))
        dtype, divided, scales = way(values)
        base[f"layers.{layer}.q.weight"] = bf16(values)
        data = quantize(divided.astype(np.float32), dtype).tobytes()
        target[f"layers.{layer}.q.weight"] = Array(dtype, values.shape, data)
        target[f"layers.{layer}.q.{name}"] = scales
    write_safetensors(tmp_path / "base" / "m.safetensors", base)
    write_safetensors(tmp_path / "target" / "m.safetensors", target)
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    weight = next(entry for entry in manifest.tensors if entry.name == "layers.0.q.weight")
    assert weight.prediction
    assert weight.status == "changed"
    assert weight.payload_bytes < ROWS * COLUMNS // 20
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "target")


def test_experts_may_have_a_scale_each(tmp_path: Path) -> None:
    values = held(weights((4, 64, 128), 1) * np.array([1, 2, 3, 4], np.float32)[:, None, None])
    scales = largest(values, 1, 2) / np.float32(448)
    data = quantize((values / scales).astype(np.float32), "F8_E4M3").tobytes()
    write_safetensors(tmp_path / "base" / "m.safetensors", {"experts.up": bf16(values)})
    target = {"experts.up": Array("F8_E4M3", values.shape, data), "experts.up_scale": f32(scales.reshape(4))}
    write_safetensors(tmp_path / "target" / "m.safetensors", target)
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert manifest.tensors[0].payload_bytes < values.size // 50


def test_what_the_base_does_not_predict_is_left_alone(tmp_path: Path) -> None:
    """Another model's weights, and integers that are no weights."""
    values = held(weights((ROWS, COLUMNS), 1))
    write_safetensors(tmp_path / "base" / "m.safetensors", {"a.weight": bf16(values), "b": bf16(values)})
    other = weights((ROWS, COLUMNS), 2)
    target = {
        "a.weight": Array("F8_E4M3", values.shape, quantize(other / np.float32(1e-4), "F8_E4M3").tobytes()),
        "a.weight_scale": f32(np.full((1,), 1e-4, np.float32)),
        "b": Array("I8", values.shape, np.random.default_rng(0).bytes(values.size)),
        "b_scale": f32(np.array([np.nan, np.inf, 0, 1], np.float32)),
    }
    write_safetensors(tmp_path / "target" / "m.safetensors", target)
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert not any(entry.prediction for entry in manifest.tensors)
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "target")


@pytest.mark.parametrize("way", [by_tensor, by_row, by_block, by_absmax])
def test_a_copy_of_fused_tensors_takes_little(
    way: Callable[[Floats], tuple[str, Floats, Array]], tmp_path: Path
) -> None:
    """Its parts are found though its scales are others."""
    base, target = {}, {}
    for layer in range(2):
        parts = [held(weights((rows, COLUMNS), 10 * layer + k)) for k, rows in enumerate((128, 64, 64))]
        dtype, divided, scales = way(np.concatenate(parts))
        for name, part in zip("qkv", parts, strict=True):
            base[f"layers.{layer}.{name}.weight"] = bf16(part)
        data = quantize(divided.astype(np.float32), dtype).tobytes()
        target[f"layers.{layer}.qkv.weight"] = Array(dtype, (ROWS, COLUMNS), data)
        target[f"layers.{layer}.qkv.weight_scale"] = scales
    write_safetensors(tmp_path / "base" / "m.safetensors", base)
    write_safetensors(tmp_path / "target" / "m.safetensors", target)
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    fused = [entry for entry in manifest.tensors if entry.name.endswith("qkv.weight")]
    assert [entry.status for entry in fused] == ["rearranged", "rearranged"]
    assert all(entry.prediction and entry.payload_bytes < ROWS * COLUMNS // 20 for entry in fused)
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "target")


def test_a_copy_of_what_was_trained_far_from_fused_tensors_comes_back(tmp_path: Path) -> None:
    """Its parts are found, but the base does not predict it: it is coded by itself."""
    parts = [held(weights((128, COLUMNS), k)) for k in range(2)]
    dtype, divided, scales = by_row(np.concatenate(parts) + weights((ROWS, COLUMNS), 9, 4e-3))
    data = quantize(divided.astype(np.float32), dtype).tobytes()
    target = {"ab.weight": Array(dtype, (ROWS, COLUMNS), data), "ab.weight_scale": scales}
    write_safetensors(
        tmp_path / "base" / "m.safetensors", {"a.weight": bf16(parts[0]), "b.weight": bf16(parts[1])}
    )
    write_safetensors(tmp_path / "target" / "m.safetensors", target)
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "target")
