"""Calls compiled kernels: `difference.encode(...)` calls `encode` in :mod:`.kernels.difference`.

The machine code comes from the prebuilt library (:mod:`.library`). Without that library, or if it lacks the
kernel, the first call for each set of types compiles it (:mod:`.jit`).
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from typing import Any, Generic, TypeVar

import numpy as np

from . import library

__all__ = [
    "Held",
    "Kernel",
    "Kernels",
    "difference",
    "low_rank",
    "low_rank_fit",
    "rows",
    "runs",
    "standalone",
    "subset",
]

_RESULTS: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_double, "b": ctypes.c_bool, "n": None}
_HEAD = object.__basicsize__  # the start of every Python object
_loading = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child forked while another thread loads would wait for ever
    os.register_at_fork(
        before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
    )


Space = TypeVar("Space", bound=tuple[Any, ...])


class Held(Generic[Space]):
    """A tuple of :mod:`.kernel_arrays` that is passed to kernels many times with the same arrays. Its machine
    arguments are computed once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.kinds: list[Any] = []
        self.flat: list[Any] = []
        _flatten(space, self.kinds, self.flat)


def _flatten(arguments: tuple[Any, ...], kinds: list[Any], flat: list[Any]) -> None:
    """Collect the arguments of the machine code, and the types that it depends on."""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            if not argument.flags.c_contiguous:
                raise ValueError("kernels need contiguous arrays")
            kinds += argument.dtype, argument.ndim
            flat.append(id(argument) + _HEAD)  # the address of NumPy's own fields
            continue
        if isinstance(argument, Held):
            kinds += argument.kinds
            flat += argument.flat
            continue
        kinds.append(type(argument))
        if isinstance(argument, tuple):
            _flatten(argument, kinds, flat)
        else:
            flat.append(argument)


class Kernels:
    """The kernels of one module, as attributes."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        kernel = Kernel(self._module, name)
        setattr(self, name, kernel)
        return kernel


class Kernel:
    """A callable kernel, which releases the GIL.

    Arguments are integers, floats, bools, C-contiguous arrays, and tuples of :mod:`.kernel_arrays`, which may
    be :class:`Held`. The kernel's docstring says which arrays it writes to; read-only flags do not stop it.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        kinds: list[Any] = []
        flat: list[Any] = []
        _flatten(arguments, kinds, flat)
        key = tuple(kinds)
        function, result = self._loaded.get(key) or self._load(key, arguments)
        if result is None:
            status, found = function(None, *flat), None
        else:
            place = result()
            status, found = function(ctypes.byref(place), *flat), place.value
        if status:
            raise RuntimeError(f"kernel {self._name} ended with status {status}")
        return found

    def _load(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        with _loading:
            if key not in self._loaded:
                kinds = [_kind_of(argument) for argument in arguments]
                found = _found(self._module, self._name, kinds)
                self._loaded[key] = _function(found.address, kinds), _RESULTS[found.result]
            return self._loaded[key]


standalone, rows, difference, runs, subset, low_rank, low_rank_fit = map(
    Kernels, ("standalone", "rows", "difference", "runs", "subset", "low_rank", "low_rank_fit")
)


def _kind_of(argument: Any) -> str:
    """The name of an argument's type in :mod:`.build.signatures`."""
    if isinstance(argument, Held):
        return _kind_of(argument.space)
    if isinstance(argument, tuple):
        return f"{type(argument).__name__}({','.join(map(_kind_of, argument))})"
    if isinstance(argument, np.ndarray):
        if not argument.dtype.isnative:
            raise ValueError("kernels need arrays of this machine's byte order")
        return f"{argument.dtype.kind}{argument.dtype.itemsize}.{argument.ndim}"
    if isinstance(argument, bool | np.bool_):
        return "b"
    return "f" if isinstance(argument, float) else "i"


def _found(module: str, name: str, kinds: list[str]) -> library.FoundKernel:
    """A kernel from the library, or else compiled now."""
    prebuilt = library.prebuilt()
    if prebuilt and (found := prebuilt.find(module, name, kinds)):
        return found
    from . import jit

    return jit.compiled(module, name, kinds)


def _function(address: int, kinds: list[str]) -> Any:
    """The C function at an address, callable from Python."""
    scalars = {"i": ctypes.c_int64, "f": ctypes.c_double, "b": ctypes.c_int64}
    leaves = (leaf for kind in kinds for leaf in re.findall(r"[\w.]+(?!\w*\()", kind))
    types: list[Any] = [scalars.get(leaf, ctypes.c_void_p) for leaf in leaves]
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *types)(address)
