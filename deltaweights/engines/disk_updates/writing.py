"""Writes a version's folder: an update, or a full checkpoint. The index comes last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...checkpoint import MAX_HEADER_BYTES, Checkpoint, Shard, TensorInfo, build_header
from ...errors import OutputError
from ...storage import OutputFolder, PartialFile, file_blocks
from .checksums import checksum, digits
from .encodings import encode, largest_frame
from .layout import (
    INDEX_NAME,
    UpdateFacts,
    folder_name,
    shard_name,
    state_metadata,
    update_metadata,
    write_index,
)

_COPY_BYTES = 1 << 22

Bytes: TypeAlias = NDArray[np.uint8]


class Frame(NamedTuple):
    """A changed tensor in an update: its name, its zstd frame, the checksum of its new bytes."""

    name: str
    data: bytes
    digest: str


def frame_of(facts: UpdateFacts, name: str, old: Bytes, new: Bytes) -> Frame | None:
    """The frame that leads from ``old`` to ``new``; None if they are equal."""
    if np.array_equal(old, new):
        return None
    return Frame(name, encode(facts.encoding, name, old, new), checksum(facts.checksum, new))


def write_update(
    folder: OutputFolder,
    prefix: str,
    facts: UpdateFacts,
    sizes: Mapping[str, int],
    frames: Iterable[Frame | None],
) -> tuple[list[str], int]:
    """Write an update's folder, in one shard; none if nothing changed.

    Args:
        prefix: the path of the versions' folders in ``folder``: empty, or with a slash at its end.
        sizes: the bytes of each tensor that ``frames`` may have; the header's room follows from them.
        frames: the changed tensors.

    Returns:
        The changed tensors' names, and the size of both files.
    """
    path = f"{prefix}{folder_name(facts.version)}"
    name = shard_name(0, 1)
    _clear(folder, path)
    with folder.create(f"{path}/{name}") as file:
        shard = _FrameShard(file, facts, sizes)
        for frame in filter(None, frames):
            shard.add(frame)
        nbytes = shard.finish()
        if shard.names:
            file.commit()
    index = write_index(dict.fromkeys(shard.names, name), update_metadata(facts))
    _write_last(folder, f"{path}/{INDEX_NAME}", index)
    return shard.names, len(index) + (nbytes if shard.names else 0)


class _FrameShard:
    """A safetensors file of frames. Its header is written last, into reserved space, since it states their
    lengths."""

    def __init__(self, file: PartialFile, facts: UpdateFacts, sizes: Mapping[str, int]) -> None:
        infos, position = [], 0
        for name, nbytes in sizes.items():
            length = largest_frame(facts.encoding, nbytes)
            infos.append(TensorInfo(name, "U8", (length,), position, position + length))
            position += length
        self._room = len(build_header(infos, dict.fromkeys(sizes, "0" * digits(facts.checksum))))
        if self._room > MAX_HEADER_BYTES:
            raise OutputError(
                "There are too many tensors for one file",
                f"Its header would have {self._room} bytes; safetensors allows {MAX_HEADER_BYTES}.",
            )
        self._file = file
        self._infos: list[TensorInfo] = []
        self._digests: dict[str, str] = {}
        self._end = 0

    @property
    def names(self) -> list[str]:
        """The tensors that it has."""
        return list(self._digests)

    def add(self, frame: Frame) -> None:
        """Write a frame behind the others."""
        start, self._end = self._end, self._end + len(frame.data)
        self._file.write_at(self._room + start, frame.data)
        self._infos.append(TensorInfo(frame.name, "U8", (len(frame.data),), start, self._end))
        self._digests[frame.name] = frame.digest

    def finish(self) -> int:
        """Write the header. Returns the file's size."""
        self._file.write_at(0, build_header(self._infos, self._digests, self._room))
        return self._room + self._end


def write_checkpoint(
    folder: OutputFolder,
    prefix: str,
    version: int,
    like: Checkpoint,
    read: Callable[[str], Bytes | None],
    facts: tuple[str, int],
) -> int:
    """Write a full checkpoint: the files of the checkpoint ``like``, with other weights. Readers of the
    format make it the folder that the engine loads, so configuration and tokenizer belong to it.

    Args:
        read: gives the bytes (uint8) of the tensor of a name; None for a tensor that has those of ``like``.
        facts: the state's digest and the publisher's step.

    Returns:
        The size of its weights and its index.
    """
    path, nbytes = f"{prefix}{folder_name(version)}", 0
    shards = weight_shards(like)
    _clear(folder, path)
    for other in _beside(like):
        with folder.create(f"{path}/{other}") as file:
            file.write_blocks(file_blocks(like.source.open(other)))
            file.commit()
    files: dict[str, str] = {}
    for shard in shards:
        with folder.create(f"{path}/{shard.path}") as file:
            file.write_blocks(_blocks(shard, read))
            file.commit()
        nbytes += shard.file.size
        files |= {info.name: shard.path for info in shard.header.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.header.tensors)
    index = write_index(files, {"total_size": total, **state_metadata(*facts)})
    _write_last(folder, f"{path}/{INDEX_NAME}", index)
    return nbytes + len(index)


def _blocks(shard: Shard, read: Callable[[str], Bytes | None]) -> Iterator[bytes]:
    """The bytes of a shard with other weights."""
    yield shard.header.raw
    for info in shard.header.tensors:
        data = read(info.name)
        if data is not None:
            yield from (
                data[start : start + _COPY_BYTES].tobytes() for start in range(0, data.size, _COPY_BYTES)
            )
            continue
        for start in range(info.start, info.end, _COPY_BYTES):
            yield shard.file.read(shard.header.data_start + start, min(_COPY_BYTES, info.end - start))


def weight_shards(checkpoint: Checkpoint) -> Sequence[Shard]:
    """The shards that an engine loads from a model's folder: those that its index names, else those at its
    top."""
    named = set(checkpoint.indexes.get(INDEX_NAME, {}).values())
    top = [shard for path, shard in checkpoint.shards.items() if "/" not in path]
    return [shard for shard in top if shard.path in named] if named else top


def _beside(checkpoint: Checkpoint) -> list[str]:
    """The files at the top of a model's folder that are neither weights nor their index."""
    return [
        path
        for path in checkpoint.other_files
        if len(PurePosixPath(path).parts) == 1 and path != INDEX_NAME and not _is_other_weights(path)
    ]


def _is_other_weights(path: str) -> bool:
    """Whether these are weights in a format that the version's engine would not load, and might be large."""
    return path.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"))


def write_pointer(folder: OutputFolder, run_id: str, version: int) -> None:
    """Write stitch's pointer, ``latest``: the run and its newest version."""
    _write_last(folder, "latest", f"{run_id}/{folder_name(version)}".encode())


def _clear(folder: OutputFolder, path: str) -> None:
    """Remove what an interrupted run left there, the index first: readers take every shard of a folder."""
    there = folder.root / path
    for name in [INDEX_NAME, *(file.name for file in there.glob("*.safetensors"))]:
        if folder.is_regular(f"{path}/{name}"):
            (there / name).unlink()


def _write_last(folder: OutputFolder, path: str, content: bytes) -> None:
    with folder.create(path) as file:
        file.write_at(0, content)
        file.commit()
