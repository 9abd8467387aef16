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

from deltaweights import OutputError, apply_delta, make_delta, verify_delta
from deltaweights.storage import LocalSource, OutputFolder, is_within, system
from deltaweights.storage import file_names as names

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import CHUNK_BYTES, LINUX_ONLY, Trio

# Calls -----------------------------------------------------------------------------------------------


def test_nothing_that_only_linux_has_is_needed(trio: Trio, tmp_path: Path) -> None:
    """A process that never had it: nothing is asked for on import either."""
    program = f"""
import os, sys
for name in {LINUX_ONLY}:
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
        def recorded(place: Any, *rest: Any, **handles: Any) -> Any:
            events.append((name, os.stat(place, dir_fd=handles.get("src_dir_fd")).st_ino))
            return call(place, *rest, **handles)

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
    monkeypatch.setattr(fcntl, "fcntl", raises(getattr(errno, code)))
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
        monkeypatch.setattr(fcntl, "fcntl", raises(errno.EIO))
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

#: How a file system says that it has no locks.
LOCKLESS = ["ENOTSUP", "EOPNOTSUPP", "ENOLCK", "ENOSYS"]


@pytest.mark.parametrize("code", LOCKLESS)
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", raises(getattr(errno, code)))
    with OutputFolder(tmp_path / "out") as folder:
        _write(folder, "x")
    assert contents(tmp_path / "out") == {"x": b"content"}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_lock_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    root = tmp_path / "out"
    if not is_new:
        root.mkdir()
    monkeypatch.setattr(fcntl, "flock", raises(errno.EIO))
    with pytest.raises(OutputError, match="Cannot write to"), OutputFolder(root):
        pass
    assert root.exists() != is_new
    assert is_new or os.listdir(root) == []


def test_no_file_is_open_when_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse that."""
    replace = os.replace

    def closed_only(source: Path, target: Path, **handles: Any) -> None:
        info = os.stat(source, dir_fd=handles["src_dir_fd"])
        for fd in range(os.dup(0)):
            try:
                is_open = os.path.samestat(os.fstat(fd), info)
            except OSError:
                continue
            _require(not is_open)
        replace(source, target, **handles)

    monkeypatch.setattr(os, "replace", closed_only)
    with OutputFolder(tmp_path) as folder:
        _write(folder, "x")
    assert contents(tmp_path) == {"x": b"content"}


def test_a_file_system_that_renames_nothing_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", raises(errno.ENOTSUP))
    with OutputFolder(tmp_path) as folder:
        with pytest.raises(OutputError, match="Cannot write x") as caught:
            _write(folder, "x")
        assert "another file system" in caught.value.fix
    assert os.listdir(tmp_path) == []


# Names -----------------------------------------------------------------------------------------------

_ALIKE = [
    ("a.json", "A.json"),
    ("caf\u00e9", "cafe\u0301"),
    ("caf\u00e9", "CAFE\u0301"),
    ("stra\u00dfe", "STRASSE"),
    ("\u212a", "k"),
    ("\u0131", "I"),
    ("a\u200d", "a"),
    ("a.", "a"),
    ("a ", "a"),
]


@pytest.mark.parametrize(("one", "other"), _ALIKE)
def test_names_that_may_be_one_file_are_spelled_alike(one: str, other: str) -> None:
    assert names.spelling(one) == names.spelling(other)
    assert list(names.alike([f"x/{one}", f"x/{other}", "x/b"])) == [("x/", sorted([one, other]))]
    assert list(names.alike([f"{one}/1", f"{other}/2"])) == [("", sorted([one, other]))]
    assert list(names.alike([f"x/{one}", f"y/{other}", f"x/{one}/z"])) == []


@pytest.mark.parametrize("name", [".g\u200dit", ".deltaweight\u017f", ".GIT", ".git."])
def test_names_that_may_be_reserved_ones_are_found(name: str) -> None:
    reserved = ".git" if "g" in name.lower()[:2] else ".deltaweights"
    assert list(names.alike([f"sub/{name}/x"])) == [("sub/", sorted([name, reserved]))]


@pytest.mark.parametrize(("one", "other"), _ALIKE)
def test_the_file_system_says_which_names_are_one(tmp_path: Path, one: str, other: str) -> None:
    for name in ("asked", "seen"):
        (tmp_path / name).mkdir()
    (tmp_path / "seen" / one).touch()
    are_one = (tmp_path / "seen" / other).exists()
    found = names.same_names(tmp_path / "asked", ["first", one, other, "last"])
    assert found == ((one, other) if are_one else None)


def test_a_name_that_leads_to_the_same_file_is_the_same_name(tmp_path: Path) -> None:
    """A link is what comes nearest, on a file system that tells all names apart."""
    (tmp_path / "B").symlink_to("a")
    assert names.same_names(tmp_path, ["a", "c", "B"]) == ("a", "B")


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a file system that takes no notice of case."""

    def same_names(folder: Path, asked: list[str]) -> tuple[str, str] | None:
        seen: dict[str, str] = {}
        for name in asked:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                return other, name
        return None

    monkeypatch.setattr("deltaweights.storage.output.same_names", same_names)


@pytest.fixture
def case_counts(tmp_path: Path) -> None:
    """Skip where a test cannot make files that differ in case."""
    (tmp_path / "probe").touch()
    if (tmp_path / "PROBE").exists():
        pytest.skip("the file system here takes no notice of case")


@pytest.fixture
def cased(tmp_path: Path, case_counts: None) -> Trio:
    """A pair of which the target has files that differ in case, and its delta, made here."""
    del case_counts
    base, target = tmp_path / "base", tmp_path / "target"
    for side, seed in ((base, 0), (target, 1)):
        write_safetensors(side / "model.safetensors", {"w": bf16(weights((8, 8), seed))})
    (target / "sub").mkdir()
    for name in ("vocab.json", "Vocab.json", "sub/a"):
        (target / name).write_text(name)
    make_delta(base, target, tmp_path / "delta")
    return Trio(base, target, tmp_path / "delta")


def test_names_that_differ_in_case_are_written_where_they_are_two(cased: Trio, tmp_path: Path) -> None:
    apply_delta(cased.delta, tmp_path / "out", base=cased.base)
    assert contents(tmp_path / "out") == contents(cased.target)


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_names_that_are_one_are_refused_before_anything_is_written(
    cased: Trio, folding: None, tmp_path: Path, verb: str
) -> None:
    del folding  # from here on
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"vocab\.json cannot be written to .*out") as caught:
        _run(verb, cased, out)
    assert "Vocab.json" in caught.value.why
    assert "another file system" in caught.value.fix
    assert not out.exists()


@pytest.mark.usefixtures("case_counts", "folding")
def test_shards_that_are_one_elsewhere_have_other_names_in_the_delta(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    write_safetensors(base / "model.safetensors", {"w": bf16(weights((8, 8), 0))})
    for seed, name in enumerate(("model", "Model")):
        write_safetensors(target / f"{name}.safetensors", {name: bf16(weights((8, 8), seed))})
    make_delta(base, target, tmp_path / "delta")
    assert verify_delta(tmp_path / "delta", base=base).ok
    with pytest.raises(OutputError, match="cannot be written"):
        apply_delta(tmp_path / "delta", tmp_path / "out", base=base)


def test_a_compressed_file_takes_no_name_that_is_anothers_elsewhere(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    for side, seed in ((base, 0), (target, 1)):
        write_safetensors(side / "model.safetensors", {"w": bf16(weights((8, 8), seed))})
    for name in ("a.txt", "b.txt"):
        (target / name).write_text("word " * 20_000)
    (target / "A.TXT.ZST").write_text("mine")
    manifest = make_delta(base, target, tmp_path / "delta")
    stored = {file.path: file.stored for file in manifest.target.files}
    assert (stored["a.txt"], stored["b.txt"]) == ("verbatim", "zstd")


def test_names_that_look_alike_are_shown_as_what_they_are(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as folder:
        folder.require_distinct(["caf\u00e9"])
        _write(folder, "caf\u00e9")
        if not (tmp_path / "cafe\u0301").exists():
            os.link(tmp_path / "caf\u00e9", tmp_path / "cafe\u0301")
        with pytest.raises(OutputError) as caught:
            _write(folder, "cafe\u0301")
        assert r"'cafe\u0301'" in caught.value.what
        assert r"'caf\xe9'" in caught.value.why


def test_a_file_is_never_placed_over_another_of_the_same_run(tmp_path: Path) -> None:
    """Whatever the reason that a name leads to a file that was placed under another one: here, a link."""
    with OutputFolder(tmp_path) as folder:
        folder.require_distinct(["one", "other"])
        _write(folder, "one")
        os.link(tmp_path / "one", tmp_path / "other")
        with pytest.raises(OutputError, match="other cannot be written") as caught:
            _write(folder, "other", b"x")
        assert "does not distinguish it from one" in caught.value.why
        _write(folder, "one", b"again")
    assert (tmp_path / "one").read_bytes() == b"again"


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_file_that_stands_there_under_another_name_is_not_replaced(
    trio: Trio, tmp_path: Path, verb: str
) -> None:
    """Links again: on a file system that takes no notice of case, the one name would do."""
    out, name = tmp_path / "out", "config.json" if verb == "apply" else "README.md"
    out.mkdir()
    other = name.swapcase()
    (out / other).write_bytes(b"mine")
    if not (out / name).exists():
        os.link(out / other, out / name)
    with pytest.raises(OutputError, match=f"{name} cannot be written") as caught:
        _run(verb, trio, out, force=True)
    assert other in caught.value.why
    assert set(contents(out).values()) == {b"mine"}


def test_a_base_is_not_replaced_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "Model.safetensors").write_bytes(b"mine")
    if not (tmp_path / "base" / "model.safetensors").exists():
        os.link(tmp_path / "base" / "Model.safetensors", tmp_path / "base" / "model.safetensors")
    source = LocalSource(tmp_path / "base" / "Model.safetensors")
    with OutputFolder(tmp_path / "base") as folder:
        folder.require_apart(["config.json", "sub/model.safetensors"], [source])
        with pytest.raises(OutputError, match="which the output is made from"):
            folder.require_apart(["model.safetensors"], [source])


def test_a_folder_is_the_same_one_however_it_is_spelled(tmp_path: Path) -> None:
    base = tmp_path / "Base"
    base.mkdir()
    (tmp_path / "link").symlink_to(base)
    for path in (base, base / "new" / "out", tmp_path / "link" / "out", base / ".." / "Base" / "out"):
        assert is_within(path, base)
    for path in (tmp_path, tmp_path / "Base2", base / ".." / "out"):
        assert not is_within(path, base)
    assert is_within(tmp_path / "BASE" / "out", base) == (tmp_path / "BASE").exists()


def test_what_an_interrupted_look_at_names_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".deltaweights" / "names.partial"
    left.mkdir(parents=True)
    (left / "a").touch()
    with OutputFolder(tmp_path):
        assert not left.exists()
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


def _run(verb: str, trio: Trio, out: Path, *, force: bool = False) -> None:
    if verb == "apply":
        apply_delta(trio.delta, out, base=trio.base, force=force)
    else:
        make_delta(trio.base, trio.target, out, force=force)


def _write(folder: OutputFolder, path: str, content: bytes = b"content") -> None:
    with folder.create(path) as file:
        file.write_at(0, content)
        file.commit()


def raises(code: int) -> Callable[..., Any]:
    def call(*args: object, **handles: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def _require(holds: bool) -> None:
    assert holds
