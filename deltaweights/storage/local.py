"""A folder or a single file on this machine as a :class:`Source`."""

from __future__ import annotations

import os
import re
import shutil
import stat
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .source import HubId, ReadableFile, Source, file_blocks
from .system import read_at, read_bytes_at

#: Folders and files that belong to tools, not to the checkpoint.
_LEFT_OUT = re.compile(r"\.git|\.cache|\.deltaweights|.*\.(incomplete|crdownload|part|aria2)")


#: A pipe without a writer opens at once, and is refused then.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


class LocalFile(ReadableFile):
    """A :class:`ReadableFile` on disk. Uses pread, so memory holds only what was asked for.

    Raises:
        CheckpointError: it cannot be opened, or is a device or a pipe, which may never end.
    """

    def __init__(self, path: str, full_path: Path) -> None:
        try:
            self._fd = os.open(full_path, os.O_RDONLY | os.O_CLOEXEC | _AT_ONCE)
            self.close = weakref.finalize(self, os.close, self._fd)  # with the last reference, at the latest
            info = os.fstat(self._fd)
        except OSError as error:
            raise CheckpointError(f"Cannot open {full_path}", f"{error.strerror}.") from error
        if not stat.S_ISREG(info.st_mode):
            self.close()
            raise CheckpointError(f"Cannot open {full_path}", "It is not a regular file.")
        super().__init__(path, info.st_size)

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        view = out.data
        while view:
            try:
                done = read_at(self._fd, offset, view)
            except OSError as error:
                raise CheckpointError(f"Cannot read {self.path}", f"{error.strerror}.") from error
            if not done:
                raise CheckpointError(
                    f"{self.path} ends too early",
                    f"It has fewer than {offset + len(view)} bytes: it was cut or changed.",
                    "Get the file again.",
                )
            view, offset = view[done:], offset + done

    def _read(self, offset: int, nbytes: int) -> bytes:
        """Without the copy that an array would need."""
        try:
            data = read_bytes_at(self._fd, offset, nbytes)
        except OSError as error:
            raise CheckpointError(f"Cannot read {self.path}", f"{error.strerror}.") from error
        return data if len(data) == nbytes else super()._read(offset, nbytes)


def local_path(location: str | os.PathLike[str]) -> Path:
    """The location as a path, ``~`` resolved.

    Raises:
        CheckpointError: no path can look like this.
    """
    try:
        path = Path(location).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (RuntimeError, ValueError, OSError) as error:  # no such user, a NUL in it, too long
        why = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{os.fspath(location)[:200]!r} cannot be opened", f"{why}.".capitalize(), "Check the path."
        ) from error
    return path


def free_space(path: Path) -> int:
    """Free bytes on the disk of ``path``, which may be still to be made."""
    here = path.absolute()
    return shutil.disk_usage(next(place for place in (here, *here.parents) if place.exists())).free


def blocks_at(path: str, full_path: Path) -> Iterator[bytes]:
    """:func:`file_blocks` of a local file, which is closed in the end."""
    with closing(LocalFile(path, full_path)) as file:
        yield from file_blocks(file)


class LocalSource(Source):
    """A folder with everything in it, or one file. Symbolic links to files are followed (a Hub cache
    consists of them); linked folders and special files are left out.

    Raises:
        CheckpointError: there is nothing at ``root``, or a file's name is not valid UTF-8.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        place = local_path(root)
        left_out: list[str] = []
        if place.is_file():
            self._folder, paths = place.parent, [place.name]
        elif place.is_dir():
            self._folder, paths = place, sorted(_walk(place, left_out))
        else:
            raise CheckpointError(
                f"There is no file or folder {root}", "Nothing has that name.", "Check the path."
            )
        self._opened: dict[str, LocalFile] = {}
        super().__init__(
            str(root),
            {path: (self._folder / path).stat().st_size for path in paths},
            root=place,
            hub_id=_hub_id(place),
            left_out=tuple(sorted(left_out)),
        )

    def open(self, path: str) -> LocalFile:
        """The file at ``path``; kept open until :meth:`close`."""
        if path not in self._opened:
            self._opened[path] = LocalFile(path, self._folder / path)
        return self._opened[path]

    def name(self, path: str) -> str:
        """The file's path as the user would give it."""
        return str(self._folder / path)

    def full_path(self, path: str) -> Path:
        """Where the file really lies, links resolved."""
        return (self._folder / path).resolve()

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB; it is closed in the end."""
        return blocks_at(path, self._folder / path)

    def fingerprint(self, path: str) -> str:
        """Size, time of change and inode of the file."""
        info = (self._folder / path).stat()
        return f"{path}:{info.st_size}:{info.st_ctime_ns}:{info.st_ino}"

    def close(self) -> None:
        while self._opened:
            self._opened.popitem()[1].close()


def _hub_id(path: Path) -> HubId:
    """What the Hub cache's layout tells: ``models--org--name/snapshots/<commit>``."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    return HubId(match[1].replace("--", "/"), match[2]) if match else HubId()


def is_left_out(path: str) -> bool:
    """Whether a relative path belongs to a tool, not to the checkpoint."""
    return any(map(_LEFT_OUT.fullmatch, path.split("/")))


def _walk(root: Path, left_out: list[str]) -> list[str]:
    def unreadable(error: OSError) -> None:
        raise CheckpointError(f"Cannot read {error.filename}", f"{error.strerror}.") from error

    paths = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        for name in list(subfolders):
            if _LEFT_OUT.fullmatch(name) or (here / name).is_symlink():
                subfolders.remove(name)
                left_out.append(_relative(here / name, root) + "/")
        for name in names:
            path = _relative(here / name, root)
            if _LEFT_OUT.fullmatch(name) or not _is_regular(here / name):
                left_out.append(path)
            else:
                paths.append(path)
    return paths


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}", f"{error.strerror}.", "Mend or remove the link or file."
        ) from error


def _relative(path: Path, root: Path) -> str:
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"A file name in {root} is not valid UTF-8: {relative!r}", fix="Rename the file."
        ) from None
    return relative
