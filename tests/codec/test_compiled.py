"""How kernels come into a process: from disk without Numba, compiled where they are missing or damaged."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltaweights import codec
from deltaweights.codec import compiled, store

_ROUND_TRIP = """
import sys
import numpy as np
from deltaweights import codec

base = np.arange(1 << 15, dtype=np.uint16).view(np.uint8)
for moved in (1, 1 << 9):  # few elements, and many
    target = base.copy()
    target[:: 4096 // moved] ^= 1
    payload = codec.encode(base, target, "BF16")
    assert np.array_equal(codec.decode(base, payload, "BF16"), target)
sys.exit("numba" in sys.modules)
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
    os._exit(compiled.Kernel("runs", "log_span")(8, 32) != 8)
assert os.waitpid(child, 0)[1] == 0
assert compiled.Kernel("runs", "log_span")(8, 32) == 8
"""


def test_kernels_on_disk_need_no_numba() -> None:
    """The first process may have to compile; the second finds everything it needs."""
    subprocess.run([sys.executable, "-c", _ROUND_TRIP], check=False)
    subprocess.run([sys.executable, "-c", _ROUND_TRIP], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork with")
def test_a_process_that_is_forked_while_a_kernel_is_loaded_can_load_it_too() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's for object files, and no other."""
    monkeypatch.setattr(store, "_places", lambda: iter([tmp_path / "kernels"]))
    return tmp_path / "kernels"


def _log_span() -> int:
    """A kernel in a few lines, called as if for the first time: log2 of how many tokens bytes have."""
    found: int = compiled.Kernel("runs", "log_span")(8, 32)
    return found


def test_a_damaged_object_file_is_made_anew(places: Path) -> None:
    assert _log_span() == 8
    (file,) = (path for path in places.rglob("*") if path.is_file())
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        file.write_bytes(damaged)
        assert _log_span() == 8
        assert file.read_bytes() == whole


def test_without_a_place_to_keep_them_kernels_work_all_the_same(places: Path) -> None:
    places.write_text("a file where the folder should be")
    assert _log_span() == 8


def test_a_user_without_a_home_has_the_other_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert list(store._places()) == [tmp_path, Path(store.__file__).parent / "__pycache__"]


def test_two_processes_that_make_the_folder_at_once_both_use_it(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes it after this one looked."""
    folder = places / store._folder()
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: False)
        store.kept("a file", lambda: b"content")
    assert (folder / "a file").exists()


def test_what_a_kernel_does_not_take_is_refused(places: Path) -> None:
    """Not one of these may reach machine code that would take it for something else."""
    span, limits = compiled.Kernel("runs", "log_span"), compiled.Kernel("delta", "plane_limits")
    three = np.zeros(3, np.int64)
    for kernel, arguments in (
        (span, (8.0, 32)),
        (span, (8,)),
        (limits, (np.zeros(5, np.float32), three)),
        (limits, (np.zeros((5, 1), np.int64), three)),
    ):
        with pytest.raises(TypeError):
            kernel(*arguments)
    with pytest.raises(ValueError, match="byte order"):
        limits(np.zeros(5, np.int64).astype(np.dtype(np.int64).newbyteorder()), three)
    assert not [path for path in places.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["NUMBA_CPU_NAME", "NUMBA_OPT", "NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO"])
def test_kernels_made_under_other_settings_are_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones, made to look for a mistake in somebody's program, must not stay for everybody."""
    monkeypatch.delenv(name, raising=False)
    usual = store._folder.__wrapped__()
    monkeypatch.setenv(name, "1")
    assert store._folder.__wrapped__() != usual


def test_compiling_is_announced_once(places: Path, caplog: pytest.LogCaptureFixture) -> None:
    store._announce.cache_clear()
    with caplog.at_level(logging.WARNING, "deltaweights"):
        _log_span()
        compiled.Kernel("runs", "coarse_weight")(3, 1)
    assert [record.message for record in caplog.records] == [
        "compiling the codec for this processor, which takes some seconds, once"
    ]


def test_kernels_take_contiguous_arrays_only() -> None:
    bits = np.arange(64, dtype=np.uint16)
    with pytest.raises(ValueError, match="contiguous"):
        compiled.alone.upper_words(bits[::2], np.empty(32, np.uint32))


def test_read_only_arrays_of_any_width_are_taken() -> None:
    """What is not written to may be somebody else's: bytes, a file that is mapped."""
    for dtype, size in (("F8_E5M2", 1), ("BF16", 2), ("F32", 4), ("F64", 8)):
        base = np.frombuffer(bytes(range(256)) * 32 * size, np.uint8)
        payload = codec.encode(base, base[::-1].copy(), dtype)
        assert np.array_equal(codec.decode(base, payload, dtype), base[::-1])
