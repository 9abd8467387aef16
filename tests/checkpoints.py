"""Small made-up checkpoints, written byte by byte, so that tests control every bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaweights.dtypes import DTYPE_BITS
from deltaweights.manifest import Manifest


@dataclass(frozen=True)
class Array:
    """A tensor for a test: dtype code, shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random bits: every NaN payload, infinity and subnormal may occur."""
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    return Array(dtype, shape, np.random.default_rng(seed).bytes(nbytes))


def weights(shape: tuple[int, ...], seed: int = 0, std: float = 0.02) -> NDArray[np.float32]:
    """Normally distributed, like a trained layer's."""
    return (np.random.default_rng(seed).standard_normal(shape) * std).astype(np.float32)


def bf16(values: NDArray[np.float32]) -> Array:
    """The values as BF16, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return Array("BF16", values.shape, rounded.astype("<u2").tobytes())


def f32(values: NDArray[np.float32]) -> Array:
    """The values as F32."""
    return Array("F32", values.shape, values.astype("<f4").tobytes())


def safetensors_bytes(
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    *,
    padding: str = "",
    indent: int | None = None,
) -> bytes:
    """A .safetensors file with the tensors in this order; white space as asked, which is legal."""
    fields: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        end = offset + len(array.data)
        fields[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = (json.dumps(fields, indent=indent, ensure_ascii=False) + padding).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(a.data for a in tensors.values())


def write_safetensors(path: Path, tensors: Mapping[str, Array], **options: object) -> None:
    """:func:`safetensors_bytes` into a file; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, **options))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path, but for the license texts that apply puts beside it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder / ".deltaweights" / "licenses"
    }


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by relative path."""
    return {path: hashlib.sha256(data).hexdigest() for path, data in contents(folder).items()}


class Place(NamedTuple):
    """Where a payload is: the delta shard, the tensor's name, and the first byte and the end in the file."""

    path: Path
    name: str
    start: int
    end: int


def payload_places(delta: Path) -> list[Place]:
    """All payloads of a delta that has them in a row."""
    manifest = Manifest.from_json((delta / "deltaweights.json").read_bytes())
    places = []
    for file in manifest.target.files:
        if file.stored == "tensors":
            path = delta / file.source
            with open(path, "rb") as shard:
                end = 8 + int.from_bytes(shard.read(8), "little")
            for entry in manifest.tensors:
                if entry.file == file.path:
                    start, end = end, end + entry.payload_bytes
                    places.append(Place(path, entry.name, start, end))
            assert end == path.stat().st_size
    return places


def write_pair(folder: Path) -> tuple[Path, Path]:
    """A base and a target in which every status occurs, sharded differently, with other files.

    Returns:
        The two folders. The target is about 1 MB; its largest tensors take several chunks of 64 KiB.
    """
    base, target = folder / "base", folder / "target"
    layers = [weights((300, 200), seed) for seed in range(4)]
    moved = [w + weights(w.shape, 10 + k, 2e-4) for k, w in enumerate(layers)]
    embed = weights((400, 64), 20)
    old = {f"model.layers.{k}.weight": bf16(w) for k, w in enumerate(layers)}
    old |= {
        "model.embed": bf16(embed),
        "model.scalar": f32(weights((), 21)),
        "model.empty": f32(weights((0, 4), 22)),
        "model.wide": f32(weights((100, 100), 23)),
        "model.gone": bf16(weights((7,), 24)),
        "vision.a.weight": bf16(weights((20, 3), 25)),
        "vision.a.bias": bf16(weights((20,), 26)),
    }
    new = {f"model.layers.{k}.weight": bf16(w) for k, w in enumerate(moved)}
    new["model.layers.2.weight"] = old["model.layers.2.weight"]
    new |= {
        "model.embed": bf16(np.concatenate([embed, weights((24, 64), 27)])),
        "model.scalar": old["model.scalar"],
        "model.empty": old["model.empty"],
        "model.wide": bf16(weights((100, 100), 23)),
        "lm_head": old["model.embed"],
        "model.added": bf16(weights((33, 5), 28)),
        "tower.a.weight": bf16(weights((20, 3), 25) + weights((20, 3), 29, 1e-3)),
        "tower.a.bias": bf16(weights((20,), 26)),
        "ema.layers.1.weight": bf16(moved[1]),
    }
    names = list(old)
    write_safetensors(base / "model-00001-of-00002.safetensors", {n: old[n] for n in names[:5]})
    write_safetensors(base / "model-00002-of-00002.safetensors", {n: old[n] for n in names[5:]})
    names = list(new)
    shards = [names[::3], names[1::3], names[2::3]]
    for k, shard in enumerate(shards):
        path = target / f"model-{k + 1:05d}-of-00003.safetensors"
        write_safetensors(path, {n: new[n] for n in shard}, metadata={"format": "pt"})
    index = {n: f"model-{k + 1:05d}-of-00003.safetensors" for k, s in enumerate(shards) for n in s}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# Base\n"
    (base / "README.md").write_text(card)
    (base / "LICENSE").write_text("Qwen LICENSE AGREEMENT (made up for tests)\n")
    for side in (base, target):
        (side / "config.json").write_text('{"model_type": "qwen2"}')
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "vocab.json").write_text(json.dumps(list(range(30_000))))
    (target / "notes.txt").write_text("ours\n")
    return base, target
