"""What is odd about a checkpoint that can be read nevertheless."""

from __future__ import annotations

from ..storage import Source

_POINTER = b"version https://git-lfs"
_MAX_POINTER_BYTES = 1024


def is_pointer(source: Source, path: str) -> bool:
    """Whether the file at ``path`` is what Git LFS puts in a file's place until it is pulled. (The Hub serves
    the files themselves.)"""
    if source.is_remote or not len(_POINTER) <= source.sizes[path] < _MAX_POINTER_BYTES:
        return False
    return b"".join(source.blocks(path)).startswith(_POINTER)
