"""Bytes to bytes, no input or output: one chunk's bytes, given its base's, to data and back.

The law, for any bytes: what :func:`encode_chunk` makes of a base and a target, :func:`decode_chunk` makes the
target of again. Chunks know nothing of each other. :func:`compare_row` and :func:`decode_row` do many of them
in one call. What a payload is, of which chunks are the parts, :mod:`deltaweights.payload` says.
"""

from .convert import convert, is_convertible, rescale
from .low_rank import Effort, LowRank
from .methods.chunk import (
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
from .opaque import compress_blocks, decompress_blocks
from .predictions import Predictor, low_rank_predictor, parse_prediction, seal_prediction
from .quantized import QUANTIZED, Quantized, quantize
from .rows import RECORD, checksum, compare_row, decode_row, decode_table, element_bytes

__all__ = [
    "MAX_CHUNK",
    "QUANTIZED",
    "RECORD",
    "STANDALONE",
    "Effort",
    "LowRank",
    "Method",
    "Overwritten",
    "Patch",
    "Predictor",
    "Quantized",
    "checksum",
    "compare_row",
    "compress_blocks",
    "convert",
    "decode_chunk",
    "decode_row",
    "decode_table",
    "decompress_blocks",
    "element_bytes",
    "encode_chunk",
    "is_convertible",
    "low_rank_predictor",
    "parse_prediction",
    "patch_chunk",
    "quantize",
    "read_patch",
    "rescale",
    "seal_prediction",
]
