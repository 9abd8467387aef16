"""Writes one rank's part of a distributed checkpoint, and makes the record from all ranks' results."""

from __future__ import annotations

import io
import math
import secrets
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from ... import codec
from ..._version import __version__
from ...errors import OutputError
from ...manifest import FileRecord, Tool
from ...payload import ChunkPlan, CodedChunk, PayloadFile, encode_row
from ...storage import UnlockedPlace
from ...workers import Workers
from ..boxes import Box, fill
from ..tensors import first_line
from .base import BasePart, BaseTensors, find_counterpart
from .record import (
    DTYPES,
    MAX_VALUE_BYTES,
    BaseIdentity,
    CheckpointRecord,
    DcpBaseTensor,
    ShardedTensor,
    StoredValue,
    TensorPart,
    payload_name,
)

_METADATA = {"format": "deltaweights-dcp"}

#: At least the bytes of an element of any dtype.
_ELEMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Item:
    """A rank's message to the coordinator about one item: its bytes and, for the shard of a tensor, its part,
    torch's name for its dtype, and its base tensor."""

    nbytes: int
    box: Box | None
    dtype: str | None
    counterpart: DcpBaseTensor | None


@dataclass(frozen=True, slots=True)
class Written:
    """An item in its file, written by a rank with this base."""

    item: Item
    file: FileRecord
    base: BaseIdentity | None


@dataclass(frozen=True, slots=True)
class _Part:
    """An item's bytes, their dtype, and their base."""

    data: NDArray[np.uint8]
    code: str
    box: Box | None = None
    dtype: str | None = None
    base: BasePart | None = None


def require_storable(item: WriteItem) -> None:
    """Raise :class:`OutputError` if the item is a tensor without plain bytes."""
    properties = item.tensor_data and item.tensor_data.properties
    if properties and (properties.layout != torch.strided or _name(properties.dtype) not in DTYPES):
        raise OutputError(
            f"{item.index.fqn} cannot be saved as a delta",
            f"It is a tensor of {properties.dtype} in {properties.layout}.",
            "Leave it out of the state, or save it as a strided tensor of a plain dtype.",
        )


def write_items(
    items: Sequence[WriteItem],
    planner: SavePlanner,
    place: UnlockedPlace,
    rank: int,
    base: BaseTensors | None,
    renamed: Mapping[str, str],
    threads: int,
) -> list[WriteResult]:
    """Write one file with all items of this rank. ``renamed`` has the base's names for those of the state
    that rename rules change.

    Raises:
        OutputError: an item cannot be saved, or the place cannot be written to.
        CheckpointError, DeltaError: the base cannot be read.
    """
    values = {item.index.fqn: _value(item, planner) for item in items if item.tensor_data is None}
    done: list[Item] = []
    # File names are unique per save, so an earlier checkpoint stays complete until this one is.
    name = f"delta-{rank:05d}-{secrets.token_hex(8)}.safetensors"
    with Workers(threads) as workers, place.create(name) as file:
        payloads = PayloadFile(file, _largest(items, values), _METADATA)
        for item in items:
            fqn = item.index.fqn
            if item.tensor_data is None:
                part = _Part(np.frombuffer(values[fqn], np.uint8), "U8")
            else:
                part = _resolve(item, item.tensor_data, planner, base, renamed)
            key = payload_name(fqn, part.box.offsets if part.box else None)
            plan = ChunkPlan(part.data.size, part.data.size if part.base else 0)
            with closing(_encoded(part, plan, workers)) as chunks:
                payloads.write(key, plan, chunks)
            counterpart = part.base.tensor if part.base else None
            done.append(Item(part.data.nbytes, part.box, part.dtype, counterpart))
        infos = payloads.finish()
        record = FileRecord(name, *file.digest())
        file.commit()
    identity = base.identity if base else None
    return [
        WriteResult(item.index, info.nbytes, Written(what, record, identity))
        for item, info, what in zip(items, infos, done, strict=True)
    ]


def _largest(items: Sequence[WriteItem], values: dict[str, bytes]) -> dict[str, int]:
    """The most bytes that each payload may code, by its name."""
    found = {}
    for item in items:
        if item.tensor_data is None:
            found[payload_name(item.index.fqn, None)] = len(values[item.index.fqn])
        else:
            chunk = item.tensor_data.chunk
            found[payload_name(item.index.fqn, chunk.offsets)] = math.prod(chunk.sizes) * _ELEMENT_BYTES
    return found


def _value(item: WriteItem, planner: SavePlanner) -> bytes:
    """The bytes of a value, checked like a reader would."""
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    if len(data.getbuffer()) > MAX_VALUE_BYTES:
        raise OutputError(
            f"{item.index.fqn} cannot be saved as a delta",
            f"It is a value of {len(data.getbuffer()):,} bytes; readers accept at most {MAX_VALUE_BYTES:,}.",
            "Keep large tensors in dicts or lists, not in tuples or objects: then each is saved as a tensor.",
        )
    try:
        load_value(data.getvalue())
    except Exception as error:
        raise OutputError(
            f"{item.index.fqn} cannot be saved as a delta",
            f"torch.load(…, weights_only=True) does not read it: {first_line(error)}",
            "Keep numbers, strings, tensors, lists and dicts in the state; or see add_safe_globals of torch.",
        ) from error
    return data.getvalue()


#: What a value's pickle may have: bytes, and operations that make an object of some hundred bytes out of one
#: or two (lists, dicts, tuples, calls). Bytes of numbers and texts that look the same are counted along.
_MOST_PICKLE, _MOST_OBJECTS = 1 << 24, 1 << 19
_END_OF_ARCHIVE = b"PK\x05\x06"
_MAKERS = [bytes([code]) for code in b"](})tlds\x81\x85\x86\x87\x8fR"]


def load_value(data: bytes) -> Any:
    """What ``torch.save`` made ``data`` of; raises whatever torch does where that is more than plain data.

    Raises:
        ValueError: it would take far more memory than its bytes.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()) or data.count(_END_OF_ARCHIVE) != 1:
            raise ValueError("it can be read in two ways")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed")
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        objects = (sum(map(archive.read(name).count, _MAKERS)) for name in pickles)
        if sum(members[name].file_size for name in pickles) > _MOST_PICKLE or sum(objects) > _MOST_OBJECTS:
            raise ValueError("it has too many parts")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _resolve(
    item: WriteItem,
    planned: TensorWriteData,
    planner: SavePlanner,
    base: BaseTensors | None,
    renamed: Mapping[str, str],
) -> _Part:
    """A shard's bytes, copied from the device, and its part of the base."""
    fqn, chunk = item.index.fqn, planned.chunk
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    dtype = _name(tensor.dtype)
    if tensor.size() != chunk.sizes or dtype not in DTYPES:
        raise OutputError(
            f"{fqn} cannot be saved",
            f"It is {tensor.dtype} {list(tensor.size())}, but its plan says {list(chunk.sizes)}.",
        )
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy()
    box, code, reference = Box(tuple(chunk.offsets), tuple(chunk.sizes)), DTYPES[dtype][0], None
    name = renamed.get(fqn, fqn)
    counterpart = find_counterpart(base, name, code, tuple(planned.size)) if base else None
    if base and counterpart:
        reference = BasePart(base, counterpart, box)
    return _Part(data, code, box, dtype, reference)


def _encoded(part: _Part, plan: ChunkPlan, workers: Workers) -> Generator[CodedChunk, None, None]:
    """A part's chunks, in order."""

    def encode(row: tuple[int, int]) -> list[CodedChunk]:
        start, end = plan.bounds(*row)
        base, dtype = None, None
        if part.base:
            dtype = part.base.dtype
            first, stop = (codec.rescale(place, part.code, dtype) for place in (start, end))
            base = np.empty(stop - first, np.uint8)
            part.base.read_into(first, base)
        return encode_row(part.data[start:end], base, part.code, plan.chunk_bytes, base_dtype=dtype)

    with part.base.expect() if part.base else nullcontext():
        for row in workers.map(encode, plan.rows(workers.batch_bytes)):
            yield from row


def make_record(metadata: Metadata, results: Sequence[WriteResult]) -> CheckpointRecord:
    """Make the record from the results of all ranks.

    Raises:
        OutputError: they contradict each other, or the record cannot hold the planner's data.
    """
    written: dict[str, list[Written]] = {}
    for result in results:
        written.setdefault(result.index.fqn, []).append(result.storage_data)
    everything = [one for parts in written.values() for one in parts]
    by_path = {one.file.path: one.file for one in everything}
    numbers = {path: number for number, path in enumerate(sorted(by_path))}
    tensors, values = {}, {}
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            (value,) = written[name]
            values[name] = StoredValue(value.item.nbytes, numbers[value.file.path])
        else:
            tensors[name] = _tensor(name, tuple(stored.size), written[name], numbers)
    bases = {one.base for one in everything}
    if len(bases) > 1:
        raise OutputError("The ranks did not save against the same base", "They were given different ones.")
    has_base = any(tensor.base for tensor in tensors.values())
    return CheckpointRecord(
        base=bases.pop() if has_base else None,
        tensors=tensors,
        values=values,
        paths=_paths(metadata.planner_data),
        files=tuple(by_path[path] for path in numbers),
        tool=Tool("deltaweights", __version__),
    )


def _tensor(
    name: str, shape: tuple[int, ...], parts: Sequence[Written], numbers: dict[str, int]
) -> ShardedTensor:
    kinds = {(part.item.dtype, part.item.counterpart) for part in parts}
    dtype, counterpart = kinds.pop()
    if kinds or dtype is None:
        raise OutputError(f"The ranks did not save {name} alike", "It has several dtypes or bases.")
    shards = [
        TensorPart(part.item.box.offsets, part.item.box.sizes, numbers[part.file.path])
        for part in parts
        if part.item.box
    ]
    if not fill(shape, [shard.box for shard in shards]):
        raise OutputError(
            f"{name} is incomplete",
            "The ranks that save together hold only a part of it, or parts of it twice.",
            "Save with all ranks that hold a part of the state, and without no_dist=True.",
        )
    return ShardedTensor(dtype, shape, counterpart, tuple(sorted(shards, key=lambda shard: shard.offsets)))


def _paths(planner_data: Any) -> dict[str, tuple[str | int, ...]] | None:
    """The path of each name in the nested state, as torch's default planners keep it. Other planners may keep
    anything."""
    if planner_data is None:
        return None
    if isinstance(planner_data, dict) and all(
        isinstance(path, tuple) and all(isinstance(step, (str, int)) for step in path)
        for path in planner_data.values()
    ):
        return planner_data
    raise OutputError(
        "The planner's data cannot be saved",
        f"It is {type(planner_data).__name__}, not names and places in lists, as for the default planner.",
        "Use a planner derived from torch's DefaultSavePlanner.",
    )
