"""Codes one chunk of a tensor against the same chunk of its base, exactly.

::

    method, data = encode_chunk(base, target, dtype)
    decode_chunk(method, data, base, dtype, out)          # out == target, byte for byte

Chunks are independent of each other. Both functions can be called from many threads, and spend nearly all
their time without the interpreter's lock. docs/format.md describes the methods.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import constants
from . import drift, exponent_window, floats, planes, sparse, words
from .sparse import Overwritten, Patch
from .ulp import FORMATS, FloatFormat

__all__ = [
    "MAX_CHUNK",
    "STANDALONE",
    "Method",
    "Overwritten",
    "Patch",
    "decode_chunk",
    "encode_chunk",
    "patch_chunk",
    "read_patch",
]

Bytes = NDArray[np.uint8]

MAX_CHUNK = 64 << 20  # in bytes; longer chunks are refused
_WORTH_A_LOOK = 0.55  # above this part of the target's length, a delta is compared with other methods

_TINY = 16  # bytes


class Method(IntEnum):
    """The method by which a chunk is coded. The numbers are part of the format."""

    SAME = constants.SAME  # equal to the base's chunk; no data
    RAW = 1  # the bytes themselves
    DELTA = constants.DELTA  # floats against the base's
    ALONE = 3  # floats by themselves
    PLANES = 4  # words of any type in byte planes, against the base if there is one
    ZSTD = 5  # one zstd frame
    SPARSE = constants.SPARSE  # floats, few of them changed, against the base's
    WINDOW = 7  # floats by themselves, with similar exponents
    DRIFT = constants.DRIFT  # floats against the base's after weight decay


#: The methods whose chunks are decoded without the base, even if there is one.
STANDALONE = frozenset({Method.RAW, Method.ALONE, Method.ZSTD, Method.WINDOW})
_METHODS = frozenset(Method)
_UNDER_DRIFT = (Method.SAME, Method.DELTA, Method.SPARSE)  # the methods allowed against a drifted base


def encode_chunk(
    base: Bytes | None, target: Bytes, dtype: str, *, quick: bool = False, changed: int | None = None
) -> tuple[Method, bytes]:
    """Code one chunk by the shortest of the methods worth trying.

    base     uint8[n] of the same dtype, or None for a chunk that has no counterpart
    target   uint8[n], a tensor's little-endian bytes; n is free, at most MAX_CHUNK
    dtype    safetensors' code, such as "BF16"; unknown ones are taken as bytes
    quick    if hardly anything changed, save time on both sides rather than the last bytes
    changed  number of elements that differ from the base's, if known

    Raises ValueError if the lengths differ or exceed MAX_CHUNK, or arrays are not uint8.
    """
    _check(base, target)
    if len(target) == 0 or (base is not None and _is_same(base, target, changed)):
        return (Method.RAW if base is None else Method.SAME), b""
    form = FORMATS.get(dtype)
    if form is None or len(target) % form.itemsize:
        return _shortest(target, _encode_generic(base, target, dtype))
    return _shortest(target, _encode_float(base, target, form, quick, changed))


def _is_same(base: Bytes, target: Bytes, changed: int | None = None) -> bool:
    """Whether both are equal; most unequal chunks differ early."""
    if changed is not None:
        return changed == 0
    return np.array_equal(base[:4096], target[:4096]) and np.array_equal(base, target)


Candidates = list[tuple[Method, bytes | None]]


def _shortest(target: Bytes, candidates: Candidates) -> tuple[Method, bytes]:
    found = [(method, data) for method, data in candidates if data is not None]
    method, data = min(found, key=lambda pair: len(pair[1]), default=(Method.RAW, b""))
    if not found or len(data) >= len(target):
        return Method.RAW, target.tobytes()
    return method, data


def _encode_float(
    base: Bytes | None, target: Bytes, form: FloatFormat, quick: bool, changed: int | None
) -> Candidates:
    candidates: Candidates = []
    limit = float(len(target))
    if base is not None:
        method, data = _encode_against(base, target, form, quick, changed)
        candidates.append((method, data))
        limit = len(target) if data is None else len(data)
        if limit < _WORTH_A_LOOK * len(target):
            return candidates
    if len(target) <= _TINY:
        return candidates  # no float method that codes the target alone has so few bytes
    alone, windowed = floats.alone_bits(target, form) / 8, exponent_window.window_bits(target, form) / 8
    if _repeats(target, min(alone, windowed, limit)):
        candidates.append((Method.ZSTD, planes.compress(target)))
    if windowed < min(alone, limit):
        candidates.append((Method.WINDOW, exponent_window.encode_window(target, form)))
    elif alone < limit:
        candidates.append((Method.ALONE, floats.encode_alone(target, form)))
    return candidates


def _encode_against(
    base: Bytes, target: Bytes, form: FloatFormat, quick: bool, changed: int | None, *, settled: bool = False
) -> tuple[Method, bytes | None]:
    """Code floats against the base's. `settled`: the base has drifted already."""
    data = sparse.encode_sparse(base, target, form, quick=quick, changed=changed)
    if data is not None:
        return Method.SPARSE, data
    shifts = None if settled else drift.find_shifts(base, target, form)
    if shifts is None:
        return Method.DELTA, floats.encode_delta(base, target, form)
    moved = drift.drifted(base, shifts, form)
    method, data = Method.SAME, b""
    if not _is_same(moved, target):
        method, data = _encode_against(moved, target, form, quick, None, settled=True)
    return Method.DRIFT, None if data is None else drift.put_head(shifts, method) + data


_PROBE = 1 << 15


def _repeats(target: Bytes, size: float) -> bool:
    """Whether zstd, judged by a sample, makes the target shorter than `size`."""
    start = max((len(target) - _PROBE) // 2, 0)
    probe = target[start : start + _PROBE]
    return len(planes.compress(probe, level=1)) / len(probe) < size / len(target)


def _encode_generic(base: Bytes | None, target: Bytes, dtype: str) -> Candidates:
    itemsize = words.ITEMSIZES.get(dtype, 1)
    candidates: Candidates = [(Method.PLANES, words.encode_planes(base, target, itemsize))]
    if _repeats(target, len(target)):
        candidates.append((Method.ZSTD, planes.compress(target)))
    return candidates


def decode_chunk(
    method: int,
    data: bytes | memoryview | Bytes,
    base: Bytes | None,
    dtype: str,
    out: Bytes,
    *,
    follows: bool = False,
) -> None:
    """Fill `out` with the chunk that `encode_chunk` coded as `(method, data)`.

    base   uint8[n], the same bytes as when encoding (None then, None now)
    out    uint8[n], writable, filled in full; the same array as base, if base is not needed afterwards
    follows  saves time if the bytes after base are the next chunk's base

    Raises PayloadError if the data cannot come from an encoder. Damaged data that happens to decode gives
    wrong bytes, so the caller keeps a digest of each chunk. Raises ValueError if the lengths of base and out
    differ or exceed MAX_CHUNK, or arrays are not as above.
    """
    _check(base, out, written=True)
    source = np.frombuffer(data, np.uint8)
    form = FORMATS.get(dtype)
    if form is not None and len(out) % form.itemsize:
        form = None
    if method not in _METHODS:
        raise PayloadError(f"method {method} is not known: the chunk is damaged, or a later version coded it")
    if method == Method.SAME and base is not None and len(source) == 0:
        if out is not base:
            out[:] = base
    elif method == Method.RAW and len(source) == len(out):
        out[:] = source
    elif method == Method.PLANES:
        words.decode_planes(source, base, words.ITEMSIZES.get(dtype, 1), out)
    elif method == Method.ZSTD:
        out[:] = planes.expand(source, len(out))
    elif form is None or not _decode_float(method, source, base, dtype, out, follows):
        raise PayloadError(f"method {method} cannot have {len(source)} bytes for this {dtype} chunk")


def _decode_float(
    method: int, data: Bytes, base: Bytes | None, dtype: str, out: Bytes, follows: bool
) -> bool:
    """Fill `out` by one of the methods for floats. Returns False if it is none of them, or lacks its base."""
    form = FORMATS[dtype]
    if method == Method.ALONE:
        floats.decode_alone(data, form, out)
    elif method == Method.WINDOW:
        exponent_window.decode_window(data, form, out)
    elif base is None:
        return False
    elif method == Method.DELTA:
        floats.decode_delta(data, base, form, out, follows=follows)
    elif method == Method.SPARSE:
        sparse.decode_sparse(data, base, form, out)
    elif method == Method.DRIFT:
        shifts, method, data = drift.take_head(data, form)
        if method not in _UNDER_DRIFT:
            raise PayloadError(f"a drifted chunk cannot be coded by method {method}")
        decode_chunk(method, data, drift.drifted(base, shifts, form), dtype, out)
    else:
        return False
    return True


def patch_chunk(
    method: int, data: bytes | memoryview | Bytes, chunk: Bytes, dtype: str
) -> Overwritten | None:
    """Turn a chunk from the base into the target in place, if the data is a short list of changes.

    chunk   uint8[n], writable: the base's bytes before, the target's after

    Returns the overwritten elements; None, and writes nothing, if the chunk is coded differently, has
    elements of 64 bits or is not aligned to its elements. Raises like `decode_chunk`, and then writes
    nothing.
    """
    _check(None, chunk, written=True)
    form = FORMATS.get(dtype)
    if method != Method.SPARSE or form is None or len(chunk) % form.itemsize:
        return None
    return sparse.patch_sparse(np.frombuffer(data, np.uint8), chunk, form)


def read_patch(method: int, data: Bytes, nbytes: int, dtype: str) -> Patch | None:
    """The changes in a chunk of `nbytes` bytes, if the data is a short list of them.

    Returns None if the chunk is coded differently or has elements of 64 bits. Raises PayloadError if data
    does not code such a chunk.
    """
    form = FORMATS.get(dtype)
    if method != Method.SPARSE or form is None or nbytes % form.itemsize:
        return None
    return sparse.read_patch(data, nbytes // form.itemsize, form)


def check_arrays(base: Bytes | None, chunk: Bytes, *, written: bool = False) -> None:
    """Raise ValueError if arrays are not of uint8, or `chunk` cannot be `written` to. Kernels get addresses,
    so NumPy would not stop them from writing, or from reading too far."""
    if any(side is not None and side.dtype != np.uint8 for side in (base, chunk)):
        raise ValueError("chunks must be arrays of uint8")
    if written and not chunk.flags.writeable:
        raise ValueError("the array to fill is read-only")


def _check(base: Bytes | None, chunk: Bytes, *, written: bool = False) -> None:
    check_arrays(base, chunk, written=written)
    if len(chunk) > MAX_CHUNK:
        raise ValueError(f"a chunk of {len(chunk)} bytes is longer than {MAX_CHUNK}")
    if base is not None and len(base) != len(chunk):
        raise ValueError(f"the base has {len(base)} bytes, the chunk {len(chunk)}")
