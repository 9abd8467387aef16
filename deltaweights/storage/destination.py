"""Where files are written: the base classes of a folder and of a place in a store, held by one run or by
nobody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import DiskSpaceError
from .source import Source

Self = TypeVar("Self", bound="WritableFile")
Place = TypeVar("Place", bound="Destination")


@dataclass(frozen=True, slots=True)
class SharedOutput:
    """An output that a run holds, for those who join it: where it is, and which run."""

    location: str = field(repr=False)  # of a store, it may hold secrets
    run: str


class WritableFile(ABC):
    """A new file, which is there once it is committed: at the end of its ``with`` block without that, it
    never was. Threads may write at different positions at once.

    Args:
        path: its name in messages.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self: Self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *exc: object) -> None:
        """Discard what was not committed."""

    @abstractmethod
    def write_at(self, offset: int, *data: bytes | memoryview) -> None:
        """Write the parts ``data``, one after the other, beginning at byte ``offset``."""

    def write_blocks(self, blocks: Iterable[bytes]) -> None:
        """Write the blocks one after the other, from the start of the file."""
        position = 0
        for block in blocks:
            self.write_at(position, block)
            position += len(block)

    @abstractmethod
    def digest(self) -> tuple[int, str]:
        """The size in bytes and the SHA-256 (hex) of what was written."""

    @abstractmethod
    def commit(self) -> None:
        """Make the file last, and give it its name."""


class Destination(ABC):
    """A place for files with relative POSIX paths; a context manager. It also keeps notes for the next run,
    in case this one is interrupted.

    Attributes:
        where: its name in messages, without secrets.
    """

    where: str

    @abstractmethod
    def __enter__(self: Place) -> Place: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    @abstractmethod
    def share(self) -> SharedOutput:
        """Let others join: :func:`join_output` with what this returns, until it is closed."""

    @abstractmethod
    def create(self, path: str, *, size: int | None = None, sha256: str | None = None) -> WritableFile:
        """A new file that :meth:`WritableFile.commit` will place at ``path``.

        Args:
            size, sha256: what it will have, if that is known: then it can go to a store while it is written,
                as long as it is written about in order.

        Raises:
            OutputError: no file can have that path here.
        """

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether anything has that path, if only a link."""

    @abstractmethod
    def is_regular(self, path: str) -> bool:
        """Whether ``path`` is a real file, reached without symbolic links."""

    @abstractmethod
    def size(self, path: str) -> int:
        """The size of the file at ``path``, in bytes."""

    @abstractmethod
    def blocks(self, path: str) -> Iterator[bytes]:
        """The bytes of the file at ``path``, in blocks."""

    @abstractmethod
    def source(self) -> Source:
        """The files that are there, to be read."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove the file at ``path``."""

    @abstractmethod
    def foreign(self, expected: Collection[str]) -> list[str]:
        """The files that are there though ``expected`` does not name them, sorted; but not what an operating
        system left there."""

    @property
    @abstractmethod
    def claims(self) -> set[str]:
        """The paths that :meth:`claim` noted, in this run and in interrupted ones before it."""

    @abstractmethod
    def claim(self, paths: Iterable[str]) -> None:
        """Note that the files belong to this program, which may replace or remove them."""

    @abstractmethod
    def remove_claims(self, keep: Collection[str]) -> None:
        """Delete the claimed files of earlier runs that are not in ``keep``."""

    @abstractmethod
    def remember(self, name: str, data: bytes) -> None:
        """Keep ``data`` for the next run, in case this one is interrupted."""

    @abstractmethod
    def recall(self, name: str) -> bytes:
        """The data that an interrupted run kept under ``name``; empty if none."""

    @abstractmethod
    def is_inside(self, source: Source) -> bool:
        """Whether it is the folder of ``source``, or in it."""

    @abstractmethod
    def holds(self, source: Source) -> bool:
        """Whether ``source`` is a single file, directly in this place."""

    @abstractmethod
    def require_apart(self, paths: Iterable[str], sources: Iterable[Source]) -> None:
        """Raise :class:`OutputError` if writing ``paths`` would replace a file of ``sources``."""

    @abstractmethod
    def require_distinct(self, paths: Iterable[str]) -> None:
        """Check that the paths are different files here: many file systems ignore case, or the encoding of
        accents.

        Raises:
            OutputError: two paths are the same file, or a path is an existing file with a different name.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """How many bytes are free; None where there is no such limit. (Needs no ``with`` block.)"""

    @abstractmethod
    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        """The sizes of those of the files that are there now. (Needs no ``with`` block.)"""

    def require_space(self, nbytes: int) -> None:
        """Raise :class:`DiskSpaceError` if fewer than ``nbytes`` bytes are free."""
        free = self.free_bytes()
        if free is not None and nbytes > free:
            raise DiskSpaceError(
                f"Not enough free space for {self.where}",
                f"{nbytes:,} bytes are needed, {free:,} are free.",
                "Free some space, or choose a folder on another disk.",
            )

    def cancel(self) -> None:  # noqa: B027
        """End all writes that wait for a network, and all later ones. Can be called from any thread."""


class UnlockedPlace(ABC):
    """A place where several processes put files, each under names of its own. Nobody holds it: there is no
    lock, and there are no notes for a next run.

    Attributes:
        where: its name in messages, without secrets.
    """

    where: str

    @abstractmethod
    def require_writable(self) -> None:
        """Raise :class:`OutputError` where files are only read."""

    @abstractmethod
    def create(
        self, path: str, *, size: int | None = None, sha256: str | None = None, over: str | None = None
    ) -> WritableFile:
        """A new file that :meth:`WritableFile.commit` will place at ``path``.

        Args:
            size, sha256: as for :meth:`Destination.create`.
            over: the :meth:`mark` of the file that it replaces. A store refuses it where another file is, or
                has come meanwhile; in a folder, it replaces any.

        Raises:
            OutputError: nothing can be written there.
        """

    @abstractmethod
    def mark(self, path: str) -> str | None:
        """A text that changes with the file at ``path``; None if there is none."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes of the files that are there now, by path."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of a small file; none if it is not there."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove the file at ``path``, if it is there."""

    @abstractmethod
    def is_at(self, source: Source) -> bool:
        """Whether it is the place of ``source``."""

    @abstractmethod
    def end_uploads(self, is_left_over: Callable[[str], bool]) -> None:
        """End what killed processes began to send to the paths that ``is_left_over`` is true of."""
