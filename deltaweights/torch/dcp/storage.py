"""Distributed checkpoints as deltas: storage for ``torch.distributed.checkpoint``.

::

    dcp.save(state, storage_writer=DeltaStorageWriter("step-100", base="org/model"))
    dcp.load(state, storage_reader=DeltaStorageReader("step-100", base="org/model"))

A shard is coded against the same part of the base's tensor. Tensors without a counterpart in the base (an
optimizer's state) are coded alone. docs/train.md explains the use, and docs/format.md the files.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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

from ...checkpoint.oddities import tell
from ...errors import CheckpointError, DeltaError, DeltaWeightsError, OutputError
from ...match.names import Names, RenameRule, compile_rules
from ...storage import Location, Readable, open_source, open_unlocked, store_url
from ...workers import Workers
from ..boxes import Box
from ..tensors import first_line
from .base import BaseTensors, candidates
from .folder import DeltaFolder, StoredPart, open_base
from .record import RECORD_NAME, CheckpointRecord, parse_record
from .write import load_value, make_record, require_storable, write_items

#: The files of all saves to a place, complete or not.
_FILE_NAME = re.compile(r"delta-\d{5,}-[0-9a-f]{16}\.safetensors(\.partial)?", re.ASCII)


class DeltaStorageWriter(StorageWriter):
    """Writes a distributed checkpoint as deltas: pass it to ``dcp.save`` or ``dcp.async_save``.

    Args:
        path: the folder to write, on a file system that all ranks share, or the URL of a place in a store. An
            existing checkpoint there is replaced, in one step, once the new one is complete.
        base: the base for the shards: a folder, a file or a Hub id of safetensors; an earlier distributed
            checkpoint (``DeltaStorageReader(path, base=…)``, or its path if its own base is on the Hub or it
            has none); or None, which codes every tensor alone.
        rename: pairs of a regular expression, searched in a name of the state, and its replacement, which
            gives the base's name. If the base lacks that name, the name without its first part counts.
        threads: number of threads of each rank that encode.

    A tensor is coded alone if the base has none of that name and shape, in the same dtype or in a float dtype
    that converts to it. The state may hold strided tensors of any dtype that is not quantized, and values
    that ``torch.load(…, weights_only=True)`` reads.

    Errors reach the caller inside torch's ``CheckpointException``, whose ``failures`` holds each rank's
    error: :class:`CheckpointError` or :class:`DeltaError` if the base cannot be read, :class:`OutputError` if
    the state cannot be saved or the place cannot be written to, :class:`HubWriteError` if a store refuses it.
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
        self._replaced: str | None = None  # which record is there before the save

    def __getstate__(self) -> dict[str, object]:
        """Without open files: ``async_save`` may hand the writer to another process."""
        return {**self.__dict__, "_opened": None}

    def close(self) -> None:
        """Close the base's files, which otherwise stay open for the next save."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.checkpoint_id = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _is_place(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        if not kwargs.get("use_collectives", True):
            raise OutputError(
                "A distributed checkpoint needs use_collectives=True",
                "Its record is made from the results of all ranks.",
            )
        place = open_unlocked(self.checkpoint_id)
        place.require_writable()
        if is_coordinator:
            self._replaced = place.mark(RECORD_NAME)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Find out now what would fail later."""
        place = open_unlocked(self.checkpoint_id)
        for item in plan.items:
            require_storable(item)
        opener = _opener(self._base)
        if opener and self._opened is None:
            self._opened = opener()
        if self._opened:
            with Workers(self._threads) as workers:
                self._opened.require_undamaged(workers, *_share_of_machine())
        if isinstance(self._opened, DeltaFolder) and any(map(place.is_at, self._opened.sources)):
            raise OutputError(
                f"{place.where} cannot be written to",
                "It holds the base of the new checkpoint.",
                "Choose another folder.",
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Apply the rename rules to the names of all ranks, which one rule may be meant for."""
        if not self._rules:
            return plans
        given = {item.index.fqn for plan in plans for item in plan.items if item.tensor_data}
        names = Names(self._rules, given)
        base = self._opened
        if base:
            tell(names.useless(lambda name: any(map(base.find, candidates(name)))))
        renamed = {name: names.of_base(name) for name in given if names.of_base(name) != name}
        return [replace(plan, storage_data=renamed) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            place = open_unlocked(self.checkpoint_id)
            renamed = plan.storage_data or {}
            results = write_items(plan.items, planner, place, rank, self._opened, renamed, self._threads)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the record, which completes the checkpoint. Then remove the files of an earlier one."""
        record = make_record(metadata, [result for one_rank in results for result in one_rank])
        data = record.to_json()
        parse_record(data)  # checked as a reader would
        place = open_unlocked(self.checkpoint_id)
        with place.create(RECORD_NAME, over=self._replaced) as file:
            file.write_at(0, data)
            file.commit()
        mine = {file.path for file in record.files}

        def is_left_over(path: str) -> bool:
            return path not in mine and _FILE_NAME.fullmatch(path) is not None

        with suppress(Exception):  # the checkpoint is complete: what is left over only takes space
            for path in filter(is_left_over, place.sizes()):
                place.remove(path)
            place.end_uploads(is_left_over)


class DeltaStorageReader(StorageReader):
    """Reads checkpoints of :class:`DeltaStorageWriter`: pass it to ``dcp.load``, on any number of ranks.

    Args:
        path: the checkpoint: a folder, a Hub id or a URL.
        base: the base that the writer used, wherever it is now; for an earlier distributed checkpoint,
            ``DeltaStorageReader(path, base=…)``. If None, the Hub repository that the checkpoint names.
        threads: number of threads of each rank that decode.

    Each rank reads only the parts of checkpoint and base that it needs. Before loading, it compares the
    base's names, dtypes and shapes, and some chunks of every shard. Every chunk's checksums are compared when
    it is decoded. Values that are not tensors are read with ``weights_only=True``, whatever the planner does.

    Errors reach the caller inside torch's ``CheckpointException``, whose ``failures`` holds each rank's
    error: :class:`BaseMismatchError`, :class:`CheckpointError` if the base cannot be read,
    :class:`DeltaError` if the checkpoint is missing or damaged.
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
        """Open the checkpoint and its base; the caller closes them.

        Raises:
            DeltaError: the checkpoint is missing or damaged.
            CheckpointError: the base cannot be found or read.
            BaseMismatchError: the base is the wrong one.
        """
        return DeltaFolder(open_source(self.checkpoint_id), _opener(self._base))

    def check_files(self) -> None:
        """Compare the SHA-256 of every file of the checkpoint with its record. Does not read the base's
        bytes.

        Raises:
            DeltaError: one differs, or as for :meth:`open`.
        """
        folder = self.open()
        try:
            folder.check_files()
        finally:
            folder.close()

    def close(self) -> None:
        """Close the checkpoint's and the base's files, which otherwise stay open until the next load."""
        if self._folder:
            self._folder.close()
            self._folder = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.close()
        if checkpoint_id:
            self.checkpoint_id = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _is_place(checkpoint_id)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """torch's metadata, made from the record. An error is kept for :meth:`set_up_storage_reader`, since
        torch would hide it here, as if the checkpoint had a different layout."""
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
        """Check the base quickly before anything is loaded."""
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
        """A value in the form of ``torch.save``, written anew from safely read data, since a planner may
        unpickle it without restrictions."""
        assert self._folder is not None
        data = self._folder.value(name)
        try:
            value = load_value(data)
        except Exception as error:
            raise DeltaError(
                f"{name} in {self._folder.where} cannot be loaded",
                f"torch.load(…, weights_only=True) does not read it: {first_line(error)}",
                "If you trust it, allow its classes: see add_safe_globals of torch.",
            ) from error
        clean = io.BytesIO()
        torch.save(value, clean)
        clean.seek(0)
        return clean


def _is_place(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether it is a path, or the URL of a store: torch asks before it chooses who reads or writes there."""
    return "://" not in os.fspath(checkpoint_id) or store_url(checkpoint_id) is not None


def _share_of_machine() -> tuple[int, int]:
    """The number of this process among those of this machine, and how many these are, as torchrun tells."""
    rank, ranks = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return (int(rank), int(ranks)) if rank.isdecimal() and ranks.isdecimal() and int(ranks) else (0, 1)


def _opener(base: Readable | DeltaStorageReader | None) -> Callable[[], BaseTensors] | None:
    """The function that opens the base; None without a base."""
    if base is None:
        return None
    return base.open if isinstance(base, DeltaStorageReader) else partial(open_base, base)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The part ``box`` of a shard, and the shard's chunks that hold it."""

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
                f"Its part has the shape {list(one.box.sizes)}, but the tensor has {list(out.size())}.",
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
