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
from .records import StateRecord, damaged, record_name
from .state import StateTensor, plan_of

#: A tensor's name, and the index of one of its chunks.
Chunk: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class StreamStep:
    """Local payload files by their places in a record, and the record of the state that they lead to. An
    anchor's files lead there from nothing, an update's from the state before. Those without a payload that is
    wanted may be missing."""

    record: StateRecord
    files: Mapping[int, LocalFile]
    is_anchor: bool

    @property
    def where(self) -> str:
        """The first file's name, for messages."""
        return next((file.path for file in self.files.values()), record_name(self.record.number))


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

    def follows(self, sums: bytes | None) -> bool:
        """Whether it was made against a tensor whose chunks have these checksums, including the chunks that
        it calls the same."""
        records, _ = self.table
        same = records["method"] == codec.Method.SAME
        is_same = (records["base"] == records["target"])[same].all()
        return bool(is_same) and bool(records["base"].tobytes() == sums)

    @property
    def sums(self) -> bytes:
        """The checksums of the tensor's chunks afterwards."""
        return bytes(self.table[0]["target"].tobytes())

    def fault(self, index: int, base: NDArray[np.uint8] | None, why: str) -> DeltaWeightsError:
        """The error if ``base`` and a chunk's data do not give its target: one of the two is wrong."""
        if base is not None and not self.is_from(index, base):
            return self.faults.wrong_base(f"its tensor {self.name!r} was changed by other code")
        return self.damaged(f"Chunk {index}: {why}")


def read_payloads(step: StreamStep, state: Mapping[str, StateTensor]) -> dict[str, StreamPayload]:
    """The step's payloads by name, as far as they fit its record.

    Args:
        state: the record's tensors, or their parts, or some of them, by the names of their payloads.
    """
    places = {own: place for _, _, own, place in step.record.payloads()}
    wanted = {own: state[key] for _, key, own, _ in step.record.payloads() if key in state}
    found = {}
    for place, file in step.files.items():
        try:
            shard = read_header(file, file.path)
        except HeaderError as error:
            raise damaged(file.path, error.why.rstrip(".")) from error
        for info in shard.header.tensors:
            if places.get(info.name) != place:
                raise damaged(file.path, f"It has a payload for {info.name!r}, which its record lacks there")
            tensor = wanted.get(info.name)
            if tensor is not None:
                found[info.name] = StreamPayload(
                    info.name, tensor.code, plan_of(tensor), Tensor(info, shard), _FAULTS
                )
    return found
