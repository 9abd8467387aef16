"""Killed at any instant, interrupted, run twice at once: no wrong file under a final name, and it goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deltaweights import DeltaError, OutputError, apply_delta, make_delta, verify_delta

from .checkpoints import Array, bf16, contents, digests, weights, write_safetensors
from .conftest import Trio

_SHARDS = 10
_ON = "Interrupted. Run the same command again to go on.\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """A pair of 60 MB in ten shards and small files, and its delta: work that takes a while."""
    folder = tmp_path_factory.mktemp("large")
    trio = Trio(folder / "base", folder / "target", folder / "delta")
    update = weights((1024, 1024), 99, 2e-4)
    for k in range(_SHARDS):
        old = weights((1024, 1024), k)
        for side, moved in ((trio.base, old), (trio.target, old + np.roll(update, k))):
            write_safetensors(side / f"model-{k:02d}.safetensors", _tensors(moved))
    (trio.target / "tokenizer").mkdir()
    (trio.target / "tokenizer" / "vocab.json").write_text(json.dumps(list(range(50_000))))
    (trio.target / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    make_delta(trio.base, trio.target, trio.delta)
    yield trio
    shutil.rmtree(folder)


# The instants are amounts of bytes on the disk: one at random out of each twelfth of the run.
@pytest.mark.parametrize("twelfth", range(12))
def test_apply_killed_at_any_instant_leaves_no_wrong_file_and_goes_on(
    large: Trio, tmp_path: Path, twelfth: int
) -> None:
    out = tmp_path / "out"
    kill_at = (twelfth + random.Random(twelfth).random()) / 12 * _size(large.target)
    with _started(*_arguments("apply", large, out)) as process:
        _wait_until(process, lambda: _size(out) >= kill_at)
        process.kill()

    finished = _assert_only_right_files(out, digests(large.target))
    before = _identities(out)
    report = apply_delta(large.delta, out, base=large.base)
    assert set(report.kept) == finished
    assert {path: _identities(out)[path] for path in finished} == before, "finished files were redone"
    assert contents(out) == contents(large.target)
    assert not (out / ".deltaweights").exists()


def test_apply_killed_again_and_again_comes_to_an_end(large: Trio, tmp_path: Path) -> None:
    out, right = tmp_path / "out", digests(large.target)
    choice = random.Random(0)
    done: set[str] = set()
    for _ in range(4):
        kill_at = _size(out) + choice.random() * _size(large.target) / 4
        with _started(*_arguments("apply", large, out)) as process:
            _wait_until(process, lambda at=kill_at: _size(out) >= at)  # type: ignore[misc]
            process.kill()
        finished = _assert_only_right_files(out, right)
        assert finished >= done
        done = finished
    with _started(*_arguments("apply", large, out)) as process:
        assert process.wait() == 0
    assert digests(out) == right
    assert not (out / ".deltaweights").exists()


@pytest.mark.parametrize("sixth", range(6))
def test_diff_killed_at_any_instant_goes_on_to_the_same_delta(
    large: Trio, tmp_path: Path, sixth: int
) -> None:
    delta, right = tmp_path / "delta", digests(large.delta)
    kill_at = (sixth + random.Random(sixth).random()) / 6 * _size(large.delta)
    with _started(*_arguments("diff", large, delta)) as process:
        _wait_until(process, lambda: _size(delta) >= kill_at)
        process.kill()

    finished = _assert_only_right_files(delta, right)
    if "deltaweights.json" not in finished:
        with pytest.raises(DeltaError, match=r"not a delta|no file or folder"):
            apply_delta(delta, tmp_path / "out", base=large.base)
        assert not (tmp_path / "out").exists()
    make_delta(large.base, large.target, delta)
    assert digests(delta) == right
    assert verify_delta(delta).ok


def test_a_target_changed_between_a_killed_diff_and_the_next_is_the_one_in_the_delta(
    large: Trio, tmp_path: Path
) -> None:
    target, delta = tmp_path / "target", tmp_path / "delta"
    shutil.copytree(large.target, target)
    with _started(*_arguments("diff", large._replace(target=target), delta)) as process:
        _wait_until(process, (delta / "delta-00001-of-00010.safetensors").exists)
        process.kill()
    write_safetensors(target / "model-00.safetensors", _tensors(weights((1024, 1024), 77)))

    make_delta(large.base, target, delta)
    apply_delta(delta, tmp_path / "out", base=large.base)
    assert digests(tmp_path / "out") == digests(target)


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_ctrl_c_says_in_one_line_how_to_go_on(large: Trio, tmp_path: Path, verb: str) -> None:
    out, right = tmp_path / "out", large.target if verb == "apply" else large.delta
    arguments = _arguments(verb, large, out)
    with _started(*arguments) as process:
        _wait_until(process, lambda: _size(out) >= _size(right) / 3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith(_ON)
    assert "Traceback" not in stderr
    assert not list(out.rglob("*.partial"))
    _assert_only_right_files(out, digests(right))

    with _started(*arguments) as process:
        assert process.wait() == 0
    assert digests(out) == digests(right)


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_ctrl_c_at_the_first_sign_of_life(large: Trio, tmp_path: Path, verb: str) -> None:
    with _started(*_arguments(verb, large, tmp_path / "out")) as process:
        assert process.stderr
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert first
    assert process.returncode == 130
    assert stderr.endswith(_ON)
    assert "Traceback" not in stderr


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_second_writer_to_one_folder_is_refused(large: Trio, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    writers: dict[str, Callable[[], object]] = {
        "apply": lambda: apply_delta(large.delta, out, base=large.base, force=True),
        "diff": lambda: make_delta(large.base, large.target, out, force=True),
    }
    with _started(*_arguments("apply", large, out)) as process:
        _wait_until(process, lambda: _size(out) > 0)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        before = contents(out)
        with pytest.raises(OutputError, match="another deltaweights process"):
            writers[verb]()
        assert contents(out) == before
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    assert contents(out) == contents(large.target)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("instant", [0, 1, 7])
@pytest.mark.parametrize("phase", ["diff", "check base", "apply", "verify delta", "rebuild"])
def test_an_interruption_in_any_phase_comes_through_and_ends_the_work(
    trio: Trio, tmp_path: Path, phase: str, instant: int, threads: int
) -> None:
    """Raised in the caller's progress function, which is where a notebook's stop button may hit."""
    calls = iter(range(1_000_000))

    def interrupt(now: str, done: int, total: int) -> None:
        if now == phase and next(calls) == instant:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", {"threads": threads, "progress": interrupt}
    run: Callable[[], object] = {
        "diff": lambda: make_delta(trio.base, trio.target, out, chunk_bytes=4096, **options),  # type: ignore[arg-type]
        "check base": lambda: apply_delta(trio.delta, out, base=trio.base, **options),  # type: ignore[arg-type]
        "apply": lambda: apply_delta(trio.delta, out, base=trio.base, **options),  # type: ignore[arg-type]
        "verify delta": lambda: verify_delta(trio.delta, **options),  # type: ignore[arg-type]
        "rebuild": lambda: verify_delta(trio.delta, base=trio.base, **options),  # type: ignore[arg-type]
    }[phase]
    outcomes: list[str] = []

    def observe() -> None:
        try:
            run()
            outcomes.append("done")
        except KeyboardInterrupt:
            outcomes.append("interrupted")
        outcomes.append("over")  # nothing waits for ever when the exception is let go

    thread = threading.Thread(target=observe, daemon=True)
    thread.start()
    thread.join(20)
    assert outcomes in (["interrupted", "over"], ["done", "over"])
    assert outcomes[0] == "interrupted" or next(calls) <= instant
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_after(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _record_writes(monkeypatch)
    apply_delta(trio.delta, tmp_path / "out", base=trio.base)
    make_delta(trio.base, trio.target, tmp_path / "delta")
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "delta").rglob("*")]:
        if path.is_file():
            file, folder = path.stat().st_ino, path.parent.stat().st_ino
            named = events.index(("replace", file))
            assert ("fsync", file) in events[:named], f"{path} got its name too early"
            assert ("fsync", folder) in events[named:], f"the name of {path} may be lost"


def test_a_new_folder_is_on_the_disk_when_the_run_ends(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of a folder secures the names in it, not its own name in its parent."""
    events = _record_writes(monkeypatch)
    apply_delta(trio.delta, tmp_path / "out", base=trio.base)
    make_delta(trio.base, trio.target, tmp_path / "delta")
    for root in (tmp_path / "out", tmp_path / "delta"):
        for folder in (path for path in root.rglob("*") if path.is_dir()):
            made = events.index(("mkdir", folder.stat().st_ino))
            assert ("fsync", folder.parent.stat().st_ino) in events[made:], f"{folder} may be lost"


def _tensors(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> dict[str, Array]:
    """Three tensors of 2 MB."""
    return {f"model.{k}": bf16(np.roll(values, k)) for k in range(3)}


def _arguments(verb: str, trio: Trio, out: Path) -> tuple[str | Path, ...]:
    """The command line that makes the target or the delta in ``out``."""
    if verb == "apply":
        return "apply", trio.delta, "-o", out, "--base", trio.base
    return "diff", trio.base, trio.target, "-o", out


@contextmanager
def _started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``python -m deltaweights`` with the arguments, running; killed in the end if it still is."""
    command = [sys.executable, "-m", "deltaweights", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.send_signal(signal.SIGCONT)


def _wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        os.sched_yield()


def _size(folder: Path) -> int:
    """Bytes on the disk below a folder, in half-made files too."""
    size = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    size += _size(Path(entry.path))
                else:
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:  # renamed or removed at this moment
        pass
    return size


def _assert_only_right_files(out: Path, right: dict[str, str]) -> set[str]:
    """Every file that has its final name has its right content. Returns their paths."""
    found = {path: sha for path, sha in digests(out).items() if not path.startswith(".deltaweights/")}
    assert found.items() <= right.items()
    return set(found)


def _identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every finished file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and ".deltaweights" not in path.parts
    }


def _record_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The calls of fsync, replace and mkdir from now on, in order, each with its file's inode."""
    events: list[tuple[str, int]] = []
    fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

    def recorded_fsync(fd: int) -> None:
        fsync(fd)
        events.append(("fsync", os.fstat(fd).st_ino))

    def recorded_replace(source: Path, target: Path, **handles: int | None) -> None:
        events.append(("replace", os.stat(source, dir_fd=handles.get("src_dir_fd")).st_ino))
        replace(source, target, **handles)

    def recorded_mkdir(path: Path, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        events.append(("mkdir", os.stat(path, dir_fd=dir_fd).st_ino))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "mkdir", recorded_mkdir)
    return events
