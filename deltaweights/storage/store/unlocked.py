"""A place in a store in which several processes put files of their own, without notes."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from functools import partial

from ..destination import UnlockedPlace, WritableFile
from ..source import Source
from .client import Store, patiently
from .errors import other_writer, reading, writing
from .files import SpooledFile, StreamedFile
from .source import StoreSource
from .upload import Upload


class UnlockedStore(UnlockedPlace):
    """The place at ``url``. Of two processes that put a file of the same name, the store refuses the second,
    where it can do so.

    Raises:
        CheckpointError: the URL is none that fsspec knows, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(url)
        self.where = self._store.where
        self._run = secrets.token_hex(8)
        self._cancelled = threading.Event()

    def require_writable(self) -> None:
        """Raise :class:`OutputError` where files are only read."""
        self._store.require_writable()

    def create(
        self, path: str, *, size: int | None = None, sha256: str | None = None, over: str | None = None
    ) -> WritableFile:
        """A new file. With a size and a digest it is sent while it is written; else it waits on a disk of
        this machine until it is complete."""
        self.require_writable()
        begin = partial(self._begin, over)
        if size is None or sha256 is None:
            return SpooledFile(path, begin, lambda: None)
        return StreamedFile(path, size, sha256, begin)

    def _begin(self, over: str | None, path: str, size: int, sha256: str) -> Upload:
        if over is not None and self.mark(path) != over:
            raise other_writer(self.where, f"{path} there is not the one that was there a moment ago.")
        return Upload(
            self._store,
            path,
            size,
            sha256=sha256,
            replace=over is not None,
            run=self._run,
            cancelled=self._cancelled,
            settled=lambda is_there: None,
        )

    def mark(self, path: str) -> str | None:
        """What the store says of the version of the file at ``path``; None if there is none."""
        with reading(self.where, path):
            return patiently(partial(self._store.pin_now, path))

    def sizes(self) -> dict[str, int]:
        """The sizes of the files that are there now, by path."""
        with reading(self.where):
            look = self._store.listing if self._store.is_web else self._store.find
            return {path: file.size for path, file in patiently(look).items()}

    def read(self, path: str) -> bytes:
        """The bytes of a small file; none if it is not there."""
        with reading(self.where, path):
            return patiently(partial(self._store.get, path))

    def remove(self, path: str) -> None:
        """Remove the file at ``path``, if it is there."""
        with writing(self.where, path):
            patiently(partial(self._store.remove, path))

    def is_at(self, source: Source) -> bool:
        """Whether it is the place of ``source``."""
        return isinstance(source, StoreSource) and self._store.address() == source.store.address()

    def end_uploads(self, is_left_over: Callable[[str], bool]) -> None:
        """End what killed processes began to send to the paths that ``is_left_over`` is true of."""
        inside = self._store.full_path("")
        with writing(self.where):
            for upload in self._store.uploads():
                if is_left_over(upload.full_path.removeprefix(inside)):
                    self._store.end_upload(upload)
