"""A delta's shards: payloads, and the header of the target's shard in the metadata."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import zstandard

from ..checkpoint import (
    MAX_HEADER_BYTES,
    Header,
    Shard,
    Tensor,
    TensorInfo,
    build_header,
    parse_header,
    read_shard,
)
from ..dtypes import DTYPE_BITS
from ..entries import TensorEntry
from ..errors import CheckpointError, DeltaError, HeaderError, PayloadError
from ..manifest import TargetFile
from ..storage import Source


@dataclass(frozen=True, slots=True)
class DeltaShard:
    """A delta shard, its payloads by the tensors' names, and the header of the target shard ``file``."""

    file: TargetFile
    shard: Shard
    header: Header
    payloads: dict[str, Tensor]

    def payload(self, entry: TensorEntry) -> Tensor:
        """The payload of the entry's tensor.

        Raises:
            PayloadError: there is none, or its length contradicts the manifest.
        """
        payload = self.payloads.get(entry.name)
        if not payload or payload.info.nbytes != entry.payload_bytes:
            raise contradicts(self.file, f"They describe tensor {entry.name!r} differently")
        return payload


#: What the target's header may have beyond a few times the usual one, which the manifest tells: white space,
#: and metadata, which the delta pays for with its own bytes. So the headers of a thousand shards are small.
_TIMES_USUAL, _TIMES_PACKED, _ROOM = 4, 64, 128 << 10

#: What the metadata of delta shards call them: those with a tensor for each payload, which are no longer
#: written, and those with all payloads in a row in one tensor.
_APART, _IN_A_ROW = "deltaweights", "deltaweights-row"
_ROW = "payloads"  # that tensor


def shard_metadata(shard: Shard) -> dict[str, str]:
    """The metadata of the delta shard for a target's shard, whose own header is in there byte for byte.

    Raises:
        CheckpointError: that header is far larger than what it says: nobody would read it out of the delta.
    """
    usual = usual_header(shard.header.tensors, shard.file.size)
    assert usual is not None  # the shard's header was checked
    dictionary = _dictionary(usual)
    # The checksum reveals a reader with a different dictionary.
    compressor = zstandard.ZstdCompressor(level=19, dict_data=dictionary, write_checksum=True)
    packed = compressor.compress(shard.header.raw)
    if len(shard.header.raw) > _most_bytes(usual, packed):
        raise CheckpointError(
            f"{shard.path} cannot be part of a delta",
            f"Its header has {len(shard.header.raw)} bytes, nearly all of them white space or repetition.",
            "Save it again, for example with save_file of safetensors.",
        )
    return {"format": _IN_A_ROW, "header": base64.b64encode(packed).decode()}


def _most_bytes(usual: bytes, packed: bytes) -> int:
    """How long a target's header may be that is coded as ``packed``."""
    return min(8 + MAX_HEADER_BYTES, _TIMES_USUAL * len(usual) + _TIMES_PACKED * len(packed) + _ROOM)


def shard_header(payload_bytes: int, metadata: dict[str, str], room: int = 0) -> bytes:
    """The header of a delta shard with ``payload_bytes`` bytes of payloads, padded to ``room`` bytes."""
    return build_header([TensorInfo(_ROW, "U8", (payload_bytes,), 0, payload_bytes)], metadata, room)


def usual_header(tensors: Iterable[TensorInfo | TensorEntry], size: int) -> bytes | None:
    """The most likely header of a target's shard with these tensors and ``size`` bytes; None if the tensors
    have more bytes than that."""
    infos, end = [], 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * DTYPE_BITS.get(tensor.dtype, 0) // 8
        if end > size:  # before its digits fill memory
            return None
        infos.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, start, end))
    return build_header(infos, {"format": "pt"})


def _dictionary(content: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def read_delta_shard(source: Source, file: TargetFile, entries: Collection[TensorEntry]) -> DeltaShard:
    """Read the headers of a delta shard: its own, and that of the target's shard.

    Args:
        entries: those of the file's tensors, in the manifest's order.

    Raises:
        DeltaError: they are damaged or contradict the manifest.
    """
    try:
        shard = read_shard(source, file.source)
    except HeaderError as error:
        raise _damaged(file, error.why) from error
    usual = usual_header(entries, file.size)
    if usual is None:
        raise contradicts(file, "The manifest's tensors have more bytes than their file")
    kind = shard.header.metadata.get("format")
    if kind == _IN_A_ROW:
        dictionary, infos = usual, _in_a_row(shard, file, entries)
    elif kind == _APART:
        dictionary, infos = b"", list(shard.header.tensors)
    else:
        raise _damaged(file, "Its metadata does not call it a deltaweights shard.")
    packed = _packed(shard, file)
    raw = _expanded(packed, file, dictionary, _most_bytes(usual, packed))
    try:
        header = parse_header(
            raw, file.size, file.path, 2 * len(entries) + 100
        )  # the difference is told later
    except HeaderError as error:
        raise _damaged(file, error.why) from error
    header = replace(header, metadata={})  # nobody asks for it, and it takes up more than its text
    return DeltaShard(file, shard, header, {info.name: Tensor(info, shard) for info in infos})


def _damaged(file: TargetFile, why: str) -> DeltaError:
    return DeltaError(f"{file.source} in the delta is damaged", why, "Get the delta again.")


def _in_a_row(shard: Shard, file: TargetFile, entries: Iterable[TensorEntry]) -> list[TensorInfo]:
    """The payloads in a delta shard that holds them in one tensor; their lengths are in the manifest."""
    infos, end = [], 0
    for entry in entries:
        start, end = end, end + entry.payload_bytes
        infos.append(TensorInfo(entry.name, "U8", (entry.payload_bytes,), start, end))
    if shard.header.tensors != (TensorInfo(_ROW, "U8", (end,), 0, end),):
        raise contradicts(file, f"Its payloads do not have {end} bytes together")
    return infos


def contradicts(file: TargetFile, why: str) -> PayloadError:
    return PayloadError(
        f"{file.source} in the delta contradicts the manifest", f"{why}.", "Get the delta again."
    )


def _packed(delta_shard: Shard, file: TargetFile) -> bytes:
    """The target shard's own header, out of the delta shard's metadata."""
    try:
        return base64.b64decode(delta_shard.header.metadata.get("header", ""), validate=True)
    except ValueError as error:
        raise _broken(file, f"is broken: {error}") from error


def _expanded(packed: bytes, file: TargetFile, dictionary: bytes, most: int) -> bytes:
    """That header, of at most so many bytes. It is coded against ``dictionary``."""
    try:
        size = zstandard.frame_content_size(packed)
        if not 8 <= size <= min(file.size, most):
            raise _broken(file, f"would have {size} bytes, more than what the manifest describes takes up")
        expander = zstandard.ZstdDecompressor(dict_data=_dictionary(dictionary))
        raw = expander.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _broken(file, f"is broken: {error}") from error
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise _broken(file, "has another length than it says")
    return raw


def _broken(file: TargetFile, what: str) -> DeltaError:
    return _damaged(file, f"Its copy of the target's header {what}.")
