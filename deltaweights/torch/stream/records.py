"""The documents of a weight stream: its head and its records, as canonical JSON.

A stream is a folder of published states, each a record ``N.json`` with the payloads that lead to it.
``head.json`` names the newest. docs/format.md explains every field. Everything is untrusted until
:func:`read_head` or :func:`read_record` returns.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from ... import canonical
from ...entries import Shape, Size
from ...errors import DeltaError
from ...manifest import Sha256
from ..boxes import Box, fill

HEAD_NAME = "head.json"

#: The version of records without parts, of those with parts, and of heads that are signed. (An unsigned head
#: has its record's version.)
WHOLE_VERSION, PARTS_VERSION, SIGNED_VERSION = 1, 2, 3

#: Bytes of a tensor in a chunk, fixed so that a chunk can be followed through any number of updates. More
#: than in a delta, since fixed costs per chunk dominate small updates, and chunks are not sampled here.
CHUNK_BYTES = 1 << 21

#: Far above any real head or record (about 300 bytes per tensor).
MAX_HEAD_BYTES = 1 << 12
MAX_RECORD_BYTES = 1 << 26

#: The most keys that sign a head; and the names of signed streams.
MOST_KEYS = 8
STREAM_NAME = re.compile(r"[A-Za-z0-9._:/-]{0,200}")

#: Above the number of processes that publish one state together.
MOST_FILES = 100_000

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=10**10)]
Writer: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
#: What a payload file holds: the way from the state before, or from nothing.
Kind: TypeAlias = Literal["update", "anchor"]
_FILE = re.compile(r"(\d{10})(?:\.json|-[0-9a-f]{16}(?:-\d{5})?\.(?:update|anchor)\.safetensors)")


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


_HexSignature: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}){8,160}\Z")]


@dataclass(frozen=True, slots=True)
class Head:
    """The newest state of a stream. Format version 3 has the stream's name, the ids of the keys that sign
    it, and a signature by each of the JSON without ``signatures``."""

    newest: StateReference
    step: Size
    format: Literal["deltaweights-stream"] = "deltaweights-stream"
    format_version: int = WHOLE_VERSION
    stream: str | UnsetType = UNSET
    keys: tuple[Sha256, ...] | UnsetType = UNSET
    signatures: tuple[_HexSignature, ...] | UnsetType = UNSET


class StreamPart(NamedTuple):
    """A part of a tensor: a box of ``sizes`` elements from ``offsets`` on. Its payloads are in the files
    number ``file``."""

    offsets: Shape
    sizes: Shape
    file: Annotated[int, msgspec.Meta(ge=0, lt=MOST_FILES)]

    @property
    def box(self) -> Box:
        """The part's place in the tensor."""
        return Box(self.offsets, self.sizes)


@dataclass(frozen=True, slots=True)
class StreamTensor:
    """One tensor of a state: safetensors dtype and shape, digest of its bytes. With ``like``, it always has
    the bytes of the tensor of that name, and no own payload.

    ``parts`` hold each of its elements once. Without any, it is whole, and its payloads are in the files
    number 0. Format version 1 does not have the field.
    """

    name: str
    dtype: str
    shape: Shape
    digest: Sha256
    like: str | None = None
    parts: tuple[StreamPart, ...] | UnsetType = UNSET

    @property
    def pieces(self) -> tuple[StreamPart, ...]:
        """Its parts; none if it is whole."""
        return self.parts or ()

    @property
    def keys(self) -> dict[str, StreamPart | None]:
        """The names of its payloads, in order, and their parts; None: the whole tensor."""
        return {part_key(self.name, part.offsets): part for part in self.pieces} or {self.name: None}


@dataclass(frozen=True, slots=True)
class StreamFile:
    """A safetensors file of payloads: its size in bytes, its SHA-256."""

    size: Size
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class StateRecord:
    """One published state.

    ``update`` leads here from the state ``previous``; ``anchor`` leads here from nothing. Each is one file,
    or in format version 2 one of every process that wrote. A state with neither begins a stream for
    subscribers that already have these weights. ``last_anchor`` is the newest earlier state with an anchor.
    ``writer`` is a part of its files' names, so that two writers do not overwrite each other's files.
    """

    number: Number
    step: Size
    state: Sha256
    tensors: tuple[StreamTensor, ...]
    previous: StateReference | None
    update: StreamFile | tuple[StreamFile, ...] | None
    anchor: StreamFile | tuple[StreamFile, ...] | None
    last_anchor: StateReference | None
    writer: Writer
    format: Literal["deltaweights-stream"] = "deltaweights-stream"
    format_version: int = WHOLE_VERSION

    def files(self, kind: Kind) -> dict[str, StreamFile]:
        """Its payload files of one kind, by name, in order; none if it has none."""
        found = self.update if kind == "update" else self.anchor
        if isinstance(found, StreamFile):
            return {payload_name(self.number, self.writer, kind): found}
        names = (payload_name(self.number, self.writer, kind, place) for place in range(len(found or ())))
        return dict(zip(names, found or (), strict=True))

    def payloads(self) -> Iterator[tuple[StreamTensor, str, str, int]]:
        """For every tensor, or every part of it: the tensor; the name that its payload would have; the name
        that it has, which differs if the tensor is like another; and the place of its file."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for tensor in self.tensors:
            owner = by_name[tensor.like or tensor.name]
            for key, (own, part) in zip(tensor.keys, owner.keys.items(), strict=True):
                yield tensor, key, own, part.file if part else 0

    def nbytes(self, kind: Kind) -> int:
        """The size of its payload files of one kind."""
        return sum(file.size for file in self.files(kind).values())


def record_name(number: int) -> str:
    """The file name of the record ``number``."""
    return f"{number:010d}.json"


def payload_name(number: int, writer: str, kind: Kind, place: int | None = None) -> str:
    """The name of a payload file of the state ``number``; with its ``place`` among several, if there are."""
    of = "" if place is None else f"-{place:05d}"
    return f"{number:010d}-{writer}{of}.{kind}.safetensors"


def part_key(name: str, offsets: Iterable[int]) -> str:
    """The name of the payload of a tensor's part."""
    return f"{name}@{','.join(map(str, offsets))}"


def number_of(name: str) -> int | None:
    """The number of the state that a stream's file belongs to; None for any other file."""
    match = _FILE.fullmatch(name)
    return int(match[1]) if match else None


def tensor_digest(checksums: bytes) -> str:
    """The digest of a tensor: SHA-256 (hex) of its chunks' XXH3-64, little-endian, one after the other, those
    of one part after those of another."""
    return hashlib.sha256(checksums).hexdigest()


def state_digest(tensors: Iterable[StreamTensor]) -> str:
    """The digest of a state: SHA-256 (hex) of the canonical JSON of ``[name, dtype, shape, digest]`` of every
    tensor, sorted by name; of one with parts, followed by the ``[offsets, sizes]`` of each."""
    return canonical.digest([_row(tensor) for tensor in sorted(tensors, key=lambda tensor: tensor.name)])


def _row(tensor: StreamTensor) -> tuple[object, ...]:
    row = (tensor.name, tensor.dtype, tensor.shape, tensor.digest)
    boxes = [part[:2] for part in tensor.pieces]
    return (*row, boxes) if boxes else row


def write_json(value: Head | StateRecord) -> bytes:
    """Canonical JSON: UTF-8, keys sorted, no white space, one line feed at the end."""
    return canonical.encode(value)


_HEADS = canonical.Format(
    "deltaweights-stream", SIGNED_VERSION, "This weight stream", MAX_HEAD_BYTES, WHOLE_VERSION
)
_RECORDS = _HEADS._replace(version=PARTS_VERSION, most_bytes=MAX_RECORD_BYTES)


def read_head(data: bytes, where: str) -> Head:
    """Read and check a head.

    Args:
        where: its name in messages.

    Raises:
        FormatVersionError: this version of deltaweights does not know its format version.
        DeltaError: it is damaged.
    """
    head = canonical.decode(data, Head, _HEADS, partial(damaged, where))
    signing = (head.stream, head.keys, head.signatures)
    if any((one is not UNSET) != (head.format_version == SIGNED_VERSION) for one in signing):
        raise damaged(where, "It does not have the fields of its format version")
    keys = head.keys or ()
    if not len(keys) == len(head.signatures or ()) <= MOST_KEYS or list(keys) != sorted(set(keys)):
        raise damaged(where, "Its keys are too many, not sorted, or not one for each signature")
    if not STREAM_NAME.fullmatch(head.stream or ""):
        raise damaged(where, "Its stream has a name that it cannot have")
    return head


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
        if other is None or replace(other, name=tensor.name, like=tensor.like) != tensor:
            raise damaged(where, f"Tensor {tensor.name!r} refers to a tensor that it cannot be equal to")
    _validate_parts(record, owners.values(), where)
    if record.state != state_digest(record.tensors):
        raise damaged(where, "Its digest is not that of its tensors")
    if (record.update is None) != (record.previous is None):
        raise damaged(where, "It follows a state without an update, or none with one")
    for earlier in filter(None, (record.previous, record.last_anchor)):
        if earlier.number >= record.number:
            raise damaged(where, "It comes before the state that it follows")


def _validate_parts(record: StateRecord, own: Iterable[StreamTensor], where: str) -> None:
    """Check that it has what its format version has, that parts fill their tensors, and that payloads have
    names and files of their own."""
    has_parts = record.format_version == PARTS_VERSION
    counts = set()
    for files in (record.update, record.anchor):
        if files is None:
            continue
        if isinstance(files, tuple) != has_parts:
            raise damaged(where, "Its files are not listed as its format version lists them")
        counts.add(len(files) if isinstance(files, tuple) else 1)
    if any((tensor.parts is not UNSET) != has_parts for tensor in record.tensors):
        raise damaged(where, "Its tensors do not have the fields of its format version")
    if len(counts) > 1 or not 0 < max(counts, default=1) <= MOST_FILES:
        raise damaged(where, "It has no files, too many, or another number for its update than its anchor")
    keys = set[str]()
    for tensor in own:
        _validate_tensor(tensor, where)
        if not keys.isdisjoint(tensor.keys):
            raise damaged(where, f"The payloads of tensor {tensor.name!r} have the names of others")
        keys |= tensor.keys.keys()
        if counts and any(part.file not in range(*counts) for part in tensor.pieces):
            raise damaged(where, f"A part of tensor {tensor.name!r} is in a file that it does not have")


def _validate_tensor(tensor: StreamTensor, where: str) -> None:
    """Check that a tensor's parts fill it, in order."""
    if not tensor.pieces:
        return
    if tensor.dtype == "F4" and len(tensor.pieces) > 1:
        raise damaged(where, f"Tensor {tensor.name!r} has parts, though two of its elements share a byte")
    if math.prod(max(1, size) for size in tensor.shape) >= 1 << 58:
        raise damaged(where, f"Tensor {tensor.name!r} is larger than any tensor can be")
    offsets = [part.offsets for part in tensor.pieces]
    if offsets != sorted(set(offsets)):
        raise damaged(where, f"The parts of tensor {tensor.name!r} are not sorted by offsets, each once")
    if math.prod(tensor.shape) and not all(math.prod(part.sizes) for part in tensor.pieces):
        raise damaged(where, f"A part of tensor {tensor.name!r} has no elements")
    if not fill(tensor.shape, [part.box for part in tensor.pieces]):
        raise damaged(where, f"The parts of tensor {tensor.name!r} do not hold each element exactly once")


def damaged(where: str, why: str) -> DeltaError:
    """The error for a file of a stream that differs from the published one."""
    return DeltaError(
        f"{where} is damaged", f"{why}.", "Sync again; if that does not help, publish an anchor."
    )
