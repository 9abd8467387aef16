"""Applies a weight stream's updates to chunks on GPUs, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .... import codec
from ....errors import PayloadError
from ....workers import Workers
from ...tensors import settle
from .. import gpu
from ..payloads import Chunk, StreamPayload
from ..state import StateTensor, plan_of

#: The number of adjacent chunks to patch at once.
_AT_ONCE = 64

#: A tensor, its bytes on a GPU, and some of its adjacent chunks.
_Group: TypeAlias = tuple[StateTensor, Tensor, list[Chunk]]


class _Patched(NamedTuple):
    """Chunks of a tensor after all their steps."""

    memory: Tensor
    chunks: list[Chunk]
    spans: list[tuple[int, int]]  # addresses
    expected: list[int]  # their checksums


class GpuPatches:
    """The patches made on GPUs, and the elements needed to undo them."""

    def __init__(self) -> None:
        self._overwritten: list[gpu.Elements] = []

    def apply(
        self,
        state: Mapping[str, StateTensor],
        steps_of: Callable[[Chunk], Iterable[StreamPayload]],
        workers: Workers,
    ) -> list[Chunk]:
        """Take all possible chunks through their steps, and check them.

        Returns the other chunks: those on other devices, not coded as patches, or not aligned for a kernel.
        If a chunk comes out wrong, all chunks on its device are restored and returned.
        """
        elsewhere: list[Chunk] = []
        groups: list[_Group] = []
        for name, tensor in state.items():
            chunks = [(name, index) for index in range(plan_of(tensor).count)]
            memory = tensor.on_gpu
            if memory is None:
                elsewhere += chunks
                continue
            for first in range(0, len(chunks), _AT_ONCE):
                groups.append((tensor, memory, chunks[first : first + _AT_ONCE]))
        try:
            return elsewhere + self._patch_all(groups, steps_of, workers)
        except torch.cuda.OutOfMemoryError:  # the old elements take memory; single chunks need none
            self.put_back()
            return elsewhere + [chunk for *_, chunks in groups for chunk in chunks]

    def _patch_all(
        self,
        groups: Sequence[_Group],
        steps_of: Callable[[Chunk], Iterable[StreamPayload]],
        workers: Workers,
    ) -> list[Chunk]:
        """See :meth:`apply`. One thread does this: two would spend more time on Python's lock than they
        save."""
        left: list[Chunk] = []
        patched: list[_Patched] = []
        for group in groups:
            workers.check()
            others, found = self._patch(*group, steps_of)
            left += others
            patched += found
        for device in {one.memory.device for one in patched}:
            left += self._check([one for one in patched if one.memory.device == device])
        return left

    def put_back(self) -> None:
        """Restore the tensors."""
        _put_back(self._overwritten)

    def _patch(
        self,
        tensor: StateTensor,
        memory: Tensor,
        chunks: Sequence[Chunk],
        steps_of: Callable[[Chunk], Iterable[StreamPayload]],
    ) -> tuple[list[Chunk], list[_Patched]]:
        """Take adjacent chunks of one tensor through their steps. Returns (chunks left, patched chunks)."""
        plan = plan_of(tensor)
        first = plan.span(chunks[0][1])[0]
        memory = memory[first : plan.span(chunks[-1][1])[1]]
        left: list[Chunk] = []
        patches: list[tuple[int, list[codec.Patch]]] = []
        patched = _Patched(memory, [], [], [])
        for chunk in chunks:
            start, end = (place - first for place in plan.span(chunk[1]))
            steps = list(steps_of(chunk))
            can_be = gpu.can_check(memory, start, end)
            found = self._read(steps, chunk[1], end - start, tensor.code) if can_be else None
            if found is None:
                left.append(chunk)
            elif found:
                patches.append((start, found))
                patched.chunks.append(chunk)
                patched.spans.append(gpu.addresses(memory, start, end))
                patched.expected.append(int(steps[-1].table[0]["target"][chunk[1]]))
        for step in range(max((len(found) for _, found in patches), default=0)):
            some = [(start, found[step]) for start, found in patches if step < len(found)]
            self._overwritten.append(gpu.patch(memory, some))
        return left, [patched] if patches else []

    def _read(
        self, steps: Sequence[StreamPayload], index: int, nbytes: int, dtype: str
    ) -> list[codec.Patch] | None:
        """The changes in a chunk at each step; None if one of them is not a patch."""
        found = []
        if any(payload.method(index) != codec.Method.SPARSE for payload in steps):
            return None  # without reading the data
        for payload in steps:
            try:
                patch = codec.read_patch(*payload.chunk(index), nbytes, dtype)
            except PayloadError:  # decoding on the CPU reports the error
                return None
            if patch is None:
                return None
            found.append(patch)
        return found

    def _check(self, patched: Sequence[_Patched]) -> list[Chunk]:
        """Check chunks on one device. If one is wrong, restores and returns all of them."""
        device = patched[0].memory.device
        sums = gpu.Checksums(device, [span for one in patched for span in one.spans])
        if sums.values().tolist() == [value for one in patched for value in one.expected]:
            return []
        here = [one for one in self._overwritten if one.tensor.device == device]
        self._overwritten = [one for one in self._overwritten if one.tensor.device != device]
        _put_back(here)
        return [chunk for one in patched for chunk in one.chunks]


def _put_back(overwritten: list[gpu.Elements]) -> None:
    """Undo the patches, the last one first, empty the list, and wait for the devices."""
    tensors = [one.tensor for one in overwritten]
    while overwritten:
        overwritten[-1].put()
        overwritten.pop()
    settle(tensors)
