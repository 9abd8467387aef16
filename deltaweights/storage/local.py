"""A folder or a single file on this machine as a :class:`Source`."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, OutputError
from .source import HubId, ReadableFile, Source, file_blocks
from .system import read_at, read_bytes_at

_TOO_MANY = (errno.EMFILE, errno.ENFILE)

#: Folders and files that belong to tools, not to the checkpoint.
_LEFT_OUT = re.compile(r"\.git|\.cache|\.deltaweights|.*\.(incomplete|crdownload|part|aria2)")

#: Files that an operating system or a notebook puts beside others: ``._X`` is what macOS writes for every X
#: on a disk that is not its own.
_CLUTTER = re.compile(
    r"\._.*|\.DS_Store|__MACOSX|\.(Spotlight-V100|Trashes|fseventsd|ipynb_checkpoints)"
    r"|(eh)?thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)

#: Schemes of URLs that people pass where a folder is meant.
_SCHEMES = re.compile(
    "s3a?|gc?s|hf|az|abfss?|adl|wasbs?|hdfs|https?|s?ftp|ssh|file|r2|oss|dbfs", re.IGNORECASE
)

#: A storage bucket of the Hub.
_BUCKET = re.compile(r"hf://buckets/[^/]+/[^/]")

_HUB_PAGE = re.compile(
    r"https?:/+(?:huggingface\.co|hf\.co)/(?:models/)?([^/]+/[^/?#]+)(?:/(?:tree|resolve|blob)/([^/?#]+))?"
)


class _OpenFiles:
    """The descriptors of files that stay readable: a process has only so many, and a chain of deltas may read
    thousands of files. The file that was not read for the longest time is closed first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[LocalFile, int] = OrderedDict()
        self._limit = 0

    def take(self, file: LocalFile) -> int:
        """The descriptor of ``file`` for one read, after which :meth:`give` takes it back."""
        with self._lock:
            fd = self._idle.pop(file, None)
        return file.open_again() if fd is None else fd

    def give(self, file: LocalFile, fd: int) -> None:
        """Take back a descriptor. Threads that read one file at once have one each; one of them is kept."""
        with self._lock:
            surplus = [fd] if file.is_closed or file in self._idle else []
            if not surplus:
                self._idle[file] = fd
                self._limit = self._limit or _most_open_files()
                while len(self._idle) > self._limit:
                    surplus.append(self._idle.popitem(last=False)[1])
        for one in surplus:
            os.close(one)

    def forget(self, file: LocalFile) -> None:
        """Close ``file``, unless it is being read."""
        with self._lock:
            fd = self._idle.pop(file, None)
        if fd is not None:
            os.close(fd)


def _most_open_files() -> int:
    """A quarter of what the process may open: threads, outputs and libraries need theirs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else max(16, min(1024, soft // 4))


_open_files = _OpenFiles()


#: A pipe without a writer opens at once, and is refused then.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


class LocalFile(ReadableFile):
    """A :class:`ReadableFile` on disk. It uses pread, so memory holds only the requested bytes.

    Args:
        pooled: close it while nobody reads it, if need be, so that any number of files can be read. If its
            name is removed, or given to a different file, reading it may be an error.
    """

    def __init__(self, path: str, full_path: Path, *, pooled: bool = False) -> None:
        self._full_path = full_path
        self._identity: tuple[int, int] | None = None
        self.is_closed = False
        fd = self.open_again()
        super().__init__(path, os.fstat(fd).st_size)
        self._held = None if pooled else fd
        if pooled:
            _open_files.give(self, fd)
        else:
            self._close = weakref.finalize(self, os.close, fd)  # closes with the last reference

    def close(self) -> None:
        """Close it; again does nothing."""
        self.is_closed = True
        if self._held is None:
            _open_files.forget(self)
        else:
            self._close()

    def open_again(self) -> int:
        """A descriptor of the file.

        Raises:
            CheckpointError: it cannot be opened, a different file has its name now, or it is a device or a
                pipe, which may never end.
        """
        try:
            fd = os.open(self._full_path, os.O_RDONLY | os.O_CLOEXEC | _AT_ONCE)
            info = os.fstat(fd)
        except OSError as error:
            fix = "Allow the process more open files: ulimit -n" if error.errno in _TOO_MANY else ""
            raise CheckpointError(f"Cannot open {self._full_path}", f"{error.strerror}.", fix) from error
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise CheckpointError(f"Cannot open {self._full_path}", "It is not a regular file.")
        if self._identity not in (None, (info.st_dev, info.st_ino)):
            os.close(fd)
            raise CheckpointError(
                f"{self._full_path} was replaced while it was read", "", "Run the same command again."
            )
        self._identity = info.st_dev, info.st_ino
        return fd

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """A descriptor to read from within the block. Errors of the system become ours."""
        fd = _open_files.take(self) if self._held is None else self._held
        try:
            yield fd
        except OSError as error:
            raise CheckpointError(f"Cannot read {self.path}", f"{error.strerror}.") from error
        finally:
            if self._held is None:
                _open_files.give(self, fd)

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        view = out.data
        with self._reading() as fd:
            while view:
                done = read_at(fd, offset, view)
                if not done:
                    raise CheckpointError(
                        f"{self.path} ends too early",
                        f"It has fewer than {offset + len(view)} bytes: it was cut or changed.",
                        "Get the file again.",
                    )
                view, offset = view[done:], offset + done

    def _read(self, offset: int, nbytes: int) -> bytes:
        """:meth:`read` without the copy that an array would need."""
        with self._reading() as fd:
            data = read_bytes_at(fd, offset, nbytes)
        return data if len(data) == nbytes else super()._read(offset, nbytes)


def url_scheme(location: str | os.PathLike[str]) -> str | None:
    """The scheme of a location that is a URL: ``s3`` of ``s3://bucket/x``, also where that was made a path,
    in which one of the slashes is lost."""
    text = os.fspath(location)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)", text)
    return match[1].lower() if match and (match[2] or _SCHEMES.fullmatch(match[1])) else None


def store_url(location: str | os.PathLike[str]) -> str | None:
    """The location, if it is the URL of a store, a storage bucket of the Hub, or a web server: not of a path,
    a repository or a page of the Hub. A :class:`Path` is none: it has lost a slash."""
    text = os.fspath(location)
    if _BUCKET.match(text):
        return text
    is_ours = url_scheme(text) in (None, "hf", "file", "local") or _HUB_PAGE.match(text)
    return None if is_ours or "://" not in text else text


def output_path(location: str | os.PathLike[str]) -> Path:
    """:func:`local_path` for a folder or file that is to be written.

    Raises:
        OutputError: it is a URL, or empty.
    """
    if not os.fspath(location):
        raise OutputError("The output's path is empty", "", "Name a folder, such as the present one: .")
    if scheme := url_scheme(location):
        raise OutputError(
            f"{os.fspath(location)} is a URL, not a folder",
            "Deltas, results and checkpoints are written to folders of this machine.",
            "Write it as a path."
            if scheme == "file"
            else "Choose a folder. To publish a delta on the Hub, `push` it; elsewhere, copy the folder.",
        )
    return local_path(location)


def local_path(location: str | os.PathLike[str]) -> Path:
    """The location as a path, ``~`` resolved.

    Raises:
        CheckpointError: no path can look like this, it is a URL, or empty.
    """
    if url_scheme(location):
        raise CheckpointError(
            f"{os.fspath(location)[:200]!r} is a URL, not a file or folder", *_advice(os.fspath(location))
        )
    if not os.fspath(location):
        raise CheckpointError("A path is empty", "", "Name a folder; a variable in the command may be unset.")
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


def _advice(url: str) -> tuple[str, str]:
    """Why a URL cannot be read, and what to write instead."""
    if page := _HUB_PAGE.match(url):
        return (
            "What is on the Hub has a shorter name.",
            f"Write it as {page[1]}{f'@{page[2]}' if page[2] else ''}",
        )
    if url.startswith("hf:"):
        return "", f"Write it as hf://{url[3:].lstrip('/')}, in quotes: it is no path."
    if url.startswith("file:"):
        return "", "Write it as a path."
    return "One of its slashes is lost, as in a Path.", "Pass it as a string, or copy it to this machine."


def free_space(path: Path) -> int:
    """Free bytes on the disk of ``path``, which may not exist yet."""
    here = path.absolute()
    return shutil.disk_usage(next(place for place in (here, *here.parents) if place.exists())).free


def blocks_at(path: str, full_path: Path) -> Iterator[bytes]:
    """:func:`file_blocks` of a local file, which is closed at the end."""
    with closing(LocalFile(path, full_path)) as file:
        yield from file_blocks(file)


class LocalSource(Source):
    """A folder with all its files, or one file. Symbolic links to files are followed (a Hub cache consists of
    them); linked folders and special files are left out.

    Raises:
        CheckpointError: ``root`` does not exist, or a file's name is not valid UTF-8.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        place = _in_hub_cache(local_path(root))
        left_out: list[str] = []
        unreadable: dict[str, CheckpointError] = {}
        if place.is_file():
            self._folder, paths = place.parent, [place.name]
        elif place.is_dir():
            self._folder, paths = place, sorted(_walk(place, left_out, unreadable))
        else:
            raise CheckpointError(
                f"There is no file or folder {root}", "Nothing has that name.", "Check the path."
            )
        self._opened: dict[str, LocalFile] = {}
        found = {path: (self._folder / path).stat() for path in paths}
        self._times = {path: info.st_mtime_ns for path, info in found.items()}
        super().__init__(
            str(root) if place == local_path(root) else str(place),
            {path: info.st_size for path, info in found.items()},
            root=place,
            hub_id=_hub_id(place),
            left_out=tuple(sorted(left_out)),
            unreadable=unreadable,
        )

    def open(self, path: str) -> LocalFile:
        """The file at ``path``; kept open until :meth:`close`."""
        if path not in self._opened:
            self._opened[path] = LocalFile(path, self._folder / path, pooled=True)
        return self._opened[path]

    def name(self, path: str) -> str:
        """The file's path as the user would write it."""
        return str(self._folder / path)

    def full_path(self, path: str) -> Path:
        """The file's real path, with links resolved."""
        return (self._folder / path).resolve()

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB; it is closed at the end."""
        return blocks_at(path, self._folder / path)

    def fingerprint(self, path: str) -> str:
        """Size, change time and inode of the file."""
        info = (self._folder / path).stat()
        return f"{path}:{info.st_size}:{info.st_ctime_ns}:{info.st_ino}"

    @property
    def location(self) -> str:
        """Its absolute path."""
        assert self.root is not None
        return str(self.root.absolute())

    def pin(self, path: str) -> str:
        """Size and time of the last change, when it was opened here: other machines may see other inodes in a
        shared folder."""
        return f"{path}:{self.sizes[path]}:{self._times[path]}"

    def close(self) -> None:
        while self._opened:
            self._opened.popitem()[1].close()


def _hub_id(path: Path) -> HubId:
    """The repository and commit in a path of the Hub cache: ``models--org--name/snapshots/<commit>``."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    return HubId(match[1].replace("--", "/"), match[2]) if match else HubId()


def _in_hub_cache(place: Path) -> Path:
    """The snapshot, where ``place`` is a repository's folder in the Hub cache, or all its snapshots.

    Raises:
        CheckpointError: there are several snapshots, or several repositories.
    """
    root = place.parent if place.name == "snapshots" else place
    if re.fullmatch(r"models--[^/]+", root.absolute().name) and (root / "snapshots").is_dir():
        snapshots = sorted(path for path in (root / "snapshots").iterdir() if path.is_dir())
        main = root / "refs" / "main"
        named = [path for path in snapshots if main.is_file() and path.name == main.read_text().strip()]
        if len(found := named or snapshots) == 1:
            return found[0]
        what, choices = "is a repository in the Hub cache", snapshots
    else:
        choices = sorted(place.glob("models--*/snapshots")) if place.is_dir() else []
        what = "is a Hub cache"
    if not choices:
        return place
    raise CheckpointError(
        f"{place} {what}, not a checkpoint",
        f"It holds {len(choices)} of them.",
        f"Pass one: {', '.join(map(str, choices[:5]))}{', …' if choices[5:] else ''}",
    )


def is_clutter(path: str) -> bool:
    """Whether a relative path is one that systems leave in folders, and no part of a model."""
    return any(map(_CLUTTER.fullmatch, path.split("/")))


def is_left_out(path: str) -> bool:
    """Whether a relative path belongs to a tool, not to the checkpoint."""
    return any(map(_LEFT_OUT.fullmatch, path.split("/")))


def _walk(root: Path, left_out: list[str], unreadable: dict[str, CheckpointError]) -> list[str]:
    def refuse(error: OSError) -> None:
        raise CheckpointError(f"Cannot read {error.filename}", f"{error.strerror}.") from error

    paths: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        for name in list(subfolders):
            if _LEFT_OUT.fullmatch(name) or (here / name).is_symlink():
                subfolders.remove(name)
                left_out.append(_relative(here / name, root) + "/")
        for name in names:
            path = _relative(here / name, root)
            try:
                is_part = not _LEFT_OUT.fullmatch(name) and _is_regular(here / name)
            except CheckpointError as error:
                unreadable[path] = error
            else:
                (paths if is_part else left_out).append(path)
    return paths


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}", f"{error.strerror}.", "Repair or remove the link or file."
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
