"""Who publishes what: the tensors of a state that is spread over ranks, and which rank writes which part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import UNSET

from ....errors import CheckpointError
from ...boxes import Box, fill
from ...wholeness import some
from ..pieces import Offer
from ..records import MOST_FILES, StreamPart, StreamTensor, part_key, tensor_digest


class Task(NamedTuple):
    """What one rank writes: its pieces by the names of their payloads, and which of several files is its own;
    None if there is one file only."""

    keys: Mapping[str, str]
    place: int | None


class _Planned(NamedTuple):
    """A tensor: its facts, as :class:`StreamTensor` has them; the ranks that write its parts; and whether
    these have it whole."""

    name: str
    code: str
    shape: tuple[int, ...]
    like: str | None
    parts: tuple[tuple[Box, int], ...]
    is_whole: bool


@dataclass(frozen=True)
class Division:
    """The tensors of a state and the ranks that write them, the same as long as a publisher lives."""

    _tensors: Sequence[_Planned]
    _files: Mapping[int, int]  # of the ranks that write

    @property
    def facts(self) -> list[tuple[object, ...]]:
        """What has to stay as it is: name, dtype, shape and tie of every tensor, sorted by name."""
        return [tensor[:4] for tensor in self._tensors]

    @property
    def has_parts(self) -> bool:
        """Whether there is more than whole tensors in one file."""
        return any(self._parts(tensor) for tensor in self._tensors)

    def tasks(self, ranks: int) -> list[Task]:
        """What each rank writes."""
        keys: list[dict[str, str]] = [{} for _ in range(ranks)]
        for tensor in self._tensors:
            if tensor.like is None:
                for (box, rank), key in zip(tensor.parts, self._keys(tensor), strict=True):
                    keys[rank][key] = tensor.name if tensor.is_whole else part_key(tensor.name, box.offsets)
        places = {rank: place if self.has_parts else None for rank, place in self._files.items()}
        return [Task(own, places.get(rank)) for rank, own in enumerate(keys)]

    def names(self, keys: Iterable[str]) -> tuple[str, ...]:
        """The names of the tensors that have payloads of these names, sorted."""
        wanted = set(keys)
        return tuple(t.name for t in self._tensors if t.like is None and wanted.intersection(self._keys(t)))

    def tensors(self, sums: Mapping[str, bytes]) -> tuple[StreamTensor, ...]:
        """The record's entries for the tensors.

        Args:
            sums: the checksums of each payload's chunks, by its name.
        """
        owners = {tensor.name: tensor for tensor in self._tensors}
        has_parts = self.has_parts
        found = []
        for tensor in self._tensors:
            owner = owners[tensor.like or tensor.name]
            digest = tensor_digest(b"".join(sums[key] for key in self._keys(owner)))
            parts = self._parts(owner) if has_parts else UNSET
            found.append(StreamTensor(tensor.name, tensor.code, tensor.shape, digest, tensor.like, parts))
        return tuple(found)

    def _parts(self, tensor: _Planned) -> tuple[StreamPart, ...]:
        """The parts in the record; none of a tensor that one rank writes into the first file."""
        if len(tensor.parts) == 1 and self._files[tensor.parts[0][1]] == 0:
            return ()
        return tuple(StreamPart(box.offsets, box.sizes, self._files[rank]) for box, rank in tensor.parts)

    def _keys(self, tensor: _Planned) -> list[str]:
        return [part_key(tensor.name, p.offsets) for p in self._parts(tensor)] or [tensor.name]


def plan(offers: Sequence[Iterable[Offer]]) -> Division:
    """How the state of which the ranks offer pieces is divided among them.

    Of equal parts, one is chosen, so that all ranks write about as much; of whole tensors, that of the first
    rank that has it.

    Raises:
        CheckpointError: there is no tensor; ranks differ about one, or their parts do not make it up.
    """
    by_name: dict[str, list[tuple[int, Offer]]] = {}
    for rank, own in enumerate(offers):
        for offer in own:
            by_name.setdefault(offer.name, []).append((rank, offer))
    if not by_name:
        raise CheckpointError("The state has no tensors", "", "Pass a model or its state_dict().")
    for name, found in by_name.items():
        _require_alike(name, [offer for _, offer in found])
    ties = _ties(by_name)
    chosen = _choose({name: found for name, found in by_name.items() if name not in ties})
    writers = sorted({rank for parts in chosen.values() for _, rank in parts})
    division = Division(
        [
            _Planned(
                name, *found[0][1][1:3], ties.get(name), chosen[ties.get(name, name)], found[0][1].is_whole
            )
            for name, found in sorted(by_name.items())
        ],
        {rank: place for place, rank in enumerate(writers)},
    )
    _require_names(division, chosen)
    return division


def _require_alike(name: str, offers: Sequence[Offer]) -> None:
    """Check that the ranks mean the same tensor, and have all of it."""
    facts = {(offer.code, offer.shape, offer.is_whole) for offer in offers}
    if len(facts) > 1:
        raise CheckpointError(
            f"Tensor {name!r} is not the same on all ranks",
            f"They have {' and '.join(sorted(map(_words, facts)))}.",
            "Pass the same model on every rank, in parts or whole.",
        )
    if not fill(offers[0].shape, list({offer.box: None for offer in offers})):
        raise CheckpointError(
            f"Tensor {name!r} is incomplete, or has parts that overlap",
            f"What the ranks have does not hold each of its elements once: {list(offers[0].shape)}.",
            "Pass every part, with its own offsets; equal parts may be on several ranks.",
        )


def _words(facts: tuple[str, tuple[int, ...], bool]) -> str:
    code, shape, is_whole = facts
    return f"{code} of {list(shape)}, {'whole' if is_whole else 'in parts'}"


def _ties(by_name: Mapping[str, Sequence[tuple[int, Offer]]]) -> dict[str, str]:
    """The tensors that are tied to another one on every rank that has a part of either."""
    ties = {}
    for name, found in by_name.items():
        firsts = {offer.like for _, offer in found}
        other = next(iter(firsts))
        if len(firsts) == 1 and other != name:
            theirs = by_name[other]
            is_first = all(offer.like == other for _, offer in theirs)
            if is_first and {rank for rank, _ in theirs} == {rank for rank, _ in found}:
                ties[name] = other
    return ties


def _choose(
    by_name: Mapping[str, Sequence[tuple[int, Offer]]],
) -> dict[str, tuple[tuple[Box, int], ...]]:
    """For every tensor its parts, sorted by offsets, with the ranks that write them."""
    candidates: dict[tuple[str, Box], list[tuple[int, Offer]]] = {}
    for name, found in by_name.items():
        for rank, offer in found:
            candidates.setdefault((name, offer.box), []).append((rank, offer))
    load: dict[int, int] = {}
    chosen: dict[str, list[tuple[Box, int]]] = {}
    for (name, box), found in sorted(candidates.items(), key=lambda item: -item[1][0][1].nbytes):
        ranks = [rank for rank, _ in found]
        rank = ranks[0] if found[0][1].is_whole else min(ranks, key=lambda one: (load.get(one, 0), one))
        load[rank] = load.get(rank, 0) + found[0][1].nbytes
        chosen.setdefault(name, []).append((box, rank))
    return {name: tuple(sorted(parts, key=lambda part: part[0].offsets)) for name, parts in chosen.items()}


def _require_names(division: Division, names: Iterable[str]) -> None:
    """Check that payloads can have names, and files places."""
    keys = [key for tensor in division._tensors if tensor.like is None for key in division._keys(tensor)]
    if len(set(keys)) < len(keys):
        odd = [name for name in names if "@" in name]
        raise CheckpointError(
            "Parts of tensors cannot be told apart", f"{some(odd)} look like parts of others.", "Rename them."
        )
    if len(division._files) > MOST_FILES:
        raise CheckpointError("Too many ranks write", f"There are {len(division._files)}.", "Use fewer.")
