"""What training needs besides the weights, in files: the state of optimizer, scheduler, random generators.

Each value is a file that ``torch.save`` writes and ``torch.load(…, weights_only=True)`` reads; bytes are
written as they are. A value that could not be read again is refused.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn, strided

from ...errors import CheckpointError, OutputError
from ...storage import flush_folder
from ..tensors import copied, first_line, settle

_ARCHIVE = b"PK\x03\x04"  # what a file of torch.save begins with
#: Where a tensor is in nested dicts, lists and tuples.
_Place = tuple[object, ...]


class Snapshots:
    """Copies of training states, in memory that is used again. One is in use at a time."""

    def __init__(self) -> None:
        self._tensors: dict[_Place, Tensor] = {}

    def take(self, values: Mapping[str, object]) -> dict[str, object]:
        """Copy values, with all tensors in them, to the CPU's memory, which the next call overwrites."""
        taken: dict[_Place, Tensor] = {}
        originals: list[Tensor] = []
        copies = {name: self._copy((name,), value, taken, originals) for name, value in values.items()}
        settle(originals)
        self._tensors = taken
        return copies

    def clear(self) -> None:
        """Let go of the memory."""
        self._tensors = {}

    def _copy(
        self, place: _Place, value: object, taken: dict[_Place, Tensor], originals: list[Tensor]
    ) -> object:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout != strided or value.is_quantized:
                return value.detach().to("cpu", copy=True)
            originals.append(value)
            taken[place] = copied(value.detach(), self._tensors.get(place))
            return taken[place]
        if isinstance(value, dict):
            return {key: self._copy((*place, key), item, taken, originals) for key, item in value.items()}
        if isinstance(value, list) or type(value) is tuple:  # other tuples may need arguments
            parts = [
                self._copy((*place, number), part, taken, originals) for number, part in enumerate(value)
            ]
            return parts if isinstance(value, list) else tuple(parts)
        return copy.deepcopy(value)


def write(folder: Path, values: Mapping[str, object]) -> None:
    """Write a new folder with a file for each value.

    Raises:
        CheckpointError: a value could not be loaded again.
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir()
        for name, value in values.items():
            with open(folder / name, "wb") as file:
                if isinstance(value, bytes):
                    file.write(value)
                else:
                    _save(name, value, file)
                file.flush()
                os.fsync(file.fileno())
            if not isinstance(value, bytes):
                _require_loadable(folder / name)
        flush_folder(folder)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}", f"{error.strerror}.") from error


def read(folder: Path) -> dict[str, object]:
    """The values of all files in ``folder``, their tensors on the CPU.

    Raises:
        CheckpointError: a file is damaged, or holds more than plain data.
    """
    return {path.name: _load(path) for path in sorted(folder.iterdir())}


def _save(name: str, value: object, file: IO[bytes]) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:  # torch's own, where the disk is full
        told = error.__context__
        why = told.strerror if isinstance(told, OSError) else first_line(error)
        raise OutputError(f"Cannot write {name}", f"{why}.") from error
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise _not_plain(name, error) from error


def _require_loadable(path: Path) -> None:
    """Read the file's structure; its tensors are only mapped."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _not_plain(path.name, error) from error


def _not_plain(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be saved",
        f"torch.load(…, weights_only=True) would not read it: {first_line(error)}",
        "Keep numbers, strings, tensors, lists and dicts in the state; or see add_safe_globals of torch.",
    )


def _load(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            if file.read(4) != _ARCHIVE:
                file.seek(0)
                return file.read()
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}", f"{error.strerror}.") from error
    except Exception as error:  # torch raises whatever its parts do
        raise CheckpointError(
            f"{path} cannot be read",
            f"It is damaged, or holds more than plain data: {first_line(error)}",
            "Go on from another checkpoint.",
        ) from error
