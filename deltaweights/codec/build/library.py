"""A platform's library: the kernels for each level of its processors, and what the codec reads of it.

Besides the kernels it exports

* `deltaweights_about`, a text: on a line each the digest of the sources, the compiler, the levels, and every
  kernel in order;
* `deltaweights_family`, the weights of :func:`..tables.laplace_family`, which take long to compute;
* on x86-64 `deltaweights_cpuid` and `deltaweights_xcr0`, which ask the processor what it can do.

Kernel number n for level number m is the function `deltaweights_n_m`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba

from ..cache import NUMBA_SETTINGS
from ..library import ABOUT, CPUID, FAMILY, XCR0, digest_of_sources, entry_name
from ..processor import LEVELS, levels_by
from ..processor import platform as host_platform
from ..tables import laplace_family
from .bitcode import Bitcode, bitcode_of
from .c_compiler import c_compiler
from .machine_code import emit, initialize, object_of
from .signatures import signatures
from .targets import CompileTarget, targets_of

#: Modules whose kernels are compiled together, in a process for each line: each takes about as long.
_PARTS = (("rows",), ("standalone", "difference", "runs", "subset"), ("low_rank", "low_rank_fit"))

_ZIG_TARGETS = {
    "linux-x86_64": "x86_64-linux-gnu",
    "linux-arm64": "aarch64-linux-gnu",
    "macos-arm64": "aarch64-macos.11.0",
}
_REGISTERS, _LEAF = "{i32, i32, i32, i32}", "i32 %leaf, i32 %subleaf"
_ASK_X86 = f"""
define void @{CPUID}({_LEAF}, ptr %out) {{
  %found = call {_REGISTERS} asm sideeffect "cpuid", "={{ax}},={{bx}},={{cx}},={{dx}},{{ax}},{{cx}}"({_LEAF})
  store {_REGISTERS} %found, ptr %out
  ret void
}}

define i32 @{XCR0}() {{
  %found = call {{i32, i32}} asm sideeffect "xgetbv", "={{ax}},={{dx}},{{cx}}"(i32 0)
  %low = extractvalue {{i32, i32}} %found, 0
  ret i32 %low
}}
"""


def build(platform: str, levels: Sequence[str], out: Path) -> None:
    """Build a platform's library for these of its levels, on all cores.

    Raises OSError where it cannot be linked or written.
    """
    known, digest = targets_of(platform), digest_of_sources()  # now: somebody may be editing them
    targets = {level: known[level] for level in known if level in levels}
    with (
        tempfile.TemporaryDirectory() as work,
        ProcessPoolExecutor(min(len(_PARTS), os.cpu_count() or 1), get_context("spawn")) as processes,
    ):
        parts = list(processes.map(_compile_part, _PARTS, [targets] * len(_PARTS)))
        objects = [content for part, _ in parts for content in part]
        results = {number: kind for _, part in parts for number, kind in part.items()}
        objects.append(_data(digest, list(targets), results, next(iter(targets.values()))))
        files = []
        for number, content in enumerate(objects):
            files.append(Path(work, f"{number}.o"))
            files[-1].write_bytes(content)
        _link(platform, files, out)


def _compile_part(
    modules: Sequence[str], targets: dict[str, CompileTarget]
) -> tuple[list[bytes], dict[int, str]]:
    """(an object file for each target, the kind of each kernel's result) of the kernels of some modules."""
    kernels = {n: s for n, s in enumerate(signatures()) if s.module in modules}
    neutral = {n: bitcode_of(signature, entry_name(n, 0)) for n, signature in kernels.items()}
    objects = [
        object_of([_renamed(code, n, m) for n, code in neutral.items()], target)
        for m, target in enumerate(targets.values())
    ]
    return objects, {n: code.result for n, code in neutral.items()}


def _renamed(code: Bitcode, kernel: int, level: int) -> Bitcode:
    """A kernel's code for the first level, by the name that it has for another one."""
    old, new = entry_name(kernel, 0), entry_name(kernel, level)
    return code._replace(name=new, entry=code.entry.replace(old, new))


def _data(digest: str, levels: list[str], results: dict[int, str], target: CompileTarget) -> bytes:
    """The object file of everything that is no kernel."""
    initialize()
    lines = [digest, compiler(), " ".join(levels)]
    for n, (module, kernel, kinds) in enumerate(signatures()):
        lines.append(" ".join([module, kernel, results[n], *kinds]))
    about, family = "\n".join(lines).encode() + b"\0", laplace_family().tobytes()
    assembly = "".join(
        f'@{name} = constant [{len(content)} x i8] c"{_escaped(content)}", align 64\n'
        for name, content in ((ABOUT, about), (FAMILY, family))
    )
    is_x86 = target.triple.startswith("x86_64")
    plain = CompileTarget(target.triple, "x86-64" if is_x86 else "generic", "")
    return emit(llvm.parse_assembly(assembly + (_ASK_X86 if is_x86 else "")), plain)


def compiler() -> str:
    """What makes the code, and Numba's settings that change it, on one line."""
    settings = [f"{name}={os.environ[name]}" for name in NUMBA_SETTINGS if name in os.environ]
    return " ".join([f"numba {numba.__version__}", f"llvmlite {llvmlite.__version__}", *settings])


def _escaped(content: bytes) -> str:
    return "".join(f"\\{byte:02X}" for byte in content)


def _link(platform: str, objects: list[Path], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}")
    options = ["-shared", "-nostdlib", "-Wl,-s"]
    if platform.startswith("linux"):
        options += ["-Wl,-z,noexecstack", "-Wl,-z,relro", "-Wl,-z,now"]
    else:
        options += ["-Wl,-undefined,dynamic_lookup"]
    why = f"there is no linker for {platform}: install the package ziglang"
    try:
        for linker in _linkers(platform):
            command = [*linker, *options, "-o", str(partial), *map(str, objects)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode == 0:
                partial.replace(out)
                return
            why = f"{' '.join(linker)} could not link the kernels: {done.stderr.strip()[-2000:]}"
        raise OSError(why)
    finally:
        partial.unlink(missing_ok=True)


def _linkers(platform: str) -> Iterator[list[str]]:
    """Commands of C compilers, of which the first that works is used, as a linker only.

    The package ziglang links for all platforms; a compiler on macOS would want that system's own libraries.
    """
    compiler = c_compiler()
    if compiler and platform.startswith("linux") and platform == host_platform():
        yield [compiler]
    if find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc", "-target", _ZIG_TARGETS[platform]]


def levels_of_host() -> Sequence[str]:
    """The levels that this machine's processor can run, the lowest first."""
    initialize()
    triple = llvm.get_process_triple()
    if not triple.startswith("x86_64"):
        return LEVELS["arm64"]
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(_ASK_X86), llvm.Target.from_triple(triple).create_target_machine()
    )
    engine.finalize_object()
    cpuid, xcr0 = (engine.get_function_address(name) for name in (CPUID, XCR0))
    return levels_by(ctypes.CFUNCTYPE(None)(cpuid), ctypes.CFUNCTYPE(ctypes.c_uint32)(xcr0))
