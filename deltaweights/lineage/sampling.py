"""Reads a sample of a model, and of each candidate what stands at the same places. Nothing is kept: memory is
that of one tensor's sample, and of what is fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Base, Checkpoint, Gathered, Tensor
from ..codec import convert, is_convertible
from ..dtypes import DTYPES
from ..match.names import Match
from ..match.vectors import can_be_read, numbers
from ..storage import Span
from .choosing import SampledTensor

#: The part of zeros from which on a tensor counts as pruned, and the elements that have to be left.
_PRUNED, _LEAST_KEPT = 0.05, 64


@dataclass(frozen=True, slots=True)
class Counterpart:
    """What a tensor of the model is compared with: the candidate's tensor, or parts of several. The first
    ``elements`` of both are the same places."""

    base: Base
    elements: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An open candidate, and the counterparts of the model's tensors in it."""

    checkpoint: Checkpoint
    counterparts: dict[Tensor, Counterpart]


@dataclass(frozen=True, slots=True, eq=False)
class SampledElements:
    """Some elements of a tensor.

    Attributes:
        dtype: their dtype's safetensors code.
        data: their bytes (uint8).
        values: the same as numbers (float32); what is not finite counts as 0.
        pruned: the part of zeros in what was read, if these were left out since.
    """

    dtype: str
    data: NDArray[np.uint8]
    values: NDArray[np.float32]
    pruned: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A tensor's sample, and that of each candidate, in their order; None where one has no counterpart."""

    tensor: Tensor
    model: SampledElements
    candidates: tuple[SampledElements | None, ...]


def counterparts_of(matches: Sequence[Match]) -> dict[Tensor, Counterpart]:
    """The counterparts that matches name, as far as their elements can be compared as numbers."""
    found = ((match.target, _counterpart(match)) for match in matches)
    return {tensor: counterpart for tensor, counterpart in found if counterpart}


def _counterpart(match: Match) -> Counterpart | None:
    new, old = match.target, match.base
    if old is None or not can_be_read(new):
        return None
    itemsize = DTYPES[new.dtype].bits // 8
    if isinstance(old, Gathered):
        return Counterpart(old, match.shared_bytes // itemsize) if match.shared_bytes else None
    if not can_be_read(old):
        return None
    shapes = [[size for size in side.info.shape if size > 1] for side in (new, old)]
    if shapes[0] == shapes[1]:
        return Counterpart(old, new.info.numel)  # in whatever dtypes: one may be quantized
    is_grown = new.info.numel != old.info.numel and match.shared_bytes
    return Counterpart(old, match.shared_bytes // itemsize) if is_grown else None


def read_samples(
    model: Checkpoint, chosen: Sequence[SampledTensor], candidates: Sequence[Candidate]
) -> Iterator[ReadSample]:
    """The samples of the chosen tensors, one after the other, as far as any candidate has a counterpart.

    Raises:
        CheckpointError: a file cannot be read.
    """
    wanted = [one for one in chosen if any(one.tensor in other.counterparts for other in candidates)]
    with ExitStack() as announced:
        spans = (_span(one.tensor, *run) for one in wanted for run in one.runs)
        announced.enter_context(model.source.expect(spans))
        for other in candidates:
            announced.enter_context(other.checkpoint.source.expect(list(_spans(wanted, other))))
        for one in wanted:
            ours = _read(one.tensor, one.runs)
            theirs = (_read_counterpart(one, other) for other in candidates)
            yield ReadSample(one.tensor, ours, tuple(theirs))


def _spans(wanted: Sequence[SampledTensor], candidate: Candidate) -> Iterator[Span]:
    for one in wanted:
        if counterpart := _reached(one, candidate):
            itemsize = DTYPES[counterpart.base.dtype].bits // 8
            for start, end in one.runs:
                yield from counterpart.base.spans(start * itemsize, end * itemsize)


def _reached(sampled: SampledTensor, candidate: Candidate) -> Counterpart | None:
    """The counterpart, if all of the sample lies in it: of a vocabulary that shrank much, it does not."""
    counterpart = candidate.counterparts.get(sampled.tensor)
    return counterpart if counterpart and sampled.runs[-1][1] <= counterpart.elements else None


def _read_counterpart(sampled: SampledTensor, candidate: Candidate) -> SampledElements | None:
    counterpart = _reached(sampled, candidate)
    return _read(counterpart.base, sampled.runs) if counterpart else None


def _span(tensor: Tensor, start: int, end: int) -> Span:
    itemsize = DTYPES[tensor.dtype].bits // 8
    return tensor.span(start * itemsize, end * itemsize)


def _read(tensor: Base, runs: Sequence[tuple[int, int]]) -> SampledElements:
    itemsize = DTYPES[tensor.dtype].bits // 8
    data = np.empty(sum(end - start for start, end in runs) * itemsize, np.uint8)
    done = 0
    for start, end in runs:
        length = (end - start) * itemsize
        tensor.read_into(start * itemsize, data[done : done + length])
        done += length
    return SampledElements(tensor.dtype, data, numbers(data, tensor.dtype))


def without_pruned(sample: ReadSample) -> ReadSample:
    """The sample without elements that were pruned: zeros, where a side has very many. They say nothing of
    what they were before."""
    sides = [one for one in (sample.model, *sample.candidates) if one]
    zeros = [one.values == 0 for one in sides]
    pruned = [zero for zero in zeros if zero.mean() > _PRUNED]
    kept = ~np.any(pruned, axis=0) if pruned else None
    if kept is None or np.count_nonzero(kept) < _LEAST_KEPT:
        return sample
    others = tuple(_taken(one, kept) if one else None for one in sample.candidates)
    return ReadSample(sample.tensor, _taken(sample.model, kept), others)


def _taken(side: SampledElements, kept: NDArray[np.bool_]) -> SampledElements:
    """Some of the elements."""
    rows = side.data.reshape(kept.size, -1)
    data = np.ascontiguousarray(rows[kept]).reshape(-1)
    return SampledElements(side.dtype, data, side.values[kept], float((side.values == 0).mean()))


def same_values(one: SampledElements, other: SampledElements) -> NDArray[np.bool_]:
    """For each element, whether both are the same bits, in the coarser of the two dtypes."""
    if one.dtype != other.dtype and is_convertible(one.dtype, other.dtype):
        coarser = min(one.dtype, other.dtype, key=lambda dtype: DTYPES[dtype].mantissa)
        datas = [convert(side.data, side.dtype, coarser) for side in (one, other)]
    elif one.dtype == other.dtype:
        coarser, datas = one.dtype, [one.data, other.data]
    else:
        return np.equal(one.values, other.values)
    kind = f"<u{DTYPES[coarser].bits // 8}"
    same: NDArray[np.bool_] = np.equal(datas[0].view(kind), datas[1].view(kind))
    return same
