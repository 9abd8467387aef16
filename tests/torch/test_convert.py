"""The base in the target's dtype: what torch does, except for NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.dtypes import DTYPE_BITS

from ..codec.test_convert import FLOATS, NAN, PAIRS, Bits, converted, patterns

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_all_patterns_or_many_are_converted_as_torch_does(source: str, target: str) -> None:
    _check_against_torch(patterns(source), source, target)


@pytest.mark.parametrize("source", ["F32", "F64"])
@given(st.data())
def test_any_value_is_converted_as_torch_does(source: str, data: st.DataObject) -> None:
    width = DTYPE_BITS[source]
    values = st.floats(width=32 if width == 32 else 64).map(lambda value: _bits_of(value, source))
    drawn = data.draw(st.lists(values | st.integers(0, 2**width - 1), max_size=20))
    for target in set(FLOATS) - {source}:
        _check_against_torch(np.array(drawn, f"<u{width // 8}"), source, target)


def _bits_of(value: float, dtype: str) -> int:
    size = DTYPE_BITS[dtype] // 8
    with np.errstate(over="ignore"):
        return int(np.array([value], f"<f{size}").view(f"<u{size}")[0])


def _as_torch(bits: Bits, dtype: str) -> torch.Tensor:
    signed = bits.view(f"<i{bits.itemsize}").copy()
    return torch.from_numpy(signed).view(TORCH[dtype])


def _from_torch(tensor: torch.Tensor) -> Bits:
    size = tensor.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.view(integer).numpy().view(f"<u{size}")


def _check_against_torch(bits: Bits, source: str, target: str) -> None:
    values = _as_torch(bits, source)
    through_f32 = values.to(torch.float32).to(TORCH[target])
    expected = _from_torch(through_f32).copy()
    sign = bits >> (DTYPE_BITS[source] - 1)
    nan = torch.isnan(values).numpy()
    expected[nan] = NAN[target]
    expected[nan] |= sign[nan].astype(expected.dtype) << (DTYPE_BITS[target] - 1)
    assert np.array_equal(converted(bits, source, target), expected)
    direct = _from_torch(values.to(TORCH[target]))
    assert np.array_equal(direct[~nan], expected[~nan]), "torch's own cast is another"
