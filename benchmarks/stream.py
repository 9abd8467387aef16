"""A weight stream beside what it replaces: a 1 GiB bf16 state, 1% of which moves by a unit in the last place.

Three patterns of updates. "as trained": every weight has a master copy in float32, which a step moves by one
size, up or down; where that crosses a rounding border, the bf16 weight moves. So small weights move most, as
after an optimizer's step. "anywhere": one weight in a hundred, chosen blindly, moves. "in rows": all weights
of one row of 4096 in a hundred, as of experts or embeddings. Sizes of one update, of the changed weights as
int32 places and bf16 values (sorted by place, per tensor), and of these two lists after zstd at level 3.

Then times, all on a memory file system, interleaved, medians: publish beside save_file of safetensors.torch;
prepare, commit, and sync, which is both, beside load_file of the same state and copying it into the model, as
load_state_dict does. (load_file alone maps the file and reads nothing.) The CPU's seconds beside the clock's,
since publish and prepare use all cores. "touch" reads one word of every cache line in which something
changes: what a commit cannot do without.

Then how much slower a small model generates, on one core, beside prepare with threads=1; beside loading; and
beside another process, which makes no difference if two cores have nothing else to do.

Figures, for the pattern "as trained": an update at most 1.0% of the state; at least 4 times smaller than
places and values, 2 times after zstd; publish faster than saving, sync faster than loading; generation beside
prepare at most a quarter slower than beside another process.

    python benchmarks/stream.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pairs
import torch
import zstandard
from children import finish, print_table
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from deltaweights.torch import DeltaPublisher, DeltaSubscriber, Prepared

_SHARE = 0.01
_WEIGHTS = 1 << 23  # of one tensor: 16 MiB
_ROW = 4096

Words = NDArray[np.uint16]
Places = NDArray[np.intp]
Pattern = Callable[[np.random.Generator], tuple[Words, Words]]


def as_trained(rng: np.random.Generator) -> tuple[Words, Words]:
    """A tensor before and after a step of one size for all its weights."""
    master = _normal(rng)
    signs = rng.choice(np.array([-1, 1], np.float32), _WEIGHTS)
    before, low, high = _bf16(master), 0.0, 1e-3
    for _ in range(20):
        size = (low + high) / 2
        after = _bf16((master + signs * np.float32(size)).astype(np.float32))
        low, high = (low, size) if np.mean(before != after) > _SHARE else (size, high)
    return before, after


def anywhere(rng: np.random.Generator) -> tuple[Words, Words]:
    """A tensor before and after one weight in a hundred moved by a unit in the last place."""
    before = _bf16(_normal(rng))
    steps = rng.choice(np.array([1, 0xFFFF], np.uint16), _WEIGHTS)
    return before, before + steps * (rng.random(_WEIGHTS) < _SHARE)


def in_rows(rng: np.random.Generator) -> tuple[Words, Words]:
    """A tensor before and after all weights of one row in a hundred moved by a unit in the last place."""
    before = _bf16(_normal(rng))
    after = before.copy()
    rows = after.reshape(-1, _ROW)
    rows[rng.permutation(len(rows))[: round(_SHARE * len(rows))]] += np.uint16(1)
    return before, after


def _normal(rng: np.random.Generator) -> NDArray[np.float32]:
    return (rng.standard_normal(_WEIGHTS) * 0.02).astype(np.float32)


def _bf16(values: NDArray[np.float32]) -> Words:
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


State = dict[str, torch.Tensor]

_HASH = "import hashlib; data = bytes(1 << 21); [hashlib.sha256(data) for _ in range(300)]"


def states(pattern: Pattern, tensors: int) -> tuple[State, State]:
    """The whole state before and after. Each tensor is one of four, in memory of its own."""
    rng = np.random.default_rng(0)
    made = [pattern(rng) for _ in range(min(4, tensors))]
    both: tuple[State, State] = {}, {}
    for k in range(tensors):
        for state, words in zip(both, made[k % len(made)], strict=True):
            state[f"layers.{k}.weight"] = torch.from_numpy(words.view(np.int16).copy()).view(torch.bfloat16)
    return both


def places_and_values(before: State, after: State) -> tuple[int, int]:
    """Bytes of the changed weights as int32 places and bf16 values: plain, and after zstd at level 3."""
    plain = packed = 0
    zstd = zstandard.ZstdCompressor(level=3)
    for name, tensor in after.items():
        old, new = (t.view(torch.int16).numpy() for t in (before[name], tensor))
        places = np.flatnonzero(old != new).astype(np.int32)
        plain += 6 * len(places)
        packed += sum(len(zstd.compress(part.tobytes())) for part in (places, new[places]))
    return plain, packed


Took = tuple[float, float]  # seconds by the clock, seconds of the CPU's in all threads


def timed(action: Callable[[], object]) -> Took:
    """How long it takes, on a device too."""
    before, start = os.times(), time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, after = time.perf_counter() - start, os.times()
    return wall, after.user + after.system - before.user - before.system


def load(path: Path, model: State) -> None:
    """What an engine does without a stream: as load_state_dict copies into the parameters."""
    device = next(iter(model.values())).device
    loaded = load_file(path, device=str(device))
    for name, tensor in model.items():
        tensor.copy_(loaded[name])


class Follower:
    """A model that follows the stream in two phases."""

    def __init__(self, stream: Path, state: State, threads: int | None = None) -> None:
        self.model = {name: tensor.clone() for name, tensor in state.items()}
        self._subscriber = DeltaSubscriber(stream, threads=threads)
        self._subscriber.sync(self.model)
        self._prepared: Prepared | None = None

    def prepare(self) -> None:
        self._prepared = self._subscriber.prepare(self.model)

    def commit(self) -> None:
        assert self._prepared
        self._prepared.commit()

    def sync(self) -> None:
        self._subscriber.sync(self.model)


def touch(model: State, lines: dict[str, Places]) -> None:
    """Read a word of every cache line that a commit writes to."""
    for name, places in lines.items():
        model[name].view(torch.int64).numpy().take(places)


def lines_of(before: State, after: State) -> dict[str, Places]:
    """For each tensor the first words of the cache lines (64 bytes) in which something changes."""
    words = {name: tensor.view(torch.int64).view(-1, 8) for name, tensor in before.items()}
    changed = {name: (after[name].view(torch.int64).view(-1, 8) != old).any(1) for name, old in words.items()}
    return {name: 8 * np.flatnonzero(found.numpy()) for name, found in changed.items()}


def measure(
    folder: Path, states: tuple[State, State], repeats: int, device: str
) -> tuple[int, dict[str, list[Took]]]:
    """The largest update's bytes; and save, publish, load, prepare, commit and sync by turns."""
    file, stream = folder / "state.safetensors", folder / "stream"
    states = states if device == "cpu" else tuple({n: t.to(device) for n, t in s.items()} for s in states)  # type: ignore[assignment]
    plain = {n: t.clone() for n, t in states[0].items()}
    lines = lines_of(*states) if device == "cpu" else {}
    took: dict[str, list[Took]] = {}
    with DeltaPublisher(stream, states[0], anchor_base=False, anchor_every=None) as publisher:
        phased, synced = (Follower(stream, states[0]) for _ in range(2))
        for step in range(1, repeats + 2):
            state = states[step % 2]
            actions: dict[str, Callable[[], object]] = {
                "save": partial(save_file, state, file),
                "publish": partial(publisher.publish, step, state),
                "load": partial(load, file, plain),
                "load_file alone": partial(load_file, file, device=device),
                "prepare": phased.prepare,
                "commit": phased.commit,
                "sync": synced.sync,
                "touch": partial(touch, plain, lines),
            }
            for name, action in actions.items():
                seconds = timed(action)
                if step > 1:  # the first one compiles, and makes the memory warm
                    took.setdefault(name, []).append(seconds)
            for model in (phased.model, synced.model):
                assert all(
                    torch.equal(model[n].view(torch.int16), t.view(torch.int16)) for n, t in state.items()
                )
    return max(path.stat().st_size for path in stream.glob("*.update.safetensors")), took


class Generation:
    """A small causal model that generates as fast as one core allows."""

    def __init__(self) -> None:
        self._layers = [torch.randn(1024, 1024) / 32 for _ in range(4)]
        self._stopped = threading.Event()
        self.steps = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(1)  # counts in this thread
        hidden = torch.ones(8, 1024)
        while not self._stopped.is_set():
            for layer in self._layers:
                hidden = torch.nn.functional.layer_norm(torch.relu(hidden @ layer), (1024,))
            self.steps += 1

    def count(self, action: Callable[[], object]) -> float:
        """The steps each second while an action runs."""
        before, start = self.steps, time.perf_counter()
        action()
        return (self.steps - before) / (time.perf_counter() - start)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def slowdown(folder: Path, states: tuple[State, State], repeats: int) -> dict[str, float]:
    """How much slower generation is (0.1: by a tenth) beside prepare with one thread, beside loading, and
    beside a process that hashes, which shares nothing with it but the machine."""
    stream, file = folder / "stream", folder / "state.safetensors"
    save_file(states[0], file)
    found: dict[str, list[float]] = {}
    with DeltaPublisher(stream, states[0], anchor_base=False, anchor_every=None) as publisher:
        follower = Follower(stream, states[0], threads=1)
        publisher.publish(1, states[1])
        follower.prepare()
        actions: dict[str, Callable[[], object]] = {
            "prepare, 1 thread": follower.prepare,
            "load": partial(load, file, {name: tensor.clone() for name, tensor in states[0].items()}),
            "another process": partial(subprocess.run, [sys.executable, "-c", _HASH], check=True),
        }
        generation = Generation()
        try:
            for _ in range(2 * repeats):
                for name, action in actions.items():
                    alone = generation.count(partial(time.sleep, 0.3))
                    found.setdefault(name, []).append(1 - generation.count(action) / alone)
        finally:
            generation.stop()
    return {name: median(some) for name, some in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=64, help="of 16 MiB each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where both models lie, such as cuda; default cpu")
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    options = parser.parse_args()
    missed = []
    for title, pattern in (("as trained", as_trained), ("anywhere", anywhere), ("in rows", in_rows)):
        both = states(pattern, options.tensors)
        plain, packed = places_and_values(*both)
        full = sum(tensor.nbytes for tensor in both[0].values())
        with pairs.work_folder(options.folder, 2 * full) as folder:
            update, took = measure(folder, both, options.repeats, options.device)
        if pattern is as_trained:
            with pairs.work_folder(options.folder, 2 * full) as folder:
                slower = slowdown(folder, both, options.repeats)
            print_table([["generation beside", "slower by"], *([n, f"{s:.0%}"] for n, s in slower.items())])
        del both  # before the next ones
        rows = [[title, "bytes", "of the state", "times the update's"]]
        for name, size in (
            ("one update", update),
            ("places and values", plain),
            ("these after zstd", packed),
        ):
            rows.append([name, f"{size:,}", f"{size / full:.3%}", f"{size / update:.2f}"])
        print_table(rows)
        wall = {name: median(seconds for seconds, _ in found) for name, found in took.items()}
        cpu = {name: median(seconds for _, seconds in found) for name, found in took.items()}
        rows = [
            [name, f"{wall[name]:.3f}", f"{cpu[name]:.3f}", f"{wall[name] / wall['load']:.2f}"]
            for name in wall
        ]
        print_table([["medians", "seconds", "CPU's", "of load"], *rows])
        if pattern is as_trained:
            missed = check(full, update, plain, packed, wall)
            is_slow = slower["prepare, 1 thread"] > slower["another process"] + 0.25
            missed += ["generation beside prepare"] * is_slow
    finish(missed)


def check(full: int, update: int, plain: int, packed: int, wall: dict[str, float]) -> list[str]:
    """The figures that do not hold."""
    figures = {
        "an update is at most 1.0% of the state": 100 * update <= full,
        "4 times smaller than places and values": 4 * update <= plain,
        "2 times smaller than these after zstd": 2 * update <= packed,
        "publish is faster than saving": wall["publish"] < wall["save"],
        "sync is faster than loading": wall["sync"] < wall["load"],
    }
    return [name for name, holds in figures.items() if not holds]


if __name__ == "__main__":
    main()
