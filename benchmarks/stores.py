"""What object stores cost where base and delta lie in an S3 on loopback: bytes, requests, peak memory.

    python benchmarks/stores.py [--mib 2048] [--hidden 2048]

diff and apply run as a user would type them, from folders and from the store, into a folder; apply also into
the store, which may write 64 MiB to disks. Figures: bytes fetched at most 1.05 times those needed (for apply,
what `plan` counts; for diff, all of base and target), requests at most 200 per GB fetched or sent, and peak
memory at most 128 MiB above that of folders. The smaller a model's tensors are, the more requests `diff`
makes: one small one for each, to find tensors that are equal. Here they have 8 MiB.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree

import pairs
from children import MIB, Command, deltaweights, finish, print_table, run_measured

from deltaweights import plan_apply

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.s3_server import S3Server

_MOST_FETCHED, _MOST_REQUESTS, _MOST_MEMORY, _MOST_DISK = 1.05, 200, 128 * MIB, 64 * MIB


def measure(s3: S3Server, name: str, needed: int, local: Command, far: Command) -> list[str]:
    """Print what a command takes from folders and from the store. Returns the figures that do not hold."""
    # The peak of a child is at least its parent's: let a small process start them.
    with ProcessPoolExecutor(1, get_context("spawn")) as small:
        folders = small.submit(run_measured, local).result()
        s3.log.clear()
        store = small.submit(run_measured, far).result()
    fetched, requests = s3.bytes_sent("safetensors"), len(s3.log)
    per_gb = requests / (fetched / 1e9)
    print_table(
        [
            [name, "from folders", "from the store"],
            ["seconds", f"{folders.wall:.1f}", f"{store.wall:.1f}"],
            ["peak MiB", f"{folders.peak / MIB:.0f}", f"{store.peak / MIB:.0f}"],
            ["bytes fetched / needed", "", f"{fetched / needed:.4f}"],
            ["requests", "", f"{requests}"],
            ["requests per GB", "", f"{per_gb:.0f}"],
        ]
    )
    missed = []
    if fetched > needed * _MOST_FETCHED:
        missed.append(f"{name} fetches {fetched / needed:.3f} of what it needs")
    if per_gb > _MOST_REQUESTS:
        missed.append(f"{name} makes {per_gb:.0f} requests per GB")
    if store.peak > folders.peak + _MOST_MEMORY:
        missed.append(f"{name} takes {(store.peak - folders.peak) / MIB:.0f} MiB more than from folders")
    return missed


def measure_both_ways(s3: S3Server, nbytes: int, delta: str, base: str, local: Command) -> list[str]:
    """Print what apply takes from the store to the store, and from folders to a folder, which is ``local``.
    Returns the figures that do not hold."""
    with ProcessPoolExecutor(1, get_context("spawn")) as small:
        folders = small.submit(run_measured, local).result()
        s3.log.clear()
        far = deltaweights("apply", delta, "--base", base, "-q", "-o", "s3://bucket/out")
        store = small.submit(run_measured, far).result()
    sent = s3.system.du("bucket/out")
    puts = sum(request.method in ("PUT", "POST", "DELETE") for request in s3.log)
    print_table(
        [
            ["apply", "folders to folder", "store to store"],
            ["seconds", f"{folders.wall:.1f}", f"{store.wall:.1f}"],
            ["peak MiB", f"{folders.peak / MIB:.0f}", f"{store.peak / MIB:.0f}"],
            ["MiB written to disks", f"{folders.written / MIB:.0f}", f"{store.written / MIB:.0f}"],
            ["MiB sent", "", f"{sent / MIB:.0f}"],
            ["requests that write", "", f"{puts}"],
            ["of them per GB", "", f"{puts / (nbytes / 1e9):.0f}"],
        ]
    )
    missed = []
    if store.written > _MOST_DISK:
        missed.append(f"apply to the store writes {store.written / MIB:.0f} MiB to disks")
    if puts / (nbytes / 1e9) > _MOST_REQUESTS:
        missed.append(f"apply to the store makes {puts / (nbytes / 1e9):.0f} requests per GB that write")
    if store.peak > folders.peak + _MOST_MEMORY:
        more = (store.peak - folders.peak) / MIB
        missed.append(f"apply from store to store takes {more:.0f} MiB more than from folders to a folder")
    return missed


def upload(s3: S3Server, folder: Path) -> None:
    """Put a folder into the bucket, a part at a time: the server is in this process."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = f"bucket/{folder.name}/{path.relative_to(folder).as_posix()}"
            s3.system.put_file(str(path), place, max_concurrency=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="size of the target")
    parser.add_argument("--hidden", type=int, default=pairs.HIDDEN, help="width of its square matrices")
    parser.add_argument("--work", type=Path, help="a folder for temporary files")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    nbytes = options.mib * MIB
    with pairs.work_folder(options.work, 6 * nbytes) as work, S3Server() as s3:
        os.environ |= s3.env
        s3.empty()
        pair = pairs.Pair(work)
        pairs.make_in_child(pair, nbytes, shards=max(2, options.mib // 256), hidden=options.hidden)
        for side in (pair.base, pair.target):
            upload(s3, side)
        base, target, delta = (f"s3://bucket/{name}" for name in (pair.base.name, pair.target.name, "delta"))
        whole = sum(path.stat().st_size for side in (pair.base, pair.target) for path in side.iterdir())
        places = [work / name for name in ("delta", "delta-2", "out", "out-2")]
        missed = measure(
            s3,
            "diff",
            whole,
            deltaweights("diff", pair.base, pair.target, "-o", places[0], "-q"),
            deltaweights("diff", base, target, "-o", places[1], "-q"),
        )
        upload(s3, places[0])
        plan = plan_apply(places[0], base=pair.base)
        missed += measure(
            s3,
            "apply",
            plan.delta.needed + (plan.base.needed if plan.base else 0),
            deltaweights("apply", places[0], "--base", pair.base, "-o", places[2], "-q"),
            deltaweights("apply", delta, "--base", base, "-o", places[3], "-q"),
        )
        rmtree(places[2])
        local = deltaweights("apply", places[0], "--base", pair.base, "-o", places[2], "-q")
        missed += measure_both_ways(s3, plan.disk[0].needed, delta, base, local)
    finish(missed)


if __name__ == "__main__":
    main()
