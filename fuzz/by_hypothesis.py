"""Random bytes, and seeds with random places changed: for where atheris cannot be installed."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from .targets import TARGETS, Target

_QUIET = settings(
    max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def main(name: str, seconds: str, folder: str) -> None:
    end, runs = time.monotonic() + float(seconds), 0
    seeds = list(TARGETS[name].seeds())
    while time.monotonic() < end:
        runs += attack(TARGETS[name], seeds, Path(folder), end)
    print(f"{runs} inputs")


def attack(target: Target, seeds: list[bytes], folder: Path, end: float) -> int:
    """A few hundred inputs; how many were run. One that fails is kept, as small as it can be made.

    Raises:
        SystemExit: one failed.
    """
    runs, failing = 0, b""

    @seed(time.time_ns())
    @_QUIET
    @given(inputs(seeds))
    def run(data: bytes) -> None:
        nonlocal runs, failing
        if time.monotonic() < end:
            runs += 1
            try:
                target.run(data)
            except Exception:
                failing = data
                raise

    try:
        run()
    except Exception:
        traceback.print_exc()
        (folder / "crash").write_bytes(failing)
        sys.exit(f"failed; the input is {folder / 'crash'}")
    return runs


def inputs(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Any bytes, or those of a seed with some of them changed, cut out or put in."""
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), max_size=4)
    return st.binary(max_size=300) | st.builds(_edited, st.sampled_from(seeds), edits)


def _edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, cut, new in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + cut :]
    return data


if __name__ == "__main__":
    main(*sys.argv[1:])
