"""Updates of a weight stream beside those of slime, miles and stitch, of the same steps, in one run.

A bf16 state moves in two ways. "as trained": each weight has a master copy in float32, which a step moves by
one size, up or down; where that crosses a rounding border, the bf16 weight moves, mostly by a unit in the
last place. "anywhere": weights chosen blindly move by a unit in the last place. 1% or 4% of the weights move
in a step. Each step is published to a weight stream, as it is by default and with quick=False, and written by
a DiskUpdateWriter in both encodings (zstd at level 1, as that format has it). Sizes are those of all files of
a step: payloads, record and head, or shard and index. Seconds are medians over the steps.

Figure, for the pattern "as trained": the stream's update with quick=False is at least 3 times smaller than
both encodings, at 1% and at 4%. "Anywhere" has no figure: which weights move, and whether up or down, takes
0.091 bits a weight at 1%, 0.57% of the state, whatever the code, and xor takes less than 3 times that.

    python benchmarks/disk_updates.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import pairs
import torch
from children import finish, print_table
from numpy.typing import NDArray

from deltaweights.engines import DiskUpdateWriter
from deltaweights.torch import DeltaPublisher

_SHARES = (0.01, 0.04)
_WEIGHTS = 1 << 23  # of one tensor: 16 MiB
_FIGURE = 3.0

#: The stream as it is by default, and with quick=False.
_QUICK, _SMALL = "weight stream", "weight stream, not quick"

Floats = NDArray[np.float32]
Words = NDArray[np.uint16]
State = dict[str, torch.Tensor]


def as_trained(masters: list[Floats], share: float, rng: np.random.Generator) -> list[Words]:
    """Move all masters by one size, so that this share of the first one's bf16 weights moves."""
    signs = [rng.choice(np.array([-1, 1], np.float32), _WEIGHTS) for _ in masters]
    before, low, high = _bf16(masters[0]), 0.0, 1e-2
    for _ in range(20):
        size = (low + high) / 2
        after = _bf16((masters[0] + signs[0] * np.float32(size)).astype(np.float32))
        low, high = (low, size) if np.mean(before != after) > share else (size, high)
    for k, sign in enumerate(signs):
        masters[k] += sign * np.float32(low)
    return [_bf16(master) for master in masters]


def anywhere(words: list[Words], share: float, rng: np.random.Generator) -> list[Words]:
    """Move this share of the weights by a unit in the last place."""
    steps = np.array([1, 0xFFFF], np.uint16)
    return [one + rng.choice(steps, one.size) * (rng.random(one.size) < share) for one in words]


def _bf16(values: Floats) -> Words:
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def states(pattern: str, share: float, tensors: int, steps: int) -> Iterator[State]:
    """The states of a run, from the base on."""
    rng = np.random.default_rng(0)
    masters = [(rng.standard_normal(_WEIGHTS) * 0.02).astype(np.float32) for _ in range(tensors)]
    words = [_bf16(master) for master in masters]
    yield _state(words)
    for _ in range(steps):
        words = as_trained(masters, share, rng) if pattern == "as trained" else anywhere(words, share, rng)
        yield _state(words)


def _state(words: list[Words]) -> State:
    return {
        f"layers.{k}.weight": torch.from_numpy(one.view(np.int16).copy()).view(torch.bfloat16)
        for k, one in enumerate(words)
    }


def measure(folder: Path, run: Iterator[State]) -> dict[str, tuple[float, float]]:
    """For each format, the median size of a step's files, and the median seconds to write them."""
    base = next(run)
    sizes: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {}
    writers: dict[str, Callable[[int, State], object]] = {}
    places = {name: folder / name for name in (_QUICK, _SMALL, "xor", "overwrite")}
    with ExitStack() as opened:
        for name in (_QUICK, _SMALL):
            stream = DeltaPublisher(
                places[name], base, anchor_base=False, anchor_every=None, quick=name == _QUICK
            )
            writers[name] = opened.enter_context(stream).publish
        for encoding in ("xor", "overwrite"):
            writers[encoding] = opened.enter_context(
                DiskUpdateWriter(places[encoding], base, encoding=encoding)
            ).publish
        before = {name: _size(place) for name, place in places.items()}
        for step, state in enumerate(run, 1):
            for name, publish in writers.items():
                start = time.perf_counter()
                publish(step, state)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                size = _size(places[name])
                sizes.setdefault(name, []).append(size - before[name])
                before[name] = size
    return {name: (median(sizes[name]), median(seconds[name])) for name in sizes}


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=8, help="of 16 MiB each")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    options = parser.parse_args()
    full = options.tensors * _WEIGHTS * 2
    missed = []
    for pattern in ("as trained", "anywhere"):
        for share in _SHARES:
            with pairs.work_folder(options.folder, full) as folder:
                found = measure(folder, states(pattern, share, options.tensors, options.steps))
            ours, _ = found[_SMALL]
            rows = [[f"{pattern}, {share:.0%}", "bytes", "of the state", "times the stream's", "seconds"]]
            for name, (size, seconds) in found.items():
                rows.append(
                    [name, f"{size:,.0f}", f"{size / full:.3%}", f"{size / ours:.2f}", f"{seconds:.2f}"]
                )
                if pattern == "as trained" and name not in (_QUICK, _SMALL) and size < _FIGURE * ours:
                    missed.append(f"{pattern}, {share:.0%}: {_FIGURE:.0f} times smaller than {name}")
            print_table(rows)
    finish(missed)


if __name__ == "__main__":
    main()
