"""Sources of a checkpoint's or a delta's files: a set of relative paths, read by position.

Every kind of source is a :class:`Source`: local.py has folders and files, hub.py the Hub; delta/chain.py
rebuilds a target, and torch/models/memory.py holds one in memory.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, HubReadError

_BLOCK_BYTES = 1 << 20

#: The first bytes of a safetensors file, read at once: more than nearly any header.
HEAD_BYTES = 1 << 16

Self = TypeVar("Self", bound="Source")


class ReadableFile(ABC):
    """A file that several threads can read at once, each at its own position.

    Args:
        path: its name in messages.
        size: bytes.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8, any length) with the file's bytes, beginning at byte ``offset``.

        Raises:
            CheckpointError: the file has no such bytes, or they cannot be read.
        """
        self._require(offset, out.size)
        self._read_into(offset, out)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes, beginning at byte ``offset``; raises like :meth:`read_into`."""
        # Checked first: a hostile number must not allocate more memory than the file's size.
        self._require(offset, nbytes)
        return self._read(offset, nbytes)

    def _require(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0:
            raise CheckpointError(
                f"{self.path} has no such bytes", f"The request was for {nbytes} bytes at byte {offset}."
            )
        if offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} ends too early",
                f"It has {self.size} bytes; {offset + nbytes} are needed.",
                "Get the file again.",
            )

    @abstractmethod
    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """:meth:`read_into` for bytes that the file has."""

    def _read(self, offset: int, nbytes: int) -> bytes:
        """:meth:`read` for bytes that the file has."""
        out = np.empty(nbytes, np.uint8)
        self._read_into(offset, out)
        return out.tobytes()


class Span(NamedTuple):
    """The bytes of the file at ``path`` from ``start`` to ``end``."""

    path: str
    start: int
    end: int


#: Takes spans that will be read: see :meth:`Source.announcing`.
Announce: TypeAlias = Callable[[Iterable[Span]], None]


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the Hub and its commit, where known."""

    repo_id: str | None = None
    revision: str | None = None


class Source(ABC):
    """A set of files; a context manager that closes it. A subclass must define :meth:`open` and
    :meth:`fingerprint`; the other methods default to those of a local disk.

    Args:
        where: its name in messages.
        sizes: each relative POSIX path, and the file's size in bytes.
        root: the file or folder that it is, on this machine; None for one that lies elsewhere.
        hub_id: the repository and commit that it is, or a copy of.
        left_out: what stands there and does not count.
        unreadable: what stands there and cannot be read, with the reason: an error only where it is needed.
    """

    def __init__(
        self,
        where: str,
        sizes: Mapping[str, int],
        *,
        root: Path | None = None,
        hub_id: HubId | None = None,
        left_out: tuple[str, ...] = (),
        unreadable: Mapping[str, CheckpointError] | None = None,
    ) -> None:
        self.where = where
        self.sizes = sizes
        self.root = root
        self.hub_id = hub_id or HubId()
        self.left_out = left_out
        self.unreadable = unreadable or {}

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def origins(self) -> list[Source]:
        """The sources of the bytes: this one, unless it is made of others."""
        return [self]

    @property
    def is_remote(self) -> bool:
        """Whether any of it comes over a network."""
        return False

    @property
    def location(self) -> str | None:
        """What opens it again, on every machine that reaches it; None if nothing does. May hold secrets."""
        return None

    def pin(self, path: str) -> str:
        """A text that is the same on every machine that reads this version of the file, and hardly on one
        that reads another."""
        return self.fingerprint(path)

    def require_readable(self) -> None:
        """Raise :class:`CheckpointError` where any of it cannot be read."""
        for error in self.unreadable.values():
            raise error

    def leave_out(self, is_left_out: Callable[[str], bool]) -> None:
        """From now on, files whose path is left out are no part of it."""
        gone = {path for path in self.sizes if is_left_out(path)}
        if gone:
            self.sizes = {path: size for path, size in self.sizes.items() if path not in gone}
            self.left_out = tuple(sorted({*self.left_out, *gone}))
        self.unreadable = {path: why for path, why in self.unreadable.items() if not is_left_out(path)}

    @abstractmethod
    def open(self, path: str) -> ReadableFile:
        """The file at ``path``, one of :attr:`sizes`; open until :meth:`close`."""

    @abstractmethod
    def fingerprint(self, path: str) -> str:
        """A text that is cheap to find, and different after every change of the file."""

    def name(self, path: str) -> str:
        """The file's name for messages."""
        return f"{path} in {self.where}"

    def full_path(self, path: str) -> Path | None:
        """The file's path on this machine, with links resolved; None if it is elsewhere."""
        return None

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB. Bytes from a network are compared with
        :meth:`published_sha256` at the end."""
        return file_blocks(self.open(path))

    def published_sha256(self, path: str) -> str | None:
        """The file's published SHA-256 (hex), known without reading the file; None if there is none, or no
        such file."""
        return None

    def checked_sha256(self, path: str) -> str | None:
        """The file's SHA-256 (hex), if every byte read from it is known to be right, so that computing it is
        pointless; else None. A copy in a cache may have changed, so it has none."""
        return None

    def told_sha256(self, path: str) -> str | None:
        """:meth:`published_sha256`, or else the one that a copy in the Hub cache is stored under."""
        return self.published_sha256(path) or _cached_sha256(self.full_path(path))

    def require_sha256(self, path: str, sha256: str) -> None:
        """Compare the SHA-256 of the bytes read with the published one, if there is one.

        Raises:
            CheckpointError: they differ.
        """
        copy = self.full_path(path)
        published = self.told_sha256(path)
        if published in (None, sha256):
            return
        why = f"Its SHA-256 is {sha256}; the published one is {published}."
        if copy:
            raise CheckpointError(
                f"The copy of {self.name(path)} in the Hub cache is damaged",
                why,
                f"Remove {copy} and download it again.",
            )
        raise HubReadError(
            f"{self.name(path)} was damaged in transit", why, "Run the same command again.", retryable=True
        )

    def compared(self, path: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The blocks of a whole file. At the end, their SHA-256 is compared: :meth:`require_sha256`."""
        sha256 = hashlib.sha256()
        for block in blocks:
            sha256.update(block)
            yield block
        self.require_sha256(path, sha256.hexdigest())

    @contextmanager
    def expect(self, spans: Iterable[Span]) -> Iterator[None]:
        """Announce that ``spans`` will be read within the block, each byte once, in about this order, so that
        remote bytes are fetched ahead. This only affects speed: any bytes may be read at any time."""
        with self.announcing() as announce:
            announce(spans)
            yield

    def announcing(self) -> AbstractContextManager[Announce]:
        """:meth:`expect` for spans that become known within the block: call what this gives with them."""
        return nullcontext(lambda spans: None)

    def hold_less(self) -> None:  # noqa: B027
        """Take half the memory for bytes fetched ahead: more bytes of another source are read along with
        them."""

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """The ranges to fetch over a network for these spans, with neighbors and small gaps merged."""
        return []

    def keep(self, paths: Iterable[str]) -> Iterator[int]:
        """Download files to this machine, and read them from there. Yields each file's size once it is
        downloaded."""
        return iter(())

    def cancel(self) -> None:  # noqa: B027
        """End all reads that wait for a network, and all later ones, with
        :class:`concurrent.futures.CancelledError`. Can be called from any thread."""

    def close(self) -> None:  # noqa: B027
        """Close all files and connections. A second call does nothing."""


def _cached_sha256(path: Path | None) -> str | None:
    """The SHA-256 that a large file in the Hub cache is stored under, as the Hub published it at the time of
    the download; None elsewhere. Its bytes may have changed since."""
    match = re.search(r"/models--[^/]+/blobs/([0-9a-f]{64})$", path.as_posix()) if path else None
    return match[1] if match else None


def file_blocks(file: ReadableFile) -> Iterator[bytes]:
    """A file's bytes in order, in blocks of at most 1 MiB."""
    for start in range(0, file.size, _BLOCK_BYTES):
        yield file.read(start, min(_BLOCK_BYTES, file.size - start))


def sha256_of(blocks: Iterable[bytes]) -> str:
    """The SHA-256 of the blocks' concatenation, in hex."""
    sha256 = hashlib.sha256()
    for block in blocks:
        sha256.update(block)
    return sha256.hexdigest()
