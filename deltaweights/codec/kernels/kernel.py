"""What kernels are made with: how Numba compiles them, and arrays that live on the stack.

Kernels neither allocate nor touch Python's objects, so that their machine code needs nothing of Numba's to
run: :mod:`..build` writes it down, :mod:`..compiled` loads it without importing Numba.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, sigutils
from numba.core.codegen import AOTCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.extending import intrinsic as numba_intrinsic
from numba.np.arrayobj import populate_array

from ..kernel_arrays import Elements

_LINE = 64  # bytes of a cache line
Function = TypeVar("Function", bound=Callable[..., Any])
Given = ParamSpec("Given")
#: An integer as kernels hand it on: NumPy's are no `int` to type checkers. Numba makes an int64 of most.
Integer = int | np.int64 | np.uint32


class _Target(type(cpu_target)):  # type: ignore[misc]
    """Numba's target, except that it does not make kernels callable, which takes Numba most of its time."""

    @cached_property
    def target_context(self) -> Any:
        usual = cpu_target.target_context
        usual.refresh()
        return usual.subtarget(
            _internal_codegen=AOTCPUCodegen("deltaweights"),
            aot_mode=True,
            get_executable=lambda *kernel: [].append,
        )

    @property
    def typing_context(self) -> Any:
        return cpu_target.typing_context


class _Kernel(CPUDispatcher):  # type: ignore[misc]
    targetdescr = _Target("cpu")


_OPTIONS = {"nopython": True, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def kernel(signature: Any = None, **options: Any) -> Callable[[Function], Function]:
    """A decorator: a function for other kernels to call, and to be called from Python through `compiled`.

    With a signature it is compiled for nothing else, and when first needed; without one Numba compiles it
    anew for every type, and every constant, that a kernel calls it with. It ignores annotations.
    """

    def decorate(function: Function) -> Function:
        found: Any = _Kernel(function, targetoptions=_OPTIONS | options)
        template = found.get_call_template

        def compiled(types_given: tuple[Any, ...]) -> Any:
            """What Numba makes of the function for these types, or for its only signature."""
            wanted = types_given if signature is None else sigutils.normalize_signature(signature)[0]
            with global_compiler_lock:
                if wanted not in found.overloads:
                    found.compile(wanted if signature is None else signature)
            return found.overloads[wanted]

        def template_of_the_only_one(args: Any, kws: Any) -> Any:
            compiled(args)
            found.disable_compile()
            return template(args, kws)

        if signature is not None:
            found.get_call_template = template_of_the_only_one
        found.compiled = compiled
        return cast("Function", found)

    return decorate


def intrinsic(typer: Callable[Concatenate[Any, Given], Any]) -> Callable[Given, Any]:
    """Numba's decorator; type checkers see a function of the parameters behind the typing context."""
    return cast("Callable[Given, Any]", numba_intrinsic(typer))


def array(element: Any, dimensions: int = 1) -> Any:
    """The type of an array in a signature."""
    return types.Array(element, dimensions, "C")


def room(element: Any, count: int) -> Callable[[], Elements]:
    """An intrinsic `f()`: `count` elements of any content, the same ones throughout the kernel that calls."""
    kind = array(element)

    @intrinsic
    def f(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = ir.Constant(ir.IntType(64), count)
            data = cgutils.alloca_once(builder, context.get_data_type(element), size)
            data.align = _LINE
            return array_at(context, builder, kind, data, [size])

        return kind(), codegen

    return f


def array_at(
    context: Any, builder: ir.IRBuilder, kind: Any, data: ir.Value, shape: Sequence[ir.Value]
) -> Any:
    """The value that Numba has for an array of these contents: C order, owned by nobody."""
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [ir.Constant(ir.IntType(64), size)]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    made = context.make_array(kind)(context, builder)
    populate_array(made, data=data, shape=shape, strides=strides, itemsize=strides[-1], meminfo=None)
    return made._getvalue()
