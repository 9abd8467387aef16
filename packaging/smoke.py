"""Tries an installed wheel as a user first meets it: no compiler, no cache, no home, a read-only package.

    PYTHON packaging/smoke.py

PYTHON is a virtual environment's with nothing but the wheel and what it needs. For each dtype a small pair is
made, and `diff`, `apply`, `verify` and `report` run as commands; then `pip uninstall` must leave nothing.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

_WORDS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F8_E4M3": np.uint8}


def write_pair(folder: Path, dtype: str) -> None:
    """Write a base and a target of 1 MiB, whose weights moved by a few units in the last place."""
    rng, word = np.random.default_rng(0), np.dtype(_WORDS[dtype])
    weights = rng.normal(0, 0.02, (1 << 20) // word.itemsize).astype(np.float32)
    bits = weights.view(np.uint32) >> (32 - 8 * word.itemsize)
    moved = bits + (rng.random(len(bits)) < 0.2)
    for name, values in (("base", bits), ("target", moved)):
        data = values.astype(word).tobytes()
        tensor = {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(data)]}
        header = json.dumps({"weight": tensor}).encode()
        Path(folder, name).mkdir()
        content = len(header).to_bytes(8, "little") + header + data
        Path(folder, name, "model.safetensors").write_bytes(content)


def run(folder: Path, *arguments: str) -> None:
    """Run one command of deltaweights, by a user who has nothing."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    command = [str(Path(sys.executable).with_name("deltaweights")), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or "compiling" in done.stderr:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


@contextmanager
def read_only(package: Path) -> Iterator[None]:
    """Within it nobody but root can write to the package."""
    for path in (package, *package.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        for path in (package, *package.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


def try_dtype(folder: Path, dtype: str) -> None:
    """Make a pair and its delta, and rebuild the target."""
    write_pair(folder, dtype)
    run(folder, "diff", "base", "target", "-o", "delta")
    run(folder, "apply", "delta", "--base", "base", "-o", "rebuilt")
    run(folder, "verify", "delta", "--base", "base", "--target", "rebuilt")
    run(folder, "report", "delta", "--base", "base", "-o", "page.html", "--svg", "picture.svg")
    target, rebuilt = (folder / name / "model.safetensors" for name in ("target", "rebuilt"))
    if not filecmp.cmp(target, rebuilt, shallow=False):
        sys.exit(f"{dtype}: the rebuilt file differs")


def main() -> None:
    """Exit with a message where something is wrong."""
    for module in ("numba", "llvmlite", "torch"):
        if find_spec(module):
            sys.exit(f"{module} is installed here: this shows nothing")
    found = find_spec("deltaweights")
    if found is None or found.origin is None:
        sys.exit("deltaweights is not installed here")
    package = Path(found.origin).parent
    with read_only(package):
        for dtype in _WORDS:
            with tempfile.TemporaryDirectory() as work:
                try_dtype(Path(work), dtype)
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "deltaweights"], check=True)
    left = [*package.rglob("*"), *package.parent.glob("deltaweights*")]
    if left:
        sys.exit(f"pip uninstall left {', '.join(map(str, left[:5]))}")
    print(f"the wheel works: {', '.join(_WORDS)} on {sys.platform}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
