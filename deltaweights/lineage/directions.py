"""Which of two related models came first, as far as their weights tell.

An update that is independent of the weights is perpendicular to them, so it makes them larger: the squared
size of a fine-tune is that of its base and that of the update together. The *growth* of a model beside
another is the difference of their squared sizes by their squared distance: 1 for a fine-tune beside its base,
-1 for a base beside its fine-tune, and in between for two fine-tunes of one base, 0 if both moved as far.

Weight decay, and gradients that point along the weights, move it off these values, in every tensor by another
amount. So the median over tensors counts, with an error bar by a bootstrap, and what a range of values may
mean was measured (benchmarks/lineage.py): fine-tunes have medians from 0.9 on, siblings up to 0.65.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: What a model is beside another: made from it, the other way round, or both from a third one.
Order = Literal["after", "before", "apart"]

#: Samples of the bootstrap.
_RESAMPLED = 400

#: Fewer tensors than this do not say how much they disagree.
_LEAST_TENSORS = 4

#: How much tensors of real updates disagree, beside the error of their samples.
_SPREAD = 0.3

#: Of a fine-tune's growth, the mean and the standard deviation; of siblings', the bound.
_GROWN, _GROWN_DEVIATION, _APART = 1.2, 0.4, 0.85

#: How likely each order is before anything was read: candidates are named since they may be the base.
PRIORS: dict[Order, float] = {"after": 0.6, "apart": 0.3, "before": 0.1}

#: How likely an order has to be, to be told: with a standard error below :data:`_SHARP`, and with a larger
#: one.
_LIKELY, _SHARP, _MORE_LIKELY = 0.8, 0.3, 0.9

#: With a larger standard error than this, growth says nothing, unless siblings are as likely as this.
_SILENT, _HARDLY = 0.5, 0.75

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of a model beside another: the median over tensors, and its standard error."""

    value: float
    error: float

    @property
    def odds(self) -> dict[Order, float]:
        """How likely each order is, given the growth; 1 together."""
        wide = math.hypot(_GROWN_DEVIATION, self.error)
        value = max(-_GROWN, min(_GROWN, self.value))  # beyond, it is not less likely
        densities = {
            "after": _normal((value - _GROWN) / wide) / wide,
            "apart": (_below((_APART - value) / self.error) - _below((-_APART - value) / self.error))
            / (2 * _APART),
            "before": _normal((value + _GROWN) / wide) / wide,
        }
        found: dict[Order, float] = {}
        orders: tuple[Order, ...] = ("after", "apart", "before")
        for order in orders:
            found[order] = PRIORS[order] * densities[order]
        total = sum(found.values())
        return {order: one / total for order, one in found.items()}

    @property
    def order(self) -> Order | None:
        """The order that is likely enough to be told; None if none is."""
        odds = self.odds
        likely = max(odds, key=lambda order: odds[order])
        return likely if odds[likely] > (_LIKELY if self.error < _SHARP else _MORE_LIKELY) else None

    @property
    def is_silent(self) -> bool:
        """Whether the error is so large that the growth says nothing, unless that it is hardly a
        fine-tune's."""
        return self.error > _SILENT and self.odds["apart"] < _HARDLY


def _normal(value: float) -> float:
    return math.exp(-value * value / 2) / math.sqrt(2 * math.pi)


def _below(value: float) -> float:
    return (1 + math.erf(value / math.sqrt(2))) / 2


def growth_of(tensors: Sequence[tuple[float, float]]) -> Growth | None:
    """The growth of a model, from that of its tensors and the standard errors of these; None if too few of
    them differ from the other model's."""
    found = [(value, error) for value, error in tensors if error > 0]
    if len(found) < _LEAST_TENSORS:
        return None
    values, errors = np.array(found).T
    weights = 1 / (errors**2 + _SPREAD**2)
    value = float(_medians(values[None], weights[None])[0])
    chosen = np.random.default_rng(0).integers(len(values), size=(_RESAMPLED, len(values)))
    error = float(np.std(_medians(values[chosen], weights[chosen])))
    return Growth(value, max(error, float((1 / errors**2).sum()) ** -0.5))


def _medians(values: _Numbers, weights: _Numbers) -> _Numbers:
    """The weighted median of each row."""
    order = np.argsort(values, axis=1)
    values, weights = (np.take_along_axis(side, order, axis=1) for side in (values, weights))
    heights = np.cumsum(weights, axis=1)
    places = (heights < heights[:, -1:] / 2).sum(axis=1)
    found: _Numbers = values[np.arange(len(values)), places]
    return found
