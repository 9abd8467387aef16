"""Saves checkpoints as deltas in the Trainer of transformers."""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import OutputError
from .checkpoints import DeltaCheckpointer


class DeltaCallback(TrainerCallback):
    """Saves the model with ``checkpointer`` every ``every`` steps, and at the end of training.

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
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Align the checkpoints' steps with the Trainer's.

        Raises:
            OutputError: the Trainer resumes before the last checkpoint, or begins anew where another run's
                checkpoints are.
        """
        self.checkpointer.wait()
        if state.global_step:
            self.checkpointer.resume()
        if state.is_world_process_zero:
            self.checkpointer.require_resumed()
        last = max(self.checkpointer.steps, default=0)
        self._first = 0 if state.global_step else last
        if 0 < state.global_step < last and state.is_world_process_zero:
            raise OutputError(
                f"{self.checkpointer.folder} holds checkpoints after step {state.global_step}",
                f"The last one is of step {last}.",
                f"Choose another folder, or drop them: checkpointer.discard_after({state.global_step})",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save if a checkpoint is due."""
        if state.global_step % self.every == 0:
            self._save(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save the last step, and wait until it is written."""
        if state.global_step % self.every:
            self._save(state, kwargs["model"])
        self.checkpointer.wait()

    def _save(self, state: TrainerState, model: object) -> None:
        assert isinstance(model, nn.Module)  # the Trainer passes it
        if state.is_world_process_zero:
            self.checkpointer.save(self._first + state.global_step, model)
