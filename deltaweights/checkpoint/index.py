"""An index (``*.index.json``): which shard is said to hold each tensor. Nothing is believed because of it; it
decides where there is a choice, and tells which shards should be there."""

from __future__ import annotations

import posixpath

import msgspec

from ..storage.source import Source

#: Far above the index of the largest model (some 100 bytes a tensor).
_MAX_INDEX_BYTES = 1 << 25


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


def read_indexes(source: Source) -> dict[str, dict[str, str]]:
    """For each index of a checkpoint, by its path: tensors' names, and the paths of their shards.

    An index that cannot be parsed is left out: it is a file like any other.
    """
    found = {}
    for path, size in source.sizes.items():
        if path.endswith(".safetensors.index.json") and size <= _MAX_INDEX_BYTES:
            try:
                index = msgspec.json.decode(source.open(path).read(0, size), type=_Index)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            folder = posixpath.dirname(path)
            found[path] = {
                name: posixpath.normpath(posixpath.join(folder, shard))
                for name, shard in index.weight_map.items()
            }
    return found
