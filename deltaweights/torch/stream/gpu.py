"""Patches and checks chunks on a GPU.

If that is impossible or goes wrong, the caller does the work on the CPU, which also finds the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import codec
from ...codec.constants import XXH3_KEYS, XXH3_LAST_FACTOR, XXH3_LENGTH_FACTOR, XXH3_SHORT, XXH3_START

Words = NDArray[np.uint64]

_WORD = 8  # bytes; the kernel reads whole words

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

_log = logging.getLogger("deltaweights")


@cache
def _has_triton() -> bool:
    """Whether Triton 3.2 or later is installed; 3.0 computes different results."""
    try:
        from triton import __version__
    except ImportError:
        return False
    return tuple(map(int, __version__.split(".")[:2])) >= (3, 2)


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@cache
def _passes_test(device: torch.device) -> bool:
    """Whether a kernel compiles, runs and gives the right result there. Triton needs a C compiler, for
    example."""
    data = torch.arange(4096, dtype=torch.int16).view(torch.uint8)
    try:
        there = data.to(device)
        found = Checksums(device, [addresses(there, 0, len(there))]).values()
    except Exception as error:  # after any error, the CPU does the work
        _log.info("no kernels on %s: %s", device, error)
        return False
    return int(found[0]) == codec.checksum(data.numpy())


def is_usable(device: torch.device) -> bool:
    """Whether kernels run on the device: it must be a CUDA device with a working Triton, which torch's CUDA
    builds for Linux include since 2.6."""
    return _runs_kernels(device) and _passes_test(device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Use the device's default stream within the block, so that the work of all threads runs in one order.
    (The caller's thread works too, and may use a different stream.)"""
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else nullcontext()


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array (of signed integers, or bytes) on the device."""
    return torch.from_numpy(array).to(device)


class Elements(NamedTuple):
    """Old or new elements for some places (int32[m]) of a tensor."""

    tensor: Tensor
    places: Tensor
    values: Tensor

    def put(self) -> None:
        """Write them. This allocates no memory."""
        from . import gpu_kernels

        if len(self.places):
            with on(self.tensor.device):
                gpu_kernels.put[(_blocks(self.places),)](*self, len(self.places))


def _blocks(places: NDArray[np.int32] | Tensor) -> int:
    """The number of programs that move the elements at ``places``."""
    from . import gpu_kernels

    return -(-len(places) // int(gpu_kernels.PATCH_BLOCK.value))


def patch(data: Tensor, patches: Sequence[tuple[int, codec.Patch]]) -> Elements:
    """Move elements of ``data``. Returns the old ones.

    Args:
        data: bytes (uint8) on a device that :func:`is_usable`, fewer than 2^31, at an address that is a
            multiple of the elements' size.
        patches: one or more pairs of a patch and the byte of ``data`` where it begins, all with elements of
            the same size; all places are different, and within the data.
    """
    from . import gpu_kernels

    itemsize = patches[0][1].itemsize
    elements = data.view(_INTEGERS[itemsize])
    places = np.concatenate([patch.places + np.int32(start // itemsize) for start, patch in patches])
    distances = np.concatenate([patch.distances for _, patch in patches]).view(np.int32)
    with on(data.device):
        where, moves = upload(places, data.device), upload(distances, data.device)
        others = torch.empty(len(places), dtype=elements.dtype, device=data.device)
        if len(places):
            gpu_kernels.patch[(_blocks(places),)](
                elements, where, moves, others, len(places), width=8 * itemsize
            )
    return Elements(elements, where, others)


def addresses(data: Tensor, start: int, end: int) -> tuple[int, int]:
    """The addresses of these bytes of ``data`` (uint8), for :class:`Checksums`."""
    return data.data_ptr() + start, data.data_ptr() + end


def can_check(data: Tensor, start: int, end: int) -> bool:
    """Whether :class:`Checksums` can take these bytes of ``data``."""
    return end - start > XXH3_SHORT and not (data.data_ptr() + start) % _WORD and not (end - start) % _WORD


class Checksums:
    """A running computation of the XXH3-64 of memory spans on a device.

    Args:
        device: one that :func:`is_usable`.
        spans: the addresses of the first byte and after the last, of spans that pass :func:`can_check`. The
            memory must stay allocated.
    """

    def __init__(self, device: torch.device, spans: Sequence[tuple[int, int]]) -> None:
        from . import gpu_kernels

        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        self._lengths = ends - starts
        with on(device):
            self._found = torch.empty(len(spans), 8, dtype=torch.int64, device=device)
            if spans:
                gpu_kernels.xxh3_accumulators[(len(spans),)](
                    upload(starts.copy(), device),
                    upload(self._lengths, device),
                    *_constants(device),
                    self._found,
                    num_warps=1,
                )

    def values(self) -> Words:
        """The checksums, [spans]; waits for them, and for all earlier work of the device."""
        with on(self._found.device):
            found = self._found.cpu()
        return _merged(found.numpy().view(np.uint64), self._lengths.view(np.uint64))


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's keys and the initial values of its accumulators."""
    keys, start = (np.array(words, np.uint64).view(np.int64) for words in (XXH3_KEYS[:32], XXH3_START))
    return torch.tensor(keys, device=device), torch.tensor(start, device=device)


def _merged(accumulators: Words, lengths: Words) -> Words:
    """The hashes, from eight accumulators each."""
    mixed = accumulators ^ np.array(XXH3_KEYS[32:], np.uint64)
    found: Words = lengths * np.uint64(XXH3_LENGTH_FACTOR) + _folded(mixed[:, ::2], mixed[:, 1::2]).sum(
        axis=1, dtype=np.uint64
    )
    found ^= found >> np.uint64(37)
    found *= np.uint64(XXH3_LAST_FACTOR)
    return found ^ (found >> np.uint64(32))


def _folded(a: Words, b: Words) -> Words:
    """The product's lower 64 bits XOR its upper ones."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    middle = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    upper = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    result: Words = (a * b) ^ upper
    return result
