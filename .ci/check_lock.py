"""Tries constraints.txt where it is to hold: on the public package index alone, by metadata, as wheels only.

    .venv/bin/python .ci/check_lock.py [CONSTRAINTS]

Each platform and Python that the lock is for gets a resolution of its own: all that `dev`, the build and
the site need, under the lock's pins. It fails where a pin contradicts another or what a package wants, where
a package has no wheel, and where one has no pin. It takes no settings of pip and uv, which may add an index,
or a folder of wheels that others do not have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

_KEPT = ("UV_CACHE_DIR", "UV_SYSTEM_CERTS")  # neither changes what is found
_MACOS = "14.0"  # torch's wheels are for no older one


def pins(text: str) -> set[str]:
    """The lines ``name==version``, without what follows."""
    return set(re.findall(r"^([a-z0-9-]+==[^\s;]+)", text, re.MULTILINE))


def trouble(platform: str, python: str, lock: Path) -> str:
    """What is wrong with the lock there; empty if nothing is."""
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(("UV_", "PIP_"))}
    environment["MACOSX_DEPLOYMENT_TARGET"] = _MACOS
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--no-config"]
    command += ["--no-python-downloads", "--no-annotate", "--no-header", "--only-binary", ":all:"]
    command += ["--python-platform", platform, "--python-version", python, "--constraint", str(lock)]
    command += ["pyproject.toml", "--extra", "dev", "--group", "build", "--group", "docs"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip()
    loose = pins(done.stdout) - pins(lock.read_text())
    return f"not pinned: {', '.join(sorted(loose))}" if loose else ""


def main() -> None:
    lock = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "constraints.txt").resolve()
    places = list(product(PLATFORMS, PYTHONS))
    failed: dict[str, list[str]] = {}
    with ThreadPoolExecutor(8) as threads:  # they wait for the index more than they compute
        found = threads.map(lambda place: trouble(place[0], place[1], lock), places)
        for place, text in zip(places, found, strict=True):
            if text:
                failed.setdefault(text, []).append(" ".join(place))
    for text, where in failed.items():
        print(f"{', '.join(where)}:\n{text}\n")
    if failed:
        sys.exit(f"{lock.name} does not hold everywhere. `make lock` makes it anew.")
    print(f"{lock.name} holds on {len(PLATFORMS)} platforms x {len(PYTHONS)} versions of Python.")


if __name__ == "__main__":
    main()
