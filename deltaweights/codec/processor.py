"""Finds the platform and processor of this process, and so the machine code that it can run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

#: The levels of machine code for each architecture, the lowest first. The first three of x86-64 are from its
#: ABI (https://gitlab.com/x86-psABIs/x86-64-ABI); the last adds the extensions of Ice Lake and Zen 4.
LEVELS = {
    "x86_64": ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-vbmi2"),
    "arm64": ("arm64",),
}
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
_SYSTEMS = {"linux": "linux", "darwin": "macos"}

_MOST_BASIC, _BASIC, _EXTENDED, _MOST_MORE, _MORE = (0, 0), (1, 0), (7, 0), (0x80000000, 0), (0x80000001, 0)
_EAX, _EBX, _ECX = range(3)
#: The features of each x86-64 level beyond the one below: bit numbers by leaf of the CPUID instruction and
#: register (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A).
_NEEDED: dict[str, dict[tuple[tuple[int, int], int], tuple[int, ...]]] = {
    "x86-64-v2": {
        (_BASIC, _ECX): (0, 9, 13, 19, 20, 23),  # SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT
        (_MORE, _ECX): (0,),  # LAHF
    },
    "x86-64-v3": {
        (_BASIC, _ECX): (12, 22, 27, 28, 29),  # FMA, MOVBE, OSXSAVE, AVX, F16C
        (_EXTENDED, _EBX): (3, 5, 8),  # BMI1, AVX2, BMI2
        (_MORE, _ECX): (5,),  # LZCNT
    },
    "x86-64-v4": {(_EXTENDED, _EBX): (16, 17, 28, 30, 31)},  # AVX-512 F, DQ, CD, BW, VL
    "x86-64-v4-vbmi2": {
        (_EXTENDED, _ECX): (1, 6, 11, 12, 14)
    },  # AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
}
#: The registers that the system must save for a level, as bits of XCR0: for AVX, and for AVX-512.
_SAVED = {"x86-64-v3": 0x06, "x86-64-v4": 0xE6, "x86-64-v4-vbmi2": 0xE6}


def platform() -> str | None:
    """The platform's name, such as "linux-x86_64"; None if no library is built for it."""
    system = _SYSTEMS.get(sys.platform)
    machine = _MACHINES.get(os.uname().machine.lower()) if system else None
    return f"{system}-{machine}" if machine and sys.maxsize > 1 << 32 else None


def levels_by(cpuid: Any, xcr0: Any) -> list[str]:
    """The levels that this x86-64 processor can run, the lowest first, by two C functions: void
    cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) and uint32_t xcr0(void)."""
    registers = (ctypes.c_uint32 * 4)()
    xcr0.restype = ctypes.c_uint32

    def ask(leaf: int, subleaf: int) -> tuple[int, ...]:
        cpuid(ctypes.c_uint32(leaf), ctypes.c_uint32(subleaf), registers)
        return tuple(registers)

    return x86_levels(ask, xcr0)


def x86_levels(cpuid: Callable[[int, int], tuple[int, ...]], xcr0: Callable[[], int]) -> list[str]:
    """The levels that an x86-64 processor can run, the lowest first.

    Args:
        cpuid: maps (leaf, subleaf) to the registers EAX, EBX, ECX and EDX after the instruction.
        xcr0: returns that register; called only if the processor supports reading it.
    """
    most_basic, most_more = cpuid(*_MOST_BASIC)[_EAX], cpuid(*_MOST_MORE)[_EAX]
    found: list[str] = []
    for level, needed in _NEEDED.items():
        for (leaf, register), bits in needed.items():
            is_known = leaf[0] <= (most_more if leaf[0] >> 31 else most_basic)
            value = cpuid(*leaf)[register] if is_known else 0
            if not all(value >> bit & 1 for bit in bits):
                return found
        saved = _SAVED.get(level, 0)
        if saved and xcr0() & saved != saved:
            return found
        found.append(level)
    return found
