"""Applies the payload files of a weight stream, one after the other, to the tensors of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ... import codec
from ...errors import CheckpointError, PayloadError
from ...workers import Workers
from .gpu_replay import GpuPatches
from .payloads import Chunk, StreamPayload, StreamStep, read_payloads
from .records import CHUNK_BYTES, damaged
from .state import StateTensor, owners, plan_of

#: The number of chunks that a thread takes at once.
_BATCH = 8

_WRONG = "it does not decode to the bytes that were encoded"


class _Buffers(threading.local):
    """Each thread's memory for two chunks, to decode from one to the other and back."""

    def __init__(self) -> None:
        self.pair = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(2)]


class Replay:
    """Brings the tensors of ``state`` to the last step's record.

    A chunk is taken through all steps at once, so intermediate bytes exist only in two buffers per thread.

    Args:
        before: the current digest of every tensor, by name; not needed if the first step is an anchor.

    Raises:
        DeltaError: a file or a record contradicts another.
        CheckpointError: tied tensors would differ after the last step.
    """

    def __init__(
        self, state: Mapping[str, StateTensor], steps: Sequence[StreamStep], before: Mapping[str, str]
    ) -> None:
        self._state = state
        self._starts_anew = steps[0].is_anchor
        self._payloads: dict[str, list[StreamPayload]] = {}
        # Tied tensors share memory here, whether or not the publisher ties them.
        first = owners(state)
        own = set(first.values())
        for step in steps:
            found = read_payloads(step, state)
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
        #: Chunks already written, and their old elements.
        self._overwritten: list[tuple[Chunk, list[codec.Overwritten]]] = []
        self._gpu_patches = GpuPatches()
        #: Chunks checked but not yet written.
        self._checked: list[Chunk] = []

    def apply(self, workers: Workers, *, in_place: bool) -> None:
        """Bring the tensors to the last step. Every chunk is checked after every step.

        A chunk with few changes is patched in its own memory, also on a GPU, or else in a copy that is
        written back to its device. The old elements are kept until all chunks are checked, unless
        ``in_place``. Other chunks are decoded and checked first; once all are right, they are decoded again
        and written. With ``in_place``, each is written as soon as it is checked.

        Raises:
            BaseMismatchError: the tensors differ from those that the first update was made from.
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

    def _each(self, workers: Workers, chunks: Iterable[Chunk], work: Callable[[Chunk], object]) -> None:
        """Do the work for all chunks, in batches, since handing over a single chunk takes as long as its
        work."""

        def work_all(batch: list[Chunk]) -> None:
            for chunk in batch:
                work(chunk)

        remaining = iter(chunks)
        batches = iter(lambda: list(islice(remaining, _BATCH)), [])
        with closing(workers.map(work_all, batches)) as done:  # on exit, no thread is still working
            for _ in done:
                pass

    def _patch_on_gpus(self, workers: Workers) -> list[Chunk]:
        """Patch chunks on GPUs there. Returns the chunks that are left."""
        if self._starts_anew:
            return list(self._chunks())
        state = {name: self._state[name] for name in self._payloads}
        return self._gpu_patches.apply(state, self._steps, workers)

    def _chunks(self) -> Iterator[Chunk]:
        for name in self._payloads:
            for index in range(plan_of(self._state[name]).count):
                yield name, index

    def _stage(self, chunk: Chunk) -> None:
        """Check that a chunk can be decoded, and write it if that can be undone."""
        overwritten = self._patch(chunk)
        if overwritten is not None:
            self._overwritten.append((chunk, overwritten))
        elif self._decode(chunk, check=True) is not None:
            self._checked.append(chunk)

    def _put_back(self) -> None:
        """Undo all writes."""
        self._gpu_patches.put_back()
        while self._overwritten:
            chunk, overwritten = self._overwritten.pop()
            memory = self._read(chunk)
            _put_back(memory, overwritten)
            self._give_back(chunk, memory)

    def _check_and_write(self, chunk: Chunk) -> None:
        if self._patch(chunk) is None:
            data = self._decode(chunk, check=True)
            if data is not None:
                self._state[chunk[0]].write(self._span(chunk)[0], data)

    def _write(self, chunk: Chunk) -> None:
        """Write a chunk that was checked."""
        tensor = self._state[chunk[0]]
        if tensor.is_on_cpu:
            self._decode(chunk, check=False, into=self._read(chunk))
        else:
            data = self._decode(chunk, check=False)
            assert data is not None
            tensor.write(self._span(chunk)[0], data)

    def _span(self, chunk: Chunk) -> tuple[int, int]:
        name, index = chunk
        return plan_of(self._state[name]).span(index)

    def _read(self, chunk: Chunk) -> NDArray[np.uint8]:
        """A chunk's current bytes: the tensor's own memory on a CPU, else a copy."""
        return self._state[chunk[0]].read(*self._span(chunk))

    def _give_back(self, chunk: Chunk, memory: NDArray[np.uint8]) -> None:
        """Write the changed memory from :meth:`_read` back, if it is a copy."""
        tensor = self._state[chunk[0]]
        if not tensor.is_on_cpu:
            tensor.write(self._span(chunk)[0], memory)

    def _patch(self, chunk: Chunk) -> list[codec.Overwritten] | None:
        """Take a chunk through all steps in its own memory, if each of them changes little.

        Returns the old elements of each step; None if that is impossible. Raises like :meth:`apply`. In both
        cases, nothing stays written.
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
                method, data = payload.chunk(index)
                overwritten = codec.patch_chunk(method, data, memory, tensor.code)
                if overwritten is None:
                    return None
                done.append(overwritten)
                if not payload.leads_to(index, memory):
                    done.pop().put_back(memory)
                    raise payload.fault(index, memory, _WRONG)
            self._give_back(chunk, memory)
            is_done = True
            return done
        except PayloadError as error:
            raise payload.fault(index, memory, error.what) from error
        finally:
            if not is_done:
                _put_back(memory, done)

    def _decode(
        self, chunk: Chunk, *, check: bool, into: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8] | None:
        """A chunk after the last step, valid until this thread decodes more; None if it does not change.

        Args:
            into: the chunk's own memory, to which the last step is decoded.
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
            method, data = payload.chunk(chunk[1])
            try:
                codec.decode_chunk(method, data, now, tensor.code, out)
            except PayloadError as error:
                raise payload.fault(chunk[1], now, error.what) from error
            if check and not payload.leads_to(chunk[1], out):
                raise payload.fault(chunk[1], now, _WRONG)
            now = found = out
        return found

    def _steps(self, chunk: Chunk) -> Iterator[StreamPayload]:
        """The payloads that change the chunk."""
        name, index = chunk
        for number, payload in enumerate(self._payloads[name]):
            is_first_anchor = self._starts_anew and number == 0
            if is_first_anchor or payload.method(index) != codec.Method.SAME:
                yield payload


def _put_back(memory: NDArray[np.uint8], steps: list[codec.Overwritten]) -> None:
    while steps:
        steps.pop().put_back(memory)
