"""Base and target to a delta: the mirror image of patch.py.

Data flows checkpoint → codec → delta, shard by shard and chunk by chunk, so memory does not grow with either
checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import islice, tee

import msgspec

from ._version import __version__
from .checkpoint import Checkpoint, Tensor
from .codec import Effort
from .delta.digests import PassingDigest, ShardDigests, base_spans, is_far, passing_shards
from .delta.encoding import ChunkRow, encode_rows
from .delta.entry import entry_of, removed_entries
from .delta.opening import read_manifest
from .delta.writer import DeltaWriter
from .entries import TensorEntry
from .errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError, OutputError
from .inputs import CheckpointFacts, facts_of, match_inputs, open_base, open_target
from .license import cards, rules
from .manifest import (
    MANIFEST_NAME,
    MAX_CHUNK_BYTES,
    BaseRecord,
    FileRecord,
    Manifest,
    RepoId,
    Revision,
    TargetFile,
    TargetRecord,
    Tool,
    is_safe_path,
)
from .match.duplicates import find_duplicates
from .match.low_rank import search_bytes, with_low_rank
from .match.names import Match, RenameRule
from .match.quantized import find_quantized
from .metrics import timed_operation, timed_stage
from .payload import CHUNK_BYTES, ChunkPlan, CodedChunk
from .storage import Destination, Location, Readable, open_output
from .workers import Buffers, Lane, MemoryBudget, Meter, ProgressCallback, Workers, batches, result_of

_log = logging.getLogger(__name__)

#: Memory for searches in several tensors at once: two of the largest.
_SEARCHES_BYTES = 576 << 20


@timed_operation("diff")
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
    effort: Effort = "default",
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write the delta from ``base`` to ``target`` to the folder ``delta``.

    Args:
        base, target: a folder, one .safetensors file, a Hub id, or a URL of a store. What is far away streams
            through memory.
        delta: the folder to write, or the URL of a place in a store; new or empty, or an interrupted run's.
        rename: pairs (regular expression, replacement) that turn target tensor names into base tensor names,
            where automatic matching finds none.
        base_repo, base_revision: the base's Hub id and commit. If None, they are taken from the Hub or the
            Hub cache, if the base is there.
        base_license, target_license: license ids; taken from the model cards if None.
        target_repo: the Hub id that the target is or will be published under.
        exclude: patterns such as ``"*.pt"`` or ``"global_step500"``; files of the target whose path, name or
            folder one of them fits are left out, and listed in the manifest.
        chunk_bytes: bytes of a tensor that are coded independently; a multiple of 4096.
        effort: how long to fit what merged adapters added, where a glance finds such: "fast", "default" or
            "max". The result is the same for one machine and effort.
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
    open_output(delta)
    with open_base(base) as old, open_target(target, exclude) as new:
        check_place(delta, old, new)
        _check_hub_ids(base_repo, target_repo, base_revision)
        sides = (
            facts_of(old, "base", base_repo, base_revision, base_license),
            facts_of(new, "target", target_repo, None, target_license),
        )
        return write_delta(
            old,
            new,
            delta,
            match_inputs(old, new, *sides, rename),
            *sides,
            rename=rename,
            chunk_bytes=chunk_bytes,
            effort=effort,
            force=force,
            threads=threads,
            progress=progress,
        )


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Raise :class:`ValueError` if ``chunk_bytes`` is out of range."""
    if not 4096 <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % 4096:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, not a multiple of 4096 up to {MAX_CHUNK_BYTES}")


def check_place(delta: Location, old: Checkpoint, new: Checkpoint) -> None:
    """Raise :class:`DeltaWeightsError` if the delta of these two checkpoints cannot be written to
    ``delta``."""
    _check_names(new)
    _check_apart(open_output(delta), old, new)


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
    effort: Effort,
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
    with Workers(threads) as workers, open_output(delta) as folder:
        workers.at_stop(folder.cancel)
        for source in (old.source, new.source):
            workers.at_stop(source.cancel)
        meter = Meter(progress, "diff", sum(new.source.sizes.values()))
        writer = DeltaWriter(
            folder, new.source, _inputs(old, new, chunk_bytes, effort, rename), workers, meter
        )
        texts = [*base.license.texts, *target.license.texts, rules.NOTICE_NAME]
        folder.require_distinct([cards.CARD_NAME, MANIFEST_NAME, *texts, *writer.names(new.other_files)])
        _check_vacant(folder, force)
        matches = find_quantized(matches, old, new)
        matches = find_duplicates(new, matches, chunk_bytes, workers, glance)
        for side, checkpoint in (("base", old), ("target", new)):
            facts = checkpoint.source.where, len(checkpoint.shards), len(checkpoint.tensors)
            _log.info("the %s is %s: %d shards, %d tensors", side, *facts)
        encoder = _Encoder(old, new, writer, workers, chunk_bytes, effort, meter)
        base_files, target_files, entries = encoder.write_files(matches, base.files)
        base_record = BaseRecord(base.repo_id, base.revision, base.license.license, base_files)
        target_record = TargetRecord(
            target.repo_id, target.revision, target.license.license, target_files, new.source.left_out
        )
        manifest = Manifest(
            base=base_record,
            target=target_record,
            license=writer.write_licenses(base_record, target_record, base.license, target.license),
            tensors=(*entries, *removed_entries(old, matches)),
            files=tuple(sorted(writer.files, key=lambda file: file.path)),
            tool=Tool("deltaweights", __version__),
            chunk_bytes=chunk_bytes,
        )
        writer.write_manifest(manifest)
        _log.info("wrote the delta to %s: %d bytes", folder.where, manifest.delta_bytes)
        return manifest


def _inputs(
    old: Checkpoint, new: Checkpoint, chunk_bytes: int, effort: Effort, rename: Sequence[RenameRule]
) -> str:
    """A text that changes with the inputs and settings that a delta is made from."""
    inputs = [source.fingerprint(path) for source in (old.source, new.source) for path in source.sizes]
    inputs += [__version__, str(chunk_bytes), effort, *(f"{p}={r}" for p, r in rename)]
    return hashlib.sha256("\n".join(inputs).encode(errors="backslashreplace")).hexdigest()


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


def _check_apart(folder: Destination, old: Checkpoint, new: Checkpoint) -> None:
    """The delta must not become part of its base or target."""
    for source in (*old.source.origins, *new.source.origins):
        if folder.is_inside(source) or folder.holds(source):
            raise OutputError(
                f"The delta cannot be written to {folder.where}",
                f"That folder is inside {source.where}, which the delta is made from.",
                "Choose a folder outside the base and the target.",
            )


def _check_vacant(folder: Destination, force: bool) -> None:
    others = folder.foreign(folder.claims)
    if others and not force:
        raise OutputError(
            f"{folder.where} is not empty",
            f"It holds {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}.",
            "Choose a new folder, or pass force=True to write there; an earlier delta is replaced.",
        )
    if folder.exists(MANIFEST_NAME):
        folder.claim([MANIFEST_NAME, cards.CARD_NAME])
        with suppress(DeltaError, CheckpointError), folder.source() as earlier:
            folder.claim(file.path for file in read_manifest(earlier).files)
        folder.remove(MANIFEST_NAME)  # from here on, the delta is incomplete


class _Encoder:
    """Encodes a target's shards into a delta's, and hashes both sides on the way."""

    def __init__(
        self,
        old: Checkpoint,
        new: Checkpoint,
        writer: DeltaWriter,
        workers: Workers,
        chunk_bytes: int,
        effort: Effort,
        meter: Meter,
    ) -> None:
        #: Those of the base's shards that are hashed as they are coded.
        self._passing: dict[str, PassingDigest] = {}
        self._old = old
        self._new = new
        self._writer = writer
        self._workers = workers
        self._chunk_bytes = chunk_bytes
        self._effort = effort
        self._searches = MemoryBudget(_SEARCHES_BYTES)
        self._meter = meter

    @timed_stage("encode")
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
        self._passing = {shard.path: PassingDigest(shard) for shard in passing_shards(by_shard, self._old)}
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
                published = source.published_sha256(path) if is_far(source, path) else None
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
            self._meter.skip(done.target.size)
            _log.info("%s: kept from an earlier run", path)
            return done.target, list(done.entries)
        shard, plans, entries = self._new.shards[path], self._plans(matches), list[TensorEntry]()
        digests = ShardDigests(shard, self._passing, lane)
        with self._writer.shard(name, shard, plans) as output:
            # Predictions are looked for while the tensors before are coded.
            for_entries, for_chunks = tee(lane.map(self._with_prediction, matches))
            planned = zip(for_chunks, plans, strict=True)
            with self._expect(matches), closing(self._encode_all(lane, planned, digests)) as chunks:
                for match, plan in zip(for_entries, plans, strict=True):
                    coded, written = islice(chunks, plan.count), None
                    if match.like:
                        deque(coded, 0)  # a duplicate's bytes are only hashed
                    else:
                        stored = match.prediction.stored if match.prediction else b""
                        written = output.payloads.write(plan, coded, prediction=stored)
                    entries.append(entry_of(match, written, self._old))
                    _log_tensor(entries[-1], plan)
            digests.finish()
            self._new.source.require_sha256(path, digests.target)
            target = output.finish(digests.target, entries)
        self._meter.add(shard.header.data_start)
        payloads = sum(entry.payload_bytes for entry in entries)
        sizes = len(entries), shard.file.size, payloads
        _log.info("%s: %d tensors, %d bytes, written as %d bytes of payloads to %s", path, *sizes, name)
        return target, entries

    @contextmanager
    def _expect(self, matches: Sequence[Match]) -> Iterator[None]:
        """Within the block, the matches' tensors will be read, about in order."""
        targets = (m.target.span(0, m.target.info.nbytes) for m in matches)
        with self._old.source.expect(base_spans(matches)), self._new.source.expect(targets):
            yield

    def _plans(self, matches: Sequence[Match]) -> list[ChunkPlan]:
        return [ChunkPlan(m.target.info.nbytes, m.shared_bytes, self._chunk_bytes) for m in matches]

    def _with_prediction(self, match: Match) -> Match:
        """The match, with a low-rank prediction where one pays. That takes several reads of both tensors, so
        none is looked for over a network."""
        if self._old.source.is_remote or self._new.source.is_remote:
            return match
        with self._searches.taking(search_bytes(match)):
            return with_low_rank(match, self._effort)

    def _encode_all(
        self, lane: Lane, planned: Iterable[tuple[Match, ChunkPlan]], digests: ShardDigests
    ) -> Generator[CodedChunk, None, None]:
        """The chunks of all tensors, in order. While one tensor is written, the next ones are encoded and
        their input is hashed."""
        at_once = lane.batch_bytes
        buffers = Buffers(at_once)
        rows = (
            ChunkRow(match, plan, first, end) for match, plan in planned for first, end in plan.rows(at_once)
        )
        encode = partial(encode_rows, buffers=buffers)
        for batch in lane.map(encode, batches(rows, at_once, lambda row: row.nbytes)):
            digests.update(batch, buffers)
            self._meter.add(batch.target.nbytes)
            yield from batch.chunks


def _log_tensor(entry: TensorEntry, plan: ChunkPlan) -> None:
    other = entry.base or entry.like
    counts = entry.changed, plan.count, plan.shared_count, entry.payload_bytes
    _log.debug(
        "%s: %s, %s %s, compared with %s: %d elements changed; %d chunks, %d with a base; payload: %d bytes",
        entry.name, entry.status, entry.dtype, list(entry.shape), other.name if other else "nothing", *counts,
    )  # fmt: skip
