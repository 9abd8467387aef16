"""Reads from the Hub: lists of files, ranges of their bytes, and the local cache.

All requests use huggingface_hub (1.x or 2.x), so its token, cache, endpoint and offline switch apply.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import msgspec

from .._version import __version__
from ..errors import HubReadError
from .hub_errors import cache_full, explained, http_error, may_pass
from .local import free_space
from .patience import does_not_end, within
from .traffic import count

_log = logging.getLogger(__name__)

#: Seconds to wait before each retry while no data arrives, about two minutes in total. Each wait is stretched
#: by up to a half at random, so that many connections do not return at the same moment.
RETRY_DELAYS: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 30, 30)

#: The longest wait that a server may ask for, in seconds: the Hub counts requests in windows of five minutes.
_LONGEST_WAIT = 330

#: The most bytes of a listing of a repository (a hundred thousand files have some 30 MB), and of what comes
#: with an error; and the seconds that either may take.
_MOST_LISTING, _MOST_REFUSAL, _LISTING_SECONDS = 1 << 25, 1 << 16, 25

#: The seconds that the head of an answer may take, after redirects; and those that a download, of which many
#: megabytes are written at once, may leave the cache unchanged.
_HEAD_SECONDS, _STILL_SECONDS = 60, 600

#: What to say does not end.
_ANSWER = "An answer of"

#: Where so many seconds of waiting bring fewer bytes a second than this, there is no point in waiting on.
_SLOW_SECONDS, _LEAST_RATE = 25, 1000

Result = TypeVar("Result")

#: Identifies this library to the Hub.
WE: dict[str, Any] = {"library_name": "deltaweights", "library_version": __version__}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its size, its git id and, for LFS files, its published SHA-256."""

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit: its present name, and its files by path."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]


def find_repository(repo_id: str, revision: str | None) -> Repository:
    """Look up a repository, and the commit of a revision (the main branch if None).

    Raises:
        HubReadError: it cannot be found or read.
    """
    with explained(repo_id, revision):
        found = patiently(lambda: _ask(repo_id, revision))
    _log.debug("%s is at commit %s, with %d files", found.repo_id, found.commit, len(found.files))
    return found


def patiently(action: Callable[[], Result]) -> Result:
    """Run ``action``, with a few retries after temporary errors."""
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:
            time.sleep(_pause(error, attempt, RETRY_DELAYS[:3]))
        attempt += 1


class _Lfs(msgspec.Struct):
    sha256: str | None = None


class _Sibling(msgspec.Struct):
    """A file in a listing."""

    rfilename: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    blob: str | None = msgspec.field(default=None, name="blobId")
    lfs: _Lfs | None = None


class _Listing(msgspec.Struct):
    """What the Hub says of a repository, as far as it is asked for here."""

    id: str
    sha: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40,64}\Z")]
    siblings: list[_Sibling] | None = None


def _ask(repo_id: str, revision: str | None) -> Repository:
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo_id)
    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    if revision is not None:
        url += f"/revision/{quote(revision, safe='')}"
    listing = msgspec.json.decode(_whole_answer(f"{url}?blobs=true"), type=_Listing)
    files = {}
    for sibling in listing.siblings or ():
        digest = sibling.lfs.sha256 if sibling.lfs else None
        is_digest = digest is not None and re.fullmatch(r"[0-9a-f]{64}", digest)
        files[sibling.rfilename] = RemoteFile(sibling.size, sibling.blob or "", digest if is_digest else None)
    return Repository(listing.id, listing.sha, files)


def _whole_answer(url: str) -> bytes:
    """The body of an answer that is read whole: it has a most size, and a time to be there."""
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(**WE)
    timeout = min(constants.HF_HUB_DOWNLOAD_TIMEOUT, _LISTING_SECONDS)
    with _answer_to(url, headers, timeout) as response:
        _bound(response, _MOST_LISTING if response.is_success else _MOST_REFUSAL)
        hf_raise_for_status(response)
        body = bytearray()
        for piece in response.iter_bytes():  # decompressed
            body += piece
            if len(body) > _MOST_LISTING:
                raise _too_much(_MOST_LISTING)
        count(fetched=len(body))
        return bytes(body)


@contextmanager
def _answer_to(url: str, headers: dict[str, str], timeout: float) -> Iterator[Any]:
    """An answer whose head is there; its body can be read within the block."""
    from huggingface_hub import get_session

    asked = get_session().stream("GET", url, headers=headers, timeout=timeout)
    response = within(_HEAD_SECONDS, asked.__enter__, what=_ANSWER, late=lambda answer: answer.close())
    try:
        yield response
    finally:
        response.close()


def _bound(response: Any, most: int) -> None:
    """Make reading it fail where more than ``most`` bytes come, or where they take too long."""
    http = import_module(http_error().__module__.partition(".")[0])
    inner, deadline = response.stream, time.monotonic() + _LISTING_SECONDS

    class Bounded(http.SyncByteStream):  # type: ignore[misc,name-defined]
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for piece in inner:
                count += len(piece)
                if count > most:
                    raise _too_much(most)
                if time.monotonic() > deadline:
                    raise _too_slow(f"it is not all there after {_LISTING_SECONDS} seconds")
                yield piece

        def close(self) -> None:
            inner.close()

    response.stream = Bounded()


def _too_much(most: int) -> HubReadError:
    return does_not_end(_ANSWER, f"it has more than {most:,} bytes", retryable=False)


def _too_slow(why: str) -> HubReadError:
    return does_not_end(_ANSWER, why)


class _Pace:
    """Notices an answer that comes so slowly that it need never end. Only waiting counts, not what is done
    with the bytes meanwhile."""

    def __init__(self) -> None:
        self._waited, self._count = 0.0, 0

    def watch(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces.

        Raises:
            HubReadError: they came too slowly for too long.
        """
        while True:
            start = time.monotonic()
            piece = next(pieces, None)
            self._waited += time.monotonic() - start
            if piece is None:
                return
            self._count += len(piece)
            if self._waited > _SLOW_SECONDS:
                if self._count < _SLOW_SECONDS * _LEAST_RATE:
                    raise _too_slow(f"{self._count:,} bytes came in {_SLOW_SECONDS} seconds")
                self._waited, self._count = 0.0, 0
            yield piece


class Downloader:
    """Reads ranges of one repository's files, any number at once. Resumes where a connection broke."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        #: Signed links from the Hub's redirects, by path. They are valid for about an hour, and save requests
        #: to the Hub, which limits their number. None after a refused link.
        self._links: dict[str, str | None] = {}
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the pauses between attempts."""
        self._cancelled.set()

    def fetch(self, path: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes of the file from ``start`` to ``end``, in pieces.

        Raises:
            HubReadError: they cannot be read.
            CancelledError: :meth:`cancel` was called, and a pause was due.
        """
        attempt, pace = 0, _Pace()
        _log.debug("reading bytes %d to %d of %s in %s", start, end, path, self._repository.repo_id)
        with explained(self._repository.repo_id, self._repository.commit, path):
            while start < end:
                try:
                    for piece in pace.watch(self._attempt(path, start, end)):
                        start += len(piece)
                        count(fetched=len(piece))
                        attempt = 0
                        yield piece
                    if start < end:
                        raise ConnectionError("the answer ended early")
                except Exception as error:
                    if self._cancelled.wait(_pause(error, attempt, RETRY_DELAYS)):
                        raise CancelledError from error
                    attempt += 1

    def _attempt(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from one connection, in pieces."""
        from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        repository, link = self._repository, self._links.get(path)
        url = link or hf_hub_url(repository.repo_id, path, revision=repository.commit)
        headers = build_hf_headers(token=False if link else None, **WE)  # signed links get no token
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with _answer_to(url, headers, timeout) as response:
            if link and response.status_code in (400, 401, 403, 404, 410):
                self._links[path] = None
                raise _LinkRefused
            if not response.is_success:
                _bound(response, _MOST_REFUSAL)
            hf_raise_for_status(response)
            self._check(path, response, start, end)
            if response.history and response.url.netloc != response.history[0].url.netloc:
                self._links.setdefault(path, str(response.url))
            for piece in response.iter_raw():
                start += len(piece)
                if start > end:
                    raise self._odd(path, f"more than {end} bytes came")
                yield piece

    def _check(self, path: str, response: Any, start: int, end: int) -> None:
        """Raise :class:`HubReadError` if the answer is not the requested range."""
        size = self._repository.files[path].size
        asked = f"bytes {start}-{end - 1}/{size}"
        place = re.sub(r"/\*$", f"/{size}", response.headers.get("Content-Range", "nothing"))
        length = response.headers.get("Content-Length", str(end - start))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._odd(path, "it is compressed")
        if response.status_code == 206 and place != asked:
            raise self._odd(path, f"{asked} were asked for, {place} is announced")
        if response.status_code != 206 and (start, end) != (0, size):
            raise self._odd(path, f"{asked} were asked for, and all of the file comes")
        if length != str(end - start):
            raise self._odd(path, f"{end - start} bytes were asked for, {length} are announced")

    def _odd(self, path: str, why: str) -> HubReadError:
        repo_id, commit = self._repository.repo_id, self._repository.commit
        return HubReadError(
            f"The answer for {path} of {repo_id} does not match the request",
            f"{why[0].upper()}{why[1:]}: the Hub, or a proxy on the way, does not serve ranges of files.",
            f"Download the files, and pass their folder: hf download {repo_id} --revision {commit}",
        )


class _LinkRefused(Exception):  # noqa: N818
    """A signed link has expired: ask the Hub for a new one."""


def _pause(error: Exception, attempt: int, delays: tuple[float, ...]) -> float:
    """Seconds to wait before the next attempt. Raises ``error`` if no attempt is left."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, _LinkRefused):
        return 0.0
    wait = _asked_to_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else 0.0
    if not may_pass(error) or attempt >= len(delays) or wait > _LONGEST_WAIT:
        raise error
    wait = max(wait, delays[attempt] * random.uniform(1, 1.5))  # noqa: S311
    _log.info(
        "the Hub is asked again in %.1f s: %s", wait, str(error).partition("\n")[0] or type(error).__name__
    )
    return wait


def _asked_to_wait(headers: Any) -> float:
    """The seconds that a server asks its clients to wait: ``Retry-After``, or the Hub's own ``RateLimit``."""
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    reset = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", headers.get("RateLimit", ""))
    return float(after[1] if after else reset[1] if reset else 0)


def find_cached(repository: Repository, path: str) -> Path | None:
    """The path of a file in the local Hub cache; None if it is not there, complete."""
    from huggingface_hub import try_to_load_from_cache

    with explained(repository.repo_id, repository.commit, path):
        found = try_to_load_from_cache(repository.repo_id, path, revision=repository.commit)
        if not isinstance(found, str) or Path(found).stat().st_size != repository.files[path].size:
            return None
        return Path(found)


def find_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """A repository's folder in the local Hub cache, if there is one. It may lack files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        part = getattr(error, "snapshot_path", None)  # version 2 names an incomplete snapshot
        return Path(part) if part else None
    except HFValidationError:
        return None


def cache_folder() -> Path:
    """The folder of the local Hub cache, which may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def require_cache_space(nbytes: int) -> None:
    """Raise :class:`HubReadError` if the cache's disk has less free space than this."""
    free = free_space(cache_folder())
    if nbytes > free:
        raise cache_full(f"{nbytes:,} bytes are needed, {free:,} are free")


def download(repository: Repository, path: str) -> Path:
    """Download a file into the local Hub cache.

    Raises:
        HubReadError: it cannot be downloaded, or the cache's disk is full.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import repo_folder_name

    def arrived() -> list[tuple[str, int]]:
        """What is on its way into the cache."""
        blobs = cache_folder() / repo_folder_name(repo_id=repository.repo_id, repo_type="model") / "blobs"
        found = []
        for file in blobs.glob("*.incomplete"):
            with suppress(OSError):  # it is there now
                found.append((file.name, file.stat().st_size))
        return sorted(found)

    _log.info("downloading %s of %s into the Hub cache", path, repository.repo_id)
    with explained(repository.repo_id, repository.commit, path), without_bars():
        get = partial(hf_hub_download, repository.repo_id, path, revision=repository.commit, **WE)
        found = Path(within(_STILL_SECONDS, get, what=f"The download of {path} from", progress=arrived))
    size = repository.files[path].size
    count(fetched=size, written=size)
    return found


@contextmanager
def without_bars() -> Iterator[None]:
    """Turn off huggingface_hub's progress bars within the block: only the command line prints."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
