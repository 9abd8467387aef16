"""The on-disk cache of kernels that this machine compiled.

It is in `NUMBA_CACHE_DIR` if that is set, else in the user's cache folder, in a folder named by all that its
content depends on. Whoever can write there can run code as this user. So a file is read or written only where
it and all folders on the way belong to the user or to root and nobody else can write to them; where that is
not so, kernels are compiled in every process.
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

_SETTINGS = ("NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO")  # Numba's, that change its code
_DIGEST = 32  # bytes of the SHA-256 that a file begins with
_MOST = 64 << 20  # bytes of a file: many times what a kernel takes


def kept(file: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, from disk if it is there; it may depend on nothing but the processor, the compiler
    and this package's sources."""
    place = _place()
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
    """The folder of this processor's kernels; None where there is no place for one."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named).absolute() / _folder()
    with suppress(RuntimeError):  # a user without a home, as in many a container
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home).absolute() / "deltaweights" / _folder()
    return None


@cache
def _folder() -> str:
    import llvmlite.binding as llvm

    settings = [os.environ.get(name) for name in _SETTINGS] + [sys.implementation.cache_tag]
    machine = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    compiler = [_version_of(name) for name in ("numba", "llvmlite")]
    parts = repr([settings, machine, compiler, digest_of_sources()])
    return f"kernels-{sha256(parts.encode()).hexdigest()[:32]}"


def _version_of(package: str) -> bytes:
    """The file with a package's version. (`importlib.metadata` takes longer than all else here.)"""
    found = find_spec(package)
    if found is None or found.origin is None:
        return b""
    return Path(found.origin).with_name("_version.py").read_bytes()


def _read(place: Path, file: str) -> bytes:
    folder = _open_folder(place)
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as stream:
            _check(os.fstat(stream.fileno()), file, stat.S_ISREG)
            return stream.read(_MOST)
    finally:
        os.close(folder)


def _write(place: Path, file: str, content: bytes) -> None:
    """Write a file under its name at once, so that no other process reads a part of it."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = _open_folder(place)
    partial = f"{file}.{os.getpid()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with open(os.open(partial, flags, 0o600, dir_fd=folder), "wb") as stream:
                stream.write(content)
            os.replace(partial, file, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def _open_folder(place: Path) -> int:
    """A descriptor of a folder, reached from the root step by step without following links.

    The way to the user's cache may have links in it, which are resolved first: what they lead to is checked.
    """
    whole = Path(os.path.realpath(place.parent)) / place.name
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    folder = os.open(whole.anchor, flags)
    for name in whole.parts[1:]:
        try:
            inner = os.open(name, flags, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
        try:
            _check(os.fstat(folder), name, stat.S_ISDIR)
        except OSError:
            os.close(folder)
            raise
    return folder


def _check(found: os.stat_result, name: str, is_kind: Callable[[int], bool]) -> None:
    """Raise PermissionError where somebody else can change what is there.

    In a folder of root's with the sticky bit, such as /tmp, nobody can replace what is another user's.
    """
    mode = found.st_mode
    is_shared = bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
    is_safe_to_share = stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX) and found.st_uid == 0
    if not is_kind(mode) or found.st_uid not in (0, os.geteuid()) or (is_shared and not is_safe_to_share):
        raise PermissionError(f"{name} can be changed by others")
