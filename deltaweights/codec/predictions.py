"""Predictions: what stands once at the start of a payload, and makes the base more like the target before
chunks are compared with it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import PayloadError
from .convert import convert, is_convertible
from .low_rank import LowRank
from .quantized import Quantized

_CHECKSUM = struct.Struct("<Q")


class Predictor(Protocol):
    """Predicts a target's elements from its base's."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""

    def predict(self, base: NDArray[np.uint8], start: int) -> NDArray[np.uint8]:
        """The elements in the target's dtype, for the base's from element ``start`` on (uint8, in the base's
        own dtype)."""


@dataclass(frozen=True, slots=True)
class _Converted:
    """A low-rank prediction of a base that is converted first."""

    found: LowRank
    base_dtype: str

    @property
    def nbytes(self) -> int:
        return self.found.nbytes

    def predict(self, base: NDArray[np.uint8], start: int) -> NDArray[np.uint8]:
        return self.found.predict(convert(base, self.base_dtype, self.found.dtype), start)


def low_rank_predictor(found: LowRank, base_dtype: str) -> Predictor:
    """A low-rank prediction, for a base of another dtype than the target's, too.

    Raises:
        PayloadError: the base's dtype cannot be converted.
    """
    if base_dtype != found.dtype and not is_convertible(base_dtype, found.dtype):
        raise PayloadError(f"{base_dtype} is not converted to {found.dtype}")
    return _Converted(found, base_dtype)


def seal_prediction(data: bytes) -> bytes:
    """A prediction as it stands in a payload: behind its XXH3-64."""
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data)) + data


def parse_prediction(method: str, sealed: bytes, dtype: str, base_dtype: str, numel: int) -> Predictor:
    """Read a prediction out of a payload.

    Args:
        method: as in the manifest.
        sealed: what :func:`seal_prediction` made.
        dtype, base_dtype: of target and base.
        numel: the elements that have a base.

    Raises:
        PayloadError: it is damaged, or does not go with the tensor.
    """
    data = sealed[_CHECKSUM.size :]
    if len(sealed) < _CHECKSUM.size or _CHECKSUM.unpack_from(sealed)[0] != xxhash.xxh3_64_intdigest(data):
        raise PayloadError("A prediction is not the one that was written")
    if method == "quantized":
        return Quantized.parse(data, dtype, base_dtype, numel)
    if method == "low_rank":
        return low_rank_predictor(LowRank.parse(data, dtype, numel), base_dtype)
    raise PayloadError(f"The prediction {method!r} is not known")
