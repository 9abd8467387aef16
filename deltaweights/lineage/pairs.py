"""What the tensors' samples say together of a model and one candidate, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..match.candidates import fold, layer_of
from .directions import Growth, growth_of
from .measures import TensorMeasures
from .scale import is_alike, is_unlike

#: Samples of the bootstrap (Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics
#: 7, 1979), and the part of them that lies outside the error bar on each side.
_RESAMPLED, _OUTSIDE = 400, 2.5

#: Most layers and kinds that are told of.
_MOST_GROUPS = 256


@dataclass(frozen=True, slots=True)
class Agreement:
    """Tensors of one layer, or of one kind in all layers.

    Attributes:
        name: the layer's number (empty for tensors outside of layers), or the kind's name with ``*`` for
            numbers.
        tensors: how many were compared.
        cosine: the mean of their cosines; see :class:`PairMeasures`.
        equal: the part of their sampled weights that are equal.
    """

    name: str
    tensors: int
    cosine: float
    equal: float


@dataclass(frozen=True, slots=True)
class PairMeasures:
    """A model's weights beside a candidate's, by the sample.

    Attributes:
        tensors, elements: how many were compared.
        coverage: the part of the model's weights that stand in tensors of which a sample was compared or
            could have been.
        cosine: of the angle between the weights, their means taken away, the mean over tensors: 0 for models
            that have nothing in common, 1 for equal ones.
        cosine_low, cosine_high: its error bar, of 95%, by a bootstrap over tensors.
        alike: the part of the tensors that are of common origin beyond doubt.
        unlike: the part of the tensors that have nothing in common.
        equal: the part of the weights that are equal, in the coarser of both dtypes.
        exponents: the part whose signs and exponents are equal.
        bits_per_weight: what the codec takes for a weight with the candidate as the base, as far as the
            sample tells; None where dtypes rule it out.
        bits_alone: what it takes without a base.
        distance: the size of the difference by the size of the model's weights.
        growth: which of the two came first, as far as weights tell; see :class:`Growth`.
        is_copy: whether all of the sample is the same, but for rounding to the coarser dtype, and for what
            was set to zero.
        zeroed, candidate_zeroed: the part of the weights that were set to zero in one of the two, beyond the
            other's.
        reordered: the part of the tensors that have the same elements in another order.
    """

    tensors: int
    elements: int
    coverage: float
    cosine: float
    cosine_low: float
    cosine_high: float
    alike: float
    unlike: float
    equal: float
    exponents: float
    bits_per_weight: float | None
    bits_alone: float | None
    distance: float
    growth: Growth | None
    is_copy: bool
    zeroed: float
    candidate_zeroed: float
    reordered: float


def summarize_pair(tensors: Sequence[TensorMeasures], coverage: float) -> PairMeasures | None:
    """The measures of all tensors together; None if there are none."""
    if not tensors:
        return None
    cosines = np.array([one.cosine for one in tensors])
    chosen = np.random.default_rng(0).integers(len(cosines), size=(_RESAMPLED, len(cosines)))
    low, high = np.percentile(cosines[chosen].mean(axis=1), (_OUTSIDE, 100 - _OUTSIDE))
    elements = np.array([one.elements for one in tensors])

    def weighted(field: Callable[[TensorMeasures], float]) -> float:
        return float(np.average([field(one) for one in tensors], weights=elements))

    coded = [one for one in tensors if one.bits is not None]
    size, distance = (sum(getattr(one, name) for one in tensors) for name in ("size", "distance"))
    return PairMeasures(
        tensors=len(tensors),
        elements=int(elements.sum()),
        coverage=coverage,
        cosine=float(cosines.mean()),
        cosine_low=float(low),
        cosine_high=float(high),
        alike=float(np.mean([is_alike(one) for one in tensors])),
        unlike=float(np.mean([is_unlike(one) for one in tensors])),
        equal=weighted(lambda one: one.equal),
        exponents=weighted(lambda one: one.exponents),
        bits_per_weight=_mean(one.bits for one in coded),
        bits_alone=_mean(one.bits_alone for one in coded),
        distance=float(np.sqrt(distance / size)) if size > 0 else 0.0,
        growth=growth_of([(one.growth, one.growth_error) for one in tensors if is_alike(one)]),
        is_copy=all(one.is_copy for one in tensors),
        zeroed=weighted(lambda one: one.zeroed),
        candidate_zeroed=weighted(lambda one: one.candidate_zeroed),
        reordered=float(np.mean([one.is_reordered for one in tensors])),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def by_layer(tensors: Sequence[TensorMeasures]) -> tuple[Agreement, ...]:
    """The agreement of each layer, in their order."""
    return _agreements(tensors, layer_of, lambda name: (not name, int(name[:18] or 0)))


def by_kind(tensors: Sequence[TensorMeasures]) -> tuple[Agreement, ...]:
    """The agreement of each kind of tensors, by their names."""
    return _agreements(tensors, fold, lambda name: name)


def _agreements(
    tensors: Sequence[TensorMeasures], name_of: Callable[[str], str], order: Callable[[str], object]
) -> tuple[Agreement, ...]:
    groups: dict[str, list[TensorMeasures]] = {}
    for one in tensors:
        groups.setdefault(name_of(one.name), []).append(one)
    return tuple(
        Agreement(
            name,
            len(some),
            float(np.mean([one.cosine for one in some])),
            float(np.average([one.equal for one in some], weights=[one.elements for one in some])),
        )
        for name, some in sorted(groups.items(), key=lambda group: order(group[0]))[:_MOST_GROUPS]  # type: ignore[arg-type, return-value]
    )
