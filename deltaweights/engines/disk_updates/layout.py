"""Names and index of an update's folder.

``weight_v000001/`` holds shards ``model-00000-of-00002.safetensors``, counted from 0, and
``model.safetensors.index.json``, which is written last. What an index says is untrusted until
:func:`read_index` returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from ...errors import DeltaError
from .checksums import ChecksumFormat
from .encodings import DiskEncoding

INDEX_NAME = "model.safetensors.index.json"

#: The name of the only shard of a full checkpoint that has no index.
SINGLE_NAME = "model.safetensors"

#: Far above any real index (some 100 bytes a tensor).
MAX_INDEX_BYTES = 1 << 25

#: Versions that fit the six digits; more digits are fine, but no engine gets there.
MAX_VERSION = 10**9

_FOLDER = re.compile(r"weight_v(\d{6,9})", re.ASCII)

_Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}\Z")]


def folder_name(version: int) -> str:
    """The name of a version's folder."""
    return f"weight_v{version:06d}"


def version_of(name: str) -> int | None:
    """The version of a folder of that name; None for any other name."""
    match = _FOLDER.fullmatch(name)
    version = int(match[1]) if match else None
    return version if version is not None and folder_name(version) == name else None


def shard_name(index: int, count: int) -> str:
    """The name of a shard, of ``count``; the first is 0."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """What an update's index says of it.

    Attributes:
        version, base_version: the version that it leads to, and the one that it leads from.
        encoding, checksum: of its tensors.
        state: the state's digest as weight streams have it, where deltaweights wrote it.
        step: the publisher's step, where deltaweights wrote it.
    """

    version: int
    base_version: int
    encoding: DiskEncoding
    checksum: ChecksumFormat
    state: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """A checked index: the update's facts (None for a full checkpoint), and each tensor's file.

    ``state`` and ``step`` are those of :class:`UpdateFacts`, for full checkpoints as well.
    """

    update: UpdateFacts | None
    files: Mapping[str, str]
    state: str | None
    step: int | None


class _Metadata(msgspec.Struct):
    """Keys that are not named here are passed over, as the format's readers do."""

    version: _Version | None = None
    base_version: _Version | None = None
    delta_encoding: Literal["xor", "overwrite"] | None = None
    compression_format: Literal["zstd"] | None = None
    checksum_format: Literal["xxh3-128", "blake3", "adler32"] | None = None
    deltaweights_state: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    deltaweights_step: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,18}\Z")] | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


def write_index(files: Mapping[str, str], metadata: Mapping[str, object]) -> bytes:
    """The JSON of an index."""
    return (json.dumps({"metadata": metadata, "weight_map": files}, indent=1) + "\n").encode()


def update_metadata(facts: UpdateFacts) -> dict[str, str]:
    """The metadata of an update's index. What only deltaweights reads comes last."""
    return {
        "version": f"{facts.version:06d}",
        "base_version": f"{facts.base_version:06d}",
        "delta_encoding": facts.encoding,
        "compression_format": "zstd",
        "checksum_format": facts.checksum,
        **state_metadata(facts.state, facts.step),
    }


def state_metadata(state: str | None, step: int | None) -> dict[str, str]:
    """The keys of deltaweights: which state of a weight stream this is."""
    found = {"deltaweights_state": state, "deltaweights_step": step}
    return {key: str(value) for key, value in found.items() if value is not None}


def read_index(data: bytes, version: int, where: str) -> FolderIndex:
    """Read and check the index of the folder of ``version``.

    Raises:
        DeltaError: it is damaged, or of another version, or names files outside its folder.
    """
    try:
        found = msgspec.json.decode(data, type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(where, str(error)) from error
    metadata = found.metadata
    state, step = metadata.deltaweights_state, metadata.deltaweights_step
    steps = None if step is None else int(step)
    for file in set(found.weight_map.values()):
        if not _is_plain(file):
            raise damaged(where, f"It names a file {file!r}, which is no plain name of a .safetensors file")
    if metadata.delta_encoding is None:
        return FolderIndex(None, found.weight_map, state, steps)
    if metadata.version is None or metadata.base_version is None:
        raise damaged(where, "It lacks its version, or that of its base")
    if metadata.compression_format is None or metadata.checksum_format is None:
        raise damaged(where, "It lacks its compression, or the kind of its checksums")
    facts = UpdateFacts(
        int(metadata.version),
        int(metadata.base_version),
        metadata.delta_encoding,
        metadata.checksum_format,
        state,
        steps,
    )
    if facts.version != version or facts.base_version >= version:
        raise damaged(where, f"It leads from version {facts.base_version} to {facts.version}")
    _require_shards(set(found.weight_map.values()), where)
    return FolderIndex(facts, found.weight_map, state, steps)


def _is_plain(name: str) -> bool:
    return not re.search(r"[/\\\x00]", name) and name.endswith(".safetensors") and not name.startswith(".")


def _require_shards(names: set[str], where: str) -> None:
    """Shards are counted from 0, and all of them are there."""
    if names != {shard_name(index, len(names)) for index in range(len(names))}:
        raise damaged(where, f"Its files are not shards 0 to {len(names) - 1} of {len(names)}")


def damaged(where: str, why: str) -> DeltaError:
    """The error for a folder, or a file of it, that is not what a publisher of updates writes."""
    return DeltaError(f"{where} is damaged", f"{why.rstrip('.')}.", "Have it published again.")
