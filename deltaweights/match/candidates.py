"""Places in the base where rows of a target tensor may begin, with a sample of each, read once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Group, Tensor
from ..codec import QUANTIZED
from .layouts import Run, View, row_width
from .vectors import CLOSE, MIN_WIDTH, SAMPLE, Samples, Vector, are_close, can_be_read, distances, dtype_class

#: Most places that a search compares with, in all tensors and in those of the same layer.
_MAX_STARTS, _MAX_NEAR = 65_536, 2048

#: Most places in one tensor, of each kind.
_MAX_ROWS, _MAX_COLUMNS = 512, 16

#: Heads and groups of heads begin at multiples of this row, up to that one.
_HEAD_STEP, _HEAD_END = 8, 2048

#: Halves of heads, whose rows alternate in some models, begin before this row.
_HALF_HEAD_END = 257

#: A first look is at so many elements; who is this far away or more is not looked at again.
_GLANCE, _LIKELY = 16, 1.0

#: Most places that are looked at again, and most that are asked whether they fit.
_MAX_LIKELY, _MAX_FITTED = 4096, 32

#: Most ends of parts of a layer that are kept, the last ones, and most distances of a tensor's parts.
_MAX_LEARNT = 32

#: A comparison of so many rows takes as long as a small read.
_ROWS_PER_READ = 200

#: And so does one of so many names.
_NAMES_PER_READ = 8

#: A number that is a word of a name.
NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


class Place(NamedTuple):
    """An element of a base tensor, and the distance of the next ones of its row."""

    tensor: Tensor
    start: int
    stride: int = 1

    @property
    def column(self) -> int:
        """Where it is in its row."""
        return self.start % row_width(self.tensor)

    @property
    def room(self) -> int:
        """The elements from here to the end of the row."""
        return -(-(row_width(self.tensor) - self.column) // self.stride)

    def run(self, rows: int) -> Run:
        """So many rows from here on, or as many as there are."""
        width = row_width(self.tensor)
        left = self.tensor.info.numel // width - self.start // width
        return Run(min(rows, left), self.tensor, self.start, width, self.stride)


class _Sampled:
    """Places, with samples of as many elements as they have room for."""

    def __init__(self, places: Iterable[Place], samples: Samples) -> None:
        alike: dict[tuple[int, str], list[Place]] = {}
        for place in places:
            alike.setdefault((min(SAMPLE, place.room), place.tensor.dtype), []).append(place)
        self._samples = samples
        self._groups = []
        for (length, _), some in alike.items():
            rows = samples.read_all([Vector(one.tensor, one.start, length, one.stride) for one in some])
            self._groups.append((some, rows, rows[:, :_GLANCE].copy()))

    def nearest(self, sample: NDArray[np.float32], fits: Callable[[Place], bool]) -> Place | None:
        """The place that fits and looks most like the sample, if any looks like it."""
        best, least = None, CLOSE
        for places, rows, glances in self._groups:
            self._samples.spend(1 + len(rows) / _ROWS_PER_READ)
            (likely,) = np.nonzero(distances(sample[:_GLANCE], glances) < _LIKELY)
            count = min(rows.shape[1], sample.size)
            found = distances(sample[:count], rows[likely[:_MAX_LIKELY], :count])
            for index in np.argsort(found, kind="stable")[:_MAX_FITTED]:
                if found[index] >= least:
                    break
                if fits(place := places[likely[index]]):
                    best, least = place, float(found[index])
                    break
        return best


class Candidates:
    """Finds where rows of target tensors begin in the base.

    Args:
        used: tensors that others are compared with: of two that are alike, a different one is chosen.
    """

    def __init__(self, base: Checkpoint, used: Collection[Tensor], samples: Samples) -> None:
        self._base = base
        self._samples = samples
        usable = [t for t in base.tensors if can_be_read(t) and row_width(t) >= MIN_WIDTH][:_MAX_STARTS]
        used = set(used)
        self._tensors: dict[str, list[Tensor]] = {}
        self._by_layer: dict[tuple[str, str], list[Tensor]] = {}
        for tensor in sorted(usable, key=lambda t: t in used):
            self._tensors.setdefault(dtype_class(tensor), []).append(tensor)
            self._by_layer.setdefault((dtype_class(tensor), layer_of(tensor.name)), []).append(tensor)
        self._starts: dict[str, _Sampled] = {}
        self._near: dict[object, _Sampled] = {}
        self._borders: dict[tuple[str, str], dict[Place, None]] = {}
        self._steps: dict[Tensor, dict[int, None]] = {}

    def _class_of(self, target: Tensor) -> str:
        """The class of base tensors that a target tensor may be made of: a quantized one is made of floats,
        unless the base is quantized itself."""
        own = dtype_class(target)
        return "" if own not in self._tensors and own in QUANTIZED else own

    def learn(self, groups: Sequence[Group]) -> None:
        """Where the first parts of these groups end, others may begin, and repeat themselves as these do."""
        for part in groups[0].parts[:_MAX_LEARNT]:
            key = dtype_class(part.tensor), layer_of(part.tensor.name)
            end = part.start + part.count * part.stride
            if end < part.tensor.info.numel:
                _add(self._borders.setdefault(key, {}), Place(part.tensor, end))
            if groups[0].repeats > 1:
                _add(self._steps.setdefault(part.tensor, {}), part.step)

    def steps(self, tensor: Tensor) -> Iterable[int]:
        """The distances of parts of a tensor that repeat themselves."""
        return self._steps.get(tensor, ())

    def find(self, view: View, sample: NDArray[np.float32], fits: Callable[[Place], bool]) -> Place | None:
        """The place that fits whose elements look most like the sample, which is the beginning of a row."""
        kind, layer = self._class_of(view.tensor), layer_of(view.tensor.name)
        borders = [place for place in self._borders.get((kind, layer), ()) if fits(place)]
        if place := resembling(borders, self._samples, sample):
            return place
        key = kind, layer, view.rows, view.width
        if key not in self._near:
            self._near[key] = _Sampled(self._places_near(view), self._samples)
            while len(self._near) > 16:
                self._near.pop(next(iter(self._near)))
        if place := self._near[key].nearest(sample, fits):
            return place
        if kind not in self._starts:
            places = (Place(t, 0) for t in self._tensors.get(kind, ()))
            self._starts[kind] = _Sampled(places, self._samples)
        return self._starts[kind].nearest(sample, fits)

    def successors(self, tensor: Tensor) -> Iterator[Tensor]:
        """Tensors whose name has one of its numbers increased by one."""
        for number in reversed(list(NUMBER.finditer(tensor.name))):
            if len(number[0]) < 10:
                name = f"{tensor.name[: number.start()]}{int(number[0]) + 1}{tensor.name[number.end() :]}"
                other = self._base.find(name, tensor.path)
                if other and (other.info.shape, other.dtype) == (tensor.info.shape, tensor.dtype):
                    yield other

    def _places_near(self, view: View) -> Iterator[Place]:
        """Places in tensors of the same layer, those with the most similar names first."""
        name = view.tensor.name
        tensors = self._by_layer.get((self._class_of(view.tensor), layer_of(name)), [])
        self._samples.spend(len(tensors) / _NAMES_PER_READ)
        tensors = sorted(tensors, key=lambda t: -_common_prefix(t.name, name))
        found = 0
        for tensor in tensors:
            for place in _places_in(tensor, view):
                if found >= _MAX_NEAR:
                    return
                found += 1
                yield place


def fold(name: str) -> str:
    """A name with a star for each number among its words."""
    return NUMBER.sub("*", name)


_Learnt = TypeVar("_Learnt")


def _add(learnt: dict[_Learnt, None], one: _Learnt) -> None:
    """Keep it, and the last ones before it."""
    learnt[one] = None
    if len(learnt) > _MAX_LEARNT:
        learnt.pop(next(iter(learnt)))


def _common_prefix(one: str, other: str) -> int:
    """The length of the beginning that two names share."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def layer_of(name: str) -> str:
    """The first number among a name's words."""
    number = NUMBER.search(name)
    return number[0] if number else ""


def _places_in(tensor: Tensor, view: View) -> Iterator[Place]:
    """Places in a tensor where the rows of a view may begin."""
    width = row_width(tensor)
    rows = tensor.info.numel // width
    yield Place(tensor, 0)
    if width == view.width:
        for row in _rows_of_parts(rows, view.rows):
            yield Place(tensor, row * width)
    elif width > view.width:
        columns = {0, width - view.width, *range(0, width - view.width + 1, view.width)}
        strides = [(column, 1) for column in sorted(columns)[:_MAX_COLUMNS]]
        if width >= 2 * view.width:
            strides += [(0, 2), (1, 2)]
        starts = {0, *list(range(0, rows - view.rows + 1, view.rows))[:_MAX_ROWS]}
        for row in sorted(starts):
            for column, stride in strides:
                if row or column or stride > 1:
                    yield Place(tensor, row * width + column, stride)


@lru_cache(maxsize=1024)
def _rows_of_parts(rows: int, part: int) -> list[int]:
    """Rows, but the first, where a part of so many rows of a tensor may begin: behind others of that size or
    of some heads, at its end, or where short ones alternate."""
    if rows <= part:
        return [row for row in (1, 2, 3, *range(_HEAD_STEP, _HALF_HEAD_END, _HEAD_STEP)) if row < rows]
    found = {1, 2, 3, rows - part, rows - 2 * part}
    found |= set(range(part, rows, part)[:_MAX_ROWS])
    found |= {d for d in range(1, min(math.isqrt(part), _HEAD_END) + 1) if part % d == 0}
    found |= {part // d for d in range(1, min(math.isqrt(part), _HEAD_END) + 1) if part % d == 0}
    found |= set(range(_HEAD_STEP, min(rows, _HEAD_END), _HEAD_STEP))
    return sorted(row for row in found if 0 < row < rows)


def resembling(places: Sequence[Place], samples: Samples, sample: NDArray[np.float32]) -> Place | None:
    """The first of these places that looks like the sample."""
    for place in places:
        count = min(sample.size, place.room)
        if count >= MIN_WIDTH:
            elements = samples.read(Vector(place.tensor, place.start, count, place.stride))
            if are_close(sample[:count], elements):
                return place
    return None
