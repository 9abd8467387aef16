"""What a delta says of an adapter that was merged into its target: by the low-rank predictions in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .entries import TensorEntry
from .words import listed

#: Of the bytes of its tensors: more than a merged adapter leaves, less than other training does.
_MOST_RESIDUAL = 1 / 12

#: Modules that are named.
_MAX_NAMES = 8

#: Bytes of an adapter's weights: most are saved in 16 bits.
_ITEMSIZE = 2


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """An adapter, as it seems.

    Attributes:
        tensors: how many tensors it was merged into.
        ranks: the lowest and the highest rank.
        modules: what these tensors are called without their place, such as ``q_proj``, the most common first.
        factor_bytes: what its factors take in the delta.
        residual_bytes: what else the payloads of these tensors take.
        adapter_bytes: about what the adapter itself would take, in 16 bits.
    """

    tensors: int
    ranks: tuple[int, int]
    modules: tuple[str, ...]
    factor_bytes: int
    residual_bytes: int
    adapter_bytes: int

    def __str__(self) -> str:
        """Such as ``rank 16 on q_proj and v_proj``."""
        lowest, highest = self.ranks
        rank = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
        return f"{rank} on {listed(self.modules, _MAX_NAMES)}"


def merged_adapter(entries: Iterable[TensorEntry]) -> MergedAdapter | None:
    """The adapter that most of what changed looks like; None if it looks like other training."""
    changed = [entry for entry in entries if entry.payload_bytes and entry.changed]
    merged = [entry for entry in changed if entry.prediction and entry.prediction.rank]
    ranks = [entry.prediction.rank or 0 for entry in merged if entry.prediction]
    factors = sum(entry.prediction.nbytes for entry in merged if entry.prediction)
    residual = sum(entry.payload_bytes for entry in merged) - factors
    weights = sum(entry.shared_bytes for entry in merged)
    if not merged or 2 * weights < sum(entry.shared_bytes for entry in changed):
        return None
    if residual > _MOST_RESIDUAL * weights:
        return None
    sides = ((math.prod(entry.shape[:-2]), sum(entry.shape[-2:])) for entry in merged)
    numbers = sum(count * length * rank for (count, length), rank in zip(sides, ranks, strict=True))
    return MergedAdapter(
        tensors=len(merged),
        ranks=(min(ranks), max(ranks)),
        modules=tuple(name for name, _ in Counter(map(_module, merged)).most_common()),
        factor_bytes=factors,
        residual_bytes=residual,
        adapter_bytes=_ITEMSIZE * numbers,
    )


def _module(entry: TensorEntry) -> str:
    """The last word of its name that says more than that it is a weight."""
    words = [word for word in entry.name.split(".") if word != "weight" and not word.isdigit()]
    return words[-1] if words else entry.name
