"""Streams several deltas of one base, and compares what they added: which moved the same weights, and whether
in the same direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..codec.low_rank.blas import one_blas_thread
from ..delta.recipes import TensorRecipe
from ..delta.target_recipe import TargetRecipe
from ..entries import BaseTensor, TensorEntry
from ..metrics import timed_stage
from ..workers import Lane, Meter, ProgressCallback, Workers
from .movement import Floats, Movement, float_dtype, has_floats, measure

#: Bytes of a tensor that are compared at once.
_BLOCK = 1 << 21


@dataclass(slots=True)
class Overlap:
    """What two updates Δ and Δ' of the same weights have in common.

    Attributes:
        both, either: elements that both moved, and that one of them or both moved.
        dot: the sum of Δ times Δ'.
        squares: ‖Δ‖² and ‖Δ'‖².
    """

    both: int = 0
    either: int = 0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def share(self) -> float | None:
        """Of the elements that either moved, the share that both moved; None where nothing moved."""
        return self.both / self.either if self.either else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the two updates; None where one of them is 0."""
        lengths = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return max(-1.0, min(1.0, self.dot / lengths)) if lengths > 0 else None

    def add(self, other: Overlap) -> None:
        """Count other elements in."""
        self.both += other.both
        self.either += other.either
        self.dot += other.dot
        self.squares = self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]


@dataclass(slots=True)
class TensorOverlaps:
    """A tensor of several deltas: how far each moved it, and what each two have in common."""

    moved: list[Movement] = field(default_factory=list)
    pairs: dict[tuple[int, int], Overlap] = field(default_factory=dict)


def combined_overlap(overlaps: Iterable[Overlap]) -> Overlap:
    """Those of several tensors as one."""
    whole = Overlap()
    for one in overlaps:
        whole.add(one)
    return whole


@timed_stage("compare updates")
def compare_updates(
    targets: Sequence[TargetRecipe], workers: Workers, progress: ProgressCallback | None
) -> dict[str, TensorOverlaps]:
    """Compare the updates of each tensor that all targets have from the same base tensor, by its name.

    Raises:
        BaseMismatchError, DeltaError: base or delta contradicts the manifest.
    """
    every = [_comparable(target) for target in targets]
    shared = [name for name in every[0] if all(_is_alike(every[0][name], other.get(name)) for other in every)]
    meter = Meter(progress, "compare", sum(every[0][name].shared_bytes for name in shared))

    def compare(lane: Lane, name: str) -> TensorOverlaps:
        recipes = []
        for target, entries in zip(targets, every, strict=True):
            file = entries[name].file
            assert file is not None
            recipes.append(target.shard(file).tensors[name])
        return _compare_tensor(targets, recipes, lane, meter)

    with one_blas_thread:
        return dict(zip(shared, workers.each(compare, shared), strict=True))


def _comparable(target: TargetRecipe) -> dict[str, TensorEntry]:
    """The tensors that are wholly compared with one base tensor, by name. Of two with one name, the first."""
    found: dict[str, TensorEntry] = {}
    for entry in target.manifest.tensors:
        if entry.file is None or not isinstance(entry.base, BaseTensor) or not has_floats(entry.dtype):
            continue
        is_whole = entry.base.shape == entry.shape and entry.shared_bytes > 0
        if is_whole and (
            entry.base.dtype == entry.dtype or codec.is_convertible(entry.base.dtype, entry.dtype)
        ):
            found.setdefault(entry.name, entry)
    return found


def _is_alike(first: TensorEntry, other: TensorEntry | None) -> bool:
    if other is None:
        return False
    return (first.dtype, first.shape, first.base) == (other.dtype, other.shape, other.base)


def _compare_tensor(
    targets: Sequence[TargetRecipe], recipes: Sequence[TensorRecipe], lane: Lane, meter: Meter
) -> TensorOverlaps:
    found = TensorOverlaps([Movement() for _ in recipes])
    found.pairs = {pair: Overlap() for pair in combinations(range(len(recipes)), 2)}
    nbytes, dtype = recipes[0].info.nbytes, recipes[0].dtype
    size = codec.element_bytes(dtype, nbytes)
    for start in range(0, nbytes, _BLOCK):
        lane.check()
        end = min(start + _BLOCK, nbytes)
        base = _read_base(recipes[0], start, end)
        moves, masks = [], []
        for target, recipe, whole in zip(targets, recipes, found.moved, strict=True):
            data = target.read(recipe, start, end)
            kept: Floats = np.empty((end - start) // size, float_dtype(dtype))
            whole.add(measure(base, data, dtype, keep_moves=kept))
            moves.append(kept)
            masks.append(base.view(f"<u{size}") != data.view(f"<u{size}"))
        for (i, j), overlap in found.pairs.items():
            overlap.add(_overlap(moves[i], moves[j], masks[i], masks[j]))
        meter.add(end - start)
    return found


def _read_base(recipe: TensorRecipe, start: int, end: int) -> NDArray[np.uint8]:
    """The base's bytes for bytes of the tensor, in the tensor's dtype."""
    assert recipe.base is not None
    low, high = (codec.rescale(place, recipe.dtype, recipe.base.dtype) for place in (start, end))
    data = np.empty(high - low, np.uint8)
    recipe.base.read_into(low, data)
    return codec.convert(data, recipe.base.dtype, recipe.dtype)


def _overlap(
    first: Floats, second: Floats, moved_first: NDArray[np.bool_], moved_second: NDArray[np.bool_]
) -> Overlap:
    both = int(np.count_nonzero(moved_first & moved_second))
    return Overlap(
        both=both,
        either=int(np.count_nonzero(moved_first)) + int(np.count_nonzero(moved_second)) - both,
        dot=float(np.dot(first, second)),
        squares=(float(np.dot(first, first)), float(np.dot(second, second))),
    )
