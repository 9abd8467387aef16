"""What a sample says of one tensor of the model and its counterpart in a candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..codec import QUANTIZED, is_convertible
from ..dtypes import DTYPES
from .sampling import ReadSample, SampledElements, same_values

#: Tensors of whose elements as much as this follows from their neighbors in the row and the column are made
#: by a rule, not by training: masks, tables of positions. So many elements tell.
_SMOOTH, _LOOKED_AT = 0.6, 1 << 14

#: A tensor of so many different values says no more than that its kind has them: identities, masks.
_FEW_VALUES = 2

#: Numbers whose mean is this many times their spread or more are much the same in all models: scales, norms.
_FLAT = 4

#: A copy in another dtype differs by rounding alone: its squared distance is at most so many times that of
#: rounding, and nearly all elements are equal in the coarser dtype (but for those that were rounded twice).
_ROUNDED, _ROUNDED_ALIKE = 1.5, 0.85

#: How many more zeros, as a part of the elements, show that one of two was pruned since.
_PRUNED = 0.04

#: Elements of a quantized tensor that mostly have one scale.
_SEGMENT = 32

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TensorMeasures:
    """A tensor of the model beside its counterpart, by their sample.

    Attributes:
        name: the tensor's name.
        elements: how many were compared.
        cosine: of the angle between both, their means taken away: 0 for weights that have nothing in common,
            give or take ``1 / sqrt(elements)``, and 1 for equal ones.
        equal: the part of the elements that are equal in the coarser of both dtypes.
        exponents: the part whose signs and exponents are equal.
        bits, bits_alone: bits for each weight that the codec takes with the candidate as the base, and with
            none; None where dtypes rule that out.
        size, distance: the squared size of the model's elements, and their squared distance from the
            candidate's.
        growth: how much larger the squared size of the model's elements is than that of the candidate's,
            measured by their squared distance; see :mod:`.directions`.
        growth_error: the standard deviation of that, if updates are independent of the weights.
        is_copy: whether both are the same but for rounding to the coarser of their dtypes.
        zeroed, candidate_zeroed: the part of the elements that were set to zero in one of the two, beyond
            the other's; these are left out of all else.
        is_reordered: whether both have the same elements in another order, which shows where all are read.
    """

    name: str
    elements: int
    cosine: float
    equal: float
    exponents: float
    bits: float | None
    bits_alone: float | None
    size: float
    distance: float
    growth: float
    growth_error: float
    is_copy: bool
    zeroed: float
    candidate_zeroed: float
    is_reordered: bool


@dataclass(frozen=True, slots=True, eq=False)
class SampledProducts:
    """Scalar products of a tensor's sample and those of all candidates.

    Attributes:
        products: float64[n + 1, n + 1]; the model comes first. Not a number where one has no counterpart.
        rounding: the squared error that rounding to the coarsest of all dtypes makes on average.
        elements: how many were read.
    """

    products: _Numbers
    rounding: float
    elements: int


def is_telling(sample: SampledElements, width: int) -> bool:
    """Whether weights can be told by this sample: whether it looks trained or drawn, not made by a rule.

    Args:
        width: the elements of a row.
    """
    values = sample.values[:_LOOKED_AT].astype(np.float64)
    if not float(values.std()) * _FLAT > float(np.abs(values).mean()):
        return False
    return np.unique(values).size > _FEW_VALUES and _predictable(values, width) < _SMOOTH


def _predictable(values: _Numbers, width: int) -> float:
    """The part of the variance that follows from the two elements before each one, in its row and in its
    column."""
    lags = [lag for lag in sorted({1, 2, width, 2 * width}) if lag < len(values) // 2]
    if not lags:
        return 0.0
    values = values - values.mean()
    after = values[lags[-1] :]
    before = np.stack([values[lags[-1] - lag : len(values) - lag] for lag in lags])
    matrix, right = np.einsum("ik,jk->ij", before, before), np.einsum("ik,k->i", before, after)
    total = _dot(after, after)
    return float(right @ np.linalg.pinv(matrix, hermitian=True) @ right) / total if total > 0 else 1.0


def _dot(ones: _Numbers, others: _Numbers) -> float:
    """The scalar product, on this thread: those of BLAS wait for each other at vectors of this length."""
    return float(np.einsum("i,i", ones, others))


def _cosine(ones: _Numbers, others: _Numbers) -> float:
    ones, others = ones - ones.mean(), others - others.mean()
    sizes = math.sqrt(_dot(ones, ones) * _dot(others, others))
    return _dot(ones, others) / sizes if sizes > 0 else 0.0


def measure(sample: ReadSample, *, codes: bool = True) -> list[TensorMeasures | None]:
    """What the sample says of each candidate; None where it says nothing.

    Args:
        codes: whether the sample is also encoded, to tell how many bits a weight takes.
    """
    width, model = sample.tensor.info.shape[-1], sample.model
    if not is_telling(model, width):
        return [None for _ in sample.candidates]
    alone = _bits(model, None) if codes else None
    return [
        _measured(sample.tensor.name, model, other, alone) if other and is_telling(other, width) else None
        for other in sample.candidates
    ]


def _measured(
    name: str, model: SampledElements, other: SampledElements, alone: float | None
) -> TensorMeasures:
    """A tensor beside its counterpart; ``alone``: what the codec takes without a base, if that matters."""
    ours, theirs = model.values.astype(np.float64), other.values.astype(np.float64)
    is_scaled = model.dtype in QUANTIZED or other.dtype in QUANTIZED
    if is_scaled:
        theirs *= _dot(ours, theirs) / _dot(theirs, theirs)
    apart = ours - theirs
    distance, gains = _dot(apart, apart), apart * (ours + theirs)
    growth = growth_error = 0.0
    if distance > 0 and not is_scaled:
        growth = float(gains.sum()) / distance
        growth_error = math.sqrt(_dot(gains, gains)) / distance
    same = same_values(model, other)
    more_zeros = 0.0 if is_scaled else model.pruned - other.pruned
    return TensorMeasures(
        name=name,
        elements=ours.size,
        cosine=_cosine(ours, theirs),
        equal=float(same.mean()),
        exponents=float((_exponents(model) == _exponents(other)).mean()),
        bits=None if alone is None else _bits(model, other),
        bits_alone=alone,
        size=_dot(ours, ours),
        distance=distance,
        growth=growth,
        growth_error=growth_error,
        is_copy=_is_copy(model, other, float(same.mean()), distance),
        zeroed=more_zeros if more_zeros > _PRUNED else 0.0,
        candidate_zeroed=-more_zeros if more_zeros < -_PRUNED else 0.0,
        is_reordered=not same.all() and _are_reordered(ours, theirs),
    )


def _are_reordered(ones: _Numbers, others: _Numbers) -> bool:
    """Whether both have the same numbers in any order; the largest ones nearly always tell without a sort."""
    return bool(ones.max() == others.max() and (np.sort(ones) == np.sort(others)).all())


def _is_copy(model: SampledElements, other: SampledElements, equal: float, distance: float) -> bool:
    """Whether both are the same but for rounding; ``equal``: the part that is equal in the coarser dtype;
    ``distance``: their squared distance."""
    if equal == 1 or model.dtype == other.dtype:
        return equal == 1
    if model.dtype in QUANTIZED or other.dtype in QUANTIZED:
        return _is_quantized_copy(*((other, model) if model.dtype in QUANTIZED else (model, other)))
    rounding = _rounding(model, min(_precision(model), _precision(other)))
    return equal > _ROUNDED_ALIKE and distance < _ROUNDED * rounding


def _is_quantized_copy(plain: SampledElements, quantized: SampledElements) -> bool:
    """Whether the second is the first but for rounding, by short segments, most of which have one scale."""
    count = quantized.values.size // _SEGMENT
    if plain.dtype in QUANTIZED or not count:
        return False
    ours, theirs = (
        one.values[: count * _SEGMENT].astype(np.float64).reshape(count, _SEGMENT)
        for one in (plain, quantized)
    )
    sizes, products = (np.einsum("ij,ij->i", theirs, one) for one in (theirs, ours))
    used = (sizes > 0) & (products > 0)
    if 2 * int(used.sum()) < count:
        return False
    apart = ours[used] * (sizes[used] / products[used])[:, None] - theirs[used]
    units = np.ones_like(apart)
    if mantissa := _precision(quantized):
        units = np.ldexp(1.0, np.frexp(theirs[used])[1] - 1 - mantissa)
    rounding = (units**2).sum(axis=1) / 12
    return float(np.median((apart**2).sum(axis=1) / rounding)) < _ROUNDED


def _exponents(sample: SampledElements) -> NDArray[np.uint32]:
    """Sign and exponent of each element, as float32 has them."""
    return np.right_shift(sample.values.view(np.uint32), np.uint32(23))


def _bits(model: SampledElements, other: SampledElements | None) -> float | None:
    """What the codec takes for a weight, with the other's as the base or with none; None where the one cannot
    be converted to the other."""
    dtype, data = model.dtype, model.data[: codec.MAX_CHUNK]
    if other and not is_convertible(other.dtype, dtype):
        return None
    base = codec.convert(other.data, other.dtype, dtype)[: data.size] if other else None
    return 8 * len(codec.encode_chunk(base, data, dtype)[1]) / (data.size // (DTYPES[dtype].bits // 8))


def products_of(sample: ReadSample) -> SampledProducts:
    """The scalar products of all samples of a tensor."""
    count = sample.model.values.size
    missing = np.full(count, np.nan)
    rows = [sample.model, *sample.candidates]
    # Quantized ones have scales that are not known: their places are not, either.
    matrix = np.stack(
        [missing if one is None or one.dtype in QUANTIZED else one.values.astype(np.float64) for one in rows]
    )
    rounding = _rounding(sample.model, min(_precision(one) for one in rows if one))
    return SampledProducts(np.einsum("ik,jk->ij", matrix, matrix), rounding, count)


def _precision(sample: SampledElements) -> int:
    """The bits of the mantissa; 0 for integers."""
    return DTYPES[sample.dtype].mantissa


def _rounding(sample: SampledElements, mantissa: int) -> float:
    """The sum of the squared errors of rounding to so many bits, each even within half a unit in the last
    place."""
    _, exponents = np.frexp(sample.values)
    units = np.ldexp(1.0, exponents - 1 - mantissa)
    return float((units[sample.values != 0] ** 2).sum()) / 12
