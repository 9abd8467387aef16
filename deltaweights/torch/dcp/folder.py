"""A distributed checkpoint that is there: its record, its shards, and their base, read in parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ... import codec
from ...checkpoint import Checkpoint, read_shard
from ...checkpoint import Shard as File
from ...checkpoint import Tensor as Payload
from ...errors import BaseMismatchError, CheckpointError, DeltaWeightsError, HeaderError, PayloadError
from ...payload import CHUNK_BYTES, ChunkPlan, check_records
from ...storage import Readable, Source, open_hub, open_source, sha256_of
from ...workers import Workers
from .base import BasePart, BaseTensors, CheckpointBase, TensorType
from .boxes import Box, cut, envelope
from .record import DTYPES, RECORD_NAME, BaseIdentity, TensorPart, payload_name, read_record

#: Chunks of the base that a rank compares before it loads anything, at least one of each shard.
_SAMPLED_CHUNKS = 64

#: Integers of each element size: what is copied is bits, whatever they mean as numbers.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_FIX = "Get it again, or go back to an earlier checkpoint."


def open_base(location: Readable) -> BaseTensors:
    """The base at a location: a safetensors checkpoint or an earlier distributed one.

    Raises:
        CheckpointError, DeltaError: there is none, or it cannot be read.
    """
    source = open_source(location)
    return DeltaFolder(source, None) if RECORD_NAME in source.sizes else CheckpointBase(Checkpoint(source))


class DeltaFolder:
    """A distributed checkpoint with its base, itself a base for others.

    Args:
        source: where its files are; closed with it, and where it cannot be opened.
        base: opens the base; if None, it is the repository on the Hub that the record names, at its commit.

    Raises:
        DeltaError: the record is missing or damaged.
        CheckpointError: the base cannot be found or read.
        BaseMismatchError: it is another checkpoint, or its tensors' names, dtypes or shapes differ.
    """

    def __init__(self, source: Source, base: Callable[[], BaseTensors] | None) -> None:
        self.where = source.where
        self.source = source
        self._base: BaseTensors | None = None
        self._files: dict[int, dict[str, Payload]] = {}
        self._shards: dict[tuple[str, tuple[int, ...]], StoredShard] = {}
        try:
            self.record = read_record(source)
            self.identity = BaseIdentity("delta", checksum=self.record.checksum)
            self._base = self._open_base(base)
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
            return CheckpointBase(Checkpoint(open_hub(named.repo_id, named.revision)))
        raise CheckpointError(
            f"{self.where} needs its base",
            "It does not say where on the Hub that is.",
            "Pass it: DeltaStorageReader(path, base=…).",
        )

    def _check_base(self) -> None:
        named, base = self.record.base, self._base
        if named is None or base is None:
            return
        if (named.kind, named.checksum) != (base.identity.kind, base.identity.checksum):
            kinds = {"delta": "an earlier distributed checkpoint", "safetensors": "safetensors files"}
            other = (
                "and this is another one"
                if named.kind == base.identity.kind
                else f"not {kinds[base.identity.kind]}"
            )
            raise self.wrong_base(f"the right one is {kinds[named.kind]}, {other}")
        for name, tensor in self.record.tensors.items():
            if tensor.base is None:
                continue
            code = DTYPES[tensor.dtype][0]
            found = base.find(tensor.base.name)
            if found is None:
                raise self.wrong_base(f"it has no tensor {tensor.base.name!r}")
            if found != (tensor.base.dtype, tensor.shape):
                raise self.wrong_base(
                    f"tensor {tensor.base.name!r} is {found.dtype} {list(found.shape)}, "
                    f"not {tensor.base.dtype} {list(tensor.shape)}"
                )
            if found.dtype != code and not codec.is_convertible(found.dtype, code):
                raise self.damaged(RECORD_NAME, f"{found.dtype} cannot be the base of {code}, as of {name!r}")

    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise where the base is not the right one."""
        named = self.record.base
        fix = "Pass the base that the writer had."
        if named and named.repo_id:
            revision = f"@{named.revision}" if named.revision else ""
            fix = f"The right one is on the Hub: {named.repo_id}{revision}"
        where = self._base.where if self._base else "Nothing"
        return BaseMismatchError(
            f"{where} is not the base that {self.where} was made from", f"{why[0].upper()}{why[1:]}.", fix
        )

    def damaged(self, path: str, why: str) -> PayloadError:
        """The error to raise where the file at ``path`` is not what was written."""
        return PayloadError(f"{path} in {self.where} is damaged", f"{why}.", _FIX)

    @property
    def roots(self) -> list[Path]:
        """The folders on this machine that it and the distributed checkpoints below it lie in."""
        below = self._base.roots if isinstance(self._base, DeltaFolder) else []
        return below + ([self.source.root.resolve()] if self.source.root else [])

    def check_files(self) -> None:
        """Compare the SHA-256 of every file with the record.

        Raises:
            DeltaError: one differs.
        """
        for index, record in enumerate(self.record.files):
            if self.is_damaged(index):
                raise self.damaged(record.path, f"Its SHA-256 is not the one in {RECORD_NAME}")

    def is_damaged(self, file: int) -> bool:
        """Whether the file of number ``file`` has another SHA-256 than the record says."""
        record = self.record.files[file]
        published = self.source.published_sha256(record.path)
        return (published or sha256_of(self.source.blocks(record.path))) != record.sha256

    def _payload(self, file: int, name: str) -> Payload:
        path = self.record.files[file].path
        if file not in self._files:
            try:
                opened: File = read_shard(self.source, path)
            except HeaderError as error:
                raise self.damaged(path, error.why.rstrip(".")) from error
            self._files[file] = {info.name: Payload(info, opened) for info in opened.header.tensors}
        if name not in self._files[file]:
            raise self.damaged(path, f"It has no payload {name!r}")
        return self._files[file][name]

    def shard(self, name: str, offsets: tuple[int, ...]) -> StoredShard:
        """The shard of tensor ``name`` that begins at ``offsets``.

        Raises:
            DeltaError: its file does not have it.
        """
        key = name, offsets
        if key not in self._shards:
            shard = next(part for part in self.record.tensors[name].shards if part.offsets == offsets)
            self._shards[key] = self._open_shard(name, shard)
        return self._shards[key]

    def _open_shard(self, name: str, shard: TensorPart) -> StoredShard:
        tensor = self.record.tensors[name]
        reference = None
        if tensor.base and self._base:
            reference = BasePart(self._base, tensor.base, shard.box, DTYPES[tensor.dtype][0])
        payload = self._payload(shard.file, payload_name(name, shard.offsets))
        return StoredShard(self, shard.file, payload, shard.box, tensor.dtype, reference)

    def value(self, name: str) -> bytes:
        """The bytes of a state's value that is not a tensor.

        Raises:
            DeltaError: they are damaged.
        """
        value = self.record.values[name]
        payload = self._payload(value.file, payload_name(name, None))
        stored = StoredShard(self, value.file, payload, Box((0,), (value.nbytes,)), "uint8", None)
        stored.table  # noqa: B018  # a payload that long must exist before so much memory is taken
        return b"".join(stored.decode(index).tobytes() for index in range(stored.plan.count))

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

    def expect_base(self, chunks: Iterable[tuple[StoredShard, int]]) -> AbstractContextManager[None]:
        """Within the block, these chunks of shards will be decoded, about in this order."""
        if self._base is None:
            return nullcontext()
        return self._base.expect(
            (shard.reference.base.name, part.moved_by(shard.box.offsets))
            for shard, index in chunks
            if shard.reference
            for part in shard.parts(index)
        )

    def check_sample(self, shards: Iterable[StoredShard], workers: Workers) -> None:
        """Compare some of the base's chunks, at least one of each shard, with the payloads' checksums.

        Raises:
            BaseMismatchError: one differs.
            DeltaError: it does because the checkpoint is damaged.
        """
        shards = [shard for shard in shards if shard.reference and shard.plan.count]
        each = -(-_SAMPLED_CHUNKS // max(1, len(shards)))
        choice = random.Random(0)  # noqa: S311
        sample = [
            (shard, index)
            for shard in shards
            for index in choice.sample(range(shard.plan.count), min(each, shard.plan.count))
        ]
        for _ in workers.map(lambda chunk: chunk[0].checked_base(chunk[1]), sample):
            pass


class StoredShard:
    """One shard of a tensor: decoded chunk by chunk, by several threads at once."""

    def __init__(
        self,
        folder: DeltaFolder,
        file: int,
        payload: Payload,
        box: Box,
        dtype: str,
        reference: BasePart | None,
    ) -> None:
        self.box = box
        self.reference = reference
        self._code, self._itemsize = DTYPES[dtype]
        nbytes = box.numel * self._itemsize
        self.plan = ChunkPlan(nbytes, nbytes if reference else 0)
        self._folder = folder
        self._file = file
        self._payload = payload
        self._dtype: torch.dtype = getattr(torch, dtype)

    @property
    def place(self) -> tuple[int, int]:
        """Where its payload begins: the number of the file, and the byte."""
        return self._file, self._payload.info.start

    @cached_property
    def table(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The payload's chunk records (:data:`codec.RECORD`), and where each chunk's data starts in it.

        Raises:
            PayloadError: they do not add up.
        """
        length, there = self.plan.count * codec.RECORD.itemsize, self._payload.info.nbytes
        if length > there:
            raise self._damaged(f"its payload of {there} bytes is too short")
        table = np.empty(length, np.uint8)
        self._payload.read_into(0, table)
        try:
            return check_records(table.tobytes(), self.plan, there)
        except PayloadError as error:
            raise self._damaged(error.what) from error

    def chunks(self, wanted: Box) -> Iterator[int]:
        """The chunks in which elements of the box ``wanted`` (counted from the shard's first one) lie."""
        first, end = (n * self._itemsize for n in envelope(self.box.sizes, wanted))
        for index in range(first // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            if any(part.overlap(wanted) for part in self.parts(index)):
                yield index

    def parts(self, index: int) -> Iterator[Box]:
        """The elements of chunk ``index`` as boxes, counted from the shard's first one."""
        start, end = self.plan.span(index)
        return cut(self.box.sizes, start // self._itemsize, end // self._itemsize)

    def copy(self, index: int, wanted: Box, out: torch.Tensor) -> None:
        """Decode chunk ``index`` and put what ``wanted`` has of it into ``out``, a tensor of ``wanted.sizes``
        on any device.

        Raises:
            BaseMismatchError, PayloadError: as :meth:`decode`.
        """
        values = torch.from_numpy(self.decode(index)).view(self._dtype)
        if out.dtype == self._dtype and (word := _WORDS.get(self._itemsize)):
            values, out = values.view(word), out.view(word)
        position = 0
        for part in self.parts(index):
            if common := part.overlap(wanted):
                block = values[position : position + part.numel].view(part.sizes)
                out[common.seen_from(wanted.offsets).slices].copy_(
                    block[common.seen_from(part.offsets).slices]
                )
            position += part.numel

    def decode(self, index: int) -> NDArray[np.uint8]:
        """The bytes of chunk ``index``.

        Raises:
            BaseMismatchError: the base's bytes are not those that it was made from.
            PayloadError: it is damaged.
        """
        records, starts = self.table
        start, end = self.plan.span(index)
        length = int(records["length"][index])
        if length > end - start:
            raise self._damaged(f"a chunk of {end - start} bytes is coded in {length}")
        base = None
        if self.reference:
            base = self.reference.convert(self.checked_base(index))
        data, out = np.empty(length, np.uint8), np.empty(end - start, np.uint8)
        self._payload.read_into(int(starts[index]), data)
        try:
            codec.decode_chunk(int(records["method"][index]), data, base, self._code, out)
        except PayloadError as error:
            raise self._damaged(error.what) from error
        if codec.checksum(out) != int(records["target"][index]):
            raise self._damaged(f"chunk {index} does not decode to what was encoded")
        return out

    def checked_base(self, index: int) -> NDArray[np.uint8]:
        """The base's bytes for chunk ``index``, in the base's dtype; raises as :meth:`decode`."""
        assert self.reference is not None
        start, end = self.plan.span(index)
        data = self.reference.read(start, end)
        if codec.checksum(data) != int(self.table[0]["base"][index]):
            raise self._wrong_base(start, end)
        return data

    def _wrong_base(self, start: int, end: int) -> DeltaWeightsError:
        """The error where the base's bytes and their checksum differ: the one or the other is wrong."""
        assert self.reference is not None
        if self._folder.is_damaged(self._file):
            return self._damaged("its chunk records are not those that were written")
        place = f"bytes {start} to {end} of the part at {list(self.box.offsets)}"
        return self._folder.wrong_base(f"its tensor {self.reference.base.name!r} differs in {place}")

    def _damaged(self, why: str) -> PayloadError:
        return self._folder.damaged(self._payload.shard.path, f"In {self._payload.info.name!r}, {why}")
