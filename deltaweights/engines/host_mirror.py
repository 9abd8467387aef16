"""A stream's weights in checkpoint form, once for all processes of an engine on this machine.

An engine's own parameters are fused and sharded, so that no update could be decoded against them. The mirror
is one mapped file, which the first process that asks fills from the base.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Tensor as StoredTensor
from ..checkpoint import open_checkpoint
from ..delta.pointer import is_pointer_folder
from ..delta.target_recipe import TargetRecipe
from ..dtypes import DTYPES
from ..errors import CheckpointError, DiskSpaceError, OutputError
from ..storage import lock
from ..torch.tensors import byte_view, dtype_of, torch_shape
from ..workers import Workers
from .decoding import decoded, shards_to_load
from .pointer import open_pointed

_log = logging.getLogger(__name__)

#: Where each tensor begins: kernels read whole words, and processors whole lines.
_ALIGNMENT = 64

#: What a thread reads of the base at once.
_READ_BYTES = 16 << 20

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it
_A_DAY = 86400
_PREFIX = "deltaweights-mirror-"

#: Name, safetensors code and shape of each tensor of a stream.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]


class HostMirror:
    """A stream's tensors in a mapped file; a context manager.

    Whoever writes to the tensors sets :attr:`mark` before, to the number of the state that they will be in,
    and one more: so other processes see that the tensors are no longer as they know them.

    Args:
        layout: the stream's tensors.
        key: what all processes of one engine share, and no other engine on this machine.
        base: what the mirror begins with: a folder, a file, a Hub id, or a pointer folder. None: zeros, which
            are in no state of a stream, so that the first update begins at an anchor.
        folder: where the file goes; None: shared memory, or else the folder for temporary files.
        threads: how many read the base.

    Raises:
        CheckpointError: the base cannot be read, or has not the stream's tensors.
        BaseMismatchError, DeltaError: the base is a pointer folder, and what it names is not right.
        OutputError: the file cannot be written.
        DiskSpaceError: there is no room for it.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        key: str,
        base: str | None,
        folder: str | None = None,
        threads: int | None = None,
    ) -> None:
        place = Path(folder) if folder is not None else _usual_folder()
        spans, nbytes = _spans(layout)
        described = hashlib.sha256(f"{os.getuid()} {key} {base} {layout!r}".encode()).hexdigest()[:32]
        self._path = place / f"{_PREFIX}{described}"
        self._layout, self._spans = layout, spans
        try:
            _remove_left_over(place)
            with _locked(self._path.with_suffix(".lock")):
                if not self._path.exists():
                    self._make(nbytes, base, threads)
                self._memory = np.memmap(self._path, np.uint8, "r+")
        except OSError as error:
            raise _no_room(place, nbytes, error) from error
        if self._memory.size != nbytes:
            raise OutputError(f"{self._path} is not a mirror", "It has another size.", "Remove it.")
        with torch.inference_mode(False):  # so that torch counts what is written to it
            self.tensors = self._tensors(torch.from_numpy(self._memory))
        self._mark = self._memory[-8:].view(np.int64)

    def __enter__(self) -> HostMirror:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def mark(self) -> int:
        """0 until somebody writes."""
        return int(self._mark[0])

    @mark.setter
    def mark(self, number: int) -> None:
        self._mark[0] = number

    def unlink(self) -> None:
        """Remove the file's name, once all processes have it mapped: its memory ends with the last of them,
        however that ends. Again does nothing."""
        for path in (self._path, self._path.with_suffix(".lock")):
            with suppress(FileNotFoundError):
                path.unlink()

    def close(self) -> None:
        """Let go of the memory. The tensors must not be used any more."""
        self.unlink()
        self.tensors = {}

    def _make(self, nbytes: int, base: str | None, threads: int | None) -> None:
        """Write the file under a temporary name, and then give it its own: it is whole or not there."""
        if shutil.disk_usage(self._path.parent).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        try:
            with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # else a full disk would be a signal
            if base is not None:
                memory = torch.from_numpy(np.memmap(partial, np.uint8, "r+"))
                _fill(self._tensors(memory), self._layout, base, threads)
            partial.rename(self._path)
        finally:
            partial.unlink(missing_ok=True)
        _log.info("the mirror is %s: %d bytes, from %s", self._path, nbytes, base)

    def _tensors(self, memory: Tensor) -> dict[str, Tensor]:
        return {
            name: memory[start:end].view(dtype_of(name, code)).view(torch_shape(name, code, shape))
            for (name, code, shape), (start, end) in zip(self._layout, self._spans, strict=True)
        }


def _usual_folder() -> Path:
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _spans(layout: Layout) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor lies, and the size of all, and of the mark behind them."""
    spans, end = [], 0
    for name, code, shape in layout:
        dtype_of(name, code)  # one that torch has
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + math.prod(shape) * DTYPES[code].bits // 8
        spans.append((start, end))
    return spans, -(-end // _ALIGNMENT) * _ALIGNMENT + 8


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock, which other processes wait for."""
    import fcntl

    while True:
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_there = False
            with suppress(FileNotFoundError):
                is_there = os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
            if is_there:  # else its last owner has just removed it
                yield
                return


def _remove_left_over(folder: Path) -> None:
    """Remove what engines that were killed while they started left, unless somebody is at it."""
    for path in folder.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError), open(path, "ab") as file:
            info = os.fstat(file.fileno())
            # By then, all processes of an engine have the mirror mapped, and need its name no more.
            if info.st_uid == os.getuid() and info.st_mtime < time.time() - _A_DAY:
                lock(file)
                for left in folder.glob(f"{path.stem}*"):
                    left.unlink(missing_ok=True)


def _no_room(folder: Path, nbytes: int, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
        return DiskSpaceError(
            f"There is no room for the mirror in {folder}",
            f"The stream's tensors take {nbytes:,} bytes.",
            "Give shared memory more (docker run --shm-size), or name another folder for the mirror.",
        )
    return OutputError(f"The mirror cannot be written in {folder}", f"{error.strerror}.", "Name a folder.")


# The base ---------------------------------------------------------------------------------------------------


def _fill(tensors: Mapping[str, Tensor], layout: Layout, base: str, threads: int | None) -> None:
    """Fill the tensors from the base."""
    with ExitStack() as opened:
        workers = opened.enter_context(Workers(threads))
        if os.path.isdir(base) and is_pointer_folder(base):
            target = opened.enter_context(open_pointed(base))
            _fill_from_target(tensors, target, workers)
            return
        checkpoint = opened.enter_context(open_checkpoint(base))
        workers.at_stop(checkpoint.source.cancel)
        pieces = []
        for name, code, shape in layout:
            stored = checkpoint.find(name, "")
            if stored is None or (stored.info.dtype, stored.info.shape) != (code, shape):
                raise _other_base(base, name)
            data = byte_view(tensors[name]).numpy()
            pieces += [
                (stored, start, data[start : start + _READ_BYTES])
                for start in range(0, data.size, _READ_BYTES)
            ]
        for _ in workers.map(_read, pieces):
            pass


def _read(piece: tuple[StoredTensor, int, np.ndarray[tuple[int], np.dtype[np.uint8]]]) -> None:
    stored, start, out = piece
    stored.read_into(start, out)


def _fill_from_target(tensors: Mapping[str, Tensor], target: TargetRecipe, workers: Workers) -> None:
    workers.at_stop(target.cancel)
    missing = set(tensors)
    shards = shards_to_load(target)
    for name, tensor in decoded(target, workers, shards=shards, is_wanted=tensors.__contains__):
        if (tensor.dtype, tensor.shape) != (tensors[name].dtype, tensors[name].shape):
            raise _other_base(target.source.where, name)
        byte_view(tensors[name]).copy_(byte_view(tensor))
        missing.discard(name)
    if missing:
        raise _other_base(target.source.where, min(missing))


def _other_base(where: object, name: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is not the base of the stream",
        f"Tensor {name!r} of the stream is not there, or has another dtype or shape.",
        "Pass the checkpoint that training began with, in the dtype that is published, or no base at all.",
    )
