"""Reads a distributed checkpoint in parts: its record, its shards, and their base."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from ... import codec
from ...checkpoint import Checkpoint, Tensor, read_shard
from ...errors import BaseMismatchError, CheckpointError, HeaderError, PayloadError
from ...payload import CHUNK_BYTES, ChunkPlan, Faults, PayloadReader
from ...storage import Readable, Source, open_hub, open_source, sha256_of
from ...workers import Workers
from ..boxes import Box, cut, envelope
from .base import BasePart, BaseTensors, CheckpointBase, TensorType
from .record import (
    DTYPES,
    RECORD_NAME,
    BaseIdentity,
    CheckpointRecord,
    TensorPart,
    payload_name,
    read_record,
)

#: The number of the base's chunks that a rank compares before it loads anything, at least one of each shard.
_SAMPLED_CHUNKS = 64

#: Integer dtypes by element size: copies move bits, regardless of their meaning.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_FIX = "Get it again, or go back to an earlier checkpoint."


def open_base(location: Readable) -> BaseTensors:
    """The base at a location: a safetensors checkpoint or an earlier distributed one.

    Raises:
        CheckpointError, DeltaError: there is none, or it cannot be read.
    """
    source = open_source(location)
    if RECORD_NAME in source.sizes:
        return DeltaFolder(source, None)
    return CheckpointBase(Checkpoint(source, may_lack=True))


class _CheckpointFaults(Faults):
    """The faults of a distributed checkpoint."""

    def __init__(self, source: Source, record: CheckpointRecord) -> None:
        self._source = source
        self._record = record
        self.base: BaseTensors | None = None

    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise if the base is the wrong one."""
        named = self._record.base
        fix = "Pass the base that the writer used."
        if named and named.repo_id:
            revision = f"@{named.revision}" if named.revision else ""
            fix = f"The right one is on the Hub: {named.repo_id}{revision}"
        where = self.base.where if self.base else "Nothing"
        return BaseMismatchError(
            f"{where} is not the base that {self._source.where} was made from",
            f"{why[0].upper()}{why[1:]}.",
            fix,
        )

    def damaged(self, path: str, why: str) -> PayloadError:
        """The error to raise if the file at ``path`` differs from the file that was written."""
        return PayloadError(f"{path} in {self._source.where} is damaged", f"{why}.", _FIX)

    def is_damaged(self, path: str) -> bool:
        """Whether the SHA-256 of the file at ``path`` differs from the record's."""
        record = next(file for file in self._record.files if file.path == path)
        published = self._source.published_sha256(path)
        return (published or sha256_of(self._source.blocks(path))) != record.sha256


class DeltaFolder:
    """A distributed checkpoint with its base. It can be a base itself.

    Args:
        source: the source of its files; closed with it, and also if opening fails.
        base: opens the base; if None, it is the repository on the Hub that the record names, at its commit.

    Raises:
        DeltaError: the record is missing or damaged.
        CheckpointError: the base cannot be found or read.
        BaseMismatchError: the base is a different checkpoint, or its tensors' names, dtypes or shapes differ.
    """

    def __init__(self, source: Source, base: Callable[[], BaseTensors] | None) -> None:
        self.where = source.where
        self.source = source
        self._base: BaseTensors | None = None
        self._files: dict[int, dict[str, Tensor]] = {}
        self._shards: dict[tuple[str, tuple[int, ...]], StoredPart] = {}
        try:
            self.record = read_record(source)
            self.identity = BaseIdentity("delta", checksum=self.record.checksum)
            self.faults = _CheckpointFaults(source, self.record)
            self.faults.base = self._base = self._open_base(base)
            self._check_base()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.source.close()
        if self._base:
            self._base.close()

    def _open_base(self, base: Callable[[], BaseTensors] | None) -> BaseTensors | None:
        named = self.record.base
        if named is None:
            return None
        if base is not None:
            return base()
        if named.repo_id:  # never a path: a record must not name our folders
            return CheckpointBase(Checkpoint(open_hub(named.repo_id, named.revision), may_lack=True))
        raise CheckpointError(
            f"{self.where} needs its base",
            "It does not say where on the Hub the base is.",
            "Pass it: DeltaStorageReader(path, base=…).",
        )

    def _check_base(self) -> None:
        named, base = self.record.base, self._base
        if named is None or base is None:
            return
        if (named.kind, named.checksum) != (base.identity.kind, base.identity.checksum):
            kinds = {"delta": "an earlier distributed checkpoint", "safetensors": "safetensors files"}
            other = (
                "and this is a different one"
                if named.kind == base.identity.kind
                else f"not {kinds[base.identity.kind]}"
            )
            raise self.faults.wrong_base(f"the right one is {kinds[named.kind]}, {other}")
        for name, tensor in self.record.tensors.items():
            if tensor.base is None:
                continue
            code = DTYPES[tensor.dtype][0]
            found = base.find(tensor.base.name)
            if found is None:
                raise self.faults.wrong_base(f"it has no tensor {tensor.base.name!r}")
            if found != (tensor.base.dtype, tensor.shape):
                raise self.faults.wrong_base(
                    f"tensor {tensor.base.name!r} is {found.dtype} {list(found.shape)}, "
                    f"not {tensor.base.dtype} {list(tensor.shape)}"
                )
            if found.dtype != code and not codec.is_convertible(found.dtype, code):
                raise self.faults.damaged(
                    RECORD_NAME, f"{found.dtype} cannot be the base of {code}, as of {name!r}"
                )

    @property
    def sources(self) -> list[Source]:
        """The sources of this distributed checkpoint and of those that it is based on."""
        return [self.source, *(self._base.sources if isinstance(self._base, DeltaFolder) else [])]

    def check_files(self) -> None:
        """Compare the SHA-256 of every file with the record.

        Raises:
            DeltaError: one differs.
        """
        for record in self.record.files:
            if self.faults.is_damaged(record.path):
                raise self.faults.damaged(record.path, f"Its SHA-256 is not the one in {RECORD_NAME}")

    def _payload(self, file: int, name: str) -> Tensor:
        path = self.record.files[file].path
        if file not in self._files:
            try:
                opened = read_shard(self.source, path)
            except HeaderError as error:
                raise self.faults.damaged(path, error.why.rstrip(".")) from error
            self._files[file] = {info.name: Tensor(info, opened) for info in opened.header.tensors}
        if name not in self._files[file]:
            raise self.faults.damaged(path, f"It has no payload {name!r}")
        return self._files[file][name]

    def shard(self, name: str, offsets: tuple[int, ...]) -> StoredPart:
        """The shard of tensor ``name`` that begins at ``offsets``.

        Raises:
            DeltaError: its file lacks it.
        """
        key = name, offsets
        if key not in self._shards:
            shard = next(part for part in self.record.tensors[name].shards if part.offsets == offsets)
            self._shards[key] = self._open_shard(name, shard)
        return self._shards[key]

    def _open_shard(self, name: str, shard: TensorPart) -> StoredPart:
        tensor = self.record.tensors[name]
        reference = None
        if tensor.base and self._base:
            reference = BasePart(self._base, tensor.base, shard.box)
        payload = self._payload(shard.file, payload_name(name, shard.offsets))
        return StoredPart(shard.file, payload, shard.box, tensor.dtype, reference, self.faults)

    def value(self, name: str) -> bytes:
        """The bytes of a value in the state that is not a tensor.

        Raises:
            DeltaError: they are damaged.
        """
        value = self.record.values[name]
        payload = self._payload(value.file, payload_name(name, None))
        stored = StoredPart(value.file, payload, Box((0,), (value.nbytes,)), "uint8", None, self.faults)
        return b"".join(stored.chunk(index).tobytes() for index in range(stored.plan.count))

    def find(self, name: str) -> TensorType | None:
        tensor = self.record.tensors.get(name)
        return TensorType(DTYPES[tensor.dtype][0], tensor.shape) if tensor else None

    def read(self, name: str, box: Box, start: int, stop: int) -> NDArray[np.uint8]:
        tensor = self.record.tensors[name]
        dtype, itemsize = getattr(torch, tensor.dtype), DTYPES[tensor.dtype][1]
        data = torch.empty((stop - start) * itemsize, dtype=torch.uint8)
        values, position = data.view(dtype), 0
        for part in cut(box.sizes, start, stop):
            out = values[position : position + part.numel].view(part.sizes)
            position += part.numel
            whole = part.moved_by(box.offsets)
            for shard in tensor.shards:
                if common := whole.overlap(shard.box):
                    stored = self.shard(name, shard.offsets)
                    wanted = common.seen_from(shard.offsets)
                    there = out[common.seen_from(whole.offsets).slices]
                    for index in stored.chunks(wanted):
                        stored.copy(index, wanted, there)
        return data.numpy()

    def expect(self, parts: Iterable[tuple[str, Box]]) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def require_undamaged(self, workers: Workers, share: int, of: int) -> None:
        """Does nothing: each chunk has a checksum, and so has each of its base."""

    def expect_base(self, chunks: Iterable[tuple[StoredPart, int]]) -> AbstractContextManager[None]:
        """Announce that these chunks of shards will be decoded within the block, in about this order."""
        if self._base is None:
            return nullcontext()
        return self._base.expect(
            (shard.base.tensor.name, box.moved_by(shard.box.offsets))
            for shard, index in chunks
            if shard.base
            for box in shard.boxes(index)
        )

    def check_sample(self, shards: Iterable[StoredPart], workers: Workers) -> None:
        """Compare some of the base's chunks, at least one of each shard, with the payloads' checksums.

        Raises:
            BaseMismatchError: one differs.
            DeltaError: one differs because the checkpoint is damaged.
        """
        shards = [shard for shard in shards if shard.base and shard.plan.count]
        each = -(-_SAMPLED_CHUNKS // max(1, len(shards)))
        choice = random.Random(0)  # noqa: S311
        sample = [
            (shard, index)
            for shard in shards
            for index in choice.sample(range(shard.plan.count), min(each, shard.plan.count))
        ]
        for _ in workers.map(lambda chunk: chunk[0].require_base(chunk[1]), sample):
            pass


class StoredPart(PayloadReader):
    """One part of a tensor, decoded chunk by chunk, by several threads at once."""

    base: BasePart | None

    def __init__(
        self, file: int, stored: Tensor, box: Box, dtype: str, base: BasePart | None, faults: Faults
    ) -> None:
        code, self._itemsize = DTYPES[dtype]
        nbytes = box.numel * self._itemsize
        plan = ChunkPlan(nbytes, nbytes if base else 0)
        super().__init__(stored.name, code, plan, stored, base, faults)
        self.box = box
        self._file = file
        self._dtype: torch.dtype = getattr(torch, dtype)

    @property
    def place(self) -> tuple[int, int]:
        """The start of its payload: the number of the file, and the byte."""
        return self._file, self.stored.info.start

    def place_of(self, index: int) -> str:
        """The place of chunk ``index`` in the tensor, in words."""
        return f"{super().place_of(index)} of the part at {list(self.box.offsets)}"

    def chunks(self, wanted: Box) -> Iterator[int]:
        """The chunks that hold elements of the box ``wanted`` (counted from the part's first element)."""
        first, end = (n * self._itemsize for n in envelope(self.box.sizes, wanted))
        for index in range(first // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            if any(box.overlap(wanted) for box in self.boxes(index)):
                yield index

    def boxes(self, index: int) -> Iterator[Box]:
        """The elements of chunk ``index`` as boxes, counted from the part's first element."""
        start, end = self.plan.span(index)
        return cut(self.box.sizes, start // self._itemsize, end // self._itemsize)

    def copy(self, index: int, wanted: Box, out: torch.Tensor) -> None:
        """Decode chunk ``index`` and copy its elements in ``wanted`` to ``out``, a tensor of ``wanted.sizes``
        on any device.

        Raises:
            BaseMismatchError, DeltaError: as for :meth:`decode`.
        """
        values = torch.from_numpy(self.chunk(index)).view(self._dtype)
        if out.dtype == self._dtype and (word := _WORDS.get(self._itemsize)):
            values, out = values.view(word), out.view(word)
        position = 0
        for box in self.boxes(index):
            if common := box.overlap(wanted):
                block = values[position : position + box.numel].view(box.sizes)
                out[common.seen_from(wanted.offsets).slices].copy_(
                    block[common.seen_from(box.offsets).slices]
                )
            position += box.numel

    def chunk(self, index: int) -> NDArray[np.uint8]:
        """The bytes of chunk ``index``; raises like :meth:`decode`."""
        self.read_table()
        out = np.empty(self.plan.length(index, index + 1), np.uint8)
        self.decode(index, index + 1, out)
        return out
