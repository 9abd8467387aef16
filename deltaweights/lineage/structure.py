"""What tensors' names, shapes and dtypes say of two models: what was added, pruned, quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint import Checkpoint, Tensor
from ..codec import QUANTIZED
from ..match.candidates import layer_of
from .choosing import tells
from .sampling import Counterpart

#: Most resized tensors that are told of.
_MOST_RESIZED = 16


@dataclass(frozen=True, slots=True)
class ResizedTensor:
    """A tensor with another number of rows than its counterpart: an embedding whose vocabulary changed."""

    name: str
    rows: int
    candidate_rows: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A model's tensors beside a candidate's.

    Attributes:
        coverage: the part of the weights in the model's matrices that the candidate has counterparts of.
        resized: tensors with another number of rows.
        layers, candidate_layers: how many layers each has.
        is_quantized: whether matrices of the model are quantized, and the candidate's are not.
        is_candidate_quantized: the other way round.
    """

    coverage: float
    resized: tuple[ResizedTensor, ...]
    layers: int
    candidate_layers: int
    is_quantized: bool
    is_candidate_quantized: bool

    def comes_after(self) -> str | None:
        """Why the model, if it is related, came after the candidate; None if nothing says so."""
        if self.is_quantized:
            return "it is quantized, and the candidate is not"
        if any(one.rows > one.candidate_rows and not layer_of(one.name) for one in self.resized):
            return "its vocabulary has the candidate's rows and more"
        if 0 < self.layers < self.candidate_layers:
            return "its layers are some of the candidate's"
        if any(one.rows < one.candidate_rows and layer_of(one.name) for one in self.resized):
            return "its layers are narrower"
        return None

    def comes_before(self) -> str | None:
        """Why the candidate, if it is related, was hardly what the model was made from; None if nothing says
        so."""
        if self.is_candidate_quantized:
            return "it is quantized, and the model is not"
        if 0 < self.candidate_layers < self.layers:
            return "its layers are some of the model's"
        if any(one.rows > one.candidate_rows and layer_of(one.name) for one in self.resized):
            return "its layers are narrower"
        return None


def compare_structures(
    model: Checkpoint, candidate: Checkpoint, counterparts: Mapping[Tensor, Counterpart]
) -> Structure:
    """What headers tell of the two."""
    telling = [tensor for tensor in model.tensors if tells(tensor)]
    total = sum(tensor.info.numel for tensor in telling)
    found = [(tensor, counterparts[tensor]) for tensor in telling if tensor in counterparts]
    resized = [
        ResizedTensor(tensor.name, tensor.info.shape[0], other.base.info.shape[0])
        for tensor, other in found
        if isinstance(other.base, Tensor) and tensor.info.shape[:1] != other.base.info.shape[:1]
    ]
    quantized = [(t, t.dtype in QUANTIZED, other.base.dtype in QUANTIZED) for t, other in found]
    return Structure(
        coverage=sum(other.elements for _, other in found) / total if total else 0.0,
        resized=tuple(resized[:_MOST_RESIZED]),
        layers=_layers(model),
        candidate_layers=_layers(candidate),
        is_quantized=2 * sum(t.info.numel for t, ours, theirs in quantized if ours > theirs) > total,
        is_candidate_quantized=2 * sum(t.info.numel for t, ours, theirs in quantized if ours < theirs)
        > total,
    )


def _layers(checkpoint: Checkpoint) -> int:
    """How many layers have matrices."""
    return len({layer_of(tensor.name) for tensor in checkpoint.tensors if tells(tensor)} - {""})
