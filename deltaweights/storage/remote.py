"""What the sources far away have in common: their files are read through a window of bytes fetched ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from .local import LocalFile
from .read_ahead import Window, ranges_of
from .source import HEAD_BYTES, Announce, ReadableFile, Source, Span, file_blocks


class FetchedFile(ReadableFile):
    """A file far away. Its first bytes stay in memory once read: a header, or a whole small file. After a
    download, ``local`` is read instead."""

    def __init__(self, path: str, size: int, window: Window) -> None:
        super().__init__(path, size)
        self.head = b""
        self.local: LocalFile | None = None
        self._window = window

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        if self.local:
            self.local.read_into(offset, out)
            return
        known = self.head[offset : offset + len(out)]
        out[: len(known)] = np.frombuffer(known, np.uint8)
        if len(known) < len(out):
            self._window.read_into(self.path, offset + len(known), out[len(known) :])
        if offset == 0 and len(self.head) < len(out) <= HEAD_BYTES:
            self.head = out.tobytes()


class RemoteSource(Source):
    """Files that come over a network, but for those that are on this machine already.

    Attributes:
        window: the bytes fetched ahead.
    """

    window: Window

    @property
    def is_remote(self) -> bool:
        """Always true, even if a cache holds files."""
        return True

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in order, in blocks of at most 1 MiB.

        Raises:
            CheckpointError: at the end, if their SHA-256 differs from :meth:`told_sha256`.
        """
        file = self.open(path)
        with self.expect([Span(path, 0, file.size)]):
            yield from self.compared(path, file_blocks(file))

    @contextmanager
    def announcing(self) -> Iterator[Announce]:
        """Fetch spans ahead of their readers, as far as memory allows."""
        with self.window.announcing() as announce:
            yield lambda spans: announce(self._remote(spans))

    def ranges(self, spans: Iterable[Span]) -> list[Span]:
        """The ranges that come over the network for these spans."""
        return ranges_of(self._remote(spans))

    def _remote(self, spans: Iterable[Span]) -> Iterator[Span]:
        """The parts of the spans that are neither on this machine nor in memory."""
        for path, start, end in spans:
            file = self.open(path)
            if isinstance(file, FetchedFile) and not file.local:
                yield Span(path, max(start, len(file.head)), end)
