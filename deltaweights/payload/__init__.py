"""One tensor's encoded bytes: cut into chunks, written, read, and who is to blame when they are wrong."""

from .chunks import CHUNK_BYTES, ChunkPlan, check_records
from .whole import decode, encode

__all__ = ["CHUNK_BYTES", "ChunkPlan", "check_records", "decode", "encode"]
