"""Where a training run keeps its checkpoints, each whole or not at all: a folder, or a place in a store.

In a folder, a checkpoint is written under another name, and renamed. Stores rename nothing: there, files get
their names, and those that make a checkpoint, its manifest and the record of its training state, come last
and go first.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from ... import canonical
from ...errors import CheckpointError, OutputError
from ...manifest import MANIFEST_NAME, FileRecord, Manifest, is_safe_path
from ...storage import (
    Location,
    Source,
    UnlockedPlace,
    blocks_at,
    flush_folder,
    lock,
    open_source,
    open_unlocked,
    output_path,
    sha256_of,
    store_url,
)
from ...storage.output import full_disk_explained
from .training_state import write

_NAME = re.compile(r"step-(\d{8,})(?:-on-(\d{8,}))?", re.ASCII)
_TRAINING = re.compile(r"training-(\d{8,})", re.ASCII)

#: Writes the delta of a checkpoint to a location.
MakeCheckpoint = Callable[[Location], Manifest]


class RunFolder(ABC):
    """The checkpoints of a run.

    Attributes:
        where: the place's name in messages, without secrets.
        location: the place: a path or a URL.
    """

    where: str
    location: Location

    @abstractmethod
    def chains(self) -> dict[int, list[Location]]:
        """As :func:`list_checkpoints`."""

    @abstractmethod
    def require_writable(self) -> None:
        """Find out now what would fail later.

        Raises:
            OutputError: the place cannot be written to, or another process holds it.
        """

    @abstractmethod
    def hold(self) -> None:
        """Become the one that writes there, and remove what is half made.

        Raises:
            OutputError: the place cannot be written to, or another process holds it.
        """

    @abstractmethod
    def release(self) -> None:
        """Let others write there."""

    @abstractmethod
    def publish(
        self, step: int, parent: int | None, make: MakeCheckpoint, training: Mapping[str, object] | None
    ) -> Manifest:
        """Add a checkpoint, whole or not at all.

        Args:
            step: its step.
            parent: the step of the one that it is made against; None for the base.
            make: writes it.
            training: what else training needs to go on, by file name.
        """

    @abstractmethod
    def training_folder(self, step: int) -> Path | None:
        """The folder of this machine with what was kept beside a checkpoint; None if there is nothing."""

    @abstractmethod
    def training_steps(self) -> set[int]:
        """The steps of the checkpoints beside which something was kept."""

    @abstractmethod
    def remove(self, checkpoint: Location) -> None:
        """Remove a checkpoint, one of :meth:`chains`."""

    @abstractmethod
    def prune_training(self, steps: Collection[int]) -> None:
        """Remove what is beside all checkpoints but these. It goes before its checkpoint, and is no use to a
        later one."""


def open_run(folder: Location) -> RunFolder:
    """The checkpoints in a folder, or at the URL of a place in a store.

    Raises:
        OutputError, CheckpointError: no path or URL can look like this.
    """
    url = store_url(folder)
    return StoreRun(url) if url else LocalRun(folder)


def name_of(step: int, parent: int | None) -> str:
    """The name of a checkpoint that is made against the one of the step ``parent``, or against the base."""
    return f"step-{step:08d}{'' if parent is None else f'-on-{parent:08d}'}"


def chains_of(places: Mapping[str, Location]) -> dict[int, list[Location]]:
    """The chains by step, of checkpoints by name. One whose chain is incomplete is left out."""
    found = {}
    for name, place in places.items():
        if match := _NAME.fullmatch(name):
            found[int(match[1])] = place, int(match[2]) if match[2] else None
    chains: dict[int, list[Location]] = {}
    for step in sorted(found):
        place, parent = found[step]
        if parent is None:
            chains[step] = [place]
        elif parent in chains:
            chains[step] = [*chains[parent], place]
    return chains


_PARTIAL, _PARTIAL_TRAINING, _TRASH, _LOCK = ".partial", ".partial-training", ".trash", ".lock"


class LocalRun(RunFolder):
    """A run's folder on this machine. Each checkpoint gets its name by one rename."""

    def __init__(self, folder: Location) -> None:
        self._root = output_path(folder)
        self.location = self._root
        self.where = str(self._root)
        self._lock: IO[bytes] | None = None

    def chains(self) -> dict[int, list[Location]]:
        """As :func:`list_checkpoints`."""
        return chains_of({path.name: path for path in self._paths()})

    def _paths(self) -> list[Path]:
        return list(self._root.iterdir()) if self._root.is_dir() else []

    def require_writable(self) -> None:
        """Lock the folder, unless that is done."""
        self.hold()

    def hold(self) -> None:
        """Lock the folder, unless that is done."""
        if self._lock is None:
            self._lock = _lock(self._root)
            for name in (_PARTIAL, _PARTIAL_TRAINING, _TRASH):  # an earlier process was killed
                shutil.rmtree(self._root / name, ignore_errors=True)

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock:
            self._lock.close()

    def publish(
        self, step: int, parent: int | None, make: MakeCheckpoint, training: Mapping[str, object] | None
    ) -> Manifest:
        """Add a checkpoint: it is renamed once it is whole, after what is kept beside it."""
        beside, unfinished = self._root / _PARTIAL_TRAINING, self._root / _PARTIAL
        for left_over in (beside, unfinished):
            shutil.rmtree(left_over, ignore_errors=True)
        if training is not None:
            write(beside, training)
        manifest = make(unfinished)
        if training is not None:
            self.prune_training(self.chains())  # what a run that was killed left at this step
            _rename(beside, self._training(step))
        _rename(unfinished, self._root / name_of(step, parent))
        return manifest

    def _training(self, step: int) -> Path:
        return self._root / f"training-{step:08d}"

    def training_folder(self, step: int) -> Path | None:
        """The folder with what was kept beside a checkpoint; None if there is nothing."""
        folder = self._training(step)
        return folder if folder.is_dir() else None

    def training_steps(self) -> set[int]:
        """The steps of the checkpoints beside which something was kept."""
        return {int(match[1]) for path in self._paths() if (match := _TRAINING.fullmatch(path.name))}

    def remove(self, checkpoint: Location) -> None:
        """Remove a folder. It is renamed first, so that a half-deleted one is never taken for a
        checkpoint."""
        trash = self._root / _TRASH
        shutil.rmtree(trash, ignore_errors=True)
        _rename(Path(checkpoint), trash)
        shutil.rmtree(trash, ignore_errors=True)

    def prune_training(self, steps: Collection[int]) -> None:
        """Remove what is beside all checkpoints but these."""
        for step in self.training_steps().difference(steps):
            self.remove(self._training(step))


def _lock(folder: Path) -> IO[bytes]:
    """Create the folder, and lock it until the returned file is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "wb")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}", f"{error.strerror}.") from error
    try:
        lock(file)
    except BlockingIOError as error:
        file.close()
        raise OutputError(
            f"{folder} is being written to by another process",
            f"It holds {folder / _LOCK}.",
            "Wait for it, or choose another folder.",
        ) from error
    except OSError as error:
        file.close()
        raise OutputError(
            f"Cannot lock {folder}", f"{error.strerror}.", "Choose a folder on another file system."
        ) from error
    return file


def _rename(old: Path, new: Path) -> None:
    """Rename a folder within its parent, and flush the change to disk."""
    try:
        os.rename(old, new)
        flush_folder(new.parent)
    except OSError as error:
        raise OutputError(f"Cannot rename {old} to {new.name}", f"{error.strerror}.") from error


_RECORD_NAME = "deltaweights-training.json"
_MAX_RECORD_BYTES = 1 << 20
_FORMAT = canonical.Format("deltaweights-training", 1, f"The {_RECORD_NAME}", _MAX_RECORD_BYTES)
#: Says which process writes to the place.
_HOLDER = ".deltaweights/run"


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The document of a training state in a store: its files. It comes last, and goes first."""

    files: tuple[FileRecord, ...]
    format: Literal["deltaweights-training"] = "deltaweights-training"
    format_version: int = _FORMAT.version


def parse_training_record(data: bytes, where: str) -> TrainingRecord:
    """The document of a training state.

    Args:
        where: its name in messages.

    Raises:
        CheckpointError: it is damaged.
        FormatVersionError: its format version is another one.
    """
    damaged = partial(_damaged, where)
    record = canonical.decode(data, TrainingRecord, _FORMAT, damaged)
    names = {file.path for file in record.files}
    if len(names) < len(record.files) or any("/" in name or not is_safe_path(name) for name in names):
        raise damaged("It names a file twice, or one that lies elsewhere")
    return record


def _damaged(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged", f"{why}.", "Go on from another checkpoint.")


class StoreRun(RunFolder):
    """A run's place in a store. There is no lock: who comes last holds the place, and who held it before gets
    an error.

    Args:
        url: the place.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._place = open_unlocked(url)
        self.where = self.location = self._place.where
        self._holder = b""
        self._fetched: dict[int, Path] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def chains(self) -> dict[int, list[Location]]:
        """As :func:`list_checkpoints`, by URL."""
        whole = _folders_with(MANIFEST_NAME, self._place.sizes())
        return chains_of({name: f"{self._url}/{name}" for name in whole})

    def require_writable(self) -> None:
        """Raise :class:`OutputError` where files are only read. Nothing is taken over: this process may only
        read, too."""
        self._place.require_writable()

    def hold(self) -> None:
        """Take the place over, unless that is done."""
        if self._holder:
            return
        holder = secrets.token_hex(16).encode()
        _put(self._place, _HOLDER, holder, over=self._place.mark(_HOLDER))
        self._holder = holder
        there = self._place.sizes()
        whole = _folders_with(MANIFEST_NAME, there) | _folders_with(_RECORD_NAME, there)
        for path in there:
            if _is_part(path) and path.partition("/")[0] not in whole:
                self._place.remove(path)
        with suppress(Exception):  # not everyone may list uploads
            self._place.end_uploads(_is_part)

    def release(self) -> None:
        """Let go of the place, and remove what was fetched from it."""
        holder, self._holder = self._holder, b""
        with suppress(Exception):  # what remains hinders nobody
            if holder and self._place.read(_HOLDER) == holder:
                self._place.remove(_HOLDER)
        self._fetched.clear()
        if self._copies:
            self._copies.cleanup()
            self._copies = None

    def _require_held(self) -> None:
        if self._place.read(_HOLDER) != self._holder:
            raise OutputError(
                f"{self.where} is being written to by another process",
                "It began after this one.",
                "Stop one of the two, or choose another place.",
            )

    def publish(
        self, step: int, parent: int | None, make: MakeCheckpoint, training: Mapping[str, object] | None
    ) -> Manifest:
        """Add a checkpoint: its manifest comes last, after what is kept beside it."""
        self._require_held()
        name = name_of(step, parent)
        self.prune_training(self.chains())  # what a run that was killed left at this step
        if training is not None:
            self._put_training(step, training)
        try:
            manifest = make(f"{self._url}/{name}")
        except BaseException:
            with suppress(Exception):  # it is invisible, and removed by who writes here next
                self._require_held()
                self._remove(name, MANIFEST_NAME)
                self.prune_training(self.chains())
            raise
        try:
            self._require_held()
        except OutputError:  # the other one may have removed parts of it meanwhile
            self._place.remove(f"{name}/{MANIFEST_NAME}")
            raise
        return manifest

    def _put_training(self, step: int, values: Mapping[str, object]) -> None:
        folder, records = _training_name(step), []
        with tempfile.TemporaryDirectory(prefix="deltaweights-") as temporary:
            here = Path(temporary) / folder
            write(here, values)
            for path in sorted(here.iterdir()):
                record = FileRecord(path.name, path.stat().st_size, sha256_of(blocks_at(path.name, path)))
                there = f"{folder}/{path.name}"
                with self._place.create(there, size=record.size, sha256=record.sha256) as file:
                    file.write_blocks(blocks_at(path.name, path))
                    file.commit()
                path.unlink()
                records.append(record)
        document = canonical.encode(TrainingRecord(tuple(records)))
        _put(self._place, f"{folder}/{_RECORD_NAME}", document)

    def training_folder(self, step: int) -> Path | None:
        """A copy on this machine of what was kept beside a checkpoint, there until :meth:`release`; None if
        there is nothing."""
        if step not in self._fetched and step in self.training_steps():
            with full_disk_explained(f"to {tempfile.gettempdir()}"):
                self._copies = self._copies or tempfile.TemporaryDirectory(prefix="deltaweights-")
                folder = Path(self._copies.name) / _training_name(step)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                with open_source(f"{self._url}/{_training_name(step)}") as source:
                    _fetch_training(source, folder)
                self._fetched[step] = folder
        return self._fetched.get(step)

    def training_steps(self) -> set[int]:
        """The steps of the checkpoints beside which something was kept."""
        names = _folders_with(_RECORD_NAME, self._place.sizes())
        return {int(match[1]) for name in names if (match := _TRAINING.fullmatch(name))}

    def remove(self, checkpoint: Location) -> None:
        """Remove a checkpoint, its manifest first."""
        self._remove(os.fspath(checkpoint).rpartition("/")[2], MANIFEST_NAME)

    def _remove(self, name: str, document: str) -> None:
        """Remove a folder's files, the document that makes it whole first."""
        self._place.remove(f"{name}/{document}")
        for path in self._place.sizes():
            if path.startswith(f"{name}/"):
                self._place.remove(path)

    def prune_training(self, steps: Collection[int]) -> None:
        """Remove what is beside all checkpoints but these."""
        names = {path.partition("/")[0] for path in self._place.sizes()}
        for name in sorted(names):
            if (match := _TRAINING.fullmatch(name)) and int(match[1]) not in steps:
                self._fetched.pop(int(match[1]), None)
                self._remove(name, _RECORD_NAME)


def _training_name(step: int) -> str:
    return f"training-{step:08d}"


def _is_part(path: str) -> bool:
    """Whether a path is that of a checkpoint's file, or of one beside it."""
    folder, _, name = path.partition("/")
    return bool(name and (_NAME.fullmatch(folder) or _TRAINING.fullmatch(folder)))


def _folders_with(document: str, paths: Iterable[str]) -> set[str]:
    """The folders, directly in the place, that hold this document."""
    found = (path.partition("/") for path in paths)
    return {folder for folder, _, name in found if name == document}


def _put(place: UnlockedPlace, path: str, data: bytes, over: str | None = None) -> None:
    with place.create(path, over=over) as file:
        file.write_at(0, data)
        file.commit()


def _fetch_training(source: Source, folder: Path) -> None:
    """Copy a training state to a folder, and compare it with its record."""
    nbytes = min(source.sizes[_RECORD_NAME], _MAX_RECORD_BYTES + 1)
    record = parse_training_record(source.open(_RECORD_NAME).read(0, nbytes), source.name(_RECORD_NAME))
    for file in record.files:
        if source.sizes.get(file.path) != file.size:
            raise _damaged(source.where, f"{file.path!r} is missing or not of the record's size")
        with open(folder / file.path, "wb") as copy:
            copy.writelines(source.blocks(file.path))
        if sha256_of(blocks_at(file.path, folder / file.path)) != file.sha256:
            raise _damaged(source.where, f"The SHA-256 of {file.path!r} is not the record's")
