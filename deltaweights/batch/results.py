"""What a batch did: one line of JSON for each job, in a file that a run goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Annotated, Literal

import msgspec

from ..errors import DeltaWeightsError, HubError, NotPublishedError, OutputError
from ..storage import flush, lock, output_path
from ..verify import Problem

#: The most bytes of a line: what is longer was not written by a batch.
_MOST_LINE = 1 << 22

#: What every line begins with.
_BEGIN = b'{"job":"'

#: The most problems of a delta that are listed.
MOST_PROBLEMS = 100

_Count = Annotated[int, msgspec.Meta(ge=0)]


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed.

    Attributes:
        what, why, fix: the error's lines.
        kind: the class of the error, such as ``"BaseMismatchError"``; ``"BadLine"`` for what is no job,
            ``"Problems"`` where a delta was verified and is not as its manifest says.
        retryable: whether the same job may go well later without anybody acting.
    """

    what: str
    why: str = ""
    fix: str = ""
    kind: str
    retryable: bool = False


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one job.

    Attributes:
        job: the SHA-256 of what the job says; a run goes on by it.
        line: the job's line, or its place in a list, from 1.
        id: the job's own.
        verb: "diff", "apply" or "verify"; None for a line that is no job.
        status: "ok", "failed", or "skipped" for what an earlier run or line did.
        seconds: how long it took.
        target_bytes: the size of the target.
        delta_bytes: the size of the delta, or of all of a chain.
        bytes_read, bytes_written: what the job read, from files or a network, and wrote; None where several
            jobs ran in one process.
        problems: what verify found; of many, the first 100.
        error: why it failed.
    """

    job: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    line: _Count
    id: str | None = None
    verb: Literal["diff", "apply", "verify"] | None = None
    status: Literal["ok", "failed", "skipped"]
    seconds: float = 0.0
    target_bytes: _Count | None = None
    delta_bytes: _Count | None = None
    bytes_read: _Count | None = None
    bytes_written: _Count | None = None
    problems: tuple[Problem, ...] = ()
    error: JobError | None = None


def error_of(error: Exception) -> JobError:
    """The error as a result says it."""
    kind = type(error).__name__
    if not isinstance(error, DeltaWeightsError):
        return JobError(what=f"The job ended with {kind}", why=str(error)[:1000], kind=kind)
    is_retryable = isinstance(error, NotPublishedError) or (isinstance(error, HubError) and error.retryable)
    return JobError(what=error.what, why=error.why, fix=error.fix, kind=kind, retryable=is_retryable)


class ResultsFile:
    """The open results of a batch.

    Attributes:
        done: the jobs that are done, by :attr:`JobResult.job`.
    """

    def __init__(self, file: IO[bytes], done: dict[str, JobResult]) -> None:
        self._file = file
        self.done = done

    def add(self, result: JobResult) -> None:
        """Append a line; it is on the disk when this returns."""
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()
        flush(self._file.fileno())


@contextmanager
def open_results(location: str | os.PathLike[str]) -> Iterator[ResultsFile]:
    """The results at a path, new or of an earlier run, locked until the end of the block. The line that a
    killed run left unfinished is removed.

    Raises:
        OutputError: another run has them open, or the file is something else.
    """
    path = output_path(location)
    try:
        with open(path, "ab+") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise OutputError(
                    f"Another batch writes to {path}",
                    "",
                    "Wait for it, or name another file for the results.",
                ) from None
            yield ResultsFile(file, _done_in(file, path))
    except OSError as error:
        raise OutputError(f"Cannot write {path}", f"{error.strerror}.", "Check the path.") from error


def _done_in(file: IO[bytes], path: os.PathLike[str]) -> dict[str, JobResult]:
    done = {}
    file.seek(0)
    number, place = 0, 0
    while line := file.readline(_MOST_LINE):
        number += 1
        is_torn = not line.endswith(b"\n")
        if is_torn and _BEGIN.startswith(line[: len(_BEGIN)]):
            with suppress(msgspec.DecodeError):
                msgspec.json.decode(line, type=JobResult)
                file.write(b"\n")
                is_torn = False
            if is_torn:
                file.truncate(place)
                break
        try:
            result = msgspec.json.decode(line, type=JobResult)
        except msgspec.DecodeError as error:
            raise OutputError(
                f"{os.fspath(path)} is not the results of a batch",
                f"Line {number}: {error}.",
                "Name another file for the results.",
            ) from None
        place += len(line)
        if result.status == "ok":
            done[result.job] = result
        else:
            done.pop(result.job, None)
    return done
