"""The Trainer of transformers, really training, with checkpoints as deltas."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from deltaweights import CheckpointError, OutputError
from deltaweights.torch import DeltaCallback, DeltaCheckpointer, list_checkpoints

from ...conftest import Trio
from ..process_groups import torchrun
from ..tiny_models import raw_state, tiny_qwen2


class Recorder(TrainerCallback):
    """Keeps the weights of every step, bit for bit, and the state of torch's random generator."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}
        self.random_states: dict[int, list[int]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[state.global_step] = dict(raw_state(kwargs["model"].state_dict()))
        self.random_states[state.global_step] = torch.random.get_rng_state().tolist()


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


class InterruptionError(Exception):
    """The machine was taken away."""


class Interrupter(TrainerCallback):
    """Ends the training after a step, as a killed process would: nothing is saved after it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptionError


def long_training(
    model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    """Two epochs of 4 steps, with dropout, a schedule, evaluations and accumulated gradients."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (16, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    values = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-3,
        gradient_accumulation_steps=2, warmup_steps=3, lr_scheduler_type="cosine", eval_strategy="steps",
        eval_steps=2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        metric_for_best_model="eval_loss", **arguments,
    )  # fmt: skip
    return Trainer(model, values, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


def losses(trainer: Trainer) -> list[tuple[float, ...]]:
    names = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "epoch")
    return [tuple(row.get(name, -1) for name in names) for row in trainer.state.log_history[:-1]]


def with_dropout(base: Path, scale: float = 1.0) -> PreTrainedModel:
    model = open_model(base)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.fixture(scope="module")
def whole_run(qwen2: Trio, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Recorder]:
    """The training that nothing interrupts."""
    recorder = Recorder()
    trainer = long_training(with_dropout(qwen2.base), tmp_path_factory.mktemp("whole"), recorder)
    trainer.train()
    return trainer, recorder


@pytest.mark.slow
@pytest.mark.parametrize(("every", "stop", "resumed"), [(2, 4, 2), (2, 5, 4), (3, 7, 6), (1, 4, 3)])
def test_resuming_is_as_if_it_had_never_stopped(
    qwen2: Trio, tmp_path: Path, whole_run: tuple[Trainer, Recorder], every: int, stop: int, resumed: int
) -> None:
    """One call after an interruption: the same losses, the same weights bit for bit. In the middle of an
    epoch (steps 2, 3, 6) and between two (step 4)."""
    whole, recorder = whole_run
    folder = tmp_path / "checkpoints"
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3, keep=2) as checkpointer:
        callback = DeltaCallback(checkpointer, every)
        trainer = long_training(with_dropout(qwen2.base), tmp_path, callback, Interrupter(stop))
        assert callback.restore(trainer) is None  # so the same script serves both
        with pytest.raises(InterruptionError):
            trainer.train(resume_from_checkpoint=callback.restore(trainer))

    again = Recorder()
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3, keep=2) as checkpointer:
        assert checkpointer.steps[-1] == resumed
        callback = DeltaCallback(checkpointer, every)
        trainer = long_training(with_dropout(qwen2.base, 3.0), tmp_path, again, callback)
        trainer.train(resume_from_checkpoint=callback.restore(trainer))
        assert checkpointer.steps[-1] == 8
        kept = sorted(path.name for path in folder.glob("training-*"))
        assert kept == [f"training-{step:08d}" for step in checkpointer.steps[-2:]]
    assert list(again.states) == list(range(resumed + 1, 9))
    assert again.states[8] == recorder.states[8]
    assert again.random_states[8] == recorder.random_states[8]
    assert losses(trainer) == losses(whole)
    assert trainer.state.total_flos == whole.state.total_flos
    assert trainer.state.best_metric == whole.state.best_metric


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
        arguments.save_only_model = True
        callback.on_step_end(arguments, TrainerState(global_step=6), TrainerControl())
        assert checkpointer.steps == []  # its evaluation is still to come
        model = tiny_qwen2(seed=3)
        callback.on_step_begin(arguments, TrainerState(global_step=6), TrainerControl(), model=model)
        checkpointer.wait()
        assert checkpointer.steps == [6]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["go_on", "fsdp"])
def test_two_processes(qwen2: Trio, tmp_path: Path, task: str) -> None:
    """Under DDP, training goes on as if it had never stopped, each process with its own dropout; the first
    one writes for both. In FSDP's first version, what can be had whole is saved."""
    code, output = torchrun(2, "tests.torch.models.ranks", task, qwen2.base, tmp_path)
    assert code == 0, output
    assert output.count("is done") == 2


def interrupted(base: Path, folder: Path, **arguments: Any) -> DeltaCheckpointer:
    """A checkpointer of a run that ended after step 3 of 8, with checkpoints of steps 1 and 2."""
    with DeltaCheckpointer(folder / "checkpoints", base) as checkpointer:
        callback = DeltaCallback(checkpointer, every=1)
        with pytest.raises(InterruptionError):
            long_training(open_model(base), folder, callback, Interrupter(3), **arguments).train()
    checkpointer = DeltaCheckpointer(folder / "checkpoints", base)
    assert checkpointer.steps == [1, 2]
    return checkpointer


def test_going_on_from_an_earlier_step_needs_the_later_ones_dropped(qwen2: Trio, tmp_path: Path) -> None:
    with interrupted(qwen2.base, tmp_path) as checkpointer:
        callback = DeltaCallback(checkpointer, every=4)
        trainer = long_training(tiny_qwen2(), tmp_path, callback)
        with pytest.raises(OutputError, match=r"discard_after\(1\)"):
            trainer.train(resume_from_checkpoint=callback.restore(trainer, 1))
        checkpointer.discard_after(1)
        trainer.train(resume_from_checkpoint=callback.restore(trainer, 1))
        assert checkpointer.steps == [1, 4, 8]
        with pytest.raises(CheckpointError, match="no checkpoint 2"):
            callback.restore(trainer, 2)


def test_a_trainer_that_is_not_prepared_does_not_begin_with_other_weights(
    qwen2: Trio, tmp_path: Path
) -> None:
    with interrupted(qwen2.base, tmp_path) as checkpointer:
        callback = DeltaCallback(checkpointer, every=1)
        trainer = long_training(tiny_qwen2(), tmp_path, callback)
        with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
            trainer.train(resume_from_checkpoint=str(checkpointer.training_folder()))


def test_going_on_counts_on_where_the_trainer_itself_began_anew(qwen2: Trio, tmp_path: Path) -> None:
    """Checkpoints 1 and 2, then a new training with step 2's weights: its third step is checkpoint 5."""
    with interrupted(qwen2.base, tmp_path) as checkpointer:
        model = open_model(qwen2.base)
        checkpointer.load_into(model)
        callback = DeltaCallback(checkpointer, every=1)
        with pytest.raises(InterruptionError):
            long_training(model, tmp_path, callback, Interrupter(4)).train()
    with DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer:
        assert checkpointer.steps == [1, 2, 3, 4, 5]
        callback = DeltaCallback(checkpointer, every=4)
        trainer = long_training(open_model(qwen2.base), tmp_path, callback)
        trainer.train(resume_from_checkpoint=callback.restore(trainer))
        assert checkpointer.steps == [1, 2, 3, 4, 5, 6, 10]


def test_only_weights_are_kept_if_the_trainer_s_arguments_say_so(qwen2: Trio, tmp_path: Path) -> None:
    with interrupted(qwen2.base, tmp_path, save_only_model=True) as checkpointer:
        assert list(checkpointer.load_training()) == ["trainer_state.json"]
        callback = DeltaCallback(checkpointer, every=1)
        trainer = long_training(open_model(qwen2.base), tmp_path, callback)
        trainer.train(resume_from_checkpoint=callback.restore(trainer))
        assert checkpointer.steps[-1] == 8


def test_weights_without_a_trainer_s_state_are_no_start(qwen2: Trio, tmp_path: Path) -> None:
    with DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer:
        checkpointer.save(1, tiny_qwen2(), training={"mine.pt": 5})
        callback = DeltaCallback(checkpointer, every=1)
        trainer = long_training(open_model(qwen2.base), tmp_path, callback)
        with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read"):
            callback.restore(trainer)
        checkpointer.save(2, tiny_qwen2())
        with pytest.raises(CheckpointError, match=r"Checkpoint 2 .* holds weights only") as caught:
            callback.restore(trainer)
        assert "these steps: 1;" in caught.value.fix


def test_states_of_other_callbacks_are_those_of_the_checkpoint(qwen2: Trio, tmp_path: Path) -> None:
    """Early stopping counts on, if the arguments say so."""
    counts = []
    for run in range(2):
        with DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer:
            callback = DeltaCallback(checkpointer, every=4)
            trainer = long_training(
                open_model(qwen2.base), tmp_path, EarlyStoppingCallback(2, early_stopping_threshold=9.0),
                *([] if run else [Interrupter(5)]), callback,
                restore_callback_states_from_checkpoint=True, greater_is_better=True,
            )  # fmt: skip
            with suppress(InterruptionError):
                trainer.train(resume_from_checkpoint=callback.restore(trainer))
            checkpointer.wait()
            counts.append(checkpointer.steps[-1])
    assert counts == [4, 6]  # neither 4 nor 6 was better than 2


def test_every_is_at_least_one(qwen2: Trio, tmp_path: Path) -> None:
    with (
        DeltaCheckpointer(tmp_path / "checkpoints", qwen2.base) as checkpointer,
        pytest.raises(ValueError, match="every is 0"),
    ):
        DeltaCallback(checkpointer, every=0)
