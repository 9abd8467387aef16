"""What a subscriber knows of the model that it brings along: its tensors, and the state that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from threading import RLock
from typing import cast

from torch import nn

from ....errors import CheckpointError
from ....workers import Workers
from ...boxes import Box
from ...wholeness import require_own
from ...wrappers import plain_state
from ..pieces import Published, is_sharded, local_tensors, pieces_of
from ..records import StreamTensor, state_digest, tensor_digest
from ..split import Cuts, split
from ..state import State, StateTensor, mark_of, marks_of, require_writable, state_of, sums_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was when this was made, or what this process has of it.

    Attributes:
        given: the model, or its tensors by name.
        state: its tensors as bytes; or their parts, by the names of their payloads.
        marks: what shows whether they are still the same ones, unchanged as far as torch counts.
        cuts: how the tensors are cut, as far as they are here.
        facts: dtype code and shape of every tensor, by name.
        is_partial: whether this process does not have all of it.
    """

    given: Published
    state: Mapping[str, StateTensor]
    marks: object
    cuts: Cuts
    facts: Mapping[str, tuple[str, tuple[int, ...]]]
    is_partial: bool

    @classmethod
    def of(cls, given: Published) -> Model:
        """Raises as :func:`state_of`, :func:`pieces_of`, :func:`require_writable` and :func:`require_own`."""
        if is_sharded(given):
            return cls._of_pieces(given)
        state = state_of(cast(State, given))
        require_writable(state)
        if isinstance(given, nn.Module):
            require_own(given, plain_state(given))
        facts = {name: (tensor.code, tensor.shape) for name, tensor in state.items()}
        return cls(given, state, _marks(given), {name: {name: None} for name in state}, facts, False)

    @classmethod
    def _of_pieces(cls, given: Published) -> Model:
        pieces = pieces_of(given, None, is_alone=False)
        if isinstance(given, nn.Module):
            require_own(given, plain_state(given))
        state: dict[str, StateTensor] = {}
        cuts: dict[str, dict[str, Box | None]] = {}
        for offer in pieces.offers:
            is_whole = offer.box.sizes == offer.shape  # a replica, say
            key = offer.name if is_whole else offer.key
            state[key] = pieces.tensors[offer.key]
            cuts.setdefault(offer.name, {})[key] = None if is_whole else offer.box
        require_writable(state)
        facts = {offer.name: (offer.code, offer.shape) for offer in pieces.offers}
        return cls(given, state, _marks(given), cuts, facts, True)

    def is_unchanged(self) -> bool:
        """Whether the model has the same tensors, unchanged as far as torch counts."""
        return _marks(self.given) == self.marks

    @property
    def is_counted(self) -> bool:
        """Whether torch counts what is written to it. Else its marks do not tell whether it has changed."""
        return all(tensor.is_counted for tensor in self.state.values())

    def without_tied(self, names: Set[str]) -> Model:
        """Without those tensors that only share the memory of others that are among ``names``."""
        if self.is_partial:
            return self
        named = {tensor.identity for name, tensor in self.state.items() if name in names and tensor.nbytes}
        kept = {n: t for n, t in self.state.items() if n in names or t.identity not in named}
        cuts, facts = {name: self.cuts[name] for name in kept}, {name: self.facts[name] for name in kept}
        return replace(self, state=kept, cuts=cuts, facts=facts)

    def split(self, cuts: Cuts) -> Model:
        """The same, its tensors cut like a stream's.

        Raises:
            CheckpointError: it has other parts.
        """
        found: dict[str, Mapping[str, Box | None]] = {}
        for name, own in self.cuts.items():
            found[name] = cuts[name] if name in own else own
            if any(cuts[name].get(key, own) != box for key, box in found[name].items()):
                raise CheckpointError(
                    "The model is sharded in another way than the stream",
                    f"The stream has no such part of {name!r} as this process has.",
                    "Pass whole tensors, or a mirror (empty_state), and take its changes(); or shard it like "
                    "the publisher.",
                )
        return replace(self, state=split(self.state, found), cuts=found)


def _marks(given: Published) -> object:
    if is_sharded(given):
        return {key: mark_of(tensor) for key, tensor in local_tensors(given).items()}
    return marks_of(cast(State, given))


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
        latest: the content of the model that was looked at or written last; None if torch does not count
            what is written to it.
        lock: held while a model is written to, and while what is prepared is released.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.commits = 0
        self.lock = RLock()
        self.latest: Known | None = None

    def known(self, model: Model) -> Known | None:
        """The state that the whole model is in, if it is the last one, unchanged."""
        known = self.latest
        is_same = known and known.marks == model.marks and known.cuts.keys() == model.cuts.keys()
        return known if is_same else None

    def recognize(self, model: Model, tensors: Iterable[StreamTensor], workers: Workers) -> Known:
        """The state that the model is in: the last one if it is unchanged, or else found by its bytes.
        Those of a part of it do not tell: then it is in none.

        Args:
            model: one that is split like ``tensors``.
        """
        known = self.latest
        is_same = known and known.marks == model.marks and known.cuts == model.cuts
        if known is None or not is_same:
            if model.is_partial:
                return Known(model.marks, "", model.cuts, {})
            sums = sums_of(model.state, workers)
            found = (
                replace(tensor, digest=tensor_digest(b"".join(sums[key] for key in tensor.keys)))
                for tensor in tensors
            )
            known = Known(model.marks, state_digest(found), model.cuts, sums)
            self._keep(known, model)
        return known

    def _keep(self, known: Known, model: Model) -> None:
        self.latest = known if model.is_counted else None

    def begin(self) -> None:
        """A model is about to be written to: until :meth:`end`, it is in no known state."""
        self.commits += 1
        self.latest = None

    def end(self, model: Model, number: int, state: str, sums: Mapping[str, bytes]) -> None:
        """A model was written: it has the state of this number and digest, and chunks of these checksums."""
        self._keep(Known(_marks(model.given), state, model.cuts, sums), model)
        self.number = number
