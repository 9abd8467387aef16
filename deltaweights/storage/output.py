"""An output folder in which a file gets its name only once it is complete.

Files are written inside ``OUT/.deltaweights/`` and renamed into place. That folder is removed at the end,
unless an error leaves notes for the next run. After a killed run it remains, and the next run clears its
partial files. Only ``OUT/.deltaweights/licenses/`` stays for good.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

from ..errors import DiskSpaceError, OutputError
from .destination import Destination, SharedOutput, WritableFile
from .file_names import alike, same_names, spelling
from .local import LocalSource, blocks_at, free_space, is_clutter, output_path
from .source import Source, sha256_of
from .system import UNSUPPORTED, flush, flush_folder, is_same, is_within, lock, read_bytes_at, write_at

#: The folder inside an output folder, for files that are not complete.
WORKSPACE = ".deltaweights"
#: In the workspace: license texts beside the target.
KEPT = "licenses"
_BLOCK_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: Whether folders can be held by handles, so that nobody can put a link in a folder's place meanwhile.
_HAS_HANDLES = {os.open, os.mkdir, os.rename, os.unlink, os.stat} <= os.supports_dir_fd
_MOST_PARTS = 64  # of one write: some systems take no more than a thousand


class DiskFile(WritableFile):
    """A file whose bytes are on a disk of this machine until it is committed.

    Args:
        path: its name in messages.
        fd: its descriptor, closed in the end.
    """

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path)
        self._fd = fd

    def write_at(self, offset: int, *data: bytes | memoryview) -> None:
        """Write the parts ``data``, one after the other, beginning at byte ``offset``."""
        views = deque(memoryview(part) for part in data if len(part))
        with full_disk_explained(self.path):
            while views:
                done = write_at(self._fd, offset, list(islice(views, _MOST_PARTS)))
                offset += done
                while views and done >= len(views[0]):
                    done -= len(views.popleft())
                if done:
                    views[0] = views[0][done:]

    def digest(self) -> tuple[int, str]:
        """The size in bytes and the SHA-256 (hex) of the file."""
        size = os.fstat(self._fd).st_size
        return size, sha256_of(self._blocks(size))

    def _blocks(self, size: int) -> Iterator[bytes]:
        return (read_bytes_at(self._fd, start, _BLOCK_BYTES) for start in range(0, size, _BLOCK_BYTES))

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PartialFile(DiskFile):
    """A file under a temporary name, deleted at the end of its ``with`` block unless committed.

    Args:
        path: its name in messages.
        temporary: where it lies until then.
        final: where it is to lie.
        place: gives it its final name, replacing what stands there; ``os.replace`` if None.
        handle: of the folder of ``temporary``, open as long as the file is; by its path if None.
    """

    def __init__(
        self,
        path: str,
        temporary: Path,
        final: Path,
        place: Callable[[Path, Path], None] | None = None,
        handle: int | None = None,
    ) -> None:
        self._temporary = temporary
        self._final = final
        self._place = place
        self._is_placed = False
        self._handle = handle
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        super().__init__(path, os.open(_name(temporary, handle), flags, 0o666, dir_fd=handle))

    def commit(self) -> None:
        """Flush to the device and give the file its final name, replacing any file there."""
        with full_disk_explained(self.path):
            flush(self._fd)
            self._close()  # some file systems cannot rename open files
            (self._place or os.replace)(self._temporary, self._final)
            self._is_placed = True
            flush_folder(self._final.parent)

    def __exit__(self, *exc: object) -> None:
        self._close()
        if not self._is_placed:
            with suppress(FileNotFoundError):
                os.unlink(_name(self._temporary, self._handle), dir_fd=self._handle)


class OutputFolder(Destination):
    """The folder ``root``, created if missing and locked against a second writer; a context manager.

    Raises:
        OutputError: it cannot be created or written to, or another process is writing to it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = output_path(root)
        self.where = str(self.root)
        self._made: list[Path] = []
        self._workspace = self.root / WORKSPACE
        self._lock: IO[bytes] | None = None
        self._placed: dict[tuple[int, int], Path] | None = None  # by device and inode
        self._placing = threading.Lock()
        self._root_handle: int | None = None
        self._handle: int | None = None  # of the workspace

    def share(self) -> SharedOutput:
        """Let others join: :func:`join_output` with what this returns, until this folder is closed."""
        run = secrets.token_hex(16)
        self._write_note("run", run.encode())
        return SharedOutput(str(self.root.absolute()), run)

    def run_there(self) -> str:
        """Which run has shared the folder; empty if none."""
        try:
            return (self._workspace / "run").read_text(errors="replace")
        except OSError:
            return ""

    def __enter__(self) -> OutputFolder:
        try:
            with full_disk_explained(f"to {self.root}"):
                while not self._locked():
                    pass  # another process just removed the workspace: make it again
                for left_over in self._workspace.glob("*.partial"):
                    _remove(left_over)
                self._check_workspace()
                self._open_handles()
        except BaseException:
            self._close_handles()
            if self._lock:
                self._lock.close()
            self._remove_made()
            raise
        return self

    def _locked(self) -> bool:
        """Make the workspace and take its lock. Returns False if the lock file was replaced meanwhile."""
        if self._workspace.is_symlink():
            raise self._not_ours(self._workspace)
        path = self._workspace / "lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._make(self._workspace)
            self._lock = open(path, "w+b", opener=lambda name, _: os.open(name, flags, 0o666))  # noqa: SIM115
        except FileNotFoundError:
            return False
        try:
            lock(self._lock)
        except BlockingIOError as error:
            raise OutputError(
                f"{self.root} is being written to by another deltaweights process",
                f"It holds {path}.",
                "Wait for it, or choose another folder.",
            ) from error
        except OSError:
            if self._workspace in self._made:
                path.unlink(missing_ok=True)
            raise
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.lstat(path)):
                return True
        except FileNotFoundError:
            pass
        self._lock.close()
        return False

    def _clear_workspace(self) -> None:
        """Remove the workspace's files, the lock last: after that, another process may enter."""
        for path in self._workspace.iterdir():
            if path.name not in ("lock", KEPT):
                path.unlink()
        (self._workspace / "lock").unlink()

    def _open_handles(self) -> None:
        if _HAS_HANDLES:
            self._root_handle = os.open(self.root, _FOLDER)
            self._handle = self._open_folder(Path(WORKSPACE), make=False)

    def _close_handles(self) -> None:
        for handle in (self._root_handle, self._handle):
            if handle is not None:
                os.close(handle)
        self._root_handle = self._handle = None

    def _open_folder(self, path: Path, *, make: bool) -> int | None:
        """A handle of the folder at the relative ``path``, reached without symbolic links. None where this
        system has no handles, and the paths were checked.

        Raises:
            OutputError: a folder on the way is a symbolic link or a file.
        """
        if self._root_handle is None:
            for parent in [*reversed(path.parents), path][1:]:
                folder = self.root / parent
                if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                    raise self._no_folder(parent)
                if make:
                    self._make(folder)
            return None
        handle = os.open(".", _FOLDER, dir_fd=self._root_handle)
        for depth in range(1, len(path.parts) + 1):
            parent = Path(*path.parts[:depth])
            try:
                inner = self._open_in(handle, parent, make=make)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                raise self._no_folder(parent) from error
            finally:
                os.close(handle)
            handle = inner
        return handle

    def _open_in(self, handle: int, path: Path, *, make: bool) -> int:
        """The folder of the name of ``path``, in the folder that ``handle`` is of."""
        try:
            return os.open(path.name, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
        except FileNotFoundError:
            if not make:
                raise
        with suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=handle)
            self._made.append(self.root / path)
            flush_folder(handle)
        return os.open(path.name, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)

    def _no_folder(self, parent: Path) -> OutputError:
        return OutputError(
            f"Cannot write into {parent} in {self.root}",
            f"{self.root / parent} is a symbolic link or a file, not a folder.",
            "Remove it, or choose another output folder.",
        )

    @contextmanager
    def _folder_of(self, path: Path, *, make: bool = False) -> Iterator[int | None]:
        """:meth:`_open_folder` of the folder that holds the relative ``path``, closed in the end."""
        handle = self._open_folder(path.parent, make=make)
        try:
            yield handle
        finally:
            if handle is not None:
                os.close(handle)

    def __exit__(self, *exc: object) -> None:
        self._close_handles()
        if exc[0] is None or not self.claims:
            with suppress(OSError):
                self._clear_workspace()
        if self._lock:
            self._lock.close()
        with suppress(OSError):  # not empty; on NFS and FUSE, not before the lock is closed
            self._workspace.rmdir()
        if exc[0] is not None:
            self._remove_made()

    def _make(self, folder: Path) -> None:
        """Make a folder and its parents. They are removed again if an error leaves them empty."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)
            flush_folder(path.parent)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _check_workspace(self) -> None:
        """Refuse links in the workspace, which may have come with a download."""
        kept = self._workspace / KEPT
        entries = [self._workspace, *self._workspace.iterdir()]
        odd = [
            entry
            for entry in entries
            if (entry.is_symlink() and entry.suffix != ".partial")  # partial files are removed, not opened
            or not (entry.is_file() or entry.is_symlink() or entry in (self._workspace, kept))
        ]
        if odd:
            raise self._not_ours(odd[0])

    def _not_ours(self, path: Path) -> OutputError:
        return OutputError(
            f"Cannot write to {self.root}",
            f"{path} was not made by deltaweights.",
            f"Remove {self._workspace}, or choose another folder.",
        )

    @property
    def claims(self) -> set[str]:
        """The paths that :meth:`claim` noted, in this run and in interrupted ones before it."""
        try:
            text = (self._workspace / "claims").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return set()
        return set(filter(_stays_inside, text.split("\n")))

    def claim(self, paths: Iterable[str]) -> None:
        """Note that the files belong to this program, which may replace or remove them."""
        with (
            full_disk_explained(f"to {self.root}"),
            open(self._workspace / "claims", "a", encoding="utf-8") as file,
        ):
            file.writelines(f"{path}\n" for path in paths)

    def remove_claims(self, keep: Collection[str]) -> None:
        """Delete the claimed files of earlier runs that are not in ``keep``."""
        for path in self.claims - set(keep):
            if self.is_regular(path):
                self.remove(path)
                with suppress(OSError):  # a folder that is not empty stays
                    for parent in list(Path(path).parents)[:-1]:
                        (self.root / parent).rmdir()

    def remember(self, name: str, data: bytes) -> None:
        """Keep ``data`` for the next run, in case this one is interrupted."""
        self._write_note(f"{name}.memory", data)

    def _write_note(self, name: str, data: bytes) -> None:
        temporary = self._workspace / self._temporary_name(name)
        try:
            with full_disk_explained(f"to {self.root}"):
                temporary.write_bytes(data)
                temporary.replace(self._workspace / name)
        finally:
            temporary.unlink(missing_ok=True)

    def recall(self, name: str) -> bytes:
        """The data that an interrupted run kept under ``name``; empty if none."""
        try:
            return (self._workspace / f"{name}.memory").read_bytes()
        except FileNotFoundError:
            return b""

    def create(self, path: str, *, size: int | None = None, sha256: str | None = None) -> PartialFile:
        """A new file that :meth:`PartialFile.commit` will place at the relative ``path``.

        Raises:
            OutputError: a folder of the path is a symbolic link or a file.
        """
        final = self.root / path
        with full_disk_explained(path):
            with self._folder_of(Path(path), make=True):
                pass
            if final.is_dir() and not final.is_symlink():
                raise OutputError(f"Cannot write {final}", "A folder has that name.", "Remove it.")
            return PartialFile(
                path, self._workspace / self._temporary_name(path), final, self._place, self._handle
            )

    def _temporary_name(self, path: str) -> str:
        return hashlib.sha256(path.encode()).hexdigest()[:32] + ".partial"

    def _place(self, temporary: Path, final: Path) -> None:
        """Rename, but never over a file that was placed under another name since :meth:`require_distinct`."""
        with self._folder_of(final.relative_to(self.root)) as handle, self._placing:
            if self._placed is not None and os.path.lexists(final):
                other = self._placed.get(_identity(final))
                if other and other != final and is_same(other, final):
                    names = [path.relative_to(self.root).as_posix() for path in (final, other)]
                    raise _one_name(self.root, *names)
            name = _name(final, handle)
            os.replace(_name(temporary, handle), name, src_dir_fd=self._handle, dst_dir_fd=handle)
            if self._placed is not None:
                info = os.stat(name, dir_fd=handle, follow_symlinks=False)
                self._placed[info.st_dev, info.st_ino] = final

    def exists(self, path: str) -> bool:
        """Whether anything has that path, if only a link."""
        return os.path.lexists(self.root / path)

    def source(self) -> Source:
        """The files that are there, to be read."""
        return LocalSource(self.root)

    def remove(self, path: str) -> None:
        """Remove the file at ``path``."""
        with self._folder_of(Path(path)) as handle:
            os.unlink(_name(self.root / path, handle), dir_fd=handle)

    def is_regular(self, path: str) -> bool:
        """Whether ``path`` is a real file, reached without symbolic links."""
        full = self.root / path
        links = any((self.root / p).is_symlink() for p in [Path(path), *Path(path).parents][:-1])
        return not links and full.is_file()

    def size(self, path: str) -> int:
        """The size of the file at ``path``, in bytes."""
        return (self.root / path).stat().st_size

    def blocks(self, path: str) -> Iterator[bytes]:
        """The bytes of the file at ``path``, in blocks."""
        return blocks_at(path, self.root / path)

    def foreign(self, expected: Collection[str]) -> list[str]:
        """The files that stand in the folder though ``expected`` does not name them, sorted; but not what an
        operating system left there."""
        return sorted(path for path in _all_files(self.root) if path not in expected and not is_clutter(path))

    def is_inside(self, source: Source) -> bool:
        """Whether it is the folder of ``source``, or in it."""
        return source.root is not None and source.root.is_dir() and is_within(self.root, source.root)

    def holds(self, source: Source) -> bool:
        """Whether ``source`` is a single file, directly in this folder."""
        return (
            source.root is not None
            and source.root.is_file()
            and is_same(self.root, source.root.resolve().parent)
        )

    def require_apart(self, paths: Iterable[str], sources: Iterable[Source]) -> None:
        """Raise :class:`OutputError` if writing ``paths`` would replace a file of ``sources``."""
        inputs: dict[tuple[int, int, str] | None, list[tuple[Path, Source]]] = {}
        for source in sources:
            for path in source.sizes:
                if full := source.full_path(path):
                    inputs.setdefault(_spot(full), []).append((full, source))
        for path in paths:
            full = (self.root / path).resolve()
            for other, source in inputs.get(_spot(full), ()):
                if full == other or is_same(full, other):
                    raise OutputError(
                        f"{self.root / path} cannot be written",
                        f"It is a file of {source.where}, which the output is made from.",
                        "Choose another folder.",
                    )

    def require_distinct(self, paths: Iterable[str]) -> None:
        """Check that the paths are different files on this file system: many ignore case, or the encoding of
        accents.

        Raises:
            OutputError: two paths are the same file, or a path is an existing file with a different name.
        """
        spelled = {path: spelling(path) for path in paths}
        self._placed = {}
        for parent, names in alike(spelled):
            if found := self._same_names(names):
                raise _one_name(self.root, *(f"{parent}{name}" for name in reversed(found)))
        by_spelling = {spelled: path for path, spelled in spelled.items()}
        for path in self.foreign(spelled):
            other = by_spelling.get(spelling(path))
            if other and is_same(self.root / path, self.root / other):
                raise OutputError(
                    f"{_shown(other)} cannot be written to {self.root}",
                    f"The folder holds {_shown(path)}, which is the same file on its file system.",
                    "Remove it, or choose another folder.",
                )

    def _same_names(self, names: Iterable[str]) -> tuple[str, str] | None:
        folder = self._workspace / "names.partial"
        with full_disk_explained(f"to {self.root}"):
            folder.mkdir()
            try:
                return same_names(folder, names)
            finally:
                shutil.rmtree(folder)

    def free_bytes(self) -> int:
        """How many bytes are free."""
        return free_space(self.root)

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        """The sizes of those of the files that are there now."""
        return {path: self.size(path) for path in paths if (self.root / path).is_file()}


def _name(path: Path, handle: int | None) -> str | Path:
    """What to call a file: its name, where its folder's handle is given too."""
    return path if handle is None else path.name


def _stays_inside(path: str) -> bool:
    return not any(part in ("", ".", "..") or "\0" in part or len(part) > 255 for part in path.split("/"))


def _all_files(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        if Path(folder) == root and WORKSPACE in subfolders:
            subfolders.remove(WORKSPACE)
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            yield os.path.relpath(os.path.join(folder, name), root)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _one_name(root: Path, path: str, other: str) -> OutputError:
    return OutputError(
        f"{_shown(path)} cannot be written to {root}",
        f"Its file system does not distinguish it from {_shown(other)}.",
        "Choose a folder on another file system.",
    )


def _shown(path: str) -> str:
    """The path in a form in which paths that look alike look different."""
    return path if path.isascii() else ascii(path)


def _identity(path: Path) -> tuple[int, int]:
    info = path.lstat()
    return info.st_dev, info.st_ino


def _spot(path: Path) -> tuple[int, int, str] | None:
    """Equal for two paths that may be the same file, except by links; None if there is no such folder."""
    try:
        return *_identity(path.parent), spelling(path.name)
    except OSError:
        return None


@contextmanager
def full_disk_explained(path: str) -> Iterator[None]:
    """Explain errors of the disk within the block, which writes ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            fix = "Choose a folder on another file system." if error.errno in UNSUPPORTED else ""
            raise OutputError(f"Cannot write {path}", f"{error.strerror}.", fix) from error
        raise DiskSpaceError(
            f"The disk filled up while writing {path}",
            f"{error.strerror}.",
            "Free some space and run the same command again: finished files are kept.",
        ) from error
