"""What takes long to make, on disk: object files of kernels above all, found there or made and left there.

They are in a folder named by all that their content depends on: the processor, the compiler and the sources.
That folder is in `NUMBA_CACHE_DIR` if that is set, else in `__pycache__` beside this file, or in the user's
cache folder where that cannot be written.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

ENTRY = "deltaweights_entry"  # the function of an object file
_HERE = Path(__file__).parent
#: The modules that machine code depends on, and how it is called.
_SOURCES = (
    "alone", "build", "checked", "compiled", "constants", "delta", "kernel", "runs", "simd", "spaces",
    "store", "subset", "tables", "vectors", "xxh3",
)  # fmt: skip
#: Numba's, that change its code.
_SETTINGS = (
    "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMBA_OPT", "NUMBA_BOUNDSCHECK",
    "NUMBA_DEBUGINFO",
)  # fmt: skip
_DIGEST = 32  # bytes of the SHA-256 that a file begins with


def object_code(module: str, name: str, kinds: list[str]) -> tuple[str, bytes]:
    """(kind of the result, object file) of a kernel: see :func:`.build.object_code`."""

    def compile_it() -> bytes:
        _announce()
        from . import build

        result, code = build.object_code(module, name, kinds)
        return result.encode() + code

    stored = kept("-".join([module, name, *kinds]), compile_it)
    return chr(stored[0]), stored[1:]


def kept(file: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, from disk if it is there; it may depend on nothing but the processor, the compiler
    and this package's sources."""
    for place in _places():
        with suppress(OSError):
            stored = (place / _folder() / file).read_bytes()
            if sha256(stored[_DIGEST:]).digest() == stored[:_DIGEST]:
                return stored[_DIGEST:]
    content = make()
    for place in _places():
        with suppress(OSError):
            _keep(place / _folder() / file, sha256(content).digest() + content)
            break
    return content


@cache
def _announce() -> None:
    logging.getLogger("deltaweights").warning(
        "compiling the codec for this processor, which takes some seconds, once"
    )


def _places() -> Iterator[Path]:
    """Where to look, and where to write if it can be."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(named)
    yield _HERE / "__pycache__"
    with suppress(RuntimeError):  # a user without a home, as in many a container
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaweights"


@cache
def _folder() -> str:
    import llvmlite.binding as llvm

    settings = [os.environ.get(name) for name in _SETTINGS] + [sys.implementation.cache_tag, sys.abiflags]
    machine = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    compiler = [_version_of(name) for name in ("numba", "llvmlite")]
    sources = b"".join(_HERE.joinpath(f"{name}.py").read_bytes() for name in _SOURCES)
    names = repr([settings, machine, compiler]).encode(), sources
    return "-".join(["kernels", *(sha256(name).hexdigest()[:16] for name in names)])


def _version_of(package: str) -> bytes:
    """The file with a package's version. (`importlib.metadata` takes longer than all else here.)"""
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("_version.py").read_bytes()


def _keep(path: Path, content: bytes) -> None:
    """Write a file under its name at once, so that no other process reads a part of it."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)  # another process may be as far
        _forget_others(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _forget_others(folder: Path) -> None:
    """Remove what this processor's kernels were before this package, in the same place, was changed."""
    if folder.parent == _HERE / "__pycache__":
        machine = folder.name.rpartition("-")[0]
        for other in folder.parent.glob(f"{machine}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
