"""safetensors checkpoints in and out: headers, readers, atomic writers."""

from .checkpoint import (
    Checkpoint,
    Location,
    Shard,
    Tensor,
    open_cached,
    open_checkpoint,
    open_source,
    read_shard,
)
from .header import DTYPE_BITS, MAX_HEADER_BYTES, Header, TensorInfo, build_header, parse_header
from .output import OutputFolder, PartialFile
from .source import LocalSource, ReadableFile, Source, file_blocks, local_path, sha256_of

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Checkpoint",
    "Header",
    "LocalSource",
    "Location",
    "OutputFolder",
    "PartialFile",
    "ReadableFile",
    "Shard",
    "Source",
    "Tensor",
    "TensorInfo",
    "build_header",
    "file_blocks",
    "local_path",
    "open_cached",
    "open_checkpoint",
    "open_source",
    "parse_header",
    "read_shard",
    "sha256_of",
]
