"""Writes payloads: encodes rows of chunks, and puts them into a file with their records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import codec, metrics
from ..checkpoint import MAX_HEADER_BYTES, TensorInfo, build_header
from ..errors import OutputError
from ..storage import WritableFile
from .chunks import ChunkPlan

#: The fewest bytes per write of payloads, since a thread waits for Python's lock at each write.
_WRITE_BYTES = 1 << 20


class CodedChunk(NamedTuple):
    """One encoded chunk: its method, :func:`codec.checksum` of the base's and the target's bytes, its data,
    and the number of changed elements."""

    method: int
    base_sum: int
    target_sum: int
    data: bytes
    changed: int


class WrittenPayload(NamedTuple):
    """A payload in a file: its start, its length, the number of changed elements, its chunk records
    (:data:`codec.RECORD`), and whether all of the target's bytes are the base's."""

    start: int
    nbytes: int
    changed: int
    records: NDArray[np.void]
    is_same: bool


def encode_row(
    target: NDArray[np.uint8],
    base: NDArray[np.uint8] | None,
    dtype: str,
    chunk_bytes: int,
    *,
    base_dtype: str | None = None,
    predict: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    quick: bool = False,
) -> list[CodedChunk]:
    """Encode adjacent chunks.

    Args:
        target: their bytes (uint8).
        base: the base's bytes for them, in its own dtype, or None.
        dtype: the target's dtype.
        chunk_bytes: the length of all chunks except the last.
        base_dtype: the base's dtype, if it differs.
        predict: makes what the chunks are compared with of the base's bytes; converts them by default.
        quick: as for :func:`codec.encode_chunk`.
    """
    spans = [slice(start, start + chunk_bytes) for start in range(0, target.size, chunk_bytes)]
    metrics.add(encode=len(spans))
    if base is None:
        return [_encode_alone(target[span], dtype) for span in spans]
    source = base_dtype or dtype
    converted = predict(base) if predict else codec.convert(base, source, dtype)
    compared = codec.compare_row(converted, target, dtype, chunk_bytes)
    sums = compared.base.tolist()
    if source != dtype or predict:
        ends = [codec.rescale(min(span.stop, target.size), dtype, source) for span in spans]
        sums = [codec.checksum(part) for part in np.split(base, ends[:-1])]
    coded = []
    for span, base_sum, target_sum, changed in zip(spans, sums, *compared[1:], strict=True):
        method, data = codec.encode_chunk(
            converted[span], target[span], dtype, quick=quick, changed=int(changed)
        )
        coded.append(CodedChunk(method, base_sum, int(target_sum), data, int(changed)))
    return coded


def _encode_alone(target: NDArray[np.uint8], dtype: str) -> CodedChunk:
    method, data = codec.encode_chunk(None, target, dtype)
    return CodedChunk(method, 0, codec.checksum(target), data, 0)


class PayloadWriter:
    """Writes payloads into ``file``, one after the other from byte ``start`` on; :meth:`flush` is the end.
    Small ones are collected, since a checkpoint may have tens of thousands of them."""

    def __init__(self, file: WritableFile, start: int) -> None:
        self._file = file
        self._start = self._end = start
        self._pending: list[bytes] = []  # whole payloads, which end where the next one begins
        self._pending_bytes = 0

    @property
    def nbytes(self) -> int:
        """How long all payloads are together."""
        return self._end - self._start

    def write(
        self,
        plan: ChunkPlan,
        chunks: Iterable[CodedChunk],
        *,
        skip_same: bool = False,
        prediction: bytes = b"",
    ) -> WrittenPayload:
        """Write one payload, a prediction (if any) and all chunks of ``plan`` in order; with ``skip_same``,
        only if it differs from the base."""
        start, changed = self._end, 0
        end = start + len(prediction) + plan.count * codec.RECORD.itemsize
        unwritten, size, is_small = list[bytes](), 0, True
        rows = []
        for chunk in chunks:
            rows.append((chunk.method, (0, 0, 0), len(chunk.data), chunk.base_sum, chunk.target_sum))
            changed += chunk.changed
            unwritten.append(chunk.data)
            size += len(chunk.data)
            if size >= _WRITE_BYTES:
                is_small = False
                self.flush()
                self._file.write_at(end, *unwritten)
                end += size
                unwritten, size = [], 0
        records = np.array(rows, codec.RECORD)
        is_same = plan.shared == plan.nbytes and not records["method"].any()
        if is_same and skip_same:  # such chunks have no data: nothing is written yet
            return WrittenPayload(start - self._start, 0, changed, records, is_same)
        self._end = end + size
        if is_small:
            self._pending.append(b"".join([prediction, records.tobytes(), *unwritten]))
            self._pending_bytes += len(self._pending[-1])
            if self._pending_bytes >= _WRITE_BYTES:
                self.flush()
        else:
            if unwritten:
                self._file.write_at(end, *unwritten)
            self._file.write_at(start, prediction, records.tobytes())
        return WrittenPayload(start - self._start, self._end - start, changed, records, is_same)

    def flush(self) -> None:
        """Write the payloads that were collected."""
        if self._pending:
            pending, self._pending = self._pending, []
            start = self._end - self._pending_bytes
            self._pending_bytes = 0
            self._file.write_at(start, *pending)


class PayloadFile:
    """A safetensors file with one payload for each name, as a U8 tensor. Its header is written last, into
    reserved space, since the payloads' lengths are unknown before.

    Args:
        file: the file to write.
        largest: the most bytes of tensor that each payload may code, by name.
        metadata: the header's metadata.

    Raises:
        OutputError: the header may become longer than safetensors allows.
    """

    def __init__(self, file: WritableFile, largest: Mapping[str, int], metadata: dict[str, str]) -> None:
        infos, position = [], 0
        for name, nbytes in largest.items():
            length = nbytes + ChunkPlan(nbytes, 0).count * codec.RECORD.itemsize
            infos.append(TensorInfo(name, "U8", (length,), position, position + length))
            position += length
        self._room = len(build_header(infos, metadata))
        if self._room > MAX_HEADER_BYTES:
            raise OutputError(
                "There are too many tensors for one file",
                f"Its header would have {self._room} bytes; safetensors allows {MAX_HEADER_BYTES}.",
                "Save fewer tensors at once.",
            )
        self._file = file
        self._metadata = metadata
        self._writer = PayloadWriter(file, self._room)
        self._infos: list[TensorInfo] = []

    def write(
        self, name: str, plan: ChunkPlan, chunks: Iterable[CodedChunk], *, skip_same: bool = False
    ) -> WrittenPayload:
        """Write the payload ``name``; with ``skip_same``, only if it differs from the base."""
        written = self._writer.write(plan, chunks, skip_same=skip_same)
        if not (skip_same and written.is_same):
            end = written.start + written.nbytes
            self._infos.append(TensorInfo(name, "U8", (written.nbytes,), written.start, end))
        return written

    def finish(self) -> list[TensorInfo]:
        """Write the header. Returns the payloads in the file."""
        self._writer.flush()
        self._file.write_at(0, build_header(self._infos, self._metadata, self._room))
        return self._infos
