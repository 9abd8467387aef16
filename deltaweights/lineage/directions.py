"""Which of two related models came first, as far as their weights tell.

An update that is independent of the weights is perpendicular to them, so it makes them larger: the squared
size of a fine-tune is that of its base and that of the update together. The *growth* of a model beside
another is the difference of their squared sizes by their squared distance: 1 for a fine-tune beside its base,
-1 for a base beside its fine-tune, and in between for two fine-tunes of one base, 0 if both moved as far.

Weight decay, and gradients that point along the weights, move it off these values, in every tensor by
another amount. So the median over tensors counts, with an error bar by a bootstrap. What a median may mean
was measured (benchmarks/lineage.py): where tensors agree, the theory holds; where they do not, fine-tunes
have medians about 1.45, and siblings about 0, but up to 1.
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

#: Tensors agree where their spread is below the first number, or they scatter hardly more than the errors of
#: their samples explain; and none is further from the median than so many of its own errors: it may be one
#: that only the other model moved.
_EVEN, _SCATTER, _OUTLIER = 0.12, 1.5, 4.0

#: The growth of a fine-tune and its standard deviation, and the bound of siblings', where tensors agree.
_GROWN, _GROWN_DEVIATION, _APART = 1.0, 0.06, 0.95

#: The same where they do not agree, and the standard deviation of siblings'.
_GROWN_UNEVENLY, _UNEVEN_DEVIATION, _APART_DEVIATION = 1.45, 0.35, 0.6

#: How likely any other growth is, in each order: weights that were scaled, or that decayed more than they
#: were trained, may have whatever growth.
_ANY = 0.01

#: How likely each order is before anything was read: candidates are named since they may be the base.
PRIORS: dict[Order, float] = {"after": 0.5, "apart": 0.4, "before": 0.1}

#: By how much it becomes more or less likely where the model's config is the newer one, or the older one.
_NEWER: dict[Order, float] = {"after": 1.0, "apart": 0.5, "before": 0.1}
_OLDER: dict[Order, float] = {"after": 0.1, "apart": 0.5, "before": 1.0}

#: How likely an order has to be, to be told: with a standard error below :data:`_SHARP`, and with a larger
#: one.
_LIKELY, _SHARP, _MORE_LIKELY = 0.8, 0.3, 0.9

#: With a larger standard error than this, growth says nothing, unless siblings are as likely as this.
_SILENT, _HARDLY = 0.5, 0.75

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of a model beside another: the median over tensors, and its standard error.

    Attributes:
        value: the median.
        error: its standard error.
        spread: the standard deviation of tensors, beside the errors of their samples.
        is_even: whether tensors agree, as far as their samples tell.
    """

    value: float
    error: float
    spread: float
    is_even: bool

    def odds(self, is_newer: bool | None = None) -> dict[Order, float]:
        """How likely each order is, given the growth; 1 together.

        Args:
            is_newer: whether documents say that the model is the newer one of the two.
        """
        priors = prior_odds(is_newer)
        found = {order: priors[order] * density for order, density in self._densities().items()}
        total = sum(found.values())
        return {order: one / total for order, one in found.items()}

    def _densities(self) -> dict[Order, float]:
        mean, deviation = (_GROWN, _GROWN_DEVIATION) if self.is_even else (_GROWN_UNEVENLY, _UNEVEN_DEVIATION)
        value, wide = self.value, math.hypot(deviation, self.error)
        if self.is_even:
            bounds = (_below((bound - value) / self.error) for bound in (-_APART, _APART))
            low, high = bounds
            apart = (high - low) / (2 * _APART)
        else:
            apart_wide = math.hypot(_APART_DEVIATION, self.error)
            apart = _normal(value / apart_wide) / apart_wide
        return {
            "after": _normal((value - mean) / wide) / wide + _ANY,
            "apart": apart + _ANY,
            "before": _normal((value + mean) / wide) / wide + _ANY,
        }

    def order(self, is_newer: bool | None = None) -> Order | None:
        """The order that is likely enough to be told; None if none is."""
        odds = self.odds(is_newer)
        likely = max(odds, key=lambda order: odds[order])
        return likely if odds[likely] > (_LIKELY if self.error < _SHARP else _MORE_LIKELY) else None

    @property
    def is_silent(self) -> bool:
        """Whether the error is so large that the growth says nothing, unless that it is hardly a
        fine-tune's."""
        return self.error > _SILENT and self.odds()["apart"] < _HARDLY


def prior_odds(is_newer: bool | None = None) -> dict[Order, float]:
    """How likely each order is before any weights were read."""
    found = {
        order: odds * (1 if is_newer is None else (_NEWER if is_newer else _OLDER)[order])
        for order, odds in PRIORS.items()
    }
    total = sum(found.values())
    return {order: one / total for order, one in found.items()}


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
    typical = float(np.median(errors))
    # 1.4826: of a normal distribution, the standard deviation by the median of absolute deviations.
    scatter = 1.4826 * float(np.median(np.abs(values - value)))
    spread = math.sqrt(max(0.0, scatter**2 - typical**2))
    least = 1 / math.sqrt(float((1 / errors**2).sum()))
    is_even = spread < _EVEN or scatter < _SCATTER * typical
    is_even = is_even and bool((np.abs(values - value) < _OUTLIER * np.hypot(errors, _EVEN)).all())
    return Growth(value, max(error, least), spread, is_even)


def _medians(values: _Numbers, weights: _Numbers) -> _Numbers:
    """The weighted median of each row."""
    order = np.argsort(values, axis=1)
    values, weights = (np.take_along_axis(side, order, axis=1) for side in (values, weights))
    heights = np.cumsum(weights, axis=1)
    places = (heights < heights[:, -1:] / 2).sum(axis=1)
    found: _Numbers = values[np.arange(len(values)), places]
    return found
