"""Writes a delta's folder: its shards, the target's other files, license texts, and the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import msgspec

from ..card import write_card
from ..changes import PICTURE_NAME, delta_picture
from ..checkpoint import MAX_HEADER_BYTES, Shard
from ..codec import RECORD, compress_blocks
from ..entries import EntryRows, Kind, TensorEntry, from_rows, to_rows
from ..errors import CheckpointError
from ..license import cards, rules
from ..manifest import (
    MANIFEST_NAME,
    BaseRecord,
    DeltaLicense,
    FileRecord,
    Manifest,
    TargetFile,
    TargetRecord,
    is_safe_path,
)
from ..payload import ChunkPlan, PayloadWriter
from ..storage import Destination, Source, WritableFile, sha256_of, spelling
from ..workers import Meter, Workers
from .shards import shard_header, shard_metadata

#: A file is stored compressed if that saves this share of it; small files stay readable on the Hub.
_WORTH_COMPRESSING = 64 << 10
_WORTH_SAVING = 0.9

#: Above this size, a file is compressed less, and faster.
_LARGE = 64 << 20


def compression_level(size: int) -> int | None:
    """The level at which a file of this size is compressed; None if it is stored as it is."""
    if size < _WORTH_COMPRESSING:
        return None
    return 9 if size < _LARGE else 3


def most_compressed(size: int) -> int:
    """How long a file of this size may be when compressed, to be stored so."""
    return int(size * _WORTH_SAVING)


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """The note of a finished delta shard, for a run after an interruption. ``inputs`` identifies its
    inputs."""

    inputs: str
    file: FileRecord
    target: TargetFile
    kinds: tuple[Kind, ...]
    tensors: tuple[EntryRows, ...]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Its tensors' entries."""
        return from_rows(self.kinds, self.tensors)


class DeltaWriter:
    """Writes the files of one delta and records them.

    Args:
        folder: the folder to write to.
        target: the source of the target's files.
        inputs: a text that changes with the inputs of the delta.
        meter: counts bytes of the target.
    """

    def __init__(
        self, folder: Destination, target: Source, inputs: str, workers: Workers, meter: Meter
    ) -> None:
        self.files: list[FileRecord] = []
        self.kept_any = False  # of an earlier run's shards
        self._folder = folder
        self._target = target
        self._inputs = inputs
        self._workers = workers
        self._meter = meter
        self._taken = set[str]()  # the spellings of the target's files, and of their folders
        for path in map(PurePosixPath, target.sizes):
            self._taken |= {spelling(str(place)) for place in (path, *path.parents)}

    def names(self, others: Iterable[str]) -> Iterator[str]:
        """All names that the target's ``others`` (files that are not shards) may have in the delta."""
        for path in others:
            yield f"files/{path}"
            if self._may_be_compressed(path):
                yield f"files/{path}.zst"

    def digest(self, source: Source, path: str, meter: Meter | None = None) -> str:
        """The SHA-256 of a file's bytes.

        Raises:
            CheckpointError: it differs from the published one.
        """
        checked = source.checked_sha256(path)
        if checked is None:
            found = sha256_of(self._workers.watch(source.blocks(path), meter))
            source.require_sha256(path, found)
            return found
        if meter:
            meter.add(source.sizes[path])
        return checked

    @contextmanager
    def shard(self, name: str, shard: Shard, plans: Iterable[ChunkPlan]) -> Iterator[DeltaShardWriter]:
        """Write the delta shard ``name`` for a shard of the target, whose tensors are cut by ``plans``.

        Raises:
            CheckpointError: its header would be longer than the format allows.
        """
        with self._folder.create(name) as file:
            yield DeltaShardWriter(self, file, shard, plans)

    def finish_shard(self, file: WritableFile, target: TargetFile, entries: Sequence[TensorEntry]) -> None:
        """Give a delta shard its name, and remember that it is done."""
        stored = self._finish(file)
        kinds, rows = to_rows(entries)
        done = {"inputs": self._inputs, "file": stored, "target": target, "kinds": kinds, "tensors": rows}
        self._folder.remember(file.path, msgspec.json.encode(done))

    def finished_before(self, name: str) -> FinishedShard | None:
        """The delta shard ``name`` from an interrupted run with the same inputs; None if there is none."""
        try:
            done = msgspec.json.decode(self._folder.recall(name), type=FinishedShard)
        except msgspec.MsgspecError:
            return None
        if done.inputs != self._inputs or not self._folder.is_regular(name):
            return None
        if sha256_of(self._folder.blocks(name)) != done.file.sha256:
            return None
        self.files.append(done.file)
        self.kept_any = True
        return done

    def require_base(self, source: Source, path: str, sha256: str) -> None:
        """Compare the SHA-256 of a base's shard, from which delta shards were coded, with the published one.

        Raises:
            CheckpointError: they differ. No later run goes on with the delta shards that are done.
        """
        try:
            source.require_sha256(path, sha256)
        except CheckpointError:
            for file in self.files:
                self._folder.remember(file.path, b"")
            raise

    def claim(self, names: Iterable[str]) -> None:
        """Note that these files of the delta are ours: others write them."""
        self._folder.claim(names)

    def write_other_files(self, paths: Iterable[str], base_files: Sequence[FileRecord]) -> list[TargetFile]:
        """Store the target's files that are not shards, by reference if the base has the same bytes."""
        in_base = {(record.size, record.sha256): record.path for record in reversed(base_files)}
        written = []
        for path in paths:
            size = self._target.sizes[path]
            digest = self.digest(self._target, path, self._meter)
            source = in_base.get((size, digest))
            if source is not None:
                written.append(TargetFile(path, size, digest, "base", source))
            else:
                written.append(self._store(path, size, digest))
        return written

    def _store(self, path: str, size: int, digest: str) -> TargetFile:
        """Copy one file into the delta, compressed if that saves enough."""
        stored = f"files/{path}"
        level = compression_level(size)
        if level is not None and self._may_be_compressed(path):
            blocks = compress_blocks(self._same(path, digest), level)
            if self._write_blocks(f"{stored}.zst", blocks, limit=most_compressed(size)):
                return TargetFile(path, size, digest, "zstd", f"{stored}.zst")
        self._write_blocks(stored, self._same(path, digest))
        return TargetFile(path, size, digest, "verbatim", stored)

    def _same(self, path: str, digest: str) -> Iterator[bytes]:
        """The blocks of a file that was read before. Raises CheckpointError if they have changed."""
        sha256 = hashlib.sha256()
        for block in self._target.blocks(path):
            sha256.update(block)
            yield block
        if sha256.hexdigest() != digest:
            raise CheckpointError(
                f"{self._target.name(path)} changed while it was read", "", "Run the same command again."
            )

    def _may_be_compressed(self, path: str) -> bool:
        """Whether ``path`` with .zst is a free name, on any file system, and not too long."""
        packed = f"{path}.zst"
        return spelling(packed) not in self._taken and is_safe_path(packed)

    def write_licenses(
        self, base: BaseRecord, target: TargetRecord, old: cards.LicenseTexts, new: cards.LicenseTexts
    ) -> DeltaLicense | None:
        """Copy both sides' license texts into the delta, and write its NOTICE."""
        for path, content in (old.texts | new.texts).items():
            self._write_blocks(path, [content])
        whole = rules.combine(base, target, old.conflicts + new.conflicts, new.base_models)
        if whole is None:
            return None
        self._write_blocks(rules.NOTICE_NAME, [rules.notice_text(base, target)])
        return whole

    def write_picture(self, entries: Sequence[TensorEntry]) -> None:
        """Write the picture of what changed, if there is anything to see.

        Args:
            entries: the manifest's.
        """
        if picture := delta_picture(entries):
            self._write_blocks(PICTURE_NAME, [picture])

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the model card and, last of all, the manifest, which completes the delta."""
        self._folder.remove_claims(keep=[file.path for file in manifest.files])
        self._folder.claim([cards.CARD_NAME, MANIFEST_NAME])
        for path, content in (
            (cards.CARD_NAME, write_card(manifest, self._target)),
            (MANIFEST_NAME, Manifest.from_json(manifest.to_json()).to_json()),  # checked as a reader would
        ):
            with self._folder.create(path) as file:
                file.write_at(0, content)
                file.commit()

    def _write_blocks(self, path: str, blocks: Iterable[bytes], limit: float = float("inf")) -> bool:
        """Write a file of the delta, unless it exceeds ``limit`` bytes. Returns whether it was written."""
        with self._folder.create(path) as file:
            position = 0
            for block in self._workers.watch(blocks):
                if position + len(block) > limit:
                    return False
                file.write_at(position, block)
                position += len(block)
            self._finish(file)
        return True

    def _finish(self, file: WritableFile) -> FileRecord:
        record = FileRecord(file.path, *file.digest())
        self._folder.claim([file.path])
        file.commit()
        self.files.append(record)
        return record


class DeltaShardWriter:
    """Writes one delta shard: ``payloads`` in the manifest's order, then the header, into reserved space."""

    def __init__(
        self, delta: DeltaWriter, file: WritableFile, shard: Shard, plans: Iterable[ChunkPlan]
    ) -> None:
        self._delta = delta
        self._file = file
        self._shard = shard
        self._metadata = shard_metadata(shard)
        # The payloads' lengths are known only at the end.
        most = sum(plan.nbytes + plan.count * RECORD.itemsize for plan in plans)
        self._room = len(shard_header(most, self._metadata))
        if self._room > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{shard.path} cannot be part of a delta",
                f"With its header, the delta shard's would have {self._room} bytes; the format's limit is "
                f"{MAX_HEADER_BYTES}.",
                "Save the target in smaller shards.",
            )
        self.payloads = PayloadWriter(file, self._room)

    def finish(self, sha256: str, entries: Sequence[TensorEntry]) -> TargetFile:
        """Write the header, and give the shard its name.

        Args:
            sha256: the SHA-256 of the target's shard.
            entries: its tensors.
        """
        self.payloads.flush()
        header = shard_header(self.payloads.nbytes, self._metadata, self._room)
        assert len(header) == self._room
        self._file.write_at(0, header)
        target = TargetFile(self._shard.path, self._shard.file.size, sha256, "tensors", self._file.path)
        self._delta.finish_shard(self._file, target, entries)
        return target
