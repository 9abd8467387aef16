"""Codes byte planes: each is stored as it is, by zstd, or entropy-coded, judged by a sample.

A stored plane, little-endian: u8 kind, u32 length of the plane, u32 length of the data, data.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
import zstandard
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import constants
from ..compiled import standalone
from ..tables import BYTE_BITS
from . import entropy

Bytes = NDArray[np.uint8]
_HEAD = struct.Struct("<BII")
_ZSTD_LEVEL = 3
_WINDOW = 1 << 23  # the longest window of a frame, since zstd allocates it however short the frame is
_PROBE = 1 << 14  # bytes on which zstd is tried before the whole plane
_ZSTD_GAIN = 0.99  # zstd is chosen if a probe stays below this part of the entropy
_SHORT = 1 << 14  # bytes of a plane that is faster to fill than to broadcast
_NOISE = 7.92  # bits per byte above which coding a plane is not worth the time


class Plane(IntEnum):
    """The kinds of stored planes."""

    RAW = constants.RAW
    FILL = constants.FILL  # one byte, repeated
    ZSTD = 2
    RANS = constants.RANS


def put_plane(plane: Bytes) -> bytes:
    """Encode one plane, of any length, for `get_planes`."""
    kind, data = _code(plane)
    return _HEAD.pack(kind, len(plane), len(data)) + data


def _code(plane: Bytes) -> tuple[Plane, bytes]:
    if len(plane) == 0:
        return Plane.RAW, b""
    if not (plane != plane[0]).any():
        return Plane.FILL, plane[:1].tobytes()
    if len(plane) < 64:
        return Plane.RAW, plane.tobytes()
    best: tuple[Plane, bytes] = Plane.RAW, plane.tobytes()
    by_zstd, by_rans = _zstd_bits(plane), _entropy_bits(plane)
    if min(by_zstd, by_rans) > _NOISE:
        return best
    if by_zstd < _ZSTD_GAIN * by_rans:
        return _shorter(best, Plane.ZSTD, compress(plane))
    return _shorter(best, Plane.RANS, _rans(plane))


def _shorter(best: tuple[Plane, bytes], kind: Plane, data: bytes) -> tuple[Plane, bytes]:
    return (kind, data) if len(data) < len(best[1]) else best


def compress(data: Bytes, level: int = _ZSTD_LEVEL) -> bytes:
    """A zstd frame without a content size, since the reader knows the length."""
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=False)
    return compressor.compress(data.data)


def expand(data: Bytes, size: int) -> Bytes:
    """The `size` bytes in a zstd frame; PayloadError if their number differs."""
    try:
        # zstd trusts a stated size; our frames state none.
        stated = zstandard.get_frame_parameters(data.data).content_size
        if stated not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise PayloadError(f"a zstd frame claims {stated} bytes where {size} are due")
        expander = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        whole = expander.decompress(data.data, max_output_size=max(size, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError("a zstd frame in the payload is damaged") from error
    if len(whole) != size:
        raise PayloadError(f"a zstd frame holds {len(whole)} bytes where {size} are due")
    return np.frombuffer(whole, np.uint8)


def _zstd_bits(plane: Bytes) -> float:
    """The bits per byte of zstd on the middle of a plane."""
    start = max((len(plane) - _PROBE) // 2, 0)
    probe = np.ascontiguousarray(plane[start : start + _PROBE])
    return 8 * len(zstandard.ZstdCompressor(level=1).compress(probe.data)) / len(probe)


def _entropy_bits(plane: Bytes) -> float:
    bits: float = standalone.byte_bits(plane, max(len(plane) >> 16, 1))
    return bits


def _rans(plane: Bytes) -> bytes:
    return entropy.encode_list(plane.astype(np.uint32), BYTE_BITS)


def get_planes(data: Bytes, count: int, limit: int) -> list[Bytes]:
    """The `count` planes in data; none may be longer than `limit` bytes."""
    planes = []
    for _ in range(count):
        plane, data = take_plane(data, limit)
        planes.append(plane)
    if len(data):
        raise PayloadError(f"{len(data)} bytes too many after the planes")
    return planes


def take_plane(data: Bytes, limit: int) -> tuple[Bytes, Bytes]:
    """(first plane, remaining data); the plane may have at most `limit` bytes."""
    kind, size, stored, rest = _split(data, limit)
    return _decode(kind, stored, size), rest


def take_without_zstd(data: Bytes, limit: int) -> tuple[Bytes, Bytes]:
    """Like `take_plane`, but the plane stays coded, head included; a zstd plane is converted to a stored
    one."""
    kind, size, stored, rest = _split(data, limit)
    if kind != Plane.ZSTD:
        return data[: len(data) - len(rest)], rest
    head = np.frombuffer(_HEAD.pack(Plane.RAW, size, size), np.uint8)
    return np.concatenate([head, expand(stored, size)]), rest


def _split(data: Bytes, limit: int) -> tuple[int, int, Bytes, Bytes]:
    """(kind, size, stored bytes of the first plane, remaining data)"""
    if len(data) < _HEAD.size:
        raise PayloadError("the payload ends inside a plane's head")
    kind, size, stored = _HEAD.unpack(data[: _HEAD.size].tobytes())
    data = data[_HEAD.size :]
    if size > limit or stored > len(data):
        raise PayloadError("a plane in the payload does not fit")
    return kind, size, data[:stored], data[stored:]


def _decode(kind: int, data: Bytes, size: int) -> Bytes:
    if kind == Plane.RAW and len(data) == size:
        return data
    if kind == Plane.FILL and len(data) == 1:
        return np.broadcast_to(data[0], size) if size > _SHORT else np.full(size, data[0])
    if kind == Plane.ZSTD:
        return expand(data, size)
    if kind == Plane.RANS:
        return _unrans(data, size)
    raise PayloadError(f"a plane of {size} bytes is stored in an unknown or impossible way")


def _unrans(data: Bytes, size: int) -> Bytes:
    plane = np.empty(size, np.uint8)
    entropy.decode_list(data, plane, BYTE_BITS)
    return plane
