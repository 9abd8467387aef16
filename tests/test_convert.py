"""The base in the target's dtype: the rule of docs/format.md, which is what torch does but for NaN."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.checkpoint import DTYPE_BITS
from deltaweights.codec import convert, is_convertible, rescale

FLOATS = ["BF16", "F16", "F32", "F64"]
PAIRS = list(permutations(FLOATS, 2))
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
#: The one quiet NaN of each dtype, with the sign bit clear.
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_all_patterns_or_many_are_converted_as_torch_does(source: str, target: str) -> None:
    """All 65536 patterns of the narrow types; of the wide ones, all of BF16's and F16's values and a
    million random ones."""
    bits = _patterns(source)
    _check_against_torch(bits, source, target)


@pytest.mark.parametrize("source", ["F32", "F64"])
@given(st.data())
def test_any_value_is_converted_as_torch_does(source: str, data: st.DataObject) -> None:
    width = DTYPE_BITS[source]
    values = st.floats(width=32 if width == 32 else 64).map(lambda value: _bits([value], source)[0])
    patterns = data.draw(st.lists(values | st.integers(0, 2**width - 1), max_size=20))
    for target in set(FLOATS) - {source}:
        _check_against_torch(np.array(patterns, f"<u{width // 8}"), source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_nan_becomes_the_quiet_one_of_its_sign(source: str, target: str) -> None:
    width = DTYPE_BITS[source]
    infinity, sign = int(_bits([np.inf], source)[0]), 1 << (width - 1)
    payloads = [1, 2, NAN[source] - infinity, NAN[source] - infinity + 1, (1 << (width - 1)) - 1 - infinity]
    bits = np.array([s | infinity + payload for s in (0, sign) for payload in payloads], f"<u{width // 8}")
    positive, negative = NAN[target], NAN[target] | 1 << (DTYPE_BITS[target] - 1)
    assert _convert(bits, source, target).tolist() == [positive] * 5 + [negative] * 5


@pytest.mark.parametrize(
    ("source", "target", "value", "expected"),
    [
        ("F32", "BF16", 0x3F808000, 0x3F80),  # a tie goes to the even neighbour, here down
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
    assert [hex(found) for found in _convert(bits, source, target).tolist()] == [hex(expected)]


@pytest.mark.parametrize(
    ("source", "target"), [("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F32", "F64")]
)
def test_widening_and_back_loses_nothing_but_nan_payloads(source: str, target: str) -> None:
    bits = _patterns(source)
    back = _convert(_convert(bits, source, target), target, source)
    nan = np.isnan(_as_torch(bits, source).to(torch.float64).numpy())
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
    data = _patterns(source)[:1000].view(np.uint8)
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
    data = _patterns(source)[:77].view(np.uint8)
    assert convert(data, source, target).size == rescale(data.size, source, target)


# Helpers ---------------------------------------------------------------------------------------------

Bits = NDArray[Any]


def _patterns(dtype: str) -> Bits:
    width = DTYPE_BITS[dtype]
    if width == 16:
        return np.arange(1 << 16, dtype="<u2")
    random = np.frombuffer(np.random.default_rng(width).bytes(1 << 20), f"<u{width // 8}")
    narrow = np.concatenate([_as_torch(_patterns(n), n).to(TORCH[dtype]).numpy() for n in ("BF16", "F16")])
    # Values about the narrow ones, where ties are.
    exact = narrow.view(f"<u{width // 8}")
    half = np.asarray(1 << (15 if width == 32 else 44), exact.dtype)
    return np.concatenate([random, exact, exact + half, exact + half - 1, exact + half + 1])


def _bits(values: list[float], dtype: str) -> Bits:
    with np.errstate(over="ignore"):
        tensor = torch.tensor(values, dtype=torch.float64).to(TORCH[dtype])
    return _from_torch(tensor)


def _as_torch(bits: Bits, dtype: str) -> torch.Tensor:
    signed = bits.view(f"<i{bits.itemsize}").copy()
    return torch.from_numpy(signed).view(TORCH[dtype])


def _from_torch(tensor: torch.Tensor) -> Bits:
    size = tensor.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.view(integer).numpy().view(f"<u{size}")


def _convert(bits: Bits, source: str, target: str) -> Bits:
    return convert(bits.view(np.uint8), source, target).view(f"<u{DTYPE_BITS[target] // 8}")


def _check_against_torch(bits: Bits, source: str, target: str) -> None:
    values = _as_torch(bits, source)
    through_f32 = values.to(torch.float32).to(TORCH[target])
    expected = _from_torch(through_f32).copy()
    sign = bits >> (DTYPE_BITS[source] - 1)
    nan = torch.isnan(values).numpy()
    expected[nan] = NAN[target]
    expected[nan] |= sign[nan].astype(expected.dtype) << (DTYPE_BITS[target] - 1)
    assert np.array_equal(_convert(bits, source, target), expected)
    direct = _from_torch(values.to(TORCH[target]))
    assert np.array_equal(direct[~nan], expected[~nan]), "torch's own cast is another"
