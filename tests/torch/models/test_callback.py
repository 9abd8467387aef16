"""The Trainer of transformers, really training, with checkpoints as deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from deltaweights import CheckpointError, OutputError
from deltaweights.torch import DeltaCallback, DeltaCheckpointer, list_checkpoints

from ...conftest import Trio
from ..tiny_models import raw_state, tiny_qwen2


class Recorder(TrainerCallback):
    """Keeps the weights of every step, bit for bit."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[state.global_step] = dict(raw_state(kwargs["model"].state_dict()))


def train(model: PreTrainedModel, folder: Path, steps: int, callback: DeltaCallback) -> Recorder:
    """Train on made-up text; the learning rate is high enough that every step moves weights in BF16."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (16, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    recorder = Recorder()
    Trainer(model, arguments, train_dataset=data, callbacks=[recorder, callback]).train()
    return recorder


def test_checkpoints_of_a_real_training_come_back_bit_for_bit(qwen2: Trio, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    model = open_model(qwen2.base)
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3) as checkpointer:
        first = train(model, tmp_path / "trainer", 5, DeltaCallback(checkpointer, every=2))
        assert checkpointer.steps == [2, 4, 5]
        for step in checkpointer.steps:
            restored = tiny_qwen2(seed=99)
            checkpointer.load_into(restored, step)
            assert raw_state(restored.state_dict()) == first.states[step]
    assert len(list_checkpoints(folder)[5]) == 3

    resumed = open_model(qwen2.base)
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3) as checkpointer:
        assert checkpointer.load_into(resumed) == 5
        second = train(resumed, tmp_path / "trainer", 2, DeltaCallback(checkpointer, every=2))
        assert checkpointer.steps == [2, 4, 5, 7]  # goes on counting
        checkpointer.load_into(restored, 7)
    assert raw_state(restored.state_dict()) == second.states[2]
    assert second.states[2] != first.states[2]


def test_training_anew_where_another_run_s_checkpoints_are_is_refused_at_once(
    qwen2: Trio, tmp_path: Path
) -> None:
    for run in range(2):
        with DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base, keep=3) as checkpointer:
            callback = DeltaCallback(checkpointer, every=1)
            if run:
                with pytest.raises(OutputError, match="another run"):
                    train(tiny_qwen2(), tmp_path / "trainer", 3, callback)
            else:
                train(tiny_qwen2(), tmp_path / "trainer", 3, callback)
            assert checkpointer.steps == [1, 2, 3]


def open_model(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def test_a_failed_checkpoint_ends_the_training(qwen2: Trio, tmp_path: Path) -> None:
    checkpointer = DeltaCheckpointer(tmp_path / "checkpoints", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere"):
        train(tiny_qwen2(), tmp_path / "trainer", 4, DeltaCallback(checkpointer, every=1))
    checkpointer.close()


def test_resuming_before_the_last_checkpoint_is_an_error(qwen2: Trio, tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState

    with DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer:
        checkpointer.save(10, tiny_qwen2())
        callback = DeltaCallback(checkpointer, every=2)
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        with pytest.raises(OutputError, match=r"discard_after\(4\)"):
            callback.on_train_begin(arguments, TrainerState(global_step=4), TrainerControl())
        checkpointer.discard_after(4)
        callback.on_train_begin(arguments, TrainerState(global_step=4), TrainerControl())
        callback.on_step_end(
            arguments, TrainerState(global_step=6), TrainerControl(), model=tiny_qwen2(seed=3)
        )
        checkpointer.wait()
        assert checkpointer.steps == [6]


def test_every_is_at_least_one(qwen2: Trio, tmp_path: Path) -> None:
    with (
        DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer,
        pytest.raises(ValueError, match="every is 0"),
    ):
        DeltaCallback(checkpointer, every=0)
