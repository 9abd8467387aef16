"""Chunks that lie on a GPU: patched and checked there.

Whatever cannot be done there, or comes out wrong, is the caller's to do on the CPU, which also finds out what
is the matter.
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

_WORD = 8  # bytes; the kernel reads whole ones

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

_log = logging.getLogger("deltaweights")


@cache
def _has_triton() -> bool:
    """Whether there is Triton 3.2 or later; 3.0 computes other things."""
    try:
        from triton import __version__
    except ImportError:
        return False
    return tuple(map(int, __version__.split(".")[:2])) >= (3, 2)


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@cache
def _passes_test(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run there, and is right: Triton needs a C compiler, for one."""
    data = torch.arange(4096, dtype=torch.int16).view(torch.uint8)
    try:
        there = data.to(device)
        found = Checksums(device, [addresses(there, 0, len(there))]).values()
    except Exception as error:  # whatever it is, there is another way
        _log.info("no kernels on %s: %s", device, error)
        return False
    return int(found[0]) == codec.checksum(data.numpy())


def is_usable(device: torch.device) -> bool:
    """Whether chunks can be worked on there: on a CUDA device, if there is Triton, as there is with torch's
    builds for CUDA on Linux from 2.6 on, and it works."""
    return _runs_kernels(device) and _passes_test(device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """What is asked of a device within this is done in one order, whoever asks: on its default stream. (The
    caller's own thread may be on another, and is one of those that work.)"""
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else nullcontext()


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array (of signed integers, or bytes) on the device."""
    return torch.from_numpy(array).to(device)


class Elements(NamedTuple):
    """Elements for some places (int32[m]) of a tensor: what stood there, or is to."""

    tensor: Tensor
    places: Tensor
    values: Tensor

    def put(self) -> None:
        """Write them. That takes no memory."""
        from . import gpu_kernels

        if len(self.places):
            with on(self.tensor.device):
                gpu_kernels.put[(_blocks(self.places),)](*self, len(self.places))


def _blocks(places: NDArray[np.int32] | Tensor) -> int:
    """How many programs move elements at so many places."""
    from . import gpu_kernels

    return -(-len(places) // int(gpu_kernels.PATCH_BLOCK.value))


def patch(data: Tensor, patches: Sequence[tuple[int, codec.Patch]]) -> Elements:
    """Move elements of ``data``; returns those that were there.

    Args:
        data: bytes (uint8) on a device that :func:`is_usable`, fewer than 2^31, at an address that is a
            multiple of the elements' size.
        patches: one or more, of elements of one size, and from which byte of ``data`` on each counts; all
            places are different, and within the data.
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
    """Where these bytes of ``data`` (uint8) lie, for :class:`Checksums`."""
    return data.data_ptr() + start, data.data_ptr() + end


def can_check(data: Tensor, start: int, end: int) -> bool:
    """Whether :class:`Checksums` can take these bytes of ``data``."""
    return end - start > XXH3_SHORT and not (data.data_ptr() + start) % _WORD and not (end - start) % _WORD


class Checksums:
    """The XXH3-64 of stretches of memory on a device, being computed.

    Args:
        device: one that :func:`is_usable`.
        spans: the address of the first byte and behind the last, of what :func:`can_check`. It has to stay.
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
        """[spans]; waits for them, and for all that was asked of the device before."""
        with on(self._found.device):
            found = self._found.cpu()
        return _merged(found.numpy().view(np.uint64), self._lengths.view(np.uint64))


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's keys and what its accumulators begin with."""
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
