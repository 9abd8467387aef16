"""How long a user waits before anything happens, and what an installation takes.

Wall time of fresh processes, the median of ten, each with the bare interpreter's own start in it (printed for
comparison), and which heavy modules each loads: ``import deltaweights``, ``deltaweights --help``, and
``diff`` and ``apply`` of an 8 MiB pair, where starting is nearly all. Figures: import under 0.3 s, help under
0.2 s, importing loads none of numpy, torch, huggingface_hub and the like, and nothing loads Numba or LLVM.

With ``--wheel`` the wheel is installed into an environment of its own, which is then made read-only, and run
without a home: the first ``diff`` and the first ``apply`` of an 8 MiB pair against the fastest of five more,
for each dtype; and the bytes that the installation takes, all dependencies counted. Figures: 1.3 times, 210
MB.

With ``--kernels`` prebuilt kernels encode and decode in turn with those that Numba compiles for this very
processor: the speed of the prebuilt ones by that of the others. Figure: 0.95.

    python benchmarks/startup.py [--wheel dist/NAME.whl] [--kernels]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pairs
from children import MIB, Command, deltaweights, finish, print_table, run_measured

_MOST = {"import deltaweights": 0.3, "deltaweights --help": 0.2}
_COMPILERS = {"llvmlite", "numba"}
_NUMERIC = _COMPILERS | {"numpy", "safetensors", "torch", "transformers"}
_HEAVY = _NUMERIC | {"huggingface_hub", "msgspec", "pydantic", "rich", "typer", "zstandard"}
_WORD_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
_FIRST_RUN, _INSTALLED_BYTES, _PREBUILT = 1.3, 210_000_000, 0.95


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


def show_starts(folder: Path, repeats: int) -> list[str]:
    """Print how long programs take to start; returns the figures that were missed."""
    pair = pairs.Pair(folder)
    pairs.make_in_child(pair, 9 * MIB)
    seconds, loaded = measure(pair, repeats)
    rows = [["", "median s", "limit s", "heavy modules loaded"]]
    for name, taken in seconds.items():
        modules = ", ".join(sorted(loaded[name])) or "none"
        rows.append([name, f"{median(taken):.3f}", str(_MOST.get(name, "")), modules])
    print_table(rows)
    missed = [f"{name} takes over {most} s" for name, most in _MOST.items() if median(seconds[name]) > most]
    if loaded["import deltaweights"]:
        missed.append(f"import deltaweights loads {', '.join(sorted(loaded['import deltaweights']))}")
    for name, found in loaded.items():
        missed += [f"{name} loads {compiler}" for compiler in sorted(found & _COMPILERS)]
    return missed


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel, and what it needs, into a new environment, and make that read-only; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python, uv = folder / "bin" / "python", Path(sys.executable).with_name("uv")
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    options: Command = ["--quiet", "--compile-bytecode", "--python", python, "--constraint", constraints]
    subprocess.run([uv, "pip", "install", *options, wheel], check=True)
    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    return python


def write_words(folder: Path, dtype: str) -> None:
    """Write a base and a target of 8 MiB in which a fifth of the words is one more."""
    import numpy as np

    rng, size = np.random.default_rng(0), _WORD_BYTES[dtype]
    bits = rng.normal(0, 0.02, (8 * MIB) // size).astype(np.float32).view(np.uint32) >> (32 - 8 * size)
    for name, values in (("base", bits), ("target", bits + (rng.random(len(bits)) < 0.2))):
        data = values.astype(f"<u{size}").tobytes()
        tensor = {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(data)]}
        header = json.dumps({"weight": tensor}).encode()
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def first_runs(python: Path, folder: Path, dtype: str) -> dict[str, float]:
    """The first diff's and apply's time by the fastest of five more."""
    write_words(folder, dtype)
    seconds: dict[str, list[float]] = {"diff": [], "apply": []}
    commands = {
        "diff": ["diff", "base", "target", "-o", "delta", "-q"],
        "apply": ["apply", "delta", "--base", "base", "-o", "out", "-q"],
    }
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    for _ in range(6):
        for name in ("delta", "out"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for verb, arguments in commands.items():
            began = time.perf_counter()
            command: Command = [python, "-m", "deltaweights", *arguments]
            subprocess.run(command, cwd=folder, env=environment, check=True)
            seconds[verb].append(time.perf_counter() - began)
    return {verb: taken[0] / min(taken[1:]) for verb, taken in seconds.items()}


def show_installation(wheel: Path) -> list[str]:
    """Print what an installation takes, and its first runs; returns the figures that were missed."""
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        environment = Path(work, "environment")
        python = install(wheel, environment)
        size = sum(p.stat().st_size for p in environment.rglob("*") if p.is_file() and not p.is_symlink())
        print(f"installed: {size / 1e6:.0f} MB, bytecode included (limit {_INSTALLED_BYTES / 1e6:.0f})\n")
        if size > _INSTALLED_BYTES:
            missed.append(f"the installation takes {size:,} bytes")
        rows = [["first run by the fastest of five more", "diff", "apply"]]
        for dtype in _WORD_BYTES:
            folder = Path(work, dtype)
            folder.mkdir()
            ratios = first_runs(python, folder, dtype)
            rows.append([dtype, *(f"{ratio:.2f}" for ratio in ratios.values())])
            missed += [f"first {verb} of {dtype}: {r:.2f}" for verb, r in ratios.items() if r > _FIRST_RUN]
        print_table(rows)
        subprocess.run(["chmod", "-R", "u+w", environment], check=True)
    return missed


_SPEEDS = """
import sys, time
import numpy as np
from deltaweights.codec import library
from deltaweights.payload import CHUNK_BYTES, decode, encode

dtype, size = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
weights = rng.normal(0, 0.02, 4 * CHUNK_BYTES // size).astype(np.float32)
moved = weights + rng.normal(0, 2e-4, len(weights)).astype(np.float32)
words = [(w.view(np.uint32) >> (32 - 8 * size)).astype(f"u{size}") for w in (weights, moved)]
base, target = (word.view(np.uint8) for word in words)
payload = encode(base, target, dtype)
found = library.prebuilt()
print(found.level if found else "jit", flush=True)
for line in sys.stdin:
    best = [float("inf")] * 2
    for _ in range(5):
        for k, work in enumerate((lambda: encode(base, target, dtype), lambda: decode(base, payload, dtype))):
            began = time.perf_counter()
            work()
            best[k] = min(best[k], time.perf_counter() - began)
    print(*best, flush=True)
"""


class Coder:
    """A process that encodes and decodes with one kind of kernels, when asked."""

    def __init__(self, dtype: str, kernels: dict[str, str]) -> None:
        command = [sys.executable, "-c", _SPEEDS, dtype, str(_WORD_BYTES[dtype])]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **kernels},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.level = self._answer()
        self.seconds = [float("inf")] * 2  # encode, decode

    def measure(self) -> None:
        """Keep the fastest of five more."""
        assert self._process.stdin is not None
        print("again", file=self._process.stdin, flush=True)
        self.seconds = [
            min(*both) for both in zip(self.seconds, map(float, self._answer().split()), strict=True)
        ]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def show_kernels(rounds: int) -> list[str]:
    """Print the speed of prebuilt kernels by that of those compiled here; returns the missed figures."""
    rows, missed = [["prebuilt by compiled here", "level", "encode", "decode"]], []
    for dtype in _WORD_BYTES:
        prebuilt, here = Coder(dtype, {}), Coder(dtype, {"DELTAWEIGHTS_KERNELS": "jit"})
        for _ in range(rounds):
            prebuilt.measure()
            here.measure()
        prebuilt.close()
        here.close()
        ratios = [a / b for a, b in zip(here.seconds, prebuilt.seconds, strict=True)]
        rows.append([dtype, prebuilt.level, *(f"{ratio:.2f}" for ratio in ratios)])
        for verb, ratio in zip(("encodes", "decodes"), ratios, strict=True):
            missed += [f"{prebuilt.level} {verb} {dtype} at {ratio:.2f}"] if ratio < _PREBUILT else []
    print_table(rows)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="default 10")
    parser.add_argument("--folder", type=Path, help="where the pair is made; default: memory, else disk")
    parser.add_argument("--wheel", type=Path, help="measure its installation too")
    parser.add_argument("--kernels", action="store_true", help="measure prebuilt kernels' speed too")
    options = parser.parse_args()
    missed = show_installation(options.wheel) if options.wheel else []
    missed += show_kernels(options.repeats) if options.kernels else []
    with pairs.work_folder(options.folder, 32 * MIB) as folder:
        missed += show_starts(folder, options.repeats)
    finish(missed)


if __name__ == "__main__":
    main()
