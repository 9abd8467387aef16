"""Codes chunks of floats, with a base or without: assembles the kernels' output to payloads.

A delta, little-endian:

    u8      log2 of the segment length, 0 = one scale for all
    u8      context step: contexts are 1 << step half octaves wide
    u8      number of contexts
    i16     lowest context
    i16     base scale
    i8      tweak: number of half octaves by which the members of the family are shifted
    u32, list    one number a segment: its scale above the base scale (only with segments)
    u32, run     the values (the u32 length only for elements of 32 and 64 bits)
    planes       three for elements of 32 bits, seven for 64

A standalone chunk:

    u32, run     the leading bytes
    planes       itemsize - 1

All functions take and return uint8 arrays whose length is a multiple of the format's item size.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import Held, difference, standalone
from ..constants import (
    BAD,
    BAD_HEAD,
    BAD_REST,
    BAD_SCALES,
    FINE,
    HEAD,
    LOG_SEGMENT,
    MAX_SAMPLE,
    MAX_TABLES,
    SAMPLED,
    SPARE,
    TABLES,
    UNIT,
    WIDE_PLANES,
)
from ..kernel_arrays import ChunkSpace, OpenDelta
from ..tables import BYTE_BITS, PRECISION
from . import entropy
from .planes import get_planes, put_plane
from .ulp import FloatFormat

Bytes = NDArray[np.uint8]
_HEAD = struct.Struct("<BBBhhb")
_WRONG = {
    BAD_SCALES: "a list of numbers is damaged",
    BAD_HEAD: "the head of a run of tokens is damaged",
    BAD_REST: "the delta of a chunk is damaged",
}
_no_planes = np.empty(SPARE, np.uint8)
_TOKEN_BITS = 6.0  # the approximate bits of each token in an explicit table
_GLANCE = 1 << 15  # sampled elements, to estimate a standalone size


def elements(data: Bytes, form: FloatFormat) -> NDArray[Any]:
    """The bit patterns in data: a view if the memory is aligned, else a copy."""
    return aligned(data, form.dtype)


def aligned(data: Bytes, word: np.dtype[Any]) -> NDArray[Any]:
    """Data as words: a view if the memory is aligned, else a copy."""
    found = data.view(word)
    return found if found.flags.aligned else data.copy().view(word)


def sample(elements: NDArray[Any], patch: int, count: int = SAMPLED) -> NDArray[Any]:
    """About `count` elements, in evenly spread rows of `patch`; all of a short array."""
    if len(elements) < 2 * count:
        return elements
    rows = elements[: len(elements) // patch * patch].reshape(-1, patch)
    return rows[:: len(elements) // count].reshape(-1)


def _delta_planes(itemsize: int) -> int:
    """The number of planes after a dense delta."""
    return {4: WIDE_PLANES, 8: 7}.get(itemsize, 0)


def encode_delta(base: Bytes, target: Bytes, form: FloatFormat) -> bytes | None:
    """Encode the target as a delta against the base; None if that would be longer than the target."""
    before, after = elements(base, form), elements(target, form)
    rows = _delta_planes(form.itemsize)
    held = _chunk_space(len(after), rows, form)
    space = held.space
    end = difference.encode(before, after, form.shift, form.mask, rows > 0, entropy.family(), held)
    if end == BAD:
        return None
    written = entropy.written(space.run, end)  # before the planes, which use the same memory
    if not rows:
        return written
    planes = zip(space.planes, space.sizes.tolist(), strict=False)
    return b"".join([written, *(put_plane(plane[:size]) for plane, size in planes)])


_kept = threading.local()


def _chunk_space(count: int, rows: int, form: FloatFormat) -> Held[ChunkSpace]:
    """This thread's working memory for ``count`` elements and ``rows`` planes."""
    key = count, rows, form.itemsize
    kept: tuple[Held[ChunkSpace], tuple[int, int, int]] | None = getattr(_kept, "space", None)
    if kept and kept[1] == key:  # most chunks have the previous one's length
        return kept[0]
    segments, sampled = count // UNIT + 1, min(count, MAX_SAMPLE)
    one_context = working_memory.ONE_CONTEXT.take(segments)
    one_context[:] = 0
    space = ChunkSpace(
        some=working_memory.SOME.take(sampled, form.dtype),
        there=working_memory.THERE.take(sampled, form.dtype),
        values=working_memory.VALUES.take(count),
        contexts=working_memory.CONTEXTS.take(count),
        planes=working_memory.PLANES.take(rows * (count + SPARE)).reshape(rows, -1 if rows else 0),
        sizes=np.zeros(7, np.int64),
        sums=working_memory.SUMS.take(segments),
        scales=working_memory.SCALES.take(segments),
        above=working_memory.ABOVE.take(segments),
        one_context=one_context,
        run=entropy.run_space(count, MAX_TABLES, HEAD + 8 + entropy.head_bytes(1) + 6 * segments),
    )
    held = Held(space)
    if space.run.words.nbytes <= working_memory.KEPT:  # the longest
        _kept.space = held, key
    return held


def sized(data: bytes) -> bytes:
    """Data after its length as u32."""
    return len(data).to_bytes(4, "little") + data


def decode_delta(data: Bytes, base: Bytes, form: FloatFormat, out: Bytes, *, follows: bool = False) -> None:
    """Fill out with the target; PayloadError if data is no delta of that many elements.

    `follows`: in memory, the next chunk's base comes after this one's.
    """
    before, result = elements(base, form), elements(out, form)
    ahead = len(result) if follows else 0
    check_decoded(difference.decode(before, result, open_delta(data, len(result), form, ahead)))
    deliver(result, out)


def check_decoded(result: int) -> None:
    """Raise PayloadError if the kernel `delta.decode` reported that a delta does not fit."""
    if result != FINE:
        raise PayloadError(_WRONG[result])


def open_delta(data: Bytes, count: int, form: FloatFormat, ahead: int = 0) -> OpenDelta:
    """Open a delta of at most `count` elements. It uses this thread's working memory, so only the delta
    opened last can be decoded."""
    layout, base_scale, tweak = _open_head(data)
    data, rows, listed = data[_HEAD.size :], _delta_planes(form.itemsize), data[:0]
    if layout[LOG_SEGMENT]:
        listed, data = take_section(data)
    joined, starts = _no_planes, np.zeros(8, np.int64)
    if rows:
        data, behind = take_section(data)
        planes = get_planes(behind, rows, count)
        starts[1 : rows + 1] = np.cumsum([len(plane) for plane in planes])
        starts[rows + 1 :] = starts[rows]
        joined = working_memory.PLANES.take(int(starts[rows]) + SPARE)
        np.concatenate(planes, out=joined[: int(starts[rows])])
    tables, segments = int(layout[TABLES]), count // UNIT + 1
    frequencies, words = entropy.room_to_read(max(data, listed, key=len), tables)
    return OpenDelta(
        data=data,
        listed=listed,
        shift=form.shift,
        mask=form.mask,
        wide=rows > 0,
        ahead=ahead,
        family=entropy.family(),
        layout=layout,
        base_scale=base_scale,
        tweak=tweak,
        planes=joined,
        starts=starts,
        scales=working_memory.SCALES.take(segments),
        above=working_memory.ABOVE.take(segments),
        slots=working_memory.SLOTS.take(tables << PRECISION),
        frequencies=frequencies,
        words=words,
    )


def _open_head(data: Bytes) -> tuple[NDArray[np.int64], int, int]:
    """(layout, base scale, tweak) from a delta's first bytes, all of them checked."""
    if len(data) < _HEAD.size:
        raise PayloadError("the payload of a chunk is cut short")
    log_segment, step, tables, lowest, base_scale, tweak = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if not (log_segment == 0 or 6 <= log_segment <= 26) or step > 1 or not 1 <= tables <= 64:
        raise PayloadError("the head of a delta is damaged")
    return np.array([log_segment, step, lowest, tables], np.int64), base_scale, tweak


def take_section(data: Bytes) -> tuple[Bytes, Bytes]:
    """(section, remaining data) of data that begins with the section's u32 length."""
    size = int.from_bytes(data[:4].tobytes(), "little")
    if len(data) < 4 or 4 + size > len(data):
        raise PayloadError("the payload of a chunk is cut short")
    return data[4 : 4 + size], data[4 + size :]


def deliver(result: NDArray[Any], out: Bytes) -> None:
    """Copy a result to `out`, unless it was decoded there."""
    if not out.view(result.dtype).flags.aligned:
        out[:] = result.view(np.uint8)


def encode_alone(target: Bytes, form: FloatFormat) -> bytes:
    """Encode the target by itself."""
    patterns = elements(target, form)
    leading = working_memory.VALUES.take(len(patterns))
    planes = working_memory.PLANES.take((form.itemsize - 1) * len(patterns))
    planes = planes.reshape(form.itemsize - 1, len(patterns))
    standalone.rotated_byte(patterns, form.itemsize - 1, leading)
    for p, plane in enumerate(planes):
        standalone.rotated_byte(patterns, p, plane)
    found = sized(entropy.encode_list(leading, BYTE_BITS))
    return b"".join([found, *(put_plane(plane) for plane in planes)])


def decode_alone(data: Bytes, form: FloatFormat, out: Bytes) -> None:
    """Fill out with the target; PayloadError if data does not code that many elements."""
    result = elements(out, form)
    section, behind = take_section(data)
    stacked = stack_planes(behind, form.itemsize - 1, len(result))
    if not standalone.decode_joined(
        section, entropy.family(), *entropy.room_to_read(section, 1), stacked, result
    ):
        raise PayloadError("a standalone chunk is damaged")
    deliver(result, out)


def stack_planes(data: Bytes, rows: int, count: int) -> NDArray[np.uint8]:
    """The planes in data, uint8[rows, count], in working memory; PayloadError if data is anything else."""
    planes = get_planes(data, rows, count)
    if any(len(plane) != count for plane in planes):
        raise PayloadError("a plane of a standalone chunk has the wrong length")
    stacked = working_memory.PLANES.take(rows * count).reshape(rows, count)
    for row, plane in zip(stacked, planes, strict=True):
        row[:] = plane
    return stacked


def alone_bits(target: Bytes, form: FloatFormat) -> float:
    """The approximate bits of `encode_alone`, from the entropies of a sample of bytes."""
    patterns = elements(target, form)
    start = max((len(patterns) - _GLANCE) // 2, 0)
    part = patterns[start : start + _GLANCE]
    byte = np.empty(len(part), np.uint8)
    bits = 0.0
    for p in range(form.itemsize):
        standalone.rotated_byte(part, p, byte)
        bits += standalone.byte_bits(byte, 1)
    return bits * len(patterns) + table_bits(byte)


def table_bits(tokens: Bytes) -> float:
    """The approximate bits of an explicit table for these tokens."""
    return _TOKEN_BITS * np.count_nonzero(np.bincount(tokens, minlength=1))
