"""Encodes one whole tensor in memory to a payload, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import codec
from ..errors import PayloadError
from .chunks import CHUNK_BYTES, ChunkPlan, check_records
from .writer import encode_row


def encode(
    base: NDArray[np.uint8] | bytes | None,
    target: NDArray[np.uint8] | bytes,
    dtype: str,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> bytes:
    """Encode a whole tensor.

    Args:
        base: the base's bytes (uint8 array or any buffer), of the same length and dtype as ``target``;
            None codes the target alone.
        target: the tensor's bytes, little-endian, row-major.
        dtype: its safetensors dtype code.

    Returns:
        The payload.

    Raises:
        ValueError: base and target differ in length.
    """
    new = np.frombuffer(target, np.uint8)
    old = None if base is None else np.frombuffer(base, np.uint8)
    if old is not None and old.size != new.size:
        raise ValueError(f"base has {old.size} bytes, target {new.size}")
    chunks = encode_row(new, old, dtype, chunk_bytes)
    records = np.zeros(len(chunks), codec.RECORD)
    for index, chunk in enumerate(chunks):
        records[index] = chunk.method, 0, len(chunk.data), chunk.base_sum, chunk.target_sum
    return records.tobytes() + b"".join(chunk.data for chunk in chunks)


def decode(
    base: NDArray[np.uint8] | bytes | None,
    payload: bytes,
    dtype: str,
    out: NDArray[np.uint8] | None = None,
    *,
    nbytes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> NDArray[np.uint8]:
    """Decode a payload from :func:`encode`, bit for bit.

    Args:
        base: the same base bytes, or None if there were none.
        payload: the payload.
        dtype: the tensor's safetensors dtype code.
        out: uint8, 1-D, contiguous, of the tensor's length. If None, it is allocated, with ``nbytes`` bytes
            if there is no base.

    Returns:
        ``out``, filled.

    Raises:
        PayloadError: the payload is damaged, or was encoded against a different base.
        ValueError: the tensor's length is unknown, or the base's differs from it.
    """
    old = None if base is None else np.frombuffer(base, np.uint8)
    if out is None:
        if nbytes is None and old is None:
            raise ValueError("pass out= or nbytes= if there is no base")
        out = np.empty(old.size if nbytes is None and old is not None else nbytes, np.uint8)  # type: ignore[arg-type]
    if old is not None and old.size != out.size:
        raise ValueError(f"base has {old.size} bytes, target {out.size}")
    plan = ChunkPlan(out.size, 0 if old is None else out.size, chunk_bytes)
    data, is_done = np.frombuffer(payload, np.uint8), np.zeros(plan.count, np.bool_)
    table_bytes = plan.count * codec.RECORD.itemsize
    table, coded = data[:table_bytes], data[table_bytes:]
    is_there = plan.count > 0 and len(table) == table_bytes
    if is_there and old is not None and not np.may_share_memory(old, out):
        is_done, is_whole = codec.decode_table(table, coded, old, dtype, out, chunk_bytes)
        if is_whole:
            return out
    records, starts = check_records(table.tobytes(), plan, len(payload))
    for index in np.flatnonzero(~is_done).tolist():
        start, end = plan.span(index)
        part = data[int(starts[index]) : int(starts[index]) + int(records["length"][index])]
        _decode_chunk(records[index], part, None if old is None else old[start:end], dtype, out[start:end])
    return out


def _decode_chunk(
    record: np.void,
    data: NDArray[np.uint8],
    base: NDArray[np.uint8] | None,
    dtype: str,
    out: NDArray[np.uint8],
) -> None:
    if base is not None and codec.checksum(base) != int(record["base"]):
        raise PayloadError("Bytes of the base differ from those that the payload was coded against")
    codec.decode_chunk(int(record["method"]), data, base, dtype, out, follows=True)
    if codec.checksum(out) != int(record["target"]):
        raise PayloadError("A chunk does not decode to the bytes that were encoded")
