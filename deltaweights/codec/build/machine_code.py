"""Object files for one target, of kernels as :mod:`.bitcode` has them."""

from __future__ import annotations

from collections.abc import Iterable

import llvmlite.binding as llvm

from ..kernels.vectors import OPERATION
from .bitcode import Bitcode
from .targets import CompileTarget
from .vector_operations import define

#: What code may call besides itself: of the C library, which every Python process has loaded.
_KNOWN = {"memcpy", "memmove", "memset"}


def initialize() -> None:
    """Make LLVM ready for all targets; again does no harm."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # for the assembly in `library`


def object_of(kernels: Iterable[Bitcode], target: CompileTarget, *, jit: bool = False) -> bytes:
    """One object file of some kernels; what several of them call is in it once.

    With `jit` it is for LLVM to load into this process, else for a linker.
    """
    initialize()
    module, entries = llvm.parse_assembly(""), set()
    for kernel in kernels:
        module.link_in(_linked(kernel))
        entries.add(kernel.name)
    lacking = [f.name for f in module.functions if f.is_declaration and f.name.startswith(OPERATION)]
    module.link_in(llvm.parse_assembly(define(lacking, target)))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name not in entries:
            value.linkage = "internal"
    return emit(module, target, jit=jit)


def _linked(kernel: Bitcode) -> llvm.ModuleRef:
    """A kernel's module, whose functions give way to the same ones of another kernel's."""
    module = llvm.parse_assembly(kernel.entry)
    module.link_in(llvm.parse_bitcode(kernel.code))
    for function in module.functions:
        if not function.is_declaration and function.name != kernel.name:
            function.linkage = "linkonce_odr"
    return module


def emit(module: llvm.ModuleRef, target: CompileTarget, *, jit: bool = False) -> bytes:
    """Optimise a module for a target and return its object file."""
    model = "jitdefault" if jit else "default"
    back_end = llvm.Target.from_triple(target.triple).create_target_machine(
        target.processor, target.features, 3, "pic", model, jit=jit
    )
    module.triple, module.data_layout = back_end.triple, str(back_end.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(back_end, options)
    passes.getModulePassManager().run(module, passes)
    for function in module.functions:
        is_known = function.name in _KNOWN or function.name.startswith("llvm.")
        if function.is_declaration and not is_known:
            raise NotImplementedError(f"a kernel needs {function.name}, which not every process has")
    code: bytes = back_end.emit_object(module)
    return code
