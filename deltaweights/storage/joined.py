"""An output folder that several processes, on several machines, write to: one holds it, and others join."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError
from .destination import Destination, SharedOutput
from .local import store_url
from .output import OutputFolder
from .store import JoinedPlace

#: Seconds until a file that one machine wrote to a shared folder is seen by the others.
_SOON, _LOOK = 5.0, 0.2


class JoinedFolder(OutputFolder):
    """The folder of a run that another process holds open; a context manager. What is written here is the
    run's, and that process cleans up.

    Raises:
        OutputError: this machine does not see the folder, or the run is over.
    """

    def __init__(self, shared: SharedOutput) -> None:
        super().__init__(shared.location)
        self._run = shared.run

    def __enter__(self) -> JoinedFolder:
        deadline = time.monotonic() + _SOON
        while not self._is_ours():
            if time.monotonic() > deadline:
                raise self._gone()
            time.sleep(_LOOK)
        self._open_handles()
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_handles()

    def claim(self, paths: Iterable[str]) -> None:
        """Nothing: who holds the folder has claimed what others write."""

    def _temporary_name(self, path: str) -> str:
        """A name of this attempt's own: another one at the same file may still run elsewhere."""
        return f"{super()._temporary_name(path)[:32]}-{secrets.token_hex(8)}.partial"

    def _place(self, temporary: Path, final: Path) -> None:
        if not self._is_ours():  # a later run's files may be others
            raise self._gone()
        super()._place(temporary, final)

    def _is_ours(self) -> bool:
        return self.run_there() == self._run

    def _gone(self) -> OutputError:
        host = platform.node()
        if not os.path.isdir(self.root):
            why = f"{host} has no such folder."
        elif self.run_there():
            why = "A later run writes there."
        else:
            why = f"{host} has another folder of that name, or the run has ended."
        return OutputError(
            f"A task on {host} cannot write to {self.root}",
            why,
            "Every machine of the cluster writes there: use a store, or a folder that all machines share.",
        )


def join_output(shared: SharedOutput) -> Destination:
    """The output that another process shares."""
    return JoinedPlace(shared) if store_url(shared.location) else JoinedFolder(shared)
