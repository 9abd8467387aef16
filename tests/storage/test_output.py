"""Writing: a file has its name when it is whole, and never before; nothing is written elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import DiskSpaceError, OutputError
from deltaweights.storage import OutputFolder

from ..checkpoints import contents


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[OutputFolder]:
    with OutputFolder(tmp_path / "out") as folder:
        yield folder


# Files -----------------------------------------------------------------------------------------------


def test_a_file_gets_its_name_when_it_is_committed(folder: OutputFolder) -> None:
    with folder.create("x") as file:
        file.write_at(0, b"whole")
        assert _names(folder) == []
        file.commit()
        assert contents(folder.root)["x"] == b"whole"
    assert (folder.root / "x").read_bytes() == b"whole"


def test_a_file_that_is_not_committed_never_was(folder: OutputFolder) -> None:
    with folder.create("x") as file:
        file.write_at(0, b"half")
    assert _names(folder) == []
    assert not list(folder.root.rglob("*.partial"))


def test_a_file_whose_writing_fails_never_was(folder: OutputFolder) -> None:
    (folder.root / "x").write_bytes(b"old")

    def write_half() -> None:
        with folder.create("x") as file:
            file.write_at(0, b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (folder.root / "x").read_bytes() == b"old"
    assert not list(folder.root.rglob("*.partial"))


def test_a_committed_file_replaces_what_stood_there(folder: OutputFolder) -> None:
    (folder.root / "x").write_bytes(b"an old, longer content")
    _write(folder, "x", b"new")
    assert (folder.root / "x").read_bytes() == b"new"


def test_a_link_is_replaced_and_not_written_through(folder: OutputFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (folder.root / "x").symlink_to(tmp_path / "outside")
    _write(folder, "x", b"new")
    assert not (folder.root / "x").is_symlink()
    assert (tmp_path / "outside").read_bytes() == b"mine"


@given(st.permutations(range(10)), st.integers(1, 5000))
def test_parts_may_be_written_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int
) -> None:
    parts = [bytes([k]) * size for k in range(10)]
    with OutputFolder(tmp_path_factory.mktemp("out")) as folder, folder.create("x") as file:
        for k in order:
            file.write_at(k * size, memoryview(parts[k]))
        content = b"".join(parts)
        assert file.digest() == (len(content), hashlib.sha256(content).hexdigest())
        file.commit()
        assert (folder.root / "x").read_bytes() == content


def test_threads_may_write_at_once(folder: OutputFolder) -> None:
    with folder.create("x") as file:
        threads = [
            threading.Thread(target=file.write_at, args=(k * 100_000, bytes([k]) * 100_000)) for k in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.commit()
    assert (folder.root / "x").read_bytes() == b"".join(bytes([k]) * 100_000 for k in range(8))


@pytest.mark.parametrize("sizes", [[], [0], [1, 0, 2], [1 << 20, 1, 1 << 20]], ids=str)
def test_blocks_are_written_one_after_the_other(folder: OutputFolder, sizes: list[int]) -> None:
    blocks = [bytes([k]) * size for k, size in enumerate(sizes)]
    content = b"".join(blocks)
    with folder.create("x") as file:
        file.write_blocks(iter(blocks))
        assert file.digest() == (len(content), hashlib.sha256(content).hexdigest())
        file.commit()
    assert b"".join(folder.blocks("x")) == content
    assert folder.size("x") == len(content)


def test_two_files_are_written_at_once(folder: OutputFolder) -> None:
    with folder.create("a/x") as one, folder.create("b/x") as other:
        one.write_at(0, b"one")
        other.write_at(0, b"other")
        other.commit()
        one.commit()
    assert contents(folder.root / "a") == {"x": b"one"}
    assert contents(folder.root / "b") == {"x": b"other"}


def test_subfolders_are_made(folder: OutputFolder) -> None:
    _write(folder, "a/b/c/x", b"deep")
    _write(folder, "a/b/y", b"beside")
    assert _names(folder) == ["a/b/c/x", "a/b/y"]


@pytest.mark.parametrize("link", ["a", "a/b"])
def test_a_linked_folder_on_the_way_is_refused(folder: OutputFolder, tmp_path: Path, link: str) -> None:
    (tmp_path / "outside").mkdir()
    (folder.root / link).parent.mkdir(exist_ok=True)
    (folder.root / link).symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match=f"Cannot write into {link} in") as caught:
        folder.create("a/b/x")
    assert "symbolic link" in caught.value.why
    assert contents(tmp_path / "outside") == {}


def test_a_folder_that_becomes_a_link_meanwhile_leads_nowhere(folder: OutputFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with folder.create("sub/x") as file:
        file.write_at(0, b"new")
        (folder.root / "sub").rename(tmp_path / "moved")
        (folder.root / "sub").symlink_to(tmp_path / "outside")
        with pytest.raises(OutputError, match="Cannot write into sub"):
            file.commit()
    assert contents(tmp_path / "outside") == {}


def test_a_file_where_a_folder_should_be_is_refused_and_kept(folder: OutputFolder) -> None:
    (folder.root / "a").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"Cannot write into a in"):
        folder.create("a/x")
    assert (folder.root / "a").read_bytes() == b"mine"


def test_a_folder_where_a_file_should_be_is_refused_and_kept(folder: OutputFolder) -> None:
    (folder.root / "x").mkdir()
    (folder.root / "x" / "y").write_bytes(b"mine")
    with pytest.raises(OutputError, match="A folder has that name"):
        folder.create("x")
    assert _names(folder) == ["x/y"]


def test_a_place_that_was_taken_meanwhile_is_our_error(folder: OutputFolder) -> None:
    with folder.create("x") as file:
        (folder.root / "x").mkdir()
        with pytest.raises(OutputError, match="Cannot write x"):
            file.commit()
    assert not list(folder.root.rglob("*.partial"))


def test_a_name_that_the_system_refuses_is_our_error(folder: OutputFolder) -> None:
    with pytest.raises(OutputError, match="Cannot write"):
        _write(folder, "x" * 300, b"")


# The folder ------------------------------------------------------------------------------------------


def test_a_finished_folder_holds_nothing_of_ours(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "new" / "out") as folder:
        _write(folder, "x", b"")
        assert (folder.root / ".deltaweights").is_dir()
    assert os.listdir(tmp_path / "new" / "out") == ["x"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_failure_before_the_first_file_leaves_no_trace(tmp_path: Path, is_new: bool) -> None:
    root = tmp_path / "out"
    if not is_new:
        root.mkdir()
        (root / "mine").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), OutputFolder(root) as folder, folder.create("sub/x"):
        raise RuntimeError
    assert contents(tmp_path) == before
    assert root.exists() != is_new
    assert not (root / ".deltaweights").exists()


def test_a_failure_after_the_first_file_keeps_what_was_noted(tmp_path: Path) -> None:
    def write_one() -> None:
        with OutputFolder(tmp_path) as folder:
            folder.claim(["x"])
            _write(folder, "x", b"done")
            folder.remember("x", b"what x is")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_one()
    with OutputFolder(tmp_path) as folder:
        assert folder.claims == {"x"}
        assert folder.recall("x") == b"what x is"
        assert folder.recall("y") == b""
    with OutputFolder(tmp_path) as folder:
        assert folder.claims == set()
        assert folder.recall("x") == b""


def test_what_an_interrupted_run_left_half_made_is_cleared(tmp_path: Path) -> None:
    workspace = tmp_path / ".deltaweights"
    workspace.mkdir()
    (workspace / "0123.partial").write_bytes(b"half")
    (tmp_path / "finished").write_bytes(b"kept")
    with OutputFolder(tmp_path):
        assert not list(workspace.glob("*.partial"))
    assert contents(tmp_path) == {"finished": b"kept"}
    assert not workspace.exists()


def test_only_claimed_files_are_removed(folder: OutputFolder) -> None:
    for path in ("old", "kept", "sub/old", "mine"):
        _write(folder, path, b"")
    folder.claim(["old", "kept", "sub/old", "never written"])
    folder.remove_claims(keep=["kept"])
    assert _names(folder) == ["kept", "mine"]


@pytest.mark.parametrize("claim", ["../precious", "{tmp}/precious", "link/precious", "a/../../precious"])
def test_a_claim_outside_the_folder_counts_for_nothing(tmp_path: Path, claim: str) -> None:
    """The workspace may have come with a download."""
    (tmp_path / "precious").write_bytes(b"mine")
    with OutputFolder(tmp_path / "out") as folder:
        (folder.root / "a").mkdir()
        (folder.root / "link").symlink_to(tmp_path)
        folder.claim([claim.format(tmp=tmp_path)])
        folder.remove_claims(keep=())
    assert (tmp_path / "precious").read_bytes() == b"mine"


@pytest.mark.parametrize("path", ["a\u2028b", "a\u0085b", " a ", "ü"])
def test_a_claim_is_the_whole_path(folder: OutputFolder, path: str) -> None:
    folder.claim([path, "other"])
    assert folder.claims == {path, "other"}


def test_a_second_writer_is_refused(folder: OutputFolder) -> None:
    program = """
import sys
from deltaweights import OutputError
from deltaweights.storage import OutputFolder
try:
    with OutputFolder(sys.argv[1]):
        print("got in")
except OutputError as error:
    print(error.what)
"""
    command = [sys.executable, "-c", program, str(folder.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder.root} is being written to by another deltaweights process\n"
    with pytest.raises(OutputError, match="another deltaweights process"), OutputFolder(folder.root):
        pass
    _write(folder, "x", b"the first one is not disturbed")


def test_the_lock_of_a_workspace_that_is_gone_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock and taking it, the first writer may end and a third may begin."""
    first, third, lock = OutputFolder(tmp_path / "out"), OutputFolder(tmp_path / "out"), fcntl.flock
    first.__enter__()

    def late(file: IO[bytes], operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        third.__enter__()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another deltaweights process"), OutputFolder(tmp_path / "out"):
        pass
    third.__exit__(None, None, None)


def test_the_next_writer_gets_in(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with OutputFolder(tmp_path) as folder:
            _write(folder, name, b"")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "name", [".deltaweights", ".deltaweights/lock", ".deltaweights/claims", ".deltaweights/x.partial"]
)
def test_a_linked_workspace_is_never_written_through(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if name == ".deltaweights":
        outside.mkdir()
    else:
        outside.write_bytes(b"mine")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with suppress(OutputError), OutputFolder(tmp_path / "out") as folder:
        folder.claim(["x"])
    if outside.is_dir():
        assert os.listdir(outside) == []
    else:
        assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_our_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match="Cannot write to"), OutputFolder(tmp_path / place):
        pass
    assert (tmp_path / "file").read_bytes() == b"mine"


# What stands there -----------------------------------------------------------------------------------


def test_foreign_lists_all_that_is_not_expected(folder: OutputFolder, tmp_path: Path) -> None:
    for path in ("a", "sub/b", "sub/.deltaweights/c", "d"):
        (folder.root / path).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / path).write_bytes(b"")
    (folder.root / "link").symlink_to(tmp_path)
    (folder.root / "dangling").symlink_to("nowhere")
    (folder.root / "empty").mkdir()
    assert folder.foreign(()) == ["a", "d", "dangling", "link", "sub/.deltaweights/c", "sub/b"]
    assert folder.foreign({"a", "link", "sub/b", "more"}) == ["d", "dangling", "sub/.deltaweights/c"]


def test_a_regular_file_is_one_that_no_link_leads_to(folder: OutputFolder) -> None:
    _write(folder, "sub/x", b"")
    (folder.root / "link").symlink_to("sub")
    (folder.root / "file").symlink_to("sub/x")
    assert folder.is_regular("sub/x")
    assert not any(folder.is_regular(path) for path in ("sub", "nothing", "file", "link/x", "sub/nothing"))


def test_space_is_asked_for_before_it_is_used(folder: OutputFolder) -> None:
    folder.require_space(0)
    folder.require_space(1)
    with pytest.raises(DiskSpaceError, match="Not enough free space") as caught:
        folder.require_space(1 << 60)
    assert f"{1 << 60:,} bytes are needed" in caught.value.why


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_our_error(folder: OutputFolder) -> None:
    with folder.create("x") as file:
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), file._fd)
        with pytest.raises(DiskSpaceError, match="disk filled up while writing x") as caught:
            file.write_at(0, b"too much")
        assert "run the same command again" in caught.value.fix
    assert _names(folder) == []


# Helpers ---------------------------------------------------------------------------------------------


def _write(folder: OutputFolder, path: str, content: bytes) -> None:
    with folder.create(path) as file:
        file.write_at(0, content)
        file.commit()


def _names(folder: OutputFolder) -> list[str]:
    return folder.foreign(())
