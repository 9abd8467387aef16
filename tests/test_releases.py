"""What this version writes, the last release reads: else the format version has to rise. (That later versions
read what earlier ones wrote is in test_fixtures.py.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .checkpoints import digests
from .conformance import damage
from .fixtures.make import SETS, write_set

ROOT = Path(__file__).parent.parent
#: A version takes the library of another one only where it has the same kernels; else it compiles its own.
PREBUILT = Path("deltaweights", "codec", "prebuilt")


def newest_release() -> str | None:
    """The tag of the newest release, if this is a clone that has one."""
    command = ["git", "-C", str(ROOT), "tag", "--list", "v[0-9]*", "--sort=-version:refname"]
    try:
        tags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # an sdist, or no git
        return None
    return next((tag for tag in tags if tag.strip("v").replace(".", "").isdigit()), None)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newest release, and with this version's kernels if that takes them."""
    tag = newest_release()
    if tag is None:
        pytest.skip("there is no release to compare with: git knows no tag v*")
    folder = tmp_path_factory.mktemp("release")
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", tag, "deltaweights"], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    if (ROOT / PREBUILT).exists():
        shutil.copytree(ROOT / PREBUILT, folder / PREBUILT)
    return folder


@pytest.fixture(scope="module")
def this_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This version, in the place of a release."""
    folder = tmp_path_factory.mktemp("this")
    shutil.copytree(ROOT / "deltaweights", folder / "deltaweights")
    return folder


def read_by(version: Path, delta: Path, base: Path, out: Path) -> str:
    """Empty where the version in a folder rebuilds the target; else what it says."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=version,
            env={**os.environ, "PYTHONPATH": str(version)},
            capture_output=True,
            text=True,
            check=False,
        )

    found = run("-c", "import deltaweights; print(deltaweights.__file__)").stdout
    assert Path(found).is_relative_to(version)
    done = run("-m", "deltaweights", "apply", delta, "--base", base, "-o", out, "-q")
    return "" if done.returncode == 0 else done.stderr or f"status {done.returncode}"


def check(version: Path, name: str, folder: Path) -> None:
    """A set that this version writes into a folder is read by another one."""
    write_set(name, folder)
    assert read_by(version, folder / "delta", folder / "base", folder / "out") == ""
    assert digests(folder / "out") == digests(folder / "target")


@pytest.mark.parametrize("name", SETS)
def test_the_last_release_reads_what_this_version_writes(release: Path, name: str, tmp_path: Path) -> None:
    check(release, name, tmp_path)


def test_the_test_takes_a_version_that_reads(this_version: Path, tmp_path: Path) -> None:
    check(this_version, "v1", tmp_path)


@pytest.mark.parametrize("name", ["an unknown field", "a later format version", "a method that nobody knows"])
def test_the_test_finds_a_format_that_changed(this_version: Path, name: str, tmp_path: Path) -> None:
    """For a release, a delta of a later format is no other than these damaged ones."""
    write_set("v1", tmp_path)
    damage.DAMAGES["v1"][name](tmp_path / "delta", tmp_path / "base")
    assert read_by(this_version, tmp_path / "delta", tmp_path / "base", tmp_path / "out") != ""
