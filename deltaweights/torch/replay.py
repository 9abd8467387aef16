"""Payload files of a weight stream, one after the other, onto the tensors of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import Header, TensorInfo, parse_header
from ..checkpoint.header import header_length
from ..checkpoint.source import HEAD_BYTES, LocalFile
from ..errors import BaseMismatchError, CheckpointError, DeltaWeightsError, HeaderError, PayloadError
from ..pipeline import Workers
from . import gpu
from .state import StateTensor, owners, plan_of
from .stream import CHUNK_BYTES, Record, damaged, tensor_digest

#: Chunks that a thread takes at once.
_BATCH = 8
#: Chunks that are patched on a GPU at once.
_GROUP = 64

_WRONG = "it does not decode to what was encoded"

#: A tensor's name, and which of its chunks.
_Chunk: TypeAlias = tuple[str, int]


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


class _Buffers(threading.local):
    """Each thread's memory for coded data, and two chunks to decode from one to the other."""

    def __init__(self) -> None:
        self.data = np.empty(CHUNK_BYTES, np.uint8)
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
                if payload and not step.is_anchor and not payload.follows(before.get(tensor.name)):
                    raise damaged(step.file.path, f"It does not follow the state before in {tensor.name!r}")
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
        #: Chunks that are written already, and what was there.
        self._overwritten: list[tuple[_Chunk, list[codec.Overwritten]]] = []
        self._overwritten_on_gpus: list[gpu.Overwritten] = []
        #: Chunks that are checked and still to be written.
        self._checked: list[_Chunk] = []

    def apply(self, workers: Workers, *, in_place: bool) -> None:
        """Bring the tensors to the last step. Every chunk is checked after every step.

        A chunk of which little changes gets that where it lies, on a GPU too, or else in a copy that is
        written back to its device. What was there is kept until all chunks are checked, unless ``in_place``.
        Other chunks are decoded and checked, and when all are, decoded again and written; ``in_place``, each
        is written as soon as it is checked.

        Raises:
            BaseMismatchError: the tensors are not what the first update was made from.
            DeltaError: a payload is damaged.
                With both, the tensors are as they were, unless ``in_place``.
        """
        if in_place:
            self._each(workers, self._patch_on_gpus(workers), self._check_and_write)
        else:
            try:
                self._each(workers, self._patch_on_gpus(workers), self._stage)
            except BaseException:
                self._put_back()
                raise
            self._each(workers, self._checked, self._write)
        for name in self._payloads:
            self._state[name].finish()

    def _each(self, workers: Workers, chunks: Iterable[_Chunk], work: Callable[[_Chunk], object]) -> None:
        """Do the work for all chunks, some at a time: to hand over each alone takes as long as its work."""

        def work_all(batch: list[_Chunk]) -> None:
            for chunk in batch:
                work(chunk)

        remaining = iter(chunks)
        batches = iter(lambda: list(islice(remaining, _BATCH)), [])
        with closing(workers.map(work_all, batches)) as done:  # in the end no thread is at work any more
            for _ in done:
                pass

    def _patch_on_gpus(self, workers: Workers) -> list[_Chunk]:
        """Patch what lies on GPUs there; returns the chunks that are left."""
        left: list[_Chunk] = []
        groups: list[list[_Chunk]] = []
        for name in self._payloads:
            chunks = [(name, index) for index in range(plan_of(self._state[name]).count)]
            if self._starts_anew or self._state[name].on_gpu is None:
                left += chunks
            else:
                groups += [chunks[first : first + _GROUP] for first in range(0, len(chunks), _GROUP)]
        with closing(workers.map(self._patch_group, groups)) as done:
            for others in done:
                left += others
        return left

    def _patch_group(self, chunks: Sequence[_Chunk]) -> list[_Chunk]:
        """Take chunks of one tensor, in a row on a GPU, through all steps at once.

        Returns those that cannot be taken so; all of them, and nothing is changed, where one turns out wrong.
        """
        first, end = self._span(chunks[0])[0], self._span(chunks[-1])[1]
        memory = self._state[chunks[0][0]].on_gpu
        assert memory is not None
        memory = memory[first:end]
        left: list[_Chunk] = []
        found: list[tuple[_Chunk, int, list[codec.Patch]]] = []
        for chunk in chunks:
            patches = self._patches(chunk) if gpu.can_check(memory, *self._within(chunk, first)) else None
            if patches is None:
                left.append(chunk)
            elif patches:
                found.append((chunk, self._span(chunk)[0] - first, patches))
        if not found:
            return left
        overwritten = [
            gpu.patch(memory, [(start, patches[step]) for _, start, patches in found if step < len(patches)])
            for step in range(max(len(patches) for _, _, patches in found))
        ]
        spans = [gpu.addresses(memory, *self._within(chunk, first)) for chunk, _, _ in found]
        sums = gpu.Checksums(memory.device, spans)
        expected = [int(list(self._steps(chunk))[-1].records["target"][chunk[1]]) for chunk, _, _ in found]
        if sums.values().tolist() != expected:
            _put_back_on_gpu(overwritten)
            return list(chunks)
        self._overwritten_on_gpus += overwritten
        return left

    def _within(self, chunk: _Chunk, first: int) -> tuple[int, int]:
        """The chunk's first byte and end, counted from byte ``first`` of its tensor."""
        start, end = self._span(chunk)
        return start - first, end - first

    def _patches(self, chunk: _Chunk) -> list[codec.Patch] | None:
        """What changes in a chunk at each step; None where one of them is no patch."""
        name, index = chunk
        start, end = self._span(chunk)
        found = []
        try:
            for payload in self._steps(chunk):
                method, data = payload.data(index, self._buffers.data)
                patch = codec.read_patch(method, data, end - start, self._state[name].code)
                if patch is None:
                    return None
                found.append(patch)
        except PayloadError:  # whoever decodes it otherwise says what is wrong
            return None
        return found

    def _stage(self, chunk: _Chunk) -> None:
        """Make sure that a chunk can be decoded; write it if that can be undone."""
        overwritten = self._patch(chunk)
        if overwritten is not None:
            self._overwritten.append((chunk, overwritten))
        elif self._decode(chunk, check=True) is not None:
            self._checked.append(chunk)

    def _put_back(self) -> None:
        """Undo what was written."""
        _put_back_on_gpu(self._overwritten_on_gpus)
        while self._overwritten:
            chunk, overwritten = self._overwritten.pop()
            memory = self._read(chunk)
            _put_back(memory, overwritten)
            self._give_back(chunk, memory)

    def _check_and_write(self, chunk: _Chunk) -> None:
        if self._patch(chunk) is None:
            data = self._decode(chunk, check=True)
            if data is not None:
                self._state[chunk[0]].write(self._span(chunk)[0], data)

    def _write(self, chunk: _Chunk) -> None:
        """Write a chunk that is known to be right."""
        tensor = self._state[chunk[0]]
        if tensor.is_on_cpu:
            self._decode(chunk, check=False, into=self._read(chunk))
        else:
            data = self._decode(chunk, check=False)
            assert data is not None
            tensor.write(self._span(chunk)[0], data)

    def _span(self, chunk: _Chunk) -> tuple[int, int]:
        name, index = chunk
        return plan_of(self._state[name]).span(index)

    def _read(self, chunk: _Chunk) -> NDArray[np.uint8]:
        """A chunk as it is: the tensor's own memory on a CPU, else a copy."""
        return self._state[chunk[0]].read(*self._span(chunk))

    def _give_back(self, chunk: _Chunk, memory: NDArray[np.uint8]) -> None:
        """Write what :meth:`_read` gave and was changed since, if it is a copy."""
        tensor = self._state[chunk[0]]
        if not tensor.is_on_cpu:
            tensor.write(self._span(chunk)[0], memory)

    def _patch(self, chunk: _Chunk) -> list[codec.Overwritten] | None:
        """Take a chunk through all steps where it lies, if each of them changes little of it.

        Returns what was there before each step; None where it cannot be done so. Raises as :meth:`apply`
        does. With both, nothing is written in the end.
        """
        name, index = chunk
        tensor = self._state[name]
        if self._starts_anew:
            return None
        steps = list(self._steps(chunk))
        if not steps:
            return []
        memory, done, is_done = self._read(chunk), list[codec.Overwritten](), False
        try:
            for payload in steps:
                method, data = payload.data(index, self._buffers.data)
                overwritten = codec.patch_chunk(method, data, memory, tensor.code)
                if overwritten is None:
                    return None
                done.append(overwritten)
                if not payload.leads_to(index, memory):
                    done.pop().put_back(memory)
                    raise _fault(payload, chunk, memory, _WRONG)
            self._give_back(chunk, memory)
            is_done = True
            return done
        except PayloadError as error:
            raise _fault(payload, chunk, memory, error.what) from error
        finally:
            if not is_done:
                _put_back(memory, done)

    def _decode(
        self, chunk: _Chunk, *, check: bool, into: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8] | None:
        """A chunk after the last step, valid until this thread decodes more; None where it stays as it is.

        Args:
            into: the chunk's own memory, to decode the last step to that.
        """
        tensor = self._state[chunk[0]]
        start, end = self._span(chunk)
        now = None if self._starts_anew else self._read(chunk) if into is None else into
        found = None
        steps = list(self._steps(chunk))
        for number, payload in enumerate(steps, 1):
            buffers = self._buffers.pair
            buffers.reverse()
            out = buffers[0][: end - start] if into is None or number < len(steps) else into
            method, data = payload.data(chunk[1], self._buffers.data)
            try:
                codec.decode_chunk(method, data, now, tensor.code, out)
            except PayloadError as error:
                raise _fault(payload, chunk, now, error.what) from error
            if check and not payload.leads_to(chunk[1], out):
                raise _fault(payload, chunk, now, _WRONG)
            now = found = out
        return found

    def _steps(self, chunk: _Chunk) -> Iterator[_Payload]:
        """The payloads that change the chunk."""
        name, index = chunk
        for number, payload in enumerate(self._payloads[name]):
            is_first_anchor = self._starts_anew and number == 0
            if is_first_anchor or payload.records["method"][index] != codec.Method.SAME:
                yield payload


def _put_back_on_gpu(steps: list[gpu.Overwritten]) -> None:
    while steps:
        steps.pop().put_back()


def _put_back(memory: NDArray[np.uint8], steps: list[codec.Overwritten]) -> None:
    while steps:
        steps.pop().put_back(memory)


def _fault(payload: _Payload, chunk: _Chunk, base: NDArray[np.uint8] | None, why: str) -> DeltaWeightsError:
    """The error where a chunk's base and payload do not make its target: one of the two is wrong."""
    name, index = chunk
    if base is not None and codec.checksum(base) != int(payload.records["base"][index]):
        return BaseMismatchError(
            "The model is not in the state that it was left in",
            f"Its tensor {name!r} was changed by somebody else.",
            "Nothing but sync may write to it; load the base again, or let the publisher write an anchor.",
        )
    return damaged(payload.file.path, f"Chunk {index} of tensor {name!r}: {why}")


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
