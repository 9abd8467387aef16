"""A checkpoint: the tensors of all its shards by name, and the other files beside them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .header import Header, TensorInfo, header_length, parse_header
from .source import LocalSource, ReadableFile, Source, local_path

#: What every verb takes: a folder, one .safetensors file, or a Hub id ``org/name[@revision]``.
Location: TypeAlias = "str | os.PathLike[str]"

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One safetensors file of a checkpoint."""

    path: str
    file: ReadableFile
    header: Header


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor and the shard that holds it. Compared by identity: a checkpoint makes each once."""

    info: TensorInfo
    shard: Shard

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the tensor's bytes from byte ``start`` of the tensor on."""
        offset = self.shard.header.data_start + self.info.start + start
        self.shard.file.read_into(offset, out)


class Checkpoint:
    """A base or target, opened: every header is read and checked, no weights are.

    ``shards`` maps the path of each safetensors file to its :class:`Shard`; ``tensors`` is all tensors,
    shard by shard, in the order of their bytes; ``other_files`` is the sorted paths of all other files.

    Raises:
        CheckpointError: it holds no safetensors file, or one of them is broken.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {}
        self.tensors: list[Tensor] = []
        self._by_name: dict[str, list[Tensor]] = {}
        for path in sorted(path for path in source.sizes if path.endswith(".safetensors")):
            self.shards[path] = shard = read_shard(source, path)
            self.tensors += (Tensor(info, shard) for info in shard.header.tensors)
        for tensor in self.tensors:
            self._by_name.setdefault(tensor.info.name, []).append(tensor)
        self.other_files = sorted(set(source.sizes) - set(self.shards))
        if not self.shards:
            raise CheckpointError(
                f"{source.where} holds no .safetensors file",
                "deltaweights compares safetensors checkpoints.",
                "Convert the weights first, for example with save_pretrained(...) of transformers.",
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    def named(self, name: str) -> list[Tensor]:
        """All tensors called ``name``: usually one, but two shards may use the same name."""
        return self._by_name.get(name, [])

    def find(self, name: str, path: str) -> Tensor | None:
        """The tensor called ``name``; of several, the one in the shard at ``path``, or failing that
        in the same folder, or the first."""
        found = self.named(name)
        folder = os.path.dirname(path)

        def distance(tensor: Tensor) -> tuple[bool, bool]:
            return tensor.shard.path != path, os.path.dirname(tensor.shard.path) != folder

        return min(found, key=distance, default=None)


def read_shard(source: Source, path: str) -> Shard:
    """Read and check the header of the safetensors file at ``path``.

    Raises:
        HeaderError: it breaks the format's rules.
    """
    file = source.open(path)
    where = source.name(path)
    length = header_length(file.read(0, min(8, file.size)), file.size, where)
    return Shard(path, file, parse_header(file.read(0, length), file.size, where))


def open_source(location: Location) -> LocalSource:
    """The files at ``location``.

    A Hub id is looked up in the local Hub cache.

    Raises:
        CheckpointError: there is nothing at ``location``.
    """
    hub_id = _HUB_ID.fullmatch(os.fspath(location))
    if not hub_id or local_path(location).exists():
        return LocalSource(location)
    return open_cached(hub_id["repo"], hub_id["revision"])


def open_checkpoint(location: Location) -> Checkpoint:
    """Open the checkpoint at ``location`` (a folder, one .safetensors file, or a Hub id in the cache).

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return Checkpoint(open_source(location))


def open_cached(repo_id: str, revision: str | None) -> LocalSource:
    """The snapshot of a Hub repository in the local cache.

    Raises:
        CheckpointError: it is not there.
    """
    # Imported here: it costs more start-up time than everything else together.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return LocalSource(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo_id} is not here",
            "There is neither a file or folder of that name nor a repository in the local Hub cache.",
            f"Check the path, or download it: hf download {repo_id}{at}",
        ) from error
