"""A second reader of deltas, written from docs/format.md alone; it shares no code with the library.

It holds the document to its promise, so it stays plain: whole files in memory, one check after the other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

Fields = dict[str, Any]

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= dict.fromkeys(["I16", "U16", "F16", "BF16"], 16)
BITS |= dict.fromkeys(["I32", "U32", "F32"], 32)
BITS |= dict.fromkeys(["I64", "U64", "F64", "C64"], 64)

FIELDS = {
    "manifest": {
        *("format", "format_version", "tool", "chunk_bytes"),
        *("base", "target", "tensors", "files", "checksum"),
    },
    "tool": {"name", "version"},
    "file": {"path", "size", "sha256"},
    "base": {"repo_id", "revision", "license", "files"},
    "target": {"repo_id", "revision", "license", "files", "left_out"},
    "target file": {"path", "size", "sha256", "stored", "source"},
    "license": {"id", "name", "link", "files", "obligations"},
    "tensor": {
        *("name", "file", "dtype", "shape", "status", "base"),
        *("shared_bytes", "changed", "payload_bytes"),
    },
    "base tensor": {"name", "dtype", "shape", "file"},
}


class BadDeltaError(Exception):
    """The delta, or the base, is not what the document allows."""


def need(condition: object, why: str) -> None:
    """Refuse the delta unless ``condition`` holds."""
    if not condition:
        raise BadDeltaError(why)


class BaseTensor(NamedTuple):
    """A tensor of the base: where it is, and its bytes."""

    file: str
    dtype: str
    shape: list[int]
    data: bytes


def rebuild(delta: Path, base: Path, out: Path) -> None:
    """Write the target of ``delta`` and ``base`` into the new folder ``out``."""
    manifest = read_manifest(delta)
    for record in manifest["files"]:
        need((delta / record["path"]).stat().st_size == record["size"], f"{record['path']}: size")
    tensors = read_base(base)
    for file in manifest["target"]["files"]:
        source = file["source"]
        if file["stored"] == "tensors":
            data = rebuild_shard((delta / source).read_bytes(), file, manifest, tensors)
        elif file["stored"] == "base":
            data = (base / source).read_bytes()
        elif file["stored"] == "zstd":
            data = decompress_file((delta / source).read_bytes(), file["size"])
        else:
            need(file["stored"] == "verbatim", f"stored as {file['stored']}")
            data = (delta / source).read_bytes()
        need(len(data) == file["size"], f"{file['path']}: size")
        need(hashlib.sha256(data).hexdigest() == file["sha256"], f"{file['path']}: SHA-256")
        path = out / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# The manifest


def read_manifest(delta: Path) -> Fields:
    """``deltaweights.json``, checked by the document's rules."""
    data = (delta / "deltaweights.json").read_bytes()
    need(len(data) <= 1 << 28, "manifest: size")
    manifest: Fields = json.loads(data)
    need(manifest["format"] == "deltaweights" and manifest["format_version"] == 1, "manifest: version")
    need(canonical(manifest).encode() + b"\n" == data, "manifest: canonical form")
    emptied, count = re.subn(rb'("checksum":")[0-9a-f]{64}', rb"\1", data)
    need(count == 1 and hashlib.sha256(emptied).hexdigest() == manifest["checksum"], "manifest: checksum")
    check_fields(manifest)
    own = check_paths([record["path"] for record in manifest["files"]])
    need(not own & {"deltaweights.json", "README.md"}, "manifest: lists itself")
    check_paths([file["path"] for file in manifest["target"]["files"]])
    in_base = {(file["path"], file["size"], file["sha256"]) for file in manifest["base"]["files"]}
    shards = set()
    for file in manifest["target"]["files"]:
        if file["stored"] == "base":
            need((file["source"], file["size"], file["sha256"]) in in_base, f"{file['path']}: source")
        else:
            need(file["source"] in own, f"{file['path']}: source")
        if file["stored"] == "tensors":
            shards.add(file["path"])
    for side in ("base", "target"):
        need({text["path"] for text in manifest[side]["license"]["files"]} <= own, "manifest: license texts")
    seen: set[tuple[str, str]] = set()
    for entry in manifest["tensors"]:
        need((entry["file"] is None) == (entry["status"] == "removed"), f"{entry['name']}: status")
        need(entry["base"] or not entry["shared_bytes"], f"{entry['name']}: base")
        if entry["file"] is not None:
            need(entry["file"] in shards, f"{entry['name']}: file")
            need((entry["file"], entry["name"]) not in seen, f"{entry['name']}: twice")
            seen.add((entry["file"], entry["name"]))
    return manifest


def canonical(value: Any) -> str:
    """The canonical form of a JSON value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
        return '"' + "".join(short.get(c) or (c if c >= " " else f"\\u{ord(c):04x}") for c in value) + '"'
    need(value is None or type(value) is int, f"manifest: {value!r}")
    return "null" if value is None else str(value)


def check_fields(manifest: Fields) -> None:
    """Every object has the fields of its kind, no more and no fewer."""
    objects = [("manifest", manifest), ("tool", manifest["tool"])]
    objects += [("base", manifest["base"]), ("target", manifest["target"])]
    objects += [("license", manifest[side]["license"]) for side in ("base", "target")]
    objects += [("file", record) for record in manifest["files"] + manifest["base"]["files"]]
    objects += [("file", text) for side in ("base", "target") for text in manifest[side]["license"]["files"]]
    objects += [("target file", file) for file in manifest["target"]["files"]]
    objects += [("tensor", entry) for entry in manifest["tensors"]]
    objects += [("base tensor", entry["base"]) for entry in manifest["tensors"] if entry["base"]]
    for kind, value in objects:
        need(set(value) == FIELDS[kind], f"manifest: fields of {kind}")
    need(manifest["chunk_bytes"] in range(4096, 4194304 + 1, 4096), "manifest: chunk_bytes")


def check_paths(paths: list[str]) -> set[str]:
    """The paths, if all are safe and fit together."""
    for path in paths:
        for part in path.split("/"):
            need(part not in ("", ".", "..") and part.lower() not in (".git", ".deltaweights"), repr(path))
            need(len(part.encode()) <= 255, repr(path))
        need(not re.search(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:", path), repr(path))
    folders = {path[:k] for path in paths for k, c in enumerate(path) if c == "/"}
    need(len(set(paths)) == len(paths) and not folders & set(paths), "paths that clash")
    return set(paths)


# safetensors


def parse_header(raw: bytes, file_size: int) -> tuple[Fields, dict[str, str], int]:
    """The tensors (in the order of their bytes), the metadata and where the data starts."""
    length = 8 + int.from_bytes(raw[:8], "little")
    need(len(raw) >= length, "header: length")

    def unique(pairs: list[tuple[str, Any]]) -> Fields:
        need(len(dict(pairs)) == len(pairs), "header: a name twice")
        return dict(pairs)

    fields = json.loads(raw[8:length], object_pairs_hook=unique)
    metadata = fields.pop("__metadata__", {})
    tensors = dict(sorted(fields.items(), key=lambda item: item[1]["data_offsets"]))
    end = 0
    for name, tensor in tensors.items():
        start, stop = tensor["data_offsets"]
        need(start == end <= stop, f"{name}: offsets")
        if bits := BITS.get(tensor["dtype"]):
            need(int(np.prod(tensor["shape"], dtype=object)) * bits == (stop - start) * 8, f"{name}: size")
        end = stop
    need(length + end == file_size, "header: file size")
    return tensors, metadata, length


def read_base(base: Path) -> dict[str, list[BaseTensor]]:
    """All tensors of the base, by name."""
    tensors: dict[str, list[BaseTensor]] = {}
    for path in sorted(base.rglob("*.safetensors")):
        data = path.read_bytes()
        headers, _, at = parse_header(data, len(data))
        for name, tensor in headers.items():
            start, end = tensor["data_offsets"]
            file = path.relative_to(base).as_posix()
            found = BaseTensor(file, tensor["dtype"], tensor["shape"], data[at + start : at + end])
            tensors.setdefault(name, []).append(found)
    return tensors


def rebuild_shard(data: bytes, file: Fields, manifest: Fields, base: dict[str, list[BaseTensor]]) -> bytes:
    """One target shard out of its delta shard and the base."""
    payloads, metadata, at = parse_header(data, len(data))
    packed = base64.b64decode(metadata["header"], validate=True)
    size = zstandard.frame_content_size(packed)
    need(8 <= size <= min(file["size"], 100_000_008), "target header: size")
    raw = decompress_frame(packed, size)
    tensors, _, length = parse_header(raw, file["size"])
    need(length == len(raw), "target header: length")
    entries = {entry["name"]: entry for entry in manifest["tensors"] if entry["file"] == file["path"]}
    need(set(tensors) == set(entries), "target header: names")
    result = [raw]
    for name, tensor in tensors.items():
        entry = entries[name]
        need(
            (tensor["dtype"], tensor["shape"]) == (entry["dtype"], entry["shape"]), f"{name}: dtype or shape"
        )
        start, end = payloads[name]["data_offsets"]
        first, last = tensor["data_offsets"]
        payload = data[at + start : at + end]
        result.append(decode_tensor(payload, last - first, entry, base, manifest["chunk_bytes"]))
    return b"".join(result)


# Payloads


def decode_tensor(
    payload: bytes, size: int, entry: Fields, base: dict[str, list[BaseTensor]], chunk_bytes: int
) -> bytes:
    """One tensor's bytes out of its payload."""
    name, shared = entry["name"], entry["shared_bytes"]
    reference = find_base(entry, base) if shared else None
    need(shared <= size, f"{name}: shared_bytes")
    spans = [(s, min(s + chunk_bytes, shared)) for s in range(0, shared, chunk_bytes)]
    spans += [(s, min(s + chunk_bytes, size)) for s in range(shared, size, chunk_bytes)]
    position = 24 * len(spans)
    result = b""
    for index, (start, end) in enumerate(spans):
        method, length, base_sum, target_sum = struct.unpack_from("<B3xIQQ", payload, 24 * index)
        old = None
        if start < shared and reference:
            old = base_bytes(reference, entry["dtype"], start, end, base_sum)
        need(length <= end - start, f"{name}: chunk {index}: length")
        data = payload[position : position + length]
        chunk = decode_chunk(method, data, old, entry["dtype"], end - start)
        need(xxhash.xxh3_64_intdigest(chunk) == target_sum, f"{name}: chunk {index}: target checksum")
        result += chunk
        position += length
    need(position == len(payload), f"{name}: payload length")
    return result


def find_base(entry: Fields, base: dict[str, list[BaseTensor]]) -> BaseTensor:
    """The base tensor that an entry names."""
    wanted = entry["base"]
    file = wanted["file"] or entry["file"]

    def rank(tensor: BaseTensor) -> tuple[bool, bool, str]:
        folder = tensor.file.rpartition("/")[0]
        return tensor.file != file, folder != file.rpartition("/")[0], tensor.file

    found = sorted(base.get(wanted["name"], []), key=rank)
    need(found, f"{wanted['name']}: not in the base")
    need([found[0].dtype, found[0].shape] == [wanted["dtype"], wanted["shape"]], f"{wanted['name']}: differs")
    return found[0]


def base_bytes(base: BaseTensor, dtype: str, start: int, end: int, checksum: int) -> bytes:
    """A chunk's base bytes in the target's dtype."""
    if dtype != base.dtype:
        need({dtype, base.dtype} <= {"BF16", "F16", "F32", "F64"}, f"{base.dtype} to {dtype}")
        width, old_width = BITS[dtype] // 8, BITS[base.dtype] // 8
        need(start % width == 0 == end % width, "shared_bytes: between elements")
        start, end = start // width * old_width, end // width * old_width
    need(end <= len(base.data), "shared_bytes: beyond the base")
    data = base.data[start:end]
    need(xxhash.xxh3_64_intdigest(data) == checksum, "base checksum")
    return data if dtype == base.dtype else convert(data, base.dtype, dtype)


def convert(data: bytes, source: str, target: str) -> bytes:
    """Base elements as the target's dtype, in the document's three steps."""
    with np.errstate(all="ignore"):
        if source == "BF16":
            wide = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            wide = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[source]).astype(np.float32)
        negative = np.signbit(wide)
        bits = np.where(np.isnan(wide), np.where(negative, 0xFFC00000, 0x7FC00000), wide.view(np.uint32))
        bits = bits.astype(np.uint32)
        if target == "BF16":
            low, high = bits & 0xFFFF, bits >> 16
            up = (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
            narrow: NDArray[np.generic] = (high + (up & ~np.isnan(wide))).astype("<u2")
        else:
            narrow = bits.view(np.float32).astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[target])
        return narrow.tobytes()


def decode_chunk(method: int, data: bytes, base: bytes | None, dtype: str, size: int) -> bytes:
    """One chunk of ``size`` bytes; ``base``: its base bytes in the target's dtype, or None."""
    if method == 0:
        need(base is not None and not data, "SAME")
        return base or b""
    if method == 1:
        need(len(data) == size, "RAW: length")
        return data
    need(method in (2, 3), f"method {method}")
    width = max(1, BITS.get(dtype, 8) // 8)
    width = width if size % width == 0 else 1
    sizes = struct.unpack_from(f"<{width}I", data)
    chunk = np.empty((size // width, width), np.uint8)
    position = 4 * width
    for k, number in enumerate(sizes):
        length = number & 0x7FFFFFFF
        plane = data[position : position + length]
        position += length
        if not number & 0x80000000:
            plane = decompress_frame(plane, size // width)
        need(len(plane) == size // width, "plane: length")
        chunk[:, k] = np.frombuffer(plane, np.uint8)
    need(position == len(data), "planes: length")
    if method == 2:
        return chunk.tobytes()
    need(base is not None, "XOR_PLANES without a base")
    xored: NDArray[np.uint8] = chunk.ravel() ^ np.frombuffer(base or b"", np.uint8)
    return xored.tobytes()


def decompress_frame(data: bytes, size: int) -> bytes:
    """One zstd frame that states its content size, which has to be ``size``."""
    try:
        need(zstandard.frame_content_size(data) == size, "zstd: content size")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise BadDeltaError(f"zstd: {error}") from error


def decompress_file(data: bytes, size: int) -> bytes:
    """A zstd file that holds ``size`` bytes."""
    try:
        result = zstandard.ZstdDecompressor(max_window_size=1 << 23).decompressobj().decompress(data)
    except zstandard.ZstdError as error:
        raise BadDeltaError(f"zstd: {error}") from error
    need(len(result) == size, "zstd: size")
    return result
