"""The manifest, ``deltaweights.json``: what a delta says of itself.

Frozen dataclasses and their canonical JSON. Laws: ``Manifest.from_json(m.to_json()) == m``, and
``Manifest.from_json(data).to_json() == data`` for every ``data`` that is accepted. docs/format.md gives the
meaning of every field; everything in a manifest is untrusted until :meth:`Manifest.from_json` returned.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from . import canonical
from .entries import (
    EntryRows,
    Kind,
    PlainEntry,
    Size,
    TensorEntry,
    check_entries,
    from_rows,
    to_plain,
    to_rows,
)
from .errors import ManifestError

MANIFEST_NAME = "deltaweights.json"
FORMAT_VERSION = 1

#: Far above any real manifest (about 80 bytes a tensor).
MAX_MANIFEST_BYTES = 1 << 27

#: A reader holds several chunks for each of its threads.
MAX_CHUNK_BYTES = 1 << 22

Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
RepoId: TypeAlias = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?\Z", max_length=200),
]
Revision: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*\Z", max_length=200)]
ChunkBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=4096, le=MAX_CHUNK_BYTES, multiple_of=4096)]


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
class Tool:
    """The program that wrote the manifest."""

    name: str
    version: str


_Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What every form of a manifest states in the same way."""

    base: BaseRecord
    target: TargetRecord
    files: tuple[FileRecord, ...]
    tool: Tool
    chunk_bytes: ChunkBytes
    format: Literal["deltaweights"] = "deltaweights"
    format_version: int = FORMAT_VERSION
    license: DeltaLicense | None = None
    #: SHA-256 of the canonical JSON in which this value is empty; filled in by ``to_json``.
    checksum: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(_Facts):
    """All of it. ``files`` are the delta's own files, but for the manifest and the model card."""

    tensors: tuple[TensorEntry, ...]
    #: Whether its JSON has an object for each tensor, as the first manifests had.
    is_plain: bool = field(default=False, compare=False)

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
        fields = self._fields()
        return canonical.encode(fields | {"checksum": canonical.digest(fields)})

    def _fields(self) -> _Json:
        """What stands in the JSON. Two fields came after the first manifests: they are absent, never null."""
        found: _Json = {name: msgspec.to_builtins(getattr(self, name)) for name in _FACTS}
        found["checksum"] = ""
        licenses = (found["base"]["license"], found["target"]["license"])
        for name, records in (("license", [found]), ("expression", licenses)):
            for record in records:
                if record[name] is None:
                    del record[name]
        if self.is_plain:
            return found | {"tensors": [to_plain(entry) for entry in self.tensors]}
        kinds, tables = to_rows(self.tensors)
        return found | {"kinds": kinds, "tensors": tables}

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            FormatVersionError: its format version is not known here.
            ManifestError: it is damaged, not canonical, or contradicts itself.
        """
        found: list[Manifest] = []

        def to_json(document: Any) -> bytes:
            found.append(document.manifest())
            return found[0].to_json()

        canonical.decode(data, _Plain if _is_plain(data) else _Tables, _FORMAT, _damaged, to_json)
        _validate(found[0])
        return found[0]


_FACTS = [one.name for one in fields(_Facts)]
_FORMAT = canonical.Format("deltaweights", FORMAT_VERSION, "This delta", MAX_MANIFEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables(_Facts):
    """A manifest's JSON: a row for each tensor."""

    kinds: tuple[Kind, ...]
    tensors: tuple[EntryRows, ...]

    def manifest(self) -> Manifest:
        try:
            entries = from_rows(self.kinds, self.tensors)
        except ValueError as error:
            raise _damaged(str(error)) from error
        return Manifest(**{name: getattr(self, name) for name in _FACTS}, tensors=entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain(_Facts):
    """The JSON of the first manifests: an object for each tensor."""

    tensors: tuple[PlainEntry, ...]

    def manifest(self) -> Manifest:
        entries = tuple(entry.entry() for entry in self.tensors)
        return Manifest(**{name: getattr(self, name) for name in _FACTS}, tensors=entries, is_plain=True)


class _Form(msgspec.Struct):
    kinds: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _is_plain(data: bytes) -> bool:
    """Whether it has the first form. What cannot be read has either: decoding it says why."""
    if len(data) > MAX_MANIFEST_BYTES:
        return False
    try:
        return msgspec.json.decode(data, type=_Form).kinds is msgspec.UNSET
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return False


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
    try:
        check_entries(manifest.tensors, shards)
    except ValueError as error:
        raise _damaged(str(error)) from error


def _validate_target_file(file: TargetFile, own: Collection[str], base: dict[str, FileRecord]) -> None:
    if file.stored != "base":
        if file.source not in own:
            raise _damaged(f"{file.path!r} comes from {file.source!r}, which the delta does not have")
        return
    source = base.get(file.source)
    if not source or (source.size, source.sha256) != (file.size, file.sha256):
        raise _damaged(f"{file.path!r} comes from {file.source!r}, which the base does not have")
