# mypy: ignore-errors
# Numba and LLVM type what is in here.
"""Machine code of one kernel for one set of types, as an object file that :mod:`.compiled` can load.

The object has one function to call, `store.ENTRY`:

    int32_t entry(void *result, argument, ...)

with an int64_t or double for each scalar and, for each array, the NumPy object itself: its address and its
lengths are where NumPy's C interface (PyArrayObject) has them, at a fraction of the time that asking for
them in Python takes. The result, an int64_t, a double or a bool, is written to *result. A status other than
zero stands for an exception.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from importlib import import_module

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from . import spaces
from .kernel import array, array_at
from .store import ENTRY

_LONG, _BYTE, _POINTER = ir.IntType(64), ir.IntType(8), ir.PointerType()
_HEAD = object.__basicsize__  # what every Python object begins with
_SCALARS = {"i": types.int64, "f": types.float64, "b": types.boolean}
_ELEMENTS = {
    "b1": types.boolean,
    "i4": types.int32,
    "i8": types.int64,
    "f4": types.float32,
    "f8": types.float64,
}
_ELEMENTS |= {f"u{size}": getattr(types, f"uint{8 * size}") for size in (1, 2, 4, 8)}
#: What the code may call besides itself: of the C library, which every Python process has loaded.
_KNOWN = {"log2", "exp2", "pow", "floor", "ldexp", "memcpy", "memmove", "memset"}


def object_code(module: str, name: str, kinds: list[str]) -> tuple[str, bytes]:
    """(kind of the result, object file) of kernel `name` of a module of this package.

    kinds   one text an argument: "i", "f" or "b" for an integer, a float or a bool; for an array the code of
            its dtype and its number of dimensions, as in "u2.1"; for a tuple of :mod:`.spaces` its name and
            what it holds, as in "RunSpace(u4.1,u2.1)"
    The result's kind is one of those letters, or "n" for none. Raises TypeError for arguments that the kernel
    does not take: called with them, its code would read what is not there.
    """
    if config.DISABLE_JIT:
        raise RuntimeError("kernels cannot be compiled while NUMBA_DISABLE_JIT is set")
    with global_compiler_lock:
        found = getattr(import_module(f".{module}", __package__), name)
        given = tuple(_type_of(kind) for kind in kinds)
        with _unoptimized():
            result = found.compiled(given)
        if tuple(result.fndesc.argtypes) != given:
            raise TypeError(f"kernel {name} takes {result.fndesc.argtypes}, not {given}")
        return _kind_of_result(result.fndesc.restype), _object_of(result)


@contextmanager
def _unoptimized():
    """Within it kernels are compiled as they are: what one calls is optimised with it, once, at the end."""
    level = config.OPT
    config.OPT = type(level)(0)
    try:
        yield
    finally:
        config.OPT = level


def _type_of(kind):
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind.endswith(")"):
        name, _, held = kind[:-1].partition("(")
        return types.NamedTuple([_type_of(part) for part in _parts(held)], getattr(spaces, name))
    element, dimensions = kind.split(".")
    return array(_ELEMENTS[element], int(dimensions))


def _parts(held):
    """What the comma separates that stands in no parentheses."""
    return re.findall(r"(?:[^,()]|\([^()]*\))+", held)  # no tuple holds one that holds a third


def _kind_of_result(kind):
    if kind == types.none:
        return "n"
    if kind == types.boolean:
        return "b"
    return "f" if kind == types.float64 else "i"


def _object_of(result):
    """The object file of a compiled kernel, the entry in front of it."""
    module = llvm.parse_assembly(str(_entry(result.target_context, result.fndesc)))
    module.link_in(llvm.parse_bitcode(result.library.emit_bitcode()))
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
    back_end = _back_end(result.target_context.codegen())
    module.triple, module.data_layout = back_end.triple, str(back_end.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(back_end, options)
    passes.getModulePassManager().run(module, passes)
    for function in module.functions:
        is_known = function.name in _KNOWN or function.name.startswith("llvm.")
        if function.is_declaration and not is_known:
            raise NotImplementedError(f"a kernel needs {function.name}, which not every process has")
    return back_end.emit_object(module)


def _back_end(codegen):
    triple, cpu, features = codegen.magic_tuple()
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu, features, 3, "pic", "jitdefault", jit=True)


def _entry(context, described):
    """The module with the C function that calls the kernel."""
    flat = [_POINTER]
    for kind in _leaves(described.argtypes):
        scalar = ir.DoubleType() if kind == types.float64 else _LONG
        flat.append(_POINTER if isinstance(kind, types.Array) else scalar)
    module = context.create_module(ENTRY)
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), flat), ENTRY)
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


def _leaves(kinds):
    """The types, and instead of tuples what they hold."""
    for kind in kinds:
        if isinstance(kind, types.NamedTuple):
            yield from _leaves(kind)
        else:
            yield kind


def _argument(context, builder, kind, left):
    """Numba's value of a type, made of what is left of the arguments."""
    if isinstance(kind, types.NamedTuple):
        return context.make_tuple(builder, kind, [_argument(context, builder, k, left) for k in kind])
    given = next(left)
    if isinstance(kind, types.Array):
        return _array(context, builder, kind, given)
    return builder.trunc(given, ir.IntType(1)) if kind == types.boolean else given


def _array(context, builder, kind, numpy_object):
    """Numba's array from NumPy's, in which data, nd and the lengths follow what all objects begin with."""

    def field(number, kind_of_field):
        place = builder.gep(numpy_object, [_LONG(_HEAD + 8 * number)], source_etype=_BYTE)
        return builder.load(place, typ=kind_of_field)

    lengths = field(2, _POINTER)
    shape = [
        builder.load(builder.gep(lengths, [_LONG(n)], source_etype=_LONG), typ=_LONG)
        for n in range(kind.ndim)
    ]
    data = builder.bitcast(field(0, _POINTER), context.get_data_type(kind.dtype).as_pointer())
    return array_at(context, builder, kind, data, shape)
