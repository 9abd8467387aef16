"""What a batch is made of: jobs, one a line of JSON, checked before any of them runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from ..codec import Effort
from ..errors import CheckpointError, DeltaWeightsError
from ..storage import local_path, store_url

#: The most bytes of a line, and jobs of a batch.
MAX_LINE_BYTES, MAX_JOBS = 1 << 20, 100_000

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
_Texts = Annotated[tuple[_Text, ...], msgspec.Meta(max_length=1000)]


class _Base(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="verb",
):
    """What every job has: a name for people, of which nothing depends."""

    id: _Id | None = None


class DiffJob(_Base, frozen=True, kw_only=True, tag="diff"):
    """:func:`deltaweights.make_delta`, with the arguments of that name."""

    base: _Text
    target: _Text
    delta: _Text
    rename: tuple[tuple[_Text, str], ...] = ()
    base_repo: _Text | None = None
    base_revision: _Text | None = None
    base_license: _Text | None = None
    target_repo: _Text | None = None
    target_license: _Text | None = None
    exclude: _Texts = ()
    effort: Effort = "default"
    force: bool = False


class ApplyJob(_Base, frozen=True, kw_only=True, tag="apply"):
    """:func:`deltaweights.apply_delta`, with the arguments of that name.

    Attributes:
        accept_license: licenses that were accepted, as for ``--accept-license``.
        require_signature: paths of public keys, by one of which the delta must be signed.
    """

    delta: _Text | _Texts
    out: _Text
    base: _Text | None = None
    keep_base: bool = False
    accept_license: _Texts = ()
    force: bool = False
    require_signature: _Text | _Texts | None = None


class VerifyJob(_Base, frozen=True, kw_only=True, tag="verify"):
    """:func:`deltaweights.verify_delta`, with the arguments of that name.

    Attributes:
        require_signature: paths of public keys, by one of which the delta must be signed.
    """

    delta: _Text | _Texts
    base: _Text | None = None
    keep_base: bool = False
    target: _Text | None = None
    require_signature: _Text | _Texts | None = None


#: One job of a batch.
Job: TypeAlias = DiffJob | ApplyJob | VerifyJob


class BadLine(msgspec.Struct, frozen=True):
    """A line that is no job, or must not run, and why."""

    text: bytes
    why: str


_decoder = msgspec.json.Decoder(DiffJob | ApplyJob | VerifyJob)


def read_jobs(path: str | os.PathLike[str]) -> Iterator[tuple[int, Job | BadLine]]:
    """The jobs in a file, each with the number of its line. Empty lines are left out.

    Raises:
        DeltaWeightsError: the file cannot be read, or has too many jobs.
    """
    try:
        with open(local_path(path), "rb") as file:
            yield from _jobs_in(_lines(file))
    except OSError as error:
        raise DeltaWeightsError(
            f"Cannot read {os.fspath(path)}", f"{error.strerror}.", "Check the path of the jobs."
        ) from error


def _lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, each cut at one byte more than a line may have."""
    read = file.readline  # type: ignore[attr-defined]
    while line := read(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = read(MAX_LINE_BYTES + 1)
        yield line


def _jobs_in(lines: Iterable[bytes]) -> Iterator[tuple[int, Job | BadLine]]:
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        count += 1
        if count > MAX_JOBS:
            raise DeltaWeightsError(
                "There are too many jobs", f"A batch has at most {MAX_JOBS:,}.", "Split the file."
            )
        if len(line) > MAX_LINE_BYTES:
            yield number, BadLine(line, f"It has more than {MAX_LINE_BYTES:,} bytes.")
            continue
        try:
            yield number, _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            yield number, BadLine(line, f"{error}.")


def settled(jobs: Iterable[tuple[int, Job | BadLine]]) -> Iterator[tuple[int, Job | BadLine]]:
    """The jobs with absolute paths; those that would get in each other's way become bad lines."""
    ids: dict[str, int] = {}
    places: dict[str, tuple[int, str]] = {}
    for number, one in jobs:
        job = _absolute(one) if not isinstance(one, BadLine) else one
        if not isinstance(job, BadLine):
            job = _alone(number, job, ids, places)
        yield number, job


def _alone(number: int, job: Job, ids: dict[str, int], places: dict[str, tuple[int, str]]) -> Job | BadLine:
    """The job; or why it cannot run beside the ones before."""
    digest = digest_of(job)
    if place := _output_of(job):
        earlier, same = places.setdefault(place, (number, digest))
        if same != digest:
            return BadLine(_encoder.encode(job), f"It writes to the same place as line {earlier}.")
    if job.id is not None and ids.setdefault(job.id, number) != number:
        return BadLine(_encoder.encode(job), f"Its id is that of line {ids[job.id]}.")
    return job


_encoder = msgspec.json.Encoder(order="sorted")


def digest_of(job: Job | BadLine) -> str:
    """The SHA-256 of what a job says, but for its id: two jobs with the same one do the same. What is as by
    default counts as not said, also if an option is added to jobs later."""
    if isinstance(job, BadLine):
        return hashlib.sha256(job.text).hexdigest()
    said = {
        field.name: getattr(job, field.name)
        for field in msgspec.structs.fields(job)
        if field.name != "id" and getattr(job, field.name) != field.default
    }
    return hashlib.sha256(_encoder.encode([job.__struct_config__.tag, said])).hexdigest()


def _output_of(job: Job) -> str | None:
    if isinstance(job, DiffJob):
        return job.delta.rstrip("/")
    return job.out.rstrip("/") if isinstance(job, ApplyJob) else None


def _absolute(job: Job) -> Job | BadLine:
    """The job with absolute paths, since it may run in a process with another working directory."""
    fields: dict[str, str | tuple[str, ...]] = {}
    keys = getattr(job, "require_signature", None)
    if keys is not None:
        is_one = isinstance(keys, str)
        fields["require_signature"] = os.path.abspath(keys) if is_one else tuple(map(os.path.abspath, keys))
    try:
        for name in ("base", "target", "delta", "out"):
            value = getattr(job, name, None)
            is_output = name == "out" or (name == "delta" and isinstance(job, DiffJob))
            if isinstance(value, str):
                fields[name] = _path(value, is_output=is_output)
            elif value is not None:
                fields[name] = tuple(_path(one, is_output=is_output) for one in value)
    except CheckpointError as error:
        return BadLine(_encoder.encode(job), " ".join(filter(None, (error.what + ".", error.why))))
    changed: Job = msgspec.structs.replace(job, **fields)
    return changed


def _path(location: str, *, is_output: bool) -> str:
    if store_url(location) or location.startswith("hf:"):
        return location
    path: Path = local_path(location)
    is_path = is_output or location.startswith((".", "/", "~")) or os.path.lexists(path)
    return os.path.abspath(path) if is_path else location
