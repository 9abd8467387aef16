"""The manifest: what is written is read back, what is read is canonical, and contradictions are refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import FormatVersionError, Manifest, ManifestError
from deltaweights.entries import (
    STATUSES,
    BaseParts,
    BaseTensor,
    PartGroup,
    PartOfBase,
    Prediction,
    Status,
    TargetTensor,
    TensorEntry,
)
from deltaweights.manifest import (
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    BaseRecord,
    DeltaLicense,
    FileRecord,
    License,
    TargetFile,
    TargetRecord,
    Tool,
    is_safe_path,
)

Json = dict[str, Any]

texts = st.text(st.characters(codec="utf-8"), max_size=10)
sizes = st.integers(0, 2**62 - 1)
shas = st.binary(min_size=32, max_size=32).map(bytes.hex)
shapes = st.lists(st.integers(0, 2**63), max_size=4).map(tuple)
optional_texts = st.none() | texts
expressions: st.SearchStrategy[str | None] = st.none() | texts
repo_ids = st.none() | st.sampled_from(["org/name", "gpt2", "a-b_c.d/E.5-f", "_x/9"])
revisions = st.none() | st.sampled_from(["main", "v1.0", "refs/pr/1", "a" * 40, "feature-x/y"])
stored_in_delta: st.SearchStrategy[Literal["tensors", "verbatim", "zstd"]] = st.sampled_from(
    ("tensors", "verbatim", "zstd")
)
# Every folder name ends in "d" and no file name does, so that no path is both.
parts = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6).map(
    lambda text: text.replace("/", "_").replace("\\", "_").replace(":", "_")
)
paths = st.lists(parts.map("{}d".format), max_size=2).flatmap(
    lambda folders: parts.map(lambda name: "/".join([*folders, f"{name}.f"]))
)


@st.composite
def file_records(draw: st.DrawFn, prefix: str = "") -> tuple[FileRecord, ...]:
    found = draw(st.lists(paths, max_size=4, unique=True))
    return tuple(FileRecord(prefix + path, draw(sizes), draw(shas)) for path in found)


@st.composite
def licenses(draw: st.DrawFn, own: tuple[FileRecord, ...]) -> License:
    files = draw(st.lists(st.sampled_from(own), unique=True, max_size=2)) if own else []
    obligations = draw(st.lists(texts, max_size=2))
    id, name, link = (draw(optional_texts) for _ in range(3))
    return License(id, name, link, tuple(files), tuple(obligations), draw(expressions))


@st.composite
def delta_licenses(draw: st.DrawFn, own: tuple[FileRecord, ...]) -> DeltaLicense:
    notices = st.none() | st.sampled_from([file.path for file in own]) if own else st.none()
    return DeltaLicense(draw(optional_texts), tuple(draw(st.lists(texts, max_size=2))), draw(notices))


@st.composite
def target_files(
    draw: st.DrawFn, own: tuple[FileRecord, ...], base: tuple[FileRecord, ...]
) -> tuple[TargetFile, ...]:
    found = []
    for path in draw(st.lists(paths, max_size=4, unique=True)):
        from_base: bool = draw(st.booleans())
        if base and from_base:
            record = draw(st.sampled_from(base))
            found.append(TargetFile(path, record.size, record.sha256, "base", record.path))
        elif own:
            stored, source = draw(stored_in_delta), draw(st.sampled_from(own)).path
            found.append(TargetFile(path, draw(sizes), draw(shas), stored, source))
    return tuple(found)


@st.composite
def base_parts(draw: st.DrawFn) -> BaseParts:
    counts = st.integers(1, 2**62 - 1)
    part = st.builds(PartOfBase, texts, counts, sizes, sizes, counts, optional_texts)
    groups = st.builds(PartGroup, st.lists(part, min_size=1, max_size=3).map(tuple), counts)
    return BaseParts(draw(texts), tuple(draw(st.lists(groups, max_size=2))))


@st.composite
def entries(draw: st.DrawFn, shards: list[str], *, is_plain: bool) -> TensorEntry:
    later = {"duplicate", "rearranged"} if is_plain else {"duplicate"}
    coded = st.sampled_from([status for status in STATUSES if status not in later])
    status: Status = draw(coded) if shards else "removed"
    base: BaseTensor | BaseParts | None = None
    name = draw(texts)
    if status == "rearranged":
        base = draw(base_parts())
    elif draw(st.booleans()):
        base = BaseTensor(draw(st.just(name) | texts), draw(texts), draw(shapes), draw(optional_texts))
    shared = draw(sizes) if base and status != "removed" else 0
    payload = draw(sizes) if status != "removed" else 0
    prediction = None
    if shared and payload and not is_plain and draw(st.booleans()):
        method: Literal["quantized", "low_rank"] = draw(st.sampled_from(("quantized", "low_rank")))
        prediction = Prediction(method, draw(st.integers(1, payload)), draw(st.none() | sizes))
    return TensorEntry(
        name=name,
        file=None if status == "removed" else draw(st.sampled_from(shards)),
        dtype=draw(texts),
        shape=draw(shapes),
        status=status,
        base=base,
        shared_bytes=shared,
        changed=draw(st.integers(0, shared)),
        payload_bytes=payload,
        prediction=prediction,
    )


@st.composite
def duplicates(draw: st.DrawFn, tensors: list[TensorEntry], shards: list[str]) -> list[TensorEntry]:
    """Entries that refer to some of these tensors."""
    originals = [(entry.file, entry) for entry in tensors if entry.file is not None]
    taken = {(entry.file, entry.name) for entry in tensors}
    found = []
    for file, original in draw(st.lists(st.sampled_from(originals), max_size=3)) if originals else []:
        place = draw(st.sampled_from(shards)), draw(texts)
        if place not in taken:
            taken.add(place)
            like = TargetTensor(original.name, file)
            kind = original.dtype, original.shape
            found.append(TensorEntry(place[1], place[0], *kind, "duplicate", None, 0, 0, 0, like))
    return found


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that keeps the rules."""
    own = draw(file_records("files/"))
    base = draw(file_records())
    files = draw(target_files(own, base))
    shards = [file.path for file in files if file.stored == "tensors"]
    is_plain = draw(st.booleans())
    coded = entries(shards, is_plain=is_plain)
    tensors = draw(st.lists(coded, max_size=4, unique_by=lambda entry: (entry.file, entry.name)))
    tensors = draw(st.permutations([*tensors, *draw(duplicates(tensors, shards))]))
    return Manifest(
        base=BaseRecord(draw(repo_ids), draw(revisions), draw(licenses(own)), base),
        target=TargetRecord(
            draw(repo_ids),
            draw(revisions),
            draw(licenses(own)),
            files,
            tuple(draw(st.lists(texts, max_size=2))),
        ),
        tensors=tuple(tensors),
        files=own,
        tool=Tool(draw(texts), draw(texts)),
        chunk_bytes=draw(st.integers(1, 1024)) * 4096,
        license=draw(st.none() | delta_licenses(own)),
        is_plain=is_plain,
    )


# The laws --------------------------------------------------------------------------------------------


@given(manifests())
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(manifests())
def test_what_is_read_is_written_back(manifest: Manifest) -> None:
    data = manifest.to_json()
    found = Manifest.from_json(data)
    assert found.to_json() == data
    assert found.is_plain == manifest.is_plain or not manifest.tensors


@given(manifests())
def test_the_json_is_canonical(manifest: Manifest) -> None:
    data = manifest.to_json()
    assert data.endswith(b"}\n")
    assert json.loads(data)["format_version"] == FORMAT_VERSION
    assert _canonical(json.loads(data)) == data


@given(manifests())
def test_the_checksum_is_the_sha256_of_the_rest(manifest: Manifest) -> None:
    fields = json.loads(manifest.to_json())
    assert fields["checksum"] == hashlib.sha256(_canonical(fields | {"checksum": ""})).hexdigest()


def test_a_manifest_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EXAMPLE.chunk_bytes = 1  # type: ignore[misc]


def test_sizes_are_sums() -> None:
    assert EXAMPLE.target_bytes == 10 + 20 + 30
    assert EXAMPLE.delta_bytes == 5 + 6 + 7 + len(EXAMPLE.to_json())


@pytest.mark.parametrize(
    "name", ["ü", unicodedata.normalize("NFD", "ü"), "权重", "😀", '"\\\b\x00', "\u2028", "\x7f", "/<>&"]
)
def test_every_name_comes_back_as_it_was(name: str) -> None:
    entry = replace(EXAMPLE.tensors[0], name=name)
    manifest = replace(EXAMPLE, tensors=(entry, *EXAMPLE.tensors[1:]))
    assert Manifest.from_json(manifest.to_json()).tensors[0].name == name


# Damage ----------------------------------------------------------------------------------------------


def test_the_example_is_fine() -> None:
    assert Manifest.from_json(EXAMPLE.to_json()) == EXAMPLE


@pytest.mark.parametrize(
    "change",
    {
        "no line feed": lambda data: data[:-1],
        "two line feeds": lambda data: data + b"\n",
        "white space": lambda data: data.replace(b'":', b'": '),
        "indented": lambda data: json.dumps(json.loads(data), indent=2, sort_keys=True).encode() + b"\n",
        "keys reordered": lambda data: _dump(dict(reversed(json.loads(data).items()))),
        "escapes": lambda data: data.replace("ß".encode(), b"\\u00df"),
        "a key more": lambda data: _dump(dict(sorted((json.loads(data) | {"note": 1}).items()))),
        "a key twice": lambda data: data.replace(b'{"base"', b'{"base":null,"base"', 1),
        "a float for an integer": lambda data: data.replace(b'"chunk_bytes":65536', b'"chunk_bytes":65536.0'),
        "another checksum": lambda data: data.replace(b'"checksum":"', b'"checksum":"0', 1),
        "no checksum": lambda data: _dump(
            {key: value for key, value in json.loads(data).items() if key != "checksum"}
        ),
        "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_canonical_is_refused(change: tuple[str, Callable[[bytes], bytes]]) -> None:
    data = change[1](EXAMPLE.to_json())
    assert data != EXAMPLE.to_json()
    with pytest.raises(ManifestError, match=r"deltaweights\.json is damaged"):
        Manifest.from_json(data)


def test_a_changed_value_is_refused_everywhere() -> None:
    """The checksum finds one flipped bit at every place."""
    data = EXAMPLE.to_json()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(ManifestError):
            Manifest.from_json(bytes(damaged))


def test_a_cut_manifest_is_refused_at_every_length() -> None:
    data = EXAMPLE.to_json()
    for length in range(len(data)):
        with pytest.raises(ManifestError):
            Manifest.from_json(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"format":"deltaweights"}',
        b"[" * 1_000_000,
        b'{"format":"deltaweights","format_version":1,"base":' + b"[" * 1_000_000,
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_our_own_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(data)


def test_a_gigantic_manifest_is_refused_unread() -> None:
    with pytest.raises(ManifestError, match="more than such a document may have"):
        Manifest.from_json(bytes(MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("version", [0, 2, 99, -1, 2**70])
def test_another_format_version_is_refused_and_the_message_says_what_to_do(version: int) -> None:
    """Even where nothing else in the file is as this version knows it."""
    data = _dump({"format": "deltaweights", "format_version": version, "news": [1, 2, 3]})
    with pytest.raises(FormatVersionError) as caught:
        Manifest.from_json(data)
    assert str(version) in caught.value.what
    assert f"reads version {FORMAT_VERSION}" in caught.value.why
    assert "newer version" in caught.value.fix


def test_hostile_ids_are_refused_in_no_time() -> None:
    """No pattern tries out all ways to read a row of dashes. In a process of its own, which can be ended."""
    fields = []
    for key in ("repo_id", "revision"):
        for text in ("-", "a-", "a/", "a.-", "_-/."):
            hostile = text * (200 // len(text) - 1) + "!"
            fields.append(_changed(_set("base", key, hostile)))
    program = """
import ast, sys
from deltaweights import Manifest, ManifestError
for data in ast.literal_eval(sys.stdin.read()):
    try:
        Manifest.from_json(data)
    except ManifestError as error:
        print(error.what)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=repr(fields),
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert done.stdout == "deltaweights.json is damaged\n" * len(fields)


def test_another_format_is_refused() -> None:
    with pytest.raises(ManifestError, match="format is 'gguf'"):
        Manifest.from_json(_dump({"format": "gguf", "format_version": 1}))


# The rules that types cannot tell: each breaks in a manifest with a right checksum --------------------


def _drop(key: str) -> Callable[[Json], None]:
    return lambda fields: fields.pop(key) and None


def _set(*keys_and_value: Any) -> Callable[[Json], None]:
    *keys, last, value = keys_and_value

    def change(fields: Any) -> None:
        for key in keys:
            fields = fields[key]
        fields[last] = value

    return change


_LIKE = {"file": "model.safetensors", "name": "größe.weight"}


def _copy(**changes: Any) -> Callable[[Json], None]:
    """Add a duplicate of the first tensor; or what is one but for these fields."""
    entry = {"name": "copy", "status": "duplicate", "like": _LIKE, "base": None}
    entry |= {"shared_bytes": 0, "changed": 0, "payload_bytes": 0} | changes
    return lambda fields: fields["tensors"].append(fields["tensors"][0] | entry)


def _both(*changes: Callable[[Json], None]) -> Callable[[Json], None]:
    def change_all(fields: Json) -> None:
        for change in changes:
            change(fields)

    return change_all


def _repeat(*keys: Any) -> Callable[[Json], None]:
    def change(fields: Any) -> None:
        for key in keys:
            fields = fields[key]
        fields.append(fields[0])

    return change


_PARTS = {"parts": [{"parts": [{"name": "x", "count": 4}]}]}
_PREDICTED: Json = {"prediction": {"method": "low_rank", "nbytes": 8, "rank": 16}}


def _rearranged(group: Json) -> Callable[[Json], None]:
    """The first tensor is coded against these parts."""

    def change(fields: Json) -> None:
        fields["kinds"][0] |= {"status": "rearranged", "base": {"dtype": "BF16", "shape": None}}
        fields["tensors"][0]["rows"][0].append({"parts": [group]})

    return change


def _predicted(method: str, nbytes: int) -> Callable[[Json], None]:
    prediction = {"method": method, "nbytes": nbytes}
    return lambda fields: fields["tensors"][0]["rows"][0].append({"prediction": prediction})


SHA = "0" * 64
UNSAFE = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../up",
    "a/../../up",
    "a//b",
    "a/",
    "./a",
    "a\\b",
    "..\\up",
    "C:/x",
    "c:x",
    "a\0b",
    "a\nb",
    "a\x7fb",
    ".git/config",
    "sub/.GIT/hooks/pre-commit",
    ".deltaweights/lock",
    "sub/.DeltaWeights",
    "x" * 256,
    "ü" * 128,
    "x/" * 1000 + "x",
]
RULES: dict[str, tuple[Callable[[Json], None], str]] = {
    "no base": (_drop("base"), "missing required field"),
    "no tensors": (_drop("tensors"), "missing required field"),
    "a number for a list": (_set("tensors", 5), "Expected `array`"),
    "chunks of 4095 bytes": (_set("chunk_bytes", 4095), "chunk_bytes"),
    "chunks of 0 bytes": (_set("chunk_bytes", 0), "chunk_bytes"),
    "chunks of 5000 bytes": (_set("chunk_bytes", 5000), "chunk_bytes"),
    "chunks of 8 MiB": (_set("chunk_bytes", 8 << 20), "chunk_bytes"),
    "a negative size": (_set("target", "files", 0, "size", -1), "size"),
    "a size of 2**62": (_set("target", "files", 0, "size", 2**62), "size"),
    "a size of 2**64": (_set("files", 0, "size", 2**64), "size"),
    "a negative dimension": (_set("tensors", 0, "shape", [-1]), "shape"),
    "65 dimensions": (_set("tensors", 0, "shape", [1] * 65), "shape"),
    "a short SHA-256": (_set("files", 0, "sha256", "0" * 63), "sha256"),
    "an upper-case SHA-256": (_set("files", 0, "sha256", "A" * 64), "sha256"),
    "a SHA-256 and a line feed": (_set("files", 0, "sha256", SHA + "\n"), "sha256"),
    "an unknown status": (_set("tensors", 0, "status", "stolen"), "status"),
    "an unknown way to store": (_set("target", "files", 0, "stored", "pickle"), "stored"),
    "a file of the delta twice": (_repeat("files"), "twice"),
    "a file of the base twice": (_repeat("base", "files"), "twice"),
    "a file of the target twice": (_repeat("target", "files"), "twice"),
    "a tensor twice": (_repeat("tensors"), "twice"),
    "itself among its files": (_set("files", 2, "path", "deltaweights.json"), "lists itself"),
    "the card among its files": (_set("files", 2, "path", "README.md"), "lists itself"),
    "a file that is a folder too": (
        _set("target", "files", 2, "path", "model.safetensors/x"),
        "both a file and a folder",
    ),
    "a source that the delta lacks": (
        _set("target", "files", 0, "source", "files/missing"),
        "the delta does not have",
    ),
    "a source that the base lacks": (
        _set("target", "files", 2, "source", "missing"),
        "the base does not have",
    ),
    "a source of another size in the base": (
        _set("target", "files", 2, "size", 31),
        "the base does not have",
    ),
    "a source of another SHA-256 in the base": (
        _set("target", "files", 2, "sha256", SHA),
        "the base does not have",
    ),
    "a license text that the delta lacks": (
        _set("base", "license", "files", 0, "path", "licenses/missing"),
        "license text is missing",
    ),
    "a target's license text that the delta lacks": (
        _set("target", "license", "files", [{"path": "x", "sha256": SHA, "size": 1}]),
        "license text is missing",
    ),
    "a notice that the delta lacks": (
        _set("license", {"conflicts": [], "expression": None, "notice": "NOTICE"}),
        "notice is missing",
    ),
    "a license without all its fields": (_set("license", {"conflicts": []}), "damaged|canonical"),
    "an optional field that is null": (_set("license", None), "canonical"),
    "an optional field of a license that is null": (_set("base", "license", "expression", None), "canonical"),
    "a removed tensor in a file": (_set("tensors", 0, "status", "removed"), "is removed but in file"),
    "a tensor with the name of a header's metadata": (
        _set("tensors", 0, "name", "__metadata__"),
        "no tensor's name",
    ),
    "a tensor in no file": (_set("tensors", 1, "status", "added"), "is added but in file None"),
    "a tensor in a file that is no shard": (
        _set("tensors", 0, "file", "config.json"),
        "which is not a shard",
    ),
    "a base id that is an option": (_set("base", "repo_id", "--upload-pack=x"), "repo_id"),
    "a target id of two lines": (_set("target", "repo_id", "org/name\nx"), "repo_id"),
    "a revision that is an option": (_set("base", "revision", "--force"), "revision"),
    "a revision of no characters": (_set("base", "revision", ""), "revision"),
    "more changed than shared": (_set("tensors", 0, "changed", 9), "more changed elements"),
    "bytes shared with nothing": (_set("tensors", 0, "base", None), "shares bytes with no base"),
    "a duplicate of nothing": (_copy(like=None), "canonical"),
    "a tensor like another that is no duplicate": (_copy(status="added"), "is added, which does not go with"),
    "a duplicate that does not say of what": (_set("tensors", 0, "status", "duplicate"), "does not go with"),
    "a removed tensor like another": (
        _set("tensors", 1, "like", _LIKE),
        "is removed, which does not go with",
    ),
    "a duplicate of an unknown name": (_copy(like=_LIKE | {"name": "x"}), "does not have"),
    "a duplicate from an unknown file": (_copy(like=_LIKE | {"file": "config.json"}), "does not have"),
    "a duplicate of a removed tensor": (_copy(like=_LIKE | {"name": "gone"}), "does not have"),
    "a duplicate of itself": (_copy(like=_LIKE | {"name": "copy"}), "is a duplicate itself"),
    "a duplicate of a duplicate": (
        _both(_copy(), _copy(name="x", like=_LIKE | {"name": "copy"})),
        "is a duplicate itself",
    ),
    "duplicates of each other": (
        _both(_copy(like=_LIKE | {"name": "x"}), _copy(name="x", like=_LIKE | {"name": "copy"})),
        "is a duplicate itself",
    ),
    "a duplicate of another dtype": (_copy(dtype="F16"), "another dtype or shape"),
    "a duplicate of another shape": (_copy(shape=[4]), "another dtype or shape"),
    "a duplicate with a payload": (_copy(payload_bytes=30), "has a base or a payload"),
    "a duplicate with a base": (
        _copy(base={"dtype": "BF16", "file": None, "name": "x", "shape": [2, 2]}),
        "has a base or a payload",
    ),
    "a duplicate that says more": (_copy(like=_LIKE | {"dtype": "BF16"}), "canonical"),
    "a duplicate that says less": (_copy(like={"name": "größe.weight"}), "missing required field"),
}


#: Rules of kinds and rows; ``rows`` is those of the example's only shard.
ROW_RULES: dict[str, tuple[Callable[[Json], None], str]] = {
    "a kind that is not there": (_set("tensors", 0, "rows", 0, 1, 2), "has kind 2, which is not there"),
    "a negative kind": (_set("tensors", 0, "rows", 0, 1, -1), "tensors"),
    "a kind twice": (_repeat("kinds"), "canonical"),
    "a kind that nobody has": (
        lambda fields: fields["kinds"].append(fields["kinds"][0] | {"dtype": "F16"}),
        "canonical",
    ),
    "a row that says more": (lambda fields: fields["tensors"][0]["rows"][0].extend([{}, 1]), "canonical"),
    "a row that says nothing more": (lambda fields: fields["tensors"][0]["rows"][0].append({}), "canonical"),
    "a row that says less": (lambda fields: fields["tensors"][0]["rows"][0].pop(), "length"),
    "no rows": (_set("tensors", 0, "rows", []), "canonical"),
    "rows of one file apart": (
        lambda fields: fields["tensors"].insert(1, fields["tensors"][0] | {"rows": [["x", 0, 0, 0]]}),
        "canonical",
    ),
    "a row twice": (_repeat("tensors", 0, "rows"), "twice"),
    "parts without a kind of parts": (
        lambda fields: fields["tensors"][0]["rows"][0].append(_PARTS),
        "parts that do not go with its kind",
    ),
    "a kind of parts without parts": (_set("kinds", 0, "base", "shape", None), "do not go with its kind"),
    "parts and another status": (
        _both(
            _set("kinds", 0, "base", "shape", None),
            lambda fields: fields["tensors"][0]["rows"][0].append(_PARTS),
        ),
        "is changed, which does not go with its base",
    ),
    "another status and no parts": (_set("kinds", 0, "status", "rearranged"), "does not go with its base"),
    "a part of no elements": (_rearranged({"parts": [{"name": "x", "count": 0}]}), "count"),
    "a group of no parts": (_rearranged({"parts": []}), "parts"),
    "a group of no repetitions": (
        _rearranged({"parts": [{"name": "x", "count": 4}], "repeats": 0}),
        "repeats",
    ),
    "a stride of 0": (_rearranged({"parts": [{"name": "x", "count": 4, "stride": 0}]}), "stride"),
    "a negative start": (_rearranged({"parts": [{"name": "x", "count": 4, "start": -1}]}), "start"),
    "a default that is written": (
        _rearranged({"parts": [{"name": "x", "count": 4, "start": 0}]}),
        "canonical",
    ),
    "a prediction that is larger than the payload": (_predicted("low_rank", 31), "no room for it"),
    "an unknown prediction": (_predicted("oracle", 8), "prediction"),
    "a prediction of no bytes": (_predicted("quantized", 0), "prediction"),
    "a prediction without a base": (
        _both(
            _set("kinds", 0, "shared_bytes", 0),
            _set("tensors", 0, "rows", 0, 2, 0),
            _predicted("low_rank", 8),
        ),
        "no base",
    ),
}


@pytest.mark.parametrize("rule", ROW_RULES.values(), ids=ROW_RULES)
def test_rows_that_break_a_rule_are_refused(rule: tuple[Callable[[Json], None], str]) -> None:
    change, why = rule
    with pytest.raises(ManifestError, match=why):
        Manifest.from_json(_changed(change, is_plain=False))


def test_rows_of_parts_and_predictions_are_read() -> None:
    group = {"parts": [{"name": "x", "count": 4}]}
    change = _both(_rearranged(group), lambda fields: fields["tensors"][0]["rows"][0][4].update(_PREDICTED))
    (entry, _) = Manifest.from_json(_changed(change, is_plain=False)).tensors
    assert entry.base == BaseParts("BF16", (PartGroup((PartOfBase("x", 4),)),))
    assert entry.prediction == Prediction("low_rank", 8, 16)


def test_a_tensor_takes_few_bytes() -> None:
    """Its name, and some 20 bytes."""
    names = [f"model.layers.{k}.mlp.experts.{k}.down_proj.weight" for k in range(1000)]
    entries = tuple(
        replace(EXAMPLE.tensors[0], name=name, base=BaseTensor(name, "BF16", (2, 2))) for name in names
    )
    grown = len(replace(EXAMPLE, tensors=entries).to_json()) - len(EXAMPLE.to_json())
    assert grown < sum(map(len, names)) + 20 * len(names)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_manifest_that_breaks_a_rule_is_refused(rule: tuple[Callable[[Json], None], str]) -> None:
    change, why = rule
    with pytest.raises(ManifestError, match=why):
        Manifest.from_json(_changed(change))


@pytest.mark.parametrize("path", UNSAFE, ids=lambda path: repr(path[:30]))
@pytest.mark.parametrize(
    "place", [("target", "files", 1, "path"), ("files", 2, "path")], ids=["target", "delta"]
)
def test_an_unsafe_path_is_refused(path: str, place: tuple[Any, ...]) -> None:
    assert not is_safe_path(path)
    with pytest.raises(ManifestError, match="not a safe relative path"):
        Manifest.from_json(_changed(_set(*place, path)))


@pytest.mark.parametrize(
    "path",
    ["a", "a/b", ".gitattributes", "..a", "a..", ".cache", "a b", "ü", "x" * 255, "-rf", "a:b/c:d"[2:]],
)
def test_an_odd_path_that_leads_nowhere_else_is_fine(path: str) -> None:
    assert is_safe_path(path)


@given(st.text(st.characters(codec="utf-8")) | st.text("./\\:aC", max_size=8))
def test_a_safe_path_stays_in_its_folder(path: str) -> None:
    if is_safe_path(path):
        assert not Path(path).is_absolute()
        assert not PureWindowsPath(path).is_absolute()
        assert Path("folder", path).as_posix() == f"folder/{path}"
        assert not {".", ".."} & set(PureWindowsPath(path).parts)


def test_two_tensors_of_one_name_may_be_in_two_shards() -> None:
    shard = replace(EXAMPLE.target.files[0], path="second.safetensors")
    twin = replace(EXAMPLE.tensors[0], file=shard.path)
    manifest = replace(
        EXAMPLE,
        target=replace(EXAMPLE.target, files=(*EXAMPLE.target.files, shard)),
        tensors=(*EXAMPLE.tensors, twin),
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_tensor_may_have_duplicates_in_any_shard() -> None:
    for name in ("copy", "größe.weight"):
        file = "model.safetensors" if name == "copy" else "second.safetensors"
        shard = replace(EXAMPLE.target.files[0], path="second.safetensors")
        like = TargetTensor("größe.weight", "model.safetensors")
        copy = TensorEntry(name, file, "BF16", (2, 2), "duplicate", None, 0, 0, 0, like)
        manifest = replace(
            EXAMPLE,
            target=replace(EXAMPLE.target, files=(*EXAMPLE.target.files, shard)),
            tensors=(copy, *EXAMPLE.tensors),
        )
        assert Manifest.from_json(manifest.to_json()) == manifest


def test_two_removed_tensors_may_have_one_name() -> None:
    manifest = replace(EXAMPLE, tensors=(*EXAMPLE.tensors, EXAMPLE.tensors[1]))
    assert Manifest.from_json(manifest.to_json()) == manifest


# Helpers ---------------------------------------------------------------------------------------------


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_LICENSE_FILE = FileRecord("licenses/text", 5, _sha256("license"))
EXAMPLE = Manifest(
    base=BaseRecord(
        "org/base",
        "a" * 40,
        License("other", "qwen", "LICENSE", (_LICENSE_FILE,), ("keep the notice",)),
        (FileRecord("tokenizer.json", 30, _sha256("tokenizer")), FileRecord("x", 1, _sha256("x"))),
    ),
    target=TargetRecord(
        None,
        None,
        License("mit"),
        (
            TargetFile("model.safetensors", 10, _sha256("model"), "tensors", "delta-1.safetensors"),
            TargetFile("config.json", 20, _sha256("config"), "verbatim", "files/config.json"),
            TargetFile("tokenizer.json", 30, _sha256("tokenizer"), "base", "tokenizer.json"),
        ),
        ("left out/",),
    ),
    tensors=(
        TensorEntry(
            "größe.weight",
            "model.safetensors",
            "BF16",
            (2, 2),
            "changed",
            BaseTensor("größe.weight", "BF16", (2, 2)),
            shared_bytes=8,
            changed=3,
            payload_bytes=30,
        ),
        TensorEntry("gone", None, "F32", (), "removed", None, 0, 0, 0),
    ),
    files=(
        _LICENSE_FILE,
        FileRecord("delta-1.safetensors", 6, _sha256("delta")),
        FileRecord("files/config.json", 7, _sha256("config")),
    ),
    tool=Tool("deltaweights", "1.2.3"),
    chunk_bytes=65536,
)


def _dump(fields: Json) -> bytes:
    """JSON in the order of the keys."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _canonical(fields: Json) -> bytes:
    """Canonical JSON, made by another library than the manifest's."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return text.encode() + b"\n"


def _changed(change: Callable[[Json], None], *, is_plain: bool = True) -> bytes:
    """The example, changed, with the checksum made right again: what a hostile author would write."""
    fields = json.loads(replace(EXAMPLE, is_plain=is_plain).to_json())
    change(fields)
    fields["checksum"] = hashlib.sha256(_canonical(fields | {"checksum": ""})).hexdigest()
    return _canonical(fields)
