"""Copies of bases that many jobs share, on a node's own disk: each file comes over the network once.

A copy is named by what its source says of the file (place, size, ETag or commit) and by the SHA-256 of the
bytes that came. Nobody believes it for its name: a base is checked like any other, and a copy that differs
from its SHA-256 is removed and fetched again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import CheckpointError, OutputError
from ..storage import (
    Announce,
    LocalFile,
    Readable,
    ReadableFile,
    Source,
    Span,
    blocks_at,
    file_blocks,
    free_space,
    lock,
    open_source,
    sha256_of,
)

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05

_PARTIAL = "partial-"


class _Copy(NamedTuple):
    """A copy in use: as long as ``held`` is open, nobody removes it."""

    path: Path
    held: IO[bytes]
    file: LocalFile


class BaseCache:
    """A folder of copies, for any number of threads and processes of one machine.

    Args:
        folder: made if it is not there.
        nbytes: the most bytes of all copies. The ones that were not used for the longest time make room; what
            does not fit is read from where it is.
        check: called while others are waited for; may raise.

    Raises:
        OutputError: the folder cannot be used.
    """

    def __init__(self, folder: Path, nbytes: int, check: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._most = nbytes
        self._check = check
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {folder}", f"{error.strerror}.", "Choose another.") from error

    def open(self, location: Readable) -> Source:
        """The base at a location, whose files are copied when they are first opened; itself if it is here."""
        source = open_source(location)
        return CachedSource(source, self) if source.is_remote else source

    def copy_of(self, source: Source, path: str) -> _Copy | None:
        """The copy of a file, fetched now or earlier; None if there is no room for it."""
        if source.full_path(path):  # it is in the Hub cache
            return None
        key = hashlib.sha256(source.fingerprint(path).encode(errors="backslashreplace")).hexdigest()
        size = source.sizes[path]
        try:
            with self._locked(f"lock-{key[:2]}"):
                copy = self._taken(key, path, size)
                if not copy and self._fetch(key, source, path):
                    copy = self._taken(key, path, size)
                return copy
        except OSError as error:
            _log.warning("%s is read without a copy: %s", source.name(path), error.strerror)
            return None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One thread of one process at a time is inside, for this name."""
        with open(self._folder / name, "ab") as file:
            while True:
                self._check()
                try:
                    lock(file)
                    break
                except BlockingIOError:
                    time.sleep(_POLL_SECONDS)
            yield

    def _taken(self, key: str, name: str, size: int) -> _Copy | None:
        """The copy that is there, in use from now on."""
        with self._locked("lock"):
            for path in self._folder.glob(f"{key}-*"):
                if path.stat().st_size == size:
                    os.utime(path)
                    held = open(path, "rb")  # noqa: SIM115
                    lock(held, shared=True)
                    return _Copy(path, held, LocalFile(name, path))
        return None

    def _fetch(self, key: str, source: Source, path: str) -> bool:
        """Copy a file. Returns whether there was room."""
        sha256 = hashlib.sha256()
        with ExitStack() as opened:
            with self._locked("lock"):
                if not self._has_room(source.sizes[path]):
                    _log.info("%s has no room among the copies, and is read from there", source.name(path))
                    return False
                # Named and locked at once: nobody takes it for what a killed run left.
                fd, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
                file = opened.enter_context(os.fdopen(fd, "r+b"))
                opened.callback(Path(name).unlink, missing_ok=True)
                lock(file, shared=True)
                file.truncate(source.sizes[path])  # counted as held
            for block in source.blocks(path):
                self._check()
                sha256.update(block)
                file.write(block)
            file.flush()
            token = name.rpartition("-")[2]
            os.replace(name, self._folder / f"{key}-{token}-{sha256.hexdigest()}")
        _log.info("%s was copied: %d bytes", source.name(path), source.sizes[path])
        return True

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes fit, once the oldest copies that nobody uses are removed."""
        copies = [path for path in self._folder.iterdir() if not path.name.startswith("lock")]
        facts = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in copies)
        held = sum(nbytes for _, nbytes, _ in facts)
        for _, nbytes, path in facts:
            is_left = path.name.startswith(_PARTIAL)
            if (is_left or held + size > self._most) and size <= self._most and _removed(path):
                held -= nbytes
        return held + size <= self._most and size <= free_space(self._folder)


def _removed(path: Path) -> bool:
    """Remove a copy, unless somebody uses it."""
    with suppress(OSError), open(path, "rb") as file:
        lock(file)
        path.unlink()
        return True
    return False


class CachedSource(Source):
    """A source far away, of which each file is copied to this machine when it is first opened, and read from
    there."""

    def __init__(self, source: Source, cache: BaseCache) -> None:
        super().__init__(
            source.where,
            source.sizes,
            hub_id=source.hub_id,
            left_out=source.left_out,
            unreadable=source.unreadable,
        )
        self._source = source
        self._cache = cache
        self._lock = threading.Lock()
        self._copies: dict[str, _Copy | None] = {}

    @property
    def is_remote(self) -> bool:
        """Always true: there may be no room for a copy."""
        return True

    def open(self, path: str) -> ReadableFile:
        """The copy of the file; or the file far away, if there is no room."""
        copy = self._copy(path)
        return copy.file if copy else self._source.open(path)

    def _copy(self, path: str) -> _Copy | None:
        with self._lock:
            if path not in self._copies:
                self._copies[path] = self._cache.copy_of(self._source, path)
            return self._copies[path]

    def fingerprint(self, path: str) -> str:
        """The source's own, and a shard's copy: what was made from a damaged one is not gone on with."""
        copy = self._copy(path) if path.endswith(".safetensors") else None
        return f"{self._source.fingerprint(path)}:{copy.path.name if copy else ''}"

    def name(self, path: str) -> str:
        """The file's name far away."""
        return self._source.name(path)

    def full_path(self, path: str) -> Path | None:
        """The copy's, once there is one."""
        copy = self._copies.get(path)
        return copy.path if copy else self._source.full_path(path)

    def blocks(self, path: str) -> Iterator[bytes]:
        """The bytes in order; compared at the end with the SHA-256 of the bytes that came."""
        copy = self._copy(path)
        if not copy:
            yield from self._source.blocks(path)
            return
        yield from self.compared(path, file_blocks(copy.file))

    def published_sha256(self, path: str) -> str | None:
        """The source's own."""
        return self._source.published_sha256(path)

    def told_sha256(self, path: str) -> str | None:
        """The source's own."""
        return self._source.told_sha256(path)

    def require_sha256(self, path: str, sha256: str) -> None:
        """Compare with the copy's SHA-256 and with the source's.

        Raises:
            CheckpointError: it differs.
        """
        copy = self._copies.get(path)
        if not copy:
            self._source.require_sha256(path, sha256)
        elif (right := _sha256_in(copy.path)) != sha256:
            raise CheckpointError(
                f"The copy of {self.name(path)} in the cache is damaged",
                f"Its SHA-256 is {sha256}, not {right}.",
                f"Remove {copy.path}.",
            )

    def remove_damaged(self) -> bool:
        """Remove the copies that were used and are not the bytes that came, also after :meth:`close`. Returns
        whether there are such."""
        damaged = [copy.path for copy in self._copies.values() if copy and not _is_right(copy.path)]
        for path in damaged:
            path.unlink(missing_ok=True)
            _log.warning("the copy %s was damaged, and is fetched again", path)
        return bool(damaged)

    @contextmanager
    def announcing(self) -> Iterator[Announce]:
        """Fetch ahead what has no copy."""
        with self._source.announcing() as announce:
            yield lambda spans: announce(span for span in spans if not self._copy(span.path))

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """The ranges of what has no copy."""
        return self._source.ranges(span for span in spans if not self._copy(span.path))

    def cancel(self) -> None:
        """End all reads that wait for the network."""
        self._source.cancel()

    def close(self) -> None:
        """Let go of the copies; they stay."""
        self._source.close()
        with self._lock:
            for copy in filter(None, self._copies.values()):
                copy.file.close()
                copy.held.close()


def _sha256_in(path: Path) -> str:
    """The SHA-256 in a copy's name."""
    return path.name.rpartition("-")[2]


def _is_right(path: Path) -> bool:
    with suppress(CheckpointError):
        return sha256_of(blocks_at(path.name, path)) == _sha256_in(path)
    return False
