"""A payload: how one tensor is cut into chunks, and the table of records that describes them.

::

    record 0 | record 1 | … | data of chunk 0 | data of chunk 1 | …
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import PayloadError
from . import coder
from .chunk import MAX_CHUNK, check_arrays, decode_chunk, encode_chunk
from .compiled import Held, checked
from .constants import (
    GUARD,
    MOST_SHIFTS_LOG,
    SPARE,
    SPARSE_SHARE,
    SUBSET_SPARE,
    SUBSET_UNIT,
    UNIT,
    WIDE_PLANES,
    XXH3_SHORT,
)
from .floats import aligned
from .generic import ITEMSIZES
from .plain import without_zstd
from .scratch import KEPT, scratch
from .spaces import RowSpace
from .tables import PRECISION, TOKENS
from .ulp import FORMATS

_ELEMENT_BYTES = ITEMSIZES | {dtype: form.itemsize for dtype, form in FORMATS.items()} | {"C64": 8}

#: Bytes of target tensor in a chunk. Small enough that a chunk, its base and the work on them stay in a
#: core's cache and that a sample of chunks is read in seconds; large enough that the 24-byte record is
#: nothing.
CHUNK_BYTES = 1 << 20

#: One chunk's record: its method, its data's length in bytes, XXH3-64 of its base bytes (0 where it
#: has none) and of its target bytes.
RECORD = np.dtype(
    [("method", "u1"), ("reserved", "u1", 3), ("length", "<u4"), ("base", "<u8"), ("target", "<u8")]
)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How a tensor of ``nbytes`` is cut: its first ``shared`` bytes have a base, the rest has none, and
    no chunk is longer than ``chunk_bytes`` or lies on both sides."""

    nbytes: int
    shared: int
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return self.shared_count - (self.shared - self.nbytes) // self.chunk_bytes

    @property
    def shared_count(self) -> int:
        """How many chunks, the first ones, have a base."""
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
        """First byte and end of chunks ``first`` to ``end - 1``, of which there must be some."""
        return self.span(first)[0], self.span(end - 1)[1]

    def length(self, first: int, end: int) -> int:
        """How many bytes these are."""
        start, stop = self.bounds(first, end)
        return stop - start

    def rows(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """All chunks in order, as rows (first, end) of neighbours that have together at most ``nbytes``, or
        are a single chunk, and that all have a base or all have none."""
        most = max(1, nbytes // self.chunk_bytes)
        for begin, stop in ((0, self.shared_count), (self.shared_count, self.count)):
            for first in range(begin, stop, most):
                yield first, min(first + most, stop)

    def index_at(self, position: int) -> int:
        """Which chunk holds the tensor's byte ``position``."""
        if position < self.shared:
            return position // self.chunk_bytes
        return self.shared_count + (position - self.shared) // self.chunk_bytes

    def has_base(self, index: int) -> bool:
        """Whether chunk ``index`` is coded against the base."""
        return index < self.shared_count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self.span(index) for index in range(self.count))


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH3-64 of the bytes: finds damage early. SHA-256 of the whole file is the guarantee."""
    return xxhash.xxh3_64_intdigest(data.data)


def element_bytes(dtype: str, nbytes: int) -> int:
    """Bytes of one element of ``dtype``; 1 where that is unknown, less, or does not divide ``nbytes``."""
    size = _ELEMENT_BYTES.get(dtype, 1)
    return size if nbytes % size == 0 else 1


class Compared(NamedTuple):
    """Of each chunk: :func:`checksum` of the base's bytes and the target's (uint64[m]), and how many elements
    differ (int64[m])."""

    base: NDArray[np.uint64]
    target: NDArray[np.uint64]
    changed: NDArray[np.int64]


def compare_row(base: NDArray[np.uint8], target: NDArray[np.uint8], dtype: str, chunk_bytes: int) -> Compared:
    """Compare chunks next to each other, in one call.

    Args:
        base, target: their bytes, of one length.
        dtype: both sides' dtype. Bytes are compared where elements do not fill bytes, or chunks.
        chunk_bytes: how long all chunks but the last are.

    Raises:
        ValueError: base and target do not fit each other.
    """
    check_arrays(base, target)
    if len(base) != len(target):
        raise ValueError(f"base has {len(base)} bytes, target {len(target)}")
    word = np.dtype(f"u{element_bytes(dtype, math.gcd(target.size, chunk_bytes))}")
    old, new = (aligned(side, word) for side in (base, target))
    found = np.empty((-(-target.size // chunk_bytes), 3), np.int64)
    checked.compare(base, old, target, new, chunk_bytes // word.itemsize, found)
    for index in range(0 if chunk_bytes <= XXH3_SHORT else max(len(found) - 1, 0), len(found)):
        chunk = slice(index * chunk_bytes, (index + 1) * chunk_bytes)
        if len(target[chunk]) <= XXH3_SHORT:  # which the kernel leaves
            found.view(np.uint64)[index, :2] = checksum(base[chunk]), checksum(target[chunk])
    return Compared(found[:, 0].view(np.uint64), found[:, 1].view(np.uint64), found[:, 2])


def decode_row(
    records: NDArray[np.void],
    coded: NDArray[np.uint8],
    base: NDArray[np.uint8],
    dtype: str,
    out: NDArray[np.uint8],
    chunk_bytes: int,
) -> NDArray[np.bool_]:
    """Decode chunks next to each other, with their checksums, in one call, as far as that is possible: for
    floats of at most 32 bits.

    Args:
        records: the chunks' (:data:`RECORD`, [m]).
        coded: their data, one behind the other.
        base: the base's bytes, of the same dtype and length as ``out``, which is another array.
        chunk_bytes: how long all chunks but the last are.

    Returns:
        For each chunk, whether it is done: base and result have their checksums. What is not has to be
        decoded otherwise, which may succeed.

    Raises:
        ValueError: base and out, or out and the number of chunks, do not fit each other, or arrays are not as
            said.
    """
    return _decode_row(records.view(np.uint8), coded, base, dtype, out, chunk_bytes)[0]


def _decode_row(
    table: NDArray[np.uint8],
    coded: NDArray[np.uint8],
    base: NDArray[np.uint8],
    dtype: str,
    out: NDArray[np.uint8],
    chunk_bytes: int,
) -> tuple[NDArray[np.bool_], bool]:
    """:func:`decode_row`, the records being bytes; and whether all is done and was needed."""
    check_arrays(base, out, written=True)
    chunks = len(table) // RECORD.itemsize
    if len(base) != len(out) or not 0 < len(out) <= chunks * chunk_bytes:
        raise ValueError(f"{chunks} chunks of {len(out)} bytes, a base of {len(base)}")
    form, longest = FORMATS.get(dtype), min(len(out), chunk_bytes)
    if form is None or form.itemsize > 4 or longest > MAX_CHUNK:
        return np.zeros(chunks, np.bool_), False
    if len(out) % form.itemsize or chunk_bytes % form.itemsize:
        return np.zeros(chunks, np.bool_), False
    before, result = base.view(form.dtype), out.view(form.dtype)
    if not (before.flags.aligned and result.flags.aligned):
        return np.zeros(chunks, np.bool_), False
    is_right, count = np.empty(chunks, np.bool_), chunk_bytes // form.itemsize
    kernel = checked.decode_wide if form.itemsize == 4 else checked.decode
    is_whole = kernel(
        table, coded, count, base, before, out, result, form.shift, form.mask,
        coder.family(), _row_space(longest // form.itemsize, form.dtype), is_right,
    )  # fmt: skip
    if not is_whole and form.itemsize == 4:
        is_whole = _decode_without_zstd(table, coded, base, dtype, out, chunk_bytes, is_right)
    return is_right, is_whole


def _decode_without_zstd(
    table: NDArray[np.uint8],
    coded: NDArray[np.uint8],
    base: NDArray[np.uint8],
    dtype: str,
    out: NDArray[np.uint8],
    chunk_bytes: int,
    is_right: NDArray[np.bool_],
) -> bool:
    """Decode those chunks of a row of 32-bit elements that are left because planes are by zstd. Returns
    whether all of the row is done and was needed."""
    records = table.view(RECORD)
    ends = np.cumsum(records["length"], dtype=np.int64).tolist()
    for index in np.flatnonzero(~is_right).tolist():
        record, end = records[index : index + 1].copy(), ends[index]
        data = coded[end - int(record["length"][0]) : end]
        plain = without_zstd(int(record["method"][0]), data, chunk_bytes // 4)
        if plain is not None:
            chunk = slice(index * chunk_bytes, (index + 1) * chunk_bytes)
            record["length"] = len(plain)
            is_right[index] = decode_row(record, plain, base[chunk], dtype, out[chunk], chunk_bytes)[0]
    return bool(is_right.all()) and ends[-1] == len(coded)


_kept = threading.local()


def _row_space(count: int, dtype: np.dtype[Any]) -> Held[RowSpace]:
    """For chunks of at most so many elements: this thread's working memory."""
    kept: tuple[Held[RowSpace], int] | None = _kept.__dict__.get(dtype.str)
    if kept and kept[1] >= count:
        return kept[0]  # to make it takes as long as to decode a small tensor
    segments, is_wide = count // UNIT + 1, dtype.itemsize == 4
    space = Held(
        RowSpace(
            frequencies=scratch("row frequencies", 64 * TOKENS, np.uint32).reshape(-1, TOKENS),
            slots=scratch("slots", 64 << PRECISION, np.uint32),
            words=scratch("words", count * dtype.itemsize // 2 + GUARD, np.uint16),
            layout=np.empty(4, np.int64),
            planes=scratch("row planes", is_wide * WIDE_PLANES * count + SPARE, np.uint8),
            starts=np.zeros(8, np.int64),
            scales=scratch("scales", segments, np.int64),
            above=scratch("above", segments, np.uint32),
            marks=scratch("marks", count // SUBSET_UNIT // 8 + 1, np.uint8),
            active=scratch("active", -(-count // SUBSET_UNIT), np.uint8),
            places=scratch("places", count // SPARSE_SHARE, np.uint32),
            values=scratch("values", count // SPARSE_SHARE, np.uint32),
            chosen=scratch("chosen", count + SUBSET_SPARE, dtype),
            changed=scratch("changed", count + SUBSET_SPARE, dtype),
            shifts=scratch("shifts", is_wide << MOST_SHIFTS_LOG, np.uint32),
        )
    )
    if count * dtype.itemsize <= KEPT // 2:  # the longest is little longer
        _kept.__dict__[dtype.str] = space, count
    return space


def check_records(
    table: bytes, plan: ChunkPlan, payload_bytes: int
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """A payload's chunk records, and where each chunk's data starts in the payload.

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
        raise PayloadError("A payload's chunk records hold values where there must be none")
    ends = len(table) + np.cumsum(records["length"], dtype=np.int64)
    if (int(ends[-1]) if ends.size else 0) != payload_bytes:
        raise PayloadError("A payload's chunk lengths do not add up to its size")
    return records, ends - records["length"]


def encode(
    base: NDArray[np.uint8] | bytes | None,
    target: NDArray[np.uint8] | bytes,
    dtype: str,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> bytes:
    """Encode a whole tensor.

    Args:
        base: the base's bytes (uint8 array or any buffer), of the same length and dtype as ``target``;
            None codes the target alone.
        target: the tensor's bytes, little-endian, row-major.
        dtype: its safetensors dtype code.

    Returns:
        The payload.

    Raises:
        ValueError: base and target differ in length.
    """
    new = np.frombuffer(target, np.uint8)
    old = None if base is None else np.frombuffer(base, np.uint8)
    if old is not None and old.size != new.size:
        raise ValueError(f"base has {old.size} bytes, target {new.size}")
    plan = ChunkPlan(new.size, 0 if old is None else new.size, chunk_bytes)
    records, chunks = np.zeros(plan.count, RECORD), []
    compared = None if old is None else compare_row(old, new, dtype, chunk_bytes)
    for index, (start, end) in enumerate(plan):
        if compared is None or old is None:
            method, data = encode_chunk(None, new[start:end], dtype)
            base_sum, target_sum = 0, checksum(new[start:end])
        else:
            base_sum, target_sum, changed = (int(column[index]) for column in compared)
            method, data = encode_chunk(old[start:end], new[start:end], dtype, changed=changed)
        records[index] = method, 0, len(data), base_sum, target_sum
        chunks.append(data)
    return records.tobytes() + b"".join(chunks)


def decode(
    base: NDArray[np.uint8] | bytes | None,
    payload: bytes,
    dtype: str,
    out: NDArray[np.uint8] | None = None,
    *,
    nbytes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> NDArray[np.uint8]:
    """Decode what :func:`encode` returned; the inverse in every bit.

    Args:
        base: the same base bytes, or None if there were none.
        payload: the payload.
        dtype: the tensor's safetensors dtype code.
        out: uint8, 1-D, contiguous, of the tensor's length; allocated if None, and then ``nbytes``
            says how long where there is no base.

    Returns:
        ``out``, filled.

    Raises:
        PayloadError: the payload is damaged, or the base is not the one that it was encoded against.
        ValueError: the tensor's length is not known, or the base's is another.
    """
    old = None if base is None else np.frombuffer(base, np.uint8)
    if out is None:
        if nbytes is None and old is None:
            raise ValueError("pass out= or nbytes= where there is no base")
        out = np.empty(old.size if nbytes is None and old is not None else nbytes, np.uint8)  # type: ignore[arg-type]
    if old is not None and old.size != out.size:
        raise ValueError(f"base has {old.size} bytes, target {out.size}")
    plan = ChunkPlan(out.size, 0 if old is None else out.size, chunk_bytes)
    data, is_done = np.frombuffer(payload, np.uint8), np.zeros(plan.count, np.bool_)
    table_bytes = plan.count * RECORD.itemsize
    table, coded = data[:table_bytes], data[table_bytes:]
    is_there = plan.count > 0 and len(table) == table_bytes
    if is_there and old is not None and not np.may_share_memory(old, out):
        is_done, is_whole = _decode_row(table, coded, old, dtype, out, chunk_bytes)
        if is_whole:
            return out
    records, starts = check_records(table.tobytes(), plan, len(payload))
    for index in np.flatnonzero(~is_done):
        start, end = plan.span(int(index))
        reference, position = None if old is None else old[start:end], int(starts[index])
        part = data[position : position + int(records["length"][index])]
        _decode_checked(records[index], part, reference, dtype, out[start:end], f"Bytes {start} to {end}")
    return out


def _decode_checked(
    record: np.void,
    data: NDArray[np.uint8],
    base: NDArray[np.uint8] | None,
    dtype: str,
    out: NDArray[np.uint8],
    what: str,
) -> None:
    if base is not None and checksum(base) != int(record["base"]):
        raise PayloadError(f"{what} of the base are not those it was coded against")
    decode_chunk(int(record["method"]), data, base, dtype, out, follows=True)
    if checksum(out) != int(record["target"]):
        raise PayloadError(f"{what} do not decode to what was encoded")
