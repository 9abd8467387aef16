"""Reads a version's folder: an update, or a full checkpoint."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...checkpoint import Shard, Tensor, read_header
from ...errors import CheckpointError, PayloadError
from ...storage.local import LocalFile
from .checksums import checksum, is_checksum
from .encodings import apply, largest_frame
from .layout import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    FolderIndex,
    UpdateFacts,
    damaged,
    folder_name,
    read_index,
    version_of,
)


def versions_in(directory: Path) -> list[int]:
    """The versions that have a folder, whole or not, in order."""
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(version for name in names if (version := version_of(name)) is not None)


class VersionFolder:
    """An open folder ``weight_v000001``, its headers and index checked; a context manager.

    Attributes:
        version: its version.
        where: its path, for messages.
        index: its index; None for a full checkpoint of one file.
        tensors: the stored tensors by name: of an update, their frames (U8).
        nbytes: size of its shards and its index.

    Raises:
        DeltaError: it is damaged.
        HeaderError: one of its shards is.
        CheckpointError: it cannot be read.
    """

    def __init__(self, directory: Path, version: int) -> None:
        self.version = version
        self._path = directory / folder_name(version)
        self.where = str(self._path)
        self.nbytes = 0
        with ExitStack() as opened:
            self.index = self._read_index()
            self.tensors = self._read_headers(opened)
            if self.update:
                self._require_digests(self.update)
            self._opened = opened.pop_all()

    def __enter__(self) -> VersionFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    @property
    def update(self) -> UpdateFacts | None:
        """What it is as an update; None for a full checkpoint."""
        return self.index.update if self.index else None

    def _read_index(self) -> FolderIndex | None:
        where = f"{INDEX_NAME} in {self.where}"
        if not (self._path / INDEX_NAME).exists():
            return None
        file = LocalFile(INDEX_NAME, self._path / INDEX_NAME)
        try:
            if file.size > MAX_INDEX_BYTES:
                raise damaged(where, f"It has {file.size} bytes")
            self.nbytes += file.size
            return read_index(file.read(0, file.size), self.version, where)
        finally:
            file.close()

    def _read_headers(self, opened: ExitStack) -> dict[str, Tensor]:
        names = sorted(set(self.index.files.values())) if self.index else [SINGLE_NAME]
        if self.update:
            self._require_no_more(names)
        found: dict[str, Tensor] = {}
        for name in names:
            shard = self._read_shard(name, opened)
            for info in shard.header.tensors:
                if info.name in found:
                    raise damaged(self.where, f"Two files have tensor {info.name!r}")
                found[info.name] = Tensor(info, shard)
        if self.index and {name: tensor.path for name, tensor in found.items()} != self.index.files:
            raise damaged(self.where, "Its index does not name exactly the tensors of its files")
        return found

    def _read_shard(self, name: str, opened: ExitStack) -> Shard:
        file = LocalFile(name, self._path / name)
        opened.callback(file.close)
        self.nbytes += file.size
        return read_header(file, f"{name} in {self.where}")

    def _require_no_more(self, names: list[str]) -> None:
        """Readers of the format take every shard that lies there."""
        there = {path.name for path in self._path.glob("*.safetensors")}
        if more := sorted(there - set(names)):
            raise damaged(self.where, f"It has a file {more[0]!r}, which its index does not name")

    def _require_digests(self, update: UpdateFacts) -> None:
        """Each shard states the checksums of its tensors. What else it states is passed over."""
        for name, tensor in self.tensors.items():
            digest = tensor.shard.header.metadata.get(name)
            if digest is None or not is_checksum(update.checksum, digest):
                where = f"{tensor.path} in {self.where}"
                raise damaged(where, f"Its checksum of {name!r} is {digest!r}, which is no {update.checksum}")

    def digest(self, name: str) -> str:
        """The checksum of an update's tensor: of its new bytes."""
        return self.tensors[name].shard.header.metadata[name]

    def apply_to(self, name: str, data: NDArray[np.uint8]) -> None:
        """Turn the bytes of the version before (uint8) into this one's, where they lie. After an error, they
        may be neither.

        Raises:
            DeltaError: the tensor is damaged, or ``data`` are not the bytes that it was made against.
        """
        update = self.update
        assert update
        stored, encoding = self.tensors[name], update.encoding
        where = f"Tensor {name!r} in {self.where}"
        if stored.dtype != "U8" or len(stored.info.shape) != 1:
            raise damaged(where, "It is not a row of bytes")
        if stored.nbytes > largest_frame(encoding, data.size):
            raise damaged(where, f"It takes {stored.nbytes} bytes, more than {data.size} bytes can need")
        frame = np.empty(stored.nbytes, np.uint8)
        stored.read_into(0, frame)
        try:
            apply(encoding, frame.tobytes(), data)
        except PayloadError as error:
            raise damaged(where, error.what) from error
        if checksum(update.checksum, data) != self.digest(name):
            raise damaged(
                where,
                "Its checksum is a different one: it is damaged, or was made against other weights than "
                f"version {update.base_version} has here",
            )

    def read(self, name: str, data: NDArray[np.uint8]) -> None:
        """Read a full checkpoint's tensor into ``data`` (uint8)."""
        self.tensors[name].read_into(0, data)


def is_whole(directory: Path, version: int) -> bool:
    """Whether the folder has its last file: an index, or the only shard of a full checkpoint without one."""
    folder = directory / folder_name(version)
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))


def require_directory(directory: Path) -> None:
    """Raise :class:`CheckpointError` if there is no such folder."""
    if not directory.is_dir():
        raise CheckpointError(f"There is no folder {directory}", "", "Check the path.")
