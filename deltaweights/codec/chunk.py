"""One chunk to bytes and back: XOR with the base, byte planes, zstd, whichever is smallest.

Byte planes: all first bytes of the elements, then all second bytes, and so on. The bytes of one plane are
alike (signs and exponents in one, noise in another), so each compresses as well as it can.
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..errors import PayloadError

_ITEMSIZE = {
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_LEVEL = 3
_WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_RAW_PLANE = 1 << 31


class Method(IntEnum):
    """How a chunk is coded (docs/format.md)."""

    SAME = 0  #: the base's bytes; no data
    RAW = 1  #: the chunk's own bytes
    PLANES = 2  #: byte planes, each compressed or raw
    XOR_PLANES = 3  #: byte planes of target XOR base


class _Zstd(threading.local):
    """A compressor and a decompressor for each thread: their contexts are not thread-safe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def encode_chunk(
    base: NDArray[np.uint8] | None, target: NDArray[np.uint8], dtype: str
) -> tuple[Method, bytes]:
    """Encode one chunk of a tensor.

    Args:
        base: the chunk's base bytes, uint8 of the same length, already in ``dtype``; None: standalone.
        target: the chunk's bytes, uint8, 1-D, any length.
        dtype: the safetensors dtype code, which only guides the coding: any bytes are coded exactly.

    Returns:
        The method and its data: never longer than ``target``.
    """
    if base is not None and np.array_equal(base, target):
        return Method.SAME, b""
    size = element_bytes(dtype, target.size)
    best = Method.RAW, target.tobytes()
    if base is not None:
        data = _encode_planes(np.bitwise_xor(base, target), size)
        best = min(best, (Method.XOR_PLANES, data), key=lambda coded: len(coded[1]))
    # A base that helps nothing shows itself: then the target alone may be the smaller.
    if base is None or len(best[1]) > 0.6 * target.size:
        data = _encode_planes(target, size)
        best = min(best, (Method.PLANES, data), key=lambda coded: len(coded[1]))
    return best


def decode_chunk(
    method: int,
    data: bytes | memoryview,
    base: NDArray[np.uint8] | None,
    dtype: str,
    out: NDArray[np.uint8],
) -> None:
    """Decode one chunk into ``out`` (uint8, 1-D, contiguous, the chunk's length).

    Raises:
        PayloadError: the data is not what :func:`encode_chunk` makes. Damage that still decodes is
            for the caller's checksum to find.
    """
    if method == Method.SAME and base is not None and not data:
        out[:] = base
    elif method == Method.RAW and len(data) == out.size:
        out[:] = np.frombuffer(data, np.uint8)
    elif method == Method.PLANES:
        _decode_planes(memoryview(data), element_bytes(dtype, out.size), out)
    elif method == Method.XOR_PLANES and base is not None:
        _decode_planes(memoryview(data), element_bytes(dtype, out.size), out)
        np.bitwise_xor(out, base, out=out)
    else:
        raise PayloadError(
            f"A chunk of {out.size} bytes {'without' if base is None else 'with'} a base "
            f"cannot be coded by method {method} in {len(data)} bytes"
        )


def element_bytes(dtype: str, nbytes: int) -> int:
    """Bytes of one element of ``dtype``; 1 where that is unknown, less, or does not divide ``nbytes``."""
    size = _ITEMSIZE.get(dtype, 1)
    return size if nbytes % size == 0 else 1


def _encode_planes(data: NDArray[np.uint8], size: int) -> bytes:
    sizes, planes = [], []
    for k in range(size):
        plane = np.ascontiguousarray(data[k::size])
        packed = _zstd.compressor.compress(plane.data)
        if len(packed) < plane.size:
            sizes.append(len(packed))
            planes.append(packed)
        else:
            sizes.append(plane.size | _RAW_PLANE)
            planes.append(plane.tobytes())
    return struct.pack(f"<{size}I", *sizes) + b"".join(planes)


def _decode_planes(data: memoryview, size: int, out: NDArray[np.uint8]) -> None:
    if len(data) < 4 * size:
        raise PayloadError("A chunk's data ends too early")
    words = out.view(_WORD[size])
    position = 4 * size
    for k, length in enumerate(struct.unpack(f"<{size}I", data[:position])):
        end = position + (length & ~_RAW_PLANE)
        packed = data[position:end]
        plane = _plane(packed, bool(length & _RAW_PLANE), words.size)
        position = end
        # Whole-word arithmetic: several times faster than strided byte copies.
        if k == 0:
            np.copyto(words, plane)
        else:
            np.bitwise_or(words, np.left_shift(plane, 8 * k, dtype=words.dtype), out=words)
    if position != len(data):
        raise PayloadError("A chunk's data is longer or shorter than its planes")


def _plane(packed: memoryview, is_raw: bool, length: int) -> NDArray[np.uint8]:
    if is_raw:
        plane = packed
    else:
        # Checked first: the decompressor allocates what the frame says.
        try:
            if zstandard.frame_content_size(packed) != length:
                raise PayloadError("A byte plane does not have its chunk's length")
            plane = memoryview(_zstd.decompressor.decompress(packed))
        except zstandard.ZstdError as error:
            raise PayloadError(f"A byte plane does not decompress: {error}") from error
    if len(plane) != length:
        raise PayloadError("A byte plane does not have its chunk's length")
    return np.frombuffer(plane, np.uint8)
