"""Runs the tests that need no torch with the lowest and the newest versions that pyproject.toml allows.

    .venv/bin/python .ci/test_matrix.py [PYTHON] ...

Each Python (all, unless some are named) gets two environments in build/matrix: what a user has from the index
today, as wheels, and the same at the lower bounds. uv finds or downloads the interpreters. The kernels are
those that `make kernels` built: they are the same for every Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RESOLUTIONS = ("lowest-direct", "highest")

#: What meets other libraries. The rest of the suite is about our own code and files, and would take hours
#: here.
TESTS = (
    *("checkpoint", "cli", "codec/test_chunks.py", "codec/test_compiled.py", "codec/test_convert.py"),
    *("delta/test_target.py", "license", "storage/test_hub.py", "storage/test_hub_server.py"),
    "storage/test_store.py",
    *("test_diff.py", "test_documents.py", "test_fixtures.py", "test_house.py", "test_inspect.py"),
    *("test_install.py", "test_manifest.py", "test_plan.py", "test_push.py", "test_roundtrip.py"),
)

_UV = str(Path(sys.executable).with_name("uv"))
_FOLDER = ROOT / "build" / "matrix"


def main() -> None:
    results = {}
    for python in sys.argv[1:] or PYTHONS:
        for resolution in RESOLUTIONS:
            print(f"\n== Python {python}, {resolution}", flush=True)
            results[f"{python} {resolution}"] = tried(python, resolution)
    print()
    for name, result in results.items():
        print(f"{name:20} {result}")
    sys.exit("passed" not in results.values() or any(r.startswith("failed") for r in results.values()))


def tried(python: str, resolution: str) -> str:
    """Makes an environment and runs the tests there; says what came of it."""
    folder = _FOLDER / f"{python}-{resolution}"
    pins, interpreter = str(folder / "pins.txt"), str(folder / "bin" / "python")
    if not make_environment(folder, python):
        return "left out: there is no such Python here"
    ends = f"pip compile --resolution {resolution} --only-binary :all: --extra bom pyproject.toml"
    if not uv(*ends.split(), "--python", interpreter, "--output-file", pins):
        return "failed to resolve"
    if not uv("pip", "install", "--python", interpreter, "--constraint", pins, "--editable", ".[bom,test]"):
        return "failed to install"
    command = [interpreter, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    command += [f"tests/{name}" for name in TESTS]
    return "failed" if subprocess.run(command, cwd=ROOT, check=False).returncode else "passed"


def make_environment(folder: Path, python: str) -> bool:
    """Whether there is such a Python, or one to download."""
    environment = os.environ | {"UV_HTTP_RETRIES": "0"}
    if shutil.which("pyenv"):  # its shims start no version that they were not told of
        versions = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True)
        environment["PYENV_VERSION"] = ":".join(versions.stdout.split())
    return uv("venv", "--clear", "--python", python, str(folder), environment=environment)


def uv(*arguments: str, environment: dict[str, str] | None = None) -> bool:
    """Without the settings in pyproject.toml, which are the lock's."""
    command = [_UV, "--quiet", "--no-config", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    main()
