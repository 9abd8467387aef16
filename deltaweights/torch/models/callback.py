"""Saves checkpoints as deltas in the Trainer of transformers, and lets it go on from them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from ...errors import CheckpointError, OutputError
from ..wholeness import require_unsharded
from .checkpoints import DeltaCheckpointer

if TYPE_CHECKING:
    from transformers import Trainer

#: Devices with random generators whose state the Trainer restores.
_DEVICES = ("cuda", "npu", "hpu", "mlu", "musa")
_STATE = "trainer_state.json"


class DeltaCallback(TrainerCallback):
    """Saves the model with ``checkpointer`` every ``every`` steps, and at the end of training.

    The state of optimizer, scheduler, gradient scaler and random generators is saved beside the weights, as
    the Trainer itself would, unless its arguments say ``save_only_model``. :meth:`restore` goes on from
    there. A step is saved once its evaluation is done, just before the next one begins.

    Only the first of several processes saves; a model that is sharded over them cannot be saved so. Training
    that begins with a checkpoint's weights (``checkpointer.load_into(model)``) goes on counting after the
    last one; a folder that holds another run's checkpoints is refused.

    Args:
        checkpointer: stays open after training, with all checkpoints written.
        every: number of optimizer steps between checkpoints.

    Raises:
        ValueError: ``every`` is less than 1.
    """

    def __init__(self, checkpointer: DeltaCheckpointer, every: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, not at least 1")
        self.checkpointer = checkpointer
        self.every = every
        self._first = 0  # the checkpoints' steps less the Trainer's
        self._restored: tuple[int, int] | None = None  # the Trainer's step, and the checkpoint's
        self._is_due = False
        self._done = 0  # the Trainer's step that was saved or loaded last
        self._trainer: Trainer | None = None

    def restore(self, trainer: Trainer, step: int | None = None) -> str | None:
        """Prepare the Trainer to go on from a checkpoint: ``trainer.train(
        resume_from_checkpoint=callback.restore(trainer))`` trains on as if it had never stopped.

        Args:
            trainer: loads the weights from the deltas, into its model, when it trains.
            step: the checkpoint's step; None for the last one. Drop later ones by
                ``checkpointer.discard_after(step)``.

        Returns:
            What to pass to ``train``: the folder of the state beside the weights; None, to begin anew, if
            there is no checkpoint yet.

        Raises:
            CheckpointError: there is no such checkpoint, or weights only; or the Trainer cannot load it.
        """
        self.checkpointer.wait()
        self._trainer = trainer
        self._restored = None
        if step is None and not self.checkpointer.steps:
            return None
        step = self.checkpointer.steps[-1] if step is None else step
        folder = self.checkpointer.training_folder(step)
        self._restored = _global_step(folder), step
        _load_weights_with(trainer, self.checkpointer, step, folder)
        return str(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Align the checkpoints' steps with the Trainer's.

        Raises:
            OutputError: the Trainer resumes before the last checkpoint, or begins anew where another run's
                checkpoints are.
            CheckpointError: the model is sharded over several processes.
        """
        if isinstance(model := kwargs.get("model"), nn.Module):
            require_unsharded(model)
        self.checkpointer.wait()
        self._is_due, self._done = False, state.global_step
        if state.global_step:
            self.checkpointer.resume()
        if state.is_world_process_zero:
            self.checkpointer.require_resumed()
        last = max(self.checkpointer.steps, default=0)
        if self._restored and self._restored[0] == state.global_step:
            self._first = self._restored[1] - state.global_step
        else:
            self._first = 0 if state.global_step else last
        now = self._first + state.global_step
        if state.global_step and now < last and state.is_world_process_zero:
            raise OutputError(
                f"{self.checkpointer.folder} holds checkpoints after step {now}",
                f"The last one is of step {last}.",
                f"Choose another folder, or drop them: checkpointer.discard_after({now})",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note that a checkpoint is due: what follows, such as an evaluation, belongs to this step."""
        self._is_due = state.global_step % self.every == 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save if a checkpoint is due."""
        self._save(args, state, control, **kwargs)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save if a checkpoint is due, before the epoch's order is drawn."""
        self._save(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save the last step, and wait until it is written."""
        self._is_due = state.global_step != self._done
        self._save(args, state, control, **kwargs)
        self.checkpointer.wait()

    def _save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: object,
        optimizer: object = None,
        lr_scheduler: object = None,
        **_: object,
    ) -> None:
        if not self._is_due:
            return
        self._is_due, self._done = False, state.global_step
        assert isinstance(model, nn.Module)  # the Trainer passes it
        random_states = _random_states(args)
        if self._trainer:
            self._trainer.store_flos()
        if not state.is_world_process_zero:
            return
        training: dict[str, object] = {_STATE: self._trainer_state(state, control)}
        if not args.save_only_model:
            training |= random_states | _optimizer_states(optimizer, lr_scheduler)
        self.checkpointer.save(
            self._first + state.global_step, model, training=None if args.deepspeed else training
        )

    def _trainer_state(self, state: TrainerState, control: TrainerControl) -> bytes:
        """The content of the Trainer's own file. The states of callbacks are those of now, if the Trainer is
        known, and otherwise left out."""
        values = asdict(state)
        exported: dict[str, list[object]] = {}
        if self._trainer:
            for callback in [*self._trainer.callback_handler.callbacks, control]:
                if isinstance(callback, ExportableState):
                    exported.setdefault(type(callback).__name__, []).append(callback.state())
        values["stateful_callbacks"] = {
            name: states[0] if len(states) == 1 else states for name, states in exported.items()
        }
        return f"{json.dumps(values, indent=2, sort_keys=True)}\n".encode()


def _global_step(folder: Path) -> int:
    """The Trainer's own count of steps at a checkpoint.

    Raises:
        CheckpointError: the Trainer did not save it.
    """
    try:
        return int(TrainerState.load_from_json(str(folder / _STATE)).global_step)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The Trainer cannot go on from {folder}",
            f"{_STATE} cannot be read: {error}.",
            "Begin anew with the checkpoint's weights: checkpointer.load_into(model).",
        ) from error


def _load_weights_with(trainer: Trainer, checkpointer: DeltaCheckpointer, step: int, folder: Path) -> None:
    """Let the Trainer load the weights from the checkpoint's deltas, where it would look for them in
    ``folder``. The folder holds none: a Trainer that was not prepared refuses it.

    Raises:
        CheckpointError: it loads weights in another way, as for sharded models.
    """
    own = getattr(trainer, "_load_from_checkpoint", None)
    if own is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise CheckpointError(
            "The Trainer cannot load weights from deltas",
            "Its model is sharded, or this version of transformers is not known.",
            "Use the Trainer's own checkpoints, or transformers 5; sharded models: DeltaStorageWriter.",
        )

    def load(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if Path(resume_from_checkpoint) != folder:
            own(resume_from_checkpoint, model)
            return
        whole = trainer.model if model is None else model
        assert isinstance(whole, nn.Module)  # the Trainer has it by now
        checkpointer.load_into(whole, step)

    trainer._load_from_checkpoint = load  # type: ignore[method-assign]


def _optimizer_states(optimizer: Any, scheduler: Any) -> dict[str, object]:
    """By the file names that the Trainer looks for."""
    states = {"optimizer.pt": optimizer.state_dict(), "scheduler.pt": scheduler.state_dict()}
    scaler = getattr(optimizer, "scaler", None)
    return states if scaler is None else {**states, "scaler.pt": scaler.state_dict()}


def _random_states(args: TrainingArguments) -> dict[str, object]:
    """The states of the random generators of all processes, by the file names that the Trainer looks for."""
    several = args.parallel_mode == ParallelMode.DISTRIBUTED
    name, keys, *rest = np.random.get_state()
    # Plain numbers, that torch.load reads with weights_only.
    own: dict[str, object] = {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
        "cpu": torch.random.get_rng_state(),
    }
    for kind in _DEVICES:
        device = getattr(torch, kind, None)
        if device is not None and device.is_available():
            own[kind] = device.get_rng_state_all() if several else device.get_rng_state()
    if args.world_size <= 1:
        return {"rng_state.pth": own}
    states: list[dict[str, object] | None] = [None] * args.world_size
    torch.distributed.all_gather_object(states, own)
    return {f"rng_state_{rank}.pth": state for rank, state in enumerate(states)}
