"""Boxes: the parts of a tensor that ranks hold, and the places of their elements in its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Shorter runs of a box are not worth a read each, so whole rows are read and cut.
_RUN_BYTES = 1 << 14

#: The bytes to read at once for that.
_COVER_BYTES = 1 << 20

#: How often the boxes of a tensor are cut into groups, one in the other, and how many boxes of one group are
#: compared in pairs.
_MOST_LEVELS, _MOST_PAIRED = 16, 4096

#: Fills an array (uint8) from a byte of a tensor on.
ReadInto = Callable[[int, NDArray[np.uint8]], None]


@dataclass(frozen=True, slots=True)
class Box:
    """The ``sizes`` elements along each dimension, beginning at ``offsets``; for a 0-d tensor, its only
    one."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects the box from an array."""
        return tuple(slice(first, first + size) for first, size in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """The elements that are in both boxes; None if there are none."""
        spans = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        if any(first >= end for first, end in spans):
            return None
        return Box(tuple(first for first, _ in spans), tuple(end - first for first, end in spans))

    def seen_from(self, offsets: Sequence[int]) -> Box:
        """The same elements, counted from ``offsets``."""
        return Box(tuple(a - b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)

    def moved_by(self, offsets: Sequence[int]) -> Box:
        """The inverse of :meth:`seen_from`."""
        return Box(tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)


def cut(sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` to ``stop``, in row-major order, of an array of ``sizes``, as few boxes in that
    order, each in row-major order."""
    if start >= stop:
        return
    if not sizes:
        yield Box((), ())
        return
    inner = math.prod(sizes[1:])
    first, end = -(-start // inner), stop // inner  # the whole rows
    if first > end:  # all within one row
        yield from _in_row(sizes, end, start, stop)
        return
    if start < first * inner:
        yield from _in_row(sizes, first - 1, start, first * inner)
    if first < end:
        yield Box((first, *(0 for _ in sizes[1:])), (end - first, *sizes[1:]))
    if end * inner < stop:
        yield from _in_row(sizes, end, end * inner, stop)


def _in_row(sizes: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    shift = row * math.prod(sizes[1:])
    for box in cut(sizes[1:], start - shift, stop - shift):
        yield Box((row, *box.offsets), (1, *box.sizes))


def envelope(sizes: Sequence[int], box: Box) -> tuple[int, int]:
    """The first element of ``box`` and the end of its last one, in the row-major order of ``sizes``."""
    first = last = 0
    for size, offset, length in zip(sizes, box.offsets, box.sizes, strict=True):
        first = first * size + offset
        last = last * size + offset + length - 1
    return first, last + 1


def read_box(
    read_into: ReadInto, shape: Sequence[int], itemsize: int, box: Box, out: NDArray[np.uint8]
) -> None:
    """Fill ``out`` (uint8, contiguous) with the elements of ``box``, in row-major order.

    Args:
        read_into: reads the bytes of a row-major tensor of ``shape``, with ``itemsize`` bytes per element.

    Long runs are read one by one. For short runs, the bytes between them are read too, at most 1 MiB or one
    run at once.
    """
    if out.size == 0:
        return
    shape, box = _merged(shape, box)
    row = math.prod(shape[1:]) * itemsize  # bytes from one index of the first dimension to the next
    start = box.offsets[0] * row
    if len(shape) == 1:
        read_into(start, out)
        return
    needed = math.prod(box.sizes[1:]) * itemsize  # of a row
    rows = max(1, _COVER_BYTES // row)
    if needed >= _RUN_BYTES or (rows == 1 and row > _COVER_BYTES):
        inner = Box(box.offsets[1:], box.sizes[1:])
        for index in range(box.sizes[0]):

            def read_row(offset: int, part: NDArray[np.uint8], first: int = start + index * row) -> None:
                read_into(first + offset, part)

            read_box(read_row, shape[1:], itemsize, inner, out[index * needed : (index + 1) * needed])
        return
    word = np.dtype(f"V{itemsize}")
    for index in range(0, box.sizes[0], rows):
        count = min(rows, box.sizes[0] - index)
        inner = Box((0, *box.offsets[1:]), (count, *box.sizes[1:]))
        first, end = (n * itemsize for n in envelope((count, *shape[1:]), inner))
        covered = np.empty(count * row, np.uint8)
        read_into(start + index * row + first, covered[first:end])
        part = covered.view(word).reshape(count, *shape[1:])[inner.slices]
        out[index * needed : (index + count) * needed] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def _merged(shape: Sequence[int], box: Box) -> tuple[tuple[int, ...], Box]:
    """The same elements in as few dimensions as possible, at least one."""
    lengths, offsets, sizes = [1], [0], [1]
    for length, offset, size in zip(shape, box.offsets, box.sizes, strict=True):
        if (
            size == length or sizes[-1] == 1
        ):  # the whole dimension, or one index of the one before: still one run
            lengths[-1] *= length
            offsets[-1] = offsets[-1] * length + offset
            sizes[-1] *= size
        else:
            lengths.append(length)
            offsets.append(offset)
            sizes.append(size)
    return tuple(lengths), Box(tuple(offsets), tuple(sizes))


def fill(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes hold each element of a tensor of ``shape`` (fewer than 2**63) once, and nothing else.
    Takes n log n steps for n boxes."""
    whole = Box((0,) * len(shape), tuple(shape))
    if not all(_is_inside(box, shape) for box in boxes):
        return False
    if sum(box.numel for box in boxes) != whole.numel:
        return False
    if not shape:
        return len(boxes) == 1
    filled = [box for box in boxes if box.numel]
    starts = np.array([box.offsets for box in filled], np.int64).reshape(-1, len(shape))
    return _are_apart(
        starts, starts + np.array([box.sizes for box in filled], np.int64).reshape(starts.shape)
    )


def _are_apart(starts: NDArray[np.int64], ends: NDArray[np.int64], level: int = 0) -> bool:
    """Whether no two boxes have an element in common. Arrays of shape (boxes, dimensions).

    Planes that no box crosses cut them into groups, and these into smaller ones. What is left is compared
    in pairs, up to a number that no sharding comes near; beyond it, the answer is no.
    """
    for dim in range(starts.shape[1] if level < _MOST_LEVELS else 0):
        order = np.argsort(starts[:, dim], kind="stable")
        cuts = starts[order[1:], dim] >= np.maximum.accumulate(ends[order[:-1], dim])
        if cuts.any():
            groups = np.split(order, np.flatnonzero(cuts) + 1)
            return all(
                _are_apart(starts[group], ends[group], level + 1) for group in groups if len(group) > 1
            )
    if len(starts) > _MOST_PAIRED:
        return False
    return not any(
        ((starts[i] < ends[i + 1 :]) & (starts[i + 1 :] < ends[i])).all(axis=1).any()
        for i in range(len(starts) - 1)
    )


def _is_inside(box: Box, shape: Sequence[int]) -> bool:
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return False
    return all(
        0 <= offset <= offset + size <= length
        for offset, size, length in zip(box.offsets, box.sizes, shape, strict=True)
    )
