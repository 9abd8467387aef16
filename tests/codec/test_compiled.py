"""How kernels are called, and how they come into a process: from the prebuilt library, or compiled."""

from __future__ import annotations

import ast
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deltaweights import DeltaWeightsError, codec, payload
from deltaweights.codec import compiled, jit, library
from deltaweights.codec.build.signatures import signatures
from deltaweights.codec.processor import LEVELS, platform, x86_levels

_CODEC = Path(codec.__file__).parent

_ROUND_TRIP = """
import sys
import numpy as np
from deltaweights import payload

base = np.arange(1 << 15, dtype=np.uint16).view(np.uint8)
for moved in (1, 1 << 9):  # few elements, and many
    target = base.copy()
    target[:: 4096 // moved] ^= 1
    coded = payload.encode(base, target, "BF16")
    assert np.array_equal(payload.decode(base, coded, "BF16"), target)
sys.exit("numba" in sys.modules or "llvmlite" in sys.modules)
"""

_FORK = """
import os, signal, threading, warnings
from deltaweights.codec import compiled

def load():
    with compiled._loading:
        begun.set()
        sum(range(1 << 22))

warnings.simplefilter("ignore")  # later Pythons warn of what is tried here
begun = threading.Event()
threading.Thread(target=load).start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(CALL != 8.0)
assert os.waitpid(child, 0)[1] == 0
assert CALL == 8.0
"""
_BYTE_BITS = "compiled.Kernel('standalone', 'byte_bits')(bytes_of_all_kinds, 1)"


def _byte_bits() -> float:
    """A kernel in a few lines, called as if for the first time: the entropy of bytes, here of all alike."""
    found: float = compiled.Kernel("standalone", "byte_bits")(np.arange(256, dtype=np.uint8), 1)
    return found


@pytest.fixture
def _compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels are compiled when first called, and cached in a folder of this test's."""
    pytest.importorskip("numba", reason="kernels are compiled by Numba")
    monkeypatch.setenv(library.CHOICE, "jit")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


def test_the_prebuilt_kernels_need_no_compiler() -> None:
    subprocess.run([sys.executable, "-c", _ROUND_TRIP], check=True)


def test_the_library_has_every_kernel_that_the_codec_calls() -> None:
    """By name here; all other tests show that it has them for every type, since none of them compiles."""
    called = set()
    for path in (*_CODEC.glob("*.py"), *_CODEC.glob("methods/*.py"), *_CODEC.glob("low_rank/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called.add((node.value.id, node.attr))
    rooms = {name for name, value in vars(compiled).items() if isinstance(value, compiled.Kernels)}
    defined = {
        (room, node.name)
        for room in rooms
        for node in ast.parse((_CODEC / "kernels" / f"{room}.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {(s.module, s.kernel) for s in signatures()} == called & defined


def test_the_tests_do_not_compile_what_they_test() -> None:
    """Where the environment chooses a level, it is that level's kernels that all tests run."""
    found = library.prebuilt()
    if os.environ.get(library.CHOICE) == "jit":
        pytest.skip("kernels that are compiled are what is tested")
    assert found is not None
    assert found.level == os.environ.get(library.CHOICE, found.level)
    assert found.level in LEVELS["arm64" if str(platform()).endswith("arm64") else "x86_64"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork with")
def test_a_process_that_is_forked_while_a_kernel_is_loaded_can_load_it_too() -> None:
    begin = "import numpy as np; bytes_of_all_kinds = np.arange(256, dtype=np.uint8)"
    script = begin + _FORK.replace("CALL", _BYTE_BITS)
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("_compiling")
def test_kernels_that_are_compiled_are_cached_and_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jit._announce.cache_clear()
    with caplog.at_level(logging.WARNING, "deltaweights"):
        assert _byte_bits() == 8
        bits = np.zeros(16, np.uint16)
        compiled.Kernel("standalone", "upper_words")(bits, np.empty(16, np.uint32))
    assert [record.message for record in caplog.records] == [
        "compiling the codec for this processor, which takes some seconds, once"
    ]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    monkeypatch.setitem(sys.modules, "deltaweights.codec.build", None)  # the cache needs no compiler
    assert _byte_bits() == 8


@pytest.mark.usefixtures("_compiling")
def test_what_a_kernel_does_not_take_is_refused(tmp_path: Path) -> None:
    """Not one of these may reach machine code that would take it for something else."""
    bits, fit = compiled.Kernel("standalone", "byte_bits"), compiled.Kernel("difference", "fit_shifts")
    three = np.zeros(3, np.int64)
    for kernel, arguments in (
        (bits, (8.0, 32)),
        (bits, (three,)),
        (fit, (np.zeros(5, np.float32), three, three)),
        (fit, (np.zeros((5, 1), np.int32), three, three)),
    ):
        with pytest.raises(TypeError):
            kernel(*arguments)
    with pytest.raises(ValueError, match="byte order"):
        bits(np.zeros(5, np.int64).astype(np.dtype(np.int64).newbyteorder()), three)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("_compiling")
def test_without_a_library_and_a_compiler_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltaweights.codec.build", None)
    with pytest.raises(DeltaWeightsError, match="no machine code for this computer") as caught:
        _byte_bits()
    assert "numba" in caught.value.fix


def test_the_error_names_the_kernel_that_a_library_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "deltaweights.codec.build", None)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "why_none", lambda: "")
    with pytest.raises(DeltaWeightsError) as caught:
        jit.compiled("standalone", "byte_bits", ["u2.1", "i"])
    assert caught.value.why.startswith("The prebuilt kernels lack standalone.byte_bits(u2.1, i). ")


def test_kernels_that_are_not_there_can_not_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.CHOICE, "pdp-11")
    with pytest.raises(DeltaWeightsError, match="pdp-11"):
        library._loaded.__wrapped__()


def test_a_library_that_is_unfit_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Missing, something else, built from other sources: kernels are compiled then."""
    here = platform()
    assert here is not None
    whole = library.library_path(here)
    missing, garbage, other, copy = (tmp_path / name for name in ("missing", "garbage", "other", "copy"))
    garbage.write_bytes(b"no library" * 1000)
    shutil.copy(next(Path(np.__file__).parent.rglob("*.so")), other)
    shutil.copy(whole, copy)
    monkeypatch.delenv(library.CHOICE, raising=False)
    for path, why in ((missing, "No such file"), (garbage, "garbage"), (other, library.ABOUT)):
        monkeypatch.setattr(library, "library_path", lambda on, path=path: path)
        assert why in str(library._loaded.__wrapped__())
        assert not library.is_current(path, [])
    assert library.is_current(copy, [])
    assert not library.is_current(copy, ["pdp-11"])
    assert not library.is_current(copy, [], "another compiler")
    monkeypatch.setattr(library, "library_path", lambda on: copy)
    monkeypatch.setattr(library, "digest_of_sources", lambda: "0" * 64)
    assert "other sources" in str(library._loaded.__wrapped__())
    assert not library.is_current(copy, [])


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_a_library_that_is_cut_off_is_not_loaded(tmp_path: Path, share: float) -> None:
    """The system would map it, and kill the process where it is read. So this is tried in one of its own."""
    here = platform()
    assert here is not None
    content = library.library_path(here).read_bytes()
    (tmp_path / "cut.so").write_bytes(content[: int(len(content) * share)])
    code = """
import sys
from pathlib import Path
from deltaweights.codec.library import Library
try: Library(Path(sys.argv[1]))
except ValueError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cut.so"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cut.so is cut off" in done.stdout


def test_kernels_take_contiguous_arrays_only() -> None:
    bits = np.arange(64, dtype=np.uint16)
    with pytest.raises(ValueError, match="contiguous"):
        compiled.standalone.upper_words(bits[::2], np.empty(32, np.uint32))


def test_read_only_arrays_of_any_width_are_taken() -> None:
    """What is not written to may be somebody else's: bytes, a file that is mapped."""
    for dtype, size in (("F8_E5M2", 1), ("BF16", 2), ("F32", 4), ("F64", 8)):
        base = np.frombuffer(bytes(range(256)) * 32 * size, np.uint8)
        encoded = payload.encode(base, base[::-1].copy(), dtype)
        assert np.array_equal(payload.decode(base, encoded, dtype), base[::-1])


#: What CPUID leaves, as (leaf, register): bits. From Intel's manual, of processors of these kinds.
_NEHALEM = {(1, 2): {0, 9, 13, 19, 20, 23}, (0x80000001, 2): {0}}
_HASWELL = {
    (1, 2): _NEHALEM[1, 2] | {12, 22, 27, 28, 29},
    (7, 1): {3, 5, 8},
    (0x80000001, 2): {0, 5},
}
_SKYLAKE_X = {**_HASWELL, (7, 1): _HASWELL[7, 1] | {16, 17, 28, 30, 31}}
_ICE_LAKE = {**_SKYLAKE_X, (7, 2): {1, 6, 11, 12, 14}}


@pytest.mark.parametrize(
    ("processor", "most_basic", "saved", "expected"),
    [
        ({}, 13, 0, 0),
        (_NEHALEM, 11, 0, 1),
        (_HASWELL, 13, 0x07, 2),
        (_HASWELL, 13, 0x03, 1),  # the system does not save the registers of AVX
        (_HASWELL, 6, 0x07, 1),  # leaf 7 is not there, and what comes for it is another leaf's
        (_SKYLAKE_X, 22, 0xE7, 3),
        (_SKYLAKE_X, 22, 0x07, 2),  # nor those of AVX-512
        (_ICE_LAKE, 27, 0xE7, 4),
    ],
)
def test_a_processor_gets_the_best_level_that_it_can_run(
    processor: dict[tuple[int, int], set[int]], most_basic: int, saved: int, expected: int
) -> None:
    def cpuid(leaf: int, subleaf: int) -> tuple[int, ...]:
        if leaf in (0, 0x80000000):
            return (most_basic if leaf == 0 else 0x80000008, 0, 0, 0)
        return tuple(sum(1 << bit for bit in processor.get((leaf, k), ())) for k in range(4))

    assert tuple(x86_levels(cpuid, lambda: saved)) == LEVELS["x86_64"][:expected]


def test_the_register_is_not_asked_for_where_that_would_be_a_fault() -> None:
    def cpuid(leaf: int, subleaf: int) -> tuple[int, ...]:
        bits = _NEHALEM.get((leaf, 2), set())
        return (13 if leaf == 0 else 0x80000008, 0, sum(1 << bit for bit in bits), 0)

    def xcr0() -> int:
        raise AssertionError("XGETBV is an illegal instruction here")

    assert x86_levels(cpuid, xcr0) == ["x86-64-v2"]
