"""Bytes to bytes, no input or output: one tensor's bytes, given its base's, to a payload and back.

The law, for any bytes: ``decode(base, encode(base, target, dtype), dtype) == target``.

A payload is a table of chunk records and then the chunks' data; chunks are coded independently
(docs/format.md). :func:`encode` and :func:`decode` do a whole tensor in memory. The streaming
layers use the same pieces a chunk at a time: :class:`ChunkPlan`, :func:`encode_chunk`,
:func:`decode_chunk`, :func:`check_records`.
"""

from .chunk import (
    MAX_CHUNK,
    STANDALONE,
    Method,
    Overwritten,
    Patch,
    decode_chunk,
    encode_chunk,
    patch_chunk,
    read_patch,
)
from .convert import convert, is_convertible, rescale
from .opaque import compress_blocks, decompress_blocks
from .payload import (
    CHUNK_BYTES,
    RECORD,
    ChunkPlan,
    check_records,
    checksum,
    compare_row,
    decode,
    decode_row,
    element_bytes,
    encode,
)

__all__ = [
    "CHUNK_BYTES",
    "MAX_CHUNK",
    "RECORD",
    "STANDALONE",
    "ChunkPlan",
    "Method",
    "Overwritten",
    "Patch",
    "check_records",
    "checksum",
    "compare_row",
    "compress_blocks",
    "convert",
    "decode",
    "decode_chunk",
    "decode_row",
    "decompress_blocks",
    "element_bytes",
    "encode",
    "encode_chunk",
    "is_convertible",
    "patch_chunk",
    "read_patch",
    "rescale",
]
