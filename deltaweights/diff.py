"""Base and target to a delta: the mirror image of patch.py.

checkpoint → codec → delta, shard by shard, chunk by chunk, so memory does not grow with either checkpoint.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import codec
from ._version import __version__
from .checkpoint import MAX_HEADER_BYTES, Checkpoint, Shard, Tensor, open_checkpoint
from .delta.target import read_manifest, shard_header, shard_metadata
from .errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError, OutputError
from .license import cards, rules
from .manifest import (
    MANIFEST_NAME,
    MAX_CHUNK_BYTES,
    BaseRecord,
    BaseTensor,
    DeltaLicense,
    FileRecord,
    Manifest,
    RepoId,
    Revision,
    Status,
    TargetFile,
    TargetRecord,
    TargetTensor,
    TensorEntry,
    Tool,
    is_safe_path,
)
from .match.duplicates import find_duplicates
from .match.names import Match, RenameRule, match_tensors
from .payload import CHUNK_BYTES, ChunkPlan
from .storage import (
    HubId,
    LocalSource,
    Location,
    OutputFolder,
    PartialFile,
    Readable,
    Source,
    Span,
    is_same,
    is_within,
    local_path,
    origins,
    sha256_of,
    spelling,
)
from .workers import Buffers, Meter, ProgressCallback, Workers, batches, result_of

#: Compressing a file pays if it saves this share of it; small ones stay readable on the Hub.
_WORTH_COMPRESSING = 64 << 10
_WORTH_SAVING = 0.9
#: Payloads are written so many bytes at a time, or more: each write has a thread wait for Python's lock.
_WRITE_BYTES = 1 << 20


def make_delta(
    base: Readable,
    target: Readable,
    delta: Location,
    *,
    rename: Sequence[RenameRule] = (),
    base_repo: str | None = None,
    base_revision: str | None = None,
    base_license: str | None = None,
    target_repo: str | None = None,
    target_license: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write to the folder ``delta`` what ``target`` adds to ``base``.

    Args:
        base, target: a folder, one .safetensors file, or a Hub id; what is on the Hub streams through memory.
        delta: the folder to write; new or empty, or an interrupted run's.
        rename: pairs (regular expression, replacement) that turn target tensor names into base tensor
            names, for what automatic matching does not find.
        base_repo, base_revision: the base's Hub id and commit; if None, those of a base that is on the Hub or
            in the Hub cache.
        base_license, target_license: license ids; taken from the model cards if None.
        target_repo: the Hub id that the target is or will be published under.
        chunk_bytes: bytes of a tensor that are coded independently; a multiple of 4096.
        force: write even if ``delta`` holds other files; the delta's own files are replaced.
        threads: how many; the number of usable cores, at most 8, if None.
        progress: called with a phase ("diff"), bytes done, bytes in all.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: a checkpoint cannot be found, read or downloaded.
        OutputError: the folder cannot be used, or its disk is full.
        ValueError: ``chunk_bytes`` is out of range.
    """
    check_chunk_bytes(chunk_bytes)
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        check_place(delta, old, new)
        _check_hub_ids(base_repo, target_repo, base_revision)
        old_id, new_id = old.source.hub_id, new.source.hub_id
        sides = (
            CheckpointFacts(
                base_repo or old_id.repo_id,
                base_revision or _revision(old_id, base_repo),
                cards.read_license(old, "base", base_license),
            ),
            CheckpointFacts(
                target_repo or new_id.repo_id,
                _revision(new_id, target_repo),
                cards.read_license(new, "target", target_license),
            ),
        )
        return write_delta(
            old,
            new,
            delta,
            match_tensors(old, new, rename),
            *sides,
            rename=rename,
            chunk_bytes=chunk_bytes,
            force=force,
            threads=threads,
            progress=progress,
        )


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Raise :class:`ValueError` where ``chunk_bytes`` is out of range."""
    if not 4096 <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % 4096:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, not a multiple of 4096 up to {MAX_CHUNK_BYTES}")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a manifest says of base or target: Hub id and commit, license, and its files where they are known
    beforehand."""

    repo_id: str | None
    revision: str | None
    license: cards.LicenseTexts
    files: tuple[FileRecord, ...] = ()


def check_place(delta: Location, old: Checkpoint, new: Checkpoint) -> None:
    """Raise :class:`DeltaWeightsError` where the delta of these two cannot be written to ``delta``."""
    _check_names(new)
    _check_apart(local_path(delta), old, new)


def write_delta(
    old: Checkpoint,
    new: Checkpoint,
    delta: Location,
    matches: Sequence[Match],
    base: CheckpointFacts,
    target: CheckpointFacts,
    *,
    rename: Sequence[RenameRule] = (),
    glance: Callable[[Tensor], Hashable] | None = None,
    chunk_bytes: int,
    force: bool,
    threads: int | None,
    progress: ProgressCallback | None,
) -> Manifest:
    """:func:`make_delta` for checkpoints that are open, tensors that are matched and sides that are known.

    Args:
        glance: as for :func:`find_duplicates`.

    Raises:
        BaseMismatchError: the base's shards have the names in ``base.files``, but another SHA-256.
    """
    with Workers(threads) as workers, OutputFolder(local_path(delta)) as folder:
        for source in (old.source, new.source):
            workers.at_stop(source.cancel)
        writer = _DeltaWriter(old, new, folder, workers, chunk_bytes, rename, progress)
        texts = [*base.license.texts, *target.license.texts, rules.NOTICE_NAME]
        folder.require_distinct([cards.CARD_NAME, MANIFEST_NAME, *texts, *writer.names()])
        _check_vacant(folder, force)
        matches = find_duplicates(new, matches, chunk_bytes, workers, glance)
        base_files, target_files, entries = writer.write_files(matches, base.files)
        base_record = BaseRecord(base.repo_id, base.revision, base.license.license, base_files)
        target_record = TargetRecord(
            target.repo_id, target.revision, target.license.license, target_files, new.source.left_out
        )
        manifest = Manifest(
            base=base_record,
            target=target_record,
            license=writer.write_licenses(base_record, target_record, base.license, target.license),
            tensors=(*entries, *_removed(old, matches)),
            files=tuple(sorted(writer.files, key=lambda file: file.path)),
            tool=Tool("deltaweights", __version__),
            chunk_bytes=chunk_bytes,
        )
        writer.write_manifest(manifest)
        return manifest


def _revision(found: HubId, repo_id: str | None) -> str | None:
    """The commit that was read, unless somebody calls the repository by another name."""
    return found.revision if repo_id in (None, found.repo_id) else None


def _check_hub_ids(base_repo: str | None, target_repo: str | None, revision: str | None) -> None:
    for value, kind in ((base_repo, RepoId), (target_repo, RepoId), (revision, Revision)):
        try:
            msgspec.convert(value, kind | None)
        except msgspec.ValidationError as error:
            raise DeltaWeightsError(
                f"{value!r} is not a Hub id or revision", f"{error}.", "Write it like org/name, or like main."
            ) from error


def _check_names(new: Checkpoint) -> None:
    for path in new.source.sizes:
        if not is_safe_path(path):
            raise CheckpointError(
                f"{new.source.where} holds a file that a delta cannot name",
                f"{path!r} has control characters, a backslash, a drive letter or an over-long part.",
                "Rename it.",
            )


def _check_apart(root: Path, old: Checkpoint, new: Checkpoint) -> None:
    """The delta must not become part of what it is made from."""
    for source in (*origins(old.source), *origins(new.source)):
        if source.root is None:
            continue
        place = source.root.resolve()
        if is_same(root, place.parent) if place.is_file() else is_within(root, place):
            raise OutputError(
                f"The delta cannot be written to {root}",
                f"That is inside {source.where}, which it is made from.",
                "Choose a folder outside the base and the target.",
            )


def _check_vacant(folder: OutputFolder, force: bool) -> None:
    others = folder.foreign(folder.claims)
    if others and not force:
        raise OutputError(
            f"{folder.root} is not empty",
            f"It holds {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}.",
            "Choose a new folder, or pass force=True to write there; an earlier delta is replaced.",
        )
    if (folder.root / MANIFEST_NAME).exists():
        folder.claim([MANIFEST_NAME, cards.CARD_NAME])
        with suppress(DeltaError, CheckpointError), closing(LocalSource(folder.root)) as earlier:
            folder.claim(file.path for file in read_manifest(earlier).files)
        (folder.root / MANIFEST_NAME).unlink()  # from here on, it is no whole delta


def _removed(old: Checkpoint, matches: Iterable[Match]) -> list[TensorEntry]:
    """Entries for the base tensors that no target tensor is compared with."""
    used = {match.base for match in matches}
    return [
        TensorEntry(t.info.name, None, t.info.dtype, t.info.shape, "removed", None, 0, 0, 0)
        for t in old.tensors
        if t not in used
    ]


class _Coded(NamedTuple):
    """One chunk, encoded: its record, its data, and how many elements changed."""

    record: tuple[int, int, int, int]
    data: bytes
    changed: int


class _Row(NamedTuple):
    """Chunks ``first`` to ``end - 1`` of a tensor, to be encoded."""

    match: Match
    plan: ChunkPlan
    first: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many of the target's bytes they are."""
        return self.plan.length(self.first, self.end)

    @property
    def has_base(self) -> bool:
        """Whether they are coded against the base."""
        return self.plan.has_base(self.first)

    @property
    def base_bytes(self) -> int:
        """How many of the base's bytes that are."""
        if not self.match.base or not self.has_base:
            return 0
        return codec.rescale(self.nbytes, self.match.target.info.dtype, self.match.base.info.dtype)


class _Batch(NamedTuple):
    """Encoded chunks, and the bytes of target and base as they were read."""

    chunks: list[_Coded]
    target: NDArray[np.uint8]
    base: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Finished:
    """A delta shard that is done, for a run after an interruption. ``inputs`` tells what it was made of."""

    inputs: str
    file: FileRecord
    target: TargetFile
    entries: tuple[TensorEntry, ...]


class _DeltaWriter:
    """Writes the parts of one delta and keeps the record of its files."""

    def __init__(
        self,
        old: Checkpoint,
        new: Checkpoint,
        folder: OutputFolder,
        workers: Workers,
        chunk_bytes: int,
        rename: Sequence[RenameRule],
        progress: ProgressCallback | None,
    ) -> None:
        self.files: list[FileRecord] = []
        self._passing: dict[str, Shard] = {}  # the base's shards that are hashed while shards are written
        self._passed: dict[str, str] = {}  # their SHA-256
        self._old = old
        self._new = new
        self._folder = folder
        self._workers = workers
        self._chunk_bytes = chunk_bytes
        inputs = [source.fingerprint(path) for source in (old.source, new.source) for path in source.sizes]
        inputs += [__version__, str(chunk_bytes), *(f"{p}={r}" for p, r in rename)]
        self._inputs = hashlib.sha256("\n".join(inputs).encode(errors="backslashreplace")).hexdigest()
        self._meter = Meter(progress, "diff", sum(new.source.sizes.values()))
        self._taken = set[str]()  # the spellings of the target's files, and of their folders
        for path in map(PurePosixPath, new.source.sizes):
            self._taken |= {spelling(str(place)) for place in (path, *path.parents)}

    def names(self) -> Iterator[str]:
        """What the files of the target that are no shards may be called in the delta."""
        for path in self._new.other_files:
            yield f"files/{path}"
            if self._may_be_compressed(path):
                yield f"files/{path}.zst"

    def write_files(
        self, matches: Sequence[Match], known: Sequence[FileRecord] = ()
    ) -> tuple[tuple[FileRecord, ...], tuple[TargetFile, ...], list[TensorEntry]]:
        """All but licenses and manifest. Returns the base's files, the target's files, and its tensors.

        Args:
            known: the base's files, if somebody has told.
        """
        by_shard: dict[str, list[Match]] = {path: [] for path in self._new.shards}
        for match in matches:
            by_shard[match.target.shard.path].append(match)
        self._passing = _read_in_order(by_shard, self._old)
        with ThreadPoolExecutor(1) as aside:
            try:
                digesting = aside.submit(self._digest_base)
                aside.submit(cards.prepare)
                shards, entries = self._write_shards(by_shard)
                digests = result_of(digesting)
                base_files = self._base_records(digests, known)
                others = self._write_other_files(base_files)
            except BaseException:
                self._workers.stop()
                raise
        files = sorted([*shards, *others], key=lambda file: file.path)
        return base_files, tuple(files), entries

    def _digest_base(self) -> dict[str, str]:
        """The SHA-256 of the base's files, but for those that pass while shards are written."""
        source = self._old.source
        passing = {shard.path for shard in self._passing.values()}
        return {path: self._digest(source, path) for path in source.sizes if path not in passing}

    def _base_records(
        self, digests: Mapping[str, str], known: Sequence[FileRecord]
    ) -> tuple[FileRecord, ...]:
        """The base's files as they are; or as they are ``known``, where it is sharded like that."""
        source = self._old.source
        digests = {**digests, **self._passed}
        found = tuple(FileRecord(path, size, digests[path]) for path, size in source.sizes.items())
        told = {file.path: file for file in known if file.path.endswith(".safetensors")}
        if not told or set(told) != set(self._old.shards):
            return found
        wrong = [file for file in found if file != told.get(file.path, file)]
        if wrong:
            raise BaseMismatchError(
                f"{source.where} is not the base that this delta was made from",
                f"The SHA-256 of {wrong[0].path!r} is {wrong[0].sha256}, not {told[wrong[0].path].sha256}.",
                "Pass the base of the first delta.",
            )
        return tuple(known)

    def _digest(self, source: Source, path: str, meter: Meter | None = None) -> str:
        """The SHA-256 of a file: the one that the Hub publishes, or else that of its bytes."""
        published = source.published_sha256(path)
        if published is None:
            return sha256_of(self._workers.watch(source.blocks(path), meter))
        if meter:
            meter.add(source.sizes[path])
        return published

    def _write_shards(
        self, by_shard: Mapping[str, list[Match]]
    ) -> tuple[list[TargetFile], list[TensorEntry]]:
        """One delta shard for each shard of the target."""
        count = len(by_shard)
        names = (f"delta-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
        written = self._workers.each(self._write_shard, zip(by_shard.items(), names, strict=True))
        return [file for file, _ in written], [entry for _, entries in written for entry in entries]

    def _write_shard(self, job: tuple[tuple[str, list[Match]], str]) -> tuple[TargetFile, list[TensorEntry]]:
        (path, matches), name = job
        base = self._passing.get(path)
        if done := self._finished_before(name):
            self.files.append(done.file)
            self._meter.add(done.target.size)
            if base:
                self._passed[base.path] = self._digest(self._old.source, base.path)
            return done.target, list(done.entries)
        shard = self._new.shards[path]
        digests = _Digests(shard, base, self._workers)
        with self._folder.create(name) as file:
            metadata = shard_metadata(shard)
            room = _header_room(self._plans(matches), metadata)
            if room > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} cannot be part of a delta",
                    f"With its header, the delta shard's would have {room} bytes; the format's limit is "
                    f"{MAX_HEADER_BYTES}.",
                    "Save the target in smaller shards.",
                )
            entries, position = [], 0
            with self._expect(matches), closing(self._encode_all(matches, digests)) as chunks:
                for match, plan in zip(matches, self._plans(matches), strict=True):
                    coded = islice(chunks, plan.count)
                    length, changed, is_same = 0, 0, False
                    if match.like:
                        deque(coded, 0)  # a duplicate's bytes are hashed, no more
                    else:
                        length, changed, is_same = self._write_payload(file, room + position, plan, coded)
                    entries.append(_entry(match, is_same, changed, length, self._old))
                    position += length
            if self._new.source.published_sha256(path) not in (None, digests.target):
                raise CheckpointError(
                    f"{self._new.source.name(path)} was damaged on the way",
                    f"What came has SHA-256 {digests.target}, which is not the one that is published.",
                    "Run the same command again.",
                )
            header = shard_header(position, metadata, room)
            assert len(header) == room
            file.write_at(0, header)
            stored = self._finish(file)
        self._meter.add(shard.header.data_start)
        if base:
            self._passed[base.path] = digests.base
        record = TargetFile(path, shard.file.size, digests.target, "tensors", name)
        finished = _Finished(self._inputs, stored, record, tuple(entries))
        self._folder.remember(name, msgspec.json.encode(finished))
        return record, entries

    @contextmanager
    def _expect(self, matches: Sequence[Match]) -> Iterator[None]:
        """Within the block, the matches' tensors will be read, about in order."""
        targets = (m.target.span(0, m.target.info.nbytes) for m in matches)
        with self._old.source.expect(_base_spans(matches)), self._new.source.expect(targets):
            yield

    def _finished_before(self, name: str) -> _Finished | None:
        """What an interrupted run made of the delta shard ``name``, if it was from the same inputs."""
        try:
            done = msgspec.json.decode(self._folder.recall(name), type=_Finished)
        except msgspec.MsgspecError:
            return None
        if done.inputs != self._inputs or not self._folder.is_regular(name):
            return None
        return done if sha256_of(self._folder.blocks(name)) == done.file.sha256 else None

    def _plans(self, matches: Sequence[Match]) -> list[ChunkPlan]:
        return [ChunkPlan(m.target.info.nbytes, m.shared_bytes, self._chunk_bytes) for m in matches]

    def _encode_all(self, matches: Sequence[Match], digests: _Digests) -> Generator[_Coded, None, None]:
        """The chunks of all tensors, in order: while one tensor is written, the next ones are encoded. What
        was read for them is hashed."""
        at_once = self._workers.batch_bytes
        buffers = Buffers(at_once)
        rows = (
            _Row(match, plan, first, end)
            for match, plan in zip(matches, self._plans(matches), strict=True)
            for first, end in plan.rows(at_once)
        )
        encode = partial(_encode, buffers=buffers)
        for batch in self._workers.map(encode, batches(rows, at_once, lambda row: row.nbytes)):
            digests.update(batch, buffers)
            self._meter.add(batch.target.nbytes)
            yield from batch.chunks

    @staticmethod
    def _write_payload(
        file: PartialFile, offset: int, plan: ChunkPlan, chunks: Iterable[_Coded]
    ) -> tuple[int, int, bool]:
        """Write one tensor's chunks to ``offset``. Returns the payload's length, how many elements changed,
        and whether all bytes are the base's."""
        records = np.zeros(plan.count, codec.RECORD)
        position, changed = records.nbytes, 0
        unwritten, size = list[bytes](), 0
        for index, coded in enumerate(chunks):
            for key, value in zip(("method", "length", "base", "target"), coded.record, strict=True):
                records[key][index] = value
            changed += coded.changed
            unwritten.append(coded.data)
            size += len(coded.data)
            if size >= _WRITE_BYTES or index + 1 == plan.count:
                file.write_at(offset + position, *unwritten)
                position += size
                unwritten, size = [], 0
        file.write_at(offset, records.tobytes())
        is_same = plan.shared == plan.nbytes and not records["method"].any()
        return position, changed, is_same

    def _write_other_files(self, base_files: Sequence[FileRecord]) -> list[TargetFile]:
        """Store every file that is not a shard: by reference where the base has the same bytes."""
        in_base = {(record.size, record.sha256): record.path for record in reversed(base_files)}
        written = []
        for path in self._new.other_files:
            size = self._new.source.sizes[path]
            digest = self._digest(self._new.source, path, self._meter)
            source = in_base.get((size, digest))
            if source is not None:
                written.append(TargetFile(path, size, digest, "base", source))
            else:
                written.append(self._store(path, size, digest))
        return written

    def _store(self, path: str, size: int, digest: str) -> TargetFile:
        """Copy one file into the delta, compressed if that is worth it."""
        stored = f"files/{path}"
        if size >= _WORTH_COMPRESSING and self._may_be_compressed(path):
            level = 9 if size < (64 << 20) else 3
            blocks = codec.compress_blocks(self._new.source.blocks(path), level)
            if self._write_blocks(f"{stored}.zst", blocks, limit=int(size * _WORTH_SAVING)):
                return TargetFile(path, size, digest, "zstd", f"{stored}.zst")
        self._write_blocks(stored, self._new.source.blocks(path))
        return TargetFile(path, size, digest, "verbatim", stored)

    def _may_be_compressed(self, path: str) -> bool:
        """Whether ``path`` with .zst is a name of its own: no other file's or folder's, on any file system,
        and not too long."""
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

    def write_manifest(self, manifest: Manifest) -> None:
        """The model card and, last of all, the manifest: with it the delta is whole."""
        self._folder.remove_claims(keep=[file.path for file in manifest.files])
        self._folder.claim([cards.CARD_NAME, MANIFEST_NAME])
        for path, content in (
            (cards.CARD_NAME, cards.write_card(manifest)),
            (MANIFEST_NAME, Manifest.from_json(manifest.to_json()).to_json()),  # checked as a reader would
        ):
            with self._folder.create(path) as file:
                file.write_at(0, content)
                file.commit()

    def _write_blocks(self, path: str, blocks: Iterable[bytes], limit: float = float("inf")) -> bool:
        """Write a file of the delta, unless it grows beyond ``limit`` bytes. Returns whether it stands."""
        with self._folder.create(path) as file:
            position = 0
            for block in self._workers.watch(blocks):
                if position + len(block) > limit:
                    return False
                file.write_at(position, block)
                position += len(block)
            self._finish(file)
        return True

    def _finish(self, file: PartialFile) -> FileRecord:
        record = FileRecord(file.path, *file.digest())
        self._folder.claim([file.path])
        file.commit()
        self.files.append(record)
        return record


class _Digests:
    """SHA-256 of a target's shard, and of the base's shard that is read along with it, if there is one."""

    def __init__(self, shard: Shard, base: Shard | None, workers: Workers) -> None:
        self._target = hashlib.sha256(shard.header.raw)
        self._base = hashlib.sha256(base.header.raw) if base else None
        self._workers = workers
        self._unfinished: tuple[Callable[[], None], ...] = ()  # the base's hash is taken meanwhile

    def update(self, batch: _Batch, buffers: Buffers) -> None:
        """Take in what was read next, and give its memory to ``buffers``."""
        self._finish()
        if self._base and batch.base.size:
            hashed = self._workers.aside(partial(self._base.update, batch.base.data))
            self._unfinished = hashed, partial(buffers.give, batch.base)
        else:
            buffers.give(batch.base)
        self._target.update(batch.target.data)
        buffers.give(batch.target)

    def _finish(self) -> None:
        """Wait until all of the base was taken in."""
        for call in self._unfinished:
            call()
        self._unfinished = ()

    @property
    def target(self) -> str:
        return self._target.hexdigest()

    @property
    def base(self) -> str:
        assert self._base
        self._finish()
        return self._base.hexdigest()


def _read_in_order(by_shard: Mapping[str, Sequence[Match]], old: Checkpoint) -> dict[str, Shard]:
    """The base's shards that are read from the first byte to the last while a target's shard is coded, by
    that one's path: they need not be read once more to be hashed."""
    found: dict[str, Shard] = {}
    for path, matches in by_shard.items():
        spans = _base_spans(matches)
        shard = old.shards[spans[0].path] if spans else None
        if shard and shard not in found.values() and old.source.published_sha256(shard.path) is None:
            ends = [Span(shard.path, 0, shard.header.data_start), *spans]
            in_order = all(a.path == b.path and a.end == b.start for a, b in pairwise(ends))
            if in_order and spans[-1].end == shard.file.size:
                found[path] = shard
    return found


def _base_spans(matches: Iterable[Match]) -> list[Span]:
    """What the matches are compared with, in the base's files."""
    return [
        m.base.span(0, codec.rescale(m.shared_bytes, m.target.info.dtype, m.base.info.dtype))
        for m in matches
        if m.base and m.shared_bytes
    ]


def _encode(rows: list[_Row], buffers: Buffers) -> _Batch:
    """Read and encode some rows of chunks."""
    target = buffers.take(sum(row.nbytes for row in rows))
    base = buffers.take(sum(row.base_bytes for row in rows))
    chunks: list[_Coded] = []
    position = base_position = 0
    for row in rows:
        new = target[position : position + row.nbytes]
        old = base[base_position : base_position + row.base_bytes]
        position, base_position = position + new.size, base_position + old.size
        chunks += _encode_row(row, new, old)
    return _Batch(chunks, target, base)


def _encode_row(row: _Row, target: NDArray[np.uint8], read: NDArray[np.uint8]) -> list[_Coded]:
    """Read a row's bytes of target and base, and encode its chunks; what another tensor stands for is only
    read."""
    match, dtype = row.match, row.match.target.info.dtype
    source, origin = dtype, row.plan.span(row.first)[0]
    match.target.read_into(origin, target)
    if match.base and row.has_base:
        source = match.base.info.dtype
        match.base.read_into(codec.rescale(origin, dtype, source), read)
    if match.like:
        return [_Coded((0, 0, 0, 0), b"", 0)] * (row.end - row.first)
    spans = [slice(*(place - origin for place in row.plan.span(i))) for i in range(row.first, row.end)]
    if not row.has_base:
        return [_encode_alone(target[span], dtype) for span in spans]
    base = codec.convert(read, source, dtype)
    compared = codec.compare_row(base, target, dtype, row.plan.chunk_bytes)
    sums = compared.base.tolist()
    if source != dtype:
        ends = [codec.rescale(span.stop, dtype, source) for span in spans]
        sums = [codec.checksum(part) for part in np.split(read, ends[:-1])]
    coded = []
    for span, base_sum, target_sum, changed in zip(spans, sums, *compared[1:], strict=True):
        method, data = codec.encode_chunk(base[span], target[span], dtype, changed=int(changed))
        coded.append(_Coded((method, len(data), base_sum, int(target_sum)), data, int(changed)))
    return coded


def _encode_alone(target: NDArray[np.uint8], dtype: str) -> _Coded:
    """Encode a chunk that has no base."""
    method, data = codec.encode_chunk(None, target, dtype)
    return _Coded((method, len(data), 0, codec.checksum(target)), data, 0)


def _entry(match: Match, is_same: bool, changed: int, payload_bytes: int, old: Checkpoint) -> TensorEntry:
    new = match.target.info
    reference = None
    if match.base and match.shared_bytes:
        twins = old.named(match.base.info.name)
        file = match.base.shard.path if len(twins) > 1 else None
        reference = BaseTensor(match.base.info.name, match.base.info.dtype, match.base.info.shape, file)
    return TensorEntry(
        name=new.name,
        file=match.target.shard.path,
        dtype=new.dtype,
        shape=new.shape,
        status=_status(match, is_same),
        base=reference,
        shared_bytes=match.shared_bytes,
        changed=changed,
        payload_bytes=payload_bytes,
        like=TargetTensor(match.like.info.name, match.like.shard.path) if match.like else None,
    )


def _status(match: Match, is_same: bool) -> Status:
    if match.like:
        return "duplicate"
    if match.base is None:
        return "added"
    if match.base.info.shape != match.target.info.shape:
        return "resized"
    if match.base.info.name != match.target.info.name:
        return "renamed"
    if not match.shared_bytes and match.target.info.nbytes:
        return "changed"  # a dtype without a rule to convert
    return "same" if is_same else "changed"


def _header_room(plans: Iterable[ChunkPlan], metadata: dict[str, str]) -> int:
    """Bytes that the delta shard's header may need: its payloads' size is known only after it."""
    return len(shard_header(sum(p.nbytes + p.count * codec.RECORD.itemsize for p in plans), metadata))
