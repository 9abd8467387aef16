"""The places of weight streams: a folder, an fsspec URL, a repository on the Hub.

Readers see a head only after all the files that it names. A second writer is refused: by a lock on the
folder, by a record's name that only one writer can create, or by a commit that must follow the one that was
read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import (
    CheckpointError,
    DiskSpaceError,
    OutputError,
)
from ...storage import (
    WORKSPACE,
    HubSource,
    Location,
    OutputFolder,
    PartialFile,
    file_blocks,
    local_path,
    store_url,
)
from ...storage.hub_upload import Outgoing, find_branch, require_login, upload
from ...storage.local import LocalFile
from ...storage.store.client import Store
from ...storage.store.errors import is_conflict, reading, writing
from .records import HEAD_NAME, MAX_HEAD_BYTES, StreamFile, damaged, number_of


class Gone(Exception):  # noqa: N818
    """A file of the stream does not exist, or was removed meanwhile."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A writer's change: its payload files; the record; the head; and files to remove. ``expected`` is the
    required current head, None for no head. The payload files are in the writer's folder; or, if it is one of
    several (``is_shared``), all of theirs are where :meth:`Transport.send` brought them."""

    payloads: Mapping[str, StreamFile]
    record: tuple[str, bytes]
    head: bytes
    expected: bytes | None
    removed: Iterable[str]
    message: str
    is_shared: bool = False


class PayloadFolder(Protocol):
    """Where a writer's payload files are written."""

    root: Path

    def create(self, path: str) -> PartialFile:
        """A new file that :meth:`PartialFile.commit` will place at the relative ``path``."""


class Transport(Protocol):
    """Reads and writes the files of one stream. ``where`` names it in messages."""

    where: str

    def head(self) -> bytes | None:
        """The current head; None if there is no stream yet."""

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file of at most ``limit`` bytes. Raises :class:`Gone` if it does not exist."""

    def fetch(self, name: str, file: StreamFile, folder: Path) -> LocalFile:
        """Open a payload file after comparing its SHA-256 with its record. A remote file is downloaded to
        ``folder``.

        Raises:
            Gone: it does not exist.
            DeltaError: it is damaged.
        """

    def downloading(self) -> AbstractContextManager[Path]:
        """The folder for :meth:`fetch`, removed afterwards; a local stream needs none."""

    def names(self) -> list[str]:
        """The names of the stream's files, except the head."""

    def writing(self) -> AbstractContextManager[OutputFolder]:
        """The folder for writing payload files, as a context manager."""

    def joining(self) -> AbstractContextManager[PayloadFolder]:
        """The same for a writer that joins another one, which has entered :meth:`writing`.

        Raises:
            OutputError: several writers cannot share a stream here.
        """

    def send(self, folder: PayloadFolder, payloads: Mapping[str, StreamFile]) -> None:
        """Bring one of several writers' payload files to the stream, before one of them publishes."""

    def withdraw(self, folder: PayloadFolder, names: Iterable[str]) -> None:
        """Remove files that a writer created or sent for nothing, as far as that is possible."""

    def publish(self, folder: PayloadFolder, new: Publication) -> None:
        """Publish a change. Readers see all of it or nothing.

        Raises:
            OutputError: another publisher wrote to the stream.
        """


def open_transport(location: Location, *, public: bool = False) -> Transport:
    """The transport for a folder, an fsspec URL (``s3://…``), or a repository on the Hub (``hf://org/name``)."""
    place = os.fspath(location)
    if place.startswith("hf://") and not store_url(place):
        return HubTransport(place.removeprefix("hf://"), public)
    return UrlTransport(place) if "://" in place else FolderTransport(place)


def other_writer(where: str) -> OutputError:
    """The error if two publishers write to the same stream."""
    return OutputError(
        f"Another publisher writes to the stream at {where}",
        "Its head is not the last one from this publisher.",
        "Stop one of the two, or choose a different location.",
    )


def _checked(path: Path, name: str, file: StreamFile, where: str) -> LocalFile:
    """Open a local file, if it is the one in the record."""
    opened = LocalFile(name, path)
    sha256 = hashlib.sha256()
    if opened.size == file.size:
        for block in file_blocks(opened):
            sha256.update(block)
    if sha256.hexdigest() != file.sha256:
        opened.close()
        raise damaged(f"{name} in {where}", "Its SHA-256 is not the one in its record")
    return opened


class _JoinedFolder:
    """A folder that another process has locked, by an OutputFolder. Its workspace is used too, so that the
    next OutputFolder removes what a killed process leaves there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, path: str) -> PartialFile:
        temporary = self.root / WORKSPACE / f"{path}.partial"
        try:
            return PartialFile(path, temporary, self.root / path)
        except OSError as error:
            raise OutputError(
                f"Cannot write {path} in {self.root}",
                f"{error.strerror}.",
                "Choose a folder that all ranks can write to, and rank 0 too: a shared one.",
            ) from error


class FolderTransport:
    """A stream in a folder."""

    def __init__(self, location: Location) -> None:
        self.where = os.fspath(location)
        self._root = local_path(location)

    def head(self) -> bytes | None:
        try:
            return self.read(HEAD_NAME, MAX_HEAD_BYTES)
        except Gone:
            return None

    def read(self, name: str, limit: int) -> bytes:
        with self._or_gone(), closing(LocalFile(name, self._root / name)) as file:
            if file.size > limit:
                raise damaged(f"{name} in {self.where}", "It is too long")
            return file.read(0, file.size)

    def fetch(self, name: str, file: StreamFile, folder: Path) -> LocalFile:
        with self._or_gone():
            return _checked(self._root / name, name, file, self.where)

    def downloading(self) -> AbstractContextManager[Path]:
        return nullcontext(self._root)

    @contextmanager
    def _or_gone(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise Gone from error
            raise

    def names(self) -> list[str]:
        there = os.listdir(self._root) if self._root.is_dir() else []
        return sorted(name for name in there if number_of(name) is not None)

    def writing(self) -> OutputFolder:
        return OutputFolder(self._root)

    @contextmanager
    def joining(self) -> Iterator[PayloadFolder]:
        yield _JoinedFolder(self._root)

    def send(self, folder: PayloadFolder, payloads: Mapping[str, StreamFile]) -> None:
        pass  # they are there

    def withdraw(self, folder: PayloadFolder, names: Iterable[str]) -> None:
        with suppress(OSError):
            for name in names:
                (folder.root / name).unlink(missing_ok=True)

    def publish(self, folder: PayloadFolder, new: Publication) -> None:
        if self.head() != new.expected:
            raise other_writer(self.where)
        for name, payload in new.payloads.items():
            if not (self._root / name).is_file() or (self._root / name).stat().st_size != payload.size:
                raise OutputError(
                    f"{name} is not in {self.where}",
                    "Another rank has written it, into a folder that this one does not see.",
                    "Choose a folder that all ranks share, or an URL.",
                )
        for name, content in (new.record, (HEAD_NAME, new.head)):
            with folder.create(name) as file:
                file.write_at(0, content)
                file.commit()
        for name in new.removed:
            (self._root / name).unlink(missing_ok=True)


@contextmanager
def _temporary_path() -> Iterator[Path]:
    """A folder that is removed afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="deltaweights-")
    except OSError as error:  # there is none, or it is full
        raise _no_room("Files on the way from or to a stream have no place", error) from error
    with folder as name:
        yield Path(name)


@contextmanager
def _temporary_folder() -> Iterator[OutputFolder]:
    """A folder for payload files before their upload."""
    with _temporary_path() as path, OutputFolder(path) as folder:
        yield folder


@contextmanager
def _room_for(name: str) -> Iterator[None]:
    """Explain that the disk is full, for a download within the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _no_room(f"There is no room for {name}", error) from error


def _no_room(what: str, error: OSError) -> DiskSpaceError:
    return DiskSpaceError(
        what,
        f"{error.strerror}: {tempfile.tempdir or 'the folder for temporary files'}.",
        "Name another folder for temporary files: TMPDIR.",
    )


class UrlTransport:
    """A stream at any URL that fsspec reads and writes."""

    def __init__(self, url: str) -> None:
        from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

        self._store = store = Store(url)
        self.where = store.where
        self._system = store.system
        self._root = store.root.rstrip("/")
        self._is_local = isinstance(self._system, LocalFileSystem)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Explain errors within the block; what does not exist is :class:`Gone`."""
        gone = None
        with reading(self.where, name):
            try:
                yield
            except FileNotFoundError as error:
                gone = error
        if gone:
            raise Gone from gone

    def head(self) -> bytes | None:
        self._system.invalidate_cache()
        try:
            return self.read(HEAD_NAME, MAX_HEAD_BYTES)
        except Gone:
            return None

    def _require_file(self, name: str, size: int | None = None) -> None:
        """A device or a pipe of this machine might never end; other systems have none."""
        info = self._system.info(self._path(name))
        if info["type"] != "file":
            raise damaged(f"{name} in {self.where}", "It is not a regular file")
        if size is not None and info["size"] != size:
            raise damaged(f"{name} in {self.where}", "Its size is not the one in its record")

    def read(self, name: str, limit: int) -> bytes:
        with self._explained(name):
            if self._is_local:
                self._require_file(name)
            data: bytes = self._system.cat_file(self._path(name), start=0, end=limit + 1)
        if len(data) > limit:
            raise damaged(f"{name} in {self.where}", "It is too long")
        return data

    def fetch(self, name: str, file: StreamFile, folder: Path) -> LocalFile:
        with self._explained(name):
            self._require_file(name, file.size)
            with _room_for(name):
                self._system.get_file(self._path(name), str(folder / name))
        return _checked(folder / name, name, file, self.where)

    def downloading(self) -> AbstractContextManager[Path]:
        return _temporary_path()

    def names(self) -> list[str]:
        self._system.invalidate_cache()
        try:
            with self._explained("the files"):
                there = self._system.ls(self._root, detail=False)
        except Gone:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in there)
        return sorted(name for name in names if number_of(name) is not None)

    def writing(self) -> AbstractContextManager[OutputFolder]:
        self._store.require_writable()
        return _temporary_folder()

    def joining(self) -> AbstractContextManager[PayloadFolder]:
        self._store.require_writable()
        return _temporary_folder()

    def send(self, folder: PayloadFolder, payloads: Mapping[str, StreamFile]) -> None:
        with self._writes_explained():
            self._system.makedirs(self._root, exist_ok=True)
            self._put(folder, payloads)

    def _put(self, folder: PayloadFolder, payloads: Iterable[str]) -> None:
        for name in payloads:
            self._system.put_file(str(folder.root / name), self._path(name))
            (folder.root / name).unlink()

    def withdraw(self, folder: PayloadFolder, names: Iterable[str]) -> None:
        for name in names:
            (folder.root / name).unlink(missing_ok=True)
            with suppress(Exception):  # its library's own, also if it was never sent
                self._system.rm_file(self._path(name))

    @contextmanager
    def _writes_explained(self) -> Iterator[None]:
        with writing(self.where):
            try:
                yield
            except Exception as error:
                if is_conflict(error):
                    raise other_writer(self.where) from error
                raise

    def publish(self, folder: PayloadFolder, new: Publication) -> None:
        if self.head() != new.expected:
            raise other_writer(self.where)
        name, content = new.record
        try:
            with self._writes_explained():
                self._system.makedirs(self._root, exist_ok=True)
                if not new.is_shared:
                    self._put(folder, new.payloads)
                self._system.pipe_file(self._path(name), content, mode="create")
                self._system.pipe_file(self._path(HEAD_NAME), new.head)
                for gone in new.removed:
                    self._system.rm_file(self._path(gone))
        finally:
            for payload in new.payloads:
                (folder.root / payload).unlink(missing_ok=True)


class HubTransport:
    """A stream in a model repository: every publication is one commit."""

    def __init__(self, repo_id: str, public: bool) -> None:
        self.where = f"hf://{repo_id}"
        self._repo_id = repo_id
        self._public = public
        self._seen: HubSource | None = None

    def _source(self) -> HubSource:
        """The repository at the commit that :meth:`head` found."""
        if self._seen is None:
            self._seen = HubSource(self._repo_id)
        return self._seen

    def head(self) -> bytes | None:
        if self._seen:
            self._seen.close()
        self._seen = HubSource(self._repo_id)
        try:
            return self.read(HEAD_NAME, MAX_HEAD_BYTES)
        except Gone:
            return None

    def read(self, name: str, limit: int) -> bytes:
        size = self._source().sizes.get(name)
        if size is None:
            raise Gone
        if size > limit:
            raise damaged(f"{name} in {self.where}", "It is too long")
        return self._source().open(name).read(0, size)

    def fetch(self, name: str, file: StreamFile, folder: Path) -> LocalFile:
        size = self._source().sizes.get(name)
        if size is None:
            raise Gone
        if size != file.size:
            raise damaged(f"{name} in {self.where}", "Its size is not the one in its record")
        with _room_for(name), open(folder / name, "wb") as copy:
            copy.writelines(self._source().blocks(name))
        return _checked(folder / name, name, file, self.where)

    def downloading(self) -> AbstractContextManager[Path]:
        return _temporary_path()

    def names(self) -> list[str]:
        return sorted(name for name in self._source().sizes if number_of(name) is not None)

    @contextmanager
    def writing(self) -> Iterator[OutputFolder]:
        require_login()
        find_branch(self._repo_id, None, private=not self._public)  # creates it if missing
        with _temporary_folder() as folder:
            yield folder

    def joining(self) -> AbstractContextManager[PayloadFolder]:
        raise OutputError(
            f"Several processes cannot publish to {self.where}",
            "A repository takes one commit from one process.",
            "Publish to a folder or a bucket; or pass full tensors on one process, without a process group.",
        )

    def send(self, folder: PayloadFolder, payloads: Mapping[str, StreamFile]) -> None:
        self.joining()

    def withdraw(self, folder: PayloadFolder, names: Iterable[str]) -> None:
        with suppress(OSError):
            for name in names:
                (folder.root / name).unlink(missing_ok=True)

    def publish(self, folder: PayloadFolder, new: Publication) -> None:
        branch = find_branch(self._repo_id, None, private=not self._public)
        there = branch.repository
        if new.expected is None:
            is_ours = HEAD_NAME not in there.files
        else:
            is_ours = _outgoing(HEAD_NAME, new.expected).is_in(there)
        if not is_ours:
            raise other_writer(self.where)
        files = [_outgoing(*new.record), _outgoing(HEAD_NAME, new.head)]
        for name, payload in new.payloads.items():
            files.append(Outgoing(name, folder.root / name, payload.size, payload.sha256))
        removed = [name for name in new.removed if name in there.files]
        try:
            upload(branch, files, removed, message=new.message, create_pr=False, sent=lambda _: None)
        finally:
            for name in new.payloads:
                (folder.root / name).unlink(missing_ok=True)


def _outgoing(name: str, content: bytes) -> Outgoing:
    return Outgoing(name, content, len(content), hashlib.sha256(content).hexdigest())
