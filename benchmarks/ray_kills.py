"""Kills workers and drivers of Ray runs at random instants, and runs each again to its end.

    python benchmarks/ray_kills.py 20 [--seed 0]

Every other kill is of the driver, the others of one of its workers. After each, no file of the output may
differ from what one process writes; after the run that follows, all of them are there.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltaweights import make_delta

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ray_overhead import cluster_of

from tests.checkpoints import bf16, digests, weights, write_safetensors

_SHARDS, _MATRIX = 8, (2048, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, cluster_of([2]) as cluster:
        folder = Path(name)
        for k in range(_SHARDS):
            old = weights(_MATRIX, k)
            new = old + weights(_MATRIX, 50 + k, 2e-4)
            write_safetensors(folder / "base" / f"model-{k}.safetensors", {f"layers.{k}": bf16(old)})
            write_safetensors(folder / "target" / f"model-{k}.safetensors", {f"layers.{k}": bf16(new)})
        make_delta(folder / "base", folder / "target", folder / "delta")
        for number in range(options.kills):
            _kill_once(folder, cluster.address, number, chance)
            print(f"{number + 1} of {options.kills}: identical", flush=True)


def _kill_once(folder: Path, address: str, number: int, chance: random.Random) -> None:
    verb, out = ("diff", "apply")[number // 2 % 2], folder / f"out-{number}"
    inputs = {
        "diff": [f"{folder}/base", f"{folder}/target"],
        "apply": [f"{folder}/delta", "--base", f"{folder}/base"],
    }[verb]
    right = digests(folder / ("delta" if verb == "diff" else "target"))
    command = [sys.executable, "-m", "deltaweights", verb, *inputs, "-o", str(out)]
    command += ["--ray", address, "--quiet"]
    with subprocess.Popen(command) as driver:
        while driver.poll() is None and not (out / ".deltaweights" / "run").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2))
        if number % 2:
            driver.kill()
        elif workers := _workers():
            os.kill(chance.choice(workers), signal.SIGKILL)
        code = driver.wait(120)
    assert number % 2 or code == 0, f"a worker's death ended the run with {code}"
    there = digests(out) if out.exists() else {}
    assert all(there[path] == right[path] for path in there if path in right)
    subprocess.run([*command, *(["--force"] if code == 0 and verb == "diff" else [])], check=True)
    assert digests(out) == right


def _workers() -> list[int]:
    """The processes of tasks at work."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::_run"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


if __name__ == "__main__":
    main()
