"""The documents of a weight stream: its head and its records, as canonical JSON.

A stream is a folder of published states, each a record ``N.json`` with the payloads that lead to it.
``head.json`` names the newest. docs/format.md explains every field. Everything is untrusted until
:func:`read_head` or :func:`read_record` returns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, TypeAlias

import msgspec

from ... import canonical
from ...entries import Shape, Size
from ...errors import DeltaError
from ...manifest import Sha256

HEAD_NAME = "head.json"
FORMAT_VERSION = 1

#: Bytes of a tensor in a chunk, fixed so that a chunk can be followed through any number of updates. More
#: than in a delta, since fixed costs per chunk dominate small updates, and chunks are not sampled here.
CHUNK_BYTES = 1 << 21

#: Far above any real head or record (about 300 bytes per tensor).
MAX_HEAD_BYTES = 1 << 12
MAX_RECORD_BYTES = 1 << 26

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=10**10)]
Writer: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_FILE = re.compile(r"(\d{10})(?:\.json|-[0-9a-f]{16}\.(?:update|anchor)\.safetensors)")


@dataclass(frozen=True, slots=True)
class StateReference:
    """A published state: its number, its digest, and the SHA-256 of its record."""

    number: Number
    state: Sha256
    record: Sha256

    @property
    def name(self) -> str:
        """The record's file."""
        return record_name(self.number)


@dataclass(frozen=True, slots=True)
class Head:
    """The newest state of a stream."""

    newest: StateReference
    step: Size
    format: Literal["deltaweights-stream"] = "deltaweights-stream"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class StreamTensor:
    """One tensor of a state: safetensors dtype and shape, digest of its bytes. With ``like``, it always has
    the bytes of the tensor of that name, and no own payload."""

    name: str
    dtype: str
    shape: Shape
    digest: Sha256
    like: str | None = None


@dataclass(frozen=True, slots=True)
class StreamFile:
    """A safetensors file of payloads: its size in bytes, its SHA-256."""

    size: Size
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class StateRecord:
    """One published state.

    ``update`` leads here from the state ``previous``; ``anchor`` leads here from nothing. A state with
    neither begins a stream for subscribers that already have these weights. ``last_anchor`` is the newest
    earlier state with an anchor. ``writer`` is a part of its files' names, so that two writers do not
    overwrite each other's files.
    """

    number: Number
    step: Size
    state: Sha256
    tensors: tuple[StreamTensor, ...]
    previous: StateReference | None
    update: StreamFile | None
    anchor: StreamFile | None
    last_anchor: StateReference | None
    writer: Writer
    format: Literal["deltaweights-stream"] = "deltaweights-stream"
    format_version: int = FORMAT_VERSION

    def payload_name(self, kind: Literal["update", "anchor"]) -> str:
        """The name of one of its payload files."""
        return payload_name(self.number, self.writer, kind)


def record_name(number: int) -> str:
    """The file name of the record ``number``."""
    return f"{number:010d}.json"


def payload_name(number: int, writer: str, kind: Literal["update", "anchor"]) -> str:
    """The name of a payload file of the state ``number``."""
    return f"{number:010d}-{writer}.{kind}.safetensors"


def number_of(name: str) -> int | None:
    """The number of the state that a stream's file belongs to; None for any other file."""
    match = _FILE.fullmatch(name)
    return int(match[1]) if match else None


def tensor_digest(checksums: bytes) -> str:
    """The digest of a tensor: SHA-256 (hex) of its chunks' XXH3-64, little-endian, one after the other."""
    return hashlib.sha256(checksums).hexdigest()


def state_digest(tensors: Iterable[StreamTensor]) -> str:
    """The digest of a state: SHA-256 (hex) of the canonical JSON of ``[name, dtype, shape, digest]`` of every
    tensor, sorted by name."""
    rows = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.digest) for tensor in tensors)
    return canonical.digest(rows)


def write_json(value: Head | StateRecord) -> bytes:
    """Canonical JSON: UTF-8, keys sorted, no white space, one line feed at the end."""
    return canonical.encode(value)


_HEADS = canonical.Format("deltaweights-stream", FORMAT_VERSION, "This weight stream", MAX_HEAD_BYTES)
_RECORDS = _HEADS._replace(most_bytes=MAX_RECORD_BYTES)


def read_head(data: bytes, where: str) -> Head:
    """Read and check a head.

    Args:
        where: its name in messages.

    Raises:
        FormatVersionError: this version of deltaweights does not know its format version.
        DeltaError: it is damaged.
    """
    return canonical.decode(data, Head, _HEADS, partial(damaged, where))


def read_record(data: bytes, reference: StateReference, where: str) -> StateRecord:
    """Read and check the record that ``reference`` names; raises like :func:`read_head`."""
    if hashlib.sha256(data).hexdigest() != reference.record:
        raise damaged(where, "Its SHA-256 is not the one that was published")
    record = canonical.decode(data, StateRecord, _RECORDS, partial(damaged, where))
    if (record.number, record.state) != (reference.number, reference.state):
        raise damaged(where, "It is the record of a different state")
    _validate(record, where)
    return record


def _validate(record: StateRecord, where: str) -> None:
    names = [tensor.name for tensor in record.tensors]
    owners = {tensor.name: tensor for tensor in record.tensors if tensor.like is None}
    if names != sorted(set(names)):
        raise damaged(where, "Its tensors are not sorted by name, each once")
    for tensor in record.tensors:
        other = owners.get(tensor.like or tensor.name)
        if other is None or (other.dtype, other.shape, other.digest) != (
            tensor.dtype,
            tensor.shape,
            tensor.digest,
        ):
            raise damaged(where, f"Tensor {tensor.name!r} refers to a tensor that it cannot be equal to")
    if record.state != state_digest(record.tensors):
        raise damaged(where, "Its digest is not that of its tensors")
    if (record.update is None) != (record.previous is None):
        raise damaged(where, "It follows a state without an update, or none with one")
    for earlier in filter(None, (record.previous, record.last_anchor)):
        if earlier.number >= record.number:
            raise damaged(where, "It comes before the state that it follows")


def damaged(where: str, why: str) -> DeltaError:
    """The error for a file of a stream that differs from the published one."""
    return DeltaError(
        f"{where} is damaged", f"{why}.", "Sync again; if that does not help, publish an anchor."
    )
