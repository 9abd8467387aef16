"""A source as text, for another process or machine that has to read the same version of it."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field

from ..errors import CheckpointError, ExecutorError
from .location import open_source
from .source import Source


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A source, and what says that its files are the ones that were seen.

    Attributes:
        location: opens it, on each machine; it may hold secrets.
        where: its name in messages.
        left_out: files there that are no part of it.
        pins: changes with every file that is a part of it.
    """

    location: str = field(repr=False)
    where: str
    left_out: tuple[str, ...]
    pins: str

    @classmethod
    def of(cls, source: Source) -> PinnedSource:
        """Pin ``source`` as it is open here.

        Raises:
            ExecutorError: other machines cannot open it, such as tensors in memory.
        """
        if source.location is None:
            raise ExecutorError(
                f"{source.where} cannot be read by other machines",
                "It is in the memory of this process.",
                "Save it to a shared folder or a store, or work without an executor.",
            )
        return cls(source.location, source.where, tuple(source.left_out), _pins(source))

    def open(self) -> Source:
        """Open it, the same version.

        Raises:
            ExecutorError: it is not there, or its files have changed.
        """
        try:
            source = open_source(self.location)
        except CheckpointError as error:
            raise ExecutorError(
                f"{self.where} cannot be read on {platform.node()}",
                f"{error.what}{': ' + error.why if error.why else ''}".rstrip(".") + ".",
                "Every machine of the cluster reads it: use a store, the Hub, or a folder that all share.",
            ) from error
        left_out = set(self.left_out)
        source.leave_out(left_out.__contains__)
        if _pins(source) != self.pins:
            source.close()
            raise ExecutorError(
                f"{self.where} is not the same on {platform.node()}",
                "Its files have other sizes or times than when the work was planned: they changed, or that "
                "machine has another folder of the same name.",
                "Run the same command again once they rest; use a store, or a folder that all share.",
            )
        return source


def _pins(source: Source) -> str:
    return hashlib.sha256(
        "\n".join(source.pin(path) for path in sorted(source.sizes)).encode(errors="backslashreplace")
    ).hexdigest()
