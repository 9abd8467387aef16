"""Publishing from sharded ranks beside gathering first: a bf16 state over gloo ranks, 1% of which changes.

"gathered" is what a trainer does without process_group: full_tensor() of every DTensor on all ranks, and rank
0 publishes; "sharded" is one publish with process_group on all ranks. Both write to a memory file system, by
turns, on the same cores; wall seconds are from a barrier to a barrier, medians of the steps. Memory is what a
rank's process takes more at its peak than before it made a publisher, as a multiple of its own shard in the
published dtype. Then the same from float32 master weights, which are published in bf16.

Figures: sharded takes at most 0.4 of the time of gathered; no rank takes more than 1.1 of its shard.

    python benchmarks/sharded.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pairs
import torch
import torch.distributed as dist
from children import finish, print_table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from deltaweights.torch import DeltaPublisher

_ROWS, _COLUMNS = 4096, 2048  # of one tensor: 16 MiB in bf16
_SHARE = 0.01
_MOST_TIME, _MOST_MEMORY = 0.4, 1.1
_STATUS = Path("/proc/self/status")

State = dict[str, DTensor]


def memory(field: str) -> int:
    """This process's memory in bytes: now (VmRSS), or at most (VmHWM)."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def sharded(mesh: DeviceMesh, tensors: int, dtype: torch.dtype) -> State:
    """Rows of every tensor on every rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = _ROWS // dist.get_world_size()
    return {
        f"layers.{k}.weight": DTensor.from_local(
            (torch.randn(rows, _COLUMNS, generator=generator) * 0.02).to(dtype), mesh, [Shard(0)]
        )
        for k in range(tensors)
    }


def train(state: State, step: int) -> None:
    """Some weights, different ones each time, move by so much that they differ in bf16 too."""
    for tensor in state.values():
        flat = tensor.to_local().view(-1)
        flat[step :: int(1 / _SHARE)] *= 1.02


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def rank_main(rank: int, ranks: int, folder: Path, tensors: int, steps: int, dtype: torch.dtype) -> None:
    """What one rank does: it leaves its figures in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    state = sharded(init_device_mesh("cpu", (ranks,)), tensors, dtype)
    shard = sum(2 * tensor.to_local().numel() for tensor in state.values())
    group = dist.group.WORLD
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    publisher = DeltaPublisher(
        folder / "sharded", state, dtype=torch.bfloat16, process_group=group, anchor_every=None
    )
    took: dict[str, list[float]] = {"sharded": [], "gathered": []}
    for step in range(1, 3):
        train(state, step)
        update = publisher.publish(step, state).update_bytes
    peak = memory("VmHWM") - before

    def gather() -> dict[str, torch.Tensor]:
        whole = {}
        for name, tensor in state.items():
            full = tensor.full_tensor()
            if rank == 0:
                whole[name] = full.to(torch.bfloat16)
        return whole

    start = gather()
    alone = DeltaPublisher(folder / "gathered", start, anchor_every=None) if rank == 0 else None
    del start

    def publish_gathered(step: int) -> None:
        whole = gather()
        if alone:
            alone.publish(step, whole)

    for step in range(3, steps + 4):
        train(state, step)
        seconds = {
            "sharded": timed(partial(publisher.publish, step, state)),
            "gathered": timed(partial(publish_gathered, step)),
        }
        for name, one in seconds.items():
            if step > 3:  # the first one makes the memory warm
                took[name].append(one)
    figures = {
        "peak": peak / shard,
        "took": {name: median(all_) for name, all_ in took.items()},
        "update": update,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, tensors: int, steps: int, dtype: str, chosen: Path | None) -> tuple[float, float]:
    """The time of sharded as a share of that of gathered, and the most memory of a rank."""
    with pairs.work_folder(chosen, 6 * tensors << 24) as folder:
        options = [str(folder), "--tensors", str(tensors), "--steps", str(steps), "--dtype", dtype]
        children = [
            subprocess.Popen([sys.executable, __file__, "--rank", str(rank), "--ranks", str(ranks), *options])
            for rank in range(ranks)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            raise SystemExit("a rank failed")
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    took = found[0]["took"]
    peaks = [one["peak"] for one in found]
    print_table(
        [
            [f"{ranks} ranks, {dtype}, {tensors * 16} MiB in bf16", "seconds", "of gathered"],
            ["gathered", f"{took['gathered']:.3f}", "1.00"],
            ["sharded", f"{took['sharded']:.3f}", f"{took['sharded'] / took['gathered']:.2f}"],
            ["memory of a rank, of its shard", "", " to ".join(f"{p:.3f}" for p in (min(peaks), max(peaks)))],
            ["one update, bytes", f"{found[0]['update']:,}", ""],
        ]
    )
    return took["sharded"] / took["gathered"], max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where files go; /dev/shm if it has room, else disk"
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensors", type=int, default=64, help="of 16 MiB each in bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of the trainer's weights; default both"
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        torch.set_num_threads(1)
        dtype = getattr(torch, options.dtype)
        rank_main(options.rank, options.ranks, options.folder, options.tensors, options.steps, dtype)
        return
    missed = []
    for dtype in [options.dtype] if options.dtype else ["bfloat16", "float32"]:
        share, peak = measure(options.ranks, options.tensors, options.steps, dtype, options.folder)
        if share > _MOST_TIME:
            missed.append(
                f"{dtype}: sharded takes {share:.2f} of the time of gathered, more than {_MOST_TIME}"
            )
        if peak > _MOST_MEMORY:
            missed.append(f"{dtype}: a rank takes {peak:.2f} of its shard, more than {_MOST_MEMORY}")
    finish(missed)


if __name__ == "__main__":
    main()
