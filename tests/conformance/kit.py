"""Runs a reader over every fixture, and over those made wrong. It needs nothing but Python."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import damage

FIXTURES = Path(__file__).parent.parent / "fixtures"
#: Seconds for one run; a reader that takes longer hangs.
PATIENCE = 120


class Outcome(NamedTuple):
    """What a reader made of one case. ``why`` is empty where it did right."""

    case: str
    why: str


def run(reader: Sequence[str], threads: int | None = None) -> Iterator[Outcome]:
    """Every outcome, as the cases stand in the kit.

    Args:
        reader: a command. ``{delta}``, ``{base}`` and ``{out}`` in it are replaced by folders; where none of
            these is there, the three are put behind it, in this order.
        threads: how many readers run at once.
    """
    accepted = [(path.name, "as it was written", None) for path in sorted(FIXTURES.glob("v*"))]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        yield from pool.map(lambda case: _try(reader, *case), [*accepted, *damage.cases()])


def command(reader: Sequence[str], delta: Path, base: Path, out: Path) -> list[str]:
    """The reader's command with the three folders in it."""
    places = {"{delta}": str(delta), "{base}": str(base), "{out}": str(out)}
    filled = list(reader)
    for name, folder in places.items():
        filled = [part.replace(name, folder) for part in filled]
    return filled if filled != list(reader) else [*filled, *places.values()]


def _try(reader: Sequence[str], fixture: str, name: str, change: damage.Damage | None) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for side in ("delta", "base"):
            shutil.copytree(FIXTURES / fixture / side, folder / side)
        if change:
            change(folder / "delta", folder / "base")
        expected = json.loads((FIXTURES / fixture / "target.json").read_text())
        why = _judge(reader, folder, expected, must_refuse=change is not None)
    return Outcome(f"{fixture}: {name}", why)


def _judge(reader: Sequence[str], folder: Path, expected: dict[str, str], *, must_refuse: bool) -> str:
    delta, base, out = (folder / name for name in ("delta", "base", "out"))
    try:
        done = subprocess.run(
            command(reader, delta, base, out), capture_output=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {PATIENCE} seconds"
    if done.returncode < 0:
        return f"it died of signal {-done.returncode}"
    there = digests(out)
    wrong = [path for path in there if path in expected and there[path] != expected[path]]
    if wrong:
        return f"it wrote a wrong {wrong[0]!r}"
    if must_refuse:
        return "" if done.returncode else "it was accepted"
    if done.returncode:
        return f"it was refused: {done.stderr.decode(errors='replace')[-300:].strip()}"
    missing = expected.keys() - there.keys()
    return f"{min(missing)!r} is missing" if missing else ""


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its path in ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def main(arguments: Sequence[str]) -> int:
    """Prints what went wrong, and how much was right; 0 where all was."""
    reader = shlex.split(arguments[0]) if len(arguments) == 1 else list(arguments)
    if not reader:
        print("usage: python -m tests.conformance READER_COMMAND")
        return 2
    outcomes = list(run(reader))
    for outcome in outcomes:
        if outcome.why:
            print(f"{outcome.case}: {outcome.why}")
    right = sum(not outcome.why for outcome in outcomes)
    print(f"{right} of {len(outcomes)} cases are right")
    return int(right != len(outcomes))
