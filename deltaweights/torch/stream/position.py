"""What a subscriber knows of the model that it brings along: its tensors, and the state that they are in."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from torch import nn

from ...workers import Workers
from ..wholeness import require_own
from ..wrappers import plain_state
from .records import StreamTensor, state_digest
from .state import State, StateTensor, digests, marks_of, state_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was when this was made.

    Attributes:
        given: the model, or its tensors by name.
        state: its tensors as bytes.
        marks: what shows whether they are still the same ones, unchanged as far as torch counts.
    """

    given: State
    state: Mapping[str, StateTensor]
    marks: object

    @classmethod
    def of(cls, given: State) -> Model:
        """Raises as :func:`state_of` and :func:`require_own` do."""
        state = state_of(given)
        if isinstance(given, nn.Module):
            require_own(given, plain_state(given))
        return cls(given, state, marks_of(given))

    def is_unchanged(self) -> bool:
        """Whether the model has the same tensors, unchanged as far as torch counts."""
        return marks_of(self.given) == self.marks

    def without_tied(self, names: Set[str]) -> Model:
        """Without those tensors that only share the memory of others that are among ``names``."""
        named = {tensor.identity for name, tensor in self.state.items() if name in names and tensor.nbytes}
        kept = {n: t for n, t in self.state.items() if n in names or t.identity not in named}
        return replace(self, state=kept)


@dataclass(frozen=True, slots=True)
class Known:
    """The content of a model's tensors: the state's digest, and theirs by name; and the model's marks."""

    marks: object
    state: str
    tensors: Mapping[str, str]


class Position:
    """Where a subscriber is.

    Attributes:
        number: that of the last state that was written.
        commits: how many were written, or begun to be.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.commits = 0
        self._known: Known | None = None

    def recognize(self, model: Model, workers: Workers) -> Known:
        """The state that the model is in: the last one if it is unchanged, or else found by its bytes."""
        known = self._known
        if known is None or known.marks != model.marks or known.tensors.keys() != model.state.keys():
            found = digests(model.state, workers)
            rows = (StreamTensor(name, t.code, t.shape, found[name]) for name, t in model.state.items())
            known = self._known = Known(model.marks, state_digest(rows), found)
        return known

    def begin(self) -> None:
        """A model is about to be written to: until :meth:`end`, it is in no known state."""
        self.commits += 1
        self._known = None

    def end(self, model: Model, number: int, state: str, tensors: Mapping[str, str]) -> None:
        """A model was written: it has the state of this number and digest, and tensors of these digests."""
        self._known = Known(marks_of(model.given), state, tensors)
        self.number = number
