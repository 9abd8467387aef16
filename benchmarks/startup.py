"""How long a user waits before anything happens.

Wall time of fresh processes, the median of ten, each with the bare interpreter's own start in it (printed
for comparison), and which heavy modules each loads: ``import deltaweights``, ``deltaweights --help``, and
``diff`` and ``apply`` of an 8 MiB pair with kernels on disk, where starting is nearly all. Figures: the first
two under 0.3 s, importing loads none of numpy, torch, huggingface_hub and the like, and nothing loads Numba.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pairs
from children import MIB, Command, deltaweights, finish, print_table, run_measured

_MOST = 0.3
_LIMITED = ("import deltaweights", "deltaweights --help")
_NUMERIC = {"llvmlite", "numba", "numpy", "safetensors", "torch", "transformers"}
_HEAVY = _NUMERIC | {"huggingface_hub", "msgspec", "pydantic", "rich", "typer", "zstandard"}


def programs(pair: pairs.Pair) -> dict[str, Command]:
    """What is measured; ``diff`` makes the delta that ``apply`` needs."""
    delta, out = pair.root / "delta", pair.root / "out"
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import deltaweights": [sys.executable, "-c", "import deltaweights"],
        "deltaweights --help": deltaweights("--help"),
        "diff": deltaweights("diff", pair.base, pair.target, "-o", delta, "-q"),
        "apply": deltaweights("apply", delta, "--base", pair.base, "-o", out, "-q"),
    }


def modules_loaded(command: Command) -> set[str]:
    """The heavy modules that a command imports."""
    python, *arguments = command
    traced = [python, "-X", "importtime", *arguments]
    run = subprocess.run(traced, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    return imported & _HEAVY


def measure(pair: pairs.Pair, repeats: int) -> tuple[dict[str, list[float]], dict[str, set[str]]]:
    """Seconds of each program, in turn, and the modules of each, after one run of all to warm up."""
    commands = programs(pair)
    loaded: dict[str, set[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 2):
        for folder in ("delta", "out"):
            shutil.rmtree(pair.root / folder, ignore_errors=True)
        for name, command in commands.items():
            if turn == 1:
                loaded[name] = modules_loaded(command)
            else:
                usage = run_measured(command)
                seconds[name] += [usage.wall] if turn else []
    return seconds, loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="default 10")
    parser.add_argument("--folder", type=Path, help="where the pair is made; default: memory, else disk")
    options = parser.parse_args()
    with pairs.work_folder(options.folder, 32 * MIB) as folder:
        pair = pairs.Pair(folder)
        pairs.make_in_child(pair, 9 * MIB)
        seconds, loaded = measure(pair, options.repeats)
    rows = [["", "median s", "limit s", "heavy modules loaded"]]
    for name in seconds:
        limit = f"{_MOST}" if name in _LIMITED else ""
        rows.append([name, f"{median(seconds[name]):.3f}", limit, ", ".join(sorted(loaded[name])) or "none"])
    print_table(rows)
    missed = [f"{name} takes over {_MOST} s" for name in _LIMITED if median(seconds[name]) > _MOST]
    if loaded["import deltaweights"]:
        missed.append(f"import deltaweights loads {', '.join(sorted(loaded['import deltaweights']))}")
    missed += [f"{name} loads Numba" for name, modules in loaded.items() if "numba" in modules]
    finish(missed)


if __name__ == "__main__":
    main()
