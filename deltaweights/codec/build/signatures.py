"""The kernels of a prebuilt library, each with the types that the codec calls it with.

A signature is (module, kernel, kinds), with one text for each argument: "i", "f" or "b" for an integer, a
float or a bool; for an array the code of its dtype and its number of dimensions, as in "u2.1"; for a tuple of
:mod:`..kernel_arrays` its name and what it holds, as in "RunSpace(u4.1,u2.1)".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Signature(NamedTuple):
    """A kernel and the kinds of its arguments."""

    module: str
    kernel: str
    kinds: tuple[str, ...]


_BYTES, _WORDS, _NUMBERS, _LONGS, _WIDE_LONGS = "u1.1", "u2.1", "u4.1", "i8.1", "u8.1"
_BYTE_ROWS, _NUMBER_ROWS, _INTEGER_ROWS, _LONG_ROWS = "u1.2", "u4.2", "i4.2", "i8.2"
_ELEMENTS = (_BYTES, _WORDS, _NUMBERS, _WIDE_LONGS)

_RUN = "RunSpace(u4.1,u2.1,u4.1,u4.2,u1.1,u4.1,u2.1,u1.1,i8.1)"
_OPEN = "OpenDelta(u1.1,u1.1,i,i,b,i,u4.2,i8.1,i,i,u1.1,i8.1,i8.1,u4.1,u4.1,u4.2,u2.1)"
_CHUNK = f"ChunkSpace({{e}},{{e}},u4.1,u1.1,u1.2,i8.1,f4.1,i8.1,u4.1,u1.1,{_RUN})"
_ROW = "RowSpace(u4.2,u4.1,u2.1,i8.1,u1.1,i8.1,i8.1,u4.1,u1.1,u1.1,u4.1,u4.1,{e},{e},u4.1)"


def signatures() -> Iterator[Signature]:
    """Every kernel that the codec calls, for every type that it calls it with."""
    for e in _ELEMENTS:
        yield from _of_all_elements(e)
    for e in _ELEMENTS[:3]:
        yield from _of_elements_of_32_bits_at_most(e)
    for e in _ELEMENTS[1:]:
        yield Signature("standalone", "join", (_NUMBERS, _BYTE_ROWS, e))
        yield Signature("standalone", "upper_words", (e, _NUMBERS))
    yield from _of_low_rank()
    yield from _of_one_type()


def _of_all_elements(e: str) -> Iterator[Signature]:
    chunk = _CHUNK.format(e=e)
    yield Signature(
        "standalone", "decode_joined", (_BYTES, _NUMBER_ROWS, _NUMBER_ROWS, _WORDS, _BYTE_ROWS, e)
    )
    yield Signature("standalone", "rotated_byte", (e, "i", _BYTES))
    yield Signature("standalone", "rotated_byte", (e, "i", _NUMBERS))
    yield Signature("rows", "compare", (_BYTES, e, _BYTES, e, "i", _LONG_ROWS))
    yield Signature("difference", "decode", (e, e, _OPEN))
    yield Signature("difference", "encode", (e, e, "i", "i", "b", _NUMBER_ROWS, chunk))
    yield Signature("subset", "choose", (e, e, "i", "i", "i", _BYTES, e))
    yield Signature("subset", "count_exponents", (e, "i", "i", _NUMBER_ROWS))
    outside = e if e == _WIDE_LONGS else _NUMBERS
    yield Signature("subset", "decode", (e, e, "i", _BYTES, _NUMBERS, outside, e, e, _OPEN))
    yield Signature("subset", "keep_outside", (e, "i", "i", "i", _NUMBERS, outside))


def _of_elements_of_32_bits_at_most(e: str) -> Iterator[Signature]:
    decode = "decode_wide" if e == _NUMBERS else "decode"
    row = _ROW.format(e=e)
    yield Signature(
        "rows", decode, (_BYTES, _BYTES, "i", _BYTES, e, _BYTES, e, "i", "i", _NUMBER_ROWS, row, "b1.1")
    )
    yield Signature("subset", "find_changes", (e, e, "i", "i", _NUMBERS, _NUMBERS, _BYTES, _NUMBERS))
    yield Signature("subset", "move", (e, _NUMBERS, _NUMBERS))
    yield Signature("subset", "restore_at", (e, _NUMBERS, _NUMBERS))


def _of_low_rank() -> Iterator[Signature]:
    single, matrix = "f4.1", "f4.2"
    for e in (_WORDS, _NUMBERS):
        factors = f"{e[:2]}.2"
        yield Signature(
            "low_rank",
            "decode_factors",
            (_BYTES, _BYTES, _BYTES, _LONGS, _NUMBER_ROWS, _NUMBER_ROWS, _NUMBERS, _WORDS, "i", factors),
        )
        outside = (_NUMBER_ROWS, matrix, matrix, single)
        yield Signature(
            "low_rank_fit",
            "fit_rows",
            (e, e, single, single, "i", matrix, matrix, matrix, "i", matrix, "f", *outside),
        )
    yield Signature(
        "low_rank",
        "predict",
        (_WORDS, _WORDS, "i", "i", _NUMBER_ROWS, _NUMBER_ROWS, single, "f", "b", "b"),
    )
    yield Signature(
        "low_rank", "predict_wide", (_NUMBERS, _NUMBERS, "i", "i", "f8.2", "f8.2", single, "f", "b")
    )


def _of_one_type() -> Iterator[Signature]:
    run = (_BYTES, _NUMBERS, _LONGS, _NUMBER_ROWS, "i", "i", "i", "f", _RUN, "i")
    yield Signature("standalone", "byte_bits", (_BYTES, "i"))
    yield Signature("standalone", "enter_window", (_NUMBERS, "i", "i", _NUMBERS))
    yield Signature("difference", "collect_moves", (_NUMBERS, _NUMBERS, "i", "i", _INTEGER_ROWS, _LONGS))
    yield Signature("difference", "drift", (_NUMBERS, _NUMBERS, "i", "i", _NUMBERS))
    yield Signature("difference", "fit_shifts", (_INTEGER_ROWS, _LONGS, _NUMBERS))
    for out in (_BYTES, _NUMBERS):
        yield Signature("runs", "decode_list", (_BYTES, _NUMBER_ROWS, "i", "i", _NUMBER_ROWS, _WORDS, out))
    yield Signature("runs", "decode_lists", (_BYTES, _NUMBER_ROWS, _NUMBER_ROWS, _WORDS, _NUMBER_ROWS))
    yield Signature("runs", "encode_run", run)
