"""What a training script pays: loading a delta into a model, and keeping checkpoints as deltas.

Loading: a bf16 model that is in memory gets a target of 1 GiB, by turns in one process,
  plain      by safetensors.torch.load_file of the rebuilt target, and load_state_dict
  load_into  from base and delta, in which every weight moved a little (update std 2e-4), or few did (1e-6)
  sha256     the same, with each shard's SHA-256 compared too, for information
Figures: load_into takes at most 2.0 times as long as plain, by the medians (page cache warm); and its peak
memory, in a process of its own with a model on the meta device, is the model and at most 160 MiB, Numba and
the compiled kernels (some 80 MiB) included.

Checkpoints: a causal language model of 6.5 million weights is pre-trained for some steps and rounded to bf16,
then fine-tuned; every 5 steps its weights, in bf16, become a checkpoint against the base or the one before.
Printed are what a save adds to the training step (its copy), the steps beside the writing thread, and sizes.
Every checkpoint has to come back bit for bit. Before it, the same stall for a state of 1 GiB.

    python benchmarks/training.py
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pairs
import torch
from children import MIB, deltaweights, finish, print_table, run_measured
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained import LanguageModel, pretrain, step

from deltaweights.torch import DeltaCheckpointer, list_checkpoints, load_into, load_state_dict

_MOST = 2.0
_WINDOW = 160 * MIB
_EVERY = 5


class Holder(nn.Module):
    """A model with these parameters and nothing else."""

    def __init__(self, state: dict[str, Tensor], device: str) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            memory = torch.empty_like(tensor, device=device).zero_()
            module.register_parameter(last, nn.Parameter(memory, requires_grad=False))


def load_target(pair: pairs.Pair, device: str = "cpu") -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(pair.target.glob("*.safetensors")):
        state |= load_file(path, device=device)
    return state


def wait_for(device: str) -> None:
    """Until the device has done all that was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()


def load_times(pair: pairs.Pair, repeats: int, device: str) -> dict[str, float]:
    """The median seconds of each way, interleaved, each into memory of its own that was written before."""
    delta = pair.root / "delta"
    ways: dict[str, Callable[[nn.Module], object]] = {
        "plain": lambda model: model.load_state_dict(load_target(pair, device)),
        "load_into": lambda model: load_into(model, delta, pair.base),
        "sha256": lambda model: load_into(model, delta, pair.base, sha256=True),
    }
    expected = load_target(pair)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, load in ways.items():
            model = Holder(expected, device)
            gc.collect()
            wait_for(device)
            start = time.perf_counter()
            load(model)
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
            state = model.state_dict()
            assert all(torch.equal(state[key].cpu(), expected[key]) for key in expected)
            del model, state
    return {name: median(values[1:]) for name, values in seconds.items()}  # the first warms up


def peak_memory() -> int:
    """The most bytes of resident memory so far. (Not ru_maxrss: a child inherits its parent's.)"""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def measure_memory(root: Path) -> None:
    """In a process of its own: print what load_into takes beyond the model, in bytes."""
    pair = pairs.Pair(root)
    model = Holder({name: t.to("meta") for name, t in load_target(pair).items()}, "meta")
    before = peak_memory()
    load_into(model, root / "delta", pair.base)
    print(peak_memory() - before - sum(p.nbytes for p in model.parameters()))


def bench_load(
    pair: pairs.Pair, update: float, repeats: int, device: str
) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and the figures that do not hold."""
    delta = pair.root / "delta"
    run_measured(deltaweights("diff", pair.base, pair.target, "-o", delta, "-q"))
    times = load_times(pair, repeats, device)
    command = [sys.executable, __file__, "--memory-of", str(pair.root)]
    beyond = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(delta)
    title = f"update std {update:.0e}"
    rows = [[f"loading, {title}", "s", "x plain"]]
    rows += [[name, f"{seconds:.2f}", f"{seconds / times['plain']:.2f}"] for name, seconds in times.items()]
    rows.append(["memory beyond the model", f"{beyond / MIB:.0f} MiB", ""])
    missed = []
    if times["load_into"] > _MOST * times["plain"]:
        missed.append(f"{title}: load_into takes {times['load_into'] / times['plain']:.2f} x, not {_MOST}")
    if beyond > _WINDOW:
        missed.append(f"{title}: load_into takes {beyond / MIB:.0f} MiB beyond the model")
    return rows, missed


def bf16_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def fine_tune(
    model: LanguageModel, text: Tensor, steps: int, checkpointer: DeltaCheckpointer | None
) -> tuple[list[float], list[float], dict[int, dict[str, Tensor]]]:
    """Train, with checkpoints if asked for. Returns the seconds of steps, those of saves, what was saved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds, stalls, saved = [], [], {}
    for number in range(1, steps + 1):
        start = time.perf_counter()
        step(model, optimizer, text)
        seconds.append(time.perf_counter() - start)
        if checkpointer and number % _EVERY == 0:
            saved[number] = bf16_of(model)
            start = time.perf_counter()
            checkpointer.save(number, saved[number])
            stalls.append(time.perf_counter() - start)
    return seconds, stalls, saved


def bench_checkpoints(folder: Path, steps: int) -> list[list[str]]:
    """Rows of the table; raises where a checkpoint is not what was saved."""
    torch.manual_seed(0)
    library = sorted(Path(inspect.getfile(os)).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in library)), dtype=torch.uint8).long()
    model = LanguageModel()
    pretrain(model, text, 20)
    base = folder / "base.safetensors"
    save_file(bf16_of(model), base)
    alone, _, _ = fine_tune(model, text, steps, None)
    rows = [["fine-tuning", "step, ms", "save, ms", "sizes", "of full"]]
    rows.append(["no checkpoints", f"{1000 * median(alone):.0f}", "", "", ""])
    for anchor_every in (1, 10):
        made = folder / f"anchor-{anchor_every}"
        with DeltaCheckpointer(made, base, anchor_every=anchor_every) as checkpointer:
            seconds, stalls, saved = fine_tune(model, text, steps, checkpointer)
        for number, chain in list_checkpoints(made).items():
            state = load_state_dict(chain, base)
            assert state.keys() == saved[number].keys()
            assert all(torch.equal(state[name], saved[number][name]) for name in state)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        full = len(saved) * base.stat().st_size
        title = (
            "all against the base"
            if anchor_every == 1
            else f"each against the last, anchor every {anchor_every}"
        )
        numbers = [f"{1000 * median(seconds):.0f}", f"{1000 * median(stalls):.1f}"]
        rows.append([title, *numbers, f"{size / MIB:.1f} of {full / MIB:.1f} MiB", f"{size / full:.1%}"])
    return rows


def bench_stall(pair: pairs.Pair) -> list[list[str]]:
    """What a save of the whole pair's target adds to a step, and what is done in the background."""
    state = {name: tensor.clone() for name, tensor in load_target(pair).items()}
    rows = [
        [f"{sum(t.nbytes for t in state.values()) / pairs.GIB:.2f} GiB of weights", "save, s", "behind it, s"]
    ]
    with DeltaCheckpointer(pair.root / "checkpoints", pair.base, keep=1) as checkpointer:
        for number, title in enumerate(("first (takes memory, hashes the base)", "second", "third")):
            start = time.perf_counter()
            checkpointer.save(number, state)
            copied = time.perf_counter()
            checkpointer.wait()
            rows.append([title, f"{copied - start:.2f}", f"{time.perf_counter() - copied:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=float, default=1, metavar="GIB", help="of the target, default 1")
    parser.add_argument("--shards", type=int, default=1, help="of the target, default 1")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--steps", type=int, default=40, help="of the fine-tuning, default 40")
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    parser.add_argument("--device", default="cpu", help="where the model lies, such as cuda; default cpu")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    nbytes = int(options.size * pairs.GIB)
    missed: list[str] = []
    with pairs.work_folder(options.folder, 4 * nbytes) as folder:
        for update in (2e-4, 1e-6):
            pair = pairs.Pair(folder / "pair")
            pairs.make_in_child(pair, nbytes, shards=options.shards, update=update)
            rows, worse = bench_load(pair, update, options.repeats, options.device)
            print_table(rows)
            missed += worse
            if update == 1e-6:
                print_table(bench_stall(pair))
            shutil.rmtree(pair.root)
        print_table(bench_checkpoints(folder, options.steps))
    finish(missed)


if __name__ == "__main__":
    main()
