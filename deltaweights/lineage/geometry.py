"""Where a model and its candidates lie among each other, by scalar products of their samples.

Updates of different trainings are almost perpendicular: in thousands of dimensions, hardly anything points
the same way by chance. So squared distances add up along a family tree, as in phylogenetics, and three models
lie on a path, or on a star, as their distances say (the three-point formula: Saitou and Nei, "The
neighbor-joining method", Molecular Biology and Evolution 4, 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .directions import Growth, growth_of
from .measures import SampledProducts
from .scale import ALIKE

_Numbers = NDArray[np.float64]

#: A model is where two others part if its own branch is at most this part of it and the shorter of theirs
#: together; it is not if it is more than the other. Updates of real fine-tunes have cosines up to 0.3, and
#: branches of the same length are halves.
_JUNCTION, _NO_JUNCTION = 0.33, 0.42

#: Two models lie on opposite sides of a third one if the cosine of the angle there is below minus this.
_OPPOSITE = 0.33

#: Two candidates are one if they are no further apart than so many times the error of rounding.
_SAME = 4.0

#: And than this part of their squared distances from the model; or than this, where products are inexact.
_NEAR, _EXACT = 0.05, 1e-12

#: A combination of candidates explains the model if what it leaves of the least distance is this part, and
#: rounding: that of the model and of the candidates, each by its weight, with some slack. All of it is to be
#: well below the distance.
_UNEXPLAINED, _ROUNDINGS, _ABOVE_ROUNDING = 0.03, 1.5, 2.5

#: Directions that are weaker than this beside the others are rounding errors of the products.
_WEAK = 1e-9


class Branches(NamedTuple):
    """Three models' branches: their squared distances from the point where they part."""

    first: float
    second: float
    third: float


@dataclass(frozen=True, slots=True)
class Combination:
    """Candidates of which the model is a combination.

    Attributes:
        weights: the weight of each, by its number: the mean over tensors.
        unexplained: the part of the squared distance from the nearest candidate that the combination leaves.
    """

    weights: dict[int, float]
    unexplained: float


class Geometry:
    """The scalar products of all tensors' samples. The model is number 0, candidates count from 1.

    Args:
        samples: of each tensor.
    """

    def __init__(self, samples: Sequence[SampledProducts]) -> None:
        sizes = [one.products[0, 0] for one in samples]
        used = [(one, size) for one, size in zip(samples, sizes, strict=True) if size > 0]
        count = len(samples[0].products) if samples else 1
        #: Each tensor's products, by the size of the model's.
        self._products = np.stack([one.products / size for one, size in used] or [np.zeros((count, count))])
        self._rounding = np.array([one.rounding / size for one, size in used] or [0.0])
        self._elements = np.array([one.elements for one, _ in used] or [1])

    def _of(self, numbers: Sequence[int]) -> tuple[_Numbers, _Numbers]:
        """The products of some models, and the rounding of tensors, where all of them have counterparts."""
        products = self._products[:, numbers][:, :, numbers]
        is_whole = np.isfinite(products).all(axis=(1, 2))
        return products[is_whole], self._rounding[is_whole]

    def squared_distance(self, one: int, other: int) -> float:
        """The squared distance of two models, the sum over tensors by the size of the model's."""
        products, _ = self._of([one, other])
        return float(np.maximum(products[:, 0, 0] + products[:, 1, 1] - 2 * products[:, 0, 1], 0).sum())

    def branches(self, first: int, second: int, third: int) -> Branches | None:
        """The branches of three models; None if they have no tensors in common."""
        products, _ = self._of([first, second, third])
        if not len(products):
            return None
        p = products.sum(axis=0)

        def branch(at: int, one: int, other: int) -> float:
            return max(0.0, float(p[one, other] - p[one, at] - p[at, other] + p[at, at]))

        return Branches(branch(0, 1, 2), branch(1, 0, 2), branch(2, 0, 1))

    def detour(self, middle: int, one: int, other: int) -> float | None:
        """How far the middle model lies off the way from one to another: the length of its own branch, as a
        part of it and the shorter of theirs together; None if all have none."""
        branches = self.branches(middle, one, other)
        if branches is None:
            return None
        total = branches.first + min(branches.second, branches.third)
        return branches.first / total if total > 0 else None

    def is_between(self, middle: int, one: int, other: int) -> bool | None:
        """Whether the way from one model to another leads past the middle one; None if it can hardly be
        told."""
        if self.is_mixture(middle, one, other):
            return None
        detour = self.detour(middle, one, other)
        return None if detour is None or _JUNCTION < detour < _NO_JUNCTION else detour <= _JUNCTION

    def is_mixture(self, middle: int, one: int, other: int) -> bool:
        """Whether two models lie on opposite sides of the middle one, as what was merged does of a merge.
        Fine-tunes of a base lie at right angles, or rather on the same side of it."""
        products, _ = self._of([middle, one, other])
        p = products.sum(axis=0)
        if not len(products):
            return False
        sides = [p[0, 0] + p[n, n] - 2 * p[0, n] for n in (1, 2)]
        angle = p[1, 2] - p[0, 1] - p[0, 2] + p[0, 0]
        return bool(angle < -_OPPOSITE * np.sqrt(max(0.0, sides[0] * sides[1])))

    def distinct(self, numbers: Sequence[int]) -> list[list[int]]:
        """The candidates in groups that are one model each, but for rounding far below their distance from
        the model."""
        groups: list[list[int]] = []
        for number in numbers:
            same = (group for group in groups if self._are_same(group[0], number))
            if group := next(same, None):
                group.append(number)
            else:
                groups.append([number])
        return groups

    def _are_same(self, one: int, other: int) -> bool:
        if not len(self._of([one, other])[0]):
            return False
        apart = self.squared_distance(one, other)
        near = min(self.squared_distance(0, one), self.squared_distance(0, other))
        return apart <= min(_SAME * float(self._rounding.sum()), _NEAR * near) or apart <= _EXACT

    def combination(self, numbers: Sequence[int]) -> Combination | None:
        """The fewest candidates, two at least, that the model is a linear combination of, tensor by
        tensor."""
        products, roundings = self._of([0, *numbers])
        if len(numbers) < 2 or not len(products):
            return None
        apart = products[:, 0, :1] + np.einsum("tii->ti", products)[:, 1:] - 2 * products[:, 0, 1:]
        nearest, rounding = float(apart.sum(axis=0).min()), float(roundings.sum())
        kept = list(range(1, len(numbers) + 1))
        fit = _fit_all(products, kept)
        if not fit.explains(nearest, rounding):
            return None
        while len(kept) > 1:
            without = [[one for one in kept if one != gone] for gone in kept]
            fits = [(_fit_all(products, some), some) for some in without]
            fewer, some = min(fits, key=lambda one: one[0].left)
            if not fewer.explains(nearest, rounding):
                break
            fit, kept = fewer, some
        if len(kept) < 2:
            return None
        named = {numbers[place - 1]: float(weight) for place, weight in zip(kept, fit.weights, strict=True)}
        return Combination(named, fit.left / nearest)

    def growth(self, one: int, other: int) -> Growth | None:
        """The growth of one model beside another."""
        products = self._products[:, [one, other]][:, :, [one, other]]
        is_whole = np.isfinite(products).all(axis=(1, 2))
        p, elements = products[is_whole], self._elements[is_whole]
        sizes, others = p[:, 0, 0], p[:, 1, 1]
        apart = np.maximum(sizes + others - 2 * p[:, 0, 1], 0)
        is_alike = p[:, 0, 1] > ALIKE * np.sqrt(sizes * others)
        used = (apart > _EXACT) & is_alike
        middle = (sizes + others) / 2
        errors = 2 * np.sqrt(middle[used] / (apart[used] * elements[used]))
        values = (sizes - others)[used] / apart[used]
        return growth_of(list(zip(values.tolist(), errors.tolist(), strict=True)))


class _Fit(NamedTuple):
    """The best combinations of candidates, tensor by tensor: the mean weights, the squared distance that is
    left."""

    weights: _Numbers
    left: float

    def explains(self, nearest: float, rounding: float) -> bool:
        """Whether hardly more than rounding is left of the squared distance from the nearest candidate."""
        rounded = _ROUNDINGS * rounding * (1 + float((self.weights**2).sum()))
        return self.left <= _UNEXPLAINED * nearest + rounded and nearest >= _ABOVE_ROUNDING * rounded


def _fit_all(products: _Numbers, kept: Sequence[int]) -> _Fit:
    """The best combinations of these candidates."""
    fits = [_fit(tensor, kept) for tensor in products]
    return _Fit(np.mean([weights for weights, _ in fits], axis=0), sum(left for _, left in fits))


def _fit(products: _Numbers, kept: Sequence[int]) -> tuple[_Numbers, float]:
    """The weights of the best combination for one tensor, and the squared distance that it leaves.

    Candidates hardly differ, so the first one counts as the origin, and the others by their difference from
    it, each by its size: the equations are well-conditioned then.
    """
    basis = np.zeros((len(kept), len(products)))
    basis[:, kept] = np.eye(len(kept))
    basis[1:] -= basis[0]
    model = -basis[0].copy()
    model[0] += 1
    matrix, right = basis @ products @ basis.T, basis @ products @ model
    sizes = np.sqrt(np.maximum(np.diag(matrix), 0))
    scale = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    solved = np.linalg.pinv(matrix * np.outer(scale, scale), rcond=_WEAK, hermitian=True) @ (right * scale)
    solved *= scale
    left = float(model @ products @ model - right @ solved)
    weights = solved.copy()
    weights[0] = 1 + solved[0] - solved[1:].sum()
    return weights, max(0.0, left)
