"""The differences between operating systems and file systems: locks, flushing, reads and writes."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import DeltaWeightsError
from .traffic import count

try:
    import fcntl
except ModuleNotFoundError:
    raise DeltaWeightsError(
        "deltaweights does not run on this system",
        "It needs a POSIX system, such as Linux or macOS: Python has no module fcntl here.",
        "On Windows, use it in WSL, the Windows Subsystem for Linux: wsl --install",
    ) from None

#: The errors of a file system that does not support an operation.
UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_NO_FLUSH = UNSUPPORTED | {errno.EINVAL, errno.ENOTTY, errno.EBADF}
_MOST_BYTES = 1 << 30  # per read or write: macOS refuses 2 GiB


def lock(file: IO[bytes], *, shared: bool = False) -> None:
    """Lock a file against other processes until it is closed. Does nothing on a file system without locks.

    Args:
        shared: others may lock it so, too.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def flush(fd: int) -> None:
    """Wait until the file's data is on the device. On macOS, fsync leaves it in the drive's cache, which a
    power cut empties."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError as error:
            if error.errno not in _NO_FLUSH:  # usual on network file systems
                raise
    os.fsync(fd)


def flush_folder(folder: Path | int) -> None:
    """:func:`flush` for the names in a folder (its path or a handle), where the file system can do that."""
    fd = os.open(folder, os.O_RDONLY) if isinstance(folder, Path) else os.dup(folder)
    try:
        flush(fd)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(fd)


def read_at(fd: int, offset: int, out: memoryview) -> int:
    """Read into ``out``, beginning at byte ``offset``. Returns the number of bytes, which may be smaller than
    ``out``; 0 at the end of the file."""
    out = out[:_MOST_BYTES]
    if hasattr(os, "preadv"):
        done = os.preadv(fd, [out], offset)
    else:
        data = os.pread(fd, len(out), offset)
        out[: len(data)] = data
        done = len(data)
    count(read=done)
    return done


def read_bytes_at(fd: int, offset: int, nbytes: int) -> bytes:
    """The ``nbytes`` bytes beginning at byte ``offset``, or fewer at the end of the file."""
    parts = []
    while nbytes and (part := os.pread(fd, min(nbytes, _MOST_BYTES), offset)):
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
        count(read=len(part))
    return b"".join(parts)  # no copy if there is only one


def write_at(fd: int, offset: int, parts: Sequence[memoryview]) -> int:
    """Write the parts, one after the other, beginning at byte ``offset``. Returns the number of bytes
    written, at least one."""
    if hasattr(os, "pwritev") and sum(map(len, parts)) <= _MOST_BYTES:
        done = os.pwritev(fd, parts, offset)
    else:
        done = os.pwrite(fd, parts[0][:_MOST_BYTES], offset)
    count(written=done)
    return done


def is_same(path: Path, other: Path) -> bool:
    """Whether both paths exist and are the same file or folder, however they are spelled."""
    with suppress(OSError):
        return path.samefile(other)
    return False


def is_within(path: Path, folder: Path) -> bool:
    """Whether ``path``, which need not exist, is the folder or inside it, however the two are spelled."""
    path = path.resolve()
    return any(is_same(place, folder) for place in (path, *path.parents))


def pages(nbytes: int) -> mmap.mmap:
    """Memory that goes back to the system when the last reference to it is gone. (What is freed in a heap may
    stay with the process.)"""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def give_pages_back(memory: mmap.mmap, start: int, end: int) -> None:
    """Give some of the pages back now, where the system takes them. Nobody may read them any more.

    Args:
        memory: what :func:`pages` returned.
        start, end: a range of bytes; multiples of ``mmap.PAGESIZE``.
    """
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)
