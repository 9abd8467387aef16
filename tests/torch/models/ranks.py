"""What two processes of test_callback.py do, by torchrun: ``-m tests.torch.models.ranks BASE FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from deltaweights.torch import DeltaCallback, DeltaCheckpointer

from .test_callback import (
    Interrupter,
    InterruptionError,
    Recorder,
    long_training,
    with_dropout,
)


def main(base: Path, folder: Path) -> None:
    """A training that nothing interrupts, and one that goes on: equal on each process, dropout too."""
    whole = Recorder()
    long_training(with_dropout(base), folder, whole, max_steps=4).train()
    with DeltaCheckpointer(folder / "checkpoints", base) as checkpointer:
        callback = DeltaCallback(checkpointer, every=1)
        trainer = long_training(with_dropout(base), folder, callback, Interrupter(3), max_steps=4)
        try:
            trainer.train(resume_from_checkpoint=callback.restore(trainer))
        except InterruptionError:
            checkpointer.wait()
    dist.barrier()
    again = Recorder()
    with DeltaCheckpointer(folder / "checkpoints", base) as checkpointer:
        assert checkpointer.steps == [1, 2]
        callback = DeltaCallback(checkpointer, every=1)
        trainer = long_training(with_dropout(base, 3.0), folder, again, callback, max_steps=4)
        trainer.train(resume_from_checkpoint=callback.restore(trainer))
    assert list(again.states) == [3, 4]
    assert again.states[4] == whole.states[4]
    assert again.random_states[4] == whole.random_states[4]
    print(f"process {dist.get_rank()} is done")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
