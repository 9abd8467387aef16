"""Reads payloads: decodes one tensor's chunks from the payload and the base, row by row, and checks them.

:class:`StoredPayload` is a payload in its file. :class:`PayloadReader` rebuilds the tensor from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property, partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from .. import codec, metrics
from ..checkpoint import Tensor
from ..codec import Predictor
from ..errors import DeltaError, DeltaWeightsError, PayloadError
from ..storage import Span
from .chunks import ChunkPlan, check_records
from .faults import BaseBytes, Faults


class _ThreadMemory(threading.local):
    """Buffers of each thread, reused for every chunk, since freshly allocated memory costs a page fault for
    each 4 KiB."""

    def __init__(self) -> None:
        self._payload = np.empty(0, np.uint8)
        self._bases = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._depth = 0

    def payload(self, nbytes: int) -> NDArray[np.uint8]:
        """``nbytes`` bytes, valid until this thread asks again."""
        if self._payload.size < nbytes:
            self._payload = np.empty(nbytes, np.uint8)
        return self._payload[:nbytes]

    def base(self, nbytes: int, read: Callable[[NDArray[np.uint8]], None]) -> NDArray[np.uint8]:
        """A base's bytes, which ``read`` puts into a buffer; valid until this thread reads another base.

        A base that is itself rebuilt reads its own base meanwhile. Two buffers suffice for any depth, since
        each level writes to its buffer only after all levels below are read.
        """
        side = self._depth % 2
        if self._bases[side].size < nbytes:
            self._bases[side] = np.empty(nbytes, np.uint8)
        data = self._bases[side][:nbytes]
        self._depth += 1
        try:
            read(data)
        finally:
            self._depth -= 1
        return data


_memory = _ThreadMemory()


class _WrongBase(Exception):  # noqa: N818
    """Bytes of the base do not have their checksum."""


class StoredPayload:
    """A tensor's payload in its file.

    Args:
        name, dtype: the tensor's; ``name`` is for messages, ``dtype`` a safetensors code.
        plan: how the tensor is cut.
        stored: the tensor that holds the payload's bytes.
        faults: the errors to raise.
        predicted: the bytes of its prediction, which come first.
    """

    def __init__(
        self, name: str, dtype: str, plan: ChunkPlan, stored: Tensor, faults: Faults, predicted: int = 0
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.plan = plan
        self.stored = stored
        self.faults = faults
        self._predicted = predicted

    @property
    def path(self) -> str:
        """The file that holds it."""
        return self.stored.shard.path

    @cached_property
    def table(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The chunk records (:data:`codec.RECORD`), and the start of each chunk's data in the payload.

        Raises:
            DeltaError: they do not add up.
        """
        there = self.stored.info.nbytes - self._predicted
        if self._table_bytes > there:
            raise self.damaged(f"Its payload of {self.stored.info.nbytes} bytes is too short")
        table = np.empty(self._table_bytes, np.uint8)
        self.stored.read_into(self._predicted, table)
        try:
            records, starts = check_records(table.tobytes(), self.plan, there)
        except PayloadError as error:
            raise self.damaged(error.what) from error
        return records, starts + self._predicted

    def read_table(self) -> None:
        """Read and check the chunk records now: memory for a tensor is taken only where its payload is as
        long as they say. Raises as :attr:`table` does."""
        _ = self.table

    @property
    def _table_bytes(self) -> int:
        return self.plan.count * codec.RECORD.itemsize

    @property
    def is_read(self) -> bool:
        """Whether the chunk records were read before."""
        return "table" in vars(self)

    @property
    def table_span(self) -> Span:
        """The span of the chunk records."""
        nbytes = self.stored.info.nbytes
        start = min(self._predicted, nbytes)
        return self.stored.span(start, min(start + self._table_bytes, nbytes))

    def spans(self, *, with_table: bool) -> list[Span]:
        """The spans of the whole payload, in order; with or without the chunk records."""
        nbytes = self.stored.info.nbytes
        if with_table:
            return [self.stored.span(0, nbytes)]
        _, start, end = self.table_span
        first = self.stored.span(0, 0).start
        return [self.stored.span(0, start - first), self.stored.span(end - first, nbytes)]

    def data_span(self, index: int) -> Span:
        """The span of the data of chunk ``index``."""
        records, starts = self.table
        start = int(starts[index])
        return self.stored.span(start, start + int(records["length"][index]))

    def method(self, index: int) -> int:
        """The method of chunk ``index``: a :class:`codec.Method`, or an unknown number."""
        return int(self.table[0]["method"][index])

    def read_data(self, first: int, end: int) -> NDArray[np.uint8]:
        """The data of chunks ``first`` to ``end - 1``, one after the other; valid until this thread reads
        more.

        Raises:
            DeltaError: a chunk's data is longer than the chunk.
        """
        records, starts = self.table
        lengths = records["length"][first:end].tolist()
        for index, length in enumerate(lengths, first):
            begin, stop = self.plan.span(index)
            if length > stop - begin:
                raise self.damaged(f"A chunk of {stop - begin} bytes is coded in {length}")
        data = _memory.payload(sum(lengths))
        self.stored.read_into(int(starts[first]), data)
        return data

    def decode_chunk(
        self, index: int, data: NDArray[np.uint8], base: NDArray[np.uint8] | None, out: NDArray[np.uint8]
    ) -> None:
        """Decode one chunk from its data, and check the result.

        Raises:
            DeltaError: the data is damaged, or ``base`` is not the base that it was coded against.
        """
        try:
            codec.decode_chunk(self.method(index), data, base, self.dtype, out)
        except PayloadError as error:
            raise self.damaged(error.what) from error
        if not self.leads_to(index, out):
            raise self.damaged(f"Chunk {index} does not decode to the bytes that were encoded")

    def leads_to(self, index: int, chunk: NDArray[np.uint8]) -> bool:
        """Whether ``chunk`` equals the chunk that was encoded, by its checksum."""
        return codec.checksum(chunk) == int(self.table[0]["target"][index])

    def is_from(self, index: int, base: NDArray[np.uint8]) -> bool:
        """Whether the chunk was encoded against ``base`` (in the base's dtype), by its checksum."""
        return codec.checksum(base) == int(self.table[0]["base"][index])

    def damaged(self, why: str) -> DeltaError:
        """The error to raise if the payload differs from the one that was written."""
        return self.faults.in_tensor(self.path, self.name, why)


class PayloadReader(StoredPayload):
    """Rebuilds a tensor from its payload and its base, by rows of chunks, in any number of threads.

    Args:
        name, dtype, plan, stored, faults, predicted: as for :class:`StoredPayload`.
        base: the bytes that it is coded against; None if there are none.
    """

    def __init__(
        self,
        name: str,
        dtype: str,
        plan: ChunkPlan,
        stored: Tensor,
        base: BaseBytes | None,
        faults: Faults,
        predicted: int = 0,
    ) -> None:
        super().__init__(name, dtype, plan, stored, faults, predicted)
        self.base = base

    def predictor(self) -> Predictor | None:
        """What predicts the tensor from its base; None if the base is compared as it is.

        Raises:
            DeltaError: it is damaged.
        """
        return None

    def needs_base(self, index: int) -> bool:
        """Whether chunk ``index`` is decoded from the base's bytes."""
        return self.plan.has_base(index) and self.method(index) not in codec.STANDALONE

    def base_bounds(self, first: int, end: int) -> tuple[int, int]:
        """First byte and end of the base's bytes for chunks ``first`` to ``end - 1``."""
        assert self.base is not None
        start, stop = self.plan.bounds(first, end)
        dtypes = self.dtype, self.base.dtype
        return codec.rescale(start, *dtypes), codec.rescale(stop, *dtypes)

    def _read_base(self, first: int, end: int) -> NDArray[np.uint8]:
        """The base's bytes for these chunks, in its own dtype; valid until this thread reads more."""
        assert self.base is not None
        start, stop = self.base_bounds(first, end)
        return _memory.base(stop - start, partial(self.base.read_into, start))

    def matches_base(self, index: int) -> bool:
        """Whether the base's bytes for chunk ``index`` have the recorded checksum."""
        return self.is_from(index, self._read_base(index, index + 1))

    def require_base(self, index: int) -> None:
        """Raise like :meth:`decode` unless :meth:`matches_base` is true, now or after a second read."""
        if not self.matches_base(index) and not self.matches_base(index):
            raise self._wrong_base(index)

    def read_base(self, first: int, end: int, out: NDArray[np.uint8]) -> None:
        """Read the base's bytes for chunks ``first`` to ``end - 1``, in its own dtype, into ``out`` (uint8,
        as long as :meth:`base_bounds` says)."""
        assert self.base is not None
        self.base.read_into(self.base_bounds(first, end)[0], out)

    def decode(
        self, first: int, end: int, out: NDArray[np.uint8], base: NDArray[np.uint8] | None = None
    ) -> None:
        """Rebuild chunks ``first`` to ``end - 1``, one of :meth:`ChunkPlan.rows`, into ``out`` (uint8, their
        length).

        Bytes with a wrong checksum are read a second time before that is an error: a bit flipped on the way
        from the Hub must not end a run of hours.

        Args:
            base: what :meth:`read_base` read for the same chunks, so that it is not read once more. What is
                read a second time is put there.

        Raises:
            BaseMismatchError: the base's bytes differ from those that the payload was made from.
            DeltaError: the payload is damaged.
        """
        metrics.add(decode=end - first)
        runs = [list(run) for _, run in groupby(range(first, end), self.needs_base)]
        # Bytes read for a different run, or a second time, may pass through the memory of `out`.
        whole, origin = out if len(runs) == 1 else np.empty_like(out), self.plan.span(first)[0]

        def part(first: int, end: int) -> NDArray[np.uint8]:
            start, stop = self.plan.bounds(first, end)
            return whole[start - origin : stop - origin]

        def given(low: int, high: int) -> NDArray[np.uint8] | None:
            if base is None or not self.needs_base(low):
                return None
            begin, (start, stop) = self.base_bounds(first, end)[0], self.base_bounds(low, high)
            return base[start - begin : stop - begin]

        wrong = []
        for run in runs:
            low, high = run[0], run[-1] + 1
            wrong += self._decode_run(low, high, part(low, high), given(low, high))
        if wrong and whole is out:
            whole = out.copy()
        for index in wrong:
            self._decode_anew(index, part(index, index + 1), given(index, index + 1))
        if whole is not out:
            out[:] = whole

    def _decode_run(
        self, first: int, end: int, out: NDArray[np.uint8], base: NDArray[np.uint8] | None
    ) -> list[int]:
        """:meth:`decode` for chunks that all need the base, or all do not. Returns the indices of those that
        come out wrong."""
        if base is None and self.needs_base(first):
            base = self._read_base(first, end)
        data = self.read_data(first, end)
        origin, wrong = self.plan.span(first)[0], []
        for index in self._decode_at_once(first, end, data, base, out):
            start, stop = (place - origin for place in self.plan.span(index))
            try:
                coded = self._data_of(index, first, data)
                self.decode_chunk(index, coded, self._converted(index, base, origin), out[start:stop])
            except (DeltaError, _WrongBase):
                wrong.append(index)
        return wrong

    def _data_of(self, index: int, first: int, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The data of chunk ``index``, from ``data``, which begins with chunk ``first``."""
        records, starts = self.table
        begin = int(starts[index] - starts[first])
        return data[begin : begin + int(records["length"][index])]

    def _decode_at_once(
        self,
        first: int,
        end: int,
        data: NDArray[np.uint8],
        base: NDArray[np.uint8] | None,
        out: NDArray[np.uint8],
    ) -> list[int]:
        """Decode and check as many chunks as possible in one call. Returns the indices of those left."""
        if base is None or self.base is None or self.base.dtype != self.dtype or self._predicted:
            return list(range(first, end))
        is_right = codec.decode_row(
            self.table[0][first:end], data, base, self.dtype, out, self.plan.chunk_bytes
        )
        return [first + int(k) for k in np.flatnonzero(~is_right)]

    def _converted(self, index: int, base: NDArray[np.uint8] | None, origin: int) -> NDArray[np.uint8] | None:
        """The base's bytes for chunk ``index``, checked and in the tensor's dtype, from ``base``, which
        begins at byte ``origin`` of the tensor; None without a base."""
        if base is None:
            return None
        assert self.base is not None
        start, stop = (
            codec.rescale(place - origin, self.dtype, self.base.dtype) for place in self.plan.span(index)
        )
        if not self.is_from(index, base[start:stop]):
            raise _WrongBase
        if predictor := self.predictor():
            element = self.plan.span(index)[0] // codec.element_bytes(self.dtype, self.plan.nbytes)
            return predictor.predict(base[start:stop], element)
        return codec.convert(base[start:stop], self.base.dtype, self.dtype)

    def _decode_anew(self, index: int, out: NDArray[np.uint8], given: NDArray[np.uint8] | None) -> None:
        """Read and decode a chunk that came out wrong; ``given`` gets the base's bytes."""
        base = self._read_base(index, index + 1) if self.needs_base(index) else None
        if base is not None and given is not None:
            given[:] = base
        try:
            converted = self._converted(index, base, self.plan.span(index)[0])
        except _WrongBase:
            raise self._wrong_base(index) from None
        self.decode_chunk(index, self.read_data(index, index + 1), converted, out)

    def _wrong_base(self, index: int) -> DeltaWeightsError:
        assert self.base is not None
        return self.faults.of_base(self.path, self.name, self.base, self.place_of(index))

    def place_of(self, index: int) -> str:
        """The place of chunk ``index`` in the tensor, in words."""
        start, end = self.plan.span(index)
        return f"bytes {start} to {end}"
