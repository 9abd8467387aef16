"""What is fuzzed. A target gets bytes, and may raise nothing: it catches what it is allowed to."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaweights import canonical
from deltaweights.checkpoint import TensorInfo, build_header, parse_header
from deltaweights.codec import (
    checksum,
    decode_chunk,
    encode_chunk,
    patch_chunk,
    read_patch,
)
from deltaweights.delta.pointer import Origin, PointedDelta, Pointer, parse_pointer
from deltaweights.dtypes import DTYPE_BITS
from deltaweights.engines.disk_updates.encodings import ENCODINGS, apply, encode
from deltaweights.engines.disk_updates.layout import read_index, shard_name
from deltaweights.errors import CheckpointError, DeltaError, HeaderError, ManifestError, PayloadError
from deltaweights.manifest import FileRecord, Manifest, Tool
from deltaweights.payload import ChunkPlan, check_records
from deltaweights.torch.dcp.record import CheckpointRecord, ShardedTensor, TensorPart, parse_record
from deltaweights.torch.models.run_folder import TrainingRecord, parse_training_record
from deltaweights.torch.stream.records import (
    Head,
    StateRecord,
    StateReference,
    StreamTensor,
    read_head,
    read_record,
    state_digest,
    write_json,
)

Bytes = NDArray[np.uint8]
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


class Target(NamedTuple):
    """What runs an input, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]


# A safetensors header ------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """The file's size is the header's and what its tensors seem to need."""
    for size in (len(data), len(data) + _claimed(data)):
        with suppress(HeaderError):
            found = parse_header(data, size, "x")
            assert found.file_size == size
            again = build_header(found.tensors, found.metadata)
            assert parse_header(again, len(again) + size - len(data), "x").tensors == found.tensors


def _claimed(data: bytes) -> int:
    try:
        fields = json.loads(data[8:])
        fields.pop("__metadata__", None)
        return max(int(field["data_offsets"][1]) for field in fields.values())
    except Exception:
        return 0


def header_seeds() -> Iterator[bytes]:
    for path in FIXTURES.glob("*/*/*.safetensors"):
        data = path.read_bytes()
        yield data[: 8 + int.from_bytes(data[:8], "little")]


# Canonical JSON ------------------------------------------------------------------------------------------


def manifest(data: bytes) -> None:
    """As it is, and in canonical form with the right checksum: else hardly one would get past these two."""
    for text in (data, _sealed(data)):
        with suppress(ManifestError):
            assert Manifest.from_json(text).to_json() == text


def manifest_seeds() -> Iterator[bytes]:
    for path in FIXTURES.glob("*/delta/deltaweights.json"):
        yield path.read_bytes()


def checkpoint_record(data: bytes) -> None:
    for text in (data, _sealed(data)):
        with suppress(ManifestError):
            assert parse_record(text).to_json() == text


def checkpoint_seeds() -> Iterator[bytes]:
    part = TensorPart((0, 0), (4, 2), 0)
    tensors = {"a": ShardedTensor("bfloat16", (4, 2), None, (part,))}
    files, tool = (FileRecord("a.safetensors", 100, "0" * 64),), Tool("deltaweights", "1")
    yield CheckpointRecord(None, tensors, {}, None, files, tool).to_json()
    yield CheckpointRecord(None, {}, {}, {"a": ("b", 1)}, (), tool).to_json()


def stream_record(data: bytes) -> None:
    with suppress(DeltaError):
        assert write_json(read_head(data, "head")) == data
    for text in (data, _canonical(data)):
        fields = _fields(text)
        number, state = fields.get("number"), fields.get("state")
        if isinstance(number, int) and isinstance(state, str):
            reference = StateReference(number, state, hashlib.sha256(text).hexdigest())
            with suppress(DeltaError):
                assert write_json(read_record(text, reference, "record")) == text


def stream_seeds() -> Iterator[bytes]:
    tensors = (StreamTensor("a", "BF16", (4, 2), "0" * 64), StreamTensor("b", "BF16", (4, 2), "0" * 64, "a"))
    state = state_digest(tensors)
    yield write_json(StateRecord(1, 1, state, tensors, None, None, None, None, "0" * 16))
    head = Head(StateReference(1, state, "1" * 64), 7)
    yield write_json(head)
    yield write_json(replace(head, format_version=3, stream="run", keys=("2" * 64,), signatures=("00" * 64,)))


def pointer(data: bytes) -> None:
    for text in (data, _canonical(data)):
        with suppress(DeltaError):
            assert canonical.encode(parse_pointer(text, "pointer")) == text


def pointer_seeds() -> Iterator[bytes]:
    delta = PointedDelta(Origin(path="/delta"), "0" * 64)
    yield canonical.encode(Pointer((delta,), Origin(repo_id="org/base", revision="1" * 40)))
    yield canonical.encode(Pointer((delta, delta)))


def training_record(data: bytes) -> None:
    for text in (data, _canonical(data)):
        with suppress(CheckpointError, DeltaError):
            assert canonical.encode(parse_training_record(text, "record")) == text


def training_record_seeds() -> Iterator[bytes]:
    files = (FileRecord("optimizer.pt", 100, "0" * 64), FileRecord("scheduler.pt", 9, "1" * 64))
    yield canonical.encode(TrainingRecord(files))
    yield canonical.encode(TrainingRecord(()))


def _fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _canonical(data: bytes, fields: dict[str, Any] | None = None) -> bytes:
    fields = _fields(data) if fields is None else fields
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _sealed(data: bytes) -> bytes:
    fields = _fields(data) | {"checksum": ""}
    return _canonical(b"", fields | {"checksum": hashlib.sha256(_canonical(b"", fields)).hexdigest()})


# Chunks --------------------------------------------------------------------------------------------------

DTYPES = sorted(DTYPE_BITS)
SIZES = (0, 1, 7, 64, 4096, 30_000)
_GUARD = 64


def chunk(data: bytes) -> None:
    """The first bytes choose dtype, method, size, and whether there is a base; the others are the payload."""
    if len(data) < 4:
        return
    dtype, method = DTYPES[data[0] % len(DTYPES)], data[1]
    size, payload = SIZES[data[2] % len(SIZES)], data[4:]
    base = _base(size) if data[3] & 1 else None
    room = np.full(size + 2 * _GUARD, 0x5A, np.uint8)
    out = room[_GUARD:-_GUARD]
    with suppress(PayloadError):
        decode_chunk(method, payload, base, dtype, out)
    if base is not None:
        out[:] = base
        try:
            overwritten = patch_chunk(method, payload, out, dtype)
        except PayloadError:
            overwritten = None
        if overwritten:
            overwritten.put_back(out)
        assert np.array_equal(out, base)
        assert np.array_equal(base, _fresh_base(size)), "the base was written to"
        _patch(method, payload, size, dtype)
    assert (room[:_GUARD] == 0x5A).all()
    assert (room[-_GUARD:] == 0x5A).all()


def _patch(method: int, payload: bytes, size: int, dtype: str) -> None:
    with suppress(PayloadError):
        patch = read_patch(method, np.frombuffer(payload, np.uint8), size, dtype)
        if patch:
            assert (np.diff(patch.places, prepend=-1) > 0).all()
            assert (patch.places < size).all()


def _fresh_base(size: int) -> Bytes:
    return np.random.default_rng(size).normal(0, 0.02, -(-size // 4)).astype("<f4").view(np.uint8)[:size]


@functools.cache
def _base(size: int) -> Bytes:
    return _fresh_base(size)


def chunk_seeds() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for number, dtype in enumerate(DTYPES):
        for index, size in enumerate(SIZES):
            base, moved = _base(size), _base(size).copy()
            moved[::4] ^= 1
            rare = base.copy()
            rare[::999] ^= 1
            decayed = (base[: size // 4 * 4].view("<f4") * np.float32(1 - 1e-6)).view(np.uint8)
            decayed = np.concatenate([decayed, base[len(decayed) :]])
            for target in (base, moved, rare, np.frombuffer(rng.bytes(size), np.uint8), decayed):
                for with_base in (True, False):
                    method, payload = encode_chunk(base if with_base else None, target, dtype)
                    if len(payload) < 8000:
                        yield bytes([number, method, index, with_base]) + payload


# A file of payloads --------------------------------------------------------------------------------------


def payload_file(data: bytes) -> None:
    """A shard of a delta, as distributed checkpoints and weight streams have them too: header, chunk records,
    chunks. The tensors are said to have 8000 bytes, of which 4096 have a base."""
    plan = ChunkPlan(8000, 4096, 4096)
    with suppress(HeaderError):
        length = 8 + int.from_bytes(data[:8], "little")
        if length > len(data):
            return
        for info in parse_header(data[:length], len(data), "x").tensors:
            stored = data[length + info.start : length + info.end]
            with suppress(PayloadError):
                records, starts = check_records(stored[: plan.count * 24], plan, len(stored))
                for index, (start, end) in enumerate(plan):
                    payload = stored[int(starts[index]) :][: int(records["length"][index])]
                    base = _base(end - start) if plan.has_base(index) else None
                    out = np.empty(end - start, np.uint8)
                    decode_chunk(int(records["method"][index]), payload, base, "BF16", out)


def payload_seeds() -> Iterator[bytes]:
    plan = ChunkPlan(8000, 4096, 4096)
    rows, chunks = b"", b""
    for index, (start, end) in enumerate(plan):
        base = _base(end - start) if plan.has_base(index) else None
        target = _fresh_base(end - start)
        target[::50] ^= 1
        method, payload = encode_chunk(base, target, "BF16")
        own = 0 if base is None else checksum(base)
        rows += bytes([method, 0, 0, 0]) + len(payload).to_bytes(4, "little")
        rows += own.to_bytes(8, "little") + checksum(target).to_bytes(8, "little")
        chunks += payload
    whole = rows + chunks
    info = TensorInfo("a", "U8", (len(whole),), 0, len(whole))
    yield build_header([info], {"format": "deltaweights"}) + whole
    for path in FIXTURES.glob("*/delta/*.safetensors"):
        yield path.read_bytes()


# Updates on disk -----------------------------------------------------------------------------------------


def disk_update(data: bytes) -> None:
    """A frame of a tensor of 64 bytes, in one of the encodings, the first byte says in which."""
    encoding = ENCODINGS[data[0] % len(ENCODINGS)] if data else ENCODINGS[0]
    tensor = np.arange(64, dtype=np.uint8)
    with suppress(PayloadError):
        apply(encoding, data[1:], tensor)
        return
    assert np.array_equal(tensor, np.arange(64)), "refused, and written nevertheless"


def disk_update_seeds() -> Iterator[bytes]:
    old, new = np.arange(64, dtype=np.uint8), np.arange(64, dtype=np.uint8)
    new[::9] ^= 5
    for number, encoding in enumerate(ENCODINGS):
        yield bytes([number]) + encode(encoding, "x", old, new)


def disk_index(data: bytes) -> None:
    """What is let through names plain files, and shards that are all there."""
    with suppress(DeltaError):
        found = read_index(data, 1, "x")
        assert all("/" not in name and "\\" not in name for name in found.files.values())
        if found.update:
            count = len(set(found.files.values()))
            assert set(found.files.values()) == {shard_name(index, count) for index in range(count)}


def disk_index_seeds() -> Iterator[bytes]:
    for path in FIXTURES.glob("disk-updates/*/weight_v000001/*.json"):
        yield path.read_bytes()


TARGETS = {
    "header": Target(header, header_seeds),
    "manifest": Target(manifest, manifest_seeds),
    "chunk": Target(chunk, chunk_seeds),
    "payload_file": Target(payload_file, payload_seeds),
    "stream_record": Target(stream_record, stream_seeds),
    "checkpoint_record": Target(checkpoint_record, checkpoint_seeds),
    "disk_update": Target(disk_update, disk_update_seeds),
    "disk_index": Target(disk_index, disk_index_seeds),
    "pointer": Target(pointer, pointer_seeds),
    "training_record": Target(training_record, training_record_seeds),
}
