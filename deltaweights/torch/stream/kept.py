"""The state that was published last, as its publisher keeps it, and payloads of what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ... import codec
from ...checkpoint import MAX_HEADER_BYTES, TensorInfo, build_header
from ...errors import OutputError
from ...payload import ChunkPlan
from ...storage import PartialFile
from ...workers import Workers
from .records import StreamTensor, tensor_digest
from .state import StateTensor, owners, plan_of

_METADATA = {"format": "deltaweights-stream"}

#: What may not change within a stream: of every tensor name, dtype, shape, and which one it is tied to.
StateLayout = list[tuple[str, str, tuple[int, ...], str | None]]


def layout_of(state: Mapping[str, StateTensor]) -> StateLayout:
    """The state's layout, sorted by name."""
    first = owners(state)
    return [
        (name, tensor.code, tensor.shape, None if first[name] == name else first[name])
        for name, tensor in state.items()
    ]


@dataclass(frozen=True, slots=True)
class _Coded:
    """One chunk, encoded: its record and its data."""

    record: tuple[int, int, int, int]
    data: bytes


class KeptState:
    """A copy of a state's bytes in the CPU's memory, pinned where the state is on a CUDA device, with the
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
        """Keep another state of the same layout."""

        def copy(name: str, index: int) -> int:
            start, end = self._plans[name].span(index)
            self._bytes[name][start:end] = state[name].read(start, end)
            return codec.checksum(self._bytes[name][start:end])

        jobs = [(name, index) for name, plan in self._plans.items() for index in range(plan.count)]
        for (name, index), value in zip(jobs, workers.map(lambda job: copy(*job), jobs), strict=True):
            self._sums[name][index] = value

    def tensors(self) -> tuple[StreamTensor, ...]:
        """What a record says of the tensors."""
        digests = {name: tensor_digest(sums.tobytes()) for name, sums in self._sums.items()}
        return tuple(
            StreamTensor(name, code, shape, digests[like or name], like)
            for name, code, shape, like in self.layout
        )

    def write_update(
        self, file: PartialFile, state: Mapping[str, StateTensor], workers: Workers
    ) -> list[str]:
        """Write what ``state`` adds to the state that is kept, and keep ``state`` instead.

        If it raises, what is kept is neither.

        Returns:
            The names of the tensors that changed.
        """

        def encode(name: str, index: int) -> _Coded:
            start, end = self._plans[name].span(index)
            old, new = self._bytes[name][start:end], state[name].read(start, end)
            method, data = codec.encode_chunk(old, new, self._codes[name], quick=True)
            before = int(self._sums[name][index])
            if method == codec.Method.SAME:
                return _Coded((method, 0, before, before), b"")
            old[:] = new
            return _Coded((method, len(data), before, codec.checksum(old)), data)

        # To leave out tensors that did not change keeps the header short. Where a look takes a copy, it is
        # not worth it; of those that did change, it ends at the first difference.
        names = [name for name in self._plans if not self._is_same(name, state[name])]
        return self._write(file, names, encode, workers)

    def _is_same(self, name: str, tensor: StateTensor) -> bool:
        return tensor.is_on_cpu and all(
            np.array_equal(self._bytes[name][start:end], tensor.read(start, end))
            for start, end in self._plans[name]
        )

    def write_anchor(self, file: PartialFile, workers: Workers) -> None:
        """Write the state that is kept, by itself."""

        def encode(name: str, index: int) -> _Coded:
            start, end = self._plans[name].span(index)
            method, data = codec.encode_chunk(None, self._bytes[name][start:end], self._codes[name])
            return _Coded((method, len(data), 0, int(self._sums[name][index])), data)

        self._write(file, list(self._plans), encode, workers, is_anchor=True)

    def _write(
        self,
        file: PartialFile,
        names: Iterable[str],
        encode: Callable[[str, int], _Coded],
        workers: Workers,
        *,
        is_anchor: bool = False,
    ) -> list[str]:
        """A safetensors file of payloads, but for tensors that are the same. Returns the others' names."""
        plans = {name: self._plans[name] for name in names}
        room = _header_room(plans)
        jobs = ((name, index) for name, plan in plans.items() for index in range(plan.count))
        coded = workers.map(lambda job: encode(*job), jobs)
        infos, position = [], 0
        for name, plan in plans.items():
            records = np.zeros(plan.count, codec.RECORD)
            end = position + records.nbytes
            for index in range(plan.count):
                chunk = next(coded)
                file.write_at(room + end, chunk.data)
                end += len(chunk.data)
                for key, value in zip(("method", "length", "base", "target"), chunk.record, strict=True):
                    records[key][index] = value
            if not is_anchor and not records["method"].any():
                continue
            self._sums[name] = records["target"].astype("<u8")
            file.write_at(room + position, records.tobytes())
            infos.append(TensorInfo(name, "U8", (end - position,), position, end))
            position = end
        file.write_at(0, build_header(infos, _METADATA, room))
        return [info.name for info in infos]


def _header_room(plans: Mapping[str, ChunkPlan]) -> int:
    """Bytes that the header may need: the payloads' sizes are known only after them.

    Raises:
        OutputError: more than safetensors allows.
    """
    largest, position = [], 0
    for name, plan in plans.items():
        length = plan.nbytes + plan.count * codec.RECORD.itemsize
        largest.append(TensorInfo(name, "U8", (length,), position, position + length))
        position += length
    room = len(build_header(largest, _METADATA))
    if room > MAX_HEADER_BYTES:
        raise OutputError(
            "The state has too many tensors for one update",
            f"Its header would have {room} bytes; safetensors allows {MAX_HEADER_BYTES}.",
            "Publish a part of the tensors.",
        )
    return room
