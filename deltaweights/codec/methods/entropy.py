"""Writes and reads runs of tokens as bytes, and provides the working memory (layout: see :mod:`.runs`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import runs
from ..constants import APART, BAD, FIRST, GUARD, MAX_ROWS, WAYS, WORDS_SPARE
from ..kernel_arrays import RunSpace
from ..library import prebuilt
from ..tables import DIRECT_BITS, SCALES, TOKENS, laplace_family

Bytes = NDArray[np.uint8]
Values = NDArray[np.uint32]

_lone_member = np.zeros(1, np.int64)
_LANES = 64  # at most
#: The most bytes of an explicit table: 16 bits, and for each token a step by 16 bit lengths and 3 bits.
_TABLE_BYTES = 2 + (33 + 3) * TOKENS // 8 + 1


@cache
def family() -> NDArray[np.uint32]:
    """The family of distributions, uint32[SCALES, TOKENS], which is faster to read than to compute."""
    library = prebuilt()
    if library is None:
        return laplace_family()
    stored = library.family(SCALES * TOKENS * np.dtype(np.uint32).itemsize)
    return np.frombuffer(stored, np.uint32).reshape(SCALES, TOKENS)


def run_space(count: int, contexts: int, more: int = 0) -> RunSpace:
    """Working memory for runs of at most ``count`` values and ``contexts`` contexts, whose head may follow
    ``more`` other bytes."""
    return RunSpace(
        leading=working_memory.LEADING.take(count),
        keys=working_memory.KEYS.take(count),
        counters=working_memory.COUNTERS.take(WAYS * ((MAX_ROWS << 7) + APART)),
        tables=working_memory.TABLES.take(MAX_ROWS * TOKENS).reshape(MAX_ROWS, TOKENS),
        explicit=working_memory.EXPLICIT.take(MAX_ROWS),
        encoder=working_memory.ENCODER.take(contexts << 8),
        words=working_memory.WORDS.take(3 * count + WORDS_SPARE),
        head=working_memory.HEAD.take(head_bytes(contexts) + more),
        found=np.empty(2, np.int64),
    )


def written(space: RunSpace, end: int) -> bytes:
    """The run that a kernel wrote, with a head of ``end`` bytes."""
    return b"".join([space.head[:end].data, space.words[int(space.found[FIRST]) :].data])


def head_bytes(contexts: int) -> int:
    """The most bytes of a run's head, which is everything before its words."""
    return 2 + contexts * _TABLE_BYTES + 4 * _LANES


def encode_list(values: Values, direct_bits: int = DIRECT_BITS, tail: int = 0) -> bytes:
    """Encode numbers as a run of one context, with the `tail` low bits of each number stored raw."""
    space = run_space(len(values), 1)
    contexts = working_memory.CONTEXTS.take(len(values))
    contexts[:] = 0
    end = runs.encode_run(contexts, values, _lone_member, family(), direct_bits, 32, tail, np.inf, space, 0)
    return written(space, end)


def room_to_read(data: Bytes, contexts: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """(frequencies, words): a thread's working memory for a kernel that reads a run of ``contexts``
    contexts."""
    frequencies = working_memory.FREQUENCIES.take(contexts * TOKENS).reshape(-1, TOKENS)
    return frequencies, working_memory.WORDS.take(len(data) // 2 + GUARD)


def decode_list(
    data: Bytes, out: NDArray[np.unsignedinteger[Any]], direct_bits: int = DIRECT_BITS, tail: int = 0
) -> None:
    """Fill out with the numbers that `encode_list` encoded as data; PayloadError if data is no such list."""
    if not runs.decode_list(data, family(), direct_bits, tail, *room_to_read(data, 1), out):
        raise PayloadError("a list of numbers is damaged")


def decode_lists(data: Bytes, out: NDArray[np.uint32]) -> Bytes:
    """Fill the rows of out (uint32[lists, n]) with the lists at the start of data, each after its length as
    u32. Returns the remaining data. PayloadError if there are no such lists."""
    end = runs.decode_lists(data, family(), *room_to_read(data, 1), out)
    if end == BAD:
        raise PayloadError("a list of numbers is damaged")
    return data[end:]
