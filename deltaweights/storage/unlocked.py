"""A folder in which several processes put files of their own, without a lock; and single files."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..errors import OutputError
from .destination import UnlockedPlace
from .local import output_path, store_url
from .location import Location
from .output import PartialFile, full_disk_explained
from .source import Source
from .store import UnlockedStore
from .system import is_same


class UnlockedFolder(UnlockedPlace):
    """The folder at ``root``, made when the first file is."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = output_path(root)
        self.where = str(self._root)

    def require_writable(self) -> None:
        """Nothing: it shows when a file is created."""

    def create(
        self, path: str, *, size: int | None = None, sha256: str | None = None, over: str | None = None
    ) -> PartialFile:
        """A new file, which replaces any at ``path``.

        Raises:
            OutputError: it cannot be created.
        """
        final = self._root / path
        with full_disk_explained(f"to {self._root}"):
            final.parent.mkdir(parents=True, exist_ok=True)
            return PartialFile(path, final.with_name(f"{final.name}.partial"), final)

    def mark(self, path: str) -> str | None:
        """Size, time of change and inode of the file at ``path``; None if there is none."""
        try:
            info = (self._root / path).stat()
        except OSError:
            return None
        return f"{info.st_size}:{info.st_ctime_ns}:{info.st_ino}"

    def sizes(self) -> dict[str, int]:
        """The sizes of the files that are directly in the folder now, by name."""
        if not self._root.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in self._root.iterdir() if path.is_file()}

    def read(self, path: str) -> bytes:
        """The bytes of a small file; none if it is not there."""
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return b""

    def remove(self, path: str) -> None:
        """Remove the file at ``path``, if it is there."""
        with full_disk_explained(f"to {self._root}"):
            (self._root / path).unlink(missing_ok=True)

    def is_at(self, source: Source) -> bool:
        """Whether it is the folder of ``source``."""
        return source.root is not None and is_same(self._root, source.root)

    def end_uploads(self, is_left_over: Callable[[str], bool]) -> None:
        """Nothing: what a killed process left is a file."""


def open_unlocked(location: Location) -> UnlockedPlace:
    """The folder or the place in a store at ``location``, for processes that write there without a lock.

    Raises:
        OutputError: nothing can be written there.
        CheckpointError: the URL is none that fsspec knows, or its package is missing.
    """
    url = store_url(location)
    return UnlockedStore(url) if url else UnlockedFolder(location)


def require_place(location: Location) -> None:
    """Raise :class:`OutputError` where :func:`write_document` would find no folder for a path: better before
    the work than after it."""
    if store_url(location) is None and not (folder := output_path(location).absolute().parent).is_dir():
        raise OutputError(
            f"Cannot write {location}", f"There is no folder {folder}.", "Make it, or name another file."
        )


def write_document(location: Location, data: bytes) -> None:
    """Write a small file at a path or at the URL of an object in a store. What was there is replaced.

    Raises:
        OutputError: it cannot be written, or the URL names no object.
        HubWriteError: the store refuses it.
    """
    url = store_url(location)
    if url is None:
        path = output_path(location)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise OutputError(f"Cannot write {location}", f"{error.strerror}.") from error
        return
    folder, _, name = url.rpartition("/")
    if not name or folder.endswith("/"):  # s3://bucket, s3://bucket/folder/
        raise OutputError(
            f"{UnlockedStore(url).where} names no file", "", "Write it like s3://bucket/folder/file."
        )
    place = UnlockedStore(folder)
    with place.create(name, over=place.mark(name)) as file:
        file.write_at(0, data)
        file.commit()
