"""A second reader of deltas, written from docs/format.md alone; it shares no code with the library.

It holds the document to its promise, so it stays plain: whole files in memory, one check after the other.
"""

from __future__ import annotations

import base64
import bisect
import functools
import hashlib
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

Fields = dict[str, Any]
Bytes = NDArray[np.uint8]
Elements = NDArray[np.uint64]

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
    "delta license": {"expression", "conflicts", "notice"},
    "tensor": {
        *("name", "file", "dtype", "shape", "status", "base"),
        *("shared_bytes", "changed", "payload_bytes"),
    },
    "base tensor": {"name", "dtype", "shape", "file"},
    "target tensor": {"name", "file"},
    "kind": {"dtype", "shape", "status", "shared_bytes", "base"},
    "base of a kind": {"dtype", "shape"},
    "rows": {"file", "rows"},
    "part": {"name", "count"},
    "group": {"parts"},
    "prediction": {"method", "nbytes"},
}

#: Fields that may be absent.
OPTIONAL = {
    "manifest": {"license", "kinds"},
    "license": {"expression"},
    "tensor": {"like", "prediction"},
    "part": {"start", "step", "stride", "file"},
    "group": {"repeats"},
    "prediction": {"rank"},
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
            data = rebuild_shard(file, delta, manifest, tensors)
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
    need(len(data) <= 1 << 27, "manifest: size")
    manifest: Fields = json.loads(data)
    need(manifest["format"] == "deltaweights" and manifest["format_version"] == 1, "manifest: version")
    need(canonical(manifest).encode() + b"\n" == data, "manifest: canonical form")
    emptied, count = re.subn(rb'("checksum":")[0-9a-f]{64}', rb"\1", data)
    need(count == 1 and hashlib.sha256(emptied).hexdigest() == manifest["checksum"], "manifest: checksum")
    if "kinds" in manifest:
        manifest["tensors"] = spell_out(manifest["kinds"], manifest["tensors"])
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
    need(manifest.get("license", {}).get("notice") in {None, *own}, "manifest: notice")
    seen: set[tuple[str, str]] = set()
    for entry in manifest["tensors"]:
        need(entry["name"] != "__metadata__", "a tensor called __metadata__")
        need((entry["file"] is None) == (entry["status"] == "removed"), f"{entry['name']}: status")
        need(entry["base"] or not entry["shared_bytes"], f"{entry['name']}: base")
        need(entry["changed"] <= entry["shared_bytes"], f"{entry['name']}: changed")
        need(
            (entry["status"] == "rearranged") == ("groups" in (entry["base"] or {})),
            f"{entry['name']}: parts",
        )
        predicted = entry.get("prediction", {}).get("nbytes", 0)
        need(not predicted or (entry["shared_bytes"] and predicted <= entry["payload_bytes"]), "prediction")
        if entry["file"] is not None:
            need(entry["file"] in shards, f"{entry['name']}: file")
            need((entry["file"], entry["name"]) not in seen, f"{entry['name']}: twice")
            seen.add((entry["file"], entry["name"]))
    check_duplicates(manifest["tensors"])
    return manifest


def spell_out(kinds: list[Fields], tables: list[Fields]) -> list[Fields]:
    """An entry for each row, as manifests without kinds have them."""
    entries: list[Fields] = []
    used: list[int] = []
    for before, table in zip([None, *tables], tables, strict=False):
        need(set(table) == FIELDS["rows"], "manifest: fields of rows")
        need(
            table["rows"] and (before is None or before["file"] != table["file"]), "manifest: rows of a file"
        )
        for name, number, changed, payload_bytes, *rest in table["rows"]:
            need(0 <= number < len(kinds), f"{name}: kind")
            kind, more = kinds[number], rest[0] if rest else {}
            need(len(rest) < 2 and (not rest or more), f"{name}: a row that says too much")
            allowed = {"base", "base_file", "like", "parts", "prediction"}
            need(set(more) <= allowed and None not in more.values(), f"{name}: fields of a row")
            used += [number] if number not in used else []
            entry = {"name": name, "file": table["file"], "changed": changed, "payload_bytes": payload_bytes}
            entry |= {key: kind[key] for key in ("dtype", "shape", "status", "shared_bytes")}
            entry |= {key: more[key] for key in ("like", "prediction") if key in more}
            entry["base"] = None
            need(("parts" in more) == bool(kind["base"] and kind["base"]["shape"] is None), f"{name}: parts")
            if "parts" in more:
                entry["base"] = {"dtype": kind["base"]["dtype"], "groups": more["parts"]}
            elif kind["base"]:
                need(more.get("base") != name, f"{name}: a base that need not be named")
                own = {"name": more.get("base", name), "file": more.get("base_file")}
                entry["base"] = kind["base"] | own
            need(
                kind["base"] or not {"base", "base_file"} & set(more), f"{name}: a base's name without a base"
            )
            entries.append(entry)
    need(used == list(range(len(kinds))), "manifest: kinds in another order than they are used")
    return entries


def check_duplicates(entries: list[Fields]) -> None:
    """A duplicate has nothing of its own, and is like a tensor that is none."""
    coded = {(entry["file"], entry["name"]): entry for entry in entries if "like" not in entry}
    for entry in entries:
        need(("like" in entry) == (entry["status"] == "duplicate"), f"{entry['name']}: duplicate")
        if "like" in entry:
            other = coded.get((entry["like"]["file"], entry["like"]["name"]))
            need(other and other["file"] is not None, f"{entry['name']}: like nothing")
            kinds = [(tensor["dtype"], tensor["shape"]) for tensor in (entry, other or {})]
            need(kinds[0] == kinds[1], f"{entry['name']}: like another kind")
            own = entry["base"], entry["shared_bytes"], entry["changed"], entry["payload_bytes"]
            need(own == (None, 0, 0, 0), f"{entry['name']}: a base or a payload")


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
    """Every object has the fields of its kind, no more and no fewer, but for optional ones."""
    objects = [("manifest", manifest), ("tool", manifest["tool"])]
    objects += [("base", manifest["base"]), ("target", manifest["target"])]
    objects += [("license", manifest[side]["license"]) for side in ("base", "target")]
    objects += [("delta license", manifest["license"])] if "license" in manifest else []
    objects += [("file", record) for record in manifest["files"] + manifest["base"]["files"]]
    objects += [("file", text) for side in ("base", "target") for text in manifest[side]["license"]["files"]]
    objects += [("target file", file) for file in manifest["target"]["files"]]
    objects += [("tensor", entry) for entry in manifest["tensors"]]
    bases = [entry["base"] for entry in manifest["tensors"] if entry["base"]]
    objects += [("base tensor", base) for base in bases if "groups" not in base]
    groups = [group for base in bases for group in base.get("groups", [])]
    objects += [("group", group) for group in groups]
    objects += [("part", part) for group in groups for part in group["parts"]]
    objects += [("prediction", entry["prediction"]) for entry in manifest["tensors"] if "prediction" in entry]
    objects += [("kind", kind) for kind in manifest.get("kinds", [])]
    objects += [("base of a kind", kind["base"]) for kind in manifest.get("kinds", []) if kind["base"]]
    objects += [("target tensor", entry["like"]) for entry in manifest["tensors"] if "like" in entry]
    for kind, value in objects:
        need(set(value) - OPTIONAL.get(kind, set()) == FIELDS[kind], f"manifest: fields of {kind}")
    need(manifest["chunk_bytes"] in range(4096, 4194304 + 1, 4096), "manifest: chunk_bytes")
    part = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
    for side in ("base", "target"):
        for field, pattern in (
            ("repo_id", f"{part}(/{part})?"),
            ("revision", "[A-Za-z0-9_][A-Za-z0-9_./-]*"),
        ):
            value = manifest[side][field]
            need(value is None or (len(value) <= 200 and re.fullmatch(pattern, value)), f"manifest: {field}")


def check_paths(paths: list[str]) -> set[str]:
    """The paths, if all are safe and fit together."""
    for path in paths:
        for part in path.split("/"):
            need(part not in ("", ".", "..") and part.lower() not in (".git", ".deltaweights"), repr(path))
            need(len(part.encode()) <= 255, repr(path))
        need(len(path.encode()) <= 1024, repr(path))
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


def rebuild_shard(file: Fields, delta: Path, manifest: Fields, base: dict[str, list[BaseTensor]]) -> bytes:
    """One target shard out of the delta and the base."""
    payloads, raw = read_delta_shard(file, delta, manifest)
    tensors, _, length = parse_header(raw, file["size"])
    need(length == len(raw), "target header: length")
    entries = {(entry["file"], entry["name"]): entry for entry in manifest["tensors"]}
    names = {name for path, name in entries if path == file["path"]}
    need(set(tensors) == set(payloads) == names, "target header: names")
    result = [raw]
    for name, tensor in tensors.items():
        entry = entries[file["path"], name]
        need(
            (tensor["dtype"], tensor["shape"]) == (entry["dtype"], entry["shape"]), f"{name}: dtype or shape"
        )
        payload = payloads[name]
        if "like" in entry:
            entry = entries[entry["like"]["file"], entry["like"]["name"]]
            (other,) = (f for f in manifest["target"]["files"] if f["path"] == entry["file"])
            payload = read_delta_shard(other, delta, manifest)[0][entry["name"]]
        first, last = tensor["data_offsets"]
        result.append(decode_tensor(payload, last - first, entry, base, manifest["chunk_bytes"]))
    return b"".join(result)


def read_delta_shard(file: Fields, delta: Path, manifest: Fields) -> tuple[dict[str, bytes], bytes]:
    """The payloads in the delta shard of a target file, by tensor, and the target file's header."""
    data = (delta / file["source"]).read_bytes()
    held, metadata, at = parse_header(data, len(data))
    for tensor in held.values():
        need(tensor["dtype"] == "U8" and len(tensor["shape"]) == 1, "delta shard: a payload's dtype or shape")
    entries = [entry for entry in manifest["tensors"] if entry["file"] == file["path"]]
    lengths = {entry["name"]: entry["payload_bytes"] for entry in entries}
    dictionary = b""
    if metadata["format"] == "deltaweights-row":
        need(list(held) == ["payloads"] and sum(lengths.values()) == len(data) - at, "delta shard: payloads")
        starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
        dictionary = usual_header(entries, file["size"])
    else:
        need(metadata["format"] == "deltaweights", "delta shard: format")
        starts = {name: tensor["data_offsets"][0] for name, tensor in held.items()}
        own = {name: tensor["data_offsets"][1] - starts[name] for name, tensor in held.items()}
        need(own == lengths, "delta shard: payload_bytes")
    packed = base64.b64decode(metadata["header"], validate=True)
    size = zstandard.frame_content_size(packed)  # negative if it is not stated
    need(8 <= size <= min(file["size"], 100_000_008), "target header: size")
    payloads = {name: data[at + start :][: lengths[name]] for name, start in starts.items()}
    return payloads, decompress_frame(packed, size, dictionary)


def usual_header(entries: list[Fields], size: int) -> bytes:
    """What the header of a file of ``size`` bytes is coded against."""
    fields, end = ['"__metadata__":{"format":"pt"}'], 0
    for entry in entries:
        start = end
        end += math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0) // 8
        need(end <= size, "target header: tensors beyond the file")
        name, dtype, shape = (canonical(entry[field]) for field in ("name", "dtype", "shape"))
        fields.append(f'{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":[{start},{end}]}}')
    text = ("{" + ",".join(fields) + "}").encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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
    predict = None
    if "prediction" in entry and reference:
        predict = read_prediction(entry, payload, reference, shared)
        payload = payload[entry["prediction"]["nbytes"] :]
    position = 24 * len(spans)
    result = b""
    for index, (start, end) in enumerate(spans):
        method, zeros, length, base_sum, target_sum = struct.unpack_from("<B3sIQQ", payload, 24 * index)
        need(zeros == bytes(3), f"{name}: chunk {index}: reserved bytes")
        old = None
        if start < shared and reference:
            old = base_bytes(reference, entry["dtype"], start, end, base_sum, predict)
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
    if "groups" in wanted:
        return put_together(entry, base)
    found = named(wanted["name"], wanted["file"] or entry["file"], base)
    need(found, f"{wanted['name']}: not in the base")
    need([found[0].dtype, found[0].shape] == [wanted["dtype"], wanted["shape"]], f"{wanted['name']}: differs")
    return found[0]


def put_together(entry: Fields, base: dict[str, list[BaseTensor]]) -> BaseTensor:
    """The parts of base tensors that an entry names, as one tensor."""
    dtype, name = entry["base"]["dtype"], entry["name"]
    need(BITS.get(dtype, 1) % 8 == 0, f"{name}: parts of a dtype that does not fill bytes")
    width, result = BITS[dtype] // 8, b""
    for group in entry["base"]["groups"]:
        columns = []
        for part in group["parts"]:
            start, step, stride = part.get("start", 0), part.get("step", 0), part.get("stride", 1)
            repeats, count = group.get("repeats", 1), part["count"]
            need(min(start, step) >= 0 and min(stride, repeats, count) >= 1, f"{name}: numbers of a part")
            found = [
                tensor
                for tensor in named(part["name"], part.get("file") or entry["file"], base)
                if tensor.dtype == dtype
            ]
            need(found, f"{part['name']}: not in the base")
            elements = np.frombuffer(found[0].data, np.dtype((np.void, width)))
            last = start + (repeats - 1) * step + (count - 1) * stride
            need(last < len(elements), f"{part['name']}: too short")
            need(stride == 1 or (last + 1 - start) * width <= 1 << 28, f"{part['name']}: strided too far")
            places = start + step * np.arange(repeats)[:, None] + stride * np.arange(count)
            columns.append(elements[places])
        result += np.concatenate(columns, axis=1).tobytes()
    return BaseTensor("", dtype, [len(result) // width], result)


def named(name: str, file: str, base: dict[str, list[BaseTensor]]) -> list[BaseTensor]:
    """The base tensors of that name, the one that is meant first."""

    def rank(tensor: BaseTensor) -> tuple[bool, bool, str]:
        folder = tensor.file.rpartition("/")[0]
        return tensor.file != file, folder != file.rpartition("/")[0], tensor.file

    return sorted(base.get(name, []), key=rank)


Predict = Callable[[bytes, int], bytes]


def read_prediction(entry: Fields, payload: bytes, base: BaseTensor, shared: int) -> Predict:
    """What makes a chunk's base bytes (from an element on) more like the target."""
    sealed = payload[: entry["prediction"]["nbytes"]]
    data = sealed[8:]
    need(
        len(sealed) >= 8 and sealed[:8] == xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"), "prediction"
    )
    width = BITS[entry["dtype"]] // 8
    need(width and shared % width == 0, "prediction: elements that do not fill bytes")
    need(entry["prediction"]["method"] in PREDICTIONS, "prediction: method")
    return PREDICTIONS[entry["prediction"]["method"]](data, entry["dtype"], base.dtype, shared // width)


def read_quantized(data: bytes, dtype: str, base_dtype: str, numel: int) -> Predict:
    """A prediction by the scales of blocks."""
    need(dtype in EIGHT_BITS and base_dtype in FLOAT_WIDTHS, "quantized: dtypes")
    columns, high, wide = struct.unpack_from("<QII", data)
    need(columns and high and wide and numel % columns == 0, "quantized: shape")
    shape = math.ceil(numel // columns / high), math.ceil(columns / wide)
    need(shape[0] * shape[1] <= min(numel, 1 << 24), "quantized: scales")
    scales = np.frombuffer(decompress_frame(data[16:], 4 * shape[0] * shape[1]), "<f4").reshape(shape)

    def predict(base: bytes, first: int) -> bytes:
        values = np.frombuffer(convert(base, base_dtype, "F32") if base_dtype != "F32" else base, "<f4")
        places = first + np.arange(values.size)
        with np.errstate(all="ignore"):
            divided = values / scales[places // columns // high, places % columns // wide]
        return b"".join(EIGHT_BITS[dtype](float(value)) for value in divided)

    return predict


def nearest_float8(value: float, exponent: int, mantissa: int, largest: float) -> bytes:
    """The float of 8 bits that is nearest to a float32, ties to even."""
    if math.isnan(value):
        return b"\x7f"
    sign, size = math.copysign(1, value) < 0, min(abs(value), largest)
    smallest = 2 - (1 << (exponent - 1))
    place = max(math.frexp(size)[1] - 1 if size else smallest, smallest)
    steps = round(size / 2.0 ** (place - mantissa))  # to even
    bits = steps + ((place - smallest) << mantissa)
    return bytes([bits | (0x80 if sign else 0)])


def nearest_int8(value: float) -> bytes:
    """The nearest integer of 8 bits, ties to even; 0 for NaN."""
    clamped = 0.0 if math.isnan(value) else max(-128.0, min(127.0, value))
    return (round(clamped) & 255).to_bytes(1, "little")


class Part(NamedTuple):
    """Rows of a low-rank prediction: their factors and those of the columns, and their gains."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    gains: NDArray[np.float32]
    exponent: int


def read_low_rank(data: bytes, dtype: str, base_dtype: str, numel: int) -> Predict:
    """A prediction by the product of two narrow matrices."""
    need(dtype in UNSIGNED, "low rank: dtype")
    need(base_dtype in (FLOAT_WIDTHS if base_dtype != dtype else UNSIGNED), "low rank: the base's dtype")
    items = Data(data)
    kind, flags, columns, count = items.numbers("<BBII")
    need(kind == 1 and flags <= 1 and columns and count, "low rank: kind")
    heads = [items.numbers("<IHbBB") for _ in range(count)]
    for rows, rank, exponent, contexts, shift in heads:
        need(rows and rank <= 512 and -32 <= exponent <= 120, "low rank: head")
        need(1 <= contexts <= min(rank, 40) if rank else contexts == 0, "low rank: contexts")
        need(shift <= 16 or shift == 255, "low rank: shift")
    need(sum(rows for rows, *_ in heads) * columns == numel, "low rank: rows")
    need(sum(rank * (rows + columns) for rows, rank, *_ in heads) <= min(numel, 1 << 27), "low rank: factors")
    parts = [read_part(items, head, columns, bits=16 if dtype != "F32" else 22) for head in heads]
    items.end()
    ends = list(itertools.accumulate(len(part.gains) for part in parts))

    def predict(base: bytes, first: int) -> bytes:
        old = np.frombuffer(
            base if base_dtype == dtype else convert(base, base_dtype, dtype), UNSIGNED[dtype]
        )
        new, at = old.copy(), 0
        while at < len(old):
            row, column = divmod(first + at, columns)
            which = bisect.bisect_right(ends, row)
            here = slice(at, at + columns - column)
            line = row - ends[which] + len(parts[which].gains)
            new[here] = add_product(old[here], parts[which], line, column, dtype, rounded=bool(flags))
            at += columns - column
        return new.tobytes()

    return predict


def read_part(items: Data, head: tuple[int, ...], columns: int, bits: int) -> Part:
    """What is stated of some rows."""
    rows, rank, exponent, contexts, shift = head
    factors = np.zeros((rows + columns, rank), np.int64)
    if rank:
        shifts = np.frombuffer(items.take(rank), np.uint8).astype(np.int64)
        run = items.sized()
        need(factors.size <= 8 * len(run), "low rank: more factors than bits")
        of_row = [k * contexts // rank for k in range(rank)]
        values = np.array(decode_run(run, [0] * contexts, of_row * (rows + columns)), np.int64)
        values = values.reshape(factors.shape)
        lifts = np.concatenate([np.tile(shifts & 15, (rows, 1)), np.tile(shifts >> 4, (columns, 1))])
        need((values < 1 << (bits - lifts)).all(), "low rank: a factor out of range")
        factors = signed(values) << lifts
    gains = np.ones(rows, np.float32)
    if shift != 255:
        run = items.sized()
        need(rows <= 8 * len(run), "low rank: more gains than bits")
        numbers = np.array(decode_list(run, rows), np.int64)
        need((numbers < 1 << (23 - shift)).all(), "low rank: a gain out of range")
        gains = (((1 << 23) + signed(numbers) * (1 << shift)) / (1 << 23)).astype(np.float32)
    return Part(factors[:rows], factors[rows:], gains, exponent)


def signed(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, 3, … as 0, -1, +1, -2, …"""
    return np.where(numbers & 1, -(numbers + 1) // 2, numbers // 2)


def add_product(
    old: NDArray[Any], part: Part, row: int, column: int, dtype: str, *, rounded: bool
) -> NDArray[Any]:
    """Elements of a row, from a column on."""
    sums, gain = part.right[column : column + len(old)] @ part.left[row], part.gains[row]
    scale = 2.0**-part.exponent
    with np.errstate(all="ignore"):
        if dtype == "F32":
            product = sums.astype(np.float64) * scale
            if rounded:
                product = product.astype(np.float32).astype(np.float64)
            before = old.view("<f4")
            after = (np.float64(gain) * before.astype(np.float64) + product).astype("<f4").view("<u4")
        else:
            sums = sums.astype(np.int32)  # modulo 2^32
            product = sums.astype(np.float32) * np.float32(scale)
            if rounded:
                product = widened(convert(product.tobytes(), "F32", dtype), dtype)
            before = widened(old.tobytes(), dtype)
            after = np.frombuffer(convert((gain * before + product).tobytes(), "F32", dtype), "<u2")
    kept = ~np.isfinite(before) | ((sums == 0) & (gain == 1))
    return np.where(kept, old, after)


def widened(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Elements of 16 bits in 32."""
    return np.frombuffer(convert(data, dtype, "F32"), "<f4")


UNSIGNED = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}
PREDICTIONS: dict[str, Callable[[bytes, str, str, int], Predict]] = {
    "quantized": read_quantized,
    "low_rank": read_low_rank,
}
FLOAT_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
EIGHT_BITS: dict[str, Callable[[float], bytes]] = {
    "F8_E4M3": lambda value: nearest_float8(value, 4, 3, 448.0),
    "F8_E5M2": lambda value: nearest_float8(value, 5, 2, 57344.0),
    "I8": nearest_int8,
}


def base_bytes(
    base: BaseTensor, dtype: str, start: int, end: int, checksum: int, predict: Predict | None
) -> bytes:
    """A chunk's base bytes in the target's dtype, as the prediction changes them."""
    first = 0
    if predict:
        first = start // (BITS[dtype] // 8)
        start, end = (place // (BITS[dtype] // 8) * (BITS[base.dtype] // 8) for place in (start, end))
    elif dtype != base.dtype:
        need({dtype, base.dtype} <= {"BF16", "F16", "F32", "F64"}, f"{base.dtype} to {dtype}")
        width, old_width = BITS[dtype] // 8, BITS[base.dtype] // 8
        need(start % width == 0 == end % width, "shared_bytes: between elements")
        start, end = start // width * old_width, end // width * old_width
    need(end <= len(base.data), "shared_bytes: beyond the base")
    data = base.data[start:end]
    need(xxhash.xxh3_64_intdigest(data) == checksum, "base checksum")
    if predict:
        return predict(data, first)
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


# Chunks


class FloatFormat(NamedTuple):
    """Bytes of an element, and where its exponent is."""

    width: int
    shift: int
    mask: int


FLOATS = {
    "BF16": FloatFormat(2, 7, 255),
    "F16": FloatFormat(2, 10, 31),
    "F32": FloatFormat(4, 23, 255),
    "C64": FloatFormat(4, 23, 255),
    "F64": FloatFormat(8, 52, 2047),
    "F8_E4M3": FloatFormat(1, 3, 15),
    "F8_E5M2": FloatFormat(1, 2, 31),
}
WORDS = {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}


class Data:
    """A chunk's data, taken item by item from the front."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, length: int) -> bytes:
        need(0 <= length <= len(self.rest), "data too short")
        item, self.rest = self.rest[:length], self.rest[length:]
        return item

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def sized(self) -> bytes:
        return self.take(self.numbers("<I")[0])

    def plane(self, longest: int) -> Bytes:
        """A byte plane of at most ``longest`` bytes."""
        kind, length, stored = self.numbers("<BII")
        need(length <= longest, "plane: length")
        data = self.take(stored)
        if kind == 0:
            plane = data
        elif kind == 1:
            need(stored == 1, "plane: one byte")
            plane = data * length
        elif kind == 2:
            plane = decompress_frame(data, length)
        else:
            need(kind == 3, "plane: kind")
            plane = bytes(decode_list(data, length, direct=8))
        need(len(plane) == length, "plane: length")
        return np.frombuffer(plane, np.uint8)

    def end(self) -> None:
        need(not self.rest, "data left over")


def decode_chunk(method: int, data: bytes, base: bytes | None, dtype: str, size: int) -> bytes:
    """One chunk of ``size`` bytes; ``base``: its base bytes in the target's dtype, or None."""
    if method == 1:
        need(len(data) == size, "RAW: length")
        return data
    if method == 4:
        return decode_words(Data(data), base, WORDS.get(dtype, 1), size)
    if method == 5:
        return decompress_frame(data, size)
    if method == 0:
        need(base is not None and not data, "SAME")
        return base or b""
    need(method in (2, 3, 6, 7, 8), f"method {method}")
    need(dtype in FLOATS and size % FLOATS[dtype].width == 0, f"method {method} for {dtype}")
    form = FLOATS[dtype]
    if method in (3, 7):
        need(method == 3 or form.width >= 2, "WINDOW of bytes")
        alone = decode_alone if method == 3 else decode_window
        return alone(Data(data), form, size // form.width)
    need(base is not None, f"method {method} without a base")
    elements = np.frombuffer(base or b"", f"<u{form.width}").astype(np.uint64)
    decode = {2: decode_delta, 6: decode_sparse, 8: decode_drift}[method]
    return decode(Data(data), elements, form).astype(f"<u{form.width}").tobytes()


def decompress_frame(data: bytes, size: int, dictionary: bytes = b"") -> bytes:
    """Exactly one zstd frame, which holds ``size`` bytes and needs a window of at most 8 MiB."""
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        need(stated in (size, zstandard.CONTENTSIZE_UNKNOWN), "zstd: content size")
        raw_content = zstandard.ZstdCompressionDict(dictionary, zstandard.DICT_TYPE_RAWCONTENT)
        decompressor = zstandard.ZstdDecompressor(dict_data=raw_content, max_window_size=1 << 23)
        result = decompressor.decompress(
            data, max_output_size=max(size, 1), read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise BadDeltaError(f"zstd: {error}") from error
    need(len(result) == size, "zstd: size")
    return result


def decode_words(data: Data, base: bytes | None, width: int, size: int) -> bytes:
    """PLANES."""
    (transform,) = data.numbers("<B")
    count = size // width
    words = np.zeros(count, np.uint64)
    for k in range(width):
        plane = data.plane(count)
        need(len(plane) == count, "PLANES: a plane's length")
        words |= plane.astype(np.uint64) << np.uint64(8 * k)
    if transform:
        need(transform in (1, 2) and base is not None, "PLANES: transform")
        old = np.frombuffer(base or b"", f"<u{width}", count).astype(np.uint64)
        words = words ^ old if transform == 1 else old + unzigzag(words)
    rest = data.take(size - count * width)
    data.end()
    return words.astype(f"<u{width}").tobytes() + rest


def decode_alone(data: Data, form: FloatFormat, count: int) -> bytes:
    """ALONE."""
    rotated = np.array(decode_list(data.sized(), count, direct=8), np.uint64)
    return finish_rotated(rotated, data, form, form.width - 1)


def finish_rotated(upper: Elements, data: Data, form: FloatFormat, planes: int) -> bytes:
    """The elements of which ``upper`` are the rotated upper bytes; the other ones follow in planes."""
    rotated = upper << np.uint64(8 * planes)
    for k in range(planes):
        plane = data.plane(len(upper))
        need(len(plane) == len(upper), "a plane's length")
        rotated |= plane.astype(np.uint64) << np.uint64(8 * k)
    data.end()
    one, top = np.uint64(1), np.uint64(8 * form.width - 1)
    return (rotated >> one | (rotated & one) << top).astype(f"<u{form.width}").tobytes()


def decode_window(data: Data, form: FloatFormat, count: int) -> bytes:
    """WINDOW."""
    (bias,) = data.numbers("<H")
    values = decode_list(data.sized(), count, direct=8, long=True)
    outside = values.count(0)
    others = iter(decode_list(data.sized(), outside) if outside else [])
    words = [(bias + v if v else 0 if (k := next(others)) == 0 else bias + 1 - k) & 0xFFFF for v in values]
    return finish_rotated(np.array(words, np.uint64), data, form, form.width - 2)


def decode_delta(data: Data, base: Elements, form: FloatFormat) -> Elements:
    """DELTA: the target's elements."""
    log_segment, step, count, lowest, base_scale, tweak = data.numbers("<BBBhhb")
    need(log_segment == 0 or 6 <= log_segment <= 26, "DELTA: s")
    need(step <= 1 and 1 <= count <= 64, "DELTA: contexts")
    scales = np.full(len(base), base_scale)
    if log_segment:
        length = 1 << log_segment
        numbers = np.array(decode_list(data.sized(), -(-len(base) // length)), np.int64)
        scales += np.repeat(numbers & 0xFFFF, length)[: len(base)]
    contexts = np.clip((2 * exponent(base, form) - scales - lowest) >> step, 0, count - 1)
    wide = form.width >= 4
    worths = [lowest + (c << step) for c in range(count)]
    in_planes = [min(max((((-w) >> 1) - 2) >> 3, 0), 3) if wide else 0 for w in worths]
    members = [10 - w - 16 * k + tweak for w, k in zip(worths, in_planes, strict=True)]
    run = data.sized() if wide else data.take(len(data.rest))
    distances = np.array(decode_run(run, members, contexts.tolist()), np.uint64)
    planes = [data.plane(len(base)) for _ in range({4: 3, 8: 7}.get(form.width, 0))]
    data.end()
    taken = np.array(in_planes)[contexts]
    for p in (2, 1, 0) if wide else ():
        has = taken > p
        need(len(planes[p]) == np.count_nonzero(has), "DELTA: a plane's length")
        distances[has] = distances[has] << np.uint64(8) | planes[p]
    for plane in reversed(planes[3:]):
        need(len(plane) == len(base), "DELTA: a plane's length")
        distances = distances << np.uint64(8) | plane
    return at_distance(base, distances, form)


def decode_sparse(data: Data, base: Elements, form: FloatFormat) -> Elements:
    """SPARSE: the target's elements."""
    cutoff, follows, count = data.numbers("<hBI")
    need(cutoff >= -1 and follows <= 1 and count <= len(base) // 16, "SPARSE: head")
    units = -(-len(base) // 256)
    plane = data.plane(-(-units // 8))
    need(len(plane) == -(-units // 8), "SPARSE: active elements")
    active = np.repeat(np.unpackbits(plane, bitorder="little")[:units], 256)[: len(base)]
    lists = 0 if count == 0 else 3 if form.width == 8 else 2
    numbers = [np.array(decode_list(data.sized(), count), np.uint64) for _ in range(lists)]
    need(bool(data.rest) == (follows == 1), "SPARSE: delta")
    result = base.copy()
    if follows:
        chosen = (active == 1) & (exponent(base, form) <= cutoff)
        result[chosen] = decode_delta(data, base[chosen], form)
    if count:
        places = np.cumsum(numbers[0] + np.uint64(1)) - np.uint64(1)
        need(places[-1] < len(base), "SPARSE: place")
        distances = numbers[1] | numbers[2] << np.uint64(32) if form.width == 8 else numbers[1]
        result[places] = at_distance(base[places], distances, form)
    data.end()
    return result


def decode_drift(data: Data, base: Elements, form: FloatFormat) -> Elements:
    """DRIFT: the target's elements."""
    need(form.width == 4, "DRIFT: dtype")
    k, method = data.numbers("<BB")
    need(k <= 12 and method in (0, 2, 6), "DRIFT: head")
    numbers = np.array(decode_list(data.sized(), 1 << k), np.uint64)
    shifts = np.cumsum(unzigzag(numbers))
    which = (base & np.uint64((1 << 23) - 1)) >> np.uint64(23 - k)
    moved = (base + shifts[which]) & np.uint64((1 << 32) - 1)
    drifted = np.where(exponent(base, form) == 0, base, moved)
    if method:
        return (decode_delta if method == 2 else decode_sparse)(data, drifted, form)
    data.end()
    return drifted


# Elements, in 64 bits whatever their width


def exponent(elements: Elements, form: FloatFormat) -> NDArray[np.int64]:
    """The biased exponents."""
    return (elements >> np.uint64(form.shift)).astype(np.int64) & form.mask


def unzigzag(numbers: Elements) -> Elements:
    """0, 1, 2, 3, … as 0, -1, +1, -2, … modulo 2^64."""
    half = (numbers >> np.uint64(1)) + (numbers & np.uint64(1))
    return np.where(numbers & np.uint64(1), np.uint64(0) - half, half)


def at_distance(base: Elements, distances: Elements, form: FloatFormat) -> Elements:
    """The elements at these distances from the base's, modulo 2^N."""
    top = np.uint64(8 * form.width - 1)
    every = np.uint64((1 << 8 * form.width) - 1)

    def order(x: Elements) -> Elements:
        return np.where(x >> top & np.uint64(1), x ^ (every >> np.uint64(1)), x)

    d = unzigzag(distances & every)
    return order(np.where(base >> top, order(base) - d, order(base) + d) & every)


# Runs


def decode_list(run: bytes, count: int, direct: int = 4, *, long: bool = False) -> list[int]:
    """``count`` numbers; ``long``: long bytes."""
    return decode_run(run, [0], [0] * count, direct, long)


def decode_run(
    run: bytes, members: list[int], contexts: list[int], direct: int = 4, long: bool = False
) -> list[int]:
    """The values of a run; ``members``: of each context, ``contexts``: of each value."""
    need(len(run) >= 2, "run: head")
    precision, lanes, spread, highest = 8 + (run[0] & 7), 4 ** (run[0] >> 3 & 3), run[0] >> 5, run[1]
    need(precision <= 11, "run: precision")
    frequencies, at = read_tables(run, members, precision, spread, highest, direct)
    starts = [[sum_ - f for sum_, f in zip(itertools.accumulate(t), t, strict=True)] for t in frequencies]
    rest = len(run) - at - 4 * lanes
    need(rest >= 0 and rest % 2 == 0, "run: length")
    states = list(struct.unpack_from(f"<{lanes}I", run, at))
    need(min(states) >= 1 << 16, "run: first states")
    words = iter(struct.unpack_from(f"<{rest // 2}H", run, at + 4 * lanes))
    values: list[int] = []

    def put(lane: int, state: int) -> None:
        if state < 1 << 16:
            word = next(words, None)
            need(word is not None, "run: too few words")
            state = state << 16 | (word or 0)
        states[lane] = state

    for first in range(0, len(contexts), lanes):
        waiting = []  # lane, raw bits that its value lacks
        for lane, context in enumerate(contexts[first : first + lanes]):
            state = states[lane]
            slot = state & ((1 << precision) - 1)
            token = bisect.bisect_right(starts[context], slot) - 1
            state = frequencies[context][token] * (state >> precision) + slot - starts[context][token]
            value, raw = (token, 5) if long else lead_of(token, direct)
            count = min(raw, 16 - precision)
            values.append(value << count | state & ((1 << count) - 1))
            put(lane, state >> count)
            if raw > count:
                waiting.append((lane, raw - count))
        for lane, raw in waiting:
            pull(values, states, first, lane, min(raw, 16))
            put(lane, states[lane])
        for lane, raw in waiting:
            if raw > 16:
                pull(values, states, first, lane, raw - 16)
                put(lane, states[lane])
    need(next(words, None) is None, "run: words left over")
    need(all(state == 1 << 16 for state in states), "run: last states")
    return values


def pull(values: list[int], states: list[int], first: int, lane: int, count: int) -> None:
    """``count`` more raw bits of a lane's value."""
    values[first + lane] = values[first + lane] << count | states[lane] & ((1 << count) - 1)
    states[lane] >>= count


def lead_of(token: int, direct: int) -> tuple[int, int]:
    """A token's value without its raw bits, and how many these are."""
    if token < 1 << direct:
        return token, 0
    return 4 | token & 3, ((token - (1 << direct)) >> 2) + direct - 2


def read_tables(
    run: bytes, members: list[int], precision: int, spread: int, highest: int, direct: int
) -> tuple[list[list[int]], int]:
    """The tables' frequencies, and where in the run they end."""
    bit = 16

    def take(count: int) -> int:
        nonlocal bit
        need(bit + count <= 8 * len(run), "tables: too short")
        number = sum((run[k >> 3] >> (k & 7) & 1) << (k - bit) for k in range(bit, bit + count))
        bit += count
        return number

    tables = []
    for member in members:
        if take(1):
            weights, first, last, length = [0] * 256, take(8), take(8), 12
            for token in range(first, last + 1):
                ones = 0
                while take(1):
                    ones += 1
                length += -((ones + 1) >> 1) if ones & 1 else ones >> 1
                need(0 <= length <= 16, "tables: bit length")
                kept = min(length - 1, 3)
                below = length - 1 - kept
                if length:
                    weights[token] = ((1 << kept) + take(kept) << below) + (1 << below >> 1)
        else:
            a, b, c = (family(min(max(m, 0), 47)) for m in (member - spread, member, member + spread))
            weights = [max((a[t] + 2 * b[t] + c[t]) >> 2, 1) if t <= highest else 0 for t in range(256)]
        tables.append(frequencies_of(weights, precision))
        need(direct == 8 or not any(weights[128:]), "tables: a token above 127")
    return tables, (bit + 7) // 8


def frequencies_of(weights: list[int], precision: int) -> list[int]:
    """Frequencies that add up to 2^precision."""
    present = sum(w > 0 for w in weights)
    need(present, "tables: empty")
    total, spare = sum(weights), (1 << precision) - present
    frequencies = [1 + w * spare // total if w else 0 for w in weights]
    frequencies[weights.index(max(weights))] += (1 << precision) - sum(frequencies)
    return frequencies


@functools.cache
def family(member: int) -> list[int]:
    """A member's numbers for the tokens 0 to 255."""
    half = math.isqrt(1 << 136 - member)

    def tail(distance: int) -> int:
        return exp_minus((2 * distance - 1) * half)

    def at_least(value: int) -> int:
        if value == 0:
            return 1 << 64
        if value & 1:
            return tail((value + 1) >> 1)
        return (tail(value >> 1) + tail((value >> 1) + 1)) >> 1

    numbers = [0] * 256
    for token in range(100):
        lead, raw = lead_of(token, 4)
        numbers[token] = (at_least(lead << raw) - at_least((lead + 1) << raw)) >> 44
    return numbers


def exp_minus(x: int) -> int:
    """e^(-x / 2^64) times 2^64."""
    if x >> 64 >= 45:
        return 0
    halvings = max(0, x.bit_length() - 64)
    y = (x << 64) >> halvings
    term = total = 1 << 128
    for k in itertools.count(1):
        term = (term * y >> 128) // k
        if not term:
            break
        total += term
    for _ in range(halvings):
        total = total * total >> 128
    return (1 << 192) // total


# Files


def decompress_file(data: bytes, size: int) -> bytes:
    """A zstd file that holds ``size`` bytes."""
    try:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 23).decompressobj()
        result = frame.decompress(data)
    except zstandard.ZstdError as error:
        raise BadDeltaError(f"zstd: {error}") from error
    need(frame.eof and not frame.unused_data, "zstd: one whole frame")
    need(len(result) == size, "zstd: size")
    return result


if __name__ == "__main__":
    try:
        rebuild(*map(Path, sys.argv[1:]))
    except BadDeltaError as error:
        sys.exit(str(error))
