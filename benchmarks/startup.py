"""How long a user waits before anything happens.

Wall time of fresh processes, the median of ten: ``import deltaweights`` and ``deltaweights --help``, each
with the bare interpreter's own start in it (printed for comparison), and which heavy modules each loads.
Figures: both under 0.3 s, and importing loads none of numpy, torch, huggingface_hub and the like.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

from children import Command, deltaweights, finish, print_table, run_measured

_MOST = 0.3
_NUMERIC = {"numba", "numpy", "safetensors", "torch", "transformers"}
_HEAVY = _NUMERIC | {"huggingface_hub", "msgspec", "pydantic", "rich", "typer", "zstandard"}

_COMMANDS: dict[str, Command] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import deltaweights": [sys.executable, "-c", "import deltaweights"],
    "deltaweights --help": deltaweights("--help"),
}


def modules_loaded(name: str) -> set[str]:
    """The heavy modules that a command imports."""
    python, *arguments = _COMMANDS[name]
    traced = [python, "-X", "importtime", *arguments]
    run = subprocess.run(traced, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    return imported & _HEAVY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="default 10")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(options.repeats):
        for name, command in _COMMANDS.items():
            seconds[name].append(run_measured(command).wall)
    loaded = {name: modules_loaded(name) for name in _COMMANDS}
    rows = [["", "median s", "limit s", "heavy modules loaded"]]
    for name in _COMMANDS:
        limit = "" if name.startswith("python") else f"{_MOST}"
        rows.append([name, f"{median(seconds[name]):.3f}", limit, ", ".join(sorted(loaded[name])) or "none"])
    print_table(rows)
    missed = [f"{name} takes over {_MOST} s" for name in _COMMANDS if median(seconds[name]) > _MOST]
    if loaded["import deltaweights"]:
        missed.append(f"import deltaweights loads {', '.join(sorted(loaded['import deltaweights']))}")
    finish(missed)


if __name__ == "__main__":
    main()
