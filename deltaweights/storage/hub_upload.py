"""Uploads files to a repository on the Hub in one commit, so that readers see all of them or none.

huggingface_hub splits the upload of a large folder into several commits, so readers could see a manifest
without its shards. This module first sends large files one by one, which stay invisible until the commit. A
file that has arrived is not sent again, not even by a later run.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, HubError, HubWriteError, OutputError
from .hub_client import WE, Repository, find_repository, patiently, without_bars
from .hub_errors import explained
from .local import blocks_at
from .patience import within
from .traffic import count

_log = logging.getLogger(__name__)

#: Files with more bytes than this are sent before the commit, one by one.
_LARGE_BYTES = 1 << 20

#: The seconds that the Hub may take for a request, and the bytes a second that an upload must reach at least.
_MOST_SECONDS, _LEAST_RATE = 600, 20_000

Result = TypeVar("Result")


def require_repo_id(repo_id: str) -> None:
    """Raise :class:`OutputError` for what cannot be the name of a repository that somebody owns."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise OutputError(f"{repo_id!r} is not a Hub id", "", "Hub ids look like org/name.")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to publish: its path there, its local path or its bytes, its size and SHA-256 (hex)."""

    path: str
    content: Path | bytes
    size: int
    sha256: str

    def is_in(self, repository: Repository) -> bool:
        """Whether the repository already has this file, by its published SHA-256 or its git id."""
        there = repository.files.get(self.path)
        if there is None or there.size != self.size:
            return False
        if there.sha256:
            return there.sha256 == self.sha256
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return there.blob in (_git_id(len(pointer), [pointer.encode()]), _git_id(self.size, self._blocks()))

    def _blocks(self) -> Iterable[bytes]:
        return [self.content] if isinstance(self.content, bytes) else blocks_at(self.path, self.content)


def _git_id(size: int, blocks: Iterable[bytes]) -> str:
    sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for block in blocks:
        sha1.update(block)
    return sha1.hexdigest()


@dataclass(frozen=True, slots=True)
class Branch:
    """The destination: a repository at a branch's newest commit. ``name`` is None for the main branch."""

    repository: Repository
    name: str | None
    is_private: bool

    @property
    def url(self) -> str:
        """The URL of its page."""
        from huggingface_hub import constants

        page = f"{constants.ENDPOINT}/{self.repository.repo_id}"
        return f"{page}/tree/{self.name}" if self.name else page


@dataclass(frozen=True, slots=True)
class Commit:
    """A new commit; for a pull request also its page and its revision."""

    id: str
    pull_request: str | None = None
    revision: str | None = None


def require_login() -> None:
    """Raise :class:`HubWriteError` if the user has no token for the Hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubWriteError(
            "You are not logged in to the Hub",
            "A push needs an account.",
            "Log in with a token that may write: hf auth login (or set HF_TOKEN).",
        )


def find_branch(repo_id: str, name: str | None, *, private: bool) -> Branch:
    """Look up a branch of a model repository. Creates both if missing.

    Args:
        repo_id: ``org/name``.
        name: the branch; the main branch if None.
        private: create a private repository, and refuse a public one.

    Raises:
        OutputError: it cannot be created or read, or it is public.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(**WE)
    with _explained(repo_id):
        try:
            info = _ask(lambda: api.model_info(repo_id))
        except errors.RepositoryNotFoundError as error:
            if isinstance(error, errors.GatedRepoError):
                raise
            _ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            info = _ask(lambda: api.model_info(repo_id))
        if private and not info.private:
            raise OutputError(
                f"{info.id} is public",
                "Everybody could read the files pushed there.",
                "If that is intended, pass private=False; else choose a different repository.",
            )
        if name:
            _ask(lambda: api.create_branch(info.id, branch=name, exist_ok=True))
        return Branch(find_repository(info.id, name), name, bool(info.private))


def upload(
    branch: Branch,
    files: Sequence[Outgoing],
    removed: Iterable[str],
    *,
    message: str,
    create_pr: bool,
    sent: Callable[[int], None],
) -> Commit:
    """Make one commit that adds or replaces ``files`` and deletes the paths ``removed``.

    Args:
        message: the commit message.
        create_pr: make the commit a pull request to the main branch.
        sent: called with the number of bytes of each part that has arrived.

    Raises:
        OutputError: the Hub refuses the commit, or another commit came first. Readers see no change.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    api, repo_id = HfApi(**WE), branch.repository.repo_id
    with _explained(repo_id), _quiet():
        operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in removed]

        def arrived(nbytes: int) -> None:
            count(written=nbytes)
            sent(nbytes)

        for file in files:
            operation = CommitOperationAdd(file.path, _content(file))
            if operation.upload_info.sha256.hex() != file.sha256:
                raise OutputError(
                    f"{file.path} changed during the push",
                    f"Its SHA-256 is {operation.upload_info.sha256.hex()}, not {file.sha256}.",
                    "Run the same command again when nothing else writes to it.",
                )
            operations.append(operation)
            if file.size > _LARGE_BYTES:
                _log.info("sending %s, %d bytes", file.path, file.size)
                _ask(partial(_send, api, branch, operation, create_pr), file.size)
                count(read=2 * file.size)  # by huggingface_hub: to hash it, and to send it
                arrived(file.size)

        def commit() -> Commit:
            try:
                info = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    revision=branch.name,
                    create_pr=create_pr,
                    parent_commit=branch.repository.commit,
                )
            except errors.HfHubHTTPError as error:
                # An earlier attempt may have succeeded, and only its answer was lost.
                now = find_repository(repo_id, branch.name) if _status(error) == 412 else branch.repository
                if now.commit == branch.repository.commit or not all(file.is_in(now) for file in files):
                    raise
                return Commit(now.commit)
            return Commit(info.oid, info.pr_url, info.pr_revision)

        small = sum(file.size for file in files if file.size <= _LARGE_BYTES)
        # A retry would open a second request.
        done = _ask(commit, small, retry=not create_pr)
        arrived(small)
        _log.info("committed %d files to %s as %s", len(files), repo_id, done.id)
        return done


def _ask(action: Callable[[], Result], nbytes: int = 0, *, retry: bool = True) -> Result:
    """Do what sends ``nbytes`` bytes to the Hub, in bounded time, and with a few retries after temporary
    errors."""
    seconds = _MOST_SECONDS + nbytes / _LEAST_RATE

    def once() -> Result:
        return within(seconds, action, what="A request to")

    return patiently(once) if retry else once()


def _content(file: Outgoing) -> bytes | Path:
    """A file in the form that huggingface_hub takes. For small files these are the bytes, since a path would
    be read again later. (The Hub compares the SHA-256 of large files.)"""
    if isinstance(file.content, bytes):
        return file.content
    if file.size <= _LARGE_BYTES:
        data = file.content.read_bytes()
        count(read=len(data))
        return data
    file.content.stat()  # huggingface_hub's own error for a missing file misleads
    return file.content


def _send(api: Any, branch: Branch, operation: Any, create_pr: bool) -> None:
    """Send a large file. It becomes visible with a commit that names it."""
    try:
        api.preupload_lfs_files(
            branch.repository.repo_id,
            [operation],
            revision=branch.name,
            create_pr=create_pr,
            free_memory=False,
        )
    except RuntimeError as error:  # it wraps the real error
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


def require_published(repo_id: str, revision: str, files: Iterable[Outgoing]) -> None:
    """Raise :class:`OutputError` if the repository's files differ from those that were sent."""
    with _explained(repo_id):
        there = find_repository(repo_id, revision)
    wrong = [file.path for file in files if not file.is_in(there)]
    if wrong:
        raise OutputError(
            f"{repo_id} does not publish the files that were sent",
            f"{wrong[0]!r} is missing or different at {revision}"
            + (f", and {len(wrong) - 1} more." if wrong[1:] else "."),
            "Run the same command again. If that does not help, look for a .gitignore in the repository.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off huggingface_hub's bars, warnings and log lines within the block: only the command line
    prints."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn errors within the block, which writes to a repository, into :class:`HubWriteError`."""
    try:
        with explained(repo_id, None):
            yield
    except CheckpointError as error:
        cause = error.__cause__ or error
        lines = _lines(cause, repo_id) or (error.what, error.why, error.fix)
        retryable = isinstance(error, HubError) and error.retryable
        raise HubWriteError(*lines, retryable=retryable) from cause


def _status(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer; None if it gave none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _lines(error: BaseException, repo_id: str) -> tuple[str, str, str] | None:  # noqa: PLR0911
    """What, why and fix of errors that are specific to writing; None for others."""
    from huggingface_hub import constants, errors

    why, status = "", _status(error)
    if isinstance(error, errors.HfHubHTTPError):
        said = " ".join((error.server_message or error.response.reason_phrase).split())
        why = f"The Hub answers {status} {said}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "Without the Hub, nothing can be pushed.", "Unset it."
    if isinstance(error, errors.GatedRepoError):
        return None
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{repo_id} can be neither found nor made"
        return what, why, "Check the name, and that your token may write there: hf auth whoami"
    if status in (402, 403):
        fix = f"Log in with a token that may write there: hf auth login, {constants.ENDPOINT}/settings/tokens"
        return f"You may not write to {repo_id}", why, fix
    if status == 412:
        return f"{repo_id} changed during the push", why, "Run the same command again."
    if isinstance(error, ValueError) and not status and not isinstance(error, errors.HFValidationError):
        why = f"{' '.join(str(error).split())}."  # a README.md with a broken front matter, a quota
    if why and status not in (401, 429, *range(500, 600)):
        return f"The Hub refuses the files for {repo_id}", why, "Correct what it reports, and push again."
    if isinstance(error, OSError) and error.filename:
        return f"Cannot read {error.filename}", f"{error.strerror}.", "Make the delta again."
    return None
