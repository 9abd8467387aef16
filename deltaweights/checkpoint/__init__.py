"""What a checkpoint is: headers, shards, tensors."""

from .checkpoint import Checkpoint, Shard, Tensor, open_checkpoint, read_header, read_shard
from .gathered import MAX_STRIDED_BYTES, Base, Gathered, Group, GroupPart, HeldExtents, tensors_of
from .header import MAX_HEADER_BYTES, Header, TensorInfo, build_header, parse_header
from .other_formats import is_weights

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_STRIDED_BYTES",
    "Base",
    "Checkpoint",
    "Gathered",
    "Group",
    "GroupPart",
    "Header",
    "HeldExtents",
    "Shard",
    "Tensor",
    "TensorInfo",
    "build_header",
    "is_weights",
    "open_checkpoint",
    "parse_header",
    "read_header",
    "read_shard",
    "tensors_of",
]
