"""Rewrites chunks of 32-bit floats without zstd, which the kernels for many chunks (:mod:`.checked`) cannot
read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from ..constants import DELTA, DRIFT, DRIFT_HEAD, HEAD, SPARSE, SPARSE_HEAD, WIDE_PLANES
from .floats import take_section
from .planes import take_without_zstd

Bytes = NDArray[np.uint8]


def without_zstd(method: int, data: Bytes, count: int) -> Bytes | None:
    """The data of a chunk of `count` elements, with its zstd planes converted to stored ones; None if it has
    none, or cannot be read."""
    try:
        found = np.concatenate(list(_parts(method, data, count)))
    except PayloadError:
        return None
    return found if len(found) != len(data) else None


def _parts(method: int, data: Bytes, count: int) -> Iterator[Bytes]:
    """The new data, in parts (layouts: see :mod:`.drift`, :mod:`.sparse`, :mod:`.floats`)."""
    planes, rest = 0, data
    if method == DRIFT and len(rest) >= DRIFT_HEAD:
        method, rest = int(rest[1]), _behind_sections(1, rest[DRIFT_HEAD:])
    if method == SPARSE and len(rest) >= SPARSE_HEAD:
        head, rest = rest[:SPARSE_HEAD], rest[SPARSE_HEAD:]
        yield data[: len(data) - len(rest)]
        marks, data = take_without_zstd(rest, count)
        yield marks
        rest = _behind_sections(2 if head[3:].any() else 0, data)
        method = DELTA if head[2] else method
    if method == DELTA and len(rest) >= HEAD:
        rest, planes = _behind_sections(2 if rest[0] else 1, rest[HEAD:]), WIDE_PLANES
    yield data[: len(data) - len(rest)]
    for _ in range(planes):
        plane, rest = take_without_zstd(rest, count)
        yield plane
    yield rest


def _behind_sections(sections: int, data: Bytes) -> Bytes:
    for _ in range(sections):
        _, data = take_section(data)
    return data
