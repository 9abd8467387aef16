"""A writer and a reader of updates on disk (slime, miles, stitch), made from the format's description alone.

It never imports deltaweights: tests compare the two. docs/disk-updates.md has the description. The frozen
fixtures were written with

    python -m tests.engines.independent_disk_updates tests/fixtures/disk-updates
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

ENCODINGS = ("xor", "overwrite")
CHECKSUMS = ("xxh3-128", "adler32", "blake3")


class Stored(NamedTuple):
    """A tensor: its dtype's code, its shape, its bytes."""

    dtype: str
    shape: list[int]
    data: bytes


Tensors = Mapping[str, Stored]


def checksum(kind: str, data: bytes) -> str:
    if kind == "xxh3-128":
        return xxhash.xxh3_128(data).hexdigest()
    if kind == "adler32":
        return format(zlib.adler32(data), "08x")
    assert kind == "blake3"
    import blake3

    return str(blake3.blake3(data).hexdigest())


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(data)


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        found[name] = Stored(info["dtype"], info["shape"], blob[8 + length + start : 8 + length + end])
    return found, metadata


def encode(encoding: str, old: bytes, new: bytes) -> bytes:
    """A frame that leads from the old bytes to the new ones."""
    if encoding == "xor":
        raw = bytes(a ^ b for a, b in zip(old, new, strict=True))
    else:
        places = [place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        values = bytes(new[place] for place in places)
        raw = struct.pack(f"<{1 + len(places)}I", len(places), *places) + values
    return zstandard.ZstdCompressor(level=1).compress(raw)


def decode(encoding: str, frame: bytes, old: bytes) -> bytes:
    """The new bytes."""
    raw = zstandard.ZstdDecompressor().decompress(frame)
    if encoding == "xor":
        return bytes(a ^ b for a, b in zip(old, raw, strict=True))
    (count,) = struct.unpack_from("<I", raw)
    new, values = bytearray(old), raw[4 + 4 * count :]
    assert len(values) == count
    for place, value in zip(struct.unpack_from(f"<{count}I", raw, 4), values, strict=True):
        new[place] = value
    return bytes(new)


def folder_of(directory: Path, version: int) -> Path:
    return directory / f"weight_v{version:06d}"


def write_index(folder: Path, metadata: Mapping[str, object], files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = {"metadata": metadata, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_update(
    directory: Path,
    version: int,
    old: Tensors,
    new: Tensors,
    encoding: str = "xor",
    kind: str = "xxh3-128",
    ranks: int = 1,
) -> Path:
    """Write a version, as so many ranks do: those that have nothing write no shard. Returns its folder."""
    changed = [name for name in new if new[name].data != old[name].data]
    parts = [part for part in (changed[rank::ranks] for rank in range(ranks)) if part]
    folder, files = folder_of(directory, version), dict[str, str]()
    for number, part in enumerate(parts):
        frames, digests = {}, {}
        for name in part:
            frame = encode(encoding, old[name].data, new[name].data)
            frames[name] = Stored("U8", [len(frame)], frame)
            digests[name] = checksum(kind, new[name].data)
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, frames, digests)
        files |= dict.fromkeys(part, file)
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": kind,
    }
    write_index(folder, metadata, files)
    return folder


def write_checkpoint(directory: Path, version: int, tensors: Tensors) -> Path:
    """Write a version as a full checkpoint in two shards. Returns its folder."""
    folder, files = folder_of(directory, version), dict[str, str]()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    total = sum(len(tensor.data) for tensor in tensors.values())
    write_index(folder, {"total_size": total}, files)
    return folder


def read_version(directory: Path, version: int, old: Tensors) -> dict[str, Stored]:
    """The state of a version, from that of the one before."""
    folder = folder_of(directory, version)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    metadata, files = index["metadata"], index["weight_map"]
    there = {path.name for path in folder.glob("*.safetensors")}
    assert there == set(files.values())
    if "delta_encoding" not in metadata:
        found = dict[str, Stored]()
        for file in there:
            found |= read_safetensors(folder / file)[0]
        return found
    assert metadata["version"] == f"{version:06d}"
    assert metadata["base_version"] == f"{version - 1:06d}"
    assert metadata["compression_format"] == "zstd"
    new, mapped = dict(old), {}
    for number, file in enumerate(sorted(there)):
        assert file == f"model-{number:05d}-of-{len(there):05d}.safetensors"
        frames, digests = read_safetensors(folder / file)
        assert digests.keys() == frames.keys()
        for name, frame in frames.items():
            assert (frame.dtype, frame.shape) == ("U8", [len(frame.data)])
            parameters = zstandard.get_frame_parameters(frame.data)
            assert not parameters.dict_id
            assert not parameters.has_checksum
            data = decode(metadata["delta_encoding"], frame.data, old[name].data)
            assert digests[name] == checksum(metadata["checksum_format"], data)
            new[name] = old[name]._replace(data=data)
            mapped[name] = file
    assert mapped == files
    return new


# Fixtures --------------------------------------------------------------------------------------------------

#: dtype, shape and size of an element of each tensor: floats of all sizes, integers, one of nothing.
_TENSORS = {
    "embed.weight": ("BF16", [9, 7], 2),
    "layers.0.scale": ("F32", [], 4),
    "layers.0.weight": ("F8_E4M3", [5, 3], 1),
    "layers.1.weight": ("F16", [4, 4], 2),
    "mask": ("BOOL", [3], 1),
    "nothing": ("F32", [0, 7], 4),
    "steps": ("I64", [2], 8),
}


def first_state(seed: int = 0) -> dict[str, Stored]:
    """The state of version 0: any bits, NaNs and -0.0 among them."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, (dtype, shape, itemsize) in _TENSORS.items():
        count = int(np.prod(shape))
        data = (
            rng.integers(0, 2, count).astype(np.uint8).tobytes()
            if dtype == "BOOL"
            else rng.bytes(count * itemsize)
        )
        state[name] = Stored(dtype, shape, data)
    return _with(state, "embed.weight", 0, bytes.fromhex("c17f 0080 ffff"))


def _with(state: Tensors, name: str, start: int, data: bytes) -> dict[str, Stored]:
    old = state[name].data
    return {**state, name: state[name]._replace(data=old[:start] + data + old[start + len(data) :])}


def next_states() -> list[dict[str, Stored]]:
    """The states of versions 0 to 5: two NaNs change their bits, zeros their signs; in version 3 nothing
    changes."""
    states = [first_state()]
    one = _with(states[-1], "embed.weight", 0, bytes.fromhex("c27f 0000 fffe"))
    for name, (_, shape, _) in _TENSORS.items():
        if name != "mask" and shape != [0, 7]:
            one = _with(one, name, len(one[name].data) - 1, bytes([one[name].data[-1] ^ 0x5A]))
    states.append(one)
    states.append(_with(_with(one, "layers.1.weight", 3, b"\x00\x80"), "mask", 0, b"\x01\x01\x00"))
    states.append(dict(states[-1]))
    states.append(first_state(1))
    states.append(_with(states[-1], "steps", 0, bytes(16)))
    return states


def write_fixtures(root: Path) -> None:
    """Write each combination: versions 1 to 5, of which the fourth is a full checkpoint, by two ranks."""
    states = next_states()
    write_safetensors(root / "base" / "model.safetensors", states[0], {"format": "pt"})
    for encoding in ENCODINGS:
        for kind in CHECKSUMS:
            directory = root / f"{encoding}-{kind}"
            for version, (old, new) in enumerate(pairwise(states), 1):
                if version == 4:
                    write_checkpoint(directory, version, new)
                else:
                    write_update(directory, version, old, new, encoding, kind, ranks=2)
    digests = [
        {name: hashlib.sha256(tensor.data).hexdigest() for name, tensor in state.items()} for state in states
    ]
    (root / "states.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    write_fixtures(Path(sys.argv[1]))
