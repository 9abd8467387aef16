"""The door to the compiled kernels: `delta.measure(...)` calls kernel `measure` of module `delta`.

A kernel is compiled once for each set of types that it is called with, and kept on disk (:mod:`.store`) as an
object file. LLVM loads that in milliseconds; Numba, whose import alone takes many of them, is needed only
where one is missing.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np

from .store import ENTRY, object_code

__all__ = ["Held", "Kernel", "Kernels", "alone", "checked", "delta", "runs", "subset"]

_RESULTS: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_double, "b": ctypes.c_bool, "n": None}
_loading = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child that began while another thread loads would wait for ever
    os.register_at_fork(
        before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
    )


Space = TypeVar("Space", bound=tuple[Any, ...])


class Held(Generic[Space]):
    """A tuple from :mod:`.spaces`, of always the same arrays, to be handed to kernels many times: what they
    are given for it is found out once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.kinds: list[Any] = []
        self.flat: list[Any] = []
        _flatten(space, self.kinds, self.flat)


def _flatten(arguments: tuple[Any, ...], kinds: list[Any], flat: list[Any]) -> None:
    """Collect what machine code is given, and what it depends on."""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            if not argument.flags.c_contiguous:
                raise ValueError("kernels take contiguous arrays")
            kinds += argument.dtype, argument.ndim
            flat.append(id(argument))  # its place in memory
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
    """A kernel to call, which releases the GIL.

    Arguments are integers, floats, bools, C-contiguous arrays, and tuples of these from :mod:`.spaces`, which
    may be :class:`Held`; which of the arrays are written to, the kernel's docstring says, and nothing else
    keeps it from writing.
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
                result, code = object_code(self._module, self._name, kinds)
                self._loaded[key] = _function(code, kinds), _RESULTS[result]
            return self._loaded[key]


alone, checked, delta, runs, subset = map(Kernels, ("alone", "checked", "delta", "runs", "subset"))


def _kind_of(argument: Any) -> str:
    """What :mod:`.build` calls an argument."""
    if isinstance(argument, Held):
        return _kind_of(argument.space)
    if isinstance(argument, tuple):
        return f"{type(argument).__name__}({','.join(map(_kind_of, argument))})"
    if isinstance(argument, np.ndarray):
        if not argument.dtype.isnative:
            raise ValueError("kernels take arrays of this machine's byte order")
        return f"{argument.dtype.kind}{argument.dtype.itemsize}.{argument.ndim}"
    if isinstance(argument, bool | np.bool_):
        return "b"
    return "f" if isinstance(argument, float) else "i"


def _function(code: bytes, kinds: list[str]) -> Any:
    """Object code as a function, part of the process from now on."""
    import llvmlite.binding as llvm  # takes as long as NumPy: `--help` need not wait for it

    scalars = {"i": ctypes.c_int64, "f": ctypes.c_double, "b": ctypes.c_int64}
    leaves = (leaf for kind in kinds for leaf in re.findall(r"[\w.]+(?!\w*\()", kind))
    types: list[Any] = [scalars.get(leaf, ctypes.c_void_p) for leaf in leaves]
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target().create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(ENTRY)
    engine.detach()  # never freed: another thread may be in it when the process ends
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *types)(address)


@cache
def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()
