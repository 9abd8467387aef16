"""One tensor's encoded bytes: cut into chunks, written, read, and who is to blame when they are wrong."""

from .chunks import CHUNK_BYTES, ChunkPlan, check_records
from .faults import BaseBytes, Faults
from .reader import PayloadReader, StoredPayload
from .whole import decode, encode
from .writer import CodedChunk, PayloadFile, PayloadWriter, WrittenPayload, encode_row

__all__ = [
    "CHUNK_BYTES",
    "BaseBytes",
    "ChunkPlan",
    "CodedChunk",
    "Faults",
    "PayloadFile",
    "PayloadReader",
    "PayloadWriter",
    "StoredPayload",
    "WrittenPayload",
    "check_records",
    "decode",
    "encode",
    "encode_row",
]
