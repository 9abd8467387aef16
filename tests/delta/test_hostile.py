"""A delta, a checkpoint and an output folder made to do harm: each is refused with an error of our own.

A hostile publisher can make every checksum right, so the tests do too: it is the check under test that stops
them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    FormatVersionError,
    HeaderError,
    Manifest,
    ManifestError,
    OutputError,
    PayloadError,
    apply_delta,
    make_delta,
    open_target,
    verify_delta,
)
from deltaweights.checkpoint import TensorInfo, build_header, parse_header
from deltaweights.codec import RECORD, Method, checksum
from deltaweights.delta.shards import usual_header
from deltaweights.entries import BaseTensor, TargetTensor, TensorEntry
from deltaweights.inspect import inspect_delta
from deltaweights.manifest import FileRecord, License, TargetFile

from ..checkpoints import bf16, contents, digests, f32, payload_places, weights, write_safetensors
from ..conftest import Trio

_MANIFEST = "deltaweights.json"
_SHARD = "delta-00001-of-00001.safetensors"
_TIB = 1 << 40

Kind: TypeAlias = "type[DeltaWeightsError] | tuple[type[DeltaWeightsError], ...]"


@pytest.fixture
def small(tmp_path: Path) -> Trio:
    """A base and a target of one shard and a file each way of storing it, and their delta, to be edited."""
    trio = Trio(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    old = {"embed": bf16(weights((64, 64), 1)), "wide": f32(weights((40, 50), 2))}
    new = {
        "embed": bf16(weights((64, 64), 1) * 1.01),
        "wide": f32(weights((40, 50), 2) + weights((40, 50), 3, 1e-4)),
        "added": bf16(weights((50, 60), 4)),
        "copy": bf16(weights((50, 60), 4)),
    }
    write_safetensors(trio.base / "model.safetensors", old)
    write_safetensors(trio.target / "model.safetensors", new, metadata={"format": "pt"})
    for side in (trio.base, trio.target):
        (side / "config.json").write_text("{}")
    (trio.target / "vocab.json").write_text(json.dumps(list(range(20_000))))
    (trio.target / "notes.txt").write_text("ours")
    (trio.target / "sub").mkdir()
    (trio.target / "sub" / "more.txt").write_text("more")
    make_delta(trio.base, trio.target, trio.delta, chunk_bytes=4096)
    return trio


# Headers


def _one(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _raw(text: bytes, body: int = 4, length: int | None = None) -> bytes:
    """A file with this header, and ``body`` bytes of tensors."""
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)


_HEADERS: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "no JSON": _raw(b"", 0),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    "length beyond the file": _raw(b"{}", 0, 3),
    "gigantic length": _raw(b"{}", 0, 2**64 - 1),
    "length of 2**63": _raw(b"{}", 0, 2**63),
    "not UTF-8": _raw(b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
    "UTF-16": _raw(json.dumps({"a": _one()}).encode("utf-16")),
    "a list": _raw(b"[]", 0),
    "a number": _raw(b"1", 0),
    "cut JSON": _raw(b'{"a":'),
    "NUL padding": _raw(json.dumps({"a": _one()}).encode() + b"\0" * 8),
    "text after the JSON": _raw(json.dumps({"a": _one()}).encode() + b" {}"),
    "nested lists": _raw(b"[" * 100_000 + b"]" * 100_000, 0),
    "nested objects": _raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0),
    "nested metadata": _raw(b'{"__metadata__":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 0),
    "lone surrogate in a name": _raw(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
    "lone surrogate in a dtype": _raw(b'{"a":{"dtype":"\\ud800","shape":[4],"data_offsets":[0,4]}}'),
    "one name twice": _raw(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    ),
    "one key twice": _raw(b'{"a":{"dtype":"U8","shape":[9],"shape":[4],"data_offsets":[0,4]}}'),
    "metadata is a list": _raw(b'{"__metadata__":[]}', 0),
    "metadata is a number": _raw(b'{"__metadata__":0}', 0),
    "metadata holds a number": _raw(b'{"__metadata__":{"a":1}}', 0),
    "gigantic integer": _raw(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    **{
        name: _raw(json.dumps(tensors).encode())
        for name, tensors in {
            "overlap": {"a": _one(offsets=[0, 4]), "b": _one(shape=[2], offsets=[2, 4])},
            "same bytes twice": {"a": _one(offsets=[0, 4]), "b": _one(offsets=[0, 4])},
            "gap": {"a": _one(shape=[1], offsets=[0, 1]), "b": _one(shape=[2], offsets=[2, 4])},
            "late start": {"a": _one(shape=[2], offsets=[2, 4])},
            "early end": {"a": _one(shape=[2], offsets=[0, 2])},
            "out of the file": {"a": _one(shape=[5], offsets=[0, 5])},
            "gigantic end": {"a": _one(shape=[2**62], offsets=[0, 2**62])},
            "end of 2**64": {"a": _one(shape=[2**64], offsets=[0, 2**64])},
            "falling offsets": {"a": _one(offsets=[4, 0])},
            "negative offset": {"a": _one(offsets=[-4, 0])},
            "negative size": {"a": _one(shape=[-4])},
            "two negative sizes": {"a": _one(shape=[-2, -2])},
            "float offset": {"a": _one(offsets=[0.0, 4.0])},
            "float size": {"a": _one(shape=[4.0])},
            "infinite size": {"a": _one(shape=[float("inf")])},
            "bool size": {"a": _one(shape=[True, 4])},
            "string size": {"a": _one(shape=["4"])},
            "string shape": {"a": _one(shape="4")},
            "null shape": {"a": _one(shape=None)},
            "three offsets": {"a": _one(offsets=[0, 4, 4])},
            "string offsets": {"a": _one(offsets="04")},
            "number as dtype": {"a": _one(dtype=8)},
            "no dtype": {"a": {"shape": [4], "data_offsets": [0, 4]}},
            "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 4]}},
            "no offsets": {"a": {"dtype": "U8", "shape": [4]}},
            "entry is a list": {"a": [0, 4]},
            "entry is null": {"a": None},
            "size of another dtype": {"a": _one(dtype="F32")},
            "sizes that overflow to 4": {"a": _one(shape=[2**32, 2**32, 4])},
            "64 sizes of 2**63": {"a": _one(shape=[2**63] * 64)},
            "65 sizes": {"a": _one(shape=[1] * 64 + [4])},
            "100,000 sizes": {"a": _one(shape=[1] * 100_000)},
        }.items()
    },
}


@pytest.mark.parametrize("content", _HEADERS.values(), ids=_HEADERS.keys())
def test_a_hostile_header_is_refused_where_it_is_needed(small: Trio, content: bytes) -> None:
    """In target and delta. In a base, a file that no tensor is needed from counts as absent."""
    (small.target / "other.safetensors").write_bytes(content)
    with _refused(CheckpointError, "target/other"):
        make_delta(small.base, small.target, small.delta.with_name("new"))
    assert not small.delta.with_name("new").exists()
    (small.target / "other.safetensors").unlink()
    (small.base / "other.safetensors").write_bytes(content)
    apply_delta(small.delta, small.delta.with_name("out"), base=small.base)
    assert contents(small.delta.with_name("out")) == contents(small.target)
    (small.base / "other.safetensors").unlink()
    _store(small.delta, _SHARD, content)
    _assert_refused(small, DeltaError)


def test_header_errors_are_header_errors(small: Trio) -> None:
    (small.base / "model.safetensors").write_bytes(_HEADERS["overlap"])
    with pytest.raises(HeaderError, match="starts at byte"):
        apply_delta(small.delta, small.delta.with_name("out"), base=small.base)
    (small.base / "model.safetensors").write_bytes(_HEADERS["Git LFS pointer"])
    with pytest.raises(HeaderError, match="git lfs pull"):
        apply_delta(small.delta, small.delta.with_name("out"), base=small.base)


# Manifests

_BAD_PATHS = [
    "", ".", "..", "../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/", "/abs", "//abs", "/",
    "~/x/../../..", ".git/hooks/post-checkout", ".GIT/config", "sub/.git/config", ".deltaweights/lock",
    ".DeltaWeights/x", "a\\..\\b", "C:/x", "c:x", "a\0b", "a\nb", "a\x1b[31m", "a\x7f", "x" * 256, "é" * 128,
    "/".join(["a" * 200] * 30),
]  # fmt: skip


@pytest.mark.parametrize("path", _BAD_PATHS, ids=lambda path: repr(path[:30]))
@pytest.mark.parametrize("place", ["target", "delta"])
def test_a_path_that_is_not_plainly_inside_is_refused(small: Trio, place: str, path: str) -> None:
    edit = _target_file(path=path) if place == "target" else _own_file(path=path)
    _write(small.delta, edit(_read(small.delta)))
    before = contents(small.delta.parent)
    _assert_refused(small, ManifestError)
    assert contents(small.delta.parent) == before


def _target_file(name: str = "notes.txt", **changes: Any) -> Callable[[Manifest], Manifest]:
    """Edit the record of one target file."""

    def edit(manifest: Manifest) -> Manifest:
        files = [replace(f, **changes) if f.path == name else f for f in manifest.target.files]
        return replace(manifest, target=replace(manifest.target, files=tuple(files)))

    return edit


def _own_file(name: str = "files/notes.txt", **changes: Any) -> Callable[[Manifest], Manifest]:
    """Edit the record of one of the delta's files, and what refers to it."""

    def edit(manifest: Manifest) -> Manifest:
        files = [replace(f, **changes) if f.path == name else f for f in manifest.files]
        targets = [
            replace(f, source=changes.get("path", name)) if f.source == name else f
            for f in manifest.target.files
        ]
        edited = replace(manifest, files=tuple(files))
        return replace(edited, target=replace(edited.target, files=tuple(targets)))

    return edit


def _entry(name: str = "embed", **changes: Any) -> Callable[[Manifest], Manifest]:
    """Edit the entry of one tensor."""

    def edit(manifest: Manifest) -> Manifest:
        entries = [replace(e, **changes) if e.name == name else e for e in manifest.tensors]
        return replace(manifest, tensors=tuple(entries))

    return edit


def _more(*extra: FileRecord | TargetFile | TensorEntry) -> Callable[[Manifest], Manifest]:
    """Add records."""

    def edit(manifest: Manifest) -> Manifest:
        for record in extra:
            if isinstance(record, FileRecord):
                manifest = replace(manifest, files=(*manifest.files, record))
            elif isinstance(record, TensorEntry):
                manifest = replace(manifest, tensors=(*manifest.tensors, record))
            else:
                files = (*manifest.target.files, record)
                manifest = replace(manifest, target=replace(manifest.target, files=files))
        return manifest

    return edit


def _reversed(manifest: Manifest, coded: str, copy: str) -> Manifest:
    """``coded`` is said to be like ``copy``, and not the other way round."""
    changes: dict[str, dict[str, Any]] = {
        coded: {"status": "duplicate", "payload_bytes": 0, "like": TargetTensor(copy, "model.safetensors")},
        copy: {"status": "added", "like": None},
    }
    for name, fields in changes.items():
        manifest = _entry(name, **fields)(manifest)
    return manifest


def _base(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, base=replace(manifest.base, **changes))


_ZERO = hashlib.sha256(b"").hexdigest()
_NOTES = TargetFile("notes.txt", 4, hashlib.sha256(b"ours").hexdigest(), "verbatim", "files/notes.txt")
_EMBED = BaseTensor("embed", "BF16", (64, 64))
_GHOST = TensorEntry("ghost", "model.safetensors", "BF16", (1,), "added", None, 0, 0, 26)

_MANIFESTS: dict[str, tuple[type[DeltaError], Callable[[Manifest], Manifest]]] = {
    "target file twice": (ManifestError, _more(_NOTES)),
    "own file twice": (ManifestError, _more(FileRecord("files/notes.txt", 4, _ZERO))),
    "file and folder": (ManifestError, _more(replace(_NOTES, path="notes.txt/x"))),
    "folder and file": (ManifestError, _more(replace(_NOTES, path="sub"))),
    "own file and folder": (ManifestError, _more(FileRecord("files/notes.txt/x", 4, _ZERO))),
    "lists the manifest": (ManifestError, _more(FileRecord(_MANIFEST, 4, _ZERO))),
    "lists the card": (ManifestError, _more(FileRecord("README.md", 4, _ZERO))),
    "source that the delta lacks": (ManifestError, _target_file(source="files/other.txt")),
    "source is the manifest": (ManifestError, _target_file(source=_MANIFEST)),
    "source outside": (ManifestError, _target_file(source="../base/config.json")),
    "source that the base lacks": (ManifestError, _target_file("config.json", source="../config.json")),
    "base source of another size": (ManifestError, _target_file("config.json", size=3)),
    "base source of another hash": (ManifestError, _target_file("config.json", sha256=_ZERO)),
    "base file twice": (
        ManifestError,
        lambda m: replace(m, base=replace(m.base, files=(*m.base.files, m.base.files[0]))),
    ),
    "license text that is not there": (
        ManifestError,
        _base(license=License("x", files=(FileRecord("licenses/x", 1, _ZERO),))),
    ),
    "license text outside": (
        ManifestError,
        _base(license=License("x", files=(FileRecord("../LICENSE", 1, _ZERO),))),
    ),
    "tensor twice": (ManifestError, lambda m: replace(m, tensors=(*m.tensors, m.tensors[0]))),
    "tensor in no shard": (ManifestError, _entry(file="notes.txt")),
    "tensor in an unknown file": (ManifestError, _entry(file="../x.safetensors")),
    "tensor in no file": (ManifestError, _entry(file=None)),
    "removed, but there": (ManifestError, _entry(status="removed")),
    "shares with no tensor": (ManifestError, _entry(base=None)),
    "shares more than it has": (ManifestError, _entry(shared_bytes=64 * 64 * 2 + 2)),
    "shares gigantically": (ManifestError, _entry(shared_bytes=2**61)),
    "shares more than the base has": (
        ManifestError,
        _entry("wide", base=_EMBED, shared_bytes=64 * 64 * 2 // 2 * 4),
    ),
    "shares with another dtype": (ManifestError, _entry("wide", base=_EMBED, shared_bytes=7)),
    "duplicate of nothing": (ManifestError, _entry("copy", like=TargetTensor("x", "model.safetensors"))),
    "duplicate of a file": (ManifestError, _entry("copy", like=TargetTensor("added", "notes.txt"))),
    "duplicate outside": (ManifestError, _entry("copy", like=TargetTensor("added", "../model.safetensors"))),
    "duplicate of itself": (ManifestError, _entry("copy", like=TargetTensor("copy", "model.safetensors"))),
    "duplicate of a removed tensor": (ManifestError, _entry("added", status="removed", file=None)),
    "duplicate of another kind": (
        ManifestError,
        _entry("copy", like=TargetTensor("embed", "model.safetensors")),
    ),
    "duplicates of each other": (
        ManifestError,
        _entry("added", status="duplicate", payload_bytes=0, like=TargetTensor("copy", "model.safetensors")),
    ),
    "duplicate with a payload": (ManifestError, _entry("copy", payload_bytes=24)),
    "duplicate with a base": (ManifestError, _entry("copy", base=_EMBED)),
    "duplicate of nothing at all": (ManifestError, _entry("copy", like=None)),
    "like, but no duplicate": (ManifestError, _entry("copy", status="added")),
    "a copy without a payload that is no duplicate": (
        PayloadError,
        _entry("copy", status="added", like=None),
    ),
    "a payload of a duplicate": (PayloadError, lambda m: _reversed(m, "added", "copy")),
    "shares less": (DeltaError, _entry(shared_bytes=4096)),
    "shares an odd number of bytes": (DeltaError, _entry(shared_bytes=4097)),
    "shares nothing": (DeltaError, _entry(shared_bytes=0)),
    "other chunks": (DeltaError, lambda m: replace(m, chunk_bytes=8192)),
    "chunks of 4 MiB": (DeltaError, lambda m: replace(m, chunk_bytes=1 << 22)),
    "chunks of 1 byte": (ManifestError, lambda m: replace(m, chunk_bytes=1)),
    "chunks of 0 bytes": (ManifestError, lambda m: replace(m, chunk_bytes=0)),
    "chunks of -4096 bytes": (ManifestError, lambda m: replace(m, chunk_bytes=-4096)),
    "chunks of 8 MiB": (ManifestError, lambda m: replace(m, chunk_bytes=1 << 23)),
    "chunks of 2**61 bytes": (ManifestError, lambda m: replace(m, chunk_bytes=1 << 61)),
    "chunks of 5000 bytes": (ManifestError, lambda m: replace(m, chunk_bytes=5000)),
    "negative size": (ManifestError, _target_file(size=-1)),
    "size of 2**62": (ManifestError, _target_file(size=2**62)),
    "wrong size": (DeltaError, _target_file(size=5)),
    "shorter": (DeltaError, _target_file(size=3)),
    "wrong hash": (DeltaError, _target_file(sha256=_ZERO)),
    "hash in capitals": (ManifestError, _target_file(sha256=_ZERO.upper())),
    "hash too short": (ManifestError, _target_file(sha256="00")),
    "hash with a line feed": (ManifestError, _target_file(sha256=_ZERO + "\n")),
    "wrong hash of the shard": (DeltaError, _target_file("model.safetensors", sha256=_ZERO)),
    "wrong size of the shard": (DeltaError, _target_file("model.safetensors", size=30_000)),
    "shard from a text": (DeltaError, _target_file("model.safetensors", source="files/notes.txt")),
    "text from a shard": (DeltaError, _target_file(source=_SHARD)),
    "text as a shard": (DeltaError, _target_file(stored="tensors")),
    "text as zstd": (DeltaError, _target_file(stored="zstd")),
    "zstd as text": (DeltaError, _target_file("vocab.json", stored="verbatim")),
    "own file larger than it is": (DeltaError, _own_file(size=2**61)),
    "another format": (ManifestError, lambda m: replace(m, format="other")),  # type: ignore[arg-type]
    "version 2": (FormatVersionError, lambda m: replace(m, format_version=2)),
    "version 0": (FormatVersionError, lambda m: replace(m, format_version=0)),
    "version -1": (FormatVersionError, lambda m: replace(m, format_version=-1)),
    "version 2**200": (FormatVersionError, lambda m: replace(m, format_version=2**63)),
    "an unknown status": (ManifestError, _entry(status="odd")),
    "an unknown way to store": (ManifestError, _target_file(stored="pickle")),
    "65 sizes": (ManifestError, _entry(shape=(1,) * 65)),
    "negative shape": (ManifestError, _entry(shape=(-64, -64))),
    "more changed than there is": (ManifestError, _entry(changed=2**61)),
    "payload of another size": (DeltaError, _entry(payload_bytes=2**61)),
}


@pytest.mark.parametrize(("kind", "edit"), _MANIFESTS.values(), ids=_MANIFESTS.keys())
def test_a_hostile_manifest_is_refused(
    small: Trio, kind: type[DeltaError], edit: Callable[[Manifest], Manifest]
) -> None:
    _write(small.delta, edit(_read(small.delta)))
    _assert_refused(small, kind)


#: What a manifest may say of tensors that their shard does not.
_CONTRADICTIONS: dict[str, Callable[[Manifest], Manifest]] = {
    "ghost tensor": _more(_GHOST),
    "missing tensor": lambda m: replace(m, tensors=m.tensors[1:]),
    "another shape": _entry(shape=(64 * 64,)),
    "gigantic shape": _entry(shape=(2**63,) * 64),
    "another dtype": _entry(dtype="F16"),
    "another order": lambda m: replace(m, tensors=m.tensors[::-1]),
    "a byte of the payload to the next": lambda m: replace(
        m,
        tensors=(
            replace(m.tensors[0], payload_bytes=m.tensors[0].payload_bytes - 1),
            replace(m.tensors[1], payload_bytes=m.tensors[1].payload_bytes + 1),
            *m.tensors[2:],
        ),
    ),
}


@pytest.mark.parametrize("edit", _CONTRADICTIONS.values(), ids=_CONTRADICTIONS.keys())
def test_a_manifest_that_contradicts_its_shards_is_refused(
    small: Trio, edit: Callable[[Manifest], Manifest]
) -> None:
    _write(small.delta, edit(_read(small.delta)))
    _assert_refused(small, DeltaError)


def test_payloads_apart_are_found_by_their_names(small: Trio) -> None:
    """As in earlier deltas: their order says nothing, and what contradicts the manifest is known as that."""
    _hold_apart(small)
    whole = _read(small.delta)
    for name, edit in _CONTRADICTIONS.items():
        _write(small.delta, edit(whole))
        if name == "another order":
            apply_delta(small.delta, small.delta.with_name("other"), base=small.base)
            assert contents(small.delta.with_name("other")) == contents(small.target)
        else:
            _assert_refused(small, PayloadError)


def _hold_apart(trio: Trio) -> None:
    """Make the delta's shard one in which each payload is a tensor."""
    shard = (trio.delta / _SHARD).read_bytes()
    raw = (trio.target / "model.safetensors").read_bytes()
    copy = _packed(zstandard.compress(raw[: 8 + int.from_bytes(raw[:8], "little")]))
    tensors = _payloads_apart(trio.delta)
    header = build_header(tensors, {"format": "deltaweights", "header": copy})
    _store(trio.delta, _SHARD, header + shard[-tensors[-1].end :])


@pytest.mark.parametrize(
    "repo_id",
    [
        "../base",
        "/abs",
        "~/x",
        "~nobody/x",
        "a/b/c",
        "a/b; ls",
        "a/b\n",
        "a/\x1b[2J",
        "-x/y",
        "x" * 5000,
        "",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_base_that_is_not_named_by_a_hub_id_is_refused(
    small: Trio, monkeypatch: pytest.MonkeyPatch, repo_id: str
) -> None:
    """What a manifest names must become neither a path of this machine nor a command in a message."""
    monkeypatch.chdir(small.delta.parent)
    _write(small.delta, _base(repo_id=repo_id)(_read(small.delta)))
    with _refused(DeltaError):
        apply_delta(small.delta, "out")
    with _refused(DeltaError):
        open_target(small.delta, small.base)


def test_a_folder_here_is_not_taken_for_the_base_on_the_hub(
    small: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a base that the user names may be a folder."""
    monkeypatch.chdir(small.delta.parent)
    (small.delta.parent / "org").mkdir()
    small.base.rename(small.delta.parent / "org" / "name")
    _write(small.delta, _base(repo_id="org/name")(_read(small.delta)))
    with _refused(CheckpointError):
        apply_delta(small.delta, "out")
    apply_delta(small.delta, "out", base="org/name")


@pytest.mark.parametrize("revision", ["../../..", "a b", "x; ls", "-x", "x\n", "\x1b[2J", ""])
def test_a_revision_that_is_none_is_refused(small: Trio, revision: str) -> None:
    _write(small.delta, _base(repo_id="org/name", revision=revision)(_read(small.delta)))
    with _refused(DeltaError):
        open_target(small.delta, small.base)


def _json_of(manifest: Manifest) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(manifest.to_json())
    return value


def _canonical(value: dict[str, Any]) -> bytes:
    """Canonical JSON with a right checksum, of whatever fields."""
    checksum = hashlib.sha256(msgspec.json.encode({**value, "checksum": ""}, order="sorted") + b"\n")
    return msgspec.json.encode({**value, "checksum": checksum.hexdigest()}, order="sorted") + b"\n"


_NO_MANIFESTS: dict[str, Callable[[Manifest], bytes]] = {
    "nothing": lambda m: b"",
    "cut": lambda m: m.to_json()[:-20],
    "not UTF-8": lambda m: m.to_json().replace(b"notes", b"n\xfftes"),
    "lone surrogate": lambda m: m.to_json().replace(b"notes", b"\\ud800"),
    "byte order mark": lambda m: b"\xef\xbb\xbf" + m.to_json(),
    "NUL behind": lambda m: m.to_json() + b"\0",
    "line feed behind": lambda m: m.to_json() + b"\n",
    "no line feed": lambda m: m.to_json().rstrip(),
    "white space": lambda m: json.dumps(_json_of(m), indent=1).encode(),
    "a list": lambda m: b"[" + m.to_json() + b"]",
    "null": lambda m: b"null",
    "nested lists": lambda m: b"[" * 100_000 + b"]" * 100_000,
    "nested objects": lambda m: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested value": lambda m: m.to_json().replace(b'"tensors":[', b'"tensors":' + b"[" * 100_000),
    "one key twice": lambda m: m.to_json().replace(b'{"base"', b'{"format_version":1,"base"'),
    "unknown field": lambda m: _canonical({**_json_of(m), "zzz": 1}),
    "unknown inside": lambda m: _canonical({**_json_of(m), "tool": {"name": "", "version": "", "z": 1}}),
    "field missing": lambda m: _canonical({k: v for k, v in _json_of(m).items() if k != "files"}),
    "no version": lambda m: _canonical({k: v for k, v in _json_of(m).items() if k != "format_version"}),
    "float version": lambda m: _canonical({**_json_of(m), "format_version": 1.0}),
    "bool version": lambda m: _canonical({**_json_of(m), "format_version": True}),
    "text version": lambda m: _canonical({**_json_of(m), "format_version": "1"}),
    "float chunks": lambda m: _canonical({**_json_of(m), "chunk_bytes": 4096.0}),
    "bool chunks": lambda m: _canonical({**_json_of(m), "chunk_bytes": True}),
    "text for files": lambda m: _canonical({**_json_of(m), "files": "files"}),
    "wrong checksum": lambda m: m.to_json().replace(b'"checksum":"', b'"checksum":"0', 1),
    "another tool's": lambda m: b'{"format":"diff","format_version":1}',
}  # fmt: skip


@pytest.mark.parametrize("encode", _NO_MANIFESTS.values(), ids=_NO_MANIFESTS.keys())
def test_what_is_no_canonical_manifest_is_refused(small: Trio, encode: Callable[[Manifest], bytes]) -> None:
    (small.delta / _MANIFEST).write_bytes(encode(_read(small.delta)))
    _assert_refused(small, ManifestError)
    with _refused(ManifestError):
        inspect_delta(small.delta)


def test_a_long_manifest_is_checked_in_time_that_grows_with_it(small: Trio) -> None:
    """A path is cut into its parts once, not once for each part."""
    manifest = _target_file(path="a/" * 30_000 + "a")(_read(small.delta))
    _write(small.delta, manifest)
    with _refused(ManifestError):
        open_target(small.delta, small.base)


# Payloads


def _records(payload: bytes, count: int) -> NDArray[np.void]:
    records: NDArray[np.void] = np.frombuffer(payload[: count * RECORD.itemsize], RECORD).copy()
    return records


def _set(field: str, value: int, index: int = 0) -> Callable[[bytes], bytes]:
    """Edit one field of a payload's chunk record."""

    def edit(payload: bytes) -> bytes:
        records = _records(payload, index + 1)
        records[field][index] = value
        return records.tobytes() + payload[(index + 1) * RECORD.itemsize :]

    return edit


def _chunk(method: int, data: bytes, target: int | None = None) -> Callable[[bytes], bytes]:
    """Replace the only chunk of "added" (6000 bytes are two chunks: the first of them)."""

    def edit(payload: bytes) -> bytes:
        records = _records(payload, 2)
        first = int(records["length"][0])
        rest = payload[2 * RECORD.itemsize + first :]
        records["method"][0], records["length"][0] = method, len(data)
        if target is not None:
            records["target"][0] = target
        return records.tobytes() + data + rest

    return edit


def _planes(*planes: bytes, lengths: Sequence[int] | None = None) -> bytes:
    return struct.pack(f"<{len(planes)}I", *(lengths or map(len, planes))) + b"".join(planes)


def _zstd_of_zeros(nbytes: int, claim: int | None) -> bytes:
    """A zstd frame (RFC 8878) of ``nbytes`` zeros, four bytes for each 128 KiB; ``claim`` is the content
    size in its header, None: it has none, and a window of 128 KiB."""
    frame = b"\x28\xb5\x2f\xfd"
    frame += bytes([0]) + bytes([7 << 3]) if claim is None else bytes([0b11100000]) + struct.pack("<Q", claim)
    left = nbytes
    while left > 0:
        size = min(left, 1 << 17)
        left -= size
        frame += ((size << 3) | (1 << 1) | (left <= 0)).to_bytes(3, "little") + b"\0"
    return frame


_PLANE = zstandard.compress(bytes(2048))
_RAW = 1 << 31

_PAYLOADS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda p: b"",
    "half a record": lambda p: p[:12],
    "records only": lambda p: p[: 2 * RECORD.itemsize],
    "a byte less": lambda p: p[:-1],
    "a byte more": lambda p: p + b"\0",
    "unknown method": _set("method", 99),
    "method 255": _set("method", 255),
    "same, without a base": _chunk(Method.SAME, b""),
    "gigantic length": _set("length", 2**32 - 1),
    "length 0": _set("length", 0),
    "length of the next": _set("length", 1, 1),
    "wrong checksum": _set("target", 0),
    "reserved bytes": lambda p: p[:1] + b"\1" + p[2:],
    "raw, too short": _chunk(Method.RAW, bytes(4095)),
    "raw, too long": _chunk(Method.RAW, bytes(4097)),
    "raw, other bytes": _chunk(Method.RAW, bytes(4096)),
    "raw, other bytes, right checksum": _chunk(Method.RAW, bytes(4096), checksum(np.zeros(4096, np.uint8))),
    "planes, no lengths": _chunk(Method.PLANES, b""),
    "planes, half the lengths": _chunk(Method.PLANES, bytes(7)),
    "planes, empty": _chunk(Method.PLANES, bytes(8)),
    "planes, one empty": _chunk(Method.PLANES, _planes(_PLANE, b"")),
    "planes, not zstd": _chunk(Method.PLANES, _planes(b"x" * 100, b"y" * 100)),
    "planes, one raw too short": _chunk(
        Method.PLANES, _planes(_PLANE, b"x", lengths=[len(_PLANE), 1 | _RAW])
    ),
    "planes, lengths beyond": _chunk(
        Method.PLANES, _planes(_PLANE, _PLANE, lengths=[len(_PLANE), 2**31 - 1])
    ),
    "planes, raw length beyond": _chunk(
        Method.PLANES, _planes(_PLANE, _PLANE, lengths=[len(_PLANE), 2**32 - 1])
    ),
    "planes, lengths wrap": _chunk(Method.PLANES, _planes(_PLANE, _PLANE, lengths=[2**31 - 1, 2**31 - 1])),
    "planes, lengths of all": _chunk(Method.PLANES, _planes(_PLANE, _PLANE, lengths=[2 * len(_PLANE), 0])),
    "planes, bytes behind": _chunk(Method.PLANES, _planes(_PLANE, _PLANE) + b"\0"),
    "planes, too few bytes": _chunk(Method.PLANES, _planes(*[zstandard.compress(bytes(2047))] * 2)),
    "planes, too many bytes": _chunk(Method.PLANES, _planes(*[zstandard.compress(bytes(2049))] * 2)),
    "planes, cut frame": _chunk(Method.PLANES, _planes(_PLANE[:-1], _PLANE[:-1])),
    "planes, no content size": _chunk(Method.PLANES, _planes(*[_zstd_of_zeros(2048, None)] * 2)),
    "planes, claims a TiB": _chunk(Method.PLANES, _planes(*[_zstd_of_zeros(2048, _TIB)] * 2)),
    "planes, expands to 4 MB": _chunk(Method.PLANES, _planes(*[_zstd_of_zeros(1 << 22, 2048)] * 2)),
    "planes, claims more than it holds": _chunk(Method.PLANES, _planes(*[_zstd_of_zeros(100, 2048)] * 2)),
    "planes, a skippable frame": _chunk(Method.PLANES, _planes(*[b"\x50\x2a\x4d\x18\x02\0\0\0xx"] * 2)),
    "planes, a dictionary": _chunk(
        Method.PLANES, _planes(*[b"\x28\xb5\x2f\xfd\x61\x07\x00\x08\x01\x00\x00"] * 2)
    ),
}


@pytest.mark.parametrize("edit", _PAYLOADS.values(), ids=_PAYLOADS.keys())
def test_a_hostile_payload_is_refused(small: Trio, edit: Callable[[bytes], bytes]) -> None:
    _edit_payload(small.delta, "added", edit)
    _assert_refused(small, DeltaError)


@pytest.mark.parametrize(
    "edit", [_set("base", 1), _set("method", Method.RAW), _set("target", 5), _chunk(Method.SAME, b"")],
    ids=["base checksum", "method", "target checksum", "same"],
)  # fmt: skip
def test_a_hostile_payload_of_a_tensor_with_a_base_is_refused(
    small: Trio, edit: Callable[[bytes], bytes]
) -> None:
    _edit_payload(small.delta, "embed", edit)
    # A publisher who lies about the base's checksums makes a delta for another base.
    _assert_refused(small, (DeltaError, BaseMismatchError))


def test_random_bytes_for_any_method_are_refused(small: Trio) -> None:
    choice = np.random.default_rng(0)
    before = contents(small.delta)
    for name in ("embed", "added"):
        for method in (*Method, 77):
            for length in (1, 2, 7, 8, 9, 64, 100, 1000, 4096):
                data = choice.bytes(length) if length % 2 else bytes(length - 1) + choice.bytes(1)
                _edit_payload(small.delta, name, _chunk(method, data))
                with _refused(DeltaError, _SHARD):
                    apply_delta(small.delta, small.delta.with_name("out"), base=small.base)
                for path in (_SHARD, _MANIFEST):
                    (small.delta / path).write_bytes(before[path])


_HEADER_COPIES: dict[str, Callable[[bytes], str | None]] = {
    "none": lambda raw: None,
    "empty": lambda raw: "",
    "not base64": lambda raw: "*" * 40,
    "not ASCII": lambda raw: "é" * 40,
    "cut base64": lambda raw: _packed(zstandard.compress(raw))[:-1],
    "not zstd": lambda raw: base64.b64encode(raw).decode(),
    "no content size": lambda raw: _packed(_zstd_of_zeros(100, None)),
    "claims a TiB": lambda raw: _packed(_zstd_of_zeros(100, _TIB)),
    "claims 50 MB, holds less": lambda raw: _packed(_zstd_of_zeros(100, 50 << 20)),
    "expands to a GiB": lambda raw: _packed(_zstd_of_zeros(1 << 30, 1000)),
    "seven bytes": lambda raw: _packed(zstandard.compress(raw[:7])),
    "cut": lambda raw: _packed(zstandard.compress(raw[:-1])),
    "longer": lambda raw: _packed(zstandard.compress(raw + b" ")),
    "longer, and says so": lambda raw: _packed(
        zstandard.compress(struct.pack("<Q", len(raw) - 7) + raw[8:] + b" ")
    ),
    "other bytes": lambda raw: _packed(zstandard.compress(raw.replace(b"pt", b"tf"))),
    "other order": lambda raw: _packed(zstandard.compress(raw.replace(b"embed", b"added", 1))),
    "broken JSON": lambda raw: _packed(zstandard.compress(raw[:8] + raw[8:].replace(b"{", b"[", 1))),
    "gigantic tensor": lambda raw: _packed(
        zstandard.compress(_raw(json.dumps({"embed": _one("U8", [2**61], [0, 2**61])}).encode(), 0))
    ),
    "no tensors": lambda raw: _packed(zstandard.compress(_raw(b"{}", 0))),
}  # fmt: skip


@pytest.mark.parametrize("copy", _HEADER_COPIES.values(), ids=_HEADER_COPIES.keys())
def test_a_hostile_copy_of_the_targets_header_is_refused(
    small: Trio, copy: Callable[[bytes], str | None]
) -> None:
    raw = (small.target / "model.safetensors").read_bytes()
    shard = (small.delta / _SHARD).read_bytes()
    header = parse_header(shard[: 8 + int.from_bytes(shard[:8], "little")], len(shard), "")
    value = copy(raw[: 8 + int.from_bytes(raw[:8], "little")])
    copied = {} if value is None else {"header": value}
    payloads = shard[header.data_start :]
    for kind, tensors in (
        ("deltaweights-row", header.tensors),
        ("deltaweights", _payloads_apart(small.delta)),
    ):
        _store(small.delta, _SHARD, build_header(tensors, {"format": kind} | copied) + payloads)
        _assert_refused(small, DeltaError)


def _payloads_apart(delta: Path) -> list[TensorInfo]:
    """The tensors of the delta shard, if each payload were one, as in earlier deltas."""
    places = payload_places(delta)
    first = places[0].start
    return [TensorInfo(p.name, "U8", (p.end - p.start,), p.start - first, p.end - first) for p in places]


_ROWS: dict[str, Callable[[list[TensorInfo]], tuple[str, list[TensorInfo]]]] = {
    "no format": lambda apart: ("", _row(apart)),
    "another format": lambda apart: ("deltaweights-rows", _row(apart)),
    "a row, called payloads apart": lambda apart: ("deltaweights", _row(apart)),
    "payloads apart, called a row": lambda apart: ("deltaweights-row", apart),
    "another name": lambda apart: ("deltaweights-row", [replace(_row(apart)[0], name="payload")]),
    "another dtype": lambda apart: ("deltaweights-row", [replace(_row(apart)[0], dtype="I8")]),
    "two dimensions": lambda apart: ("deltaweights-row", [replace(_row(apart)[0], shape=(apart[-1].end, 1))]),
    "two rows": lambda apart: ("deltaweights-row", [replace(apart[0], name="payloads"), *apart[1:]]),
    "no row": lambda apart: ("deltaweights-row", []),
    "an empty tensor beside it": lambda apart: (
        "deltaweights-row",
        [TensorInfo("nothing", "U8", (0,), 0, 0), *_row(apart)],
    ),
    "a byte too few": lambda apart: ("deltaweights-row", _row(apart, -1)),
    "a byte too many": lambda apart: ("deltaweights-row", _row(apart, 1)),
}


@pytest.mark.parametrize("tensors_of", _ROWS.values(), ids=_ROWS.keys())
def test_a_delta_shard_that_holds_payloads_in_no_known_way_is_refused(
    small: Trio, tensors_of: Callable[[list[TensorInfo]], tuple[str, list[TensorInfo]]]
) -> None:
    shard = (small.delta / _SHARD).read_bytes()
    header = parse_header(shard[: 8 + int.from_bytes(shard[:8], "little")], len(shard), "")
    kind, tensors = tensors_of(_payloads_apart(small.delta))
    nbytes = sum(info.nbytes for info in tensors)
    payloads = shard[header.data_start :][:nbytes].ljust(nbytes, b"\0")
    _store(small.delta, _SHARD, build_header(tensors, {**header.metadata, "format": kind}) + payloads)
    _assert_refused(small, DeltaError)


def _row(apart: list[TensorInfo], more: int = 0) -> list[TensorInfo]:
    end = apart[-1].end + more
    return [TensorInfo("payloads", "U8", (end,), 0, end)]


def _packed(frame: bytes) -> str:
    return base64.b64encode(frame).decode()


# Amounts

_BOMBS: dict[str, Callable[[Trio], None]] = {
    "a target's header of 100 MB of lists": lambda trio: _long_header(trio, b'{"x":[', b"[],", b"[]]}"),
    "a target's header of 100 MB of objects": lambda trio: _long_header(trio, b'{"x":[', b"{},", b"{}]}"),
    "a target's header of 100 MB of white space": lambda trio: _long_header(trio, b"{", b" ", b"}"),
    "a file that expands to 16 GiB, not 1000 bytes": lambda trio: _bomb(trio, 1000, None),
    "a file that claims a TiB": lambda trio: _bomb(trio, 1000, _TIB),
    "a file with a window of 2 GiB": lambda trio: _store_file(
        trio, b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + _zstd_of_zeros(1 << 20, None)[6:], 1000
    ),
    "a target file of 2**61 bytes": lambda trio: _write(
        trio.delta, _target_file(size=2**61)(_read(trio.delta))
    ),
    "a shard of 2**61 bytes": lambda trio: _gigantic_shard(trio, 2**61),
    "a shard of 2**40 bytes": lambda trio: _gigantic_shard(trio, 2**40),
    "a shard of 2**40 bytes, payloads apart": lambda trio: _gigantic_shard(
        trio, 2**40, "deltaweights", "added"
    ),
    "shapes with 10**5 digits in all": lambda trio: _gigantic_shapes(trio, 5_000),
    "a manifest of 300 MB": lambda trio: os.truncate(trio.delta / _MANIFEST, 300_000_000),
    "a manifest of 200 MB": lambda trio: _long_manifest(trio, 200_000_000),
    "a header of 10 MB": lambda trio: _store(
        trio.delta, _SHARD, _raw(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", 0)
    ),
}


@pytest.mark.parametrize("make", _BOMBS.values(), ids=_BOMBS.keys())
def test_no_number_in_a_delta_makes_memory_grow(small: Trio, make: Callable[[Trio], None]) -> None:
    make(small)
    done = subprocess.run(
        [sys.executable, "-c", _FRUGAL, *map(str, small), str(small.delta.with_name("out"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["errors"] == ["ours"] * len(outcomes["errors"]), done.stderr
    assert outcomes["peak_mib"] < 512


#: Open, apply and verify in no more than 2 GiB of address space; print how each failed and the peak memory.
_FRUGAL = """
import json, resource, sys, traceback
import deltaweights
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
base, target, delta, out = sys.argv[1:]

def read_all():
    with deltaweights.open_target(delta, base) as view:
        for name in view:
            view[name]
    deltaweights.apply_delta(delta, out, base=base, threads=2)

def verify():
    report = deltaweights.verify_delta(delta, base=base, threads=2)
    raise deltaweights.DeltaError("found") if not report.ok else SystemExit("verify found nothing")

errors = []
for action in (read_all, lambda: deltaweights.apply_delta(delta, out, base=base, threads=2), verify):
    try:
        action()
        errors.append("none")
    except deltaweights.DeltaWeightsError:
        errors.append("ours")
    except BaseException as error:
        traceback.print_exc()
        errors.append(type(error).__name__)
with open("/proc/self/status") as status:  # getrusage would count the parent's memory too
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({"errors": errors, "peak_mib": peak / 1024}))
"""


def _bomb(trio: Trio, size: int, claim: int | None) -> None:
    _store_file(trio, _zstd_of_zeros(16 << 30, claim), size)


def _store_file(trio: Trio, packed: bytes, size: int) -> None:
    """Make vocab.json come from this compressed file."""
    _store(trio.delta, "files/vocab.json.zst", packed)
    sha256 = hashlib.sha256(bytes(size)).hexdigest()
    _write(trio.delta, _target_file("vocab.json", size=size, sha256=sha256)(_read(trio.delta)))


def _long_header(trio: Trio, before: bytes, unit: bytes, after: bytes) -> None:
    """A shard without tensors whose target's header is a few kilobytes, compressed."""
    raw = _raw(before + unit * ((100_000_000 - len(before + after)) // len(unit)) + after, 0)
    dictionary = zstandard.ZstdCompressionDict(
        usual_header([], len(raw)) or b"", zstandard.DICT_TYPE_RAWCONTENT
    )
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(raw)
    metadata = {"format": "deltaweights-row", "header": _packed(packed)}
    _store(trio.delta, _SHARD, build_header([TensorInfo("payloads", "U8", (0,), 0, 0)], metadata))
    sha256 = hashlib.sha256(raw).hexdigest()
    manifest = _target_file("model.safetensors", size=len(raw), sha256=sha256)(_read(trio.delta))
    _write(trio.delta, replace(manifest, tensors=()))


def test_a_target_with_a_header_of_nothing_is_refused_by_diff(small: Trio) -> None:
    """Nobody could read it out of the delta."""
    write_safetensors(
        small.target / "model.safetensors", {"a": f32(weights((3,), 1))}, padding=" " * 1_000_000
    )
    with _refused(CheckpointError, "cannot be part of a delta"):
        make_delta(small.base, small.target, small.delta.with_name("new"))


def test_long_metadata_comes_back(small: Trio) -> None:
    """Trainers write megabytes of it: the delta pays for what it holds."""
    digest = hashlib.sha256(b"").hexdigest()
    lines = [digest := hashlib.sha256(digest.encode()).hexdigest() for _ in range(20_000)]
    metadata = {"captions": json.dumps(lines)}
    write_safetensors(small.target / "model.safetensors", {"a": f32(weights((3,), 1))}, metadata=metadata)
    make_delta(small.base, small.target, small.delta.with_name("new"))
    apply_delta(small.delta.with_name("new"), small.delta.with_name("out"), base=small.base)
    assert contents(small.delta.with_name("out")) == contents(small.target)


def _gigantic_shapes(trio: Trio, count: int) -> None:
    """Tensors of so many bytes that their offsets alone would fill memory."""
    manifest = _read(trio.delta)
    entry = TensorEntry("", "model.safetensors", "U8", (2**62 - 1,) * 64, "added", None, 0, 0, 0)
    entries = tuple(replace(entry, name=str(k)) for k in range(count))
    _write(trio.delta, replace(manifest, tensors=(*manifest.tensors, *entries)))


def _gigantic_shard(trio: Trio, nbytes: int, kind: str = "deltaweights-row", name: str = "payloads") -> None:
    """A shard whose one tensor, without a base, has ``nbytes`` bytes; header and manifest agree on it."""
    raw = _raw(json.dumps({"added": _one("U8", [nbytes], [0, nbytes])}).encode(), 0)
    metadata = {"format": kind, "header": _packed(zstandard.compress(raw))}
    payload = build_header([TensorInfo(name, "U8", (0,), 0, 0)], metadata)
    _store(trio.delta, _SHARD, payload)
    manifest = _target_file("model.safetensors", size=len(raw) + nbytes)(_read(trio.delta))
    entry = TensorEntry("added", "model.safetensors", "U8", (nbytes,), "added", None, 0, 0, 0)
    _write(trio.delta, replace(manifest, tensors=(entry,)))


def _long_manifest(trio: Trio, nbytes: int) -> None:
    manifest = _read(trio.delta)
    left_out = ("a",) * (nbytes // 4)
    _write(trio.delta, replace(manifest, target=replace(manifest.target, left_out=left_out)))


# Output folders


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("verb", ["apply", "diff"])
@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("sub", "folder"),
        ("files", "folder"),
        ("licenses", "folder"),
        (".deltaweights", "folder"),
        (".deltaweights/lock", "file"),
        (".deltaweights/claims", "file"),
        (".deltaweights/x.partial", "file"),
        (".deltaweights/x.partial", "folder"),
        (".deltaweights/delta-00001-of-00001.safetensors.memory", "file"),
        (".deltaweights/delta-00001-of-00001.safetensors.partial", "file"),
        ("config.json", "file"),
        ("model.safetensors", "file"),
        ("model.safetensors", "nothing"),
        ("README.md", "file"),
        ("deltaweights.json", "file"),
        ("delta-00001-of-00001.safetensors", "file"),
    ],
)
def test_links_in_the_output_folder_lead_nowhere(
    small: Trio, tmp_path: Path, verb: str, link: str, to: str, force: bool
) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("precious")
    (outside / "folder" / "more.txt").write_text("precious")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(outside / to)
    before = contents(outside)
    error = _run(verb, small, out, force)
    assert contents(outside) == before
    if error is None:
        right = small.target if verb == "apply" else small.delta
        assert contents(right).items() <= contents(out).items()
        for path in contents(right):
            assert not (out / path).is_symlink()


@pytest.mark.parametrize(
    "claim",
    [
        "../outside/file",
        "{outside}/file",
        "sub/../../outside/file",
        "link/file",
        "\udcff",
        "\0",
        "x" * 5000,
        "sub",
        ".",
    ],
)
def test_a_planted_list_of_claims_removes_nothing_outside(small: Trio, tmp_path: Path, claim: str) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (out / ".deltaweights").mkdir(parents=True)
    (out / "link").symlink_to(outside)
    text = (claim.format(outside=outside) + "\n").encode(errors="surrogateescape")
    (out / ".deltaweights" / "claims").write_bytes(text)
    before = contents(outside)
    _run("diff", small, out, force=True)
    assert contents(outside) == before


@pytest.mark.parametrize("verb", ["apply", "diff"])
@pytest.mark.parametrize("content", ["folder", "fifo", "file"])
@pytest.mark.parametrize("name", [".deltaweights", ".deltaweights/lock", ".deltaweights/x.partial", "sub"])
def test_odd_things_in_the_output_folder_give_our_error_or_do_not_matter(
    small: Trio, tmp_path: Path, verb: str, content: str, name: str
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    if content == "folder":
        (out / name).mkdir()
    elif content == "file":
        (out / name).write_text("odd")
    else:
        os.mkfifo(out / name)
    error = _run(verb, small, out, force=False)
    if error:
        assert error.what
        assert error.why


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_other_files_are_refused_and_stay_even_with_force(small: Trio, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    (out / "sub" / "deep").mkdir(parents=True)
    others = {
        "mine.txt": b"mine",
        "sub/deep/mine.txt": b"mine",
        "model.safetensors.bak": b"",
        ".hidden": b"x",
    }
    for path, content in others.items():
        (out / path).write_bytes(content)
    for _ in range(2):  # being refused must not open the door
        error = _run(verb, small, out, force=False)
        assert isinstance(error, OutputError)
        assert error.why
        assert contents(out) == others
    assert _run(verb, small, out, force=True) is None
    right = contents(small.target if verb == "apply" else small.delta)
    assert contents(out) == others | right


def test_force_replaces_files_of_the_same_name_only(small: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("other notes")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        apply_delta(small.delta, out, base=small.base)
    assert contents(out) == {"notes.txt": b"other notes"}
    apply_delta(small.delta, out, base=small.base, force=True)
    assert contents(out) == contents(small.target)


@pytest.mark.parametrize("force", [False, True])
def test_the_result_never_replaces_what_it_is_made_from(small: Trio, tmp_path: Path, force: bool) -> None:
    before = {folder: digests(folder) for folder in small}
    single = small.base / "model.safetensors"
    make_delta(single, small.target / "model.safetensors", tmp_path / "single")
    for delta, base, out in (
        (small.delta, small.base, small.base),
        (small.delta, small.base, small.base / "sub"),
        (small.delta, small.base, small.delta),
        (small.delta, small.base, small.delta / "files"),
        (tmp_path / "single", single, small.base),
    ):
        with _refused(OutputError):
            apply_delta(delta, out, base=base, force=force)
    for base, target, out in (
        (small.base, small.target, small.base),
        (small.base, small.target, small.target / "delta"),
    ):
        with _refused(OutputError):
            make_delta(base, target, out, force=force)
    assert {folder: digests(folder) for folder in small} == before


@pytest.mark.parametrize(
    "path", ["x" * 300, "a/" * 3000, "\0", "~nobody-at-all/x"], ids=["name", "path", "NUL", "~"]
)
@pytest.mark.parametrize("argument", ["base", "delta", "out"])
def test_an_impossible_path_gives_our_error(
    small: Trio, monkeypatch: pytest.MonkeyPatch, argument: str, path: str
) -> None:
    monkeypatch.chdir(small.delta.parent)
    paths = {"base": str(small.base), "delta": str(small.delta), "out": "out"} | {argument: path}
    with _refused(DeltaWeightsError):
        apply_delta(paths["delta"], paths["out"], base=paths["base"])


def _run(verb: str, trio: Trio, out: Path, force: bool) -> DeltaWeightsError | None:
    """Run apply or diff. Returns our error if there is one; any other goes through."""
    try:
        if verb == "apply":
            apply_delta(trio.delta, out, base=trio.base, force=force)
        else:
            make_delta(trio.base, trio.target, out, chunk_bytes=4096, force=force)
    except DeltaWeightsError as error:
        return error
    return None


@contextmanager
def _refused(kind: Kind, what: str = "") -> Iterator[None]:
    """The block raises an error of this kind that says what and why."""
    with pytest.raises(kind) as refused:
        yield
    assert refused.value.what
    assert refused.value.why
    assert what in refused.value.what


def _assert_refused(trio: Trio, kind: Kind) -> None:
    """Apply fails with this kind of error and leaves no wrong file; verify finds fault too."""
    out = trio.delta.with_name("out")
    with _refused(kind):
        apply_delta(trio.delta, out, base=trio.base)
    assert contents(out).items() <= contents(trio.target).items()
    assert not (out / ".deltaweights").exists()
    error, report = None, None
    try:
        report = verify_delta(trio.delta, base=trio.base)
    except DeltaWeightsError as found:
        error = found
    assert error or (report and not report.ok)


def _read(delta: Path) -> Manifest:
    return Manifest.from_json((delta / _MANIFEST).read_bytes())


def _write(delta: Path, manifest: Manifest) -> None:
    (delta / _MANIFEST).write_bytes(manifest.to_json())


def _store(delta: Path, path: str, content: bytes) -> None:
    """Replace a file of the delta, and make the manifest agree."""
    (delta / path).write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    _write(delta, _own_file(path, size=len(content), sha256=sha256)(_read(delta)))


def _edit_payload(delta: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    """Edit the payload of one tensor, and make the delta shard's header and the manifest agree."""
    raw = (delta / _SHARD).read_bytes()
    header = parse_header(raw[: 8 + int.from_bytes(raw[:8], "little")], len(raw), "")
    (place,) = (place for place in payload_places(delta) if place.name == name)
    payload = edit(raw[place.start : place.end])
    row = raw[header.data_start : place.start] + payload + raw[place.end :]
    tensors = [TensorInfo("payloads", "U8", (len(row),), 0, len(row))]
    _write(delta, _entry(name, payload_bytes=len(payload))(_read(delta)))
    _store(delta, _SHARD, build_header(tensors, header.metadata) + row)
