"""How one tensor is cut into chunks, and the table of records that describes them.

::

    record 0 | record 1 | … | data of chunk 0 | data of chunk 1 | …
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codec import RECORD
from ..errors import PayloadError

#: Bytes of target tensor in a chunk. Small enough that a chunk, its base and the working memory fit a core's
#: cache, and that a sample of chunks is read in seconds; large enough that the 24-byte record is negligible.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How a tensor of ``nbytes`` is cut into chunks of at most ``chunk_bytes``. The first ``shared`` bytes
    have a base, the rest has none, and no chunk crosses that border."""

    nbytes: int
    shared: int
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """The number of chunks."""
        return self.shared_count - (self.shared - self.nbytes) // self.chunk_bytes

    @property
    def shared_count(self) -> int:
        """The number of chunks with a base, which come first."""
        return -(-self.shared // self.chunk_bytes)

    def span(self, index: int) -> tuple[int, int]:
        """First byte and end of chunk ``index`` in the tensor."""
        if index < self.shared_count:
            start, end = index * self.chunk_bytes, self.shared
        else:
            start = self.shared + (index - self.shared_count) * self.chunk_bytes
            end = self.nbytes
        return start, min(start + self.chunk_bytes, end)

    def bounds(self, first: int, end: int) -> tuple[int, int]:
        """First byte and end of chunks ``first`` to ``end - 1``, at least one."""
        return self.span(first)[0], self.span(end - 1)[1]

    def length(self, first: int, end: int) -> int:
        """The bytes in chunks ``first`` to ``end - 1``."""
        start, stop = self.bounds(first, end)
        return stop - start

    def rows(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """All chunks in order, as rows (first, end) of neighbors. A row has at most ``nbytes`` bytes or a
        single chunk, and its chunks all have a base or all have none."""
        most = max(1, nbytes // self.chunk_bytes)
        for begin, stop in ((0, self.shared_count), (self.shared_count, self.count)):
            for first in range(begin, stop, most):
                yield first, min(first + most, stop)

    def index_at(self, position: int) -> int:
        """The index of the chunk that holds the tensor's byte ``position``."""
        if position < self.shared:
            return position // self.chunk_bytes
        return self.shared_count + (position - self.shared) // self.chunk_bytes

    def has_base(self, index: int) -> bool:
        """Whether chunk ``index`` is coded against the base."""
        return index < self.shared_count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self.span(index) for index in range(self.count))


def check_records(
    table: bytes, plan: ChunkPlan, payload_bytes: int
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Check a payload's chunk records. Returns them, and the start of each chunk's data in the payload.

    Args:
        table: the payload's first ``plan.count * RECORD.itemsize`` bytes.
        payload_bytes: the whole payload's length.

    Raises:
        PayloadError: the lengths do not add up to the payload.
    """
    if len(table) != plan.count * RECORD.itemsize:
        raise PayloadError("A payload is too short for its chunk records")
    records = np.frombuffer(table, RECORD)
    if records["reserved"].any():
        raise PayloadError("A payload's chunk records hold values in a field that must be zero")
    ends = len(table) + np.cumsum(records["length"], dtype=np.int64)
    if (int(ends[-1]) if ends.size else 0) != payload_bytes:
        raise PayloadError("A payload's chunk lengths do not add up to its size")
    return records, ends - records["length"]
