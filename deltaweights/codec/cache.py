"""Caches the kernels that this machine compiled, on disk.

The cache is in `NUMBA_CACHE_DIR` if that is set, else in the user's cache folder, in a folder named after
everything that its content depends on. A user with write access to it could run code as this user. So a file
is read or written only if the file and all folders and links in its path belong to this user or root, and no
other user can write to them. Otherwise, every process compiles its kernels.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from .library import digest_of_sources

NUMBA_SETTINGS = ("NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO")  # the settings that change Numba's code
_DIGEST = 32  # bytes of the SHA-256 at the start of a file
_MOST = 64 << 20  # bytes of a file: many times the size of a kernel
_LINKS = 40  # at most in the path of the cache: as many as systems follow


def kept(file: str, make: Callable[[], bytes]) -> bytes:
    """Return the result of `make`, from disk if possible. The result may depend only on the processor, the
    compiler and this package's sources."""
    place, file = _place(), sha256(file.encode()).hexdigest()[:32]  # some file systems need short names
    if place is None:
        return make()
    with suppress(OSError):
        stored = _read(place, file)
        if sha256(stored[_DIGEST:]).digest() == stored[:_DIGEST]:
            return stored[_DIGEST:]
    content = make()
    with suppress(OSError):
        _write(place, file, sha256(content).digest() + content)
    return content


def _place() -> Path | None:
    """The folder of this processor's kernels; None if there is no place for one.

    Its path is absolute, since a relative path might lead into a user's model folder.
    """
    named, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # a user without a home, as in many containers
        if named:
            root = Path(named)
        else:
            root = (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "deltaweights"
        return root / _folder() if root.is_absolute() else None
    return None


@cache
def _folder() -> str:
    import llvmlite.binding as llvm

    settings = [os.environ.get(name) for name in NUMBA_SETTINGS] + [sys.implementation.cache_tag]
    machine = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    compiler = [_version_of(name) for name in ("numba", "llvmlite")]
    parts = repr([settings, machine, compiler, digest_of_sources()])
    return f"kernels-{sha256(parts.encode()).hexdigest()[:32]}"


def _version_of(package: str) -> bytes:
    """The file with a package's version. (`importlib.metadata` takes longer than everything else here.)"""
    found = find_spec(package)
    if found is None or found.origin is None:
        return b""
    return Path(found.origin).with_name("_version.py").read_bytes()


def _read(place: Path, file: str) -> bytes:
    folder = _checked(place)
    with open(os.open(folder / file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        _check(os.fstat(stream.fileno()), file, stat.S_ISREG)
        return stream.read(_MOST)


def _write(place: Path, file: str, content: bytes) -> None:
    """Write a file atomically, so that no other process reads a part of it."""
    for folder in (*reversed(place.parents), place):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    folder = _checked(place)
    partial = folder / f"{file}.{os.getpid()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o600), "wb") as stream:
            stream.write(content)
        partial.replace(folder / file)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _checked(place: Path) -> Path:
    """Resolve the links in a folder's path, and require that no other user can change any part of it.

    The check goes from the root down, so that each part is in a folder in which others cannot replace it.
    """
    found, ahead, links = Path(place.anchor), list(place.parts[1:]), 0
    _check(found.lstat(), str(found), stat.S_ISDIR)
    while ahead:
        path = found / ahead.pop(0)
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            _check(status, str(path), stat.S_ISDIR)
            found = path
            continue
        links += 1
        if status.st_uid not in (0, os.geteuid()) or links > _LINKS:
            raise PermissionError(f"{path} is a link that is not followed")
        target = Path(os.path.normpath(found / os.readlink(path)))  # the folders above are links no longer
        found, ahead = Path(target.anchor), [*target.parts[1:], *ahead]
    return found


def _check(found: os.stat_result, name: str, is_kind: Callable[[int], bool]) -> None:
    """Raise PermissionError if another user can change the file or folder.

    In root's folders with the sticky bit, such as /tmp, users cannot replace each other's files.
    """
    mode = found.st_mode
    is_shared = bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
    is_safe_to_share = stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX) and found.st_uid == 0
    if not is_kind(mode) or found.st_uid not in (0, os.geteuid()) or (is_shared and not is_safe_to_share):
        raise PermissionError(f"{name} can be changed by others")
