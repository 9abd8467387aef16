"""One changed tensor's bytes in an update: encoded against the old ones, and applied to them.

Two encodings, each in one zstd frame. ``xor`` is new ^ old over all bytes. ``overwrite`` is the number of
bytes that changed, their positions, their new values; numbers and positions take four bytes, little-endian.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from ...errors import OutputError, PayloadError

#: The format's names of them.
DiskEncoding: TypeAlias = Literal["xor", "overwrite"]

ENCODINGS: tuple[DiskEncoding, ...] = ("xor", "overwrite")

Bytes: TypeAlias = NDArray[np.uint8]

_NUMBER = np.dtype("<u4")
_TOO_LARGE = 1 << 32  # bytes of a tensor, whose positions have four bytes


def encode(encoding: DiskEncoding, name: str, old: Bytes, new: Bytes) -> bytes:
    """The zstd frame that leads from ``old`` to ``new`` (uint8, of one length).

    Args:
        name: the tensor's name in messages.

    Raises:
        OutputError: the tensor is too large for ``overwrite``.
    """
    if encoding == "xor":
        return _frame(np.bitwise_xor(old, new))
    if new.size >= _TOO_LARGE:
        raise OutputError(
            f"Tensor {name!r} is too large for the encoding overwrite",
            f"It has {new.size:,} bytes; positions of four bytes reach {_TOO_LARGE:,}.",
            "Choose the encoding xor.",
        )
    positions = np.flatnonzero(old != new).astype(_NUMBER)
    count = np.array([positions.size], _NUMBER)
    return _frame(np.concatenate([count.view(np.uint8), positions.view(np.uint8), new[positions]]))


def _frame(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data.data)


def largest_frame(encoding: DiskEncoding, nbytes: int) -> int:
    """An upper bound of the length of a frame for a tensor of ``nbytes`` bytes, also where zstd finds nothing
    to save."""
    content = _most(encoding, nbytes)
    return content + (content >> 6) + 4096


def _most(encoding: DiskEncoding, nbytes: int) -> int:
    return nbytes if encoding == "xor" else _NUMBER.itemsize * (1 + nbytes) + nbytes


def apply(encoding: DiskEncoding, frame: bytes, data: Bytes) -> None:
    """Turn the old bytes ``data`` (uint8) into the new ones, where they lie.

    The frame is checked before anything is written; only the checksum of the new bytes shows whether they are
    the right ones.

    Raises:
        PayloadError: the frame does not fit the tensor, or is not a whole one.
    """
    content = _content(encoding, frame, data.size)
    if encoding == "xor":
        np.bitwise_xor(data, content, out=data)
        return
    count = int(content[: _NUMBER.itemsize].view(_NUMBER)[0])
    start = _NUMBER.itemsize * (1 + count)
    if content.size != start + count:
        raise PayloadError(f"It states {count} changed bytes, and has {content.size} bytes")
    positions = content[_NUMBER.itemsize : start].view(_NUMBER)
    if count and (positions[-1] >= data.size or not (positions[1:] > positions[:-1]).all()):
        raise PayloadError("Its positions do not rise, or leave the tensor")
    data[positions] = content[start:]


def _content(encoding: DiskEncoding, frame: bytes, nbytes: int) -> Bytes:
    """What the frame holds; what it says of its size is compared with the tensor's before memory is taken."""
    try:
        stated = zstandard.get_frame_parameters(frame)
        most = _most(encoding, nbytes)
        least = nbytes if encoding == "xor" else _NUMBER.itemsize
        if not least <= stated.content_size <= most:  # also where it does not say
            raise PayloadError(f"Its frame states {stated.content_size} bytes for a tensor of {nbytes}")
        if stated.dict_id:
            raise PayloadError("Its frame needs a dictionary")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"Its frame is damaged: {error}") from error
    return np.frombuffer(content, np.uint8)
