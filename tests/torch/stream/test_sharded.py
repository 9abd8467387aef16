"""Weight streams of sharded trainers: every rank writes its own parts. What the ranks do and compare is in
ranks.py; here is what needs no second process, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(ranks: int, tasks: str, folder: Path) -> list[tuple[int, str]]:
    """Let ``ranks`` processes do the tasks. Returns their exit codes and outputs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    module = [sys.executable, "-m", "tests.torch.stream.ranks"]
    processes = [
        subprocess.Popen(
            [*module, tasks, str(folder), str(rank), str(ranks)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_two_ranks_publish_what_they_have_and_followers_are_equal(tmp_path: Path) -> None:
    """FSDP2, tensor parallelism, parts of all kinds, and failures."""
    for code, output in run(2, "fsdp,parts,tensor_parallel,failures", tmp_path):
        assert code == 0, output


def test_four_ranks_with_replicas_and_two_kinds_of_parallelism(tmp_path: Path) -> None:
    for code, output in run(4, "parts,tensor_parallel", tmp_path):
        assert code == 0, output
