"""A place in an object store, or on a web server, as a :class:`Source`: whatever URL fsspec knows.

Bytes come by range requests, without a copy on disk. Each file is pinned to the version that was listed: a
change in mid-run is an error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

from ...errors import CheckpointError
from .. import hub_client
from ..local import is_left_out
from ..read_ahead import Window
from ..remote import FetchedFile, RemoteSource
from ..traffic import count
from .client import PinnedFile, Store, pause_after
from .errors import reading

_log = logging.getLogger(__name__)

#: Less than for the Hub: the packages of stores take memory themselves, and outside of S3 a range arrives
#: whole before it is put into the window.
_WINDOW_BYTES, _CONNECTIONS = 28 << 20, 4

#: Where requests cannot name a version, it is looked up before the first range of a file, at its end, and
#: after each so many.
_RANGES_PER_LOOK = 16


class StoreSource(RemoteSource):
    """The files at one URL: a folder with all its files, or one file.

    Args:
        url: such as ``s3://bucket/folder``, ``gs://bucket/folder`` or ``https://host/model.safetensors``.
        window_bytes: the most memory for bytes fetched ahead.

    Raises:
        CheckpointError: the URL is none that fsspec knows, or its package is missing.
        HubReadError: nothing is there, or it cannot be read.
    """

    def __init__(self, url: str, *, window_bytes: int = _WINDOW_BYTES) -> None:
        self._url = url
        self.store = Store(url)
        self._files = self.store.listing()
        where = self.store.where
        odd = {path: _unnameable(where, path) for path in self._files if not _is_nameable(path)}
        sizes = {
            path: file.size
            for path, file in sorted(self._files.items())
            if not is_left_out(path) and path not in odd
        }
        left_out = tuple(sorted(set(self._files) - set(sizes) - set(odd)))
        super().__init__(where, sizes, left_out=left_out, unreadable=odd)
        self.window = Window(self._fetch, nbytes=window_bytes, connections=_CONNECTIONS)
        self._is_single = len(sizes) == 1 and self.where.endswith(f"/{next(iter(sizes))}")
        self._opened: dict[str, FetchedFile] = {}
        self._handles: dict[str, list[Any]] = {path: [] for path in self._files}
        self._looks = dict.fromkeys(self._files, 0)
        self._digests: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        _log.debug("%s holds %d files", self.where, len(sizes))

    @property
    def location(self) -> str:
        """The URL, with what may be secret in it."""
        return self._url

    def open(self, path: str) -> FetchedFile:
        """The file at ``path``."""
        if path not in self._opened:
            self._opened[path] = FetchedFile(path, self.sizes[path], self.window)
        return self._opened[path]

    def hold_less(self) -> None:
        """Fetch ahead half as much."""
        self.window.halve()

    def addresses(self) -> list[str]:
        """Of each file, :meth:`Store.address`."""
        if self._is_single:
            return [self.store.address()]
        return [self.store.address(path) for path in self.sizes]

    def name(self, path: str) -> str:
        """The file's URL, without what may be secret."""
        return self.where if self._is_single else f"{self.where}/{path}"

    def told_sha256(self, path: str) -> str | None:
        """The SHA-256 in the file's metadata, where it was written there; else None. The store has not
        computed it, as the Hub does: it is compared with what is read, and not believed instead."""
        if path not in self._files:
            return None
        if path not in self._digests:
            self._digests[path] = self.store.told_sha256(self._files[path])
        return self._digests[path]

    def fingerprint(self, path: str) -> str:
        """Place, size, and what the store says of the version."""
        file = self._files[path]
        return f"{path}:{self.where}:{file.size}:{file.pin}"

    def _fetch(self, path: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes of the file from ``start`` to ``end``, with retries after temporary errors."""
        attempt = 0
        with reading(self.name(path)):
            while start < end:
                try:
                    for piece in self._attempt(path, start, end):
                        start += len(piece)
                        count(fetched=len(piece))
                        attempt = 0
                        yield piece
                except Exception as error:
                    if self._cancelled.wait(pause_after(error, attempt, hub_client.RETRY_DELAYS)):
                        raise CancelledError from None
                    attempt += 1

    def _attempt(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from one request, piece by piece where the store's package can."""
        file = self._files[path]
        if self.store.is_s3:
            return self.store.pieces(file, start, end)
        return iter([self._whole(path, file, start, end)])

    def _whole(self, path: str, file: PinnedFile, start: int, end: int) -> bytes:
        with self._lock:
            idle = self._handles[path]
            opened = idle.pop() if idle else None
            look, self._looks[path] = self._looks[path], self._looks[path] + 1
        opened = opened or self.store.open(file)
        data = self.store.read(opened, start, end)
        with self._lock:
            self._handles[path].append(opened)
        if end == file.size or look % _RANGES_PER_LOOK == 0:
            self.store.require_same(file)
        return data

    def cancel(self) -> None:
        """End all reads that wait for the network, and all later ones."""
        self._cancelled.set()
        self.window.cancel()

    def close(self) -> None:
        """End all connections, close all files."""
        self.cancel()
        self.window.close()
        with self._lock:
            handles = [handle for idle in self._handles.values() for handle in idle]
            self._handles = {path: [] for path in self._files}
        for handle in handles:
            with suppress(Exception):
                handle.close()


def _is_nameable(path: str) -> bool:
    """Whether a file in a folder could have this path: keys of objects may be any text."""
    return "\0" not in path and not {"", ".", ".."}.intersection(path.split("/"))


def _unnameable(where: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"An object in {where} has a name that no file can have",
        f"It is {path[:200]!r}.",
        "Rename it.",
    )
