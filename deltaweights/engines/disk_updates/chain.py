"""The versions in an output folder: which ones are there, and the next one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import DeltaWeightsError, OutputError
from ...storage import Location, OutputFolder, output_path
from .checksums import CHECKSUMS, ChecksumFormat
from .checksums import checksum as compute_checksum
from .encodings import ENCODINGS, DiskEncoding
from .folder import VersionFolder, is_whole, versions_in
from .layout import MAX_VERSION, UpdateFacts
from .writing import Bytes, Frame, write_checkpoint, write_pointer, write_update

_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class DiskUpdateReport:
    """A version that was written.

    Attributes:
        version: its number; its folder is ``weight_v`` and six digits.
        step: the step of its state.
        is_full: whether it is a full checkpoint.
        changed: names of the tensors in the update; empty for a full checkpoint.
        nbytes: size of its weights and its index.
    """

    version: int
    step: int
    is_full: bool
    changed: tuple[str, ...]
    nbytes: int


class Version(NamedTuple):
    """A version: its number, the digest of its state, the step of its state. The latter are None where
    deltaweights did not write it."""

    number: int
    state: str | None
    step: int | None


def require_plain(run_id: str | None) -> None:
    """Raise :class:`ValueError` if the run's name cannot be that of a folder."""
    if run_id is not None and not _RUN.fullmatch(run_id):
        raise ValueError(f"run_id is {run_id!r}; it must be a plain name of a folder")


def newest_version(directory: Location, run_id: str | None) -> Version | None:
    """The newest version that is whole, as all before it are; None if there is none. A later one that is not
    is written again.

    Raises:
        ValueError: ``run_id`` is no plain name.
    """
    require_plain(run_id)
    folder = output_path(directory) / (run_id or "")
    newest: Version | None = None
    for version in versions_in(folder):
        follows = newest is None or version == newest.number + 1
        if not (follows and is_whole(folder, version)):
            break
        try:
            with VersionFolder(folder, version) as found:
                index = found.index
        except DeltaWeightsError:
            break
        newest = Version(version, index.state if index else None, index.step if index else None)
    return newest


class VersionChain:
    """The output folder of versions, locked against a second writer; a context manager.

    Attributes:
        newest: the newest version that is whole, as all before it are; None if there is none.

    Args:
        directory: the folder, created if missing.
        run_id: for stitch: the versions stand in a folder of this name, and ``latest`` names the newest.
        encoding, checksum: of the updates that it writes.
        model: the engine's folder, where full checkpoints are written.

    Raises:
        ValueError: there is no such encoding, checksum, or run.
        DeltaWeightsError: the package that computes the checksum is missing.
        OutputError: it cannot be written to.
    """

    def __init__(
        self,
        directory: Location,
        *,
        run_id: str | None,
        encoding: DiskEncoding,
        checksum: ChecksumFormat,
        model: Checkpoint | None,
    ) -> None:
        for name, value, known in (("encoding", encoding, ENCODINGS), ("checksum", checksum, CHECKSUMS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(known)}")
        compute_checksum(checksum, np.empty(0, np.uint8))  # a missing package is told before anything is done
        self._run_id = run_id
        self._prefix = f"{run_id}/" if run_id else ""
        self._encoding: DiskEncoding = encoding
        self._checksum: ChecksumFormat = checksum
        self._model = model
        with ExitStack() as opened:
            self._folder = opened.enter_context(OutputFolder(directory))
            self.where = os.path.join(self._folder.root, run_id or "")
            self.newest = newest_version(self._folder.root, run_id)
            self._opened = opened.pop_all()

    def __enter__(self) -> VersionChain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._opened.close()

    def facts(self, state: str, step: int) -> UpdateFacts:
        """The facts of the next update, to the state of this digest."""
        before = self.newest.number if self.newest else 0
        if before + 1 >= MAX_VERSION:
            raise OutputError(
                f"There are too many versions in {self.where}", "", "Choose a different folder."
            )
        return UpdateFacts(before + 1, before, self._encoding, self._checksum, state, step)

    def write_update(
        self, facts: UpdateFacts, sizes: Mapping[str, int], frames: Iterable[Frame | None]
    ) -> DiskUpdateReport:
        """Write the next version as an update; see :func:`~.writing.write_update`."""
        changed, nbytes = write_update(self._folder, self._prefix, facts, sizes, frames)
        return self._written(facts, tuple(changed), nbytes, is_full=False)

    def write_checkpoint(
        self, state: str, step: int, read: Callable[[str], Bytes | None]
    ) -> DiskUpdateReport:
        """Write the next version whole; see :func:`~.writing.write_checkpoint`.

        Raises:
            OutputError: the engine's folder was not given.
        """
        facts = self.facts(state, step)
        if self._model is None:
            raise OutputError(
                f"A full checkpoint cannot be written to {self.where}",
                "It has the files of the engine's model folder, which was not given.",
                "Pass that folder.",
            )
        nbytes = write_checkpoint(self._folder, self._prefix, facts.version, self._model, read, (state, step))
        return self._written(facts, (), nbytes, is_full=True)

    def _written(
        self, facts: UpdateFacts, changed: tuple[str, ...], nbytes: int, *, is_full: bool
    ) -> DiskUpdateReport:
        assert facts.step is not None
        self.newest = Version(facts.version, facts.state, facts.step)
        if self._run_id:
            write_pointer(self._folder, self._run_id, facts.version)
        return DiskUpdateReport(facts.version, facts.step, is_full, changed, nbytes)
