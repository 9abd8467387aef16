"""A delta's shards: payloads, and the header of the target's shard in the metadata."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
from ..errors import DeltaError, HeaderError, PayloadError
from ..manifest import TargetFile, TensorEntry
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


#: The kinds of delta shards in their metadata: with a tensor for each payload (no longer written), and with
#: all payloads in a row in one tensor.
_APART, _IN_A_ROW = "deltaweights", "deltaweights-row"
_ROW = "payloads"  # that tensor


def shard_metadata(shard: Shard) -> dict[str, str]:
    """The metadata of the delta shard for a target's shard, including the latter's header byte for byte."""
    usual = usual_header(shard.header.tensors, shard.file.size)
    assert usual is not None  # the shard's header was checked
    dictionary = _dictionary(usual)
    # The checksum reveals a reader with a different dictionary.
    compressor = zstandard.ZstdCompressor(level=19, dict_data=dictionary, write_checksum=True)
    packed = base64.b64encode(compressor.compress(shard.header.raw)).decode()
    return {"format": _IN_A_ROW, "header": packed}


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
    kind = shard.header.metadata.get("format")
    if kind == _IN_A_ROW:
        usual = usual_header(entries, file.size)
        if usual is None:
            raise _damaged(file, "The manifest's tensors have more bytes than their file.")
        infos = _in_a_row(shard, file, entries)
    elif kind == _APART:
        usual, infos = b"", list(shard.header.tensors)
    else:
        raise _damaged(file, "Its metadata does not call it a deltaweights shard.")
    header = _target_header(shard, file, usual)
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


def _target_header(delta_shard: Shard, file: TargetFile, usual: bytes) -> Header:
    """Decode the target shard's own header from the delta shard's metadata. It is coded against ``usual``."""
    try:
        packed = base64.b64decode(delta_shard.header.metadata.get("header", ""), validate=True)
        size = zstandard.frame_content_size(packed)
        if not 8 <= size <= min(file.size, 8 + MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size} bytes")
        expander = zstandard.ZstdDecompressor(dict_data=_dictionary(usual))
        raw = expander.decompress(packed, allow_extra_data=False)
    except (ValueError, zstandard.ZstdError) as error:
        raise _damaged(file, f"Its copy of the target's header is broken: {error}.") from error
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise _damaged(file, "Its copy of the target's header does not have the stated length.")
    try:
        return parse_header(raw, file.size, file.path)
    except HeaderError as error:
        raise _damaged(file, error.why) from error
