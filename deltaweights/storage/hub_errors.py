"""Explains errors of the Hub.

Errors of huggingface_hub and of its HTTP library become :class:`HubReadError`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from ..errors import DeltaWeightsError, HubReadError


@contextmanager
def explained(repo_id: str, revision: str | None, path: str = "") -> Iterator[None]:
    """Explain errors within the block, which reads a repository or one of its files."""
    try:
        yield
    except (DeltaWeightsError, CancelledError):
        raise
    except Exception as error:
        lines = _answer(error, repo_id, revision, path) or _obstacle(error, repo_id, revision)
        raise HubReadError(*lines, retryable=may_pass(error)) from error


#: Errors of an HTTP client for answers that will be no better: redirects in a circle, or to no web address.
#: By name, since the client is a copy or a successor of httpx.
_LASTING = ("TooManyRedirects", "UnsupportedProtocol", "InvalidURL")


def may_pass(error: BaseException) -> bool:
    """Whether a retry may succeed without any action by the user."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, errors.HfHubHTTPError):
        return is_passing_status(error.response.status_code)
    if type(error).__name__ in _LASTING:
        return False
    # RuntimeError: other code in this process closed the shared connections.
    kinds = (ConnectionError, TimeoutError, RuntimeError, errors.LocalEntryNotFoundError)
    return isinstance(error, (http_error(), *kinds))


def why_absent(error: HubReadError) -> str:
    """What to say of a repository that is not on the Hub, or on one that cannot be asked; else nothing."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "the Hub is not asked"
    if isinstance(cause, errors.RepositoryNotFoundError) and not isinstance(cause, errors.GatedRepoError):
        return "no such repository on the Hub"
    is_answer = isinstance(cause, errors.HfHubHTTPError)
    if not is_answer and isinstance(cause, (http_error(), ConnectionError, TimeoutError)):
        return "the Hub cannot be reached"
    return ""


def is_passing_status(status: int) -> bool:
    """Whether an HTTP status is a temporary error."""
    return status in (408, 429) or status >= 500


def http_error() -> type[Exception]:
    """The base class of the HTTP library's errors. The library is httpx or httpx2, depending on
    huggingface_hub's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def cache_full(why: str) -> HubReadError:
    """The error if the Hub cache's disk is too small."""
    from huggingface_hub import constants

    return HubReadError(
        "The disk of the local Hub cache is too small",
        f"{constants.HF_HUB_CACHE}: {why}.",
        "Free some space, set HF_HUB_CACHE to a folder on another disk, or stream: leave out keep_base=True.",
    )


Lines = tuple[str, str, str]


def _answer(error: Exception, repo_id: str, revision: str | None, path: str) -> Lines | None:
    """What, why and fix, if the Hub refused the request."""
    from huggingface_hub import constants, errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    page = f"{constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code
    what = f"The Hub refuses to serve {repo_id}"
    why = f"It answers {status} {' '.join((error.server_message or error.response.reason_phrase).split())}."
    fix = "Run the same command again later: finished files are kept."
    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, its base class
        what = f"{repo_id} is gated"
        why = "Only users who were granted access on its page can read it."
        fix = f"Ask for access: {page} and log in with that account: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"{repo_id} cannot be found"
        why = "The Hub has no such repository, or you may not read it."
        fix = "Check the name. If the repository is private, log in: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo_id} has no revision {revision or 'main'}"
        why = "It was moved or deleted, or there never was one."
        fix = f"See the list: {page}/commits (a copy of the right one can be passed as a folder)."
    elif isinstance(error, errors.EntryNotFoundError):
        what = f"{repo_id} has lost its file {path}"
        why = f"The Hub lists it at {revision}, but does not have it."
        fix = f"Tell the owner: {page}/discussions"
    elif isinstance(error, errors.DisabledRepoError):
        what, fix = f"{repo_id} is disabled", f"Its page may say why: {page}"
    elif status == 401:
        what, fix = "The Hub does not accept your token", "Log in again: hf auth login"
    elif status == 403:
        fix = f"See which rights your token has: {constants.ENDPOINT}/settings/tokens"
    elif status == 429:
        what = "The Hub asks for a pause"
        why = "Too many requests came from this account or address."
        fix = (
            "Wait some minutes, or log in for higher limits (hf auth login); then run the same command again."
        )
    return what, why, fix


def _obstacle(error: Exception, repo_id: str, revision: str | None) -> Lines:
    """What, why and fix, if there was no answer."""
    from huggingface_hub import constants, errors

    at = f" --revision {revision}" if revision else ""
    lines = str(error).strip().splitlines()
    said = (lines[0].rstrip(".") if lines else "") or type(error).__name__
    what = f"{constants.ENDPOINT} does not answer as the Hub does"
    why = f"For {repo_id}: {said}."
    fix = "Check HF_ENDPOINT, and the proxy if there is one."
    if isinstance(error, errors.OfflineModeIsEnabled):
        what = f"{repo_id} is not here"
        why = "It is not whole in the local Hub cache, and HF_HUB_OFFLINE is set."
        fix = f"Check the name, or unset HF_HUB_OFFLINE for: hf download {repo_id}{at}"
    elif isinstance(error, errors.HFValidationError):
        what, why = f"{repo_id!r} is not a Hub id", f"{said}."
        fix = "Hub ids look like org/name or org/name@revision."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = cache_full(f"{error.strerror}")
        what, why, fix = full.what, full.why, full.fix
    elif isinstance(error, (http_error(), ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)):
        what = "Cannot reach the Hub"
        why = f"{constants.ENDPOINT} does not answer for {repo_id}: {said}."
        fix = "Check the network and run the same command again: finished files are kept."
    elif isinstance(error, OSError):
        what, why = "Cannot use the local Hub cache", f"{said}."
        fix = f"It is in {constants.HF_HUB_CACHE}; set HF_HUB_CACHE to use a different folder."
    return what, why, fix
