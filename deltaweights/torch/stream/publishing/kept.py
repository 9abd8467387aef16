"""Keeps a publisher's last state, and writes the payloads of the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import chain, islice

import numpy as np
import torch

from .... import codec
from ....payload import CodedChunk, PayloadFile, encode_row
from ....storage import PartialFile
from ....workers import Workers
from ..records import CHUNK_BYTES
from ..state import StateTensor, plan_of

_METADATA = {"format": "deltaweights-stream"}


class KeptState:
    """A copy of a state's bytes in the CPU's memory, pinned if the state is on a CUDA device, with the
    checksums of its chunks: of the tensors, or parts of tensors, that this process writes.

    Args:
        pieces: them, by the names of their payloads; those that are in the same memory once.
        quick: as for :func:`codec.encode_chunk`.
    """

    def __init__(self, pieces: Mapping[str, StateTensor], workers: Workers, *, quick: bool) -> None:
        self._quick = quick
        self._codes = {name: tensor.code for name, tensor in pieces.items()}
        self._plans = {name: plan_of(tensor) for name, tensor in pieces.items()}
        self._bytes = {
            name: torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_on_cuda).numpy()
            for name, tensor in pieces.items()
        }
        self._sums = {name: np.zeros(plan.count, "<u8") for name, plan in self._plans.items()}
        self.take(pieces, workers)

    @property
    def nbytes(self) -> int:
        """Size of all pieces."""
        return sum(kept.size for kept in self._bytes.values())

    @property
    def sums(self) -> dict[str, bytes]:
        """The checksums of each piece's chunks, as in :func:`records.tensor_digest`."""
        return {name: sums.tobytes() for name, sums in self._sums.items()}

    def take(self, pieces: Mapping[str, StateTensor], workers: Workers) -> None:
        """Keep a new state of the same layout."""

        def copy(name: str, index: int) -> int:
            start, end = self._plans[name].span(index)
            self._bytes[name][start:end] = pieces[name].read(start, end)
            return codec.checksum(self._bytes[name][start:end])

        jobs = [(name, index) for name, plan in self._plans.items() for index in range(plan.count)]
        for (name, index), value in zip(jobs, workers.map(lambda job: copy(*job), jobs), strict=True):
            self._sums[name][index] = value

    def write_update(
        self, file: PartialFile, pieces: Mapping[str, StateTensor], workers: Workers
    ) -> list[str]:
        """Write an update from the kept state to ``pieces``, and keep them instead.

        After an error, the kept bytes are a mix of both.

        Returns:
            The names of the pieces that changed.
        """

        def encode(name: str, index: int) -> list[CodedChunk]:
            start, end = self._plans[name].span(index)
            old, new = self._bytes[name][start:end], pieces[name].read(start, end)
            method, data = codec.encode_chunk(old, new, self._codes[name], quick=self._quick)
            before = int(self._sums[name][index])  # known, so only the new bytes are hashed
            if method == codec.Method.SAME:
                return [CodedChunk(method, before, before, b"", 0)]
            old[:] = new
            return [CodedChunk(method, before, codec.checksum(old), data, 1)]

        # Leaving out unchanged tensors keeps the header short. The comparison stops at the first difference,
        # but is not worth a copy from a device.
        names = [name for name in self._plans if not self._is_same(name, pieces[name])]
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
