"""safetensors checkpoints in and out: headers, readers, atomic writers."""

from .checkpoint import (
    Checkpoint,
    Location,
    Readable,
    Shard,
    Tensor,
    open_checkpoint,
    open_source,
    read_shard,
)
from .header import DTYPE_BITS, MAX_HEADER_BYTES, Header, TensorInfo, build_header, parse_header
from .hub import HubSource, open_hub
from .names import spelling
from .output import OutputFolder, PartialFile
from .source import (
    HubId,
    LocalSource,
    ReadableFile,
    Source,
    Span,
    cached_sha256,
    file_blocks,
    local_path,
    origins,
    sha256_of,
)
from .system import flush_folder, is_same, is_within, lock

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Checkpoint",
    "Header",
    "HubId",
    "HubSource",
    "LocalSource",
    "Location",
    "OutputFolder",
    "PartialFile",
    "Readable",
    "ReadableFile",
    "Shard",
    "Source",
    "Span",
    "Tensor",
    "TensorInfo",
    "build_header",
    "cached_sha256",
    "file_blocks",
    "flush_folder",
    "is_same",
    "is_within",
    "local_path",
    "lock",
    "open_checkpoint",
    "open_hub",
    "open_source",
    "origins",
    "parse_header",
    "read_shard",
    "sha256_of",
    "spelling",
]
