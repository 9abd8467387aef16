"""Does everything that the manifest says hold? Reports all that is missing, extra or different."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from .delta.chain import Deltas, check_continuity, connect, listed
from .delta.opening import read_manifest
from .delta.target_recipe import TargetRecipe
from .errors import CheckpointError, DeltaWeightsError
from .license.cards import CARD_NAME
from .manifest import MANIFEST_NAME, FileRecord, Manifest, TargetFile
from .patch import check_base, rebuild_shard
from .storage import HubSource, Location, Readable, Source, is_clutter, open_source, sha256_of
from .workers import Lane, Meter, ProgressCallback, Workers

#: What the Hub adds to a repository.
_HUBS_OWN = ".gitattributes"

#: Files of a delta that are not listed in its manifest.
_UNLISTED = frozenset({MANIFEST_NAME, CARD_NAME, _HUBS_OWN})


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One file that is not as the manifest says. ``place``: the delta's own files, the checkpoint given as
    target, the target as base and delta rebuild it, or the target as its own repository publishes it."""

    place: Literal["delta", "target", "rebuilt", "published"]
    path: str
    kind: Literal["missing", "extra", "different"]
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify_delta` found.

    Attributes:
        checked: how many files it compared with the manifest.
        problems: all that it found, sorted.
        published: for how many files of a delta or target on the Hub the SHA-256 that is published there was
            compared, and none of their bytes.
        target_repo: the target's own repository at its commit, if what it publishes was compared too.
    """

    checked: int
    problems: tuple[Problem, ...]
    published: int = 0
    target_repo: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.problems


def verify_delta(
    delta: Deltas,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    target: Location | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check a delta against its manifest; writes nothing.

    Args:
        delta: a folder, a Hub id or an open source, or several, as for :func:`apply_delta`. Their own files
            are always checked.
        base: if given, the target is rebuilt from it in memory, and every file's SHA-256 compared (of several
            deltas, the last one's target, if all of them are whole). If base or
            delta are on the Hub, and the manifest names the target's repository and commit, what that one
            publishes is compared too.
        keep_base: as for :func:`apply_delta`.
        target: if given, a folder, file or Hub id whose files are compared with the target's.
        threads: how many; the number of usable cores, at most 8, if None.
        progress: called with a phase, what is done, what there is to do: "verify delta", "verify target",
            "download base", "rebuild" (in bytes), "check base" (in chunks).

    Of the files of a delta or target on the Hub, the SHA-256 that the Hub publishes is compared, where there
    is one; only the others are read.

    Raises:
        CheckpointError: base, target or delta cannot be found, read or downloaded.
        ManifestError: the manifest itself is damaged.
        BaseMismatchError: ``base`` is not the right one, or a delta does not follow the one before it.
    """
    with ExitStack() as opened, Workers(threads) as workers:
        sources = [opened.enter_context(open_source(one)) for one in listed(delta)]
        manifests = [read_manifest(source) for source in sources]
        check_continuity(sources, manifests)
        problems, checked, published = [], 0, 0
        for source, manifest in zip(sources, manifests, strict=True):
            workers.at_stop(source.cancel)
            found = _compare("delta", source, manifest.files, workers, progress)
            # Of several deltas, a name has to say whose.
            problems += [replace(p, path=source.name(p.path)) if sources[1:] else p for p in found]
            checked += len(manifest.files)
            published += _count_published(source, manifest.files)
        are_whole, target_repo = not problems, None
        if target is not None:
            with open_source(target) as other:
                workers.at_stop(other.cancel)
                problems += _compare("target", other, manifest.target.files, workers, progress)
                published += _count_published(other, manifest.target.files)
            checked += len(manifest.target.files)
        if base is not None and (are_whole or not sources[1:]):
            with connect(sources, manifests, base) as view:
                workers.at_stop(view.cancel)
                if are_whole:
                    check_base(view, workers, keep=keep_base, progress=progress)
                problems += _compare_rebuilt(view, workers, progress)
                if view.is_remote:
                    target_repo = _compare_published(manifest, problems)
            checked += len(manifest.target.files)
    return VerifyReport(checked, tuple(sorted(problems)), published, target_repo)


def _count_published(source: Source, records: Iterable[FileRecord | TargetFile]) -> int:
    return sum(source.published_sha256(record.path) is not None for record in records)


def _compare(
    place: Literal["delta", "target"],
    source: Source,
    records: Iterable[FileRecord | TargetFile],
    workers: Workers,
    progress: ProgressCallback | None,
) -> list[Problem]:
    """The files of ``source`` against their records."""
    expected = {record.path: record for record in records}
    meter = Meter(progress, f"verify {place}", sum(record.size for record in expected.values()))
    extra = set(source.sizes) - set(expected)
    if place == "delta":
        extra -= _UNLISTED
    elif source.is_remote:
        extra -= {_HUBS_OWN}
    extra = {path for path in extra if not is_clutter(path)}
    problems = [Problem(place, path, "extra", "is not in the manifest") for path in extra]

    def compare(lane: Lane, record: FileRecord | TargetFile) -> Problem | None:
        size = source.sizes.get(record.path)
        if size is None:
            return Problem(place, record.path, "missing", f"{record.size} bytes are expected")
        if size != record.size:
            return Problem(place, record.path, "different", f"has {size} bytes, not {record.size}")
        digest = source.published_sha256(record.path)
        if digest:
            meter.add(size)
        else:
            digest = sha256_of(lane.watch(source.blocks(record.path), meter))
        if digest != record.sha256:
            detail = f"SHA-256 is {digest}, not {record.sha256}"
            return Problem(place, record.path, "different", detail)
        return None

    return problems + [found for found in workers.each(compare, expected.values()) if found]


def _compare_rebuilt(
    view: TargetRecipe, workers: Workers, progress: ProgressCallback | None
) -> list[Problem]:
    """Every file of the target, rebuilt in memory, against its record."""
    meter = Meter(progress, "rebuild", view.manifest.target_bytes)

    def compare(lane: Lane, file: TargetFile) -> Problem | None:
        try:
            if file.stored == "tensors":
                digest = rebuild_shard(view.shard(file.path), lane, meter)
            else:
                digest = sha256_of(lane.watch(view.blocks(file), meter))
        except DeltaWeightsError as error:
            if view.is_remote and isinstance(error, CheckpointError):
                raise  # it says nothing of the delta
            return Problem("rebuilt", file.path, "different", " ".join(filter(None, (error.what, error.why))))
        if digest != file.sha256:
            return Problem("rebuilt", file.path, "different", f"SHA-256 is {digest}, not {file.sha256}")
        return None

    return [found for found in workers.each(compare, view.manifest.target.files) if found]


def _compare_published(manifest: Manifest, problems: list[Problem]) -> str | None:
    """What the target's own repository publishes, against the manifest, at no cost. Adds the problems;
    returns the repository's name, or None where it is not known or cannot be asked."""
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
