"""Writes what :mod:`.prediction` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import runs
from ..constants import TWEAK
from ..kernel_arrays import RunSpace
from ..methods.entropy import encode_list, family, run_space, written
from ..tables import DIRECT_BITS, PRECISION
from .prediction import HEAD, KIND, MOST_CONTEXTS, NO_GAINS, ROUNDED, PartHead

__all__ = ["CodedPart", "code_part", "joined", "nothing_for"]

Integers = NDArray[np.int64]


class CodedPart(NamedTuple):
    """Some rows of a prediction."""

    head: PartHead
    data: bytes

    def is_dense(self, columns: int) -> bool:
        """Whether each factor and each gain takes a bit at least: readers make no room for less."""
        at = self.head.rank  # of shifts
        for count in (self.head.rank * (self.head.rows + columns), self.head.rows):
            if at >= len(self.data):
                return True
            size = int.from_bytes(self.data[at : at + 4], "little")
            if count > 8 * size:
                return False
            at += 4 + size
        return True


def nothing_for(rows: int) -> CodedPart:
    """Rows to which nothing is added."""
    return CodedPart(PartHead(rows, 0, 0, 0, NO_GAINS), b"")


def code_part(
    left: Integers,
    right: Integers,
    exponent: int,
    shifts: Integers | None = None,
    gains: tuple[Integers, int] | None = None,
) -> CodedPart:
    """Code the factors of some rows and of the columns.

    Args:
        left, right: integers, [rows, rank] and [columns, rank], before they are shifted.
        exponent: products are divided by 2 to this power.
        shifts: int[2, rank], by which left and right are shifted; by nothing if None.
        gains: (integers [rows], shift): rows of the base are multiplied by 1 + gain * 2**(shift - 23).
    """
    rows, rank = left.shape
    data, contexts = b"", 0
    if rank:
        both = np.zeros((2, rank), np.int64) if shifts is None else shifts
        run, contexts = _shortest_run(np.concatenate([left, right]))
        data = (both[0] | both[1] << 4).astype(np.uint8).tobytes() + _sized(run)
    if gains is not None:
        data += _sized(encode_list(_zigzag(gains[0])))
    return CodedPart(PartHead(rows, rank, exponent, contexts, gains[1] if gains else NO_GAINS), data)


def joined(columns: int, parts: Sequence[CodedPart], *, rounded: bool) -> bytes:
    """The prediction of which these are the parts, in the order of their rows."""
    head = HEAD.pack(KIND, ROUNDED if rounded else 0, columns, len(parts))
    return b"".join([head, *(part.head.pack() for part in parts), *(part.data for part in parts)])


def _shortest_run(numbers: Integers) -> tuple[bytes, int]:
    """A run of factors, and how many contexts it has."""
    rank, values = numbers.shape[1], _zigzag(numbers).reshape(-1)
    found = []
    for contexts in sorted({min(rank, most) for most in (1, 4, 16, MOST_CONTEXTS)}):
        of_each = PartHead(1, rank, 0, contexts, NO_GAINS).context_of_each()
        here = np.ascontiguousarray(np.broadcast_to(of_each, numbers.shape)).reshape(-1)
        space, members = run_space(len(values), contexts), np.zeros(contexts, np.int64)
        end = runs.encode_run(here, values, members, family(), DIRECT_BITS, 32, 0, np.inf, space, 0)
        if _is_readable(space, contexts):
            found.append((written(space, end), contexts))
    return min(found, key=lambda one: len(one[0]))


def _is_readable(space: RunSpace, contexts: int) -> bool:
    """Whether the run that was written has no table of another member of the family than member 0, which is
    what readers of factors expect. A run of one context never has one."""
    choice = PRECISION - 8 - (int(space.head[0]) & 7)
    is_explicit = space.explicit[choice * contexts : (choice + 1) * contexts]
    return bool(space.found[TWEAK] == 0 or is_explicit.all())


def _zigzag(numbers: Integers) -> NDArray[np.uint32]:
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers).astype(np.uint32)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data
