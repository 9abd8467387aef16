"""How long to fit what may be an update of low rank."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: How long to fit.
Effort = Literal["fast", "default", "max"]


class Schedule(NamedTuple):
    """How long to fit.

    Attributes:
        first: rows of which the spectrum is taken; twice as many while they have too many components.
        stages: (rows of a sample, how often both factors are fitted in it): first few rows, then more.
        shares: of the columns, by which each row is fitted at last, one after the other.
        most_factors: for each element of a matrix. To fit more takes many times as long as to code it, and
            saves little: adapters have far fewer, what full fine-tunes gain may have more.
    """

    first: int
    stages: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    most_factors: float


EFFORTS: dict[Effort, Schedule] = {
    "fast": Schedule(128, ((512, 3),), (0.25, 1.0), 0.25),
    "default": Schedule(256, ((512, 3), (2048, 2)), (0.25, 0.5, 1.0, 1.0), 0.25),
    "max": Schedule(256, ((512, 4), (4096, 12)), (0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0), 1.0),
}
