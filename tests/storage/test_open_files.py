"""More files than a process may have open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deltaweights import CheckpointError
from deltaweights.storage import LocalSource

_READ_ALL = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from deltaweights.storage import LocalSource

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
source = LocalSource(sys.argv[1])
files = [source.open(path) for path in source.sizes]
with ThreadPoolExecutor(4) as threads:
    for _ in range(3):
        found = list(threads.map(lambda file: file.read(0, file.size).decode(), files))
        assert found == [file.path for file in files]
source.close()
source.close()
"""


def test_any_number_of_files_is_read_in_a_few_descriptors(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(f"{number}.txt")
    subprocess.run([sys.executable, "-c", _READ_ALL, str(tmp_path)], check=True)


def test_a_file_that_is_replaced_meanwhile_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("deltaweights.storage.local._open_files._limit", 1)
    with LocalSource(tmp_path) as source:
        one, two = source.open("one"), source.open("two")
        assert (one.read(0, 3), two.read(0, 3)) == (b"one", b"two")
        (tmp_path / "new").write_text("ONE")
        (tmp_path / "new").rename(tmp_path / "one")
        with pytest.raises(CheckpointError, match="was replaced"):
            one.read(0, 3)


def test_too_many_open_files_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    script = """
import resource, sys
from deltaweights.storage import LocalSource
source = LocalSource(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
source.open("file")
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ulimit -n" in done.stderr
