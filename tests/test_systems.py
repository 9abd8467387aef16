"""Other systems than Linux, and other file systems: what they lack is done without, or said."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaweights import OutputError, apply_delta
from deltaweights.checkpoint import LocalSource, OutputFolder, system
from deltaweights.torch import DeltaCheckpointer, DeltaPublisher, DeltaSubscriber

from .checkpoints import contents
from .conftest import CHUNK_BYTES, Trio
from .test_stream import Net, bits, train

#: What Python has on Linux and not, or not everywhere, on other systems.
_LINUX_ONLY = (
    "copy_file_range", "eventfd", "fdatasync", "getrandom", "memfd_create", "pidfd_open", "posix_fadvise",
    "posix_fallocate", "preadv", "pwritev", "sched_getaffinity", "sched_setaffinity", "sendfile", "setns",
    "splice", "sync", "timerfd_create", "unshare", "getxattr", "setxattr", "listxattr",
    "O_DIRECT", "O_LARGEFILE", "O_NOATIME", "O_PATH", "O_RSYNC", "O_TMPFILE",
)  # fmt: skip


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, without what only Linux has."""
    for name in _LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)


# Calls -----------------------------------------------------------------------------------------------


def test_nothing_that_only_linux_has_is_needed(trio: Trio, tmp_path: Path) -> None:
    """A process that never had it: nothing is asked for on import either."""
    program = f"""
import os, sys
for name in {_LINUX_ONLY}:
    if hasattr(os, name):
        delattr(os, name)
from deltaweights import apply_delta, make_delta, verify_delta
base, target, delta, out = sys.argv[1:]
make_delta(base, target, delta, chunk_bytes={CHUNK_BYTES})
apply_delta(delta, out, base=base)
assert verify_delta(delta, base=base, target=out).ok
"""
    delta, out = tmp_path / "delta", tmp_path / "out"
    command = [sys.executable, "-c", program, *map(str, (trio.base, trio.target, delta, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(delta) == contents(trio.delta)
    assert contents(out) == contents(trio.target)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("instant", [1, 4])
def test_an_interrupted_apply_goes_on_elsewhere(trio: Trio, tmp_path: Path, instant: int) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "apply" and done * 5 >= total * instant:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        apply_delta(trio.delta, out, base=trio.base, threads=1, progress=interrupt)
    assert not list(out.rglob("*.partial"))
    finished = contents(out)
    assert finished.items() <= contents(trio.target).items()
    report = apply_delta(trio.delta, out, base=trio.base)
    assert set(report.kept) == set(finished)
    assert contents(out) == contents(trio.target)


@pytest.mark.usefixtures("elsewhere")
def test_a_stream_is_published_and_followed_elsewhere(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(tmp_path / "stream")
    with DeltaPublisher(tmp_path / "stream", model, anchor_every=2) as publisher:
        for step in (1, 2, 3):
            train(model, step)
            publisher.publish(step, model)
            subscriber.sync(engine)
            assert bits(engine) == bits(model)
    late = Net(seed=5)
    assert DeltaSubscriber(tmp_path / "stream").sync(late).from_anchor
    assert bits(late) == bits(model)


@pytest.fixture(params=["all at once", "part by part", "elsewhere", "elsewhere, part by part"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ways in which a system reads and writes."""
    way: str = request.param
    if way.startswith("elsewhere"):
        request.getfixturevalue("elsewhere")
    if way.endswith("part by part"):
        monkeypatch.setattr(system, "_MOST_BYTES", 7)
        for name in ("preadv", "pwritev", "pread", "pwrite"):
            if hasattr(os, name):
                monkeypatch.setattr(os, name, _at_most(7, getattr(os, name)))
    return way


def _at_most(limit: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A read or write as macOS has it, which takes so many bytes and no more."""

    def limited(fd: int, what: Any, offset: int) -> Any:
        nbytes = what if isinstance(what, int) else sum(map(len, what if isinstance(what, list) else [what]))
        _require(nbytes <= limit)
        return call(fd, what, offset)

    return limited


def test_all_is_written_and_read_however_much_a_system_takes_at_once(tmp_path: Path, ways: str) -> None:
    del ways
    parts = [os.urandom(size) for size in (1, 7, 0, 100, 8)]
    content = b"".join(parts)
    with OutputFolder(tmp_path / "out") as folder, folder.create("x") as file:
        file.write_at(3, *parts)
        file.write_at(0, b"abc")
        assert file.digest() == (len(content) + 3, hashlib.sha256(b"abc" + content).hexdigest())
        file.commit()
    source = LocalSource(tmp_path / "out")
    opened = source.open("x")
    assert (opened.read(0, 3), opened.read(3, len(content))) == (b"abc", content)
    assert b"".join(source.blocks("x")) == b"abc" + content
    out = np.empty(len(content), np.uint8)
    opened.read_into(3, out)
    assert out.tobytes() == content
    source.close()


# Flushing --------------------------------------------------------------------------------------------

_FULL = 51  # what macOS calls F_FULLFSYNC


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Each call of F_FULLFSYNC, fsync and replace, with its file's inode, on a system that has the first."""
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(place: Any, *rest: Any) -> Any:
            events.append((name, os.stat(place).st_ino))
            return call(place, *rest)

        return recorded

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", _FULL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", record("full", lambda fd, command: _require(command == _FULL)))
    monkeypatch.setattr(os, "fsync", record("fsync", fsync))
    monkeypatch.setattr(os, "replace", record("replace", replace))
    yield events
    monkeypatch.undo()


def test_where_fsync_does_not_reach_the_drive_the_call_that_does_is_made(
    trio: Trio, tmp_path: Path, flushed: list[tuple[str, int]]
) -> None:
    out = tmp_path / "out"
    apply_delta(trio.delta, out, base=trio.base)
    for path in out.rglob("*"):
        if path.is_file():
            named = flushed.index(("replace", path.stat().st_ino))
            assert ("full", path.stat().st_ino) in flushed[:named]
            assert ("full", path.parent.stat().st_ino) in flushed[named:]
    assert "fsync" not in dict(flushed)


@pytest.mark.parametrize("code", ["ENOTSUP", "EINVAL", "ENOTTY"])
def test_where_the_file_system_refuses_that_call_fsync_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[tuple[str, int]], code: str
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", _raise(getattr(errno, code)))
    with OutputFolder(tmp_path) as folder:
        _write(folder, "x")
    file, root = (path.stat().st_ino for path in (tmp_path / "x", tmp_path))
    assert [event for event in flushed if event[1] in (file, root)][-3:] == [
        ("fsync", file),
        ("replace", file),
        ("fsync", root),
    ]


def test_a_file_that_cannot_be_flushed_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[tuple[str, int]]
) -> None:
    with OutputFolder(tmp_path) as folder:
        monkeypatch.setattr(fcntl, "fcntl", _raise(errno.EIO))
        with pytest.raises(OutputError, match="Cannot write x"):
            _write(folder, "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "EBADF"])
def test_a_folder_that_cannot_be_flushed_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    fsync = os.fsync

    def files_only(fd: int) -> None:
        if os.path.isdir(f"/dev/fd/{fd}"):
            raise OSError(getattr(errno, code), "")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    with OutputFolder(tmp_path / "out") as folder:
        _write(folder, "sub/x")
    assert contents(tmp_path / "out") == {"sub/x": b"content"}


# Locks and renaming ----------------------------------------------------------------------------------

_LOCKLESS = ["ENOTSUP", "EOPNOTSUPP", "ENOLCK", "ENOSYS"]


@pytest.mark.parametrize("code", _LOCKLESS)
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", _raise(getattr(errno, code)))
    with OutputFolder(tmp_path / "out") as folder:
        _write(folder, "x")
    assert contents(tmp_path / "out") == {"x": b"content"}


@pytest.mark.parametrize("code", _LOCKLESS)
def test_checkpoints_are_kept_on_a_file_system_without_locks(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", _raise(getattr(errno, code)))
    with DeltaCheckpointer(tmp_path / "run", trio.base) as checkpointer:
        assert checkpointer.steps == []


@pytest.mark.parametrize("is_new", [True, False])
def test_a_lock_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    root = tmp_path / "out"
    if not is_new:
        root.mkdir()
    monkeypatch.setattr(fcntl, "flock", _raise(errno.EIO))
    with pytest.raises(OutputError, match="Cannot write to"), OutputFolder(root):
        pass
    assert root.exists() != is_new
    assert is_new or os.listdir(root) == []
    with pytest.raises(OutputError, match="Cannot lock") as caught:
        DeltaCheckpointer(root, "base")
    assert caught.value.fix


def test_no_file_is_open_when_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse that."""
    replace = os.replace

    def closed_only(source: Path, target: Path) -> None:
        info = os.stat(source)
        for fd in range(os.dup(0)):
            try:
                is_open = os.path.samestat(os.fstat(fd), info)
            except OSError:
                continue
            _require(not is_open)
        replace(source, target)

    monkeypatch.setattr(os, "replace", closed_only)
    with OutputFolder(tmp_path) as folder:
        _write(folder, "x")
    assert contents(tmp_path) == {"x": b"content"}


def test_a_file_system_that_renames_nothing_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", _raise(errno.ENOTSUP))
    with OutputFolder(tmp_path) as folder:
        with pytest.raises(OutputError, match="Cannot write x") as caught:
            _write(folder, "x")
        assert "another file system" in caught.value.fix
    assert os.listdir(tmp_path) == []


# Windows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import deltaweights; print(deltaweights.__version__)", ""),
        ("import deltaweights.torch; print('there')", ""),
        ("import sys; sys.argv[1:] = ['--help']; from deltaweights.cli import main; main()", ""),
        ("import sys; sys.argv[1:] = ['--version']; from deltaweights.cli import main; main()", ""),
        (
            "import sys; sys.argv[1:] = ['verify', 'delta']; from deltaweights.cli import main; main()",
            "error: deltaweights does not run on this system\n",
        ),
        ("from deltaweights import make_delta", "DeltaWeightsError: deltaweights does not run on"),
    ],
)
def test_without_posix_there_is_help_and_a_way_out(program: str, said: str) -> None:
    """As on Windows, whose Python has no fcntl."""
    hidden = f"import sys; sys.modules['fcntl'] = None; {program}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    if not said:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    else:
        assert done.returncode == 1
        assert said in done.stderr
        assert "WSL" in done.stderr
        assert "ModuleNotFoundError" not in done.stderr


# Helpers ---------------------------------------------------------------------------------------------


def _write(folder: OutputFolder, path: str, content: bytes = b"content") -> None:
    with folder.create(path) as file:
        file.write_at(0, content)
        file.commit()


def _raise(code: int) -> Callable[..., Any]:
    def call(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def _require(holds: bool) -> None:
    assert holds
