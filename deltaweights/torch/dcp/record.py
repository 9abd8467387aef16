"""The record of a distributed checkpoint, ``deltaweights-dcp.json``, which replaces torch's pickle by data.

It has frozen dataclasses and canonical JSON, like the manifest. Everything in a record is untrusted until
:func:`read_record` returns. docs/format.md describes the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

import msgspec

from ... import canonical, dtypes
from ...entries import Shape, Size
from ...errors import DeltaError, ManifestError
from ...manifest import FileRecord, RepoId, Revision, Sha256, Tool, is_safe_path
from ...storage import Source
from ..boxes import Box, fill

RECORD_NAME = "deltaweights-dcp.json"
FORMAT_VERSION = 1

#: Far above any real record (about 50 bytes for each tensor and rank).
MAX_RECORD_BYTES = 1 << 29

#: A value is read whole, and kept: hostile ones must not take much memory, alone or together.
MAX_VALUE_BYTES = 1 << 25
MAX_VALUES_BYTES = 1 << 27

#: A step in the path to a value in the nested state: a key, or a place in a list. Places are bounded, since
#: they decide how long a rebuilt list is.
PathStep: TypeAlias = str | Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]

#: torch's dtypes by name: the code in safetensors and the codec, and bytes per element. The codec treats
#: unknown codes as bytes.
DTYPES = {dtype.torch: (code, dtype.bits // 8) for code, dtype in dtypes.DTYPES.items() if dtype.torch} | {
    "float4_e2m1fn_x2": ("F4X2", 1),
    "complex128": ("C128", 16),
}


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The base of the checkpoint: safetensors files (with Hub id and commit, where known), or an earlier
    distributed checkpoint, identified by its record's checksum."""

    kind: Literal["safetensors", "delta"]
    repo_id: RepoId | None = None
    revision: Revision | None = None
    checksum: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class DcpBaseTensor:
    """The base tensor that a tensor is coded against, of the same shape; ``dtype`` is the base tensor's
    code."""

    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A part of a tensor: ``sizes`` elements, beginning at ``offsets``. Its payload is in file number
    ``file``."""

    offsets: Shape
    sizes: Shape
    file: Size

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A tensor of the state; ``dtype`` is torch's name for it, such as ``bfloat16``."""

    dtype: str
    shape: Shape
    base: DcpBaseTensor | None
    shards: tuple[TensorPart, ...]


@dataclass(frozen=True, slots=True)
class StoredValue:
    """Any other value in the state: ``nbytes`` bytes from ``torch.save``, in file number ``file``."""

    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_VALUE_BYTES)]
    file: Size


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The whole record. ``paths`` holds each name's path in the nested state, if the state was flattened."""

    base: BaseIdentity | None
    tensors: dict[str, ShardedTensor]
    values: dict[str, StoredValue]
    paths: dict[str, tuple[PathStep, ...]] | None
    files: tuple[FileRecord, ...]
    tool: Tool
    format: Literal["deltaweights-dcp"] = "deltaweights-dcp"
    format_version: int = FORMAT_VERSION
    #: SHA-256 of the canonical JSON in which this value is empty.
    checksum: str = field(default="")

    def sealed(self) -> CheckpointRecord:
        """The record with its checksum."""
        return replace(self, checksum=canonical.digest(replace(self, checksum="")))

    def to_json(self) -> bytes:
        """Canonical JSON: UTF-8, keys sorted, no white space, one line feed at the end."""
        return canonical.encode(self.sealed())


def payload_name(name: str, offsets: Iterable[int] | None) -> str:
    """The name of a shard's payload (or, without ``offsets``, a value's) in its file."""
    return f"{name}@" if offsets is None else f"{name}@{','.join(map(str, offsets))}"


def read_record(source: Source) -> CheckpointRecord:
    """Read and check the record of the distributed checkpoint at ``source``.

    Raises:
        FormatVersionError: this version of deltaweights does not know its format version.
        ManifestError: there is none, or it is damaged or contradicts itself.
        DeltaError: a file that it names is missing or cut.
    """
    size = source.sizes.get(RECORD_NAME)
    if size is None:
        raise ManifestError(
            f"{source.where} is not a distributed checkpoint of deltaweights",
            f"It has no {RECORD_NAME}: it is something else, or an interrupted save.",
            "Check the path, or use an earlier checkpoint.",
        )
    if size > MAX_RECORD_BYTES:
        raise _damaged(f"It has {size} bytes, more than a record may have")
    record = parse_record(source.open(RECORD_NAME).read(0, size))
    wrong = [file.path for file in record.files if source.sizes.get(file.path) != file.size]
    if wrong:
        raise DeltaError(
            f"{source.where} is not a whole checkpoint",
            f"{wrong[0]!r} is missing or not of the record's size ({len(wrong)} files).",
            "Get it again, or go back to an earlier checkpoint.",
        )
    return record


_FORMAT = canonical.Format("deltaweights-dcp", FORMAT_VERSION, "This checkpoint", MAX_RECORD_BYTES)


def parse_record(data: bytes) -> CheckpointRecord:
    """Parse and check the record with the JSON ``data``; raises like :func:`read_record`."""
    record = canonical.decode(data, CheckpointRecord, _FORMAT, _damaged, CheckpointRecord.to_json)
    validate(record)
    return record


def _damaged(why: str) -> ManifestError:
    return ManifestError(
        f"{RECORD_NAME} is damaged", f"{why}.", "Get it again, or go back to an earlier checkpoint."
    )


def validate(record: CheckpointRecord) -> None:
    """Check the rules that types cannot express.

    Raises:
        ManifestError: the record breaks one.
    """
    paths = {file.path for file in record.files}
    unsafe = [path for path in paths if not is_safe_path(path) or not path.endswith(".safetensors")]
    if unsafe or len(paths) != len(record.files):
        raise _damaged(f"It names a file twice, or has an invalid file name: {unsafe[:1]}")
    for name, tensor in record.tensors.items():
        if name in record.values:
            raise _damaged(f"{name!r} is both a tensor and a value")
        _validate_tensor(name, tensor)
        if tensor.base and not record.base:
            raise _damaged(f"Tensor {name!r} has a base, but the checkpoint has none")
    if sum(value.nbytes for value in record.values.values()) > MAX_VALUES_BYTES:
        raise _damaged(f"Its values have more than {MAX_VALUES_BYTES:,} bytes together")
    files = [shard.file for tensor in record.tensors.values() for shard in tensor.shards]
    files += [value.file for value in record.values.values()]
    if max(files, default=-1) >= len(paths):
        raise _damaged("It names a file by a number that no file has")
    if record.base and (record.base.kind == "delta") != (record.base.checksum is not None):
        raise _damaged("It does not say which checkpoint its base is")


def _validate_tensor(name: str, tensor: ShardedTensor) -> None:
    if tensor.dtype not in DTYPES:
        raise _damaged(f"Tensor {name!r} has the unknown dtype {tensor.dtype!r}")
    if math.prod(max(1, size) for size in tensor.shape) >= 1 << 58:
        raise _damaged(f"Tensor {name!r} is larger than any tensor can be")
    if len({shard.offsets for shard in tensor.shards}) != len(tensor.shards):
        raise _damaged(f"Two shards of tensor {name!r} begin at the same place")
    if not fill(tensor.shape, [shard.box for shard in tensor.shards]):
        raise _damaged(f"The shards of tensor {name!r} do not hold each element exactly once")
