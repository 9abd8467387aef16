"""Reads payload files of a weight stream: each file's data for every chunk of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ... import codec
from ...checkpoint import Tensor, read_header
from ...errors import BaseMismatchError, DeltaError, DeltaWeightsError, HeaderError
from ...payload import Faults, StoredPayload
from ...storage.local import LocalFile
from .records import StateRecord, damaged, tensor_digest
from .state import StateTensor, plan_of

#: A tensor's name, and the index of one of its chunks.
Chunk: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class StreamStep:
    """A local payload file, and the record of the state that it leads to. An anchor's file leads there from
    nothing, an update's from the state before."""

    record: StateRecord
    file: LocalFile
    is_anchor: bool


class _StreamFaults(Faults):
    """The faults of a weight stream's file. Its SHA-256 was compared after the download, and the tensors are
    in memory, so no network is involved."""

    def damaged(self, path: str, why: str) -> DeltaError:
        """The error to raise if the file at ``path`` differs from the published one."""
        return damaged(path, why)

    def is_damaged(self, path: str) -> bool:
        """Never."""
        return False

    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise if the model has changed since the last sync."""
        return BaseMismatchError(
            "The model has changed since the last sync",
            f"{why[0].upper()}{why[1:]}.",
            "Only sync may write to it: load the base again, or let the publisher write an anchor.",
        )


_FAULTS = _StreamFaults()


class StreamPayload(StoredPayload):
    """One tensor's payload in a file of a stream."""

    def chunk(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """A chunk's method, and its data, valid until this thread reads more."""
        return self.method(index), self.read_data(index, index + 1)

    def follows(self, digest: str | None) -> bool:
        """Whether it was made against a tensor with this digest, including the chunks that it calls the
        same."""
        records, _ = self.table
        same = records["method"] == codec.Method.SAME
        is_same = (records["base"] == records["target"])[same].all()
        return bool(is_same) and tensor_digest(records["base"].tobytes()) == digest

    def fault(self, index: int, base: NDArray[np.uint8] | None, why: str) -> DeltaWeightsError:
        """The error if ``base`` and a chunk's data do not give its target: one of the two is wrong."""
        if base is not None and not self.is_from(index, base):
            return self.faults.wrong_base(f"its tensor {self.name!r} was changed by other code")
        return self.damaged(f"Chunk {index}: {why}")


def read_payloads(step: StreamStep, state: Mapping[str, StateTensor]) -> dict[str, StreamPayload]:
    """The file's payloads by the names of their tensors, checked against the record."""
    own = {tensor.name: tensor for tensor in step.record.tensors if tensor.like is None}
    where = step.file.path
    try:
        shard = read_header(step.file, where)
    except HeaderError as error:
        raise damaged(where, error.why.rstrip(".")) from error
    found = {}
    for info in shard.header.tensors:
        if info.name not in own:
            raise damaged(where, f"It has a payload for {info.name!r}, which its record lacks")
        tensor = state[info.name]
        payload = StreamPayload(info.name, tensor.code, plan_of(tensor), Tensor(info, shard), _FAULTS)
        if tensor_digest(payload.table[0]["target"].tobytes()) != own[info.name].digest:
            raise damaged(where, f"It does not lead to tensor {info.name!r} of its record")
        found[info.name] = payload
    return found
