"""Fixtures made wrong, one fault in each: no reader may make a result of them.

A delta is sealed anew after each change, where there is a seal: so it is the fault that a reader has to find,
not a digest that nobody wrote anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
#: Changes the copies of a delta and its base.
Damage = Callable[[Path, Path], None]

_SHARD = "delta-00001-of-00002.safetensors"
_PACKED = "files/vocab.json.zst"


def seal(delta: Path, manifest: Json) -> None:
    """Write a manifest in canonical form, with the right sizes and digests of all that is there."""
    for file in manifest["files"]:
        if (delta / file["path"]).is_file():
            data = (delta / file["path"]).read_bytes()
            file |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["checksum"] = ""
    manifest["checksum"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    (delta / "deltaweights.json").write_bytes(_canonical(manifest))


def _canonical(manifest: Json) -> bytes:
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _read(delta: Path) -> Json:
    manifest: Json = json.loads((delta / "deltaweights.json").read_bytes())
    return manifest


def _manifest(change: Callable[[Json], object]) -> Damage:
    def damage(delta: Path, _: Path) -> None:
        manifest = _read(delta)
        change(manifest)
        seal(delta, manifest)

    return damage


def _raw(change: Callable[[bytes], bytes], path: str = "deltaweights.json") -> Damage:
    """Changes a file of the delta, and no seal."""

    def damage(delta: Path, _: Path) -> None:
        (delta / path).write_bytes(change((delta / path).read_bytes()))

    return damage


def _file(path: str, change: Callable[[bytes], bytes]) -> Damage:
    """Changes a file of the delta, and seals it."""

    def damage(delta: Path, _: Path) -> None:
        (delta / path).write_bytes(change((delta / path).read_bytes()))
        seal(delta, _read(delta))

    return damage


def _base(path: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(_: Path, base: Path) -> None:
        (base / path).write_bytes(change((base / path).read_bytes()))

    return damage


def _without(path: str, *, of_base: bool = False) -> Damage:
    return lambda delta, base: ((base if of_base else delta) / path).unlink()


def _put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: at % len(data)] + new + data[at % len(data) + len(new) :]


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: _put(at, bytes([data[at] ^ 1]))(data)


def _payload(at: int, new: bytes) -> Damage:
    """Puts bytes ``at`` a place of the first shard's data, which begins with a payload's first record."""

    def change(data: bytes) -> bytes:
        return _put(8 + int.from_bytes(data[:8], "little") + at, new)(data)

    return _file(_SHARD, change)


def _entry(index: int, **fields: object) -> Damage:
    return _manifest(lambda manifest: manifest["tensors"][index].update(fields))


def _predictions(**fields: object) -> Damage:
    """Changes what rows of the manifest say of predictions."""

    def change(manifest: Json) -> None:
        for table in manifest["tensors"]:
            for row in table["rows"]:
                row[4]["prediction"].update(fields)

    return _manifest(change)


def _target_file(index: int, **fields: object) -> Damage:
    return _manifest(lambda manifest: manifest["target"]["files"][index].update(fields))


def _shift(data: bytes) -> bytes:
    """The same header, one byte shorter: its JSON is cut."""
    return (int.from_bytes(data[:8], "little") - 1).to_bytes(8, "little") + data[8:]


#: By the fixture that each is made of.
DAMAGES: dict[str, dict[str, Damage]] = {
    "v1": {
        "no manifest": _without("deltaweights.json"),
        "a manifest that is cut": _raw(lambda data: data[:-40]),
        "a manifest with a digit changed and no new checksum": _raw(
            lambda data: data.replace(b'"chunk_bytes":8192', b'"chunk_bytes":4096')
        ),
        "a manifest that is not canonical": _raw(lambda data: data.replace(b'":', b'": ', 1)),
        "a manifest with bytes behind it": _raw(lambda data: data + b"\n"),
        "a later format version": _manifest(lambda manifest: manifest.update(format_version=2)),
        "another format": _manifest(lambda manifest: manifest.update(format="deltaweightz")),
        "an unknown field": _manifest(lambda manifest: manifest.update(more=1)),
        "a field that is missing": _manifest(lambda manifest: manifest.pop("chunk_bytes")),
        "a path that leaves the folder": _target_file(0, path="../config.json"),
        "an absolute path": _target_file(0, path="/tmp/config.json"),  # noqa: S108
        "one path twice": _target_file(1, path="config.json"),
        "a path below a file": _target_file(1, path="config.json/x"),
        "a source that the delta lacks": _target_file(1, source="files/none"),
        "another size of a target file": _target_file(2, size=36474),
        "another digest of a target file": _target_file(4, sha256="0" * 64),
        "a tensor twice": _manifest(lambda manifest: manifest["tensors"].append(manifest["tensors"][0])),
        "a tensor that its shard does not have": _entry(0, name="none"),
        "a tensor called __metadata__": _entry(0, name="__metadata__"),
        "a tensor of another dtype": _entry(0, dtype="F16"),
        "a tensor of another shape": _entry(0, shape=[128, 64]),
        "more changed elements than shared bytes": _entry(0, changed=1 << 20),
        "shared bytes without a base": _entry(0, base=None),
        "fewer shared bytes than both sides have": _entry(0, shared_bytes=8192),
        "a duplicate of nothing": _entry(
            5, status="duplicate", payload_bytes=0, like={"file": "x", "name": "y"}
        ),
        "a shard that is missing": _without(_SHARD),
        "a shard that is cut": _file(_SHARD, lambda data: data[:-1]),
        "a shard with a byte too many": _file(_SHARD, lambda data: data + b"\0"),
        "a shard header that is cut": _file(_SHARD, _shift),
        "a shard header of 2^63 bytes": _file(_SHARD, _put(0, (1 << 63).to_bytes(8, "little"))),
        "a method that nobody knows": _payload(0, b"\xfa"),
        "a reserved byte that is set": _payload(2, b"\x01"),
        "a chunk's length that does not add up": _payload(4, b"\xff\xff\xff\x7f"),
        "a checksum of the base that is wrong": _payload(8, bytes(8)),
        "a checksum of the target that is wrong": _payload(16, bytes(8)),
        "a chunk's data damaged at its start": _payload(2 * 24, b"\xff\xff\xff\xff"),
        "a chunk's data damaged inside": _payload(2000, b"\xff\x00\xff\x00"),
        "a packed file that is damaged": _file(_PACKED, _put(5000, b"\xff\x00\xff\x00")),
        "a packed file that is cut": _file(_PACKED, lambda data: data[:-100]),
        "a packed file with a second frame": _file(_PACKED, lambda data: data + data),
        "another weight in the base": _base("a.safetensors", _flip(3000)),
        "a base without one of its shards": _without("b.safetensors", of_base=True),
        "another file in the base that the target takes over": _base("config.json", _flip(3)),
    },
    "v1-row": {
        "a row's reserved byte that is set": _payload(2, b"\x01"),
        "a row's data damaged": _payload(300, b"\xff\x00\xff\x00"),
    },
    "v1-low-rank": {
        "a low-rank prediction's checksum that is wrong": _payload(0, bytes(8)),
        "a low-rank prediction's factors damaged": _payload(200, b"\xff\x00\xff\x00"),
        "a prediction of a method that nobody knows": _predictions(method="later"),
        "a prediction that is shorter than it was": _predictions(nbytes=100),
    },
    "v1-quantized": {"a quantized prediction's checksum that is wrong": _payload(0, bytes(8))},
    "v1-drift": {"a drifted chunk's data damaged": _payload(26, b"\xff\xff")},
    "v1-window": {"a window's data damaged": _payload(24, b"\xff\xff\xff\xff")},
    "v1-like": {
        "a duplicate of a tensor that is one": _manifest(
            lambda manifest: [
                entry["like"].update(name=entry["name"], file=entry["file"])
                for entry in manifest["tensors"]
                if "like" in entry
            ]
        )
    },
}


def cases() -> Iterator[tuple[str, str, Damage]]:
    """Fixture, name and damage."""
    for fixture, damages in DAMAGES.items():
        for name, damage in damages.items():
            yield fixture, name, damage
