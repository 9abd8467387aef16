"""Keeps a publisher's last state, and writes the payloads of the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import chain, islice

import numpy as np
import torch

from ... import codec
from ...payload import CodedChunk, PayloadFile, encode_row
from ...storage import PartialFile
from ...workers import Workers
from .records import CHUNK_BYTES, StreamTensor, tensor_digest
from .state import StateTensor, owners, plan_of

_METADATA = {"format": "deltaweights-stream"}

#: The facts that are fixed within a stream: name, dtype, shape and tie of every tensor.
StateLayout = list[tuple[str, str, tuple[int, ...], str | None]]


def layout_of(state: Mapping[str, StateTensor]) -> StateLayout:
    """The state's layout, sorted by name."""
    first = owners(state)
    return [
        (name, tensor.code, tensor.shape, None if first[name] == name else first[name])
        for name, tensor in state.items()
    ]


class KeptState:
    """A copy of a state's bytes in the CPU's memory, pinned if the state is on a CUDA device, with the
    checksums of its chunks. Tied tensors are kept once."""

    def __init__(self, state: Mapping[str, StateTensor], workers: Workers) -> None:
        self.layout = layout_of(state)
        own = {name: state[name] for name, _, _, like in self.layout if like is None}
        self._codes = {name: tensor.code for name, tensor in own.items()}
        self._plans = {name: plan_of(tensor) for name, tensor in own.items()}
        self._bytes = {
            name: torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_on_cuda).numpy()
            for name, tensor in own.items()
        }
        self._sums = {name: np.zeros(plan.count, "<u8") for name, plan in self._plans.items()}
        self.take(state, workers)

    @property
    def nbytes(self) -> int:
        """Size of all tensors, tied ones once."""
        return sum(kept.size for kept in self._bytes.values())

    def take(self, state: Mapping[str, StateTensor], workers: Workers) -> None:
        """Keep a new state of the same layout."""

        def copy(name: str, index: int) -> int:
            start, end = self._plans[name].span(index)
            self._bytes[name][start:end] = state[name].read(start, end)
            return codec.checksum(self._bytes[name][start:end])

        jobs = [(name, index) for name, plan in self._plans.items() for index in range(plan.count)]
        for (name, index), value in zip(jobs, workers.map(lambda job: copy(*job), jobs), strict=True):
            self._sums[name][index] = value

    def tensors(self) -> tuple[StreamTensor, ...]:
        """The record's entries for the tensors."""
        digests = {name: tensor_digest(sums.tobytes()) for name, sums in self._sums.items()}
        return tuple(
            StreamTensor(name, code, shape, digests[like or name], like)
            for name, code, shape, like in self.layout
        )

    def write_update(
        self, file: PartialFile, state: Mapping[str, StateTensor], workers: Workers
    ) -> list[str]:
        """Write an update from the kept state to ``state``, and keep ``state`` instead.

        After an error, the kept bytes are a mix of both.

        Returns:
            The names of the tensors that changed.
        """

        def encode(name: str, index: int) -> list[CodedChunk]:
            start, end = self._plans[name].span(index)
            old, new = self._bytes[name][start:end], state[name].read(start, end)
            method, data = codec.encode_chunk(old, new, self._codes[name], quick=True)
            before = int(self._sums[name][index])  # known, so only the new bytes are hashed
            if method == codec.Method.SAME:
                return [CodedChunk(method, before, before, b"", 0)]
            old[:] = new
            return [CodedChunk(method, before, codec.checksum(old), data, 1)]

        # Leaving out unchanged tensors keeps the header short. The comparison stops at the first difference,
        # but is not worth a copy from a device.
        names = [name for name in self._plans if not self._is_same(name, state[name])]
        return self._write(file, names, encode, workers)

    def _is_same(self, name: str, tensor: StateTensor) -> bool:
        return tensor.is_on_cpu and all(
            np.array_equal(self._bytes[name][start:end], tensor.read(start, end))
            for start, end in self._plans[name]
        )

    def write_anchor(self, file: PartialFile, workers: Workers) -> None:
        """Write the kept state, without a base."""

        def encode(name: str, index: int) -> list[CodedChunk]:
            start, end = self._plans[name].span(index)
            return encode_row(self._bytes[name][start:end], None, self._codes[name], CHUNK_BYTES)

        self._write(file, list(self._plans), encode, workers, is_anchor=True)

    def _write(
        self,
        file: PartialFile,
        names: Iterable[str],
        encode: Callable[[str, int], list[CodedChunk]],
        workers: Workers,
        *,
        is_anchor: bool = False,
    ) -> list[str]:
        """Write a safetensors file of payloads, except for unchanged tensors. Returns the names of the
        others."""
        plans = {name: self._plans[name] for name in names}
        payloads = PayloadFile(file, {name: plan.nbytes for name, plan in plans.items()}, _METADATA)
        jobs = ((name, index) for name, plan in plans.items() for index in range(plan.count))
        with closing(workers.map(lambda job: encode(*job), jobs)) as coded:
            chunks = chain.from_iterable(coded)
            for name, plan in plans.items():
                written = payloads.write(name, plan, islice(chunks, plan.count), skip_same=not is_anchor)
                self._sums[name] = written.records["target"].astype("<u8")
        return [info.name for info in payloads.finish()]
