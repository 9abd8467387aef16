"""Matches as plain data, for another process that has the same checkpoints open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .. import codec
from ..checkpoint import Base, Checkpoint, Gathered, Group, GroupPart, HeldExtents, Tensor
from .names import FoundPrediction, Match


class _Named(NamedTuple):
    """A tensor, by its shard and name."""

    path: str
    name: str


class _Part(NamedTuple):
    tensor: _Named
    start: int
    step: int
    length: int
    stride: int


#: Groups: how often, and which parts.
_Groups = tuple[tuple[int, tuple[_Part, ...]], ...]


@dataclass(frozen=True, slots=True)
class MatchReference:
    """A :class:`Match` without its checkpoints."""

    target: _Named
    base: _Named | _Groups | None
    shared_bytes: int
    like: _Named | None
    prediction: tuple[Literal["quantized", "low_rank"], bytes, int | None] | None

    @classmethod
    def of(cls, match: Match) -> MatchReference:
        """The reference to ``match``."""
        found = match.prediction
        return cls(
            _named(match.target),
            _referred(match.base) if match.base else None,
            match.shared_bytes,
            _named(match.like) if match.like else None,
            (found.method, found.stored, found.rank) if found else None,
        )

    def find(self, old: Checkpoint, new: Checkpoint, held: HeldExtents) -> Match:
        """The match itself, in these checkpoints."""
        target = _find(new, self.target)
        base: Base | None = None
        if isinstance(self.base, _Named):
            base = _find(old, self.base)
        elif self.base is not None:
            base = Gathered(
                [
                    Group(repeats, tuple(GroupPart(_find(old, part.tensor), *part[1:]) for part in parts))
                    for repeats, parts in self.base
                ],
                held,
            )
        prediction = None
        if self.prediction and base:
            method, stored, rank = self.prediction
            numel = self.shared_bytes // codec.element_bytes(target.dtype, self.shared_bytes)
            predictor = codec.parse_prediction(method, stored, target.dtype, base.dtype, numel)
            prediction = FoundPrediction(method, stored, predictor, rank)
        like = _find(new, self.like) if self.like else None
        return Match(target, base, self.shared_bytes, like, prediction)


def _named(tensor: Tensor) -> _Named:
    return _Named(tensor.path, tensor.name)


def _referred(base: Base) -> _Named | _Groups:
    if isinstance(base, Tensor):
        return _named(base)
    return tuple(
        (
            group.repeats,
            tuple(_Part(_named(p.tensor), p.start, p.step, p.count, p.stride) for p in group.parts),
        )
        for group in base.groups
    )


def _find(checkpoint: Checkpoint, named: _Named) -> Tensor:
    """The tensor: a checkpoint that was pinned has it."""
    return next(tensor for tensor in checkpoint.named(named.name) if tensor.path == named.path)
