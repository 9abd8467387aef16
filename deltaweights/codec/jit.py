"""Kernels compiled on this machine when they are first called: where no prebuilt library fits.

That needs Numba. What it made is cached on disk (:mod:`.cache`), and found there loads without importing it.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from ..errors import DeltaWeightsError
from . import cache as disk
from .library import FoundKernel, why_none

_ENTRY = "deltaweights_entry"


def compiled(module: str, kernel: str, kinds: list[str]) -> FoundKernel:
    """A kernel for these kinds of arguments, part of the process from now on.

    Raises:
        DeltaWeightsError: it cannot be compiled here.
        TypeError: it does not take such arguments.
    """

    def compile_it() -> bytes:
        _announce()
        from .build import bitcode, machine_code, signatures, targets

        code = bitcode.bitcode_of(signatures.Signature(module, kernel, tuple(kinds)), _ENTRY)
        return code.result.encode() + machine_code.object_of([code], targets.host(), jit=True)

    try:
        stored = disk.kept("-".join([module, kernel, *kinds]), compile_it)
        return FoundKernel(_load(stored[1:]), chr(stored[0]))
    except ImportError as error:
        raise DeltaWeightsError(
            "The codec has no machine code for this computer",
            f"{_why_compile(module, kernel, kinds)} It cannot be compiled: {error}.",
            "In a clone run `pip install .`, or `pip install 'numba<0.69'` to compile them when first used.",
        ) from error


def _why_compile(module: str, kernel: str, kinds: list[str]) -> str:
    if why := why_none():
        return f"There are no prebuilt kernels: {why}."
    return f"The prebuilt kernels lack {module}.{kernel}({', '.join(kinds)})."


def _load(code: bytes) -> int:
    """The address of the function in an object file."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target().create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(_ENTRY)
    engine.detach()  # never freed: another thread may be in it when the process ends
    return address


@cache
def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@cache
def _announce() -> None:
    logging.getLogger("deltaweights.codec").warning(
        "compiling the codec for this processor, which takes some seconds, once"
    )
