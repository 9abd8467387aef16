"""The checksums of tensors that the format knows."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from ...errors import DeltaWeightsError

#: The format's names of them.
ChecksumFormat: TypeAlias = Literal["xxh3-128", "blake3", "adler32"]


def _adler32(data: memoryview) -> str:
    return f"{zlib.adler32(data):08x}"


def _blake3(data: memoryview) -> str:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise DeltaWeightsError(
            "Checksums of the kind blake3 need the package blake3",
            f"{error}.",
            "Install it: pip install blake3. Who writes updates may choose xxh3-128 instead.",
        ) from error
    return str(blake3(data).hexdigest())


#: For each kind, how to compute it, and how many hexadecimal digits it has.
_KINDS: dict[str, tuple[Callable[[memoryview], str], int]] = {
    "xxh3-128": (xxhash.xxh3_128_hexdigest, 32),
    "blake3": (_blake3, 64),
    "adler32": (_adler32, 8),
}

CHECKSUMS = tuple(_KINDS)


def checksum(kind: str, data: NDArray[np.uint8]) -> str:
    """The checksum of contiguous bytes (uint8), in hexadecimal digits.

    Raises:
        DeltaWeightsError: the package that computes it is missing.
    """
    compute, _ = _KINDS[kind]
    return compute(data.data)


def digits(kind: str) -> int:
    """How many digits a checksum of this kind has."""
    return _KINDS[kind][1]


def is_checksum(kind: str, text: str) -> bool:
    """Whether ``text`` may be a checksum of this kind."""
    return len(text) == digits(kind) and re.fullmatch(r"[0-9a-f]+", text) is not None
