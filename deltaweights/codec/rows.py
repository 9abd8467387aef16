"""Compares or decodes adjacent chunks in one call, including their checksums."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..dtypes import DTYPES
from . import working_memory
from .compiled import Held, rows
from .constants import (
    AFTER,
    BEFORE,
    GUARD,
    LENGTH,
    METHOD,
    MOST_SHIFTS_LOG,
    RECORD_BYTES,
    SPARE,
    SPARSE_SHARE,
    SUBSET_SPARE,
    SUBSET_UNIT,
    UNIT,
    WIDE_PLANES,
    XXH3_SHORT,
)
from .kernel_arrays import RowSpace
from .methods import entropy
from .methods.chunk import MAX_CHUNK, check_arrays
from .methods.floats import aligned
from .methods.ulp import FORMATS
from .methods.without_zstd import without_zstd
from .tables import PRECISION, TOKENS

_ELEMENT_BYTES = {code: dtype.itemsize or 1 for code, dtype in DTYPES.items()}

#: One chunk's record: its method, its data's length in bytes, XXH3-64 of its base bytes (0 if there are none)
#: and of its target bytes.
RECORD = np.dtype(
    {
        "names": ["method", "reserved", "length", "base", "target"],
        "formats": ["u1", ("u1", 3), "<u4", "<u8", "<u8"],
        "offsets": [METHOD, METHOD + 1, LENGTH, BEFORE, AFTER],
        "itemsize": RECORD_BYTES,
    }
)


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH3-64 of the bytes. It finds damage early; the SHA-256 of the whole file is the guarantee."""
    return xxhash.xxh3_64_intdigest(data.data)


def element_bytes(dtype: str, nbytes: int) -> int:
    """Bytes of one element of ``dtype``; 1 if that is unknown, smaller, or does not divide ``nbytes``."""
    size = _ELEMENT_BYTES.get(dtype, 1)
    return size if nbytes % size == 0 else 1


class Compared(NamedTuple):
    """For each chunk: :func:`checksum` of the base's bytes and the target's (uint64[m]), and the number of
    elements that differ (int64[m])."""

    base: NDArray[np.uint64]
    target: NDArray[np.uint64]
    changed: NDArray[np.int64]


def compare_row(base: NDArray[np.uint8], target: NDArray[np.uint8], dtype: str, chunk_bytes: int) -> Compared:
    """Compare adjacent chunks in one call.

    Args:
        base, target: their bytes, of the same length.
        dtype: both sides' dtype. Bytes are compared if elements do not fill bytes or chunks.
        chunk_bytes: the length of all chunks except the last.

    Raises:
        ValueError: base and target differ in length.
    """
    check_arrays(base, target)
    if len(base) != len(target):
        raise ValueError(f"base has {len(base)} bytes, target {len(target)}")
    word = np.dtype(f"u{element_bytes(dtype, math.gcd(target.size, chunk_bytes))}")
    old, new = (aligned(side, word) for side in (base, target))
    found = np.empty((-(-target.size // chunk_bytes), 3), np.int64)
    rows.compare(base, old, target, new, chunk_bytes // word.itemsize, found)
    for index in range(0 if chunk_bytes <= XXH3_SHORT else max(len(found) - 1, 0), len(found)):
        chunk = slice(index * chunk_bytes, (index + 1) * chunk_bytes)
        if len(target[chunk]) <= XXH3_SHORT:  # left out by the kernel
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
    """Decode adjacent chunks in one call and compare their checksums, where possible: for floats of at most
    32 bits.

    Args:
        records: the chunks' (:data:`RECORD`, [m]).
        coded: their data, one after the other.
        base: the base's bytes, of the same dtype and length as ``out``, but a separate array.
        chunk_bytes: the length of all chunks except the last.

    Returns:
        For each chunk, whether it is done: base and result have the right checksums. Other chunks must be
        decoded in another way, which may succeed.

    Raises:
        ValueError: base and out, or out and the number of chunks, do not match, or arrays are not as
            described.
    """
    return decode_table(records.view(np.uint8), coded, base, dtype, out, chunk_bytes)[0]


def decode_table(
    table: NDArray[np.uint8],
    coded: NDArray[np.uint8],
    base: NDArray[np.uint8],
    dtype: str,
    out: NDArray[np.uint8],
    chunk_bytes: int,
) -> tuple[NDArray[np.bool_], bool]:
    """:func:`decode_row` with the records as bytes. Also returns whether all chunks are done and all data was
    used."""
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
    kernel = rows.decode_wide if form.itemsize == 4 else rows.decode
    is_whole = kernel(
        table, coded, count, base, before, out, result, form.shift, form.mask,
        entropy.family(), _row_space(longest // form.itemsize, form.dtype), is_right,
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
    """Decode the chunks of a row of 32-bit elements that are left because they have zstd planes. Returns
    whether all chunks are done and all data was used."""
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
    """This thread's working memory for chunks of at most ``count`` elements."""
    kept: tuple[Held[RowSpace], int] | None = _kept.__dict__.get(dtype.str)
    if kept and kept[1] >= count:
        return kept[0]  # making one takes as long as decoding a small tensor
    segments, is_wide = count // UNIT + 1, dtype.itemsize == 4
    space = Held(
        RowSpace(
            frequencies=working_memory.ROW_FREQUENCIES.take(64 * TOKENS).reshape(-1, TOKENS),
            slots=working_memory.SLOTS.take(64 << PRECISION),
            words=working_memory.WORDS.take(count * dtype.itemsize // 2 + GUARD),
            layout=np.empty(4, np.int64),
            planes=working_memory.ROW_PLANES.take(is_wide * WIDE_PLANES * count + SPARE),
            starts=np.zeros(8, np.int64),
            scales=working_memory.SCALES.take(segments),
            above=working_memory.ABOVE.take(segments),
            marks=working_memory.MARKS.take(count // SUBSET_UNIT // 8 + 1),
            active=working_memory.ACTIVE.take(-(-count // SUBSET_UNIT)),
            places=working_memory.ROW_PLACES.take(count // SPARSE_SHARE),
            values=working_memory.ROW_VALUES.take(count // SPARSE_SHARE),
            chosen=working_memory.CHOSEN.take(count + SUBSET_SPARE, dtype),
            changed=working_memory.CHANGED.take(count + SUBSET_SPARE, dtype),
            shifts=working_memory.SHIFTS.take(is_wide << MOST_SHIFTS_LOG),
        )
    )
    if count * dtype.itemsize <= working_memory.KEPT // 2:  # the longest array is little longer
        _kept.__dict__[dtype.str] = space, count
    return space
