"""Which elements of a model are sampled, so that every layer and every kind of tensor has its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import Tensor
from ..codec import QUANTIZED, is_convertible
from ..dtypes import DTYPES
from ..match.candidates import fold

#: The part of a model's bytes that the sample takes, and the bounds of it. More is read of small models, up
#: to so many bytes: a small part of them would tell nothing.
_PART, _LEAST_BYTES, _MOST_BYTES = 0.006, 512 << 10, 24 << 20
_SMALL, _OF_SMALL = 32 << 20, 1 << 20

#: Most tensors that are sampled: over a network, each is a request or two.
_MOST_TENSORS = 384

#: Fewer elements than this tell nothing of where they come from.
_LEAST_ELEMENTS = 256

#: Runs of a tensor, at most, and the elements of a run, at least.
_MOST_RUNS, _LEAST_RUN = 4, 1024

#: The golden section: places that follow each other by it are far apart, whatever their number.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class SampledTensor:
    """A tensor, and the runs of elements (first one and end) that are read of it."""

    tensor: Tensor
    runs: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """How many bytes are read."""
        return sum(end - start for start, end in self.runs) * _itemsize(self.tensor)


def tells(tensor: Tensor) -> bool:
    """Whether the tensor can tell where a model comes from: a matrix of floats, or of quantized ones. Norms,
    biases and tables of integers are much the same in models that have nothing in common."""
    is_number = is_convertible(tensor.dtype, "F32") or tensor.dtype in QUANTIZED
    wide = [size for size in tensor.info.shape if size > 1]
    return is_number and len(wide) > 1 and tensor.info.numel >= _LEAST_ELEMENTS


def choose(
    tensors: Sequence[Tensor], sample_bytes: int | None = None, most_tensors: int = _MOST_TENSORS
) -> list[SampledTensor]:
    """A sample of all tensors that can tell anything, in their order; the same one every time.

    Args:
        sample_bytes: about how many bytes to read; if None, 0.6% of the tensors', but at most 24 MiB, and at
            least 512 KiB (1 MiB, if all have 32 MiB or less).
        most_tensors: how many tensors to read.
    """
    chosen = _spread([tensor for tensor in tensors if tells(tensor)], most_tensors)
    if not chosen:
        return []
    if sample_bytes is None:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        least = _OF_SMALL if nbytes <= _SMALL else _LEAST_BYTES
        sample_bytes = min(max(int(_PART * nbytes), least), _MOST_BYTES)
    share = max(_LEAST_RUN, _share([(t.info.numel, _itemsize(t)) for t in chosen], sample_bytes))
    return [SampledTensor(tensor, _runs(tensor.info.numel, share, n)) for n, tensor in enumerate(chosen)]


def _itemsize(tensor: Tensor) -> int:
    return DTYPES[tensor.dtype].bits // 8


def _share(sizes: Sequence[tuple[int, int]], nbytes: int) -> int:
    """The elements of each tensor that take about so many bytes of all: small ones leave more to others."""
    left, share = nbytes, 0
    for done, (numel, _) in enumerate(ordered := sorted(sizes)):
        rest = ordered[done:]
        share = left // sum(itemsize for _, itemsize in rest)
        if numel >= share:
            break
        left -= numel * rest[0][1]
    return share


def _spread(tensors: Sequence[Tensor], most: int) -> list[Tensor]:
    """So many tensors at most, of all kinds and from all layers, in their order."""
    if len(tensors) <= most:
        return list(tensors)
    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((fold(tensor.name), tensor.info.shape), []).append(tensor)
    chosen: set[Tensor] = set()
    for some in _shares(kinds, most):
        chosen.update(some)
    return [tensor for tensor in tensors if tensor in chosen]


def _shares(kinds: Mapping[object, Sequence[Tensor]], most: int) -> list[list[Tensor]]:
    """Of each kind, tensors that lie evenly among its own; of many kinds, the largest."""
    largest = sorted(kinds.values(), key=lambda some: -sum(tensor.nbytes for tensor in some))[:most]
    left, found = most, list[list[Tensor]]()
    for number, some in enumerate(sorted(largest, key=len)):
        count = min(len(some), left // (len(largest) - number))
        found.append([some[len(some) * k // count] for k in range(count)])
        left -= count
    return found


def _runs(numel: int, share: int, number: int) -> tuple[tuple[int, int], ...]:
    """Runs of about ``share`` elements together, at other places in every tensor."""
    if numel <= share:
        return ((0, numel),)
    count = min(_MOST_RUNS, max(1, share // _LEAST_RUN))
    length, part = share // count, numel // count
    room = part - length
    starts = (part * k + int(room * ((number * count + k) * _GOLDEN % 1)) for k in range(count))
    return tuple((start, start + length) for start in starts)
