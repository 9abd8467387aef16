"""The kernels' prebuilt library: one a platform, which the package brings, or a clone builds (:mod:`.build`).

It holds the machine code of every kernel for each level of processor that it was built for, and nothing else:
it calls three functions of the C library, which every Python process has loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..errors import DeltaWeightsError
from .processor import LEVELS, levels_by, platform

ABOUT, FAMILY = "deltaweights_about", "deltaweights_family"
CPUID, XCR0 = "deltaweights_cpuid", "deltaweights_xcr0"
#: The environment variable that chooses the kernels: a level of :data:`.processor.LEVELS`, or "jit" for those
#: that Numba compiles when they are first called. Unset, the processor chooses.
CHOICE = "DELTAWEIGHTS_KERNELS"

_HERE = Path(__file__).parent
#: What machine code depends on, besides the modules in these two folders.
_SOURCES = ("constants.py", "kernel_arrays.py", "tables.py")
_FOLDERS = ("build", "kernels")
_UNFIT = (OSError, LookupError, ValueError, AttributeError)  # missing, for others, or no library of ours
#: Of a header of 64-bit ELF: where the section headers begin, the bytes of one, and how many there are.
_ELF_HEADER = struct.Struct("<40xQ10xHH2x")
_ABOUT = re.compile(rb"([0-9a-f]{64})\n([ -~]+)\n([a-z0-9 -]+)\n")  # how the text begins


class FoundKernel(NamedTuple):
    """A kernel of the library."""

    address: int
    result: str  # the kind of its result: see :mod:`.build.bitcode`


class Library:
    """A library in this process, and the level of its kernels that is used."""

    def __init__(self, path: Path, level: str | None = None) -> None:
        """Load it, for the processor's best level or the one named.

        Raises:
            OSError: it cannot be loaded.
            ValueError: the file is cut off.
            LookupError: it was built from other sources, it has no kernels that this processor can run, or
                none of that level.
        """
        _require_whole(path)
        self._library = ctypes.CDLL(str(path))
        start = ctypes.addressof(ctypes.c_char.in_dll(self._library, ABOUT))
        digest, _, levels, *kernels = ctypes.string_at(start).decode().split("\n")
        if digest != digest_of_sources():
            raise LookupError(f"{path.name} was built from other sources")
        runnable = self._runnable()
        fit = [name for name in levels.split() if name in runnable]
        if not fit or (level and level not in fit):
            raise LookupError(
                f"{path.name} has kernels for {levels}; this processor runs {' '.join(runnable)}"
            )
        self.levels = tuple(fit)  # that this processor can run, the lowest first
        self.level = level or fit[-1]
        self._number = levels.split().index(self.level)
        self._kernels: dict[tuple[str, ...], tuple[int, str]] = {}
        for n, line in enumerate(kernels):
            module, kernel, result, *kinds = line.split(" ")
            self._kernels[(module, kernel, *kinds)] = n, result

    def find(self, module: str, kernel: str, kinds: Iterable[str]) -> FoundKernel | None:
        """A kernel for these kinds of arguments; None where the library has none such."""
        known = self._kernels.get((module, kernel, *kinds))
        if known is None:
            return None
        n, result = known
        address = ctypes.cast(self._library[entry_name(n, self._number)], ctypes.c_void_p).value
        assert address is not None
        return FoundKernel(address, result)

    def family(self, nbytes: int) -> bytes:
        """The bytes of :func:`.tables.laplace_family`."""
        return bytes((ctypes.c_char * nbytes).in_dll(self._library, FAMILY))

    def _runnable(self) -> Sequence[str]:
        """The levels that this processor runs."""
        if not hasattr(self._library, CPUID):
            return LEVELS["arm64"]
        return levels_by(self._library[CPUID], self._library[XCR0])


def prebuilt() -> Library | None:
    """The library for this process; None where kernels are to be compiled instead.

    Raises:
        DeltaWeightsError: the environment asks for kernels that are not there.
    """
    found = _loaded()
    return found if isinstance(found, Library) else None


def why_none() -> str:
    """Why there is no library for this process; empty if there is one."""
    found = _loaded()
    return "" if isinstance(found, Library) else found


@cache
def _loaded() -> Library | str:
    """The library, or why there is none."""
    choice, here = os.environ.get(CHOICE), platform()
    if choice == "jit":
        return f"{CHOICE} is set to jit"
    try:
        if here is None:
            raise LookupError("no library is built for this platform")
        return Library(library_path(here), choice)
    except _UNFIT as error:
        if choice:
            raise DeltaWeightsError(
                f"{CHOICE} asks for kernels that are not there: {choice}",
                f"{error}.",
                f"Unset {CHOICE}, or in a clone run `python -m deltaweights.codec.build --levels all`.",
            ) from error
        return str(error)


def _require_whole(path: Path) -> None:
    """Raise :class:`ValueError` where an ELF file ends before its section headers do, which stand last: the
    system maps such a file all the same, and kills the process that reads beyond its end."""
    with open(path, "rb") as file:
        head = file.read(_ELF_HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if head[:4] != b"\x7fELF":
        return  # of another system, or nothing at all
    needed = _ELF_HEADER.size
    if len(head) == needed:
        start, entry_bytes, count = _ELF_HEADER.unpack(head)
        needed = start + entry_bytes * count
    if size < needed:
        raise ValueError(f"{path.name} is cut off: it has {size} of {needed} bytes")


def library_path(on: str) -> Path:
    """Where the library for a platform is, or would be."""
    return _HERE / "prebuilt" / f"kernels-{on}.{'dylib' if on.startswith('macos') else 'so'}"


def is_current(path: Path, levels: Iterable[str], compiler: str = "") -> bool:
    """Whether there is a library built from the sources that are here, with these levels among its own, and
    by this compiler where one is given."""
    try:
        found = _ABOUT.search(path.read_bytes())
    except OSError:
        return False
    if found is None or found[1].decode() != digest_of_sources():
        return False
    if compiler and found[2].decode() != compiler:
        return False
    return set(levels) <= set(found[3].decode().split())


def entry_name(kernel: int, level: int) -> str:
    """What a library calls a kernel for a level, both by their numbers."""
    return f"deltaweights_{kernel}_{level}"


@cache
def digest_of_sources() -> str:
    """SHA-256 of the sources that machine code depends on, as hexadecimal digits."""
    paths = [_HERE / name for name in _SOURCES]
    for folder in _FOLDERS:
        paths += sorted((_HERE / folder).glob("[a-z]*.py"))
    digest = sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
