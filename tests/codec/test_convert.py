"""The base in the target's dtype, by the rule of docs/format.md; tests/torch compares it with torch's."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.codec import convert, is_convertible, rescale
from deltaweights.dtypes import DTYPE_BITS

FLOATS = ["BF16", "F16", "F32", "F64"]
PAIRS = list(permutations(FLOATS, 2))
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
#: The one quiet NaN of each dtype, with the sign bit clear.
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_nan_becomes_the_quiet_one_of_its_sign(source: str, target: str) -> None:
    width = DTYPE_BITS[source]
    infinity, sign = INFINITY[source], 1 << (width - 1)
    payloads = [1, 2, NAN[source] - infinity, NAN[source] - infinity + 1, (1 << (width - 1)) - 1 - infinity]
    bits = np.array([s | infinity + payload for s in (0, sign) for payload in payloads], f"<u{width // 8}")
    positive, negative = NAN[target], NAN[target] | 1 << (DTYPE_BITS[target] - 1)
    assert converted(bits, source, target).tolist() == [positive] * 5 + [negative] * 5


@pytest.mark.parametrize(
    ("source", "target", "value", "expected"),
    [
        ("F32", "BF16", 0x3F808000, 0x3F80),  # a tie goes to the even neighbor, here down
        ("F32", "BF16", 0x3F818000, 0x3F82),  # here up
        ("F32", "BF16", 0x3F808001, 0x3F81),  # just above a tie
        ("F32", "BF16", 0x3F807FFF, 0x3F80),  # just below one
        ("F32", "BF16", 0x7F7FFFFF, 0x7F80),  # the largest number overflows to infinity
        ("F32", "BF16", 0xFF7FFFFF, 0xFF80),
        ("F32", "BF16", 0x7F7F7FFF, 0x7F7F),
        ("F32", "BF16", 0x00000001, 0x0000),  # subnormal numbers are kept as far as they go
        ("F32", "BF16", 0x00018000, 0x0002),
        ("F32", "BF16", 0x80010000, 0x8001),
        ("F32", "BF16", 0x80000000, 0x8000),  # -0
        ("F32", "BF16", 0x7F800000, 0x7F80),
        ("F32", "BF16", 0x7F800001, 0x7FC0),  # a NaN whose upper half would be infinity's
        ("F32", "F16", 0x477FEFFF, 0x7BFF),
        ("F32", "F16", 0x477FF000, 0x7C00),  # 65520 overflows
        ("F32", "F16", 0x33800000, 0x0001),  # the smallest subnormal number
        ("F32", "F16", 0x33000000, 0x0000),  # half of it is a tie: to even
        ("F32", "F16", 0x33000001, 0x0001),
        ("F16", "F32", 0x0001, 0x33800000),
        ("BF16", "F16", 0x4780, 0x7C00),  # 65536
        ("F16", "BF16", 0x3C04, 0x3F80),  # 1 + 2**-8: a tie
        ("BF16", "F64", 0x0001, 0x37A0000000000000),
        ("F64", "F32", 0x47EFFFFFF0000000, 0x7F800000),  # rounds up to infinity
        ("F64", "F32", 0x36A0000000000000, 0x00000001),
        ("F64", "F32", 0x3690000000000000, 0x00000000),
        # Two roundings: 1 + 2**-8 + 2**-40 is above the tie, but as F32 it is the tie.
        ("F64", "BF16", 0x3FF0100000001000, 0x3F80),
        ("F64", "F16", 0x3FF0020000001000, 0x3C00),
    ],
)
def test_the_edges(source: str, target: str, value: int, expected: int) -> None:
    bits = np.array([value], f"<u{DTYPE_BITS[source] // 8}")
    assert [hex(found) for found in converted(bits, source, target).tolist()] == [hex(expected)]


@pytest.mark.parametrize(
    ("source", "target"), [("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F32", "F64")]
)
def test_widening_and_back_loses_nothing_but_nan_payloads(source: str, target: str) -> None:
    bits = patterns(source)
    back = converted(converted(bits, source, target), target, source)
    nan = bits & ((1 << (DTYPE_BITS[source] - 1)) - 1) > INFINITY[source]
    assert np.array_equal(back[~nan], bits[~nan])


@pytest.mark.parametrize("dtype", [*FLOATS, "U8", "F4", "A_DTYPE_OF_THE_FUTURE"])
def test_one_dtype_is_not_converted_at_all(dtype: str) -> None:
    """All bits stay, of NaNs too."""
    data = np.arange(256, dtype=np.uint8)
    assert convert(data, dtype, dtype).tobytes() == data.tobytes()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_no_elements_are_no_elements(source: str, target: str) -> None:
    assert convert(np.empty(0, np.uint8), source, target).size == 0


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_input_is_left_as_it_was(source: str, target: str) -> None:
    data = patterns(source)[:1000].view(np.uint8)
    data.flags.writeable = False
    before = data.tobytes()
    convert(data, source, target)
    assert data.tobytes() == before


def test_there_is_a_rule_for_floats_of_16_bits_and_more() -> None:
    known = {(a, b) for a in DTYPE_BITS for b in DTYPE_BITS if is_convertible(a, b)}
    assert known == {(a, b) for a in FLOATS for b in FLOATS}


@pytest.mark.parametrize(("source", "target"), [("I32", "F32"), ("BF16", "F8_E4M3"), ("?", "BF16")])
def test_what_has_no_rule_is_a_value_error(source: str, target: str) -> None:
    assert not is_convertible(source, target)
    with pytest.raises(ValueError, match=f"no rule to convert .?{source}"):
        convert(np.zeros(8, np.uint8), source, target)


@given(st.integers(0, 2**40), st.sampled_from([(a, b) for a in FLOATS for b in FLOATS]))
def test_rescale_counts_the_bytes_of_the_same_elements(elements: int, pair: tuple[str, str]) -> None:
    old, new = (DTYPE_BITS[dtype] // 8 for dtype in pair)
    assert rescale(elements * old, *pair) == elements * new


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_rescale_and_convert_agree(source: str, target: str) -> None:
    data = patterns(source)[:77].view(np.uint8)
    assert convert(data, source, target).size == rescale(data.size, source, target)


# Helpers ---------------------------------------------------------------------------------------------

Bits = NDArray[Any]


def patterns(dtype: str) -> Bits:
    """All 65536 patterns of a narrow dtype; of a wide one, all values of the narrow ones, what lies about
    them, and about a million random patterns."""
    width = DTYPE_BITS[dtype]
    if width == 16:
        return np.arange(1 << 16, dtype="<u2")
    random = np.frombuffer(np.random.default_rng(width).bytes(1 << 20), f"<u{width // 8}")
    exact = np.concatenate([_widened(name, f"<f{width // 8}") for name in ("BF16", "F16")]).view(random.dtype)
    half = np.asarray(1 << (15 if width == 32 else 44), exact.dtype)  # where ties are
    return np.concatenate([random, exact, exact + half, exact + half - 1, exact + half + 1])


def converted(bits: Bits, source: str, target: str) -> Bits:
    return convert(bits.view(np.uint8), source, target).view(f"<u{DTYPE_BITS[target] // 8}")


def _widened(dtype: str, wide: str) -> NDArray[Any]:
    """Every value of a narrow dtype, as NumPy's wider one."""
    every = np.arange(1 << 16, dtype="<u2")
    values = every.view("<f2") if dtype == "F16" else (every.astype("<u4") << 16).view("<f4")
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return values.astype(wide)
