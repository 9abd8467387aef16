"""Elements of several tensors in a new order: what a fused, split or transposed tensor is compared with.

A :class:`Group` is a few runs of elements, repeated: ``qkv_proj`` is one repetition of all of q, all of k,
all of v; interleaved heads are many repetitions of some rows of each; a transposed matrix is a repetition for
each column, with a stride.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..recent import Recent
from ..storage.source import Span
from ..words import listed
from .checkpoint import Tensor

#: A piece with a stride is read whole, since every chunk needs bytes from all over it.
MAX_STRIDED_BYTES = 256 << 20

#: Repetitions up to this size are read many at a time, longer ones run by run.
_BLOCK_BYTES = 64 << 10

_Elements = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Piece:
    """In repetition r, ``count`` elements of ``tensor``: those at ``start + r * step + k * stride``."""

    tensor: Tensor
    start: int
    step: int
    count: int
    stride: int = 1

    def first(self, repeat: int) -> int:
        """The first element of a repetition."""
        return self.start + repeat * self.step

    def end(self, repeats: int) -> int:
        """The element behind the last one that so many repetitions use."""
        return self.first(repeats - 1) + (self.count - 1) * self.stride + 1


@dataclass(frozen=True, slots=True)
class Group:
    """The elements of all pieces, one after the other, ``repeats`` times."""

    repeats: int
    pieces: tuple[Piece, ...]

    @property
    def width(self) -> int:
        """The elements of one repetition."""
        return sum(piece.count for piece in self.pieces)

    @property
    def numel(self) -> int:
        """The elements of all repetitions."""
        return self.repeats * self.width


class HeldExtents(Recent[NDArray[np.uint8]]):
    """The strided pieces that were read last, for all :class:`Gathered` that share it."""

    def __init__(self) -> None:
        super().__init__(MAX_STRIDED_BYTES)


class Gathered:
    """Elements of base tensors in the order of ``groups``, read like one tensor.

    Args:
        groups: the elements, in order.
        held: holds what strided pieces read.

    Raises:
        ValueError: there are none; a piece lies outside its tensor; the tensors have several dtypes, or one
            whose elements do not fill bytes; or a strided piece spans more than :data:`MAX_STRIDED_BYTES`.
    """

    def __init__(self, groups: Sequence[Group], held: HeldExtents) -> None:
        pieces = [(piece, group.repeats) for group in groups for piece in group.pieces]
        dtypes = {piece.tensor.dtype for piece, _ in pieces}
        if len(dtypes) != 1 or not (dtype := DTYPES.get(next(iter(dtypes)))) or not dtype.itemsize:
            raise ValueError("parts need one dtype, of whole bytes")
        self.groups = tuple(groups)
        self.dtype = next(iter(dtypes))
        self._itemsize = dtype.itemsize
        self._kind = np.dtype(f"<u{dtype.itemsize}")
        for piece, repeats in pieces:
            self._check(piece, repeats)
        self._ends = list(accumulate(group.numel for group in groups))
        self._held = held

    def _check(self, piece: Piece, repeats: int) -> None:
        numbers = repeats, piece.count, piece.stride
        if min(numbers) < 1 or min(piece.start, piece.step) < 0:
            raise ValueError("a part of no elements, or a negative one")
        if piece.end(repeats) > piece.tensor.info.numel:
            raise ValueError(f"a part goes beyond tensor {piece.tensor.name!r}")
        extent = (piece.end(repeats) - piece.start) * self._itemsize
        if piece.stride > 1 and extent > MAX_STRIDED_BYTES:
            raise ValueError(f"a strided part of tensor {piece.tensor.name!r} spans {extent} bytes")

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self._itemsize

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it reads, each once."""
        return list(dict.fromkeys(piece.tensor for group in self.groups for piece in group.pieces))

    @property
    def name(self) -> str:
        """The tensors' names, for messages."""
        return listed([tensor.name for tensor in self.tensors], 3)

    @property
    def path(self) -> str:
        """The path of the first tensor's shard."""
        return self.groups[0].pieces[0].tensor.path

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8, whole elements) with the bytes from byte ``start`` on."""
        # Not piece by piece into `out`: a tensor that is itself rebuilt may use that memory meanwhile.
        whole = np.empty(out.size // self._itemsize, self._kind)
        done = 0
        for group, repeat, place, count in self._runs(start // self._itemsize, whole.size):
            part = whole[done : done + count]
            if place is None:
                self._read_block(group, repeat, part.reshape(-1, group.width))
            else:
                piece, within = place
                self._read_run(piece, piece.first(repeat) + within * piece.stride, group.repeats, part)
            done += count
        out[:] = whole.view(np.uint8)

    def spans(self, start: int, end: int) -> list[Span]:
        """The spans of files that the bytes ``start`` to ``end`` come from, in the order of reading. A
        strided piece counts whole, for the bytes that hold its first element."""
        found: list[Span] = []
        first, last = start // self._itemsize, end // self._itemsize
        for group, repeat, place, count in self._runs(first, last - first):
            chosen = group.pieces if place is None else place[:1]
            for piece in chosen:
                if piece.stride > 1:
                    is_first = repeat == 0 and (place is None or place[1] == 0)
                    if is_first:
                        found.append(self._span(piece, piece.start, piece.end(group.repeats)))
                elif place is None:
                    low, high = piece.first(repeat), piece.end(repeat + count // group.width)
                    found.append(self._span(piece, low, high))
                else:
                    low = piece.first(repeat) + place[1]
                    found.append(self._span(piece, low, low + count))
        return found

    def _span(self, piece: Piece, low: int, high: int) -> Span:
        return piece.tensor.span(low * self._itemsize, high * self._itemsize)

    def _runs(self, first: int, count: int) -> Iterator[tuple[Group, int, tuple[Piece, int] | None, int]]:
        """The elements from ``first`` on, as runs: the group; the repetition; the piece and the place in it,
        or None for whole repetitions; the number of elements."""
        while count > 0:
            index = bisect_right(self._ends, first)
            group = self.groups[index]
            begin = self._ends[index] - group.numel
            repeat, within = divmod(first - begin, group.width)
            if within == 0 and count >= group.width and group.width * self._itemsize <= _BLOCK_BYTES:
                taken = min(group.repeats - repeat, count // group.width) * group.width
                yield group, repeat, None, taken
            else:
                piece, within = _piece_at(group, within)
                taken = min(piece.count - within, count)
                yield group, repeat, (piece, within), taken
            first, count = first + taken, count - taken

    def _read_block(self, group: Group, repeat: int, out: _Elements) -> None:
        """Whole repetitions from ``repeat`` on, a row of ``out`` for each."""
        column = 0
        for piece in group.pieces:
            rows = out[:, column : column + piece.count]
            low, high = piece.first(repeat), piece.end(repeat + len(out))
            if piece.stride > 1:
                extent = self._extent(piece, group.repeats)
                rows[:] = _strided(extent[low - piece.start :], len(out), piece)
            elif high - low <= 4 * rows.size:
                extent = np.empty(high - low, self._kind)
                piece.tensor.read_into(low * self._itemsize, extent.view(np.uint8))
                rows[:] = _strided(extent, len(out), piece)
            else:
                for k in range(len(out)):
                    run = np.empty(piece.count, self._kind)
                    self._read_run(piece, piece.first(repeat + k), group.repeats, run)
                    rows[k] = run
            column += piece.count

    def _read_run(self, piece: Piece, first: int, repeats: int, out: _Elements) -> None:
        """Elements of one repetition of a piece, from element ``first`` of its tensor on."""
        if piece.stride == 1:
            piece.tensor.read_into(first * self._itemsize, out.view(np.uint8))
        else:
            begin = first - piece.start
            out[:] = self._extent(piece, repeats)[
                begin : begin + (out.size - 1) * piece.stride + 1 : piece.stride
            ]

    def _extent(self, piece: Piece, repeats: int) -> _Elements:
        """All elements between a strided piece's first and last."""

        def read() -> NDArray[np.uint8]:
            out = np.empty((piece.end(repeats) - piece.start) * self._itemsize, np.uint8)
            piece.tensor.read_into(piece.start * self._itemsize, out)
            return out

        return self._held.get((piece, repeats), read).view(self._kind)


#: What a tensor is compared with.
Base: TypeAlias = Tensor | Gathered


def tensors_of(base: Base) -> list[Tensor]:
    """The tensors that it is, or is made of."""
    return [base] if isinstance(base, Tensor) else base.tensors


def _piece_at(group: Group, within: int) -> tuple[Piece, int]:
    """The piece that holds an element of a repetition, and the place in it."""
    for piece in group.pieces:
        if within < piece.count:
            return piece, within
        within -= piece.count
    raise AssertionError("the place is outside the group")


def _strided(extent: _Elements, repeats: int, piece: Piece) -> _Elements:
    """Repetitions of a piece, a row for each, from its elements in their order in the tensor."""
    size = extent.itemsize
    strides = piece.step * size, piece.stride * size
    return as_strided(extent, (repeats, piece.count), strides, writeable=False)
