"""One object on its way to a store, by fsspec's file interface: in order, retried, visible once whole."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..traffic import count
from .client import RUN_KEY, SHA256_KEY, Store, patiently
from .errors import is_conflict, writing

_log = logging.getLogger(__name__)

#: An upload has at most so many parts (S3's limit), and each but the last has at least so many bytes. A part
#: is in memory about three times while it is sent.
_MOST_PARTS, _PART_BYTES = 10_000, 6 << 20
_ALIGNMENT = 1 << 18  # of parts, as Google Cloud Storage asks for


def part_bytes(nbytes: int) -> int:
    """How long the parts of an object of so many bytes are."""
    return max(_PART_BYTES, -(-nbytes // (_MOST_PARTS * _ALIGNMENT)) * _ALIGNMENT)


class Upload:
    """A new object at ``path``, of ``nbytes`` bytes.

    Args:
        store: the place.
        sha256: kept with it, where the store keeps such.
        replace: whether an object may be in its place. Otherwise, one that is there at the end is another
            writer's.
        run: a word that no other run has.
        cancelled: ends waits before retries.
        settled: called in the end, with whether the object is there; False if another writer was first.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        nbytes: int,
        *,
        sha256: str,
        replace: bool,
        run: str,
        cancelled: threading.Event,
        settled: Callable[[bool], object],
    ) -> None:
        self._store = store
        self._path = path
        self._nbytes = nbytes
        self._run = run
        self._replace = replace
        self._cancelled = cancelled
        self._settled = settled
        self._is_over = False
        self._sent = 0  # bytes, or about to be
        self._metadata = {SHA256_KEY: sha256, RUN_KEY: run}
        self._full_path = store.full_path(path)
        self._partial = ""
        with writing(store.where, path):
            store.require_nameable(path)
            self._file = self._open()

    def _open(self) -> Any:
        """Nothing is asked of the store yet, but for those whose files are no uploads."""
        system, size = self._store.system, part_bytes(self._nbytes)
        if not self._store.has_uploads:
            name = hashlib.sha256(self._path.encode()).hexdigest()[:32]
            self._partial = self._store.full_path(f".deltaweights/{name}.partial")
            with self._store.alone():
                if not self._replace and system.exists(self._full_path):
                    raise FileExistsError(self._path)
                with suppress(NotImplementedError):
                    system.makedirs(self._partial.rpartition("/")[0], exist_ok=True)
                return system.open(self._partial, "wb")
        extra = {
            "autocommit": self._nbytes < size,
            "block_size": size,
            **self._store.metadata(self._metadata),
        }
        if self._replace:
            return system.open(self._full_path, "wb", **extra)
        try:
            return system.open(self._full_path, "xb", **extra)
        except (NotImplementedError, ValueError):  # versions that cannot refuse an object that is there
            if system.exists(self._full_path):
                raise FileExistsError(self._path) from None
            return system.open(self._full_path, "wb", **extra)

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view, size = memoryview(data).cast("B"), part_bytes(self._nbytes)
        with writing(self._store.where, self._path), self._store.alone():
            while view:  # up to the end of a part at a time: what is over it would be sent with it
                here, view = view[: size - self._sent % size], view[size - self._sent % size :]
                try:
                    self._file.write(here)
                except Exception as error:
                    if not self._store.has_uploads:
                        raise
                    self._retry(self._flush, error)
                self._sent += len(here)
        count(written=len(data))

    def finish(self) -> None:
        """Send the rest, and let the object be there.

        Raises:
            HubWriteError: it cannot be written; or another one is there, or came meanwhile.
        """
        with writing(self._store.where, self._path):
            try:
                self._finish() if self._store.has_uploads else self._rename()
            except Exception as error:
                if not self._is_there(error):
                    if is_conflict(error):
                        self._settled(False)
                    raise
            self._end()
            self._settled(True)

    def _finish(self) -> None:
        self._retry(lambda: self._flush(last=True))
        if not self._file.autocommit:
            self._retry(self._file.commit)

    def discard(self) -> None:
        """End the upload, unless it is finished."""
        if self._is_over:
            return
        try:
            with self._store.alone():
                self._file.discard() if self._store.has_uploads else self._remove_partial()
        except Exception as error:  # there is an error already
            _log.info(
                "an upload to %s/%s was not ended: %s", self._store.where, self._path, type(error).__name__
            )
        self._end()

    def _flush(self, *, last: bool = False) -> None:
        """Send the part that is due. What a failed attempt left is taken up again."""
        file = self._file
        if file.closed:  # it could not begin
            file.closed, file.offset = False, None
        file.forced = False
        file.flush(force=last)

    def _retry(self, action: Callable[[], object], failed: Exception | None = None) -> None:
        patiently(action, failed=failed, cancelled=self._cancelled)

    def _is_there(self, error: Exception) -> bool:
        """Whether the object is there after all: an answer may be lost after the store did what it says."""
        if not (is_conflict(error) or isinstance(error, FileNotFoundError)):
            return False
        found: dict[str, str] = {}
        with suppress(Exception):
            found = patiently(lambda: self._store.told(self._full_path), cancelled=self._cancelled)
        return all(found.get(key) == value for key, value in self._metadata.items())

    def _rename(self) -> None:
        system = self._store.system
        with self._store.alone():
            self._file.close()
            if not self._replace and system.exists(self._full_path):
                raise FileExistsError(self._path)
            parent = self._full_path.rpartition("/")[0]
            with suppress(NotImplementedError):
                system.makedirs(parent, exist_ok=True)
            system.mv(self._partial, self._full_path)

    def _remove_partial(self) -> None:
        self._file.close()
        if self._store.system.exists(self._partial):
            self._store.system.rm_file(self._partial)

    def _end(self) -> None:
        self._is_over = True
        with suppress(Exception):
            self._file.closed = True  # else, what it still holds would be sent when it is collected
        with suppress(Exception):
            self._store.system.invalidate_cache(self._full_path)
