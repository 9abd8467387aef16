"""LLVM bitcode of a kernel, for no processor in particular, with the C function that calls it.

That function is

    int32_t entry(void *result, argument, ...)

with an int64_t or double for each scalar and, for each array, the address of the NumPy object's own part,
behind what all Python objects begin with. NumPy's C interface (PyArrayObject) says where its data and lengths
are, and reading them there takes a fraction of the time that asking for them in Python takes. The result, an
int64_t, a double or a bool, is written to *result. A status other than zero stands for an exception.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import TypingError

from .. import kernel_arrays
from ..kernels.kernel import array, array_at
from .signatures import Signature

_LONG, _BYTE, _POINTER = ir.IntType(64), ir.IntType(8), ir.PointerType()
_SCALARS = {"i": types.int64, "f": types.float64, "b": types.boolean}
_ELEMENTS = {
    "b1": types.boolean,
    "i4": types.int32,
    "i8": types.int64,
    "f4": types.float32,
    "f8": types.float64,
}
_ELEMENTS |= {f"u{size}": getattr(types, f"uint{8 * size}") for size in (1, 2, 4, 8)}


class Bitcode(NamedTuple):
    """A kernel as LLVM reads it."""

    name: str  # of the function to call
    result: str  # the kind of the result, as in a Signature, or "n" for none
    entry: str  # that function's assembly
    code: bytes  # bitcode of what it calls


def bitcode_of(signature: Signature, name: str) -> Bitcode:
    """Compile a kernel so far, `name` being the one of the function to call.

    Raises TypeError for arguments that the kernel does not take: called with them, its code would read what
    is not there.
    """
    if config.DISABLE_JIT:
        raise RuntimeError("kernels cannot be compiled while NUMBA_DISABLE_JIT is set")
    with global_compiler_lock:
        found = getattr(import_module(f"...kernels.{signature.module}", __name__), signature.kernel)
        given = tuple(_type_of(kind) for kind in signature.kinds)
        with _unoptimized():
            try:
                result = found.compiled(given)
            except TypingError as error:
                raise TypeError(f"kernel {signature.kernel} takes no {', '.join(signature.kinds)}") from error
            if tuple(result.fndesc.argtypes) != given:
                raise TypeError(f"kernel {signature.kernel} takes {result.fndesc.argtypes}, not {given}")
            entry = str(_entry(result.target_context, result.fndesc, name))
            return Bitcode(name, _kind_of_result(result.fndesc.restype), entry, result.library.emit_bitcode())


@contextmanager
def _unoptimized() -> Iterator[None]:
    """Within it kernels are compiled as they are: what one calls is optimised with it, once, at the end."""
    level = config.OPT
    config.OPT = type(level)(0)
    try:
        yield
    finally:
        config.OPT = level


def _type_of(kind: str) -> Any:
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind.endswith(")"):
        name, _, held = kind[:-1].partition("(")
        return types.NamedTuple([_type_of(part) for part in _parts(held)], getattr(kernel_arrays, name))
    element, dimensions = kind.split(".")
    return array(_ELEMENTS[element], int(dimensions))


def _parts(held: str) -> list[str]:
    """The parts between those commas that are outside parentheses."""
    return re.findall(r"(?:[^,()]|\([^()]*\))+", held)  # no tuple holds one that holds a third


def _kind_of_result(kind: Any) -> str:
    if kind == types.none:
        return "n"
    if kind == types.boolean:
        return "b"
    return "f" if kind == types.float64 else "i"


def _entry(context: Any, described: Any, name: str) -> ir.Module:
    """The module with the C function that calls the kernel."""
    flat = [_POINTER]
    for kind in _leaves(described.argtypes):
        scalar = ir.DoubleType() if kind == types.float64 else _LONG
        flat.append(_POINTER if isinstance(kind, types.Array) else scalar)
    module = context.create_module(name)
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), flat), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    into, *given = function.args
    left = iter(given)
    arguments = [_argument(context, builder, kind, left) for kind in described.argtypes]
    kernel = context.declare_function(module, described)
    status, value = context.call_conv.call_function(
        builder, kernel, described.restype, described.argtypes, arguments
    )
    if described.restype != types.none:
        boolean = described.restype == types.boolean
        builder.store(builder.zext(value, _BYTE) if boolean else value, into)
    builder.ret(status.code)
    return module


def _leaves(kinds: Iterable[Any]) -> Iterator[Any]:
    """The types, and instead of tuples what they hold."""
    for kind in kinds:
        if isinstance(kind, types.NamedTuple):
            yield from _leaves(kind)
        else:
            yield kind


def _argument(context: Any, builder: ir.IRBuilder, kind: Any, left: Iterator[ir.Value]) -> Any:
    """Numba's value of a type, made of what is left of the arguments."""
    if isinstance(kind, types.NamedTuple):
        return context.make_tuple(builder, kind, [_argument(context, builder, k, left) for k in kind])
    given = next(left)
    if isinstance(kind, types.Array):
        return _array(context, builder, kind, given)
    return builder.trunc(given, ir.IntType(1)) if kind == types.boolean else given


def _array(context: Any, builder: ir.IRBuilder, kind: Any, numpy_object: ir.Value) -> Any:
    """Numba's array from NumPy's, which begins with data, nd and the address of the lengths."""

    def field(number: int, kind_of_field: ir.Type) -> ir.Value:
        place = builder.gep(numpy_object, [_LONG(8 * number)], source_etype=_BYTE)
        return builder.load(place, typ=kind_of_field)

    lengths = field(2, _POINTER)
    shape = [
        builder.load(builder.gep(lengths, [_LONG(n)], source_etype=_LONG), typ=_LONG)
        for n in range(kind.ndim)
    ]
    data = builder.bitcast(field(0, _POINTER), context.get_data_type(kind.dtype).as_pointer())
    return array_at(context, builder, kind, data, shape)
