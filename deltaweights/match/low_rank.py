"""Finds what merged adapters added to a tensor: a prediction of low rank, where it pays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Gathered
from ..codec import Effort, LowRank, low_rank_predictor, seal_prediction
from ..codec.low_rank.search import find_low_rank
from ..errors import PayloadError
from .names import FoundPrediction, Match

#: The float dtypes that adapters are merged in.
_DTYPES = ("BF16", "F16", "F32")


#: A search takes about so many times the bytes of the largest matrix, and no more than the bound.
_SEARCH_TIMES, _SEARCH_BYTES = 6, 288 << 20


def search_bytes(match: Match) -> int:
    """The memory that :func:`with_low_rank` takes at most, about."""
    if not _may_have_low_rank(match):
        return 0
    *_, high, columns = match.target.info.shape
    matrix = high * columns * match.target.nbytes // match.target.info.numel
    return min(_SEARCH_TIMES * matrix, _SEARCH_BYTES)


def with_low_rank(match: Match, effort: Effort) -> Match:
    """The match, with a prediction if the difference from its base has a low rank that pays.

    Reads both tensors several times, unless a small sample shows that there is nothing to find.

    Args:
        effort: as for :func:`deltaweights.codec.low_rank.search.find_low_rank`.
    """
    if not _may_have_low_rank(match):
        return match
    *_, columns = match.target.info.shape
    row = columns * match.target.nbytes // match.target.info.numel

    def read_target(first: int, last: int) -> NDArray[np.uint8]:
        return match.read(first * row, last * row)

    def read_base(first: int, last: int) -> NDArray[np.uint8]:
        return match.compared(match.read_base(first * row, last * row), first * row)

    rows = match.shared_bytes // row
    heights, dtype = list(_heights(match, rows, columns)), match.target.dtype
    data = find_low_rank(read_target, read_base, (rows, columns), dtype, effort, heights)
    if data is None:
        return match
    assert match.base
    try:
        found = LowRank.parse(data, match.target.dtype, rows * columns)
    except PayloadError:  # more factors than readers make room for, or next to nothing in them
        return match
    predictor = low_rank_predictor(found, match.base.dtype)
    return replace(
        match, prediction=FoundPrediction("low_rank", seal_prediction(data), predictor, found.rank)
    )


def _may_have_low_rank(match: Match) -> bool:
    new = match.target
    if not match.base or match.like or match.prediction or not match.shared_bytes:
        return False
    if new.dtype not in _DTYPES or len(new.info.shape) < 2:
        return False
    row = new.nbytes // new.info.shape[0]  # a resized tensor shares rows by its first dimension
    return match.shared_bytes % row == 0


def _heights(match: Match, rows: int, columns: int) -> Iterator[int]:
    """The rows of each matrix that may have been merged by itself: a stack's, and those of a fused tensor."""
    if isinstance(match.base, Gathered):
        groups = match.base.groups
        counts = [part.count * group.repeats for group in groups for part in group.parts]
        is_apart = all(len(group.parts) == 1 or group.repeats == 1 for group in groups)
        if is_apart and all(count % columns == 0 for count in counts):
            yield from (count // columns for count in counts)
            return
    high = match.target.info.shape[-2]
    yield from [high] * (rows // high)
    if rows % high:
        yield rows % high
