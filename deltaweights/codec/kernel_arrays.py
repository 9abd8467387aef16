"""What kernels take together: arrays to read, and working memory of this thread's to fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Numbers = NDArray[np.uint32]
Longs = NDArray[np.int64]
Moves = NDArray[np.int32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Elements = NDArray[Any]


class RunSpace(NamedTuple):
    """To write runs of n values in (see :func:`.methods.entropy.run_space`)."""

    leading: Numbers  # [n]: values without their tails
    keys: Words  # [n]: context and token
    counters: Numbers
    tables: Numbers  # [MAX_ROWS, TOKENS]: counts, then weights and frequencies of two choices
    explicit: Bytes  # which tables are, of two choices
    encoder: Numbers  # frequency and start of each key
    words: Words  # filled from its end, with WORDS_SPARE more than 3 a value
    head: Bytes  # all that stands in front of the words
    found: Longs  # [2]: the tweak at TWEAK, the first word at FIRST


class ChunkSpace(NamedTuple):
    """To code a chunk of n elements against its base in."""

    some: Elements  # of the base and of the target, a sample: MAX_SAMPLE elements, or n where that is less
    there: Elements
    values: Numbers  # [n]: distances
    contexts: Bytes  # [n]
    planes: Bytes  # [0 or 3 or 7, n + SPARE]
    sizes: Longs  # [7], zeros before: how much of each plane is filled
    sums: Floats  # [n // UNIT + 1]
    scales: Longs  # one a segment
    above: Numbers  # one a segment
    one_context: Bytes  # zeros, one a segment
    run: RunSpace


class OpenDelta(NamedTuple):
    """A delta's parts, and what it is decoded in."""

    data: Bytes  # all of the run
    listed: Bytes  # the list of scales, read only if there are segments
    shift: int  # where the exponent is: (bits >> shift) & mask
    mask: int
    wide: bool  # whether elements have 32 bits or more
    ahead: int  # how many elements further on in memory the base of the next chunk is; 0 where none is
    family: Numbers
    layout: Longs  # [4]: log2 of the segment length, context step, lowest context, tables
    base_scale: int
    tweak: int
    planes: Bytes  # one behind the other, plane p from starts[p] to starts[p + 1]; SPARE more
    starts: Longs  # [8]
    scales: Longs  # one a segment, working memory, like all below
    above: Numbers  # one a segment
    slots: Numbers  # tables << PRECISION
    frequencies: Numbers  # [tables, TOKENS]
    words: Words  # enough for the longer of data and listed, with GUARD more


class RowSpace(NamedTuple):
    """To decode chunks of n elements, at most, in (see :mod:`.kernels.rows`)."""

    frequencies: Numbers  # [64, TOKENS]
    slots: Numbers  # 64 << PRECISION
    words: Words  # for data as long as a chunk, with GUARD more
    layout: Longs  # [4]
    planes: Bytes  # [WIDE_PLANES * n + SPARE] where elements have 32 bits, else none: SPARE
    starts: Longs  # [8], zeros
    scales: Longs  # [n // UNIT + 1], like above
    above: Numbers
    marks: Bytes  # a bit for each of the active
    active: Bytes  # [-(-n // SUBSET_UNIT)]
    places: Numbers  # [n // SPARSE_SHARE], like values
    values: Numbers
    chosen: Elements  # [n + SUBSET_SPARE], like changed
    changed: Elements
    shifts: Numbers  # [1 << MOST_SHIFTS_LOG] where elements have 32 bits, else none
