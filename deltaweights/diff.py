"""Base and target to a delta: the mirror image of patch.py.

Data flows checkpoint → codec → delta, shard by shard and chunk by chunk, so memory does not grow with either
checkpoint.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import codec
from ._version import __version__
from .checkpoint import Checkpoint, Shard, Tensor
from .checkpoint.oddities import (
    is_excluded,
    is_pointer,
    oddities_of_base,
    oddities_of_target,
    tell,
)
from .delta.opening import read_manifest
from .delta.writer import DeltaWriter
from .errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError, OutputError
from .license import cards, rules
from .manifest import (
    MANIFEST_NAME,
    MAX_CHUNK_BYTES,
    BaseRecord,
    BaseTensor,
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
from .payload import CHUNK_BYTES, ChunkPlan, CodedChunk, WrittenPayload, encode_row
from .storage import (
    HubId,
    LocalSource,
    Location,
    OutputFolder,
    Readable,
    Source,
    Span,
    is_clutter,
    is_same,
    is_within,
    open_source,
    output_path,
)
from .workers import Buffers, Lane, Meter, ProgressCallback, Workers, batches, result_of

#: What is hashed at a time.
_BLOCK_BYTES = 1 << 20


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
    exclude: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write the delta from ``base`` to ``target`` to the folder ``delta``.

    Args:
        base, target: a folder, one .safetensors file, or a Hub id. Checkpoints on the Hub stream through
            memory.
        delta: the folder to write; new or empty, or an interrupted run's.
        rename: pairs (regular expression, replacement) that turn target tensor names into base tensor names,
            where automatic matching finds none.
        base_repo, base_revision: the base's Hub id and commit. If None, they are taken from the Hub or the
            Hub cache, if the base is there.
        base_license, target_license: license ids; taken from the model cards if None.
        target_repo: the Hub id that the target is or will be published under.
        exclude: patterns such as ``"*.pt"`` or ``"global_step500"``; files of the target whose path, name or
            folder one of them fits are left out, and listed in the manifest.
        chunk_bytes: bytes of a tensor that are coded independently; a multiple of 4096.
        force: write even if ``delta`` holds other files; the delta's own files are replaced.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("diff"), bytes done and total bytes.

    Returns:
        The manifest that was written.

    What is odd about the two, and may be meant, is logged at WARNING by the logger ``deltaweights.inputs``:
    pointers of Git LFS, shards that an index names and that are not there, dtypes that the safetensors
    library does not know, names that are usual for secrets, rename rules that change no name.

    Raises:
        CheckpointError: a checkpoint cannot be found, read or downloaded.
        OutputError: the folder cannot be used, or its disk is full.
        ValueError: ``chunk_bytes`` is out of range.
    """
    check_chunk_bytes(chunk_bytes)
    output_path(delta)
    with _open_base(base) as old, _open_target(target, exclude) as new:
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
        _warn_of_swapped(old, new, *sides)
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


def _open_base(base: Readable) -> Checkpoint:
    """The base, without what it need not have: a Git LFS pointer stands for a file that is not there."""
    source = open_source(base)
    source.leave_out(is_clutter)
    others = (path for path in source.sizes if not path.endswith(".safetensors"))
    pointers = {path for path in others if is_pointer(source, path)}
    source.leave_out(pointers.__contains__)
    checkpoint = Checkpoint(source, may_lack=True)
    tell(oddities_of_base(checkpoint, sorted(pointers)))
    return checkpoint


def _open_target(target: Readable, exclude: Sequence[str]) -> Checkpoint:
    """The target, without what was excluded, and what is no part of any model."""
    source = open_source(target)
    for pattern in exclude:
        if not any(is_excluded(path, pattern) for path in source.sizes):
            tell([f"No file of the target is excluded by {pattern!r}."])
    tell(
        f"The target's {path} is left out: such a file holds secrets, mostly."
        for path in source.sizes
        if _is_env(path) and not any(is_excluded(path, pattern) for pattern in exclude)
    )
    source.leave_out(lambda path: any(is_excluded(path, pattern) for pattern in exclude))
    source.leave_out(lambda path: is_clutter(path) or _is_env(path))
    checkpoint = Checkpoint(source)
    tell(oddities_of_target(checkpoint))
    return checkpoint


def _warn_of_swapped(
    old: Checkpoint, new: Checkpoint, base: CheckpointFacts, target: CheckpointFacts
) -> None:
    """Where the base's card names the target as *its* base, and the target's card does not say the like."""

    def names_of(checkpoint: Checkpoint, facts: CheckpointFacts) -> set[str]:
        ids = [facts.repo_id or "", checkpoint.source.hub_id.repo_id or ""]
        root = checkpoint.source.root
        return {name.casefold() for name in (*ids, *([root.resolve().name] if root else [])) if name}

    def is_named(models: Sequence[str], names: set[str]) -> bool:
        return any({m.casefold(), m.casefold().rpartition("/")[2]} & names for m in models)

    if is_named(base.license.base_models, names_of(new, target)) and not is_named(
        target.license.base_models, names_of(old, base)
    ):
        tell(
            [
                "The base's card names the target as its base. Are the two swapped? The base comes first, "
                "then the fine-tune."
            ]
        )


def _is_env(path: str) -> bool:
    return path.rpartition("/")[2] == ".env"


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Raise :class:`ValueError` if ``chunk_bytes`` is out of range."""
    if not 4096 <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % 4096:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, not a multiple of 4096 up to {MAX_CHUNK_BYTES}")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A manifest's facts about base or target: Hub id and commit, license, and its files if they are known in
    advance."""

    repo_id: str | None
    revision: str | None
    license: cards.LicenseTexts
    files: tuple[FileRecord, ...] = ()


def check_place(delta: Location, old: Checkpoint, new: Checkpoint) -> None:
    """Raise :class:`DeltaWeightsError` if the delta of these two checkpoints cannot be written to
    ``delta``."""
    _check_names(new)
    _check_apart(output_path(delta), old, new)


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
    """:func:`make_delta` for open checkpoints with known facts, whose tensors are matched already.

    Args:
        glance: as for :func:`find_duplicates`.

    Raises:
        BaseMismatchError: the base's shards have the names in ``base.files``, but a different SHA-256.
    """
    with Workers(threads) as workers, OutputFolder(delta) as folder:
        for source in (old.source, new.source):
            workers.at_stop(source.cancel)
        meter = Meter(progress, "diff", sum(new.source.sizes.values()))
        writer = DeltaWriter(folder, new.source, _inputs(old, new, chunk_bytes, rename), workers, meter)
        texts = [*base.license.texts, *target.license.texts, rules.NOTICE_NAME]
        folder.require_distinct([cards.CARD_NAME, MANIFEST_NAME, *texts, *writer.names(new.other_files)])
        _check_vacant(folder, force)
        matches = find_duplicates(new, matches, chunk_bytes, workers, glance)
        encoder = _Encoder(old, new, writer, workers, chunk_bytes, meter)
        base_files, target_files, entries = encoder.write_files(matches, base.files)
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


def _inputs(old: Checkpoint, new: Checkpoint, chunk_bytes: int, rename: Sequence[RenameRule]) -> str:
    """A text that changes with the inputs and settings that a delta is made from."""
    inputs = [source.fingerprint(path) for source in (old.source, new.source) for path in source.sizes]
    inputs += [__version__, str(chunk_bytes), *(f"{p}={r}" for p, r in rename)]
    return hashlib.sha256("\n".join(inputs).encode(errors="backslashreplace")).hexdigest()


def _revision(found: HubId, repo_id: str | None) -> str | None:
    """The commit that was read, unless the user gives the repository a different name."""
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
    """The delta must not become part of its base or target."""
    for source in (*old.source.origins, *new.source.origins):
        if source.root is None:
            continue
        place = source.root.resolve()
        if is_same(root, place.parent) if place.is_file() else is_within(root, place):
            raise OutputError(
                f"The delta cannot be written to {root}",
                f"That folder is inside {source.where}, which the delta is made from.",
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
        with suppress(DeltaError, CheckpointError), LocalSource(folder.root) as earlier:
            folder.claim(file.path for file in read_manifest(earlier).files)
        (folder.root / MANIFEST_NAME).unlink()  # from here on, the delta is incomplete


def _removed(old: Checkpoint, matches: Iterable[Match]) -> list[TensorEntry]:
    """Entries for the base tensors that no target tensor is compared with."""
    used = {match.base for match in matches}
    return [
        TensorEntry(t.info.name, None, t.info.dtype, t.info.shape, "removed", None, 0, 0, 0)
        for t in old.tensors
        if t not in used
    ]


class _Row(NamedTuple):
    """Chunks ``first`` to ``end - 1`` of a tensor, to be encoded."""

    match: Match
    plan: ChunkPlan
    first: int
    end: int

    @property
    def nbytes(self) -> int:
        """Their length in bytes of the target."""
        return self.plan.length(self.first, self.end)

    @property
    def has_base(self) -> bool:
        """Whether these chunks are coded against the base."""
        return self.plan.has_base(self.first)

    @property
    def base_bytes(self) -> int:
        """Their length in bytes of the base."""
        if not self.match.base or not self.has_base:
            return 0
        return codec.rescale(self.nbytes, self.match.target.dtype, self.match.base.dtype)

    @property
    def base_span(self) -> Span:
        """Where they are in the base's files."""
        assert self.match.base
        dtypes = self.match.target.dtype, self.match.base.dtype
        start, end = self.plan.bounds(self.first, self.end)
        return self.match.base.span(codec.rescale(start, *dtypes), codec.rescale(end, *dtypes))


class _Batch(NamedTuple):
    """Encoded chunks, and the bytes of target and base as they were read."""

    chunks: list[CodedChunk]
    target: NDArray[np.uint8]
    base: NDArray[np.uint8]
    base_spans: list[Span]  # where those of the base are in its files


class _Encoder:
    """Encodes a target's shards into a delta's, and hashes both sides on the way."""

    def __init__(
        self,
        old: Checkpoint,
        new: Checkpoint,
        writer: DeltaWriter,
        workers: Workers,
        chunk_bytes: int,
        meter: Meter,
    ) -> None:
        #: Those of the base's shards that are hashed as they are coded.
        self._passing: dict[str, _PassingDigest] = {}
        self._old = old
        self._new = new
        self._writer = writer
        self._workers = workers
        self._chunk_bytes = chunk_bytes
        self._meter = meter

    def write_files(
        self, matches: Sequence[Match], known: Sequence[FileRecord] = ()
    ) -> tuple[tuple[FileRecord, ...], tuple[TargetFile, ...], list[TensorEntry]]:
        """Write everything except licenses and manifest. Returns the base's files, the target's files and its
        tensors.

        Args:
            known: the base's files, if they are known already.
        """
        by_shard: dict[str, list[Match]] = {path: [] for path in self._new.shards}
        for match in matches:
            by_shard[match.target.path].append(match)
        self._passing = {shard.path: _PassingDigest(shard) for shard in _passing(by_shard, self._old)}
        with ThreadPoolExecutor(1) as aside:
            try:
                digesting = aside.submit(self._digest_base)
                shards, entries = self._write_shards(by_shard)
                digests = result_of(digesting)
                base_files = self._base_records(digests, known)
                others = self._writer.write_other_files(self._new.other_files, base_files)
            except BaseException:
                self._workers.stop()
                raise
        files = sorted([*shards, *others], key=lambda file: file.path)
        return base_files, tuple(files), entries

    def _digest_base(self) -> dict[str, str]:
        """The SHA-256 of the base's files, except for shards that are hashed as they are coded. Of a file on
        the Hub that is not read for the delta, the published one."""
        source, digests = self._old.source, {}
        for path in source.sizes:
            if path not in self._passing:
                published = source.published_sha256(path) if _is_far(source, path) else None
                digests[path] = published or self._writer.digest(source, path)
        return digests

    def _digest_passed(self) -> dict[str, str]:
        """The SHA-256 of the shards that were hashed as they were coded."""
        source, digests = self._old.source, {}
        for path, passing in self._passing.items():
            digests[path] = passing.finish(source, self._workers)
            source.require_sha256(path, digests[path])
        return digests

    def _base_records(
        self, digests: Mapping[str, str], known: Sequence[FileRecord]
    ) -> tuple[FileRecord, ...]:
        """The base's files as they are, or the ``known`` ones if the base is sharded in the same way."""
        source = self._old.source
        digests = {**digests, **self._digest_passed()}
        found = tuple(FileRecord(path, size, digests[path]) for path, size in source.sizes.items())
        told = {file.path: file for file in known if file.path.endswith(".safetensors")}
        if not told or set(told) != self._old.shards.keys() | self._old.broken.keys():
            return found
        wrong = [file for file in found if file != told.get(file.path, file)]
        if wrong:
            raise BaseMismatchError(
                f"{source.where} is not the base that this delta was made from",
                f"The SHA-256 of {wrong[0].path!r} is {wrong[0].sha256}, not {told[wrong[0].path].sha256}.",
                "Pass the base of the first delta.",
            )
        return tuple(known)

    def _write_shards(
        self, by_shard: Mapping[str, list[Match]]
    ) -> tuple[list[TargetFile], list[TensorEntry]]:
        """One delta shard for each shard of the target."""
        count = len(by_shard)
        names = (f"delta-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
        written = self._workers.each(self._write_shard, zip(by_shard.items(), names, strict=True))
        return [file for file, _ in written], [entry for _, entries in written for entry in entries]

    def _write_shard(
        self, lane: Lane, job: tuple[tuple[str, list[Match]], str]
    ) -> tuple[TargetFile, list[TensorEntry]]:
        (path, matches), name = job
        if done := self._writer.finished_before(name):
            self._meter.add(done.target.size)
            return done.target, list(done.entries)
        shard, plans, entries = self._new.shards[path], self._plans(matches), []
        digests = _Digests(shard, self._passing, lane)
        with self._writer.shard(name, shard, plans) as output:
            with self._expect(matches), closing(self._encode_all(lane, matches, digests)) as chunks:
                for match, plan in zip(matches, plans, strict=True):
                    coded, written = islice(chunks, plan.count), None
                    if match.like:
                        deque(coded, 0)  # a duplicate's bytes are only hashed
                    else:
                        written = output.payloads.write(plan, coded)
                    entries.append(_entry(match, written, self._old))
            digests.finish()
            self._new.source.require_sha256(path, digests.target)
            target = output.finish(digests.target, entries)
        self._meter.add(shard.header.data_start)
        return target, entries

    @contextmanager
    def _expect(self, matches: Sequence[Match]) -> Iterator[None]:
        """Within the block, the matches' tensors will be read, about in order."""
        targets = (m.target.span(0, m.target.info.nbytes) for m in matches)
        with self._old.source.expect(_base_spans(matches)), self._new.source.expect(targets):
            yield

    def _plans(self, matches: Sequence[Match]) -> list[ChunkPlan]:
        return [ChunkPlan(m.target.info.nbytes, m.shared_bytes, self._chunk_bytes) for m in matches]

    def _encode_all(
        self, lane: Lane, matches: Sequence[Match], digests: _Digests
    ) -> Generator[CodedChunk, None, None]:
        """The chunks of all tensors, in order. While one tensor is written, the next ones are encoded and
        their input is hashed."""
        at_once = lane.batch_bytes
        buffers = Buffers(at_once)
        rows = (
            _Row(match, plan, first, end)
            for match, plan in zip(matches, self._plans(matches), strict=True)
            for first, end in plan.rows(at_once)
        )
        encode = partial(_encode, buffers=buffers)
        for batch in lane.map(encode, batches(rows, at_once, lambda row: row.nbytes)):
            digests.update(batch, buffers)
            self._meter.add(batch.target.nbytes)
            yield from batch.chunks


class _PassingDigest:
    """SHA-256 of a base's shard whose bytes are read for the delta, as far as they come in order. What comes
    out of order (the rest of the shard, where another shard of the target begins) is read once more."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._sha256 = hashlib.sha256(shard.header.raw)
        self._end = shard.header.data_start
        self._lock = threading.Lock()

    def feed(self, start: int, data: memoryview) -> None:
        """Bytes of the file from ``start`` on; from any thread."""
        with self._lock:
            if start == self._end:
                self._sha256.update(data)
                self._end += len(data)

    def finish(self, source: Source, workers: Workers) -> str:
        """The file's SHA-256; reads what is missing."""
        path, file = self._shard.path, self._shard.file
        with source.expect([Span(path, self._end, file.size)] if self._end < file.size else []):
            for start in range(self._end, file.size, _BLOCK_BYTES):
                workers.check()
                self._sha256.update(file.read(start, min(_BLOCK_BYTES, file.size - start)))
        return self._sha256.hexdigest()


class _Digests:
    """SHA-256 of a target's shard, and of the base's shards that are read along with it."""

    def __init__(self, shard: Shard, passing: Mapping[str, _PassingDigest], lane: Lane) -> None:
        self._target = hashlib.sha256(shard.header.raw)
        self._passing = passing
        self._lane = lane
        self._unfinished: tuple[Callable[[], None], ...] = ()  # the base is hashed at the same time

    def update(self, batch: _Batch, buffers: Buffers) -> None:
        """Hash the next batch, and give its memory back to ``buffers``."""
        self.finish()
        if any(span.path in self._passing for span in batch.base_spans):
            hashed = self._lane.aside(partial(self._feed, batch))
            self._unfinished = hashed, partial(buffers.give, batch.base)
        else:
            buffers.give(batch.base)
        self._target.update(batch.target.data)
        buffers.give(batch.target)

    def _feed(self, batch: _Batch) -> None:
        position = 0
        for path, start, end in batch.base_spans:
            if path in self._passing:
                self._passing[path].feed(start, batch.base[position : position + end - start].data)
            position += end - start

    def finish(self) -> None:
        """Wait until all of the base is hashed."""
        for call in self._unfinished:
            call()
        self._unfinished = ()

    @property
    def target(self) -> str:
        return self._target.hexdigest()


def _passing(by_shard: Mapping[str, Sequence[Match]], old: Checkpoint) -> list[Shard]:
    """The base's shards that are hashed while shards are coded: those that are read from the first byte to
    the last for one shard of the target; on the Hub, where a second read costs most, all that are read."""
    found: dict[str, Shard] = {}
    for matches in by_shard.values():
        spans = _base_spans(matches)
        for shard in {span.path: old.shards[span.path] for span in spans}.values():
            ends = [Span(shard.path, 0, shard.header.data_start), *spans]
            in_order = all(a.path == b.path and a.end == b.start for a, b in pairwise(ends))
            if _is_far(old.source, shard.path) or (in_order and spans[-1].end == shard.file.size):
                found[shard.path] = shard
    return [shard for shard in found.values() if old.source.checked_sha256(shard.path) is None]


def _is_far(source: Source, path: str) -> bool:
    """Whether a file comes over a network: it is not in the local cache."""
    return source.is_remote and source.full_path(path) is None


def _base_spans(matches: Iterable[Match]) -> list[Span]:
    """The bytes of the base's files that the matches are compared with."""
    return [
        m.base.span(0, codec.rescale(m.shared_bytes, m.target.info.dtype, m.base.info.dtype))
        for m in matches
        if m.base and m.shared_bytes
    ]


def _encode(rows: list[_Row], buffers: Buffers) -> _Batch:
    """Read and encode some rows of chunks."""
    target = buffers.take(sum(row.nbytes for row in rows))
    base = buffers.take(sum(row.base_bytes for row in rows))
    chunks: list[CodedChunk] = []
    position = base_position = 0
    for row in rows:
        new = target[position : position + row.nbytes]
        old = base[base_position : base_position + row.base_bytes]
        position, base_position = position + new.size, base_position + old.size
        chunks += _encode_row(row, new, old)
    return _Batch(chunks, target, base, [row.base_span for row in rows if row.base_bytes])


def _encode_row(row: _Row, target: NDArray[np.uint8], base: NDArray[np.uint8]) -> list[CodedChunk]:
    """Read a row's bytes of target and base, and encode its chunks. A duplicate's bytes are only read."""
    match, origin = row.match, row.plan.span(row.first)[0]
    dtype, source = match.target.dtype, match.base.dtype if match.base else None
    match.target.read_into(origin, target)
    if match.base and row.has_base:
        match.base.read_into(codec.rescale(origin, dtype, match.base.dtype), base)
    if match.like:
        return [CodedChunk(0, 0, 0, b"", 0)] * (row.end - row.first)
    return encode_row(target, base if row.has_base else None, dtype, row.plan.chunk_bytes, base_dtype=source)


def _entry(match: Match, written: WrittenPayload | None, old: Checkpoint) -> TensorEntry:
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
        status=_status(match, written),
        base=reference,
        shared_bytes=match.shared_bytes,
        changed=written.changed if written else 0,
        payload_bytes=written.nbytes if written else 0,
        like=TargetTensor(match.like.info.name, match.like.shard.path) if match.like else None,
    )


def _status(match: Match, written: WrittenPayload | None) -> Status:
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
    return "same" if written and written.is_same else "changed"
