"""Writes what is held of changes, and what is not, into a model."""

from __future__ import annotations

from contextlib import ExitStack

from ....workers import Workers
from ...tensors import settle
from .held import HeldChanges
from .position import Model
from .replay import Replay


class Writing:
    """The writing of a new state into ``model``. It can be done again, as long as files are there."""

    def __init__(self, model: Model, held: HeldChanges, threads: int | None) -> None:
        self.model = model
        self.held = held
        self._threads = threads
        self._replay: Replay | None = None
        self._opened = ExitStack()

    def follow(self, replay: Replay, opened: ExitStack) -> None:
        """Also write what the replay did not hold, from its files, which ``opened`` closes."""
        self._replay = replay
        self._opened = opened
        opened.callback(replay.put_back)

    @property
    def nbytes(self) -> int:
        """The memory that is held, in bytes."""
        return self.held.nbytes + sum(tensor.copied_bytes for tensor in self.model.state.values())

    def write(self) -> None:
        """Write all of it."""
        settle(tensor.memory for tensor in self.model.state.values())
        with Workers(self._threads) as workers:
            self.held.write(self.model.state, workers)
            if self._replay:
                self._replay.write_rest(workers)
        names = {*self.held.names, *(self._replay.names if self._replay else ())}
        for name in names:
            self.model.state[name].finish()
        settle(tensor.memory for tensor in self.model.state.values())

    def close(self) -> None:
        """Release what is held, and the files."""
        self.held.clear()
        self._opened.close()
