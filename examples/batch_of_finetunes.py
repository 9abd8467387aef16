"""Make the deltas of several fine-tunes of one base, rebuild one of them, and go on after a failure.

Run it: python examples/batch_of_finetunes.py
It works in a temporary folder and needs no network. In place of the folders, URLs such as s3://bucket/base do
as well; `executor=RayExecutor("auto")` runs the jobs on a Ray cluster.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaweights import ApplyJob, DiffJob, JobResult, run_batch


def save(path: Path, values: NDArray[np.float32]) -> None:
    """Write a safetensors file by hand; a real checkpoint comes from save_pretrained or save_file."""
    data = values.tobytes()
    header = {"weight": {"dtype": "F32", "shape": values.shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def show(results: Iterable[JobResult]) -> None:
    """One line a job, as they end."""
    for result in results:
        why = f": {result.error.what}" if result.error else ""
        print(f"  {result.id}: {result.status}{why}")


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = rng.normal(0, 0.02, (256, 512)).astype(np.float32)
        save(folder / "base" / "model.safetensors", weights)
        for k in range(4):
            update = rng.normal(0, 1e-5, weights.shape).astype(np.float32)
            save(folder / f"tuned-{k}" / "model.safetensors", weights + update)
        (folder / "tuned-3").rename(folder / "not-there-yet")

        jobs = [
            DiffJob(
                id=f"tune {k}",
                base=str(folder / "base"),
                target=str(folder / f"tuned-{k}"),
                delta=str(folder / f"delta-{k}"),
            )
            for k in range(4)
        ]
        results = folder / "results.jsonl"
        print("four jobs, two at a time; one fails, and stops nothing")
        show(run_batch(jobs, results, at_once=2))

        print("run again, it does what is left")
        (folder / "not-there-yet").rename(folder / "tuned-3")
        show(run_batch(jobs, results))

        print("rebuild one")
        out = str(folder / "model")
        show(
            run_batch([ApplyJob(id="use", delta=str(folder / "delta-3"), base=str(folder / "base"), out=out)])
        )


if __name__ == "__main__":
    main()
