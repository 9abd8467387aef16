"""Payload files of a weight stream, read: what each of them has for every chunk of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ... import codec
from ...checkpoint import Header, TensorInfo, parse_header
from ...checkpoint.header import header_length
from ...errors import HeaderError, PayloadError
from ...payload import ChunkPlan, check_records
from ...storage.local import LocalFile
from ...storage.source import HEAD_BYTES
from .records import StateRecord, damaged, tensor_digest
from .state import StateTensor, plan_of

#: A tensor's name, and which of its chunks.
Chunk: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class StreamStep:
    """A payload file that is here, and the record of the state that it leads to. An anchor's leads there from
    nothing, an update's from the state before."""

    record: StateRecord
    file: LocalFile
    is_anchor: bool


@dataclass(frozen=True, slots=True)
class Payload:
    """One tensor's payload: its chunk records (:data:`codec.RECORD`), and where their data is in the file."""

    file: LocalFile
    records: NDArray[np.void]
    starts: NDArray[np.int64]

    def data(self, index: int, room: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint8]]:
        """How a chunk is coded, and its data, which is read into ``room``."""
        length = int(self.records["length"][index])
        if length > len(room):
            raise damaged(self.file.path, f"A chunk is coded in {length} bytes")
        self.file.read_into(int(self.starts[index]), room[:length])
        return int(self.records["method"][index]), room[:length]

    def follows(self, digest: str | None) -> bool:
        """Whether it is made against a tensor of this digest, and keeps the chunks that it calls the same."""
        same = self.records["method"] == codec.Method.SAME
        is_same = (self.records["base"] == self.records["target"])[same].all()
        return bool(is_same) and tensor_digest(self.records["base"].tobytes()) == digest

    def leads_to(self, index: int, chunk: NDArray[np.uint8]) -> bool:
        """Whether the chunk is what was encoded."""
        return codec.checksum(chunk) == int(self.records["target"][index])


def read_payloads(step: StreamStep, state: Mapping[str, StateTensor]) -> dict[str, Payload]:
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


def _read_payload(file: LocalFile, header: Header, info: TensorInfo, plan: ChunkPlan) -> Payload:
    offset = header.data_start + info.start
    table = file.read(offset, min(plan.count * codec.RECORD.itemsize, info.nbytes))
    try:
        records, starts = check_records(table, plan, info.nbytes)
    except PayloadError as error:
        raise damaged(file.path, f"Tensor {info.name!r}: {error.what}") from error
    return Payload(file, records, starts + offset)
