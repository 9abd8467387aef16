"""Elements of several tensors in a new order: what a fused, split or transposed tensor is compared with.

A :class:`Group` is a few runs of elements, repeated: ``qkv_proj`` is one repetition of all of q, all of k,
all of v; interleaved heads are many repetitions of some rows of each; a transposed matrix is a repetition for
each column, with a stride.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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

#: A scattered piece is read whole, since every chunk needs bytes from all over it. Those of a group are no
#: larger than this together, so that they are held while its elements are read.
MAX_STRIDED_BYTES = 256 << 20

#: How many bytes are read for each one that is used, at most, and how many are read in any case.
_MAX_READ_FOR_ONE, _FREE = 64, 1 << 20

#: Runs of elements that are shorter than this are not read one by one.
_MIN_RUN_BYTES = 64

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
    """The scattered pieces that were read last, for all :class:`Gathered` that share it."""

    def __init__(self) -> None:
        super().__init__(MAX_STRIDED_BYTES)
        self._reading = threading.Lock()

    def read(
        self, key: Hashable, nbytes: int, fill: Callable[[NDArray[np.uint8]], None]
    ) -> NDArray[np.uint8]:
        """The bytes of a piece, which ``fill`` reads if they are not held. One is read at a time, after the
        room for it was made: the bound holds for any number of threads."""

        def make() -> NDArray[np.uint8]:
            with self._reading:
                self.make_room(nbytes)
                out = np.empty(nbytes, np.uint8)
                fill(out)
                return out

        return self.get(key, make)


class Gathered:
    """Elements of base tensors in the order of ``groups``, read like one tensor.

    Args:
        groups: the elements, in order.
        held: holds what strided pieces read.

    Raises:
        ValueError: there are none; a piece lies outside its tensor; the tensors have several dtypes, or one
            whose elements do not fill bytes; or they are so scattered that reading them takes too long.
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
        #: Of each group, the ends of its pieces within a repetition; the last one is the width.
        self._places = [list(accumulate(piece.count for piece in group.pieces)) for group in groups]
        widths = [places[-1] for places in self._places]
        self._ends = list(accumulate(group.repeats * w for group, w in zip(groups, widths, strict=True)))
        self._held = held
        self._check_scatter()

    def _check(self, piece: Piece, repeats: int) -> None:
        numbers = repeats, piece.count, piece.stride
        if min(numbers) < 1 or min(piece.start, piece.step) < 0:
            raise ValueError("a part of no elements, or a negative one")
        if piece.end(repeats) > piece.tensor.info.numel:
            raise ValueError(f"a part goes beyond tensor {piece.tensor.name!r}")

    def _check_scatter(self) -> None:
        """Refuse what would be read in tiny runs, or with far more than is used."""
        most = _MAX_READ_FOR_ONE * self.nbytes + _FREE
        for group, places in zip(self.groups, self._places, strict=True):
            width = places[-1] * self._itemsize
            if group.repeats > 1 and width > _BLOCK_BYTES and width < _MIN_RUN_BYTES * len(places):
                raise ValueError("its parts are too short")
            extents = {
                one: one.end(group.repeats) - one.start for one in group.pieces if self._is_held(one, group)
            }
            nbytes = sum(extents.values()) * self._itemsize
            most -= nbytes
            if nbytes > MAX_STRIDED_BYTES or most < 0:
                name = next(iter(extents)).tensor.name
                raise ValueError(f"scattered parts of tensor {name!r} span {nbytes} bytes")

    def _is_held(self, piece: Piece, group: Group) -> bool:
        """Whether the piece is read whole, once, rather than run by run."""
        is_short = piece.count * self._itemsize < _MIN_RUN_BYTES and piece.step > 4 * piece.count
        return piece.stride > 1 or (is_short and group.repeats > 1)

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
        for index, repeat, place, count in self._runs(start // self._itemsize, whole.size):
            group, part = self.groups[index], whole[done : done + count]
            if place is None:
                self._read_block(group, repeat, part.reshape(-1, self._places[index][-1]))
            else:
                piece, within = place
                self._read_run(piece, piece.first(repeat) + within * piece.stride, group, part)
            done += count
        out[:] = whole.view(np.uint8)

    def spans(self, start: int, end: int) -> list[Span]:
        """The spans of files that the bytes ``start`` to ``end`` come from, in the order of reading. A
        scattered piece counts whole, for the bytes that hold its first element."""
        found: list[Span] = []
        first, last = start // self._itemsize, end // self._itemsize
        for index, repeat, place, count in self._runs(first, last - first):
            group = self.groups[index]
            chosen = group.pieces if place is None else place[:1]
            for piece in chosen:
                if self._is_held(piece, group):
                    is_first = repeat == 0 and (place is None or place[1] == 0)
                    if is_first:
                        found.append(self._span(piece, piece.start, piece.end(group.repeats)))
                elif place is None:
                    end = repeat + count // self._places[index][-1]
                    found += self._spans_of_runs(piece, repeat, end)
                else:
                    low = piece.first(repeat) + place[1]
                    found.append(self._span(piece, low, low + count))
        return found

    def _spans_of_runs(self, piece: Piece, repeat: int, end: int) -> Iterator[Span]:
        """The spans of whole repetitions: one, unless far more lies between them than they have."""
        low, high = piece.first(repeat), piece.end(end)
        if high - low <= _MAX_READ_FOR_ONE * (end - repeat) * piece.count:
            yield self._span(piece, low, high)
        else:
            for one in range(repeat, end):
                yield self._span(piece, piece.first(one), piece.first(one) + piece.count)

    def _span(self, piece: Piece, low: int, high: int) -> Span:
        return piece.tensor.span(low * self._itemsize, high * self._itemsize)

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, tuple[Piece, int] | None, int]]:
        """The elements from ``first`` on, as runs: the index of the group; the repetition; the piece and
        the place in it, or None for whole repetitions; the number of elements."""
        while count > 0:
            index = bisect_right(self._ends, first)
            group, places = self.groups[index], self._places[index]
            width = places[-1]
            begin = self._ends[index] - group.repeats * width
            repeat, within = divmod(first - begin, width)
            if within == 0 and count >= width and width * self._itemsize <= _BLOCK_BYTES:
                taken = min(group.repeats - repeat, count // width) * width
                yield index, repeat, None, taken
            else:
                k = bisect_right(places, within)
                piece = group.pieces[k]
                within -= places[k] - piece.count
                taken = min(piece.count - within, count)
                yield index, repeat, (piece, within), taken
            first, count = first + taken, count - taken

    def _read_block(self, group: Group, repeat: int, out: _Elements) -> None:
        """Whole repetitions from ``repeat`` on, a row of ``out`` for each."""
        column = 0
        for piece in group.pieces:
            rows = out[:, column : column + piece.count]
            low, high = piece.first(repeat), piece.end(repeat + len(out))
            if self._is_held(piece, group):
                extent = self._extent(piece, group.repeats)
                rows[:] = _strided(extent[low - piece.start :], len(out), piece)
            elif high - low <= 4 * rows.size:
                extent = np.empty(high - low, self._kind)
                piece.tensor.read_into(low * self._itemsize, extent.view(np.uint8))
                rows[:] = _strided(extent, len(out), piece)
            else:
                for k in range(len(out)):
                    run = np.empty(piece.count, self._kind)
                    self._read_run(piece, piece.first(repeat + k), group, run)
                    rows[k] = run
            column += piece.count

    def _read_run(self, piece: Piece, first: int, group: Group, out: _Elements) -> None:
        """Elements of one repetition of a piece, from element ``first`` of its tensor on."""
        if self._is_held(piece, group):
            begin = first - piece.start
            end = begin + (out.size - 1) * piece.stride + 1
            out[:] = self._extent(piece, group.repeats)[begin : end : piece.stride]
        else:
            piece.tensor.read_into(first * self._itemsize, out.view(np.uint8))

    def _extent(self, piece: Piece, repeats: int) -> _Elements:
        """All elements between a scattered piece's first and last."""
        nbytes = (piece.end(repeats) - piece.start) * self._itemsize
        fill = partial(piece.tensor.read_into, piece.start * self._itemsize)
        return self._held.read((piece, repeats), nbytes, fill).view(self._kind)


#: What a tensor is compared with.
Base: TypeAlias = Tensor | Gathered


def tensors_of(base: Base) -> list[Tensor]:
    """The tensors that it is, or is made of."""
    return [base] if isinstance(base, Tensor) else base.tensors


def _strided(extent: _Elements, repeats: int, piece: Piece) -> _Elements:
    """Repetitions of a piece, a row for each, from its elements in their order in the tensor."""
    size = extent.itemsize
    strides = piece.step * size, piece.stride * size
    return as_strided(extent, (repeats, piece.count), strides, writeable=False)
