"""What Ray costs and gains, against one process on this machine, measured side by side.

    python benchmarks/ray_overhead.py [--mib 4096] [--shards 8] [--folder FOLDER]

Prints the wall time of `diff` and `apply` with two threads in one process, by Ray on one node of two cores,
and by Ray on two nodes of one core each. Starting Ray is not counted. Needs two cores that nothing else uses,
and four times the size on disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaweights import Executor, RayExecutor, apply_delta, make_delta

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.checkpoints import bf16, digests, weights, write_safetensors

_MATRIX = (1024, 4096)  # 8 MiB in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=4096, help="the target's size")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None, help="where to work")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _write_pair(folder, options.mib // options.shards // 8, options.shards)
        alone = _seconds(folder, "alone", None, 2)
        for what, nodes in (("one node of 2 cores", [2]), ("two nodes of 1 core", [1, 1])):
            with cluster_of(nodes) as cluster, RayExecutor(cluster.address) as executor:
                list(executor.each(abs, range(4)))  # workers are started, and have imported what they need
                found = _seconds(folder, "ray", executor, 2)
            for verb in alone:
                ratio = found[verb] / alone[verb]
                print(
                    f"{verb}, {options.mib} MiB in {options.shards} shards: {alone[verb]:.2f} s in one "
                    f"process, {found[verb]:.2f} s by Ray on {what}: {ratio:.2f} times, "
                    f"efficiency {1 / ratio:.2f}",
                    flush=True,
                )


def _write_pair(folder: Path, matrices: int, shards: int) -> None:
    update = weights(_MATRIX, 99, 2e-4)
    for k in range(shards):
        old, new = {}, {}
        for m in range(matrices):
            values = weights(_MATRIX, k * matrices + m)
            old[f"layers.{k}.{m}"], new[f"layers.{k}.{m}"] = bf16(values), bf16(values + update)
        write_safetensors(folder / "base" / f"model-{k}.safetensors", old)
        write_safetensors(folder / "target" / f"model-{k}.safetensors", new)


def _seconds(folder: Path, name: str, executor: Executor | None, threads: int) -> dict[str, float]:
    """The best of four runs of each verb; the results are compared with those of one process."""
    base, target, delta, out = folder / "base", folder / "target", folder / name, folder / "out"
    found = {
        "diff": _best(
            lambda: make_delta(base, target, delta, threads=threads, executor=executor, force=True)
        ),
        "apply": _best(
            lambda: apply_delta(delta, out, base=base, threads=threads, executor=executor),
            lambda: shutil.rmtree(out, ignore_errors=True),
        ),
    }
    assert digests(delta) == digests(folder / "alone")
    shutil.rmtree(out)
    if executor:
        shutil.rmtree(delta)
    return found


def _best(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(4):
        before()
        os.sync()  # what was written before is not paid for here
        began = time.monotonic()
        run()
        times.append(time.monotonic() - began)
    return min(times)


@contextmanager
def cluster_of(cores: list[int]) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], "include_dashboard": False})
    try:
        for count in cores[1:]:
            cluster.add_node(num_cpus=count)
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
