"""One whole tensor in memory, to a payload and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..codec import RECORD, checksum, compare_row, decode_chunk, decode_table, encode_chunk
from ..errors import PayloadError
from .chunks import CHUNK_BYTES, ChunkPlan, check_records


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
    plan = ChunkPlan(new.size, 0 if old is None else new.size, chunk_bytes)
    records, chunks = np.zeros(plan.count, RECORD), []
    compared = None if old is None else compare_row(old, new, dtype, chunk_bytes)
    for index, (start, end) in enumerate(plan):
        if compared is None or old is None:
            method, data = encode_chunk(None, new[start:end], dtype)
            base_sum, target_sum = 0, checksum(new[start:end])
        else:
            base_sum, target_sum, changed = (int(column[index]) for column in compared)
            method, data = encode_chunk(old[start:end], new[start:end], dtype, changed=changed)
        records[index] = method, 0, len(data), base_sum, target_sum
        chunks.append(data)
    return records.tobytes() + b"".join(chunks)


def decode(
    base: NDArray[np.uint8] | bytes | None,
    payload: bytes,
    dtype: str,
    out: NDArray[np.uint8] | None = None,
    *,
    nbytes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> NDArray[np.uint8]:
    """Decode what :func:`encode` returned; the inverse in every bit.

    Args:
        base: the same base bytes, or None if there were none.
        payload: the payload.
        dtype: the tensor's safetensors dtype code.
        out: uint8, 1-D, contiguous, of the tensor's length; allocated if None, and then ``nbytes``
            says how long where there is no base.

    Returns:
        ``out``, filled.

    Raises:
        PayloadError: the payload is damaged, or the base is not the one that it was encoded against.
        ValueError: the tensor's length is not known, or the base's is another.
    """
    old = None if base is None else np.frombuffer(base, np.uint8)
    if out is None:
        if nbytes is None and old is None:
            raise ValueError("pass out= or nbytes= where there is no base")
        out = np.empty(old.size if nbytes is None and old is not None else nbytes, np.uint8)  # type: ignore[arg-type]
    if old is not None and old.size != out.size:
        raise ValueError(f"base has {old.size} bytes, target {out.size}")
    plan = ChunkPlan(out.size, 0 if old is None else out.size, chunk_bytes)
    data, is_done = np.frombuffer(payload, np.uint8), np.zeros(plan.count, np.bool_)
    table_bytes = plan.count * RECORD.itemsize
    table, coded = data[:table_bytes], data[table_bytes:]
    is_there = plan.count > 0 and len(table) == table_bytes
    if is_there and old is not None and not np.may_share_memory(old, out):
        is_done, is_whole = decode_table(table, coded, old, dtype, out, chunk_bytes)
        if is_whole:
            return out
    records, starts = check_records(table.tobytes(), plan, len(payload))
    for index in np.flatnonzero(~is_done):
        start, end = plan.span(int(index))
        reference, position = None if old is None else old[start:end], int(starts[index])
        part = data[position : position + int(records["length"][index])]
        _decode_checked(records[index], part, reference, dtype, out[start:end], f"Bytes {start} to {end}")
    return out


def _decode_checked(
    record: np.void,
    data: NDArray[np.uint8],
    base: NDArray[np.uint8] | None,
    dtype: str,
    out: NDArray[np.uint8],
    what: str,
) -> None:
    if base is not None and checksum(base) != int(record["base"]):
        raise PayloadError(f"{what} of the base are not those it was coded against")
    decode_chunk(int(record["method"]), data, base, dtype, out, follows=True)
    if checksum(out) != int(record["target"]):
        raise PayloadError(f"{what} do not decode to what was encoded")
