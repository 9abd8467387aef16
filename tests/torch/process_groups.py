"""Several processes in one process group, as a training has them: how tests start them, how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

ROOT = Path(__file__).parents[2]

#: For a rank's process. It says where it was when a signal ended it.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}

#: How much of a process's output an assertion shows. The cause of a failure is at the end, and what is longer
#: is cut there.
SHOWN = 6000


@contextmanager
def process_group(**options: Any) -> Iterator[None]:
    """This process is a rank of torch's default group, over gloo."""
    dist.init_process_group("gloo", **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def end_rank() -> NoReturn:
    """Ends a rank that did its work, without what the interpreter does at its end.

    A group that is destroyed lives on, with gloo's threads, where models in cycles or torch's caches refer to
    it. One of the threads that lets go of its last tensor while the interpreter ends aborts the process
    (pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def torchrun(ranks: int, module: str, *arguments: str | Path) -> tuple[int, str]:
    """Runs a module in so many processes. Returns the exit code, and the end of what they wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout[-SHOWN:]
