"""Codes everything except floats: integers, packed and unknown types, and odd tails.

Words of the type's size are split into byte planes. Each word is the difference from the base's (zigzagged if
that helps), the exclusive or, or the word itself without a base:

    u8      transform
    planes  one for each byte of a word
    bytes   the tail that does not fill a word, as it is

Otherwise the chunk is one zstd frame.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES
from ...errors import PayloadError
from .planes import get_planes, put_plane
from .ulp import Unsigned

Bytes = NDArray[np.uint8]
_SAMPLE = 1 << 16  # bytes on which transforms are compared

#: Bytes of an element of each integer type that is split into planes; all other types are bytes.
ITEMSIZES = {code: dtype.bits // 8 for code, dtype in DTYPES.items() if dtype.is_integer}


class Transform(IntEnum):
    """The transform of the words before they are split."""

    NONE = 0
    XOR = 1
    DIFFERENCE = 2  # modulo 2**N, zigzagged


def _words(data: Bytes, itemsize: int) -> Unsigned:
    whole = len(data) // itemsize * itemsize
    return data[:whole].copy().view(f"<u{itemsize}")


def _apply(transform: Transform, base: Unsigned | None, target: Unsigned) -> Unsigned:
    if base is None or transform == Transform.NONE:
        return target
    if transform == Transform.XOR:
        return target ^ base
    kind = target.dtype.type
    steps = target - base
    return (steps << kind(1)) ^ (kind(0) - (steps >> kind(8 * target.dtype.itemsize - 1)))


def _undo(transform: int, base: Unsigned | None, words: Unsigned) -> Unsigned:
    if transform == Transform.NONE:
        return words
    if base is None or transform not in (Transform.XOR, Transform.DIFFERENCE):
        raise PayloadError("a chunk is coded against a base that it does not have")
    if transform == Transform.XOR:
        return words ^ base
    kind = words.dtype.type
    return base + ((words >> kind(1)) ^ (kind(0) - (words & kind(1))))


def encode_planes(base: Bytes | None, target: Bytes, itemsize: int) -> bytes:
    """Encode the target in byte planes, against the base if there is one."""
    words = _words(target, itemsize)
    against = None if base is None else _words(base, itemsize)
    transform = _choose(against, words)
    planes = _split(_apply(transform, against, words))
    tail = target[len(words) * itemsize :].tobytes()
    return b"".join([bytes([transform]), *(put_plane(plane) for plane in planes), tail])


def _split(words: Unsigned) -> NDArray[np.uint8]:
    """uint8[itemsize, n], lowest byte first."""
    matrix = words.view(np.uint8).reshape(len(words), words.dtype.itemsize)
    return np.ascontiguousarray(matrix.T)


def _choose(base: Unsigned | None, target: Unsigned) -> Transform:
    """The transform whose planes are shortest on a sample."""
    if base is None:
        return Transform.NONE
    count = _SAMPLE // target.dtype.itemsize
    start = max((len(target) - count) // 2, 0)
    there, here = base[start : start + count], target[start : start + count]

    def size(transform: Transform) -> int:
        return sum(len(put_plane(plane)) for plane in _split(_apply(transform, there, here)))

    return min((Transform.DIFFERENCE, Transform.XOR, Transform.NONE), key=size)


def decode_planes(data: Bytes, base: Bytes | None, itemsize: int, out: Bytes) -> None:
    """Fill out with the target; PayloadError if data does not code that many bytes."""
    count = len(out) // itemsize
    tail = len(out) - count * itemsize
    if len(data) < 1 + tail:
        raise PayloadError("a chunk's payload is cut short")
    planes = get_planes(data[1 : len(data) - tail], itemsize, count)
    matrix = np.empty((count, itemsize), np.uint8)
    for column, plane in enumerate(planes):
        if len(plane) != count:
            raise PayloadError("a byte plane has the wrong length")
        matrix[:, column] = plane
    words = matrix.reshape(-1).view(f"<u{itemsize}")
    against = None if base is None else _words(base, itemsize)
    out[: count * itemsize] = _undo(int(data[0]), against, words).view(np.uint8)
    out[count * itemsize :] = data[len(data) - tail :]
