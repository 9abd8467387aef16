"""Compresses files that are not tensors, as zstd streams, and decompresses untrusted ones in bounded
memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, cast

import zstandard

from ..errors import PayloadError

_BLOCK_BYTES = 1 << 20

#: Zstandard's window takes memory of the reader: 8 MiB, which RFC 8878 asks every decoder to support.
_MAX_WINDOW_BYTES = 1 << 23


def compress_blocks(blocks: Iterable[bytes], level: int = 9) -> Iterator[bytes]:
    """Compress the concatenated blocks to one zstd frame, in blocks."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=22)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    for block in blocks:
        if packed := compressor.compress(block):
            yield packed
    yield compressor.flush()


def decompress_blocks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The inverse, in blocks of at most 1 MiB, however much a frame expands.

    Raises:
        PayloadError: the frame is damaged. A frame that is cut short may end early without an error, so
            compare the length.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    try:
        source = cast(IO[bytes], _Blocks(blocks))  # only its read() is called
        with decompressor.stream_reader(source, closefd=False) as reader:
            while block := reader.read(_BLOCK_BYTES):
                yield block
    except zstandard.ZstdError as error:
        raise PayloadError(f"A compressed file does not decompress: {error}") from error


class _Blocks:
    """An iterable of blocks as an object with ``read``, for the stream reader."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = b""

    def read(self, nbytes: int) -> bytes:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        block, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return block
