"""What a checkpoint is: headers, shards, tensors."""

from .checkpoint import Checkpoint, Shard, Tensor, open_checkpoint, read_shard
from .header import DTYPE_BITS, MAX_HEADER_BYTES, Header, TensorInfo, build_header, parse_header

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Checkpoint",
    "Header",
    "Shard",
    "Tensor",
    "TensorInfo",
    "build_header",
    "open_checkpoint",
    "parse_header",
    "read_shard",
]
