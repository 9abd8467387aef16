"""How close ``apply`` comes to the least that it must do, on a memory file system.

Two pairs of bf16 checkpoints, one in several shards and one in a single shard, update std 2e-4. Measured
on each, as fresh processes one after the other, five times over, of which the medians are printed:

  apply   python -m deltaweights apply
  floor   floor.py: reads base and delta, writes and SHA-256-hashes the target's number of bytes
  diff    python -m deltaweights diff, for information

Wall time and CPU time (user + system, all threads) are the whole process's, start-up included. Figure:
wall time of apply at most 2.0 times the floor's, for both pairs. Then, to see where time goes, what one
core does of each stage alone, in GB/s of target bytes (the best of five runs).

    python benchmarks/apply.py
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pairs
from children import Command, Usage, deltaweights, finish, print_table, run_measured

from deltaweights import codec

_MOST = 2.0
_BLOCK = 1 << 20
_BLOCKS = 64


def measure(pair: pairs.Pair, repeats: int) -> dict[str, list[Usage]]:
    """Every program on one pair, interleaved, so that a busy machine slows all of them."""
    delta, out = pair.root / "delta", pair.root / "out"
    floor = Path(__file__).with_name("floor.py")
    programs: dict[str, tuple[Path, Command]] = {
        "diff": (delta, deltaweights("diff", pair.base, pair.target, "-o", delta, "-q")),
        "apply": (out, deltaweights("apply", delta, "--base", pair.base, "-o", out, "-q")),
        "floor": (out, [sys.executable, floor, pair.base, delta, out]),
    }
    usages: dict[str, list[Usage]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (written, command) in programs.items():
            shutil.rmtree(written, ignore_errors=True)
            touch_memory(pair.root / "touched", bytes_in(pair.target))
            usages[name].append(run_measured(command))
        shutil.rmtree(out)
    return usages


def touch_memory(path: Path, nbytes: int) -> None:
    """Write and delete a file as large as the output, so that every program finds memory of one kind.

    A virtual machine gives pages that are long free back to its host, and has to get them again when they
    are next written. Without this the program that runs first pays for that, and the next one does not.
    """
    block = bytes(_BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-nbytes // _BLOCK)):
            file.write(block)
    path.unlink()


def rows_of(title: str, usages: dict[str, list[Usage]], nbytes: int) -> list[list[str]]:
    """Table rows: medians, and the ratio to the floor's median."""
    floor = median(usage.wall for usage in usages["floor"])
    rows = []
    for name in ("apply", "floor", "diff"):
        wall = median(usage.wall for usage in usages[name])
        cpu = median(usage.cpu for usage in usages[name])
        numbers = [f"{wall:.2f}", f"{cpu:.2f}", f"{nbytes / wall / 1e9:.2f}", f"{wall / floor:.2f}"]
        rows.append([f"{title}: {name}", *numbers])
    return rows


def ratio_of(usages: dict[str, list[Usage]]) -> float:
    """Median wall time of apply, as a multiple of the floor's."""
    return median(u.wall for u in usages["apply"]) / median(u.wall for u in usages["floor"])


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def stage_rows(folder: Path) -> list[list[str]]:
    """What one core does of each stage alone."""
    data = np.random.default_rng(0).bytes(_BLOCK)
    buffer = bytearray(_BLOCK)
    fd = os.open(folder / "stage", os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def write_new(block: int) -> None:
        if not block:
            os.ftruncate(fd, 0)
        os.pwrite(fd, data, block * _BLOCK)

    stages: dict[str, Callable[[int], object]] = {
        "pwrite, new file": write_new,
        "pread": lambda block: os.preadv(fd, [buffer], block * _BLOCK),
        "sha256": lambda block: hashlib.sha256(data),
        "xxh3": lambda block: codec.checksum(np.frombuffer(data, np.uint8)),
    }
    for update in (2e-4, 1e-5):
        stages |= codec_stages(update)
    rows = [[name, f"{rate(stage):.2f}"] for name, stage in stages.items()]
    os.close(fd)
    return rows


def codec_stages(update: float) -> dict[str, Callable[[int], object]]:
    """Encoding and decoding of blocks whose weights differ by updates of this standard deviation."""
    drawn = [pairs.draw((block,), _BLOCK // 2, update) for block in range(8)]
    coded = [codec.encode_chunk(base, target, "BF16") for base, target in drawn]
    out = np.empty(_BLOCK, np.uint8)

    def encode(block: int) -> object:
        return codec.encode_chunk(*drawn[block % 8], "BF16")

    def decode(block: int) -> None:
        method, data = coded[block % 8]
        codec.decode_chunk(method, data, drawn[block % 8][0], "BF16", out)

    return {f"encode, update std {update:.0e}": encode, f"decode, update std {update:.0e}": decode}


def rate(stage: Callable[[int], object]) -> float:
    """GB/s over the blocks, the best of five runs."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for block in range(_BLOCKS):
            stage(block)
        seconds.append(time.perf_counter() - start)
    return _BLOCK * _BLOCKS / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=float, default=4, metavar="GIB", help="of each target, default 4")
    parser.add_argument("--shards", type=int, default=4, help="of the first pair, default 4")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    options = parser.parse_args()
    nbytes = int(options.size * pairs.GIB)
    rows, missed = [["", "wall s", "cpu s", "GB/s", "x floor"]], []
    with pairs.work_folder(options.folder, 4 * nbytes) as folder:
        for shards in (options.shards, 1):
            title = f"{shards} shard{'s' if shards > 1 else ''}"
            pair = pairs.Pair(folder / "pair")
            pairs.make_in_child(pair, nbytes, shards=shards)
            usages = measure(pair, options.repeats)
            rows += rows_of(title, usages, bytes_in(pair.target))
            if ratio_of(usages) > _MOST:
                missed.append(f"{title}: apply takes {ratio_of(usages):.2f} times the floor, not {_MOST}")
            shutil.rmtree(pair.root)
        stages = stage_rows(folder)
    print_table(rows)
    print_table([["one core", "GB/s"], *stages])
    finish(missed)


if __name__ == "__main__":
    main()
