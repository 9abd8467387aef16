"""Finds the file system of fsspec for a URL, and lists, opens and pins its files.

Endpoints and credentials come from the chain of the store's own package: its files, environment variables,
roles. Nothing is passed to it here.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ...errors import CheckpointError, OutputError
from .. import hub_client
from .errors import ChangedMeanwhile, Unserved, may_pass, reading, redacted

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: A file's SHA-256 in its metadata, where the store keeps such.
SHA256_KEY = "deltaweights-sha256"

#: The run that wrote a file, in the same place.
RUN_KEY = "deltaweights-run"

#: Schemes that mean the same.
_SAME_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}

#: In a URL of S3, before the id of a version.
_VERSION = "?versionId="

_QUESTIONS_AT_ONCE = 8

_PIECE_BYTES = 1 << 20

#: The most files that a place may have.
_MOST_FILES = 100_000

#: What says that a file is the same one, best first: an id of its content or version, or else its time.
_PINS = (
    *("ETag", "etag", "xet_hash", "Content-MD5", "Digest", "md5Hash", "generation", "VersionId"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file in a store: its path there, its size, and a text that changes with its content."""

    full_path: str
    size: int
    pin: str


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload to a path in a store that was begun, and not ended."""

    full_path: str
    id: str


class Store:
    """A place in a store.

    Attributes:
        where: the URL without anything that may be secret.
        scheme: of the URL.
        system: the file system of fsspec.
        root: the place's path in the file system.
    """

    def __init__(self, url: str) -> None:
        self.where = redacted(url).removesuffix("?…").rstrip("/")
        self.scheme = url.partition("://")[0].lower()
        if "::" in url:
            raise CheckpointError(
                f"{self.where} is a URL in a URL", "Only plain ones are read.", "Unpack the files first."
            )
        self.system, self.root = _system_of(url, self.where)
        self.is_web = self.scheme in ("http", "https")
        self.is_s3 = self.scheme in ("s3", "s3a")
        #: Of the file systems that are not made for many threads: one file may be one object for all.
        is_for_many = getattr(self.system, "async_impl", False) or self.scheme == "hf"
        self._lock = None if is_for_many else _ONE_AT_A_TIME
        self._asking = threading.Lock()

    def require_writable(self) -> None:
        """Raise :class:`OutputError` where files are only read."""
        if self.is_web:
            raise OutputError(
                f"{self.where} cannot be written to",
                "A web server is only read.",
                "Choose a folder or a store.",
            )
        if self.scheme == "hf":
            raise OutputError(
                f"{self.where} cannot be written to",
                "Storage buckets of the Hub are only read: their client refuses no second writer.",
                f"Write to a folder, then copy it: hf buckets sync FOLDER {self.where}",
            )

    def require_nameable(self, path: str) -> None:
        """Raise :class:`OutputError` where no new file can have that path."""
        if self.is_s3 and _VERSION in path:  # it would be cut there
            raise OutputError(f"{path} cannot be written to S3", f"It has {_VERSION} in it.", "Rename it.")

    def full_path(self, path: str) -> str:
        """The path in the file system of the file at the relative ``path``."""
        return f"{self.root.rstrip('/')}/{path}"

    def listing(self) -> dict[str, PinnedFile]:
        """The files there by relative path: all in the folder, or the one that the URL names.

        Raises:
            HubReadError: it cannot be listed, or there is nothing.
        """
        with reading(self.where):
            files = dict(self._files(patiently(self._infos, attempts=3)))
            if not files:
                raise FileNotFoundError(self.where)
            return files

    def find(self) -> dict[str, PinnedFile]:
        """The files under the place by relative path, if it is no web server's; empty if there are none."""
        return dict(self._files(self._found()))

    def pin_now(self, path: str) -> str | None:
        """The pin of the file at the relative ``path``; None if there is none."""
        with self.alone(), suppress(FileNotFoundError):
            self.system.invalidate_cache()
            return pin_of(self.system.info(self.full_path(path)))
        return None

    def get(self, path: str) -> bytes:
        """The bytes of a small file at the relative ``path``; none if it is not there."""
        with self.alone(), suppress(FileNotFoundError):
            data: bytes = self.system.cat_file(self.full_path(path))
            return data
        return b""

    def remove(self, path: str) -> None:
        """Remove the file at the relative ``path``, if it is there."""
        with self.alone(), suppress(FileNotFoundError):
            self.system.rm_file(self.full_path(path))

    def address(self, path: str = "") -> str:
        """A text that is the same for two URLs of the same file, or of the place."""
        scheme = _SAME_SCHEMES.get(self.scheme, self.scheme)
        return f"{scheme}://{self.full_path(path).strip('/')}"

    def is_within(self, other: Store) -> bool:
        """Whether the place is ``other``, or in it."""
        return f"{self.address()}/".startswith(f"{other.address()}/")

    @property
    def has_uploads(self) -> bool:
        """Whether a new file is an upload, which is not visible before its end: so are those of the stores'
        own packages."""
        return self._lock is None

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The arguments that let a new file have metadata, where that is known."""
        if self.is_s3:
            return {"Metadata": dict(metadata)}
        return {"metadata": dict(metadata)} if self.scheme in ("gs", "gcs") else {}

    def told(self, full_path: str) -> dict[str, str]:
        """What a file's metadata says now."""
        if self.is_s3:
            found = self.system.metadata(full_path, refresh=True)
        else:
            with self.alone():
                found = self.system.info(full_path).get("metadata") or {}
        return {str(key).lower().replace("_", "-"): str(value) for key, value in found.items()}

    def uploads(self) -> Iterator[UnfinishedUpload]:
        """The uploads under the place that were begun and not ended, on S3."""
        if not self.is_s3:
            return
        bucket, prefix, _ = self._key(self.root.rstrip("/") + "/")
        asked = {"Bucket": bucket, "Prefix": prefix}
        while True:
            answer = self.system.call_s3("list_multipart_uploads", **asked)
            for one in answer.get("Uploads") or []:
                yield UnfinishedUpload(f"{bucket}/{one['Key']}", one["UploadId"])
            if not answer.get("IsTruncated"):
                break
            asked["KeyMarker"] = answer["NextKeyMarker"]
            asked["UploadIdMarker"] = answer["NextUploadIdMarker"]

    def end_upload(self, upload: UnfinishedUpload) -> None:
        """End an upload, so that its parts take no space."""
        bucket, key, _ = self._key(upload.full_path)
        self.system.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.id)

    def _infos(self) -> dict[str, Mapping[str, Any]]:
        self.system.invalidate_cache()
        if self.is_web and not urlsplit(self.root).path.endswith(".safetensors"):
            folder = self.root.partition("?")[0].rstrip("/") + "/"
            names = [name for name in self.system.find(folder) if "?" not in name]
            return self._asked(names[: _MOST_FILES + 1])
        found = {} if self.is_web else self._found()
        return found or self._asked([self.root])

    def _found(self) -> dict[str, Mapping[str, Any]]:
        """What lies under the place.

        Raises:
            Unserved: too much for a model, such as a whole bucket.
        """
        root, found = self._plain(self.root).rstrip("/") + "/", dict[str, Mapping[str, Any]]()
        for page in self._pages(root):
            found |= {name: info for name, info in page.items() if name.startswith(root)}
            if len(found) > _MOST_FILES:
                raise Unserved(f"it has more than {_MOST_FILES:,} files")
        return found

    def _pages(self, root: str) -> Iterator[Mapping[str, Mapping[str, Any]]]:
        """The listing of S3, page by page: fsspec would hold all of a bucket. Of others, all at once."""
        if not self.is_s3:
            with self.alone():
                self.system.invalidate_cache()
                yield self.system.find(self.root, detail=True)
            return
        bucket, prefix, _ = self._key(root)
        asked = {"Bucket": bucket, "Prefix": prefix}
        while True:
            answer = self.system.call_s3("list_objects_v2", **asked)
            objects = answer.get("Contents") or []
            yield {f"{bucket}/{one['Key']}": {**one, "size": one["Size"]} for one in objects}
            if not answer.get("IsTruncated"):
                return
            asked["ContinuationToken"] = answer["NextContinuationToken"]

    def _asked(self, names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        """What the store says of each file. (Lists on web pages say only names.)"""
        names = list(names)
        with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as threads:
            return dict(zip(names, threads.map(self.system.info, names), strict=True))

    def _files(self, infos: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, PinnedFile]]:
        root = self._plain(self.root).rstrip("/")
        for name, info in sorted(infos.items()):
            plain = self._plain(name)
            path = plain.removeprefix(root).removeprefix("/") or plain.rpartition("/")[2]
            if info.get("type", "file") != "file" or name.endswith("/"):
                continue
            size = info.get("size")
            if not isinstance(size, int) or size < 0:
                raise Unserved(f"the size of {path} is not said")
            yield unquote(path) if self.is_web else path, PinnedFile(name, size, pin_of(info))

    def _plain(self, name: str) -> str:
        """A file's name without what is no part of its path: a query, or the version on S3."""
        if self.is_web:
            return urlsplit(name)._replace(query="").geturl()
        return name.partition(_VERSION)[0] if self.is_s3 and self.system.version_aware else name

    def _key(self, full_path: str) -> tuple[str, str, str | None]:
        """Bucket, key and version on S3."""
        bucket, _, version = self.system.split_path(full_path)
        return bucket, self._plain(full_path)[len(bucket) + 1 :], version

    def require_same(self, file: PinnedFile) -> None:
        """Raise :class:`ChangedMeanwhile` if the store has another version of the file now."""
        if self.is_s3:
            return  # asked for with each range
        with self.alone(), self._asking:
            self.system.invalidate_cache()  # most keep what they listed
            info = self.system.info(file.full_path)
        if info.get("size") != file.size or pin_of(info) != file.pin:
            raise ChangedMeanwhile

    def open(self, file: PinnedFile) -> Any:
        """The file for reading without a cache. Each read is one request, for the pinned version where the
        store can tell."""
        extra: dict[str, Any] = {}
        if self.is_web:
            etag = file.pin if file.pin.startswith('"') else None  # weak ones match nothing
            extra = {"size": file.size, "headers": {"If-Match": etag} if etag else {}}
        with self.alone():
            return self.system.open(file.full_path, "rb", cache_type="none", **extra)

    def read(self, opened: Any, start: int, end: int) -> bytes:
        """Bytes of a file that :meth:`open` returned."""
        with self.alone():
            opened.seek(start)
            data: bytes = opened.read(end - start)
        if len(data) < end - start:
            raise ConnectionError("the answer ended early")
        if len(data) > end - start:
            raise Unserved("more came than was asked for: ranges are not served")
        return data

    def pieces(self, file: PinnedFile, start: int, end: int) -> Iterator[bytes]:
        """Bytes of a file on S3, piece by piece as they come, of the pinned version."""
        from fsspec.asyn import sync  # type: ignore[import-untyped]

        bucket, key, version = self._key(file.full_path)
        asked = {"Range": f"bytes={start}-{end - 1}", "IfMatch": file.pin}
        if version:
            asked["VersionId"] = version
        body = self.system.call_s3("get_object", Bucket=bucket, Key=key, **asked)["Body"]
        try:
            while start < end:
                piece: bytes = sync(self.system.loop, body.read, min(_PIECE_BYTES, end - start))
                if not piece:
                    raise ConnectionError("the answer ended early")
                start += len(piece)
                yield piece
        finally:
            body.close()

    def told_sha256(self, file: PinnedFile) -> str | None:
        """The SHA-256 in the file's metadata, as :class:`StoreFolder` writes it; None if there is none."""
        found = None
        with suppress(Exception):  # it is a help and no more
            if not self.is_web:
                found = self.told(file.full_path).get(SHA256_KEY)
        return found if found and re.fullmatch(r"[0-9a-f]{64}", found) else None

    def alone(self) -> Any:
        """A context manager: one call at a time, of file systems that are not made for many threads."""
        return self._lock or _FREE


class _Free:
    """A lock that is none."""

    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


_FREE = _Free()
_ONE_AT_A_TIME = threading.RLock()


def patiently(
    action: Callable[[], Result],
    *,
    failed: Exception | None = None,
    cancelled: threading.Event | None = None,
    attempts: int | None = None,
) -> Result:
    """Run ``action``, with retries after temporary errors.

    Args:
        failed: what came of the first attempt, which was made already.
        cancelled: ends the wait before a retry, with CancelledError.
        attempts: how often it is retried; by default, for about a minute and a half.
    """
    for attempt in count():
        try:
            if failed:
                raise failed
            return action()
        except Exception as error:
            failed = None
            wait = pause_after(error, attempt, hub_client.RETRY_DELAYS[:attempts])
        if (cancelled or threading.Event()).wait(wait):
            raise CancelledError
    raise AssertionError  # the loop ends by one of these


def pause_after(error: Exception, attempt: int, delays: Sequence[float]) -> float:
    """Seconds to wait before the next attempt. Raises ``error`` if it will not pass, or none is left."""
    if not may_pass(error) or attempt >= len(delays):
        raise error
    wait = delays[attempt] * random.uniform(1, 1.5)  # noqa: S311
    _log.info("the store is asked again in %.1f s: %s", wait, type(error).__name__)
    return wait


def pin_of(info: Mapping[str, Any]) -> str:
    """A text that changes with a file's content, of all that the store says of it; empty if nothing does."""
    found = next((info[key] for key in _PINS if info.get(key)), "")
    return str(found.timestamp()) if isinstance(found, datetime) else str(found)


def _system_of(url: str, where: str) -> tuple[Any, str]:
    import fsspec.core  # type: ignore[import-untyped]
    from fsspec.registry import known_implementations  # type: ignore[import-untyped]

    scheme = url.partition("://")[0]
    if scheme == "hf":
        _require_buckets(where)
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(scheme.lower(), {})
        package = known.get("class", "").partition(".")[0]
        package = "aiohttp requests" if package == "fsspec" and scheme.startswith("http") else package
        raise CheckpointError(
            f"{where} cannot be opened",
            f"{redacted(str(known.get('err') or error)).rstrip('.')}.",
            f"Install what {scheme}:// needs: pip install {package}" if package not in ("", "fsspec") else "",
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be opened", f"{redacted(str(error)).rstrip('.')}.", "Check the URL."
        ) from None
    return system, root


def _require_buckets(where: str) -> None:
    import huggingface_hub

    if not hasattr(huggingface_hub.HfApi, "bucket_info"):
        raise CheckpointError(
            f"{where} cannot be opened",
            f"huggingface_hub {huggingface_hub.__version__} knows no storage buckets.",
            "Update it: pip install -U huggingface_hub",
        )
