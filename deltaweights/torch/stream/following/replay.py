"""Takes the chunks of a model through the payload files of a weight stream, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .... import codec
from ....errors import CheckpointError, PayloadError
from ....workers import Workers
from ..payloads import Chunk, StreamPayload, StreamStep, read_payloads
from ..records import CHUNK_BYTES, damaged, tensor_digest
from ..state import StateTensor, owners, plan_of
from .gpu_replay import GpuPatches
from .held import HeldChanges, HeldChunk, in_batches

Bytes = NDArray[np.uint8]
_Result = TypeVar("_Result")

_PLACE_BYTES = 4

_WRONG = "it does not decode to the bytes that were encoded"


class _Buffers(threading.local):
    """Each thread's memory for two chunks, to decode from one to the other and back."""

    def __init__(self) -> None:
        self._pair = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(2)]

    def other(self, now: Bytes | None, nbytes: int) -> Bytes:
        """Memory for a chunk, in which ``now`` does not lie."""
        first, second = self._pair
        return (second if now is not None and np.may_share_memory(now, first) else first)[:nbytes]

    def has(self, chunk: Bytes) -> bool:
        """Whether ``chunk`` lies in it."""
        return any(np.may_share_memory(chunk, buffer) for buffer in self._pair)


class _Followed(NamedTuple):
    """A chunk after all steps, valid until this thread takes another.

    Attributes:
        data: its bytes; None if no step changes it.
        places: where it may differ from the model's, of each step; None: anywhere.
    """

    data: Bytes | None
    places: list[NDArray[np.uint32]] | None


class Replay:
    """Finds what brings the tensors of ``state`` to the last step's record.

    A chunk is taken through all steps at once, in two buffers per thread, and checked after each.

    Args:
        state: tensors, or their parts, or some of them, by the names of their payloads in all steps.
        before: the current checksums of their chunks; not needed if the first step is an anchor.

    Attributes:
        sums: the checksums of their chunks after the last step.

    Raises:
        DeltaError: a file or a record contradicts another.
        CheckpointError: tied tensors would differ after the last step.
    """

    def __init__(
        self, state: Mapping[str, StateTensor], steps: Sequence[StreamStep], before: Mapping[str, bytes]
    ) -> None:
        self._state = state
        self._starts_anew = steps[0].is_anchor
        self._payloads: dict[str, list[StreamPayload]] = {}
        # Tied tensors share memory here, whether or not the publisher ties them.
        first = owners(state)
        own = set(first.values())
        self.sums = dict(before)
        for step in steps:
            found = self._payloads_of(step)
            for key in own & found.keys():
                self._payloads.setdefault(key, []).append(found[key])
        for key, owner in first.items():
            if self.sums[key] != self.sums[owner]:
                raise CheckpointError(
                    "The model does not fit the stream",
                    f"It ties {key!r} to {owner!r}; in the stream they differ.",
                    "Untie them, as the publisher does.",
                )
        self._buffers = _Buffers()
        self._gpu_patches = GpuPatches()
        #: Chunks checked, to be decoded again when they are written.
        self._later: list[Chunk] = []

    def _payloads_of(self, step: StreamStep) -> dict[str, StreamPayload]:
        """The step's payloads by name, also those of tied tensors. Takes the checksums on to the step."""
        read = read_payloads(step, self._state)
        by_name: dict[str, list[tuple[str, StreamPayload | None]]] = {}
        for tensor, key, own, _ in step.record.payloads():
            if key in self._state:
                by_name.setdefault(tensor.name, []).append((key, read.get(own)))
        found: dict[str, StreamPayload] = {}
        for tensor in step.record.tensors:
            pieces = by_name.get(tensor.name, [])
            there = {key: payload for key, payload in pieces if payload}
            sums = (there[key].sums if key in there else self.sums.get(key, b"") for key, _ in pieces)
            is_whole = len(pieces) == len(tensor.keys)  # nobody can tell the digest of a part
            is_wrong = is_whole and tensor_digest(b"".join(sums)) != tensor.digest
            if is_wrong or (step.is_anchor and len(there) < len(pieces)):
                raise damaged(step.where, f"It does not lead to tensor {tensor.name!r} of its record")
            for key, payload in there.items():
                if not step.is_anchor and not payload.follows(self.sums.get(key)):
                    raise damaged(step.where, f"It does not follow the state before in {tensor.name!r}")
                self.sums[key] = payload.sums
            found |= there
        return found

    def hold(self, workers: Workers) -> HeldChanges:
        """Check all chunks, and hold what changes. Writes nothing to the tensors.

        Raises:
            BaseMismatchError: the tensors differ from those that the first update was made from.
            DeltaError: a payload is damaged.
        """
        return self._hold(self._chunks(), self._change, workers)

    def hold_little(self, workers: Workers) -> HeldChanges:
        """Like :meth:`hold`, if the files stay there until all is written: chunks of which much changes are
        not held, and chunks on GPUs are patched there. Follow it by :meth:`write_rest` or :meth:`put_back`.

        Raises like :meth:`hold`; the tensors are as they were then.
        """
        try:
            return self._hold(self._patch_on_gpus(workers), self._small_change, workers)
        except BaseException:
            self.put_back()
            raise

    def write_rest(self, workers: Workers) -> None:
        """Write what :meth:`hold_little` did not hold."""
        self._gpu_patches = GpuPatches()  # the old one's stay
        for _ in self._each(workers, self._later, self._write):
            pass

    def put_back(self) -> None:
        """Undo what :meth:`hold_little` wrote."""
        self._gpu_patches.put_back()

    @property
    def names(self) -> list[str]:
        """The tensors that change."""
        return list(self._payloads)

    def _hold(
        self, chunks: Iterable[Chunk], change: Callable[[Chunk], HeldChunk | None], workers: Workers
    ) -> HeldChanges:
        return HeldChanges(filter(None, self._each(workers, chunks, change)))

    def _each(
        self, workers: Workers, chunks: Iterable[Chunk], work: Callable[[Chunk], _Result]
    ) -> Iterator[_Result]:
        """Do the work for all chunks. Yields the results in order."""

        def work_all(batch: list[Chunk]) -> list[_Result]:
            return [work(chunk) for chunk in batch]

        with closing(workers.map(work_all, in_batches(chunks))) as done:  # on exit, no thread works any more
            for results in done:
                yield from results

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

    def _change(self, chunk: Chunk) -> HeldChunk | None:
        """What changes in a chunk; None for nothing."""
        followed = self._follow(chunk, check=True)
        if followed.data is None:
            return None
        return self._held(chunk, followed.data, followed.places)

    def _small_change(self, chunk: Chunk) -> HeldChunk | None:
        """The same, but a chunk is left for later if much changes, or if it is not coded as a list."""
        followed = self._follow(chunk, check=True)
        if followed.data is None:
            return None
        if followed.places is not None:
            held = self._held(chunk, followed.data, followed.places)
            if held is None or held.places is not None:
                return held
        self._later.append(chunk)
        return None

    def _held(self, chunk: Chunk, data: Bytes, parts: list[NDArray[np.uint32]] | None) -> HeldChunk | None:
        tensor = self._state[chunk[0]]
        start = self._span(chunk)[0]
        new = data.view(tensor.words)
        if parts is not None and len(parts) == 1:
            return HeldChunk(chunk[0], start, parts[0], new[parts[0]]) if parts[0].size else None
        old = self._read(chunk)
        places = _differing(old.view(tensor.words), new, parts)
        if places is None:
            return HeldChunk(chunk[0], start, None, new.copy())
        return HeldChunk(chunk[0], start, places, new[places]) if places.size else None

    def _write(self, chunk: Chunk) -> None:
        """Write a chunk that was checked."""
        data = self._follow(chunk, check=False).data
        assert data is not None
        self._state[chunk[0]].write(self._span(chunk)[0], data)

    def _span(self, chunk: Chunk) -> tuple[int, int]:
        name, index = chunk
        return plan_of(self._state[name]).span(index)

    def _read(self, chunk: Chunk) -> Bytes:
        """A chunk's current bytes, not to be written to: the tensor's own memory on a CPU, else a copy."""
        return self._state[chunk[0]].read(*self._span(chunk))

    def _follow(self, chunk: Chunk, *, check: bool) -> _Followed:
        """Take a chunk through all steps. Raises like :meth:`hold`."""
        steps = list(self._steps(chunk))
        if not steps:
            return _Followed(None, [])
        now = None if self._starts_anew else self._read(chunk)
        places: list[NDArray[np.uint32]] | None = []
        for payload in steps:
            now, found = self._step(payload, chunk, now, check=check)
            if found is None:
                places = None
            elif places is not None:
                places.append(found)
        return _Followed(now, places)

    def _step(
        self, payload: StreamPayload, chunk: Chunk, now: Bytes | None, *, check: bool
    ) -> tuple[Bytes, NDArray[np.uint32] | None]:
        """A chunk after one more step, and where it changes (None: anywhere)."""
        index, tensor = chunk[1], self._state[chunk[0]]
        start, end = self._span(chunk)
        method, data = payload.chunk(index)
        overwritten: codec.Overwritten | None = None
        try:
            if now is not None and method == codec.Method.SPARSE:
                now = self._copied(now)
                overwritten = codec.patch_chunk(method, data, now, tensor.code)
            if overwritten is None:
                out = self._buffers.other(now, end - start)
                codec.decode_chunk(method, data, now, tensor.code, out)
            else:
                assert now is not None
                out = now
        except PayloadError as error:
            raise payload.fault(index, now, error.what) from error
        if check and not payload.leads_to(index, out):
            if overwritten is not None:
                overwritten.put_back(out)
            raise payload.fault(index, now, _WRONG)
        return out, None if overwritten is None else overwritten.places

    def _copied(self, now: Bytes) -> Bytes:
        """A chunk in this thread's memory, where it may be written to."""
        if self._buffers.has(now):
            return now
        out = self._buffers.other(None, now.size)
        out[:] = now
        return out

    def _steps(self, chunk: Chunk) -> Iterator[StreamPayload]:
        """The payloads that change the chunk."""
        name, index = chunk
        for number, payload in enumerate(self._payloads[name]):
            is_first_anchor = self._starts_anew and number == 0
            if is_first_anchor or payload.method(index) != codec.Method.SAME:
                yield payload


def _differing(
    old: NDArray[Any], new: NDArray[Any], parts: list[NDArray[np.uint32]] | None
) -> NDArray[np.uint32] | None:
    """Where two arrays differ; None if places and values take more memory than all values.

    Args:
        parts: together, the places where they may; None: anywhere.
    """
    places: NDArray[np.uint32] | None = None
    if parts is None:
        differ = old != new
        count = int(np.count_nonzero(differ))
    else:
        places = np.unique(np.concatenate(parts))
        places = places[old[places] != new[places]]
        count = len(places)
    if count * (_PLACE_BYTES + new.itemsize) >= new.nbytes:
        return None if count else np.empty(0, np.uint32)
    return np.flatnonzero(differ).astype(np.uint32) if places is None else places
