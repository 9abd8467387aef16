"""Which parts of which base tensors a target tensor is made of: for tensors that were fused, split, stacked,
interleaved or transposed, so that no whole tensor resembles them.

They are found by their shapes and by samples of their bytes, not by the names of models. What is found for
one layer is tried first in the others.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

from ..checkpoint import Checkpoint, Gathered, Group, GroupPart, HeldExtents, Tensor
from ..codec import QUANTIZED
from .candidates import NUMBER, Candidates, fold
from .layouts import groups_of, leading, views_of, whole_rows
from .runs import solve
from .vectors import CLOSE, OutOfBudgetError, Samples, Vector, can_be_read, distances, dtype_class

#: What all searches and one search may cost, in small reads.
_MAX_COST, _MAX_COST_EACH = 120_000, 60_000

#: A search counts as this part of its cost if it finds something, which saves more time than it took.
_COST_OF_FOUND = 0.1

#: So many tensors of a kind are searched for in vain, then the others of that kind are not; and so many are
#: compared with what others of the kind are made of.
_MAX_FAILURES, _MAX_COMPARED = 2, 64

#: Most parts of all tensors together.
_MAX_ALL_PARTS = 1 << 19

#: Places that are compared before anything is believed, the elements at each, and how many may be unlike.
_PLACES, _ELEMENTS, _UNLIKE = 24, 16, 0.25

#: The same where other layers have that layout already, and how many are compared at once.
_PLACES_AGAIN = _PLACES_AT_ONCE = 8

_Groups = Sequence[Group]


def find_parts(
    wanted: Sequence[Tensor],
    base: Checkpoint,
    target: Checkpoint,
    used: Collection[Tensor],
    held: HeldExtents,
    cost: float | None = None,
) -> dict[Tensor, Gathered]:
    """Elements of base tensors that resemble each wanted tensor, for those that any resemble.

    Only samples are read, and none over a network, where each would be a request. The time is bounded; what
    is not found by then is not found.

    Args:
        wanted: target tensors.
        used: base tensors that others are compared with; they are taken last.
        held: for the results.
        cost: what all searches may cost, in small reads; if None, as much as pays when a delta is made.

    Returns:
        As many elements as the tensor has, in its order, or its leading rows, by the first dimension, if
        these are at least half.
    """
    if base.source.is_remote or target.source.is_remote:
        return {}
    usable = [tensor for tensor in wanted if can_be_read(tensor)]
    quantized = {tensor.dtype for tensor in usable}.intersection(QUANTIZED)
    normalizes = bool(quantized.difference(tensor.dtype for tensor in base.tensors))
    finder = _Finder(
        base, target, used, held, Samples(normalizes=normalizes), _MAX_COST if cost is None else cost
    )
    # Biases come last: they follow their weights.
    for tensor in sorted(usable, key=lambda t: (_is_bias(t.name), -t.info.numel)):
        finder.look_for(tensor)
    return {tensor: finder.found[tensor] for tensor in wanted if tensor in finder.found}


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found for a tensor."""

    tensor: Tensor
    numbers: tuple[int, ...]
    groups: _Groups


class _Finder:
    def __init__(
        self,
        base: Checkpoint,
        target: Checkpoint,
        used: Collection[Tensor],
        held: HeldExtents,
        samples: Samples,
        cost: float,
    ) -> None:
        self.found: dict[Tensor, Gathered] = {}
        self._base = base
        self._target = target
        self._held = held
        self._samples = samples
        self._used = used
        self._candidates: Candidates | None = None
        self._known: dict[object, list[_Known]] = {}
        self._failures: Counter[object] = Counter()
        self._apart: defaultdict[object, list[int]] = defaultdict(lambda: [1, 2, 0, 3])
        self._random = random.Random(0)  # noqa: S311
        self._left = cost
        self._parts = 0

    def look_for(self, tensor: Tensor) -> None:
        """Put what resembles the tensor into :attr:`found`."""
        key = fold(tensor.name), tensor.info.shape, dtype_class(tensor)
        known = self._known.setdefault(key, [])
        if self._failures[key] >= _MAX_COMPARED or self._parts >= _MAX_ALL_PARTS:
            return
        gathered = self._like_weight(tensor) or self._like_others(tensor, known, self._apart[key])
        if not gathered and self._failures[key] < _MAX_FAILURES:
            gathered = self._searched(tensor)
        if gathered:
            self.found[tensor] = gathered
            self._parts += sum(len(group.parts) for group in gathered.groups)
            known[1:] = [*known[2:], _Known(tensor, _numbers(tensor.name), gathered.groups)]
        else:
            self._failures[key] += 1

    def _searched(self, tensor: Tensor) -> Gathered | None:
        """What a search finds, within its share of the time."""
        before, found = self._samples.cost, None
        self._samples.limit = before + min(self._left, _MAX_COST_EACH)
        with suppress(OutOfBudgetError):
            found = self._search(tensor)
        cost = self._samples.cost - before
        self._left -= cost * _COST_OF_FOUND if found else cost
        self._samples.limit = float("inf")
        return found

    def _search(self, tensor: Tensor) -> Gathered | None:
        if not self._candidates:
            self._candidates = Candidates(self._base, self._used, self._samples)
        for step in (1, 2):
            for view in views_of(tensor):
                solved = solve(view, step, self._candidates, self._samples)
                groups = groups_of(solved) if solved else None
                if groups and (gathered := self._checked(tensor, groups, _PLACES)):
                    self._candidates.learn(groups)
                    return gathered
        return None

    def _checked(self, tensor: Tensor, groups: _Groups, places: int) -> Gathered | None:
        """The groups, or as much of them as is whole rows, if they resemble the tensor."""
        numel = sum(group.numel for group in groups)
        if numel < tensor.info.numel:
            numel = whole_rows(tensor, numel)
            groups = leading(groups, numel)
            if 2 * numel < tensor.info.numel:
                return None
        try:
            gathered = Gathered(groups, self._held)
        except ValueError:
            return None
        return gathered if self._resembles(tensor, gathered, places) else None

    def _resembles(self, tensor: Tensor, gathered: Gathered, places: int) -> bool:
        """Whether most of some places all over the tensor are alike."""
        ends = list(accumulate(group.numel for group in gathered.groups))
        left = int(places * _UNLIKE)
        for _ in range(0, places, _PLACES_AT_ONCE):
            pairs: dict[int, list[tuple[Vector, Vector]]] = {}
            for _ in range(_PLACES_AT_ONCE):
                element = self._random.randrange(gathered.numel)
                index = bisect_right(ends, element)
                group = gathered.groups[index]
                begin = ends[index] - group.numel
                pair = _counterparts(tensor, group, begin, element - begin)
                pairs.setdefault(pair[0].count, []).append(pair)
            for some in pairs.values():
                ours, theirs = (self._samples.read_all(side) for side in zip(*some, strict=True))
                left -= int((distances(ours, theirs) >= CLOSE).sum())
            if left < 0:
                return False
        return True

    def _like_others(self, tensor: Tensor, known: Sequence[_Known], apart: list[int]) -> Gathered | None:
        """What tensors of the same name but for its numbers are made of, with these numbers. A number that
        the base's names lack is that of a part; so many times its size are parts ``apart``."""
        numbers = _numbers(tensor.name)
        for other in reversed(known):
            moves = [new - old for new, old in zip(numbers, other.numbers, strict=True)]
            tensors = {part.tensor for group in other.groups for part in group.parts}
            twins = {one: self._twin(one, moves) for one in tensors}
            beyond = sum(moves[max(len(_numbers(one.name)) for one in tensors) :])
            for distance in tuple(apart) if beyond else (0,):
                groups = _moved(other.groups, twins, beyond * distance * tensor.info.numel)
                if groups and (gathered := self._checked(tensor, groups, _PLACES_AGAIN)):
                    apart.sort(key=lambda one: one != distance)
                    return gathered
        return None

    def _twin(self, tensor: Tensor, moves: Sequence[int]) -> Tensor | None:
        """The base tensor whose name has these numbers more."""
        name, end = "", 0
        for number, move in zip(NUMBER.finditer(tensor.name), moves, strict=False):
            name += f"{tensor.name[end : number.start()]}{int(number[0][:18]) + move}"
            end = number.end()
        twin = self._base.find(name + tensor.name[end:], tensor.path)
        is_alike = twin and (twin.info.shape, twin.dtype) == (tensor.info.shape, tensor.dtype)
        return twin if is_alike else None

    def _like_weight(self, tensor: Tensor) -> Gathered | None:
        """For a bias, what its weight is made of, with one element for each row."""
        for name in _weights(tensor.name) if _is_bias(tensor.name) else ():
            weight = self._target.find(name, tensor.path)
            if weight and weight in self.found and weight.info.numel % tensor.info.numel == 0:
                width = weight.info.numel // tensor.info.numel
                groups = self._row_by_row(self.found[weight].groups, width, dtype_class(tensor))
                if groups and (gathered := self._checked(tensor, groups, _PLACES_AGAIN)):
                    return gathered
        return None

    def _row_by_row(self, groups: _Groups, width: int, wanted: str) -> _Groups | None:
        """The groups of rows, as groups of the elements of biases."""
        found = []
        for group in groups:
            parts = []
            for part in group.parts:
                numbers = part.start, part.step, part.count
                bias = self._bias_of(part.tensor, width)
                if (
                    not bias
                    or dtype_class(bias) != wanted
                    or part.stride > 1
                    or any(number % width for number in numbers)
                ):
                    return None
                parts.append(GroupPart(bias, *(number // width for number in numbers)))
            found.append(Group(group.repeats, tuple(parts)))
        return found

    def _bias_of(self, weight: Tensor, width: int) -> Tensor | None:
        stem = weight.name.removesuffix("weight")
        for name in (f"{stem}bias", f"{weight.name}_bias", f"{weight.name}.bias"):
            bias = self._base.find(name, weight.path)
            if bias and can_be_read(bias) and bias.info.numel * width == weight.info.numel:
                return bias
        return None


def _counterparts(tensor: Tensor, group: Group, begin: int, within: int) -> tuple[Vector, Vector]:
    """Some elements of a tensor from one of a group on, and those that the group has for them: of one part,
    or of several repetitions of a short one."""
    repeat, place = divmod(within, group.width)
    offset = 0
    for part in group.parts:
        if place < part.count:
            break
        place, offset = place - part.count, offset + part.count
    count = min(_ELEMENTS, part.count)
    repeats = min(_ELEMENTS, group.repeats)
    if count >= repeats or not part.step:
        first = min(place, part.count - count)
        start = begin + repeat * group.width + offset + first
        other = part.first(repeat) + first * part.stride
        return Vector(tensor, start, count, 1), Vector(part.tensor, other, count, part.stride)
    first = min(repeat, group.repeats - repeats)
    start = begin + first * group.width + offset + place
    other = part.first(first) + place * part.stride
    return Vector(tensor, start, repeats, group.width), Vector(part.tensor, other, repeats, part.step)


def _moved(groups: _Groups, twins: dict[Tensor, Tensor | None], distance: int) -> _Groups | None:
    """The groups in other tensors, and so many elements further on."""
    found = []
    for group in groups:
        parts = []
        for part in group.parts:
            twin = twins[part.tensor]
            if not twin or part.start + distance < 0:
                return None
            parts.append(GroupPart(twin, part.start + distance, part.step, part.count, part.stride))
        found.append(Group(group.repeats, tuple(parts)))
    return found


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number[:18]) for number in NUMBER.findall(name))


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _weights(name: str) -> Iterator[str]:
    """What the weight of a bias may be called."""
    stem = name.removesuffix("bias")
    yield f"{stem}weight"
    if stem[:-1]:
        yield stem[:-1]
