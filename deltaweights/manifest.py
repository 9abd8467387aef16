"""The manifest, ``deltaweights.json``: what a delta says of itself.

Frozen dataclasses and their canonical JSON. Laws: ``Manifest.from_json(m.to_json()) == m``, and
``Manifest.from_json(data).to_json() == data`` for every ``data`` that is accepted. docs/format.md gives the
meaning of every field; everything in a manifest is untrusted until :meth:`Manifest.from_json` returned.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from . import canonical
from .errors import ManifestError

MANIFEST_NAME = "deltaweights.json"
FORMAT_VERSION = 1

#: Far above any real manifest (about 250 bytes a tensor).
MAX_MANIFEST_BYTES = 1 << 27

#: A reader holds several chunks for each of its threads.
MAX_CHUNK_BYTES = 1 << 22

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Dim: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
RepoId: TypeAlias = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?\Z", max_length=200),
]
Revision: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*\Z", max_length=200)]
Shape: TypeAlias = Annotated[tuple[Dim, ...], msgspec.Meta(max_length=64)]
ChunkBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=4096, le=MAX_CHUNK_BYTES, multiple_of=4096)]
Status: TypeAlias = Literal["same", "changed", "added", "removed", "renamed", "resized", "duplicate"]

STATUSES: tuple[Status, ...] = ("same", "changed", "added", "removed", "renamed", "resized", "duplicate")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file: relative POSIX path, size in bytes, SHA-256 in hex (the one that the Hub publishes)."""

    path: str
    size: Size
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file of the target, and where its bytes come from.

    ``stored`` is how: ``tensors`` (rebuilt from the delta shard ``source`` and the base), ``verbatim`` or
    ``zstd`` (the delta's file ``source``, or its decompression), ``base`` (the base's file ``source``).
    """

    path: str
    size: Size
    sha256: Sha256
    stored: Literal["tensors", "verbatim", "zstd", "base"]
    source: str


@dataclass(frozen=True, slots=True)
class License:
    """A license: ``id``, ``name`` and ``link`` as its model card gives them, its texts, which lie in the
    delta, and what it asks. ``expression`` is what card and texts say together, in SPDX's words."""

    id: str | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[FileRecord, ...] = ()
    obligations: tuple[str, ...] = ()
    expression: str | None = None


@dataclass(frozen=True, slots=True)
class DeltaLicense:
    """What the delta as a whole is under: the SPDX expression, what does not fit together in it, for people
    to read, and the path of the NOTICE file."""

    expression: str | None = None
    conflicts: tuple[str, ...] = ()
    notice: str | None = None


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The base: its Hub id and commit where they are known, its license, its files."""

    repo_id: RepoId | None
    revision: Revision | None
    license: License
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """The target, likewise. ``left_out`` lists what stood in its folder and is not part of it."""

    repo_id: RepoId | None
    revision: Revision | None
    license: License
    files: tuple[TargetFile, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """The base tensor that a target tensor is coded against. ``file`` tells apart two base tensors of
    one name; else it is None, since a base may be sharded in any way."""

    name: str
    dtype: str
    shape: Shape
    file: str | None = None


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """A tensor of the target, as a duplicate refers to it: its name, and the shard that holds it."""

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the target, or (status ``removed``, without a ``file``) one that only the base has.

    ``shared_bytes`` of its bytes, from the first on, are coded against ``base``; ``changed`` of those
    bytes' elements differ from it. ``payload_bytes`` is what it takes up in the delta shard.

    A ``duplicate`` has none of these: its bytes are those of the tensor ``like``, which has a payload.
    """

    name: str
    file: str | None
    dtype: str
    shape: Shape
    status: Status
    base: BaseTensor | None
    shared_bytes: Size
    changed: Size
    payload_bytes: Size
    like: TargetTensor | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """The program that wrote the manifest."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it. ``files`` are the delta's own files, but for the manifest and the model card."""

    base: BaseRecord
    target: TargetRecord
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileRecord, ...]
    tool: Tool
    chunk_bytes: ChunkBytes
    format: Literal["deltaweights"] = "deltaweights"
    format_version: int = FORMAT_VERSION
    license: DeltaLicense | None = None
    #: SHA-256 of the canonical JSON in which this value is empty; filled in by ``to_json``.
    checksum: str = field(default="", compare=False)

    @property
    def target_bytes(self) -> int:
        """Size of the target: all its files."""
        return sum(file.size for file in self.target.files)

    @property
    def delta_bytes(self) -> int:
        """Size of the delta: its files and the manifest itself (the model card is not counted)."""
        return sum(file.size for file in self.files) + len(self.to_json())

    @property
    def needs_base(self) -> bool:
        """Whether any byte of the target comes from the base."""
        files = any(file.stored == "base" for file in self.target.files)
        return files or any(entry.shared_bytes for entry in self.tensors)

    def to_json(self) -> bytes:
        """Canonical JSON: UTF-8, keys sorted, no white space, one line feed at the end."""
        fields = _fields(replace(self, checksum=""))
        return canonical.encode(fields | {"checksum": canonical.digest(fields)})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            FormatVersionError: its format version is not known here.
            ManifestError: it is damaged, not canonical, or contradicts itself.
        """
        manifest = canonical.decode(data, cls, _FORMAT, _damaged, cls.to_json)
        _validate(manifest)
        return manifest


_FORMAT = canonical.Format("deltaweights", FORMAT_VERSION, "This delta", MAX_MANIFEST_BYTES)


def _fields(manifest: Manifest) -> dict[str, Any]:
    """What stands in the JSON. Three fields came after the first manifests: they are absent, never null."""
    fields: dict[str, Any] = msgspec.to_builtins(manifest)
    licenses = (fields["base"]["license"], fields["target"]["license"])
    for name, records in (("license", [fields]), ("expression", licenses), ("like", fields["tensors"])):
        for record in records:
            if record[name] is None:
                del record[name]
    return fields


def _damaged(why: str) -> ManifestError:
    return ManifestError(f"{MANIFEST_NAME} is damaged", f"{why}.", "Get the delta again.")


def is_safe_path(path: str) -> bool:
    """Whether ``path`` is a plain relative POSIX path, below the folder that it is meant for on any
    system, and not a place from which a tool would run something (``.git``)."""
    parts = path.split("/", 512)
    return not (
        any(part in ("", ".", "..") or part.lower() in (".git", ".deltaweights") for part in parts)
        or re.search(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:", path)
        or max(len(part.encode()) for part in parts) > 255
        or len(path.encode()) > 1024
    )


def _check_paths(paths: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for path in paths:
        if not is_safe_path(path):
            raise _damaged(f"{path!r} is not a safe relative path")
        if path in seen:
            raise _damaged(f"It names {path!r} twice")
        seen.add(path)
    for path in seen:
        parent = path
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if parent in seen:
                raise _damaged(f"{parent!r} is both a file and a folder")
    return seen


def _validate(manifest: Manifest) -> None:
    """The rules that types cannot tell."""
    own = _check_paths(file.path for file in manifest.files)
    if own & {MANIFEST_NAME, "README.md"}:
        raise _damaged("It lists itself or the model card among the delta's files")
    base = {file.path: file for file in manifest.base.files}
    if len(base) != len(manifest.base.files):
        raise _damaged("It names a file of the base twice")
    _check_paths(file.path for file in manifest.target.files)
    for file in manifest.target.files:
        _validate_target_file(file, own, base)
    for license in (manifest.base.license, manifest.target.license):
        if not {file.path for file in license.files} <= own:
            raise _damaged("A license text is missing from the delta's files")
    if manifest.license and manifest.license.notice not in {None, *own}:
        raise _damaged("Its notice is missing from the delta's files")
    shards = {file.path for file in manifest.target.files if file.stored == "tensors"}
    seen: dict[tuple[str | None, str], TensorEntry] = {}
    for entry in manifest.tensors:
        _validate_entry(entry, shards)
        if (entry.file, entry.name) in seen and entry.file is not None:
            raise _damaged(f"It names tensor {entry.name!r} of {entry.file!r} twice")
        seen[entry.file, entry.name] = entry
    for entry in manifest.tensors:
        if entry.like:
            _validate_duplicate(entry, seen.get((entry.like.file, entry.like.name)))


def _validate_target_file(file: TargetFile, own: Collection[str], base: dict[str, FileRecord]) -> None:
    if file.stored != "base":
        if file.source not in own:
            raise _damaged(f"{file.path!r} comes from {file.source!r}, which the delta does not have")
        return
    source = base.get(file.source)
    if not source or (source.size, source.sha256) != (file.size, file.sha256):
        raise _damaged(f"{file.path!r} comes from {file.source!r}, which the base does not have")


def _validate_entry(entry: TensorEntry, shards: Collection[str]) -> None:
    if entry.name == "__metadata__":
        raise _damaged("A tensor is called '__metadata__', which is no tensor's name in a safetensors header")
    if (entry.status == "removed") != (entry.file is None):
        raise _damaged(f"Tensor {entry.name!r} is {entry.status} but in file {entry.file!r}")
    if entry.file is not None and entry.file not in shards:
        raise _damaged(f"Tensor {entry.name!r} is in {entry.file!r}, which is not a shard")
    if entry.changed > entry.shared_bytes:
        raise _damaged(f"Tensor {entry.name!r} has more changed elements than shared bytes")
    if entry.shared_bytes and not entry.base:
        raise _damaged(f"Tensor {entry.name!r} shares bytes with no base tensor")
    if (entry.status == "duplicate") != bool(entry.like):
        raise _damaged(f"Tensor {entry.name!r} is {entry.status}, which does not go with what it is like")


def _validate_duplicate(entry: TensorEntry, other: TensorEntry | None) -> None:
    """``other`` is the entry that it refers to. It has a payload, so references end there: none leads on to
    another one, or back."""
    if entry.base or entry.shared_bytes or entry.payload_bytes:
        raise _damaged(f"Tensor {entry.name!r} is a duplicate, but has a base or a payload")
    if other is None:
        raise _damaged(f"Tensor {entry.name!r} is like one that the target does not have")
    if other.like:
        raise _damaged(f"Tensor {entry.name!r} is like {other.name!r}, which is a duplicate itself")
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        raise _damaged(f"Tensor {entry.name!r} is like {other.name!r}, which has another dtype or shape")
