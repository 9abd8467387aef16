"""What two processes do, by torchrun: ``-m tests.torch.models.ranks TASK BASE FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import TrainerControl, TrainerState, TrainingArguments

from deltaweights import CheckpointError
from deltaweights.torch import (
    DeltaCallback,
    DeltaCheckpointer,
    DeltaPublisher,
    DeltaSubscriber,
    load_into,
    save_delta,
)

from ..process_groups import end_rank
from ..tiny_models import raw_state, tiny_qwen2
from .test_callback import (
    Interrupter,
    InterruptionError,
    Recorder,
    long_training,
    with_dropout,
)


def go_on(base: Path, folder: Path) -> None:
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


def fsdp(base: Path, folder: Path) -> None:
    """A model in FSDP's first version: saved whole, and refused where only a part could be had or written."""
    dist.init_process_group("gloo")
    rank, whole = dist.get_rank(), tiny_qwen2(seed=5)
    expected = raw_state(whole.state_dict())
    for keeps_parameters in (False, True):
        model = FullyShardedDataParallel(
            tiny_qwen2(seed=5), device_id=torch.device("cpu"), use_orig_params=keeps_parameters
        )
        out = folder / f"{keeps_parameters}-{rank}"
        save_delta(model, base, out)
        loaded = tiny_qwen2()
        load_into(loaded, out, base)
        assert raw_state(loaded.state_dict()) == expected
        with pytest.raises(CheckpointError, match="makes copies of"):
            load_into(model, out, base)
        checkpointer = DeltaCheckpointer(folder / f"checkpoints-{out.name}", base)
        arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
        with checkpointer, pytest.raises(CheckpointError, match="sharded over several processes"):
            DeltaCallback(checkpointer, 1).on_train_begin(
                arguments, TrainerState(), TrainerControl(), model=model
            )
        stream = folder / f"stream-{out.name}"
        with DeltaPublisher(stream, loaded), pytest.raises(CheckpointError, match="makes copies of"):
            DeltaSubscriber(stream).sync(model)
        with pytest.raises(CheckpointError, match=r"FSDP made one of|placeholders, as .* FSDP"):
            save_delta(dict(model.named_parameters()), base, folder / f"parts-{rank}")
        config = FullStateDictConfig(rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
            if rank:
                with pytest.raises(CheckpointError, match="from this process"):
                    save_delta(model, base, folder / f"empty-{rank}")
            else:
                model.state_dict()  # with the others
        for kind in (StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT):
            refusal = pytest.raises(CheckpointError, match="sharded over several processes")
            with FullyShardedDataParallel.state_dict_type(model, kind), refusal:
                save_delta(model, base, folder / f"sharded-{rank}")


if __name__ == "__main__":
    {"go_on": go_on, "fsdp": fsdp}[sys.argv[1]](*map(Path, sys.argv[2:]))
    dist.destroy_process_group()
    print("a process is done")
    end_rank()
