"""Does everything that the manifest says hold? Reports all that is missing, extra or different."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from .card import CARD_NAME
from .checkpoint import Location, Source, open_source, sha256_of
from .errors import DeltaWeightsError
from .manifest import MANIFEST_NAME, FileRecord, TargetFile
from .patch import check_base, rebuild_shard
from .pipeline import Meter, ProgressCallback, Workers
from .target import Target, open_base, read_manifest

#: Files of a delta that are not listed in its manifest: the manifest, the model card, and what the Hub adds.
_UNLISTED = frozenset({MANIFEST_NAME, CARD_NAME, ".gitattributes"})


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One file that is not as the manifest says. ``place``: the delta's own files, the folder given as
    target, or the target as base and delta rebuild it."""

    place: Literal["delta", "target", "rebuilt"]
    path: str
    kind: Literal["missing", "extra", "different"]
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify_delta` found: how many files it read in full, and all problems, sorted."""

    checked: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.problems


def verify_delta(
    delta: Location,
    *,
    base: Location | None = None,
    target: Location | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check a delta against its manifest; writes nothing.

    Args:
        delta: its own files are always checked.
        base: if given, the target is rebuilt from it in memory, and every file's SHA-256 compared.
        target: if given, a folder (or single file) whose files are compared with the target's.
        threads: how many; the number of usable cores if None.
        progress: called with a phase, what is done, what there is to do: "verify delta", "verify target",
            "rebuild" (in bytes), "check base" (in chunks).

    Raises:
        ManifestError: the manifest itself is damaged.
        BaseMismatchError: ``base`` is not the right one.
    """
    with closing(open_source(delta)) as source, Workers(threads) as workers:
        manifest = read_manifest(source)
        problems = _compare("delta", source, manifest.files, workers, progress)
        checked = len(manifest.files)
        if target is not None:
            with closing(open_source(target)) as folder:
                problems += _compare("target", folder, manifest.target.files, workers, progress)
            checked += len(manifest.target.files)
        if base is not None:
            with Target(source, manifest, open_base(manifest, base)) as view:
                if not any(problem.place == "delta" for problem in problems):
                    check_base(view, workers, progress)
                problems += _compare_rebuilt(view, workers, progress)
            checked += len(manifest.target.files)
    return VerifyReport(checked, tuple(sorted(problems)))


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
    extra = set(source.sizes) - set(expected) - (_UNLISTED if place == "delta" else set())
    problems = [Problem(place, path, "extra", "is not in the manifest") for path in extra]

    def compare(record: FileRecord | TargetFile) -> Problem | None:
        size = source.sizes.get(record.path)
        if size is None:
            return Problem(place, record.path, "missing", f"{record.size} bytes are expected")
        if size != record.size:
            return Problem(place, record.path, "different", f"has {size} bytes, not {record.size}")
        digest = sha256_of(workers.watch(source.blocks(record.path), meter))
        if digest != record.sha256:
            detail = f"SHA-256 is {digest}, not {record.sha256}"
            return Problem(place, record.path, "different", detail)
        return None

    return problems + [found for found in workers.each(compare, expected.values()) if found]


def _compare_rebuilt(view: Target, workers: Workers, progress: ProgressCallback | None) -> list[Problem]:
    """Every file of the target, rebuilt in memory, against its record."""
    meter = Meter(progress, "rebuild", view.manifest.target_bytes)

    def compare(file: TargetFile) -> Problem | None:
        try:
            if file.stored == "tensors":
                digest = rebuild_shard(view.shard(file.path), workers, meter)
            else:
                digest = sha256_of(workers.watch(view.blocks(file), meter))
        except DeltaWeightsError as error:
            return Problem("rebuilt", file.path, "different", " ".join(str(error).splitlines()[:2]))
        if digest != file.sha256:
            return Problem("rebuilt", file.path, "different", f"SHA-256 is {digest}, not {file.sha256}")
        return None

    return [found for found in workers.each(compare, view.manifest.target.files) if found]
