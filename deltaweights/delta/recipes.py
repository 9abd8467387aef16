"""Recipes that rebuild each tensor and each shard of a target from payloads and the base's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import codec
from ..checkpoint import Header, Shard, Tensor, TensorInfo
from ..dtypes import DTYPE_BITS
from ..errors import ManifestError
from ..manifest import MANIFEST_NAME, TargetFile, TensorEntry
from ..payload import ChunkPlan, Faults, PayloadReader
from ..storage import Span

if TYPE_CHECKING:
    from .target_recipe import TargetRecipe


class TensorRecipe(PayloadReader):
    """Rebuilds one tensor, chunk by chunk. ``entry``, ``stored`` and ``base`` are those of the tensor whose
    bytes are coded: for a duplicate, the original."""

    base: Tensor | None

    def __init__(
        self,
        info: TensorInfo,
        entry: TensorEntry,
        stored: Tensor,
        base: Tensor | None,
        chunk_bytes: int,
        faults: Faults,
    ) -> None:
        plan = ChunkPlan(info.nbytes, entry.shared_bytes, chunk_bytes)
        super().__init__(info.name, info.dtype, plan, stored, base, faults)
        self.info = info
        if not _is_consistent(info, entry, base):
            raise ManifestError(
                f"{MANIFEST_NAME} is damaged",
                f"Tensor {info.name!r} cannot share {entry.shared_bytes} bytes with its base tensor.",
                "Get the delta again.",
            )

    @property
    def delta_shard(self) -> Shard:
        """The delta's shard that holds the payload."""
        return self.stored.shard

    def base_span(self, index: int) -> Span:
        """The span of the base's bytes for chunk ``index``."""
        assert self.base is not None
        return self.base.span(*self.base_bounds(index, index + 1))


def _is_consistent(info: TensorInfo, entry: TensorEntry, base: Tensor | None) -> bool:
    """Whether target and base both have as many bytes as the entry says they share."""
    shared = entry.shared_bytes
    if not shared:
        return True
    if base is None or shared > info.nbytes:
        return False
    source = base.info.dtype
    if source == info.dtype:
        return shared <= base.info.nbytes
    return (
        codec.is_convertible(source, info.dtype)
        and shared % (DTYPE_BITS[info.dtype] // 8) == 0
        and codec.rescale(shared, info.dtype, source) <= base.info.nbytes
    )


@dataclass(frozen=True, slots=True)
class ShardRecipe:
    """The recipe for one shard of ``target``: its header, and its tensors in the order of their bytes.
    ``delta_shard`` holds their payloads."""

    file: TargetFile
    header: Header
    tensors: dict[str, TensorRecipe]
    delta_shard: Shard
    target: TargetRecipe

    def chunks(self) -> Iterator[tuple[TensorRecipe, int]]:
        """Every chunk of the shard, in order."""
        for recipe in self.tensors.values():
            for index in range(recipe.plan.count):
                yield recipe, index

    def rows(self, nbytes: int) -> Iterator[tuple[TensorRecipe, int, int]]:
        """All chunks in order, in rows of at most ``nbytes``: the tensor, its first chunk, the end."""
        for recipe in self.tensors.values():
            for first, end in recipe.plan.rows(nbytes):
                yield recipe, first, end
