"""Predicts a tensor's chunks by a low-rank update of its base: what merging an adapter does.

::

    prediction = LowRank.parse(data, "BF16", numel)   # raises PayloadError
    closer = prediction.predict(base, start)          # elements from number `start` on, from the base's

What it predicts becomes the base of the ordinary methods. It is the same on every machine, to the last bit.
docs/format.md has the layout and the arithmetic; :mod:`.search` makes the data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import low_rank
from ..constants import GAIN_BITS, GUARD, MOST_RANK, PREDICTED_AT_ONCE
from ..kernel_arrays import Doubles, Floats, Numbers
from ..methods.entropy import decode_list, family
from ..tables import PRECISION, TOKENS

__all__ = ["LowRank", "LowRankPart", "PartHead"]

Bytes = NDArray[np.uint8]

#: Bytes of an element of the dtypes that can be predicted.
ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4}
KIND = 1
ROUNDED = 1  # the flag: products are rounded to the dtype before they are added
HEAD = struct.Struct("<BBII")  # kind, flags, columns, parts
NO_GAINS = 255  # in place of a shift
MOST_CONTEXTS, MOST_SHIFT, EXPONENTS = 40, 16, (-32, 120)
MOST_FACTORS = 1 << 27  # of a tensor: what a reader makes room for


@dataclass(frozen=True)
class PartHead:
    """What is stated of some rows.

    Attributes:
        rows: how many there are.
        rank: 0 if nothing is added to them.
        exponent: products are divided by 2 to this power.
        contexts: how many tables the factors have.
        shift: gains are multiples of 2**(shift - 23); NO_GAINS if there are none.
    """

    rows: int
    rank: int
    exponent: int
    contexts: int
    shift: int

    LAYOUT = struct.Struct("<IHbBB")

    @classmethod
    def unpack(cls, data: bytes) -> PartHead:
        """Read one; PayloadError if it has numbers that none has."""
        head = cls(*cls.LAYOUT.unpack(data))
        lowest, highest = EXPONENTS
        if not (
            head.rows
            and head.rank <= MOST_RANK
            and lowest <= head.exponent <= highest
            and (1 if head.rank else 0) <= head.contexts <= min(head.rank, MOST_CONTEXTS)
            and (head.shift <= MOST_SHIFT or head.shift == NO_GAINS)
        ):
            raise _damaged("states impossible numbers")
        return head

    def pack(self) -> bytes:
        """Its bytes."""
        return self.LAYOUT.pack(self.rows, self.rank, self.exponent, self.contexts, self.shift)

    def context_of_each(self) -> Bytes:
        """uint8[rank]: the context of each component's factors."""
        return (np.arange(self.rank) * self.contexts // max(self.rank, 1)).astype(np.uint8)


class LowRankPart(NamedTuple):
    """Some rows, ready to be predicted; left and right are as the kernels want them."""

    left: Numbers | Doubles
    right: Numbers | Doubles
    gains: Floats
    factor: float

    @classmethod
    def of(cls, factors: NDArray[Any], gains: Floats, exponent: int) -> LowRankPart:
        """One of unsigned[rows + columns, rank], as decoded; of 16 bits, rank is even."""
        rows = len(gains)
        narrow = factors.itemsize == 2
        known: Any = factors.view(np.uint32) if narrow else factors.view(np.int32).astype(np.float64)
        columns = len(factors) - rows
        right = np.zeros((known.shape[1], columns + PREDICTED_AT_ONCE), known.dtype)
        right[:, :columns] = known[rows:].T
        return cls(np.ascontiguousarray(known[:rows]), right, gains, 2.0**-exponent)

    def predict(self, before: Any, after: Any, start: int, dtype: str, *, rounded: bool) -> None:
        """Fill after from before: elements as unsigned integers, from number `start` of the part on."""
        columns = self.right.shape[1] - PREDICTED_AT_ONCE
        given = (before, after, start, columns, *self)
        if before.itemsize == 2:
            low_rank.predict(*given, dtype == "F16", rounded)
        else:
            low_rank.predict_wide(*given, rounded)


@dataclass(frozen=True)
class LowRank:
    """A tensor's prediction. Any number of threads may use one.

    Attributes:
        dtype: the target's.
        columns: the elements of a row.
        heads: what is stated of each part, in the order of their rows.
        factor_bytes: what all factors take, coded.
    """

    dtype: str
    columns: int
    heads: tuple[PartHead, ...]
    factor_bytes: int
    _parts: tuple[LowRankPart | None, ...]
    _rounded: bool

    @property
    def nbytes(self) -> int:
        """The memory that the factors take."""
        return sum(part.left.nbytes + part.right.nbytes for part in self._parts if part)

    @property
    def rank(self) -> int:
        """The highest rank of a part."""
        return max(head.rank for head in self.heads)

    @classmethod
    def parse(cls, data: bytes, dtype: str, numel: int) -> LowRank:
        """Read a prediction.

        Args:
            data: all of its bytes.
            dtype: the target's safetensors code.
            numel: how many elements the tensor has.

        Raises:
            PayloadError: the data is no prediction of such a tensor.
        """
        if dtype not in ITEMSIZES:
            raise PayloadError(f"no {dtype} tensor can have a low-rank prediction")
        if len(data) < HEAD.size:
            raise _damaged("is cut short")
        kind, flags, columns, count = HEAD.unpack_from(data)
        if kind != KIND or flags > ROUNDED:
            raise _damaged("is of an unknown kind")
        at, size = HEAD.size, PartHead.LAYOUT.size
        if not columns or not count or count * size > len(data) - at:
            raise _damaged("is cut short")
        heads = tuple(PartHead.unpack(data[at + k * size : at + (k + 1) * size]) for k in range(count))
        if sum(head.rows for head in heads) * columns != numel:
            raise _damaged("is one of another tensor")
        if sum(head.rank * (head.rows + columns) for head in heads) > min(MOST_FACTORS, numel):
            raise _damaged("has too many factors")
        reader = _Reader(np.frombuffer(data, np.uint8)[at + count * size :])
        parts = tuple(_part(head, columns, reader, ITEMSIZES[dtype]) for head in heads)
        if len(reader.rest):
            raise _damaged("is longer than its parts")
        return cls(dtype, columns, heads, len(data), parts, bool(flags & ROUNDED))

    def predict(self, base: Bytes, start: int) -> Bytes:
        """Predict some elements.

        Args:
            base: their bytes in the base, in the target's dtype.
            start: the number of the first one in the tensor.

        Returns:
            as many bytes; the base's own where nothing is predicted.
        """
        size = ITEMSIZES[self.dtype]
        kind = np.dtype(f"u{size}")
        before = base.view(kind) if base.ctypes.data % size == 0 else base.copy().view(kind)
        after, first, stop = np.empty_like(before), 0, start + len(before)
        for head, part in zip(self.heads, self._parts, strict=True):
            end = first + head.rows * self.columns
            low, high = max(first, start), min(end, stop)
            if low < high:
                here = slice(low - start, high - start)
                if part is None:
                    after[here] = before[here]
                else:
                    part.predict(before[here], after[here], low - first, self.dtype, rounded=self._rounded)
            first = end
        return after.view(np.uint8)


class _Reader:
    """Takes sized items off the front of bytes."""

    def __init__(self, data: Bytes) -> None:
        self.rest = data

    def plain(self, size: int) -> Bytes:
        """So many bytes."""
        if size > len(self.rest):
            raise _damaged("is cut short")
        item, self.rest = self.rest[:size], self.rest[size:]
        return item

    def take(self, least_bits: int) -> Bytes:
        """The next item, whose content wants so many bits: less would be room made for next to nothing."""
        size = int.from_bytes(self.plain(4).tobytes(), "little")
        if least_bits > 8 * size:
            raise _damaged("is cut short")
        return self.plain(size)


def _part(head: PartHead, columns: int, reader: _Reader, itemsize: int) -> LowRankPart | None:
    if not head.rank and head.shift == NO_GAINS:
        return None
    kind = np.dtype(f"u{itemsize}")
    width = head.rank + head.rank % 2 if itemsize == 2 else head.rank
    factors = np.zeros((head.rows + columns, width), kind)
    if head.rank:
        shifts = reader.plain(head.rank)
        _decode_factors(reader.take(head.rank * len(factors)), head, shifts, factors)
    gains = np.ones(head.rows, np.float32)
    if head.shift != NO_GAINS:
        numbers = np.empty(head.rows, np.uint32)
        decode_list(reader.take(head.rows), numbers)
        gains[:] = _gains(numbers, head.shift)
    return LowRankPart.of(factors, gains, head.exponent)


def _decode_factors(data: Bytes, head: PartHead, shifts: Bytes, out: NDArray[Any]) -> None:
    frequencies = working_memory.FREQUENCIES.take(head.contexts * TOKENS).reshape(-1, TOKENS)
    slots = working_memory.SLOTS.take(head.contexts << PRECISION)
    words = working_memory.WORDS.take(len(data) // 2 + GUARD)
    members = np.zeros(head.contexts, np.int64)
    if not low_rank.decode_factors(
        data, shifts, head.context_of_each(), members, family(), frequencies, slots, words, head.rows, out
    ):
        raise _damaged("has damaged factors")


def _gains(numbers: NDArray[np.uint32], shift: int) -> Floats:
    """The gains that zigzagged numbers stand for."""
    if (numbers >> np.uint32(GAIN_BITS - shift)).any():
        raise _damaged("has gains out of range")
    signed = (numbers >> np.uint32(1)).astype(np.int64) ^ -(numbers & np.uint32(1)).astype(np.int64)
    return ((1 << 23) + (signed << shift)).astype(np.float32) * np.float32(2.0**-23)


def _damaged(how: str) -> PayloadError:
    return PayloadError(f"a low-rank prediction {how}")
