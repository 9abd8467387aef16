"""New files in a store: sent while they are written, where size and digest are known; else once they are
complete, from a spool on a disk of this machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager

from ...errors import DiskSpaceError, OutputError
from ...workers import MemoryBudget
from ..destination import WritableFile
from ..output import DiskFile, full_disk_explained
from .upload import Upload, part_bytes

#: How far a file may be written ahead of its first gap.
_WINDOW_BYTES = 8 << 20

#: What all uploads of a run may hold together.
_UPLOADS_BYTES = 96 << 20
_budget = MemoryBudget(_UPLOADS_BYTES)

#: Begins the upload of a file, of so many bytes and with such a SHA-256.
Begin = Callable[[str, int, str], Upload]


@contextmanager
def taking_memory(nbytes: int) -> Iterator[None]:
    """Wait until there is memory for the upload of a file of so many bytes."""
    with _budget.taking(min(nbytes, 2 * part_bytes(nbytes) + _WINDOW_BYTES)):
        yield


class StreamedFile(WritableFile):
    """A file that is sent while it is written, about in order. A thread whose bytes are far ahead of those
    that are missing waits for them.

    Args:
        path: its name in messages.
        size, sha256: what it will have.
        begin: begins its upload.
    """

    def __init__(self, path: str, size: int, sha256: str, begin: Begin) -> None:
        super().__init__(path)
        self._size = size
        self._promised = sha256
        self._begin = begin
        self._upload: Upload | None = None
        self._sha256 = hashlib.sha256()
        self._changed = threading.Condition()
        self._next = 0  # the end of what is sent, or being sent
        self._ahead: dict[int, bytes] = {}
        self._ahead_bytes = 0
        self._is_sending = self._failed = False
        self._held = ExitStack()

    def __enter__(self) -> StreamedFile:
        with ExitStack() as held:
            held.enter_context(taking_memory(self._size))
            self._upload = self._begin(self.path, self._size, self._promised)
            held.callback(self._upload.discard)
            self._held = held.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()

    def write_at(self, offset: int, *data: bytes | memoryview) -> None:
        """Write the parts ``data``, one after the other, beginning at byte ``offset``."""
        nbytes = sum(map(len, data))
        if not nbytes:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._is_due(offset) or self._fits(nbytes))
            if self._failed:
                raise CancelledError
            if not self._is_due(offset):
                self._ahead[offset] = b"".join(data)
                self._ahead_bytes += nbytes
                return
            self._is_sending = True
            self._next += nbytes
        self._send(*data)

    def _is_due(self, offset: int) -> bool:
        return offset == self._next and not self._is_sending

    def _fits(self, nbytes: int) -> bool:
        return self._ahead_bytes + nbytes <= _WINDOW_BYTES

    def _send(self, *data: bytes | memoryview) -> None:
        """Send the data, and what follows them and has come meanwhile."""
        assert self._upload
        parts: tuple[bytes | memoryview, ...] | None = data
        try:
            while parts:
                for part in parts:
                    self._sha256.update(part)
                    self._upload.write(part)
                with self._changed:
                    parts = self._following()
        except BaseException:
            with self._changed:
                self._failed = True
            raise
        finally:
            with self._changed:
                self._is_sending = False
                self._changed.notify_all()

    def _following(self) -> tuple[bytes, ...] | None:
        part = self._ahead.pop(self._next, None)
        if part is None:
            return None
        self._next += len(part)
        self._ahead_bytes -= len(part)
        self._changed.notify_all()
        return (part,)

    def digest(self) -> tuple[int, str]:
        """The size in bytes and the SHA-256 (hex) of what was written."""
        return self._next, self._sha256.hexdigest()

    def commit(self) -> None:
        """Let it be there.

        Raises:
            OutputError: what was written is not what was promised.
            HubWriteError: it cannot be written, or another writer was first.
        """
        assert self._upload
        if self._ahead or self.digest() != (self._size, self._promised):
            raise OutputError(
                f"{self.path} was damaged on its way",
                f"Its SHA-256 is {self.digest()[1]}, not {self._promised}.",
                "Run the same command again.",
            )
        self._upload.finish()


class SpooledFile(DiskFile):
    """A file that is kept in a temporary file without a name until it is complete, and then sent.

    Args:
        path: its name in messages.
        begin: begins its upload.
        check: raises an error once the run is cancelled.
    """

    def __init__(self, path: str, begin: Begin, check: Callable[[], object]) -> None:
        with full_disk_explained(path), tempfile.TemporaryFile(prefix="deltaweights-") as spool:
            super().__init__(path, os.dup(spool.fileno()))
        self._begin = begin
        self._check = check
        self._digest: tuple[int, str] | None = None

    def __exit__(self, *exc: object) -> None:
        self._close()

    def write_at(self, offset: int, *data: bytes | memoryview) -> None:
        """Write the parts ``data``, one after the other, beginning at byte ``offset``."""
        self._digest = None
        try:
            super().write_at(offset, *data)
        except DiskSpaceError as error:
            raise DiskSpaceError(
                f"The disk of {tempfile.gettempdir()} filled up while writing {self.path}",
                "A file waits there until it is complete, and goes to the store then.",
                "Let TMPDIR name a folder on a larger disk, and run the same command again.",
            ) from error

    def digest(self) -> tuple[int, str]:
        """The size in bytes and the SHA-256 (hex) of the file."""
        self._digest = self._digest or super().digest()
        return self._digest

    def commit(self) -> None:
        """Send it, and let it be there.

        Raises:
            HubWriteError: it cannot be written, or another writer was first.
        """
        size, sha256 = self.digest()
        with taking_memory(size):
            upload = self._begin(self.path, size, sha256)
            try:
                for block in self._blocks(size):
                    self._check()
                    upload.write(block)
                upload.finish()
            finally:
                upload.discard()
        self._close()
