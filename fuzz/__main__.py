"""Runs each target in a process of its own, and says which engine made its input.

    python -m fuzz [TARGET ...] [--seconds N] [--input FILE]

What a target finds is kept in build/fuzz/TARGET: `python -m fuzz TARGET --input FILE` runs it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .targets import TARGETS

_FOLDER = Path(__file__).parents[1] / "build" / "fuzz"


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all, or some of: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target, default 60")
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), help="default: atheris where it is")
    parser.add_argument("--input", type=Path, help="a file to run once")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"there is no target {min(unknown)}")
    names = options.targets or list(TARGETS)
    if options.input:
        for name in names:
            TARGETS[name].run(options.input.read_bytes())
        return
    engine = options.engine or ("atheris" if find_spec("atheris") else "hypothesis")
    failed = []
    for name in names:
        print(f"== {name}: {options.seconds} s by {engine}", flush=True)
        folder = _FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", f"fuzz.by_{engine}", name, str(options.seconds), str(folder)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"{engine} ran {len(names)} targets; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
