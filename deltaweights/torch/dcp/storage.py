"""Distributed checkpoints as deltas: storage for ``torch.distributed.checkpoint``.

::

    dcp.save(state, storage_writer=DeltaStorageWriter("step-100", base="org/model"))
    dcp.load(state, storage_reader=DeltaStorageReader("step-100", base="org/model"))

A shard is coded against the same part of the base's tensor. What has no counterpart in the base (an
optimizer's state) is coded alone. docs/train.md tells how to use it, and docs/format.md what the files are.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ...errors import CheckpointError, DeltaError, DeltaWeightsError, OutputError
from ...match.names import RenameRule, compile_rules
from ...storage import Location, Readable, is_same, local_path, open_source, output_path
from ...workers import Workers
from .base import BaseTensors
from .boxes import Box
from .folder import DeltaFolder, StoredPart, open_base
from .record import RECORD_NAME, CheckpointRecord, parse_record
from .write import create_file, first_line, load_value, make_record, require_storable, write_items

#: The files of saves to one folder, whole or not.
_FILE_NAME = re.compile(r"delta-\d{5,}-[0-9a-f]{16}\.safetensors(\.partial)?", re.ASCII)


class DeltaStorageWriter(StorageWriter):
    """Writes a distributed checkpoint as deltas: pass it to ``dcp.save`` or ``dcp.async_save``.

    Args:
        path: the folder to write, on a file system that all ranks share. A checkpoint that is there is
            replaced, in one step, when the new one is whole.
        base: what shards are coded against: a folder, a file or a Hub id of safetensors, an earlier
            distributed checkpoint (``DeltaStorageReader(path, base=…)``, or its path if its own base is on
            the Hub or it has none), or None, which codes every tensor alone.
        rename: pairs of a regular expression, searched in a name of the state, and its replacement, to get
            the base's name. Where the base has none of that name, the name without its first part counts.
        threads: how many threads of each rank encode.

    A tensor is coded alone where the base has none of that name and shape, in the same dtype or in a float
    dtype that converts to it. Strided tensors of any dtype that is not quantized can be saved, and values
    that ``torch.load(…, weights_only=True)`` reads.

    Errors reach the caller inside torch's ``CheckpointException``, whose ``failures`` has each rank's own:
    :class:`CheckpointError` or :class:`DeltaError` where the base cannot be read, :class:`OutputError` where
    the state cannot be saved or the folder not be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        base: Readable | DeltaStorageReader | None = None,
        *,
        rename: Sequence[RenameRule] = (),
        threads: int = 1,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] = path
        self._base = base
        self._rules = compile_rules(rename)
        self._threads = threads
        self._opened: BaseTensors | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without open files: ``async_save`` may hand the writer to another process."""
        return {**self.__dict__, "_opened": None}

    def close(self) -> None:
        """Close the base's files, which else stay open for the next save."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.checkpoint_id = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        if not kwargs.get("use_collectives", True):
            raise OutputError(
                "A distributed checkpoint needs use_collectives=True",
                "Its one record is made of what all ranks wrote.",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Find out now what would fail later."""
        folder = output_path(self.checkpoint_id)
        for item in plan.items:
            require_storable(item)
        opener = _opener(self._base)
        if opener and self._opened is None:
            self._opened = opener()
        if isinstance(self._opened, DeltaFolder) and any(
            is_same(folder, root) for root in self._opened.roots
        ):
            raise OutputError(
                f"{folder} cannot be written",
                "It holds the checkpoint that the new one would be coded against.",
                "Choose another folder.",
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            folder = local_path(self.checkpoint_id)
            results = write_items(plan.items, planner, folder, rank, self._opened, self._rules, self._threads)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the record: with it, the checkpoint is whole. Then remove what an earlier one has left."""
        record = make_record(metadata, [result for one_rank in results for result in one_rank])
        folder = local_path(self.checkpoint_id)
        with create_file(folder, RECORD_NAME) as file:
            data = record.to_json()
            parse_record(data)  # checked as a reader would
            file.write_at(0, data)
            file.commit()
        mine = {file.path for file in record.files}
        with suppress(OSError):  # the checkpoint is whole: what cannot be removed only takes space
            for path in folder.iterdir():
                if _FILE_NAME.fullmatch(path.name) and path.name not in mine:
                    path.unlink(missing_ok=True)


class DeltaStorageReader(StorageReader):
    """Reads what :class:`DeltaStorageWriter` wrote: pass it to ``dcp.load``, on any number of ranks.

    Args:
        path: the checkpoint: a folder or a Hub id.
        base: the base that the writer had, wherever it is now; for an earlier distributed checkpoint
            ``DeltaStorageReader(path, base=…)``. If None, the Hub repository that the checkpoint names.
        threads: how many threads of each rank decode.

    Each rank reads what it needs of checkpoint and base. Before anything is loaded, the base's names, dtypes
    and shapes are compared, and some chunks of every shard. Every chunk's checksums are compared when it is
    decoded. Values that are not tensors are read with ``weights_only=True``, whatever the planner does.

    Errors reach the caller inside torch's ``CheckpointException``, whose ``failures`` has each rank's own:
    :class:`BaseMismatchError`, :class:`CheckpointError` where the base cannot be read, :class:`DeltaError`
    where the checkpoint is missing or damaged.
    """

    def __init__(
        self, path: Location, base: Readable | DeltaStorageReader | None = None, *, threads: int = 1
    ) -> None:
        super().__init__()
        self.checkpoint_id: Location = path
        self._base = base
        self._threads = threads
        self._folder: DeltaFolder | None = None
        self._failure: DeltaWeightsError | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without open files."""
        return {**self.__dict__, "_folder": None, "_failure": None}

    def open(self) -> DeltaFolder:
        """The checkpoint and its base, opened; the caller closes it.

        Raises:
            DeltaError: the checkpoint is missing or damaged.
            CheckpointError: the base cannot be found or read.
            BaseMismatchError: it is not the base.
        """
        return DeltaFolder(open_source(self.checkpoint_id), _opener(self._base))

    def check_files(self) -> None:
        """Compare the SHA-256 of every file of the checkpoint with its record; the base's bytes are not read.

        Raises:
            DeltaError: one differs, or as :meth:`open`.
        """
        folder = self.open()
        try:
            folder.check_files()
        finally:
            folder.close()

    def close(self) -> None:
        """Close the checkpoint's and the base's files, which else stay open until the next load."""
        if self._folder:
            self._folder.close()
            self._folder = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.close()
        if checkpoint_id:
            self.checkpoint_id = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """torch's metadata, made from the record. An error is kept for :meth:`set_up_storage_reader`: here,
        torch would take it for a checkpoint of another layout, and hide it."""
        self.close()
        self._failure = None
        try:
            self._folder = self.open()
        except DeltaWeightsError as error:
            self._failure = error
            return Metadata({})
        return _metadata(self._folder.record, StorageMeta(checkpoint_id=self.checkpoint_id))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object
    ) -> None:
        if self._failure:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Compare the base, as far as that is quick, before anything is loaded."""
        assert self._folder is not None
        shards = {self._shard(item) for item in plan.items if item.type == LoadItemType.TENSOR}
        with Workers(self._threads) as workers:
            self._folder.check_sample(sorted(shards, key=lambda shard: shard.place), workers)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def _shard(self, item: ReadItem) -> StoredPart:
        assert self._folder is not None
        assert item.storage_index.offset is not None
        return self._folder.shard(item.storage_index.fqn, tuple(item.storage_index.offset))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._folder is not None
        wanted: list[_Wanted] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._value(item.storage_index.fqn))
            else:
                shard, box = self._shard(item), Box(tuple(item.storage_offsets), tuple(item.lengths))
                wanted.append(_Wanted(item, shard, box, list(shard.chunks(box))))
        chunks = ((one.shard, index) for one in wanted for index in one.chunks)
        with self._folder.expect_base(chunks), Workers(self._threads) as workers:
            for job in workers.map(_Copy.run, _copies(wanted, planner)):
                if job.is_last:
                    planner.commit_tensor(job.wanted.item, job.out)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _value(self, name: str) -> io.BytesIO:
        """A value as ``torch.save`` writes it: written again from what is safe to read, since a planner may
        well unpickle whatever it is given."""
        assert self._folder is not None
        data = self._folder.value(name)
        try:
            value = load_value(data)
        except Exception as error:
            raise DeltaError(
                f"{name} in {self._folder.where} cannot be loaded",
                f"torch.load(…, weights_only=True) does not read it: {first_line(error)}",
                "If it is yours: see add_safe_globals of torch for classes of your own.",
            ) from error
        clean = io.BytesIO()
        torch.save(value, clean)
        clean.seek(0)
        return clean


def _opener(base: Readable | DeltaStorageReader | None) -> Callable[[], BaseTensors] | None:
    """What opens a base, if there is one."""
    if base is None:
        return None
    return base.open if isinstance(base, DeltaStorageReader) else partial(open_base, base)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The part ``box`` of a shard, which lies in these chunks of it."""

    item: ReadItem
    shard: StoredPart
    box: Box
    chunks: list[int]


@dataclass(frozen=True, slots=True)
class _Copy:
    """One chunk of a shard, on its way into a tensor."""

    wanted: _Wanted
    index: int
    out: torch.Tensor

    @property
    def is_last(self) -> bool:
        return self.index == self.wanted.chunks[-1]

    def run(self) -> _Copy:
        self.wanted.shard.copy(self.index, self.wanted.box, self.out)
        return self


def _copies(wanted: Sequence[_Wanted], planner: LoadPlanner) -> Iterator[_Copy]:
    """Every chunk to decode, tensor by tensor."""
    for one in wanted:
        out = planner.resolve_tensor(one.item).detach()
        if tuple(out.size()) != one.box.sizes:
            raise CheckpointError(
                f"{one.item.dest_index.fqn} cannot be loaded",
                f"There are {list(one.box.sizes)} elements of it for a tensor of {list(out.size())}.",
            )
        for index in one.chunks:
            yield _Copy(one, index, out)


def _metadata(record: CheckpointRecord, storage_meta: StorageMeta) -> Metadata:
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes)) for s in tensor.shards],
        )
        for name, tensor in record.tensors.items()
    }
    values = {name: BytesStorageMetadata() for name in record.values}
    return Metadata({**tensors, **values}, record.paths, storage_meta=storage_meta)
