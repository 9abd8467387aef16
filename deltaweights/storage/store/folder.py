"""A place in a store, written like an output folder: a file is there once it is complete.

Notes for the next run are small objects under ``OUT/.deltaweights/``, removed at the end.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial

from ...errors import OutputError
from ..destination import Destination, SharedOutput, WritableFile
from ..local import is_clutter
from ..output import KEPT, WORKSPACE
from ..source import Source
from .client import PinnedFile, Store, patiently
from .errors import reading, writing
from .files import SpooledFile, StreamedFile
from .source import StoreSource
from .upload import Upload

_log = logging.getLogger(__name__)

_CLAIMS, _MEMORY = f"{WORKSPACE}/claims-", ".memory"


class StoreFolder(Destination):
    """The place at ``url``; a context manager.

    A second writer is not locked out, but refused when it puts a file where one has come meanwhile: by the
    store, where that can do so.

    Raises:
        CheckpointError: the URL is none that fsspec knows, or its package is missing.
        OutputError: nothing can be written there.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = Store(url)
        self.where = self._store.where
        self._store.require_writable()
        self._run = secrets.token_hex(8)
        self._files: dict[str, PinnedFile] = {}
        self._own: set[str] = set()  # files whose uploads are this program's
        self._claims: set[str] = set()
        self._lost: set[str] = set()  # claimed, and another writer's
        self._reader: StoreSource | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def __enter__(self) -> StoreFolder:
        with writing(self.where):
            self._files = patiently(self._store.find, cancelled=self._cancelled)
            self._claims = set(self._earlier_claims())
        self._put_claims(())  # whether it can be written to shows now, not hours later
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_reader()
        with suppress(Exception):  # what remains hinders nobody
            if exc[0] is None or not self._claims - self._lost:
                self._clear_workspace()
            elif self._lost:
                self._put_claims(self._claims - self._lost)
        if exc[0] is None:
            with suppress(Exception):  # not everyone may list uploads
                self._end_left_over()

    def _close_reader(self) -> None:
        if self._reader:
            self._reader.close()

    def _clear_workspace(self) -> None:
        """Remove all notes, those of other runs too: they have nothing to go on with."""
        for path in patiently(self._store.find, cancelled=self._cancelled):
            if path.startswith(f"{WORKSPACE}/") and not path.startswith(f"{WORKSPACE}/{KEPT}/"):
                self._remove(path)

    def _end_left_over(self) -> None:
        """End the uploads that killed runs began for this run's files."""
        ours = {self._store.full_path(path) for path in self._own | self._claims}
        for upload in self._store.uploads():
            if upload.full_path in ours:
                self._store.end_upload(upload)
                _log.info("ended an upload of %s that an earlier run began", self.where)

    def share(self) -> SharedOutput:
        """Let others join, until this place is closed."""
        return SharedOutput(self._url, self._run)

    def cancel(self) -> None:
        """End all writes that wait for the store, and all later ones."""
        self._cancelled.set()
        with self._lock:
            reader = self._reader
        if reader:
            reader.cancel()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    def create(self, path: str, *, size: int | None = None, sha256: str | None = None) -> WritableFile:
        """A new file. With a size and a digest it is sent while it is written; else it waits on a disk of
        this machine until it is complete."""
        self._check()
        self._own.add(path)
        if size is None or sha256 is None:
            return SpooledFile(path, self._begin, self._check)
        return StreamedFile(path, size, sha256, self._begin)

    def _begin(self, path: str, size: int, sha256: str) -> Upload:
        self._check()
        return Upload(
            self._store,
            path,
            size,
            sha256=sha256,
            replace=path in self._files,
            run=self._run,
            cancelled=self._cancelled,
            settled=lambda is_there: self._settle(path, size, is_there),
        )

    def _settle(self, path: str, size: int, is_there: bool) -> None:
        if is_there:
            self._files[path] = PinnedFile(self._store.full_path(path), size, "")
        else:  # the next run must not take it for this program's
            with self._lock:
                self._lost.add(path)

    def exists(self, path: str) -> bool:
        """Whether there was such a file at the beginning, or is one from this run."""
        return path in self._files

    def is_regular(self, path: str) -> bool:
        """The same: there are no links."""
        return path in self._files

    def size(self, path: str) -> int:
        """The size of the file at ``path``, in bytes."""
        return self._files[path].size

    def blocks(self, path: str) -> Iterator[bytes]:
        """The bytes of the file at ``path``, in blocks."""
        with self._lock:
            self._reader = self._reader or StoreSource(self._url)
        return self._reader.blocks(path)

    def source(self) -> Source:
        """The files that are there, to be read."""
        return StoreSource(self._url)

    def remove(self, path: str) -> None:
        """Remove the file at ``path``."""
        with writing(self.where, path):
            self._remove(path)

    def _remove(self, path: str) -> None:
        patiently(partial(self._store.remove, path), cancelled=self._cancelled)
        self._files.pop(path, None)

    def foreign(self, expected: Collection[str]) -> list[str]:
        """The files that are there though ``expected`` does not name them, sorted."""
        inside = f"{WORKSPACE}/"
        return sorted(
            path
            for path in self._files
            if path not in expected and not path.startswith(inside) and not is_clutter(path)
        )

    @property
    def claims(self) -> set[str]:
        """The paths that :meth:`claim` noted, in this run and in interrupted ones before it."""
        return set(self._claims)

    def _earlier_claims(self) -> Iterator[str]:
        for path in self._files:
            if path.startswith(_CLAIMS):
                yield from filter(None, self._get(path).decode("utf-8", errors="replace").split("\n"))

    def claim(self, paths: Iterable[str]) -> None:
        """Note that the files belong to this program, which may replace or remove them."""
        with self._lock:
            new = self._claims | set(paths)
            if new != self._claims:
                self._put_claims(new)
                self._claims = new

    def _put_claims(self, claims: Collection[str]) -> None:
        self._put(f"{_CLAIMS}{self._run}", "".join(f"{path}\n" for path in sorted(claims)).encode())

    def remove_claims(self, keep: Collection[str]) -> None:
        """Delete the claimed files of earlier runs that are not in ``keep``."""
        for path in self._claims - set(keep):
            if path in self._files and not path.startswith(f"{WORKSPACE}/"):
                self.remove(path)

    def remember(self, name: str, data: bytes) -> None:
        """Keep ``data`` for the next run, in case this one is interrupted."""
        self._put(f"{WORKSPACE}/{name}{_MEMORY}", data)

    def recall(self, name: str) -> bytes:
        """The data that an interrupted run kept under ``name``; empty if none."""
        path = f"{WORKSPACE}/{name}{_MEMORY}"
        if path not in self._files:
            return b""
        with writing(self.where, path):
            return self._get(path)

    def _get(self, path: str) -> bytes:
        return patiently(partial(self._store.get, path), cancelled=self._cancelled)

    def _put(self, path: str, data: bytes) -> None:
        full = self._store.full_path(path)

        def put() -> None:
            with self._store.alone():
                self._store.system.pipe_file(full, data)

        with writing(self.where, path):
            patiently(put, cancelled=self._cancelled)
        self._files[path] = PinnedFile(full, len(data), "")

    def is_inside(self, source: Source) -> bool:
        """Whether it is the place of ``source``, or in it."""
        return isinstance(source, StoreSource) and self._store.is_within(source.store)

    def holds(self, source: Source) -> bool:
        """Whether ``source`` is a single file, directly in this place."""
        return isinstance(source, StoreSource) and any(
            self._store.address(path) == source.store.address() for path in source.sizes
        )

    def require_apart(self, paths: Iterable[str], sources: Iterable[Source]) -> None:
        """Raise :class:`OutputError` if writing ``paths`` would replace a file of ``sources``."""
        inputs = {
            address: source
            for source in sources
            if isinstance(source, StoreSource)
            for address in source.addresses()
        }
        for path in paths:
            if source := inputs.get(self._store.address(path)):
                raise OutputError(
                    f"{self.where}/{path} cannot be written",
                    f"It is a file of {source.where}, which the output is made from.",
                    "Choose another place.",
                )

    def require_distinct(self, paths: Iterable[str]) -> None:
        """Nothing: stores distinguish all names. The files become this run's to write."""
        self._own |= set(paths)

    def free_bytes(self) -> None:
        """None: stores do not fill up."""

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        """The sizes of those of the files that are there now."""
        with reading(self.where):
            files = patiently(self._store.find, attempts=3)
        return {path: files[path].size for path in paths if path in files}


class JoinedPlace(StoreFolder):
    """The place of a run that another process holds open; a context manager. What is written here is the
    run's, and that process cleans up.

    Raises:
        OutputError: the run is over.
    """

    def __init__(self, shared: SharedOutput) -> None:
        super().__init__(shared.location)
        self._run = shared.run

    def __enter__(self) -> JoinedPlace:
        with writing(self.where):
            self._files = patiently(self._store.find, cancelled=self._cancelled)
        if f"{_CLAIMS}{self._run}" not in self._files:
            raise OutputError(f"{self.where} cannot be written to by a task", "Its run is over.")
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_reader()

    def claim(self, paths: Iterable[str]) -> None:
        """Nothing: who holds the place has claimed what others write."""
