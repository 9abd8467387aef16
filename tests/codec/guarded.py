"""Kernels whose arrays lie between pages that may not be touched: a step too far ends the process.

Run as a program: every case of test_damage.py, and more, there and back, then damaged.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaweights.codec import RECORD, compare_row, compiled, decode_chunk, decode_row, encode_chunk
from deltaweights.codec import rows as payload_module
from deltaweights.codec.low_rank import LowRank
from deltaweights.codec.methods.ulp import FORMATS
from deltaweights.errors import PayloadError
from deltaweights.payload import CHUNK_BYTES, encode

from .pairs import Bytes, fine_tune, noise
from .test_damage import Case, cases, damaged
from .test_low_rank_search import found, merge

_PAGE = mmap.PAGESIZE
_DAMAGES = 25  # of each payload
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_rooms: dict[object, Bytes] = {}


def _room(key: object, size: int) -> Bytes:
    """Memory between two such pages, at least `size` bytes and whole pages, kept by key."""
    if len(_rooms.get(key, b"")) < size:
        whole = -(-size // _PAGE) * _PAGE
        room = np.frombuffer(mmap.mmap(-1, whole + 2 * _PAGE), np.uint8)
        for page in (room.ctypes.data, room.ctypes.data + _PAGE + whole):
            assert _mprotect(page, _PAGE, 0) == 0
        _rooms[key] = room[_PAGE : _PAGE + whole]
    return _rooms[key]


def guard(at_end: bool) -> None:
    """Have all kernels work on copies of their arrays that begin, or end, at such a page."""
    call = compiled.Kernel.__call__

    def guarded(kernel: compiled.Kernel, *arguments: Any) -> Any:
        moved: dict[tuple[int, int], tuple[NDArray[Any], Bytes]] = {}  # by place: base and out may be one

        def move(argument: Any, *key: object) -> Any:
            argument = argument.space if isinstance(argument, compiled.Held) else argument
            if isinstance(argument, tuple):
                return type(argument)(*(move(part, *key, n) for n, part in enumerate(argument)))
            if not isinstance(argument, np.ndarray) or not argument.nbytes:
                return argument
            place, size = (argument.ctypes.data, argument.nbytes), argument.nbytes
            if place not in moved:
                room = _room(key, size)
                room = room[-size:] if at_end else room[:size]
                room[:] = argument.reshape(-1).view(np.uint8)
                moved[place] = argument, room
            return moved[place][1].view(argument.dtype).reshape(argument.shape)

        given = [move(argument, kernel._module, kernel._name, n) for n, argument in enumerate(arguments)]
        result = call(kernel, *given)
        for argument, room in moved.values():
            if argument.flags.writeable:
                argument.reshape(-1).view(np.uint8)[:] = room
        return result

    compiled.Kernel.__call__ = guarded  # type: ignore[method-assign, assignment]


def _all_cases() -> Iterator[Case]:
    yield from cases().values()
    for dtype in FORMATS:
        for count in (1, 63, 64, 65, 513, 4097):
            yield dtype, *fine_tune(dtype, count, 1e-2, seed=count)
        yield dtype, noise(dtype, 700, 1), noise(dtype, 700, 2)
        yield dtype, None, fine_tune(dtype, 700, 0)[0]


def _decode_rows(base: Bytes, target: Bytes, dtype: str, rng: np.random.Generator) -> None:
    """As part of a row, which believes its records, chunks are decoded by a kernel of their own."""
    payload = np.frombuffer(encode(base, target, dtype), np.uint8)
    record, data = payload[: RECORD.itemsize].view(RECORD).copy(), payload[RECORD.itemsize :]
    compare_row(base, target, dtype, CHUNK_BYTES)
    damages = (np.frombuffer(damaged(data.tobytes(), rng), np.uint8) for _ in range(_DAMAGES))
    for part in (data, *(damages if len(data) else ())):
        record["length"], out = len(part), np.empty_like(target)
        payload_module._kept.__dict__.clear()  # working memory just as long as this chunk needs
        if decode_row(record, part, base, dtype, out, CHUNK_BYTES)[0]:
            assert np.array_equal(out, target)


def _predict(dtype: str, rng: np.random.Generator) -> None:
    """Found, and predicted from any element on; then damaged."""
    base, target = merge(130, 257, 5, dtype)
    data = found(base, target, (130, 257), dtype)
    assert data
    for part in (data, *(damaged(data, rng) for _ in range(_DAMAGES))):
        try:
            prediction = LowRank.parse(part, dtype, 130 * 257)
        except PayloadError:
            continue
        for start, stop in ((0, 130), (3, 7), (129, 130)):
            size = len(base) // 130 // 257
            prediction.predict(base[start * 250 * size : stop * 257 * size], start * 250)


def main() -> None:
    """Raise where bytes come back wrong, end where a kernel leaves its arrays."""
    rng = np.random.default_rng(0)
    plain = compiled.Kernel.__call__
    for at_end in (False, True):
        compiled.Kernel.__call__ = plain  # type: ignore[method-assign]
        guard(at_end)
        for dtype in ("BF16", "F16", "F32"):
            _predict(dtype, rng)
        for dtype, base, target in _all_cases():
            method, data = encode_chunk(base, target, dtype)
            out = np.empty_like(target)
            decode_chunk(method, data, base, dtype, out)
            assert np.array_equal(out, target)
            for _ in range(_DAMAGES if len(data) else 0):
                try:
                    decode_chunk(method, damaged(data, rng), base, dtype, out)
                except PayloadError:
                    continue
            if base is not None:
                _decode_rows(base, target, dtype, rng)


if __name__ == "__main__":
    main()
