"""Explains errors of object stores and web servers, and keeps secrets out of what is said.

fsspec has no errors of its own: each file system raises those of its library. They become
:class:`HubReadError` or :class:`HubWriteError`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from ...errors import DeltaWeightsError, HubReadError, HubWriteError
from ..hub_errors import is_passing_status

#: The error numbers of remote file systems if the server is busy or unreachable.
_PASSING_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}

#: The names of other such errors, in Python, aiohttp, botocore, httpx and Azure: not all are OSErrors.
_PASSING_NAMES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TimeoutError",
    "TransportError",
}

#: The names of errors for credentials that are missing, wrong or expired.
_REFUSED_NAMES = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "PermissionError",
    "RefreshError",
    "SSOError",
    "TokenRetrievalError",
}

#: An URL's user and password, and its query, which may be a signature.
_SECRETS = re.compile(r"(?<=://)[^/@\s'\"]*@|\?[^\s'\">)]*")


class ChangedMeanwhile(Exception):  # noqa: N818
    """A file is not the one that was listed."""


class Unserved(Exception):  # noqa: N818
    """An answer is not what was asked for. Its text says why."""


def redacted(text: str) -> str:
    """The text without what may be secret in its URLs: user, password, and everything after a ``?``."""
    return _SECRETS.sub(lambda match: "?…" if match[0].startswith("?") else "", text)


def may_pass(error: BaseException) -> bool:
    """Whether a retry may succeed: no connection, no answer, a busy or broken server."""
    status = _status(error)
    if status is not None:
        return is_passing_status(status)
    return bool(_names(error) & _PASSING_NAMES) or getattr(error, "errno", None) in _PASSING_NUMBERS


@contextmanager
def reading(where: str, path: str = "") -> Iterator[None]:
    """Explain errors within the block, which reads at a redacted URL, or one of the files there."""
    name = f"{where}/{path}" if path else where
    try:
        yield
    except (DeltaWeightsError, CancelledError):
        raise
    except ChangedMeanwhile:
        raise _changed(name) from None
    except FileNotFoundError as error:
        why = "It was removed after it was listed." if path else "The store has nothing of that name."
        raise HubReadError(f"There is no {name}", why, "Check the URL.") from _clean(error)
    except Exception as error:
        if is_changed(error):
            raise _changed(name) from _clean(error)
        raise HubReadError(
            f"Cannot read {name}", _said(error), _fix(error, "reading"), retryable=may_pass(error)
        ) from _clean(error)


@contextmanager
def writing(where: str, path: str = "") -> Iterator[None]:
    """:func:`reading` for a block that writes."""
    name = f"{where}/{path}" if path else where
    try:
        yield
    except (DeltaWeightsError, CancelledError):
        raise
    except Exception as error:
        if is_conflict(error):
            raise other_writer(where, f"{name} was not there a moment ago, and is now.") from _clean(error)
        raise HubWriteError(
            f"Cannot write {name}", _said(error), _fix(error, "writing"), retryable=may_pass(error)
        ) from _clean(error)


def other_writer(where: str, why: str) -> HubWriteError:
    """The error if two runs write to the same place."""
    return HubWriteError(
        f"{where} is being written to by another run", why, "Wait for it, or choose another place."
    )


def is_changed(error: BaseException) -> bool:
    """Whether a store says that a file is not the one that was pinned: answer 412."""
    return "FileExpired" in _names(error) or _status(error) == 412 or _is_precondition(error)


def is_conflict(error: BaseException) -> bool:
    """Whether a store refuses to put a file where one is: answer 409 or 412."""
    return isinstance(error, FileExistsError) or _is_precondition(error)


def _is_precondition(error: BaseException) -> bool:
    return "pre-condition" in str(error) or "PreconditionFailed" in str(error)


def _changed(name: str) -> HubReadError:
    return HubReadError(
        f"{name} changed while it was read",
        "The store has another version of it now.",
        "Run the same command again.",
    )


def _said(error: BaseException) -> str:
    lines = redacted(str(error)).strip().splitlines()
    said = (lines[0].rstrip(".") if lines else "") or type(error).__name__
    return f"{said[:300]}."


def _fix(error: BaseException, doing: str) -> str:
    if _status(error) in (401, 403) or _names(error) & _REFUSED_NAMES:
        return (
            f"Check that your credentials for the store allow {doing}, and that they have not expired; "
            "then run the same command again."
        )
    if may_pass(error):
        return "Run the same command again: finished files are kept."
    return "Check the URL."


def _status(error: BaseException) -> int | None:
    """The HTTP status, if the error has one: aiohttp's, gcsfs's, Azure's, or that of the answer which
    huggingface_hub keeps."""
    for name in ("status", "code", "status_code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _clean(error: BaseException) -> BaseException | None:
    """The error as a cause; None if a traceback would show what :func:`redacted` leaves out."""
    return error if redacted(str(error)) == str(error) else None
