"""Checks a delta against its manifest, and reports every missing, extra or different file."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from .delta.chain import Deltas, check_continuity, connect, files_of_base, links, listed
from .delta.opening import read_manifest
from .delta.pinned import PinnedTarget
from .delta.target_recipe import TargetRecipe
from .errors import CheckpointError, DeltaWeightsError
from .executors import Executor, kept, workers_of
from .license.cards import CARD_NAME
from .manifest import MANIFEST_NAME, FileRecord, Manifest, TargetFile
from .metrics import timed_operation, timed_stage
from .patch import check_base, rebuild_shard, refuse_keeping
from .signing import UNSIGNED_NAMES, SignatureRequirement, SignedFiles, signed_files
from .signing.attestation import Attested, require_attested
from .storage import HubSource, Location, PinnedSource, Readable, Source, is_clutter, open_source, sha256_of
from .workers import Lane, Meter, ProgressCallback, Workers

_log = logging.getLogger(__name__)

#: Files that the Hub adds to a repository.
_HUBS_OWN = ".gitattributes"

#: Files of a delta that are not listed in its manifest.
_UNLISTED = frozenset({MANIFEST_NAME, CARD_NAME, _HUBS_OWN, *UNSIGNED_NAMES})


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One file that contradicts the manifest. ``place`` is one of: the delta's own files, the checkpoint
    given as target, the target as rebuilt from base and delta, the target as its own repository publishes
    it, the base that it was attested to come from."""

    place: Literal["delta", "target", "rebuilt", "published", "base"]
    path: str
    kind: Literal["missing", "extra", "different"]
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of :func:`verify_delta`.

    Attributes:
        checked: number of files compared with the manifest.
        problems: all problems found, sorted.
        published: number of files of a delta or target on the Hub of which only the published SHA-256 was
            compared, not the bytes.
        target_repo: the target's own repository at its commit, if its published SHA-256 were compared too.
        signed_by: who signed each delta, in words, if a signature was required.
        attested_by: who attested each delta, in words, if an attestation was required.
        attested_rebuilt: whether all of them had rebuilt the target before.
    """

    checked: int
    problems: tuple[Problem, ...]
    published: int = 0
    target_repo: str | None = None
    signed_by: tuple[str, ...] = ()
    attested_by: tuple[str, ...] = ()
    attested_rebuilt: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.problems


@timed_operation("verify")
def verify_delta(
    delta: Deltas,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    target: Location | None = None,
    require_signature: SignatureRequirement | None = None,
    require_attestation: SignatureRequirement | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check a delta against its manifest. Writes nothing.

    Args:
        delta: a folder, a Hub id, a URL or an open source, or several, as for :func:`apply_delta`. Their own
            files are always checked.
        base: if given, the target is rebuilt from it in memory and every file's SHA-256 is compared. With
            several deltas, this is the last one's target, and all of them must be intact. If base or delta is
            on the Hub and the manifest names the target's repository and commit, the SHA-256 published there
            are compared too.
        keep_base: as for :func:`apply_delta`.
        target: if given, a folder, file or Hub id whose files are compared with the target's.
        require_signature: who must have signed the delta, as for :func:`apply_delta`. Every file is compared
            with what was signed, also those that the manifest does not list, such as its page.
        require_attestation: who must have attested the delta, likewise. The statement is made again from the
            manifest, and compared; with ``base``, so are the target, each one between several deltas, and the
            SHA-256 of the base's files that the target can depend on.
        threads: number of threads; if None, the number of usable cores, at most 8.
        executor: reads and rebuilds elsewhere, one task a file, such as a :class:`RayExecutor`.
        progress: called with a phase, bytes done and total bytes: "verify delta", "verify target", "check
            base", "download base", "rebuild", "verify base".

    For a delta or target on the Hub, the published SHA-256 of a file is compared if there is one; only the
    other files are read.

    Raises:
        CheckpointError: base, target or delta cannot be found, read or downloaded.
        ManifestError: the manifest itself is damaged.
        SignatureError: a delta is not signed or attested as required.
        BaseMismatchError: ``base`` is the wrong one, or a delta does not follow the one before it.
        ExecutorError: the executor's machines cannot be reached, or do not see the same files.
    """
    if executor:
        refuse_keeping(keep_base)
    with ExitStack() as opened, Workers(threads) as workers:
        sources = [opened.enter_context(open_source(one)) for one in listed(delta)]
        manifests = [read_manifest(source) for source in sources]
        check_continuity(sources, manifests)
        signed = _signed(sources, manifests, require_signature)
        attested = _attested(sources, manifests, require_attestation)
        problems, checked, published = [], 0, 0
        for k, (source, manifest) in enumerate(zip(sources, manifests, strict=True)):
            _log.info("checking %s: %d files", source.where, len(manifest.files))
            workers.at_stop(source.cancel)
            found = _compare("delta", source, manifest.files, workers, executor, progress)
            found += _compare_signed(source, manifest, signed[k], workers) if signed else []
            # With several deltas, a name must say which one it belongs to.
            problems += [replace(p, path=source.name(p.path)) if sources[1:] else p for p in found]
            checked += len(manifest.files)
            published += _count_published(source, manifest.files)
        are_whole, target_repo = not problems, None
        if target is not None:
            with open_source(target) as other:
                _log.info("checking the target %s: %d files", other.where, len(manifest.target.files))
                workers.at_stop(other.cancel)
                problems += _compare("target", other, manifest.target.files, workers, executor, progress)
                published += _count_published(other, manifest.target.files)
            checked += len(manifest.target.files)
        if base is not None and (are_whole or not sources[1:]):
            with connect(sources, manifests, base) as view:
                workers.at_stop(view.cancel)
                if are_whole:
                    check_base(view, workers, keep=keep_base, progress=progress)
                problems += _compare_rebuilt(view, workers, executor, progress)
                if attested:
                    others, count = compare_materials(view, workers, executor, progress)
                    problems, checked = problems + others, checked + count
                if view.is_remote:
                    target_repo = _compare_published(manifest, problems)
            checked += len(manifest.target.files)
    _log.info("checked %d files: %d problems", checked, len(problems))
    return VerifyReport(
        checked,
        tuple(sorted(problems)),
        published,
        target_repo,
        tuple(one.by for one in signed),
        tuple(one.by for one in attested),
        bool(attested) and all(one.is_rebuilt for one in attested),
    )


def _signed(
    sources: list[Source], manifests: list[Manifest], requirement: SignatureRequirement | None
) -> list[SignedFiles]:
    """What each delta's signature says, if one is required."""
    found = [] if requirement is None else [signed_files(source, requirement) for source in sources]
    for signed, manifest in zip(found, manifests, strict=False):
        signed.require(manifest)
    return found


def _attested(
    sources: list[Source], manifests: list[Manifest], requirement: SignatureRequirement | None
) -> list[Attested]:
    """What each delta's attestation says, if one is required."""
    if requirement is None:
        return []
    pairs = zip(sources, manifests, strict=True)
    return [require_attested(source, manifest, requirement) for source, manifest in pairs]


def _compare_signed(
    source: Source, manifest: Manifest, signed: SignedFiles, workers: Workers
) -> list[Problem]:
    """Compare what the manifest does not list, such as the page, with what was signed."""
    listed = {MANIFEST_NAME, *(record.path for record in manifest.files)}
    problems = []
    for path, sha256 in sorted(signed.digests.items()):
        if path in listed:
            continue
        if path not in source.sizes:
            problems.append(Problem("delta", path, "missing", "it was signed"))
        elif sha256_of(workers.watch(source.blocks(path))) != sha256:
            problems.append(Problem("delta", path, "different", "is not the file that was signed"))
    if CARD_NAME in source.sizes and CARD_NAME not in signed.digests:
        problems.append(Problem("delta", CARD_NAME, "extra", "was not signed"))
    return problems


def _count_published(source: Source, records: Iterable[FileRecord | TargetFile]) -> int:
    return sum(source.published_sha256(record.path) is not None for record in records)


@timed_stage("compare files")
def _compare(
    place: Literal["delta", "target", "base"],
    source: Source,
    records: Iterable[FileRecord | TargetFile],
    workers: Workers,
    executor: Executor | None,
    progress: ProgressCallback | None,
) -> list[Problem]:
    """Compare the files of ``source`` with their records."""
    expected = {record.path: record for record in records}
    meter = Meter(progress, f"verify {place}", sum(record.size for record in expected.values()))
    extra = set(source.sizes) - set(expected)
    if place == "delta":
        extra -= _UNLISTED
    elif source.is_remote:
        extra -= {_HUBS_OWN}
    extra = {path for path in extra if not is_clutter(path)}
    problems = [Problem(place, path, "extra", "is not in the manifest") for path in extra]

    digests = _digests_elsewhere(source, expected.values(), meter, executor) if executor else {}

    def compare(lane: Lane, record: FileRecord | TargetFile) -> Problem | None:
        size = source.sizes.get(record.path)
        if size != record.size:
            meter.skip(record.size)
        if size is None:
            return Problem(place, record.path, "missing", f"{record.size} bytes are expected")
        if size != record.size:
            return Problem(place, record.path, "different", f"has {size} bytes, not {record.size}")
        digest = source.published_sha256(record.path)
        if digest:
            meter.add(size)
        elif record.path in digests:
            digest = digests[record.path]
        else:
            digest = sha256_of(lane.watch(source.blocks(record.path), meter))
        _log.debug("%s of the %s: SHA-256 %s", record.path, place, digest)
        if digest != record.sha256:
            detail = f"SHA-256 is {digest}, not {record.sha256}"
            return Problem(place, record.path, "different", detail)
        return None

    return problems + [found for found in workers.each(compare, expected.values()) if found]


def _digests_elsewhere(
    source: Source, records: Iterable[FileRecord | TargetFile], meter: Meter, executor: Executor
) -> dict[str, str]:
    """The SHA-256 of those files that have the size of their records, and no published SHA-256."""
    paths = [
        record.path
        for record in records
        if source.sizes.get(record.path) == record.size and not source.published_sha256(record.path)
    ]
    task, digests = partial(_digest, PinnedSource.of(source), executor.cpus_per_task), dict[str, str]()
    for index, digest in executor.each(task, paths):
        digests[paths[index]] = digest
        meter.add(source.sizes[paths[index]])
    return digests


def _digest(pinned: PinnedSource, threads: int, path: str) -> str:
    """The task of a file that is there."""
    with kept(pinned, pinned.open) as source, workers_of(threads, source.cancel) as workers:
        return sha256_of(workers.watch(source.blocks(path)))


def compare_materials(
    target: TargetRecipe, workers: Workers, executor: Executor | None, progress: ProgressCallback | None
) -> tuple[list[Problem], int]:
    """Compare what a target is made from with the SHA-256 that its attestation states: the files of the base,
    and the targets between several deltas. A rebuilt target proves neither: the checks of a chunk are no
    cryptographic ones, and say nothing of the file that a chunk is in. Returns, too, how many files were
    compared."""
    chain = links(target)
    first = chain[0]
    problems, checked = list[Problem](), 0
    if first.base is not None:
        records = files_of_base(first.manifest)
        found = _compare("base", first.base.source, records, workers, executor, progress)
        problems += [one for one in found if one.kind != "extra"]
        checked += len(records)
    for link in chain[:-1]:
        found = _compare_rebuilt(link, workers, executor, progress)
        problems += [replace(one, path=link.source.name(one.path)) for one in found]
        checked += len(link.manifest.target.files)
    return problems, checked


@timed_stage("rebuild in memory")
def _compare_rebuilt(
    view: TargetRecipe, workers: Workers, executor: Executor | None, progress: ProgressCallback | None
) -> list[Problem]:
    """Rebuild every file of the target in memory, and compare it with its record."""
    meter, files = Meter(progress, "rebuild", view.manifest.target_bytes), view.manifest.target.files
    if not executor:
        found = workers.each(lambda lane, file: _compare_file(view, file, lane, meter), files)
        return [problem for problem in found if problem]
    problems, task = [], partial(_compare_elsewhere, PinnedTarget.of(view), executor.cpus_per_task)
    for index, problem in executor.each(task, files):
        meter.add(files[index].size)
        problems += [problem] if problem else []
    return problems


def _compare_elsewhere(pinned: PinnedTarget, threads: int, file: TargetFile) -> Problem | None:
    """The task of a file that is rebuilt."""
    with kept(pinned, pinned.open) as view, workers_of(threads, view.cancel) as workers:
        return _compare_file(view, file, workers, Meter(None, "", 0))


def _compare_file(view: TargetRecipe, file: TargetFile, lane: Lane, meter: Meter) -> Problem | None:
    try:
        if file.stored == "tensors":
            digest = rebuild_shard(view.shard(file.path), lane, meter)
        else:
            digest = sha256_of(lane.watch(view.blocks(file), meter))
    except DeltaWeightsError as error:
        if view.is_remote and isinstance(error, CheckpointError):
            raise  # it says nothing about the delta
        return Problem("rebuilt", file.path, "different", " ".join(filter(None, (error.what, error.why))))
    level = logging.INFO if file.stored == "tensors" else logging.DEBUG
    _log.log(level, "%s: rebuilt in memory, SHA-256 %s", file.path, digest)
    if digest != file.sha256:
        return Problem("rebuilt", file.path, "different", f"SHA-256 is {digest}, not {file.sha256}")
    return None


def _compare_published(manifest: Manifest, problems: list[Problem]) -> str | None:
    """Compare the SHA-256 published in the target's own repository with the manifest, which downloads
    nothing. Adds to ``problems``. Returns the repository's name, or None if it is unknown or unreachable."""
    record = manifest.target
    if not record.repo_id or not record.revision:
        return None
    try:
        source = HubSource(record.repo_id, record.revision)
    except CheckpointError:
        return None
    for file in record.files:
        size, digest = source.sizes.get(file.path), source.published_sha256(file.path)
        if size is None:
            problems.append(Problem("published", file.path, "missing", f"{source.where} does not have it"))
        elif (size, digest or file.sha256) != (file.size, file.sha256):
            detail = f"{source.where} publishes {size} bytes with SHA-256 {digest or 'unknown'}"
            problems.append(Problem("published", file.path, "different", detail))
    source.close()
    return source.where
