"""Chunks of floats, with a base or without: what the kernels write, put together as payloads.

A delta, little-endian:

    u8      log2 of the segment length, 0 = one scale for all
    u8      context step: contexts are 1 << step half octaves wide
    u8      number of contexts
    i16     lowest context
    i16     base scale
    i8      tweak: how many half octaves the members of the family are shifted
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from . import coder
from .compiled import alone, delta
from .constants import APART, MAX_ROWS, MAX_SAMPLE, PATCH, SPARE, TABLES, UNIT, WAYS
from .planes import get_planes, put_plane
from .scratch import scratch
from .tables import TOKENS
from .ulp import FloatFormat

Bytes = NDArray[np.uint8]
_HEAD = struct.Struct("<BBBhhb")
_SAMPLED = 1 << 14  # elements looked at to choose a way and its parameters
_MORE = MAX_SAMPLE // 2  # the same where changes are clustered: a small sample may miss them
_PLACE = 64  # elements in a row in which changes are counted to see that
_TOKEN_BITS = 6.0  # what each token takes in an explicit table, about
_GLANCE = 1 << 15  # elements whose bytes are counted to foresee a standalone size


def elements(data: Bytes, form: FloatFormat) -> NDArray[Any]:
    """The bit patterns in data: a view where the memory is aligned, else a copy."""
    found = data.view(form.dtype)
    return found if found.flags.aligned else data.copy().view(form.dtype)


def sample(elements: NDArray[Any], patch: int, count: int = _SAMPLED) -> NDArray[Any]:
    """About `count` elements, `patch` in a row and as many rows evenly spread; all of a short array."""
    if len(elements) < 2 * count:
        return elements
    rows = elements[: len(elements) // patch * patch].reshape(-1, patch)
    return rows[:: len(elements) // count].reshape(-1)


def _delta_planes(itemsize: int) -> int:
    """How many planes stand behind a dense delta."""
    return {4: 3, 8: 7}.get(itemsize, 0)


def encode_delta(base: Bytes, target: Bytes, form: FloatFormat) -> bytes | None:
    """The target's delta against the base; None where it would be longer than the target."""
    before, after = elements(base, form), elements(target, form)
    layout = np.empty(5, np.int64)
    if _choose_contexts(before, after, form, layout) > 8 * len(target):
        return None
    return _encode_under(layout[:4], int(layout[4]), before, after, form)


def _choose_contexts(
    before: NDArray[Any], after: NDArray[Any], form: FloatFormat, layout: NDArray[np.int64]
) -> float:
    """The layout by a sample of the chunk, and the sample's scale behind it, into layout; bits in all."""
    size = _MORE if _is_clustered(before, after) else _SAMPLED
    some, there = sample(before, PATCH, size), sample(after, PATCH, size)
    count = len(some)
    bits: float = delta.choose_contexts(
        some, there, form.shift, form.mask, form.itemsize >= 4, len(before) / count,
        scratch("values", count, np.uint32), scratch("part", count, np.uint32),
        scratch("contexts", count, np.uint8), scratch("keys", count, np.uint16),
        scratch("counters", WAYS * ((MAX_ROWS << 7) + APART), np.uint32),
        scratch("rows", MAX_ROWS * TOKENS, np.uint32).reshape(MAX_ROWS, TOKENS),
        scratch("planes", 7 * count, np.uint8).reshape(7, count),
        scratch("sums", count // UNIT + 1, np.float32), layout,
    )  # fmt: skip
    return bits


def _is_clustered(before: NDArray[Any], after: NDArray[Any]) -> bool:
    """Whether far more changed in some places than in most, as where training met few rows."""
    if len(before) < 2 * _SAMPLED:
        return False
    moved = sample(before, _PLACE) != sample(after, _PLACE)
    changed = np.count_nonzero(moved.reshape(-1, _PLACE), axis=1)
    return bool(changed.max() > 2 * changed.mean() + 12)


def _encode_under(
    layout: NDArray[np.int64], scale: int, before: NDArray[Any], after: NDArray[Any], form: FloatFormat
) -> bytes | None:
    """The delta under chosen parameters; None where it would be longer than the target."""
    count, rows = len(after), _delta_planes(form.itemsize)
    planes = scratch("planes", rows * (count + SPARE), np.uint8).reshape(rows, -1 if rows else 0)
    sizes = np.zeros(7, np.int64)
    log_segment, step, lowest, tables = layout.tolist()
    scales = np.full(delta.segments_of(count, log_segment), scale, np.int64)
    values, contexts = scratch("values", count, np.uint32), scratch("contexts", count, np.uint8)
    sums = scratch("sums", count // UNIT + 1, np.float32)
    delta.measure(before, after, form.shift, form.mask, layout, scales, values, contexts, planes, sizes, sums)
    if rows:
        delta.split_bytes(values, contexts, layout, planes, sizes)
    bits = min(8 * form.itemsize, 32)
    found = coder.encode_run(contexts, values, _members(layout, rows, 0), limit=after.nbytes, value_bits=bits)
    if found is None:
        return None
    tweak, run = found
    base_scale = int(scales.min())
    parts = [_HEAD.pack(log_segment, step, tables, lowest, base_scale, tweak)]
    if log_segment:
        parts.append(sized(coder.encode_list((scales - base_scale).astype(np.uint32))))
    parts.append(sized(run) if rows else run)
    parts += [put_plane(planes[p, : sizes[p]]) for p in range(rows)]
    return b"".join(parts)


def _members(layout: NDArray[np.int64], rows: int, tweak: int) -> NDArray[np.int64]:
    """Each context's member of the family."""
    found = np.empty(layout[TABLES], np.int64)
    delta.members(layout, rows > 0, tweak, found)
    return found


def sized(data: bytes) -> bytes:
    """Data behind its u32 length."""
    return len(data).to_bytes(4, "little") + data


def decode_delta(data: Bytes, base: Bytes, form: FloatFormat, out: Bytes) -> None:
    """Fill out with the target; PayloadError where data is no delta of that many elements."""
    before, result = elements(base, form), elements(out, form)
    layout, base_scale, tweak = _open_head(data)
    data, rows = data[_HEAD.size :], _delta_planes(form.itemsize)
    scales = np.full(delta.segments_of(len(result), layout[0]), base_scale, np.int64)
    if layout[0]:
        section, data = take_section(data)
        above = np.empty(len(scales), np.uint32)
        coder.decode_list(section, above)
        scales += above & 0xFFFF
    joined, starts = np.empty(SPARE, np.uint8), np.zeros(8, np.int64)
    if rows:
        section, data = take_section(data)
        planes = get_planes(data, rows, len(result))
        starts[1 : rows + 1] = np.cumsum([len(plane) for plane in planes])
        starts[rows + 1 :] = starts[rows]
        joined = scratch("planes", int(starts[rows]) + SPARE, np.uint8)
        np.concatenate(planes, out=joined[: int(starts[rows])])
        data = section
    run = coder.open_run(data, _members(layout, rows, tweak))
    if not delta.decode_elements(
        before, form.shift, form.mask, scales, layout, run.words, run.slots, run.settings,
        run.states, run.rest, joined, starts, result,
    ):  # fmt: skip
        raise PayloadError("the delta of a chunk is damaged")
    deliver(result, out)


def _open_head(data: Bytes) -> tuple[NDArray[np.int64], int, int]:
    """(layout, base scale, tweak) from a delta's first bytes, every one of them checked."""
    if len(data) < _HEAD.size:
        raise PayloadError("the payload of a chunk is cut short")
    log_segment, step, tables, lowest, base_scale, tweak = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if not (log_segment == 0 or 6 <= log_segment <= 26) or step > 1 or not 1 <= tables <= 64:
        raise PayloadError("the head of a delta is damaged")
    return np.array([log_segment, step, lowest, tables], np.int64), base_scale, tweak


def take_section(data: Bytes) -> tuple[Bytes, Bytes]:
    """(section, what follows) of data that begins with the section's u32 length."""
    size = int.from_bytes(data[:4].tobytes(), "little")
    if len(data) < 4 or 4 + size > len(data):
        raise PayloadError("the payload of a chunk is cut short")
    return data[4 : 4 + size], data[4 + size :]


def deliver(result: NDArray[Any], out: Bytes) -> None:
    """Copy a result that had to be decoded beside an unaligned `out`."""
    if not out.view(result.dtype).flags.aligned:
        out[:] = result.view(np.uint8)


def encode_alone(target: Bytes, form: FloatFormat) -> bytes:
    """The target by itself."""
    patterns = elements(target, form)
    leading = scratch("values", len(patterns), np.uint32)
    planes = scratch("planes", (form.itemsize - 1) * len(patterns), np.uint8)
    planes = planes.reshape(form.itemsize - 1, len(patterns))
    alone.rotated_byte(patterns, form.itemsize - 1, leading)
    for p, plane in enumerate(planes):
        alone.rotated_byte(patterns, p, plane)
    found = sized(coder.encode_list(leading, coder.BYTE_BITS))
    return b"".join([found, *(put_plane(plane) for plane in planes)])


def decode_alone(data: Bytes, form: FloatFormat, out: Bytes) -> None:
    """Fill out with the target; PayloadError where data does not code that many elements."""
    result = elements(out, form)
    section, behind = take_section(data)
    stacked = stack_planes(behind, form.itemsize - 1, len(result))
    run = coder.open_run(section, np.zeros(1, np.int64), coder.BYTE_BITS)
    if not alone.decode_joined(run.words, run.slots, run.settings, run.states, run.rest, stacked, result):
        raise PayloadError("a standalone chunk is damaged")
    deliver(result, out)


def stack_planes(data: Bytes, rows: int, count: int) -> NDArray[np.uint8]:
    """The planes that make up data, uint8[rows, count], in working memory; PayloadError for others."""
    planes = get_planes(data, rows, count)
    if any(len(plane) != count for plane in planes):
        raise PayloadError("a plane of a standalone chunk has the wrong length")
    stacked = scratch("planes", rows * count, np.uint8).reshape(rows, count)
    for row, plane in zip(stacked, planes, strict=True):
        row[:] = plane
    return stacked


def alone_bits(target: Bytes, form: FloatFormat) -> float:
    """About how many bits `encode_alone` would need, from the entropies of a sample of bytes."""
    patterns = elements(target, form)
    start = max((len(patterns) - _GLANCE) // 2, 0)
    part = patterns[start : start + _GLANCE]
    byte = np.empty(len(part), np.uint8)
    bits = 0.0
    for p in range(form.itemsize):
        alone.rotated_byte(part, p, byte)
        bits += alone.byte_bits(byte, 1)
    return bits * len(patterns) + table_bits(byte)


def table_bits(tokens: Bytes) -> float:
    """About what an explicit table for these tokens takes."""
    return _TOKEN_BITS * np.count_nonzero(np.bincount(tokens, minlength=1))
