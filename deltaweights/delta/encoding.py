"""Reads rows of chunks of base and target, and encodes them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import Tensor
from ..match.names import Match
from ..payload import ChunkPlan, CodedChunk, encode_row
from ..storage import Span
from ..workers import Buffers
from .digests import CodedBatch


class ChunkRow(NamedTuple):
    """Chunks ``first`` to ``end - 1`` of a tensor, to be encoded."""

    match: Match
    plan: ChunkPlan
    first: int
    end: int

    @property
    def nbytes(self) -> int:
        """Their length in bytes of the target."""
        return self.plan.length(self.first, self.end)

    @property
    def has_base(self) -> bool:
        """Whether these chunks are coded against the base."""
        return self.plan.has_base(self.first)

    @property
    def base_bytes(self) -> int:
        """Their length in bytes of the base."""
        if not self.match.base or not self.has_base:
            return 0
        return codec.rescale(self.nbytes, self.match.target.dtype, self.match.base.dtype)

    @property
    def base_span(self) -> Span | None:
        """Where they are in the base's files; None for parts of several tensors."""
        if not isinstance(self.match.base, Tensor):
            return None
        dtypes = self.match.target.dtype, self.match.base.dtype
        start, end = self.plan.bounds(self.first, self.end)
        return self.match.base.span(codec.rescale(start, *dtypes), codec.rescale(end, *dtypes))

    @property
    def base_spans(self) -> list[Span]:
        """All places of the base's files that they are compared with."""
        if not self.match.base or not self.has_base:
            return []
        dtypes = self.match.target.dtype, self.match.base.dtype
        start, end = self.plan.bounds(self.first, self.end)
        return self.match.base.spans(codec.rescale(start, *dtypes), codec.rescale(end, *dtypes))


def encode_rows(rows: list[ChunkRow], buffers: Buffers) -> CodedBatch:
    """Read and encode rows of chunks. The arrays of the result come from ``buffers``."""
    target = buffers.take(sum(row.nbytes for row in rows))
    base = buffers.take(sum(row.base_bytes for row in rows))
    chunks: list[CodedChunk] = []
    position = base_position = 0
    for row in rows:
        new = target[position : position + row.nbytes]
        old = base[base_position : base_position + row.base_bytes]
        position, base_position = position + new.size, base_position + old.size
        chunks += _encode_row(row, new, old)
    spans = [(row.base_span, row.base_bytes) for row in rows if row.base_bytes]
    return CodedBatch(chunks, target, base, spans)


def _encode_row(row: ChunkRow, target: NDArray[np.uint8], base: NDArray[np.uint8]) -> list[CodedChunk]:
    """Read a row's bytes of target and base, and encode its chunks. A duplicate's bytes are only read."""
    match, origin = row.match, row.plan.span(row.first)[0]
    dtype, source = match.target.dtype, match.base.dtype if match.base else None
    match.target.read_into(origin, target)
    if match.base and row.has_base:
        match.base.read_into(codec.rescale(origin, dtype, match.base.dtype), base)
    if match.like:
        return [CodedChunk(0, 0, 0, b"", 0)] * (row.end - row.first)
    predict = partial(match.compared, start=origin) if match.prediction else None
    return encode_row(
        target,
        base if row.has_base else None,
        dtype,
        row.plan.chunk_bytes,
        base_dtype=source,
        predict=predict,
    )
