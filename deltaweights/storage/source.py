"""Where a checkpoint's (or a delta's) files come from: a set of relative paths, read by position.

:class:`LocalSource` reads a folder or a single file; hub.py has the :class:`Source` for the Hub.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .system import read_at, read_bytes_at

_BLOCK_BYTES = 1 << 20

#: The first bytes of a safetensors file, read at once: more than nearly any header takes.
HEAD_BYTES = 1 << 16

#: Folders and files that belong to tools, not to the checkpoint.
_LEFT_OUT = re.compile(r"\.git|\.cache|\.deltaweights|.*\.(incomplete|crdownload|part|aria2)")


class ReadableFile(Protocol):
    """A file that several threads may read at once, each at its own position."""

    path: str
    size: int

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8, any length) from byte ``offset`` on."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes from byte ``offset`` on."""
        # Checked first, so that a hostile number cannot make us allocate more than the file holds.
        if offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} ends too early",
                f"It has {self.size} bytes; {offset + nbytes} are needed.",
                "Get the file again.",
            )
        return self._read(offset, nbytes)

    def _read(self, offset: int, nbytes: int) -> bytes:
        out = np.empty(nbytes, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()


class Span(NamedTuple):
    """The bytes of the file at ``path`` from ``start`` to ``end``."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of the Hub and a commit of it, where they are known."""

    repo_id: str | None = None
    revision: str | None = None


class Source(Protocol):
    """A set of files. ``where`` names it in messages; ``root`` is the file or folder that it is, None for one
    far away; ``sizes`` maps each relative POSIX path to its size in bytes; ``left_out`` lists what stands
    there but does not count."""

    where: str
    root: Path | None
    hub_id: HubId
    sizes: Mapping[str, int]
    left_out: tuple[str, ...]

    def open(self, path: str) -> ReadableFile: ...

    def fingerprint(self, path: str) -> str:
        """A cheap text that is another one whenever the file was changed."""

    def name(self, path: str) -> str:
        """The file's name for messages."""

    def full_path(self, path: str) -> Path | None:
        """Where the file lies on this machine, if it does."""

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in blocks, without keeping it open: there may be thousands."""

    def published_sha256(self, path: str) -> str | None:
        """The file's SHA-256 (hex), where it is published beside the file and known without reading it; None
        elsewhere, and for a file that is not there."""

    def expect(self, spans: Iterable[Span]) -> AbstractContextManager[None]:
        """Within the block, ``spans`` will be read, each byte of them once, in about this order: what is far
        away is fetched ahead of its readers. Only a matter of speed: anything may be read at any time."""

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """What has to come over a network for these spans: neighbours and small gaps in one."""

    def keep(self, paths: Iterable[str]) -> Iterator[int]:
        """Bring files to this machine, to be read from there. Yields each one's size when it is here."""

    def cancel(self) -> None:
        """From any thread: end all reads that wait for a network, and those to come, with
        :class:`concurrent.futures.CancelledError`."""

    def close(self) -> None: ...


def origins(source: Source) -> list[Source]:
    """The sources that the bytes of ``source`` come from: itself, unless it is made of others and says so in
    an attribute of this name."""
    made_of: list[Source] = getattr(source, "origins", [source])
    return made_of


class LocalFile(ReadableFile):
    """A :class:`ReadableFile` on disk. Uses pread, so memory holds only what was asked for."""

    def __init__(self, path: str, full_path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(full_path, os.O_RDONLY | os.O_CLOEXEC)
            self.close = weakref.finalize(self, os.close, self._fd)  # with the last reference, at the latest
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(f"Cannot open {full_path}", f"{error.strerror}.") from error

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
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


def file_blocks(file: ReadableFile) -> Iterator[bytes]:
    """A file's bytes in order, in blocks of at most 1 MiB."""
    for start in range(0, file.size, _BLOCK_BYTES):
        yield file.read(start, min(_BLOCK_BYTES, file.size - start))


def blocks_at(path: str, full_path: Path) -> Iterator[bytes]:
    """:func:`file_blocks` of a local file, which is closed in the end."""
    with closing(LocalFile(path, full_path)) as file:
        yield from file_blocks(file)


def sha256_of(blocks: Iterable[bytes]) -> str:
    """The SHA-256 of the blocks' concatenation, in hex."""
    sha256 = hashlib.sha256()
    for block in blocks:
        sha256.update(block)
    return sha256.hexdigest()


class LocalSource:
    """A folder with everything in it, or one file. Symbolic links to files are followed (a Hub cache
    consists of them); linked folders and special files are left out.

    Raises:
        CheckpointError: there is nothing at ``root``, or a file's name is not valid UTF-8.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root: Path | None = local_path(root)
        self.where = str(root)
        self.hub_id = _hub_id(self.root)
        sizes: dict[str, int] = {}
        self._opened: dict[str, LocalFile] = {}
        left_out: list[str] = []
        if self.root.is_file():
            self._folder = self.root.parent
            sizes[self.root.name] = self.root.stat().st_size
        elif self.root.is_dir():
            self._folder = self.root
            for path in sorted(_walk(self.root, left_out)):
                sizes[path] = (self.root / path).stat().st_size
        else:
            raise CheckpointError(
                f"There is no file or folder {self.where}", "Nothing has that name.", "Check the path."
            )
        self.sizes: Mapping[str, int] = sizes
        self.left_out = tuple(sorted(left_out))

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

    def published_sha256(self, path: str) -> str | None:
        """None: nobody vouches for a file on disk."""
        return None

    def expect(self, spans: Iterable[Span]) -> AbstractContextManager[None]:
        """Does nothing: a disk needs no notice."""
        return nullcontext()

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """None."""
        return []

    def keep(self, paths: Iterable[str]) -> Iterator[int]:
        """Does nothing: all is here."""
        return iter(())

    def cancel(self) -> None:
        """Does nothing: no read of a file waits for long."""

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


def cached_sha256(path: Path | None) -> str | None:
    """The SHA-256 that a large file in the Hub cache is stored under, as the Hub published it at the time of
    the download; None elsewhere. It says what the file was to be: its bytes may have changed since."""
    match = re.search(r"/models--[^/]+/blobs/([0-9a-f]{64})$", path.as_posix()) if path else None
    return match[1] if match else None


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
