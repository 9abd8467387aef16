"""Makes tensors in the form of a stream's, for engines that keep their weights in another form."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....dtypes import DTYPES
from ....errors import CheckpointError
from ...tensors import dtype_of, torch_shape
from ..records import StateRecord, StreamTensor

#: Where each tensor begins, so that kernels can read whole words, and processors whole lines.
_ALIGNMENT = 64
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it


@torch.inference_mode(False)  # so that torch counts what is written to them
def empty_tensors(record: StateRecord, where: str, *, shared: bool) -> dict[str, Tensor]:
    """Zeros with the record's names, dtypes, shapes and ties, in one piece of memory.

    Raises:
        CheckpointError: torch does not have one of the dtypes, or the memory does not suffice.
    """
    own = [tensor for tensor in record.tensors if tensor.like is None]
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in own:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + _nbytes(tensor)
        spans[tensor.name] = start, end
    memory = _zeros(end, where, shared=shared)
    found = {}
    for tensor in record.tensors:
        start, end = spans[tensor.like or tensor.name]
        shape = torch_shape(tensor.name, tensor.dtype, tensor.shape)
        found[tensor.name] = memory[start:end].view(dtype_of(tensor.name, tensor.dtype)).view(shape)
    return found


def _nbytes(tensor: StreamTensor) -> int:
    dtype_of(tensor.name, tensor.dtype)  # one that torch has
    bits = DTYPES[tensor.dtype].bits
    for size in tensor.shape:
        bits *= size
    return bits // 8


def _zeros(nbytes: int, where: str, *, shared: bool) -> Tensor:
    """So many bytes (uint8)."""
    if nbytes > _room(shared=shared):
        raise _too_large(nbytes, where)
    try:
        memory = torch.from_numpy(np.zeros(max(1, nbytes), np.uint8))  # an empty one has no stride
        if shared:
            memory.share_memory_()  # type: ignore[no-untyped-call]
        return memory
    except (MemoryError, RuntimeError) as error:
        raise _too_large(nbytes, where) from error


def _room(*, shared: bool) -> int:
    """The bytes that may be there: a size that a file states is not to be trusted."""
    if shared and _SHARED_MEMORY.is_dir():
        return shutil.disk_usage(_SHARED_MEMORY).free
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 48


def _too_large(nbytes: int, where: str) -> CheckpointError:
    return CheckpointError(
        f"The stream at {where} does not fit this machine",
        f"Its tensors take {nbytes:,} bytes, and there is less memory.",
        "Use a machine with more memory, or give shared memory more of it (docker run --shm-size).",
    )
