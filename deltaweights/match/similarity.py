"""Which base tensor a target tensor resembles, by a small sample of both: for tensors whose names tell
nothing, or something wrong.

Layers are pruned, reordered or doubled, and their numbers move. A name then leads to weights that are nothing
alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Tensor
from ..codec import convert, is_convertible
from ..dtypes import DTYPES
from ..storage import Span

#: Elements of a sample: enough to tell weights that were trained further from weights of another layer.
_ELEMENTS = 1024

#: Distances (see :func:`_distances`): unrelated weights of one size are 1.4 apart, fine-tuned ones less than
#: 0.1.
_CLOSE, _FAR = 0.5, 0.8

#: Candidates that a tensor is compared with, at most: anyone chooses the names, and time must not grow with
#: the square of their number.
_MAX_CANDIDATES = 512

_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")


class Similar(NamedTuple):
    """What :func:`find_similar` found.

    Attributes:
        found: the base tensor that each of some target tensors resembles.
        doubtful: target tensors whose base tensor by name does not resemble them, and no other does.
    """

    found: dict[Tensor, Tensor]
    doubtful: list[Tensor]


def find_similar(
    named: Mapping[Tensor, Tensor],
    unmatched: Sequence[Tensor],
    base: Checkpoint,
    target: Checkpoint,
    sampled: Collection[Tensor] | None = None,
) -> Similar:
    """Base tensors that resemble a target tensor which has none, or whose own by name does not resemble it.

    Only samples are read, and none over a network, where each would be a request.

    Args:
        named: the base tensor of each target tensor that has one by name, of the same number of elements.
        unmatched: target tensors that have none.
        sampled: the target tensors to be sampled, over a network, too; if None, all, but not over one.
    """
    if sampled is None and (base.source.is_remote or target.source.is_remote):
        return Similar({}, [])
    checked = [tensor for tensor in named if _can_be_sampled(tensor)]
    lone = [tensor for tensor in unmatched if _can_be_sampled(tensor)]
    if sampled is not None:
        chosen = set(sampled)
        checked, lone = ([tensor for tensor in some if tensor in chosen] for some in (checked, lone))
    if not checked and not lone:
        return Similar({}, [])
    samples = _Samples([*checked, *lone], target)
    bases = _Samples([named[tensor] for tensor in checked if _can_be_sampled(named[tensor])], base)
    doubtful = [
        tensor
        for tensor in checked
        if named[tensor] in bases and _distance(samples[tensor], bases[named[tensor]]) > _FAR
    ]
    wanted = [*doubtful, *lone]
    shapes = {tensor.info.shape for tensor in wanted}
    candidates = [t for t in base.tensors if t.info.shape in shapes and _can_be_sampled(t)]
    bases.read([tensor for tensor in candidates if tensor not in bases], base)
    found = {}
    for shape in shapes:
        alike = [tensor for tensor in candidates if tensor.info.shape == shape][:_MAX_CANDIDATES]
        if alike:
            rows = np.stack([bases[tensor] for tensor in alike])
            for tensor in (t for t in wanted if t.info.shape == shape):
                distances = _distances(samples[tensor], rows)
                nearest = int(np.argmin(distances))
                if distances[nearest] < _CLOSE:
                    found[tensor] = alike[nearest]
    found |= _whole_layers(found, named, unmatched, base)
    return Similar(found, [tensor for tensor in doubtful if tensor not in found])


def _whole_layers(
    found: Mapping[Tensor, Tensor],
    named: Mapping[Tensor, Tensor],
    unmatched: Sequence[Tensor],
    base: Checkpoint,
) -> dict[Tensor, Tensor]:
    """Where tensors of a layer resemble those of a different layer of the base, all of the layer's others:
    small ones, such as norms, resemble each other in every layer."""
    votes: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for tensor, other in found.items():
        here, there = _LAYER.match(tensor.name), _LAYER.match(other.name)
        if here and there and here[3] == there[3]:
            votes.setdefault((here[1], here[2]), Counter())[there[1], there[2]] += 1
    moved = {layer: count.most_common(1)[0] for layer, count in votes.items()}
    rest = {}
    for tensor in [*named, *unmatched]:
        layer = _LAYER.match(tensor.name)
        if not layer or tensor in found or (layer[1], layer[2]) not in moved:
            continue
        (stem, number), count = moved[layer[1], layer[2]]
        other_name = f"{stem}{number}{layer[3]}"
        twin = base.find(other_name, tensor.path) if count > 1 else None
        if twin and twin.info.shape == tensor.info.shape:
            rest[tensor] = twin
    return rest


class _Samples:
    """Samples of tensors, as float32."""

    def __init__(self, tensors: Sequence[Tensor], checkpoint: Checkpoint) -> None:
        self._samples: dict[Tensor, NDArray[np.float32]] = {}
        self.read(tensors, checkpoint)

    def read(self, tensors: Sequence[Tensor], checkpoint: Checkpoint) -> None:
        with checkpoint.source.expect(_span(tensor) for tensor in tensors):
            for tensor in tensors:
                self._samples[tensor] = _sample(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._samples

    def __getitem__(self, tensor: Tensor) -> NDArray[np.float32]:
        return self._samples[tensor]


def _can_be_sampled(tensor: Tensor) -> bool:
    """Whether it has enough elements to resemble anything, of a dtype whose values can be compared."""
    return is_convertible(tensor.dtype, "F32") and tensor.info.numel >= 64


def _bounds(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of the sample: elements from the middle, the same ones in every dtype."""
    itemsize = DTYPES[tensor.dtype].bits // 8
    count = min(tensor.info.numel, _ELEMENTS)
    start = (tensor.info.numel - count) // 2
    return start * itemsize, (start + count) * itemsize


def _span(tensor: Tensor) -> Span:
    return tensor.span(*_bounds(tensor))


def _sample(tensor: Tensor) -> NDArray[np.float32]:
    start, end = _bounds(tensor)
    data = np.empty(end - start, np.uint8)
    tensor.read_into(start, data)
    values: NDArray[np.float32] = convert(data, tensor.dtype, "F32").view("<f4").astype(np.float32)
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(_distances(one, other[np.newaxis])[0]) if one.size == other.size else np.inf


def _distances(one: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far each row of ``others`` is from ``one``: their mean difference by the mean size of both (0 for
    equal ones, 1.4 for unrelated ones that are normally distributed)."""
    wide, rows = one.astype(np.float64), others.astype(np.float64)  # sums of float32 may overflow
    apart = np.abs(rows - wide).mean(axis=1)
    sizes = (np.abs(rows).mean(axis=1) + np.abs(wide).mean()) / 2
    return np.where(sizes > 0, apart / np.where(sizes > 0, sizes, 1), 0.0)
