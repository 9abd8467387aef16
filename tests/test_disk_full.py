"""A disk that is too small or fills up: our error, finished files kept, nothing half-made, and it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deltaweights import DiskSpaceError, apply_delta, make_delta

from .checkpoints import bf16, contents, digests, weights, write_safetensors
from .conftest import Trio

_SHARDS = 6
_PAGE = 4096


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A pair in six shards of 20 KB with other files in folders, and its delta."""
    folder = tmp_path_factory.mktemp("sharded")
    trio = Trio(folder / "base", folder / "target", folder / "delta")
    for k in range(_SHARDS):
        old = weights((10, 1000), k)
        write_safetensors(trio.base / f"model-{k}.safetensors", {f"layer.{k}": bf16(old)})
        moved = bf16(old + weights(old.shape, 100 + k, 1e-2))
        write_safetensors(trio.target / f"model-{k}.safetensors", {f"layer.{k}": moved})
    for name in ("tokenizer", "eval"):
        (trio.target / name).mkdir()
        (trio.target / name / "data.bin").write_bytes(np.random.default_rng(9).bytes(30_000))
    make_delta(trio.base, trio.target, trio.delta)
    return trio


class SmallDisk:
    """A file system of a given size, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        _mount("-t", "tmpfs", "-o", "size=4k", "deltaweights-test", str(folder))

    def resize(self, nbytes: int, files: int = 1000) -> None:
        """Make it so large, in bytes (whole pages) and in files and folders."""
        pages = -(-nbytes // _PAGE) * _PAGE
        _mount("-o", f"remount,size={pages},nr_inodes={files}", str(self.folder))

    def remove(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small tmpfs needs root: {error}")
    yield disk
    disk.remove()


def test_too_small_a_disk_is_refused_before_anything_is_written(sharded: Trio, disk: SmallDisk) -> None:
    disk.resize(_bytes(sharded.target) - _PAGE)
    with pytest.raises(DiskSpaceError, match="Not enough free space") as refused:
        apply_delta(sharded.delta, disk.folder / "out", base=sharded.base)
    assert f"{_bytes(sharded.target):,} bytes are needed" in refused.value.why
    assert list(disk.folder.iterdir()) == []

    disk.resize(2 * _bytes(sharded.target))
    apply_delta(sharded.delta, disk.folder / "out", base=sharded.base)
    assert contents(disk.folder / "out") == contents(sharded.target)


def test_only_the_missing_files_need_space(sharded: Trio, disk: SmallDisk) -> None:
    disk.resize(2 * _bytes(sharded.target))
    out = disk.folder / "out"
    apply_delta(sharded.delta, out, base=sharded.base)
    (out / "model-3.safetensors").unlink()
    disk.resize(_used(disk) + 30_000)
    report = apply_delta(sharded.delta, out, base=sharded.base)
    assert report.rebuilt == ("model-3.safetensors",)
    assert contents(out) == contents(sharded.target)


@pytest.mark.parametrize("threads", [1, 4])
def test_apply_on_a_disk_that_another_program_fills(sharded: Trio, disk: SmallDisk, threads: int) -> None:
    disk.resize(2 * _bytes(sharded.target))
    out, hog = disk.folder / "out", disk.folder / "hog"

    def fill(phase: str, done: int, total: int) -> None:
        if phase == "apply" and done > total / 2 and not hog.exists():
            _fill(hog)

    with pytest.raises(DiskSpaceError, match="filled up") as failed:
        apply_delta(sharded.delta, out, base=sharded.base, threads=threads, progress=fill)
    assert "run the same command again" in failed.value.fix
    finished = digests(out)
    assert finished.items() <= digests(sharded.target).items()
    assert not (out / ".deltaweights").exists()
    if threads == 1:
        assert finished, "the shards before the full disk are kept"

    hog.unlink()
    report = apply_delta(sharded.delta, out, base=sharded.base)
    assert set(report.kept) == set(finished)
    assert contents(out) == contents(sharded.target)


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_disk_of_any_size_gives_our_error_and_the_run_goes_on(
    sharded: Trio, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Larger by one page each time: the disk fills up at every place there is."""
    monkeypatch.setattr("deltaweights.storage.OutputFolder.require_space", lambda self, nbytes: None)
    out, right = disk.folder / "out", digests(sharded.target if verb == "apply" else sharded.delta)
    finished: dict[str, str] = {}
    for pages in range(1, 1000):
        disk.resize(max(pages * _PAGE, _used(disk)))
        if _runs_with_room(verb, sharded, out):
            break
        assert not list(out.rglob("*.partial"))
        now = {path: sha for path, sha in digests(out).items() if not path.startswith(".deltaweights/")}
        assert finished.items() <= now.items() <= right.items()
        finished = now
    assert finished
    assert digests(out) == right


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_disk_without_room_for_one_more_file_or_folder_gives_our_error(
    sharded: Trio, disk: SmallDisk, verb: str
) -> None:
    """A file system may run out of inodes while bytes are free."""
    out, right = disk.folder / "out", digests(sharded.target if verb == "apply" else sharded.delta)
    for files in range(2, 1000):
        disk.resize(1 << 24, files)
        if _runs_with_room(verb, sharded, out):
            break
        assert not list(out.rglob("*.partial"))
        shutil.rmtree(out, ignore_errors=True)
    assert digests(out) == right


@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_a_limit_on_the_size_of_a_file_is_told_in_our_words(sharded: Trio, tmp_path: Path, verb: str) -> None:
    """As FAT's 4 GB; needs no root."""
    out = tmp_path / "out"
    arguments = {
        "apply": ("apply", sharded.delta, "-o", out, "--base", sharded.base),
        "diff": ("diff", sharded.base, sharded.target, "-o", out),
    }[verb]
    limited = (
        "import resource, deltaweights.cli as cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", limited, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: Cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(out.glob("*.safetensors"))


def _runs_with_room(verb: str, trio: Trio, out: Path) -> bool:
    """Run apply or diff. Returns whether there was room; any error but ours goes through."""
    try:
        if verb == "apply":
            apply_delta(trio.delta, out, base=trio.base, threads=1)
        else:
            make_delta(trio.base, trio.target, out, threads=1)
    except DiskSpaceError as full:
        return not (full.what and full.why and full.fix)
    return True


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _used(disk: SmallDisk) -> int:
    """Bytes in use on the disk."""
    info = os.statvfs(disk.folder)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def _fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(_PAGE))
            except OSError:
                return
