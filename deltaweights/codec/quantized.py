"""Predicts a quantized tensor: the base's floats, divided by the scales that the target was quantized with,
and rounded to the target's dtype.

All of it is exact or a single operation of IEEE 754 in float32, so every machine predicts the same bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import PayloadError
from .convert import convert, is_convertible

#: The dtypes that are predicted.
QUANTIZED = ("F8_E4M3", "F8_E5M2", "I8")

_HEAD = struct.Struct("<QII")
_MAX_SCALES = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """The scales of a matrix, in blocks: an element is predicted as its base / the scale of its block.

    Attributes:
        dtype: the target's, one of :data:`QUANTIZED`.
        base_dtype: the base's, a float dtype.
        columns: the elements of a row.
        block: rows and columns of a block; those at the edges may be smaller.
        scales: float32, a row for each row of blocks.
    """

    dtype: str
    base_dtype: str
    columns: int
    block: tuple[int, int]
    scales: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.scales.nbytes

    @classmethod
    def parse(cls, data: bytes, dtype: str, base_dtype: str, numel: int) -> Quantized:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            PayloadError: it is damaged, or does not go with a tensor of ``numel`` elements of these dtypes.
        """
        if dtype not in QUANTIZED or not is_convertible(base_dtype, "F32"):
            raise PayloadError(f"{base_dtype} is not quantized to {dtype}")
        if len(data) < _HEAD.size:
            raise PayloadError("A prediction is too short")
        columns, high, wide = _HEAD.unpack_from(data)
        if not columns or numel % columns or not high or not wide:
            raise PayloadError("A prediction has another shape than its tensor")
        shape = -(-(numel // columns) // high), -(-columns // wide)
        if shape[0] * shape[1] > min(_MAX_SCALES, numel):
            raise PayloadError("A prediction has too many scales")
        nbytes = 4 * shape[0] * shape[1]
        try:
            if zstandard.frame_content_size(data[_HEAD.size :]) != nbytes:
                raise PayloadError("A prediction has another number of scales than blocks")
            raw = zstandard.ZstdDecompressor().decompress(data[_HEAD.size :], allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PayloadError(f"A prediction's scales are broken: {error}") from error
        scales = np.frombuffer(raw, "<f4").reshape(shape)
        return cls(dtype, base_dtype, columns, (high, wide), scales)

    def to_bytes(self) -> bytes:
        """All that :meth:`parse` does not know from the manifest."""
        head = _HEAD.pack(self.columns, *self.block)
        return head + zstandard.ZstdCompressor(19).compress(self.scales.astype("<f4").tobytes())

    def predict(self, base: NDArray[np.uint8], start: int) -> NDArray[np.uint8]:
        """The target's elements (uint8) from the base's (uint8, in its own dtype), which begin with element
        ``start``."""
        values = convert(base, self.base_dtype, "F32").view("<f4")
        scales = self.scales.reshape(1) if self.scales.size == 1 else self._scales_of(start, values.size)
        with np.errstate(all="ignore"):
            return quantize((values / scales).astype(np.float32), self.dtype)

    def _scales_of(self, start: int, count: int) -> NDArray[np.float32]:
        """The scale of each of ``count`` elements, in memory that grows with their number alone."""
        row, column = divmod(start, self.columns)
        rows = -(-(column + count) // self.columns)
        if 1 <= rows <= 2:  # a row may be far longer than what is asked for
            first = min(count, self.columns - column)
            parts = [(row, column, column + first), (row + 1, 0, count - first)][:rows]
            return np.concatenate([self._scales_in_row(*part) for part in parts])
        of_rows = self.scales[np.arange(row, row + rows) // self.block[0]]
        whole = np.repeat(of_rows, min(self.block[1], self.columns), axis=1)[:, : self.columns]
        return whole.reshape(-1)[column : column + count]

    def _scales_in_row(self, row: int, first: int, end: int) -> NDArray[np.float32]:
        high, wide = self.block
        blocks = np.arange(first // wide, -(-end // wide) + 1)
        ends = np.clip(blocks * wide, first, end)
        counts = ends[1:] - ends[:-1]
        return np.repeat(self.scales[row // high, blocks[:-1]], counts)


def quantize(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """Round floats to the nearest value of ``dtype``, ties to even; what is too large becomes the largest
    finite value, and NaN becomes 0x7F (0 for I8)."""
    if dtype == "I8":
        whole = np.nan_to_num(np.rint(values), nan=0.0, posinf=127.0, neginf=-128.0)
        return np.frombuffer(np.clip(whole, -128, 127).astype(np.int8), np.uint8)
    exponent, mantissa = DTYPES[dtype].exponent, DTYPES[dtype].mantissa
    smallest = 2 - (1 << (exponent - 1))  # the exponent of the smallest normal number
    largest = 448.0 if dtype == "F8_E4M3" else 57344.0
    bits = values.view(np.uint32)
    sign = ((bits >> 24) & 0x80).astype(np.uint8)
    size = np.minimum(np.abs(values), np.float32(largest))  # NaN stays
    narrow = 23 - mantissa
    places = size.view(np.uint32)
    rounded = (places + ((places >> narrow) & 1) + np.uint32((1 << (narrow - 1)) - 1)) >> narrow
    normal = rounded - np.uint32((smallest - 1 + 127) << mantissa)
    subnormal = np.rint(np.nan_to_num(size) * np.float32(2.0 ** (mantissa - smallest))).astype(np.uint32)
    found = np.where(size < np.float32(2.0**smallest), subnormal, normal)
    result = np.where(np.isnan(values), 0x7F, found.astype(np.uint8) | sign)
    return result.astype(np.uint8)
