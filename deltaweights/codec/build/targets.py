"""The processors that kernels are built for, and the platforms whose libraries hold their code."""

from __future__ import annotations

from typing import NamedTuple

from ..processor import LEVELS

_AVX512 = "+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
#: What LLVM calls each level of :data:`..processor.LEVELS`: (processor, features). A processor's name implies
#: features too, but :meth:`CompileTarget.has` looks at those that are written out.
_PROCESSORS = {
    "x86-64-v2": ("x86-64-v2", "+ssse3"),
    "x86-64-v3": ("x86-64-v3", "+ssse3,+avx2"),
    "x86-64-v4": ("x86-64-v4", f"+ssse3,+avx2,{_AVX512}"),
    "x86-64-v4-vbmi2": (
        "x86-64-v4",
        f"+ssse3,+avx2,{_AVX512},+avx512vbmi,+avx512vbmi2,+avx512vnni,+avx512bitalg,+avx512vpopcntdq",
    ),
    "arm64": ("generic", "+neon"),
}
_TRIPLES = {
    "linux-x86_64": "x86_64-unknown-linux-gnu",
    "linux-arm64": "aarch64-unknown-linux-gnu",
    "macos-arm64": "arm64-apple-macosx11.0.0",
}


class CompileTarget(NamedTuple):
    """A processor, as LLVM describes it."""

    triple: str
    processor: str
    features: str

    def has(self, feature: str) -> bool:
        """Whether its code may use a feature, by LLVM's name."""
        return f"+{feature}" in self.features.split(",")

    @property
    def shuffle(self) -> str | None:
        """LLVM's name of the instruction that shuffles 16 bytes, if there is one."""
        if self.triple.startswith(("aarch64", "arm64")):
            return "llvm.aarch64.neon.tbl1.v16i8"
        return "llvm.x86.ssse3.pshuf.b.128" if self.has("ssse3") else None


def platforms() -> list[str]:
    """The platforms that a library can be built for."""
    return list(_TRIPLES)


def targets_of(platform: str) -> dict[str, CompileTarget]:
    """The targets of a platform's library by the names of their levels, the lowest first."""
    triple = _TRIPLES[platform]
    levels = LEVELS["arm64" if platform.endswith("arm64") else "x86_64"]
    return {level: CompileTarget(triple, *_PROCESSORS[level]) for level in levels}


def host() -> CompileTarget:
    """The very processor that this runs on."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    return CompileTarget(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)
