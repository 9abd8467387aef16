"""Payload files of a weight stream, one after the other, onto the tensors of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import Header, TensorInfo, parse_header
from ..checkpoint.header import header_length
from ..checkpoint.source import HEAD_BYTES, LocalFile
from ..errors import BaseMismatchError, CheckpointError, HeaderError, PayloadError
from ..pipeline import Workers
from .state import StateTensor, owners, plan_of
from .stream import CHUNK_BYTES, Record, damaged, tensor_digest


@dataclass(frozen=True, slots=True)
class Step:
    """A payload file that is here, and the record of the state that it leads to. An anchor's leads there from
    nothing, an update's from the state before."""

    record: Record
    file: LocalFile
    is_anchor: bool


@dataclass(frozen=True, slots=True)
class _Payload:
    """One tensor's payload: its chunk records (:data:`codec.RECORD`), and where their data is in the file."""

    file: LocalFile
    records: NDArray[np.void]
    starts: NDArray[np.int64]

    def data(self, index: int) -> NDArray[np.uint8]:
        """The data of a chunk."""
        length = int(self.records["length"][index])
        if length > CHUNK_BYTES:
            raise damaged(self.file.path, f"A chunk is coded in {length} bytes")
        found = np.empty(length, np.uint8)
        self.file.read_into(int(self.starts[index]), found)
        return found


class _Buffers(threading.local):
    """Each thread's two chunks, to decode from one to the other."""

    def __init__(self) -> None:
        self.pair = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(2)]


class Replay:
    """What leads the tensors of ``state`` to the last step's record.

    A chunk is taken through all steps at once: what is between is nowhere but in two buffers a thread.

    Args:
        before: the digest of every tensor as it is, by name; not needed where the first step is an anchor.

    Raises:
        DeltaError: a file or a record contradicts another.
        CheckpointError: tensors are tied that are not the same after the last step.
    """

    def __init__(
        self, state: Mapping[str, StateTensor], steps: Sequence[Step], before: Mapping[str, str]
    ) -> None:
        self._state = state
        self._starts_anew = steps[0].is_anchor
        self._payloads: dict[str, list[_Payload]] = {}
        # Tied tensors are one and the same memory here, whatever they are at the publisher's.
        first = owners(state)
        own = set(first.values())
        for step in steps:
            found = _read_payloads(step, state)
            for tensor in step.record.tensors:
                payload = found.get(tensor.like or tensor.name)
                if payload is None and (step.is_anchor or before.get(tensor.name) != tensor.digest):
                    raise damaged(step.file.path, f"It does not lead to tensor {tensor.name!r} of its record")
                if payload and tensor.name in own:
                    self._payloads.setdefault(tensor.name, []).append(payload)
            before = {tensor.name: tensor.digest for tensor in step.record.tensors}
        for name, owner in first.items():
            if before[name] != before[owner]:
                raise CheckpointError(
                    "The model does not fit the stream",
                    f"It ties {name!r} to {owner!r}; in the stream they differ.",
                    "Untie them, as the publisher does.",
                )
        self._buffers = _Buffers()

    def verify(self, workers: Workers) -> None:
        """Decode all of it and write nothing.

        Raises:
            BaseMismatchError: the tensors are not what the first update was made from.
            DeltaError: a payload is damaged.
        """
        for _ in workers.map(lambda chunk: self._decode(*chunk, check=True), self._chunks()):
            pass

    def write(self, workers: Workers, *, check: bool) -> None:
        """Decode all of it and write it to the tensors.

        Args:
            check: whether to make sure, of each chunk before it is written, that it is right; what
                :meth:`verify` has passed needs no more of it. Raises as that does.
        """

        def write(name: str, index: int) -> None:
            data = self._decode(name, index, check=check)
            if data is not None:
                self._state[name].write(plan_of(self._state[name]).span(index)[0], data)

        for _ in workers.map(lambda chunk: write(*chunk), self._chunks()):
            pass
        for name in self._payloads:
            self._state[name].finish()

    def _chunks(self) -> Iterator[tuple[str, int]]:
        for name in self._payloads:
            for index in range(plan_of(self._state[name]).count):
                yield name, index

    def _decode(self, name: str, index: int, *, check: bool) -> NDArray[np.uint8] | None:
        """A chunk after the last step; None where it stays as it is. Valid until this thread decodes more."""
        tensor = self._state[name]
        start, end = plan_of(tensor).span(index)
        now = before = None if self._starts_anew else tensor.read(start, end)
        buffers = self._buffers.pair
        for payload in self._payloads[name]:
            method = int(payload.records["method"][index])
            if method == codec.Method.SAME and now is not None:
                continue
            out = buffers[0][: end - start]
            buffers.reverse()
            _decode_chunk(payload, index, now, tensor, out)
            if check and codec.checksum(out) != int(payload.records["target"][index]):
                if now is not None and codec.checksum(now) != int(payload.records["base"][index]):
                    raise _other_state(name)
                raise damaged(payload.file.path, f"Chunk {index} of tensor {name!r} does not decode")
            now = out
        return None if now is before else now


def _decode_chunk(
    payload: _Payload, index: int, base: NDArray[np.uint8] | None, tensor: StateTensor, out: NDArray[np.uint8]
) -> None:
    try:
        method = int(payload.records["method"][index])
        codec.decode_chunk(method, payload.data(index), base, tensor.code, out)
    except PayloadError as error:
        if base is not None and codec.checksum(base) != int(payload.records["base"][index]):
            raise _other_state(tensor.name) from error
        raise damaged(payload.file.path, f"Tensor {tensor.name!r}: {error.what}") from error


def _other_state(name: str) -> BaseMismatchError:
    return BaseMismatchError(
        "The model is not in the state that it was left in",
        f"Its tensor {name!r} was changed by somebody else.",
        "Nothing but sync may write to it; load the base again, or let the publisher write an anchor.",
    )


def _read_payloads(step: Step, state: Mapping[str, StateTensor]) -> dict[str, _Payload]:
    """The file's payloads by the names of their tensors, checked against the record."""
    own = {tensor.name: tensor for tensor in step.record.tensors if tensor.like is None}
    try:
        header = _read_header(step.file)
    except HeaderError as error:
        raise damaged(step.file.path, error.why.rstrip(".")) from error
    found = {}
    for info in header.tensors:
        if info.name not in own:
            raise damaged(
                step.file.path, f"It has a payload for {info.name!r}, which its record does not have"
            )
        found[info.name] = _read_payload(step.file, header, info, plan_of(state[info.name]))
        if tensor_digest(found[info.name].records["target"].tobytes()) != own[info.name].digest:
            raise damaged(step.file.path, f"It does not lead to tensor {info.name!r} of its record")
    return found


def _read_header(file: LocalFile) -> Header:
    head = file.read(0, min(HEAD_BYTES, file.size))
    length = header_length(head[:8], file.size, file.path)
    if length > len(head):
        head += file.read(len(head), length - len(head))
    return parse_header(head[:length], file.size, file.path)


def _read_payload(file: LocalFile, header: Header, info: TensorInfo, plan: codec.ChunkPlan) -> _Payload:
    offset = header.data_start + info.start
    table = file.read(offset, min(plan.count * codec.RECORD.itemsize, info.nbytes))
    try:
        records, starts = codec.check_records(table, plan, info.nbytes)
    except PayloadError as error:
        raise damaged(file.path, f"Tensor {info.name!r}: {error.what}") from error
    return _Payload(file, records, starts + offset)
