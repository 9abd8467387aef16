"""What a subscriber knows of the model that it brings along: its tensors, and the state that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

from torch import nn

from ...workers import Workers
from ..wholeness import require_own
from ..wrappers import plain_state
from .records import StreamTensor, state_digest, tensor_digest
from .split import Cuts, split
from .state import State, StateTensor, marks_of, state_of, sums_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was when this was made.

    Attributes:
        given: the model, or its tensors by name.
        state: its tensors as bytes; or their parts, by the names of their payloads.
        marks: what shows whether they are still the same ones, unchanged as far as torch counts.
        cuts: how the tensors are cut.
    """

    given: State
    state: Mapping[str, StateTensor]
    marks: object
    cuts: Cuts

    @classmethod
    def of(cls, given: State) -> Model:
        """Raises as :func:`state_of` and :func:`require_own` do."""
        state = state_of(given)
        if isinstance(given, nn.Module):
            require_own(given, plain_state(given))
        return cls(given, state, marks_of(given), {name: {name: None} for name in state})

    def is_unchanged(self) -> bool:
        """Whether the model has the same tensors, unchanged as far as torch counts."""
        return marks_of(self.given) == self.marks

    def without_tied(self, names: Set[str]) -> Model:
        """Without those tensors that only share the memory of others that are among ``names``."""
        named = {tensor.identity for name, tensor in self.state.items() if name in names and tensor.nbytes}
        kept = {n: t for n, t in self.state.items() if n in names or t.identity not in named}
        return replace(self, state=kept, cuts={name: self.cuts[name] for name in kept})

    def split(self, cuts: Cuts) -> Model:
        """The same, its whole tensors cut like this."""
        return replace(self, state=split(self.state, cuts), cuts=cuts)


@dataclass(frozen=True, slots=True)
class Known:
    """The content of a model's tensors: the state's digest, how they are cut, and the checksums of the chunks
    of each part, by the names of their payloads; and the model's marks."""

    marks: object
    state: str
    cuts: Cuts
    sums: Mapping[str, bytes]


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

    def known(self, model: Model) -> Known | None:
        """The state that the whole model is in, if it is the last one, unchanged."""
        known = self._known
        is_same = known and known.marks == model.marks and known.cuts.keys() == model.cuts.keys()
        return known if is_same else None

    def recognize(self, model: Model, tensors: Iterable[StreamTensor], workers: Workers) -> Known:
        """The state that the model is in: the last one if it is unchanged, or else found by its bytes.

        Args:
            model: one that is split like ``tensors``.
        """
        known = self._known
        if known is None or known.marks != model.marks or known.cuts != model.cuts:
            sums = sums_of(model.state, workers)
            found = (
                replace(tensor, digest=tensor_digest(b"".join(sums[key] for key in tensor.keys)))
                for tensor in tensors
            )
            known = self._known = Known(model.marks, state_digest(found), model.cuts, sums)
        return known

    def begin(self) -> None:
        """A model is about to be written to: until :meth:`end`, it is in no known state."""
        self.commits += 1
        self._known = None

    def end(self, model: Model, number: int, state: str, sums: Mapping[str, bytes]) -> None:
        """A model was written: it has the state of this number and digest, and chunks of these checksums."""
        self._known = Known(marks_of(model.given), state, model.cuts, sums)
        self.number = number
