"""Base and target to a delta: the mirror image of patch.py.

Data flows checkpoint → codec → delta, shard by shard and chunk by chunk, so memory does not grow with either
checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import msgspec

from ._version import __version__
from .changes import PICTURE_NAME
from .checkpoint import Checkpoint, Tensor
from .codec import Effort
from .delta.digests import PassingDigest, digested_along, digested_apart, is_far, passing_shards
from .delta.encoder import ShardEncoder
from .delta.encoding_tasks import DiffSetting, DigestJob, JobDone, PinnedPair, ShardJob, do_job
from .delta.entry import removed_entries
from .delta.opening import read_manifest
from .delta.writer import DeltaWriter
from .entries import TensorEntry
from .errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError, OutputError
from .executors import Executor
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
from .match.names import Match, RenameRule
from .match.quantized import find_quantized
from .metrics import timed_operation, timed_stage
from .payload import CHUNK_BYTES
from .storage import Destination, Location, Readable, open_output
from .workers import Meter, ProgressCallback, Workers, result_of

_log = logging.getLogger(__name__)

#: The matches of each of the target's shards, by its path.
_ByShard = Mapping[str, list[Match]]


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
    executor: Executor | None = None,
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
        executor: encodes the shards elsewhere, one task each, such as a :class:`RayExecutor`. Its machines
            read base and target, and write to ``delta``. The result is the same.
        progress: called with a phase ("diff"), bytes done and total bytes.

    Returns:
        The manifest that was written.

    What is odd about the two, and may be meant, is logged at WARNING by the logger ``deltaweights.inputs``:
    pointers of Git LFS, shards that an index names and that are not there, dtypes that the safetensors
    library does not know, names that are usual for secrets, rename rules that change no name.

    Raises:
        CheckpointError: a checkpoint cannot be found, read or downloaded.
        OutputError: the folder cannot be used, or its disk is full.
        ExecutorError: the executor's machines cannot be reached, or do not see the same files.
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
            executor=executor,
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
    executor: Executor | None,
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
        inputs = _inputs(old, new, chunk_bytes, effort, rename)
        writer = DeltaWriter(folder, new.source, inputs, workers, meter)
        texts = [*base.license.texts, *target.license.texts, rules.NOTICE_NAME, PICTURE_NAME]
        folder.require_distinct([cards.CARD_NAME, MANIFEST_NAME, *texts, *writer.names(new.other_files)])
        _check_vacant(folder, force)
        matches = find_quantized(matches, old, new)
        matches = find_duplicates(new, matches, chunk_bytes, workers, glance)
        for side, checkpoint in (("base", old), ("target", new)):
            facts = checkpoint.source.where, len(checkpoint.shards), len(checkpoint.tensors)
            _log.info("the %s is %s: %d shards, %d tensors", side, *facts)
        tasks = None
        if executor:
            threads = executor.cpus_per_task
            pair, output = PinnedPair.of(old, new), folder.share()
            tasks = _Tasks(executor, DiffSetting(pair, output, inputs, chunk_bytes, effort, threads))
        encoder = _Encoder(old, new, writer, workers, chunk_bytes, effort, meter, tasks)
        base_files, target_files, entries = encoder.write_files(matches, base.files)
        base_record = BaseRecord(base.repo_id, base.revision, base.license.license, base_files)
        target_record = TargetRecord(
            target.repo_id, target.revision, target.license.license, target_files, new.source.left_out
        )
        tensors = (*entries, *removed_entries(old, matches))
        writer.write_picture(tensors)
        manifest = Manifest(
            base=base_record,
            target=target_record,
            license=writer.write_licenses(base_record, target_record, base.license, target.license),
            tensors=tensors,
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


class _Tasks(NamedTuple):
    """Where a diff's tasks run, and what they have in common."""

    executor: Executor
    setting: DiffSetting


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
        tasks: _Tasks | None,
    ) -> None:
        #: Those of the base's shards that are hashed as they are coded.
        self._passing: dict[str, PassingDigest] = {}
        self._old = old
        self._new = new
        self._writer = writer
        self._workers = workers
        self._chunk_bytes = chunk_bytes
        self._effort = effort
        self._meter = meter
        self._tasks = tasks

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
        try:
            if self._tasks:
                shards, entries, digests = self._write_elsewhere(by_shard, self._tasks)
            else:
                shards, entries, digests = self._write_here(by_shard)
            base_files = self._base_records(digests, known)
            others = self._writer.write_other_files(self._new.other_files, base_files)
        except BaseException:
            self._workers.stop()
            raise
        files = sorted([*shards, *others], key=lambda file: file.path)
        return base_files, tuple(files), entries

    def _write_here(self, by_shard: _ByShard) -> tuple[list[TargetFile], list[TensorEntry], dict[str, str]]:
        """Write the shards, and hash the base at the same time."""
        self._passing = {shard.path: PassingDigest(shard) for shard in passing_shards(by_shard, self._old)}
        with ThreadPoolExecutor(1) as aside:
            try:
                digesting = aside.submit(self._digest_base, self._passing.keys())
                shards, entries = self._write_shards(by_shard)
                return shards, entries, result_of(digesting) | self._digest_passed()
            except BaseException:
                self._workers.stop()
                raise

    def _write_elsewhere(
        self, by_shard: _ByShard, tasks: _Tasks
    ) -> tuple[list[TargetFile], list[TensorEntry], dict[str, str]]:
        """The same by tasks. The base's shards are hashed by them, too: along with one of the target, or by a
        task of their own."""
        along, names = digested_along(by_shard, self._old), _names(len(by_shard))
        jobs: list[ShardJob | DigestJob] = [
            ShardJob.of(path, name, matches, along.get(path))
            for (path, matches), name in zip(by_shard.items(), names, strict=True)
        ]
        apart = digested_apart(by_shard, self._old) - set(along.values())
        jobs += map(DigestJob, sorted(apart))
        self._writer.claim(names)
        digests, done = dict[str, str](), dict[int, JobDone]()
        for index, found in tasks.executor.each(partial(do_job, tasks.setting), jobs):
            digests |= found.digests
            if found.file and found.target:
                done[index] = found
                self._writer.files.append(found.file)
                (self._meter.skip if found.is_kept else self._meter.add)(found.target.size)
        digests |= self._digest_base({*along.values(), *apart})
        shards = [done[index].target for index in range(len(by_shard))]
        entries = [entry for index in range(len(by_shard)) for entry in done[index].entries]
        return [shard for shard in shards if shard], entries, digests

    def _digest_base(self, others: Collection[str]) -> dict[str, str]:
        """The SHA-256 of the base's files, except for ``others``. Of a file on the Hub that is not read for
        the delta, the published one."""
        source, digests = self._old.source, {}
        for path in source.sizes:
            if path not in others:
                published = source.published_sha256(path) if is_far(source, path) else None
                digests[path] = published or self._writer.digest(source, path)
        return digests

    def _digest_passed(self) -> dict[str, str]:
        """The SHA-256 of the shards that were hashed as they were coded."""
        source, digests = self._old.source, {}
        for path, passing in self._passing.items():
            digests[path] = passing.finish(source, self._workers)
            self._writer.require_base(source, path, digests[path])
        return digests

    def _base_records(
        self, digests: Mapping[str, str], known: Sequence[FileRecord]
    ) -> tuple[FileRecord, ...]:
        """The base's files as they are, or the ``known`` ones if the base is sharded in the same way."""
        source = self._old.source
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

    def _write_shards(self, by_shard: _ByShard) -> tuple[list[TargetFile], list[TensorEntry]]:
        """One delta shard for each shard of the target."""
        names = _names(len(by_shard))
        encoder = ShardEncoder(
            self._old, self._new, self._writer, self._chunk_bytes, self._effort, self._meter, self._passing
        )

        written = self._workers.each(
            lambda lane, job: encoder.write_shard(lane, *job),
            [(path, matches, name) for (path, matches), name in zip(by_shard.items(), names, strict=True)],
        )
        return [file for file, _ in written], [entry for _, entries in written for entry in entries]


def _names(count: int) -> list[str]:
    """The names of so many delta shards."""
    return [f"delta-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
