"""Runs one job, in whatever process: a verb with its arguments, what it took, and its error as a result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from ..delta.opening import license_texts, read_manifest
from ..delta.signed import check_signers
from ..diff import make_delta
from ..errors import DeltaWeightsError, OutputError
from ..license.rules import not_accepted, unaccepted
from ..manifest import Manifest
from ..patch import apply_delta
from ..storage import Readable, Source, open_source, total_traffic
from ..verify import verify_delta
from ..workers import ProgressCallback
from .base_cache import BaseCache, CachedSource
from .jobs import ApplyJob, BadLine, DiffJob, Job, VerifyJob, digest_of
from .results import MOST_PROBLEMS, JobError, JobResult, error_of

_log = logging.getLogger(__name__)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What all jobs of a batch share.

    Attributes:
        accept_license: licenses that were accepted for all jobs.
        threads: of each job; None: as many as its process would take.
        cache: the folder for copies of bases, if any.
        cache_bytes: the most bytes of all copies.
        is_alone: whether the job is the only one in its process, whose traffic is then its own.
    """

    accept_license: tuple[str, ...] = ()
    threads: int | None = None
    cache: str | None = None
    cache_bytes: int = 0
    is_alone: bool = True


class Planned(msgspec.Struct, frozen=True):
    """A job and its line."""

    line: int
    job: Job | BadLine

    def result(self, **fields: Any) -> JobResult:
        """A result for it."""
        name, verb = None, None
        if not isinstance(self.job, BadLine):
            name, verb = self.job.id, _VERBS[type(self.job)]
        return JobResult(job=digest_of(self.job), line=self.line, id=name, verb=verb, **fields)

    def failed(self, error: JobError) -> JobResult:
        """A result for one that did not run."""
        return self.result(status="failed", error=error)


_VERBS: dict[type, Any] = {DiffJob: "diff", ApplyJob: "apply", VerifyJob: "verify"}


def run_job(planned: Planned, settings: Settings, check: Callable[[], None] = lambda: None) -> JobResult:
    """Run a job. An error is a result like any other.

    Args:
        check: called often, from any thread; what it raises ends the job.
    """
    job = planned.job
    if isinstance(job, BadLine):
        return planned.failed(JobError(what=f"Line {planned.line} is no job", why=job.why, kind="BadLine"))
    began, before = time.monotonic(), total_traffic()
    fields: dict[str, Any] = {}
    try:
        fields = _Run(job, settings, check).result()
    except Exception as error:
        check()  # whatever came after the end of the batch is not the job's
        _log.info("job %s failed", job.id or planned.line, exc_info=True)
        fields["error"] = error_of(error)
    if settings.is_alone:
        traffic = total_traffic().since(before)
        fields |= {"bytes_read": traffic.read, "bytes_written": traffic.written}
    status = "failed" if fields.get("error") else "ok"
    return planned.result(status=status, seconds=round(time.monotonic() - began, 3), **fields)


class _Run:
    """One job at work. If a copy of its base turns out to be damaged, the job runs once more, without it."""

    def __init__(self, job: Job, settings: Settings, check: Callable[[], None]) -> None:
        self._job = job
        self._settings = settings
        self._check = check

    def result(self) -> dict[str, Any]:
        """The result's fields."""
        for is_last in (False, True):
            base: Source | None = None
            try:
                with ExitStack() as opened:
                    deltas = self._open_deltas(opened)
                    base = self._open_base(opened, deltas)
                    return self._verb(opened, deltas, base)
            except Exception:
                if is_last or not (isinstance(base, CachedSource) and base.remove_damaged()):
                    raise
        raise AssertionError  # the second attempt returned or raised

    def _progress(self) -> ProgressCallback:
        return lambda *_: self._check()

    def _open_deltas(self, opened: ExitStack) -> list[Source]:
        """The deltas that the job reads, signed as it says: what others wrote names no base to be copied."""
        if isinstance(self._job, DiffJob):
            return []
        sources = [opened.enter_context(open_source(one)) for one in _listed(self._job.delta)]
        check_signers(sources, self._job.require_signature)
        return sources

    def _open_base(self, opened: ExitStack, deltas: Sequence[Source]) -> Source | None:
        """The base as copies, where there are to be such; None: the verb opens it as ever."""
        if self._settings.cache is None:
            return None
        location = self._job.base
        if location is None and isinstance(self._job, ApplyJob):
            named = read_manifest(deltas[0]).base
            location = f"hf://{named.repo_id}@{named.revision or 'main'}" if named.repo_id else None
        if location is None:
            return None
        cache = BaseCache(Path(self._settings.cache), self._settings.cache_bytes, self._check)
        return opened.enter_context(cache.open(location))

    def _verb(self, opened: ExitStack, sources: Sequence[Source], base: Source | None) -> dict[str, Any]:
        job = self._job
        if isinstance(job, DiffJob):
            return self._diff(opened, job, base)
        manifests = [read_manifest(source) for source in sources]
        sizes = {
            "target_bytes": manifests[-1].target_bytes,
            "delta_bytes": sum(manifest.delta_bytes for manifest in manifests),
        }
        if isinstance(job, ApplyJob):
            accepted = (*job.accept_license, *self._settings.accept_license)
            _require_accepted(sources, manifests, accepted)
            apply_delta(
                sources,
                job.out,
                base=base or job.base,
                keep_base=job.keep_base,
                force=job.force,
                require_signature=job.require_signature,
                threads=self._settings.threads,
                progress=self._progress(),
            )
            return sizes
        return {**sizes, **self._verify(job, sources, base)}

    def _diff(self, opened: ExitStack, job: DiffJob, base: Source | None) -> dict[str, Any]:
        try:
            manifest = make_delta(
                base or job.base,
                job.target,
                job.delta,
                rename=job.rename,
                base_repo=job.base_repo,
                base_revision=job.base_revision,
                base_license=job.base_license,
                target_repo=job.target_repo,
                target_license=job.target_license,
                exclude=job.exclude,
                effort=job.effort,
                force=job.force,
                threads=self._settings.threads,
                progress=self._progress(),
            )
        except OutputError:
            made = self._made(opened, job)
            if not made:
                raise
            manifest = made
        return {"target_bytes": manifest.target_bytes, "delta_bytes": manifest.delta_bytes}

    def _made(self, opened: ExitStack, job: DiffJob) -> Manifest | None:
        """The job's delta, where it is there already, whole and right: a run may have been killed before it
        wrote that down."""
        with suppress(DeltaWeightsError):
            with open_source(job.delta) as source:
                manifest = read_manifest(source)
            found = verify_delta(
                job.delta,
                base=self._open_base(opened, ()) or job.base,
                target=job.target,
                threads=self._settings.threads,
                progress=self._progress(),
            )
            is_said = (
                job.base_repo in (None, manifest.base.repo_id)
                and job.base_revision in (None, manifest.base.revision)
                and job.target_repo in (None, manifest.target.repo_id)
            )
            left_out = {path for path in manifest.target.left_out if not path.endswith("/")}
            if is_said and all(one.kind == "extra" and one.path in left_out for one in found.problems):
                return manifest
        return None

    def _verify(self, job: VerifyJob, sources: Sequence[Source], base: Readable | None) -> dict[str, Any]:
        found = verify_delta(
            sources,
            base=base or job.base,
            keep_base=job.keep_base,
            target=job.target,
            require_signature=job.require_signature,
            threads=self._settings.threads,
            progress=self._progress(),
        )
        if found.ok:
            return {}
        where = ", ".join(source.where for source in sources)
        first = found.problems[0]
        return {
            "problems": found.problems[:MOST_PROBLEMS],
            "error": JobError(
                what=f"{where} has {len(found.problems)} problems",
                why=f"The first: {first.place}, {first.path}: {first.kind}, {first.detail}.",
                fix="Get what differs again.",
                kind="Problems",
            ),
        }


def _listed(delta: str | tuple[str, ...]) -> list[str]:
    return [delta] if isinstance(delta, str) else list(delta)


def _require_accepted(
    sources: Sequence[Source], manifests: Sequence[Manifest], accepted: Sequence[str]
) -> None:
    """Raise :class:`LicenseNotAcceptedError` where somebody would have to be asked: nobody is there."""
    for source, manifest in zip(sources, manifests, strict=True):
        if missing := unaccepted(manifest, accepted, license_texts(source, manifest)):
            ids = ", ".join(terms.spdx for terms in missing)
            raise not_accepted(
                missing, f"Read its text in {source.where}, then name {ids} in accept_license."
            )
