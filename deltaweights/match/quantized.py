"""Finds tensors of the target that are tensors of the base, quantized to 8 bits, and their scales. Shapes
tell which scales are possible, and a sample which of them predict the target's elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Base, Checkpoint, Tensor
from ..codec import QUANTIZED, Quantized, convert, is_convertible, rescale, seal_prediction
from .names import FoundPrediction, Match

#: Elements that are compared, in runs all over the tensor.
_RUN, _RUNS = 1024, 8

#: The part of them that has to be predicted.
_ENOUGH = 0.5

#: Tensors beside a quantized one that are tried as its scales.
_MAX_CANDIDATES = 16

_Scales = NDArray[np.float32]


def find_quantized(matches: Sequence[Match], base: Checkpoint, target: Checkpoint) -> list[Match]:
    """The matches, with a prediction for quantized tensors whose base predicts most of a sample.

    Args:
        matches: those of all of the target's tensors.
    """
    wanted = [match for match in matches if _may_be_quantized(match)]
    if not wanted:
        return list(matches)
    beside = _Beside(target)
    found: dict[Tensor, Match] = {}
    with ExitStack() as expected:
        runs = [(match, run) for match in wanted for run in _runs(match.target)]
        expected.enter_context(target.source.expect(match.target.span(*run) for match, run in runs))
        spans = (
            span
            for match, (start, end) in runs
            if match.base
            for span in match.base.spans(_of_base(match, start), _of_base(match, end))
        )
        expected.enter_context(base.source.expect(spans))
        for match in wanted:
            if predictor := _best(match, beside.candidates(match.target)):
                stored = seal_prediction(predictor.to_bytes())
                prediction = FoundPrediction("quantized", stored, predictor)
                found[match.target] = replace(match, shared_bytes=match.target.nbytes, prediction=prediction)
    return [found.get(match.target, match) for match in matches]


def _may_be_quantized(match: Match) -> bool:
    new, old = match.target, match.base
    if not old or match.shared_bytes or new.dtype not in QUANTIZED or not is_convertible(old.dtype, "F32"):
        return False
    return (
        new.info.numel >= 64
        and len(new.info.shape) >= 2
        and rescale(old.nbytes, old.dtype, new.dtype) == new.nbytes
    )


def _of_base(match: Match, position: int) -> int:
    assert match.base
    return rescale(position, match.target.dtype, match.base.dtype)


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """First bytes and ends of the sample (an element is a byte)."""
    count = min(_RUNS, -(-tensor.nbytes // _RUN))
    last = max(0, tensor.nbytes - _RUN)
    starts = sorted({last * k // max(1, count - 1) for k in range(count)})
    return [(start, min(start + _RUN, tensor.nbytes)) for start in starts]


class _Beside:
    """The tensors that stand beside each tensor of a checkpoint, by name."""

    def __init__(self, target: Checkpoint) -> None:
        self._by_module: dict[str, list[Tensor]] = {}
        for tensor in target.tensors:
            module = _module(tensor.name)
            for above in (module, _module(module)):
                self._by_module.setdefault(above, []).append(tensor)

    def candidates(self, tensor: Tensor) -> list[_Scales]:
        """What may be its scales, as float32: floats beside or below it, few for each of its elements."""
        modules = (_module(tensor.name), tensor.name)
        found = [
            other
            for module in modules
            for other in self._by_module.get(module, ())
            if is_convertible(other.dtype, "F32") and 0 < other.info.numel <= tensor.info.numel // 8
        ]
        # Names tell which to try first, and no more.
        found.sort(key=lambda other: ("scale" not in other.name, not other.name.startswith(tensor.name)))
        return [_values(other) for other in found[:_MAX_CANDIDATES]]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _values(tensor: Tensor) -> _Scales:
    raw = np.empty(tensor.nbytes, np.uint8)
    tensor.read_into(0, raw)
    values: _Scales = convert(raw, tensor.dtype, "F32").view("<f4").reshape(tensor.info.shape)
    return values


def _best(match: Match, candidates: Sequence[_Scales]) -> Quantized | None:
    """What predicts most of the sample, if that is enough."""
    assert match.base
    sample = [
        (
            start,
            _read(match.target, start, end),
            _read(match.base, _of_base(match, start), _of_base(match, end)),
        )
        for start, end in _runs(match.target)
    ]
    total = sum(target.size for _, target, _ in sample)
    best: tuple[int, Quantized | None] = (int(_ENOUGH * total), None)
    for predictor in _predictors(match, candidates):
        right = sum(
            int(np.count_nonzero(predictor.predict(base, start) == target)) for start, target, base in sample
        )
        if right > best[0]:
            best = right, predictor
        if right > 0.99 * total:
            break
    return best[1]


def _read(tensor: Base, start: int, end: int) -> NDArray[np.uint8]:
    out = np.empty(end - start, np.uint8)
    tensor.read_into(start, out)
    return out


def _predictors(match: Match, candidates: Sequence[_Scales]) -> Iterator[Quantized]:
    """Every way to read the candidates as scales of blocks: of the elements, or their inverse, or what 127
    stands for; and no scale at all."""
    assert match.base
    *_, columns = match.target.info.shape
    rows = match.target.info.numel // columns
    for values in candidates:
        for block in _blocks(values.shape, match.target.info.shape, rows, columns):
            shape = -(-rows // block[0]), -(-columns // block[1])
            if shape[0] * shape[1] != values.size:
                continue
            with np.errstate(all="ignore"):
                readings = (values, values / np.float32(127), np.float32(1) / values)
            for scales in readings:
                yield Quantized(
                    match.target.dtype, match.base.dtype, columns, block, scales.reshape(shape).astype("<f4")
                )
    one = np.ones((1, 1), np.float32)
    yield Quantized(match.target.dtype, match.base.dtype, columns, (rows, columns), one)


def _blocks(
    scales: tuple[int, ...], tensor: tuple[int, ...], rows: int, columns: int
) -> Iterator[tuple[int, int]]:
    """The sizes of blocks (rows, columns) that such scales may have in a tensor of such a shape."""
    count = int(np.prod(scales, dtype=np.int64))
    if count == 1:
        yield rows, columns
    elif count == rows:
        yield 1, columns
    elif count == columns:
        yield rows, 1
    if count == tensor[0] > 1:
        yield rows // tensor[0], columns  # one for each expert of a stack
    if len(scales) >= 2 and scales[-1] and count % scales[-1] == 0:
        high, wide = _block(rows, count // scales[-1]), _block(columns, scales[-1])
        if high and wide:
            yield high, wide


def _block(length: int, count: int) -> int | None:
    """The length of ``count`` blocks, the last of which may be shorter: a power of two, if one fits."""
    longest = -(-length // count)
    powers = [1 << k for k in range(length.bit_length()) if -(-length // (1 << k)) == count]
    return powers[-1] if powers else (longest if -(-length // longest) == count else None)
