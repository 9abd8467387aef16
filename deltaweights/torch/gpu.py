"""Chunks that lie on a GPU: patched and checked there.

Whatever cannot be done there, or comes out wrong, is the caller's to do on the CPU, which also finds out what
is the matter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import codec
from ..pipeline import usable_cores

Words = NDArray[np.uint64]

# XXH3-64 of more than 240 bytes, with seed 0 and the default secret: the constants of its specification,
# https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_START = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x85EBCA77,
    0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip
_LENGTH_FACTOR, _LAST_FACTOR = np.uint64(_START[1]), np.uint64(0x165667919E3779F9)
_LAST_STRIPE, _MERGE = 121, 11  # where in the secret the last stripe's key begins, and that of the end
_SHORT = 240  # up to so many bytes are hashed in other ways
_WORD = 8  # bytes; the kernel reads whole ones

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

#: Threads to prepare a GPU's work. More of them wait for Python's lock and each other: of 1, 2, 4, 8 and 16
#: threads on 16 cores, 2 and 4 were fastest (docs/benchmarks.md).
_THREADS = 4

_log = logging.getLogger("deltaweights")
_distrusted: set[torch.device] = set()


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
    builds for CUDA on Linux from 2.6 on, and it works; and as long as nothing came out wrong."""
    return _runs_kernels(device) and device not in _distrusted and _passes_test(device)


def distrust(device: torch.device) -> None:
    """Use the device's kernels no more, where they made wrong bytes of what turned out to be right."""
    if device not in _distrusted:
        _distrusted.add(device)
        _log.warning("kernels on %s gave wrong results, which was found; going on without them", device)


def usual_threads(devices: Iterable[torch.device]) -> int | None:
    """How many threads to use if nobody says; None for as many as there are cores."""
    return min(_THREADS, usable_cores()) if any(map(_runs_kernels, devices)) else None


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


def patch(data: Tensor, patches: Sequence[tuple[int, codec.Patch]], *, is_moved: bool = True) -> Elements:
    """Move elements of ``data``; returns those that were there. Where it is not ``is_moved``, nothing is
    written, and those that are to be there are returned.

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
                elements, where, moves, others, len(places), width=8 * itemsize, is_moved=is_moved
            )
    return Elements(elements, where, others)


def addresses(data: Tensor, start: int, end: int) -> tuple[int, int]:
    """Where these bytes of ``data`` (uint8) lie, for :class:`Checksums`."""
    return data.data_ptr() + start, data.data_ptr() + end


def can_check(data: Tensor, start: int, end: int) -> bool:
    """Whether :class:`Checksums` can take these bytes of ``data``."""
    return end - start > _SHORT and not (data.data_ptr() + start) % _WORD and not (end - start) % _WORD


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
    last = _SECRET[_LAST_STRIPE : _LAST_STRIPE + 64]
    keys, start = np.frombuffer(_SECRET + last, "<i8"), np.array(_START, np.uint64).view(np.int64)
    return torch.tensor(keys, device=device), torch.tensor(start, device=device)


def _merged(accumulators: Words, lengths: Words) -> Words:
    """The hashes, from eight accumulators each."""
    keys = np.frombuffer(_SECRET[_MERGE : _MERGE + 64], "<u8")
    mixed = accumulators ^ keys
    found: Words = lengths * _LENGTH_FACTOR + _folded(mixed[:, ::2], mixed[:, 1::2]).sum(
        axis=1, dtype=np.uint64
    )
    found ^= found >> np.uint64(37)
    found *= _LAST_FACTOR
    return found ^ (found >> np.uint64(32))


def _folded(a: Words, b: Words) -> Words:
    """The product's lower 64 bits XOR its upper ones."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    middle = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    upper = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    result: Words = (a * b) ^ upper
    return result
