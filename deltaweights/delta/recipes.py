"""Recipes that rebuild each tensor and each shard of a target from payloads and the base's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import codec
from ..checkpoint import Base, Gathered, Header, Shard, Tensor, TensorInfo
from ..dtypes import DTYPE_BITS
from ..entries import TensorEntry
from ..errors import ManifestError, PayloadError
from ..manifest import MANIFEST_NAME, TargetFile
from ..payload import ChunkPlan, Faults, PayloadReader
from ..recent import Recent
from ..storage import Span

if TYPE_CHECKING:
    from .target_recipe import TargetRecipe


class TensorRecipe(PayloadReader):
    """Rebuilds one tensor, chunk by chunk. ``entry``, ``stored`` and ``base`` are those of the tensor whose
    bytes are coded: for a duplicate, the original."""

    base: Base | None

    def __init__(
        self,
        info: TensorInfo,
        entry: TensorEntry,
        stored: Tensor,
        base: Base | None,
        chunk_bytes: int,
        faults: Faults,
        predictors: Recent[codec.Predictor],
    ) -> None:
        plan = ChunkPlan(info.nbytes, entry.shared_bytes, chunk_bytes)
        predicted = entry.prediction.nbytes if entry.prediction else 0
        super().__init__(info.name, info.dtype, plan, stored, base, faults, predicted)
        self.info = info
        self._prediction = entry.prediction
        self._predictors = predictors
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

    def base_spans(self, index: int) -> list[Span]:
        """The spans of the base's bytes for chunk ``index``."""
        assert self.base is not None
        return self.base.spans(*self.base_bounds(index, index + 1))

    def predictor(self) -> codec.Predictor | None:
        """What predicts the tensor from its base, if anything; read once for all chunks.

        Raises:
            DeltaError: it is damaged.
        """
        return self._predictors.get(self, self._read_predictor) if self._prediction else None

    def _read_predictor(self) -> codec.Predictor:
        assert self._prediction is not None
        assert self.base is not None
        sealed = np.empty(self._prediction.nbytes, np.uint8)
        self.stored.read_into(0, sealed)
        numel = self.plan.shared // codec.element_bytes(self.dtype, self.plan.shared)
        try:
            return codec.parse_prediction(
                self._prediction.method, sealed.tobytes(), self.dtype, self.base.dtype, numel
            )
        except PayloadError as error:
            raise self.damaged(error.what) from error


def _is_consistent(info: TensorInfo, entry: TensorEntry, base: Base | None) -> bool:
    """Whether target and base both have as many bytes as the entry says they share."""
    shared = entry.shared_bytes
    if not shared:
        return True
    if base is None or shared > info.nbytes:
        return False
    bits = DTYPE_BITS.get(info.dtype, 8)
    if entry.prediction and (
        bits % 8 or shared % (bits // 8) or entry.prediction.nbytes > _most_predicted(info)
    ):
        return False
    if base.dtype == info.dtype:
        return shared <= base.nbytes and (not isinstance(base, Gathered) or shared % (bits // 8) == 0)
    is_known = codec.is_convertible(base.dtype, info.dtype) or (
        entry.prediction is not None and info.dtype in codec.QUANTIZED and base.dtype in DTYPE_BITS
    )
    return (
        is_known
        and shared % (bits // 8) == 0
        and codec.rescale(shared, info.dtype, base.dtype) <= base.nbytes
    )


def _most_predicted(info: TensorInfo) -> int:
    """The most bytes of a prediction: one that is larger than the tensor would make it longer."""
    return info.nbytes + 4096


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

    @contextmanager
    def rows(self, nbytes: int) -> Iterator[Iterator[tuple[TensorRecipe, int, int]]]:
        """All chunks in order, fetched ahead within the block, in rows of at most ``nbytes``: the tensor, its
        first chunk, the end."""
        with self.target.decoding(self.tensors.values()) as recipes:
            yield ((recipe, *row) for recipe in recipes for row in recipe.plan.rows(nbytes))
