"""How the elements of a target tensor follow from rows of base tensors, and the same as groups of parts.

A :class:`View` is a tensor seen as rows: its own ones, or its columns, matrix by matrix. A :class:`Strip` is
the same columns of all rows of a view. What a strip's rows are in the base is a list of :class:`Block`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoint import Group, GroupPart, Tensor
from .vectors import MIN_WIDTH, Vector

#: Most parts of a tensor, since each takes room in the manifest.
MAX_PARTS = 4096


def row_width(tensor: Tensor) -> int:
    """The elements of a row: as many of the last dimensions as make a row long enough to be told."""
    width = 1
    for size in reversed(tensor.info.shape):
        if width >= MIN_WIDTH:
            break
        width *= size
    return width


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as ``rows`` of ``width`` elements. If ``columns`` is not 0, the rows are the columns of its
    matrices, of which each has that many."""

    tensor: Tensor
    rows: int
    width: int
    columns: int = 0

    @property
    def stride(self) -> int:
        """The distance of a row's elements."""
        return self.columns or 1

    def start(self, row: int) -> int:
        """A row's first element."""
        if not self.columns:
            return row * self.width
        matrix, column = divmod(row, self.columns)
        return matrix * self.columns * self.width + column


def views_of(tensor: Tensor) -> Iterator[View]:
    """The views that may show rows of base tensors."""
    numel, width = tensor.info.numel, row_width(tensor)
    if width >= MIN_WIDTH:
        yield View(tensor, numel // width, width)
    shape = [size for size in tensor.info.shape if size > 1]
    if len(shape) > 1 and shape[-2] >= MIN_WIDTH:
        yield View(tensor, numel // shape[-2], shape[-2], shape[-1])


@dataclass(frozen=True, slots=True)
class Strip:
    """Of every row of a view, ``width`` elements from ``offset`` on, ``step`` apart."""

    view: View
    offset: int
    width: int
    step: int = 1

    def vector(self, row: int, first: int, count: int) -> Vector:
        """Some elements of a row."""
        view = self.view
        start = view.start(row) + (self.offset + first * self.step) * view.stride
        return Vector(view.tensor, start, count, self.step * view.stride)


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` rows: element k of row r is ``start + r * step + k * stride`` of ``tensor``."""

    count: int
    tensor: Tensor
    start: int
    step: int
    stride: int

    def vector(self, row: int, first: int, count: int) -> Vector:
        """Some elements of a row."""
        start = self.start + row * self.step + first * self.stride
        return Vector(self.tensor, start, count, self.stride)

    def from_row(self, row: int, count: int) -> Run:
        """So many of its rows, from ``row`` on."""
        return Run(count, self.tensor, self.start + row * self.step, self.step, self.stride)

    def moved(self, distance: int) -> Run:
        """The same rows, so many elements further on."""
        return Run(self.count, self.tensor, self.start + distance, self.step, self.stride)


@dataclass(frozen=True, slots=True)
class Block:
    """Runs, one after the other, ``repeats`` times, each moved by its ``advance`` every time."""

    repeats: int
    runs: tuple[Run, ...]
    advances: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The rows of all repetitions."""
        return self.repeats * self.period

    @property
    def period(self) -> int:
        """The rows of one repetition."""
        return sum(run.count for run in self.runs)

    def expand(self) -> Iterator[Run]:
        """All runs."""
        for repeat in range(self.repeats):
            for run, advance in zip(self.runs, self.advances, strict=True):
                yield run.moved(repeat * advance)


#: A strip, and what its rows are, from the first on.
Solved = tuple[Strip, Sequence[Block]]


def groups_of(strips: Sequence[Solved]) -> list[Group] | None:
    """The groups that give the elements of the strips' view, in order; None if they are too many. One strip
    may have fewer rows than its view, if the view is of rows; several strips have all rows."""
    strip, blocks = strips[0]
    if len(strips) == 1 and not strip.view.columns:
        groups = [group for block in blocks for group in _whole_rows(block, strip.width)]
    elif max(sum(len(block.runs) * block.repeats for block in blocks) for _, blocks in strips) > MAX_PARTS:
        return None
    else:
        groups = _transposed(strips) if strip.view.columns else _fused_columns(strips)
    groups = _joined(groups)
    return groups if sum(len(group.parts) for group in groups) <= MAX_PARTS else None


def _is_flat(run: Run, width: int) -> bool:
    """Whether the rows lie one behind the other in the base."""
    return run.stride == 1 and (run.count == 1 or run.step == width)


def _whole_rows(block: Block, width: int) -> Iterator[Group]:
    """Groups of the rows of a block."""
    if all(run.count == 1 or _is_flat(run, width) for run in block.runs):
        parts = (
            GroupPart(run.tensor, run.start, advance, run.count * width, run.stride)
            for run, advance in zip(block.runs, block.advances, strict=True)
        )
        yield Group(block.repeats, tuple(parts))
    else:
        for run in block.expand():
            yield Group(run.count, (GroupPart(run.tensor, run.start, run.step, width, run.stride),))


def _cut(blocks: Sequence[Block], bounds: Sequence[int]) -> list[Run]:
    """The runs of the blocks, cut at these rows, which are sorted and end with the last."""
    cut, row, place = [], 0, 0
    for block in blocks:
        for run in block.expand():
            first = 0
            while first < run.count:
                while bounds[place] <= row:
                    place += 1
                count = min(run.count - first, bounds[place] - row)
                cut.append(run.from_row(first, count))
                first, row = first + count, row + count
    return cut


def _fused_columns(strips: Sequence[Solved]) -> list[Group]:
    """Groups of the rows of several strips."""
    bounds = set()
    for _, blocks in strips:
        row = 0
        for block in blocks:
            for run in block.expand():
                row += run.count
                bounds.add(row)
    cut = [_cut(blocks, sorted(bounds)) for _, blocks in strips]
    groups = []
    for runs in zip(*cut, strict=True):
        pairs = list(zip(strips, runs, strict=True))
        if strips[0][0].step == 1:
            parts = (GroupPart(r.tensor, r.start, r.step, strip.width, r.stride) for (strip, _), r in pairs)
            groups.append(Group(runs[0].count, tuple(parts)))
        elif all(_is_flat(run, strips[0][0].width) for run in runs):
            parts = (GroupPart(run.tensor, run.start, 1, 1) for run in runs)
            groups.append(Group(runs[0].count * strips[0][0].width, tuple(parts)))
        else:
            for row in range(runs[0].count):
                parts = (GroupPart(r.tensor, r.start + row * r.step, r.stride, 1) for r in runs)
                groups.append(Group(strips[0][0].width, tuple(parts)))
    return groups


def _transposed(strips: Sequence[Solved]) -> list[Group]:
    """Groups of the columns of several strips."""
    view = strips[0][0].view
    bounds = range(view.columns, view.rows + 1, view.columns)
    by_strip = []
    for _, blocks in strips:
        matrices: list[list[GroupPart]] = [[]]
        row = 0
        for run in _cut(blocks, bounds):
            if row == view.columns:
                matrices.append([])
                row = 0
            distance = run.step if run.count > 1 else 1
            matrices[-1].append(GroupPart(run.tensor, run.start, run.stride, run.count, distance))
            row += run.count
        by_strip.append(matrices)
    groups = []
    for matrix in zip(*by_strip, strict=True):
        if strips[0][0].step == 1:
            groups += [Group(strip.width, tuple(p)) for (strip, _), p in zip(strips, matrix, strict=True)]
        else:
            groups.append(Group(strips[0][0].width, tuple(part for parts in matrix for part in parts)))
    return groups


def _joined(groups: Sequence[Group]) -> list[Group]:
    """The groups, with those of one repetition joined, and parts that continue each other."""
    found: list[Group] = []
    for group in groups:
        if group.repeats > 1 or not found or found[-1].repeats > 1:
            found.append(group)
            continue
        parts = list(found[-1].parts)
        for part in group.parts:
            last = parts[-1]
            if last.tensor is part.tensor and last.stride == part.stride == 1 and _end(last) == part.start:
                parts[-1] = GroupPart(last.tensor, last.start, 0, last.count + part.count)
            else:
                parts.append(GroupPart(part.tensor, part.start, 0, part.count, part.stride))
        found[-1] = Group(1, tuple(parts))
    return found


def _end(part: GroupPart) -> int:
    return part.start + part.count


def leading(groups: Sequence[Group], numel: int) -> list[Group]:
    """The groups of the first ``numel`` elements."""
    found: list[Group] = []
    for group in groups:
        repeats = min(group.repeats, numel // group.width)
        if repeats:
            found.append(Group(repeats, group.parts))
        numel -= repeats * group.width
        if repeats < group.repeats:
            parts = []
            for part in group.parts:
                count = min(part.count, numel)
                if count:
                    parts.append(GroupPart(part.tensor, part.first(repeats), 0, count, part.stride))
                numel -= count
            if parts:
                found.append(Group(1, tuple(parts)))
            break
    return found


def whole_rows(tensor: Tensor, numel: int) -> int:
    """The elements of the tensor's rows, by its first dimension, that are whole within ``numel`` elements."""
    shape = tensor.info.shape
    row = math.prod(shape[1:]) if shape else 1
    return numel // row * row
