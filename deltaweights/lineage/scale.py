"""The scale on which two models are placed, measured on real pairs and on pairs trained for it."""

from __future__ import annotations

import math

from .measures import TensorMeasures

#: Standard deviations of a chance cosine that are taken for no chance: one in millions of tensors has them.
_BEYOND_CHANCE = 6.0

#: Cosines of tensors of common origin, at least, and of ones that have nothing in common, at most.
ALIKE, _UNLIKE = 0.3, 0.1


def chance(elements: int) -> float:
    """The standard deviation of the cosine of so many independent weights."""
    return 1 / math.sqrt(max(1, elements))


def is_alike(tensor: TensorMeasures) -> bool:
    """Whether the tensor and its counterpart are of common origin beyond doubt."""
    return tensor.cosine > max(ALIKE, _BEYOND_CHANCE * chance(tensor.elements))


def is_unlike(tensor: TensorMeasures) -> bool:
    """Whether they have nothing in common."""
    return abs(tensor.cosine) < max(_UNLIKE, _BEYOND_CHANCE / 2 * chance(tensor.elements))
