"""A target's chunks, decoded on the GPU that they are for.

Threads *stage* chunks: the base's bytes go to the tensor's own memory, and what makes them the target goes
beside it. Many chunks are then decoded at once where they lie. As one takes a GPU some milliseconds, and
hundreds take no longer, it has to be many.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import codec
from ..errors import PayloadError
from ..target import TensorRecipe
from . import gpu

#: Bytes of the base that are staged at once, and of all that goes with them: pinned memory, each thread's.
STAGED_BYTES = 8 << 20
#: Bytes of the target that are decoded at once. Those with a list of what is chosen count for more.
_MOST_BYTES = 256 << 20
_CHOSEN_COUNT_FOR = 4
_ALIGN = 8
_ONE_SEGMENT = 31  # its logarithm, where all elements are in one


class _Memory(threading.local):
    """Each thread's pinned memory."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def room(self, use: str, device: torch.device) -> Tensor:
        """STAGED_BYTES (uint8) that the device copies from by itself."""
        if use not in self._rooms:
            is_pinned = device.type == "cuda"
            self._rooms[use] = torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        return self._rooms[use]


_memory = _Memory()


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to a device: they need not wait for its kernels."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copy(base: Tensor, data: Tensor, coded: Tensor) -> Tensor:
    """Copy from pinned memory: ``base`` to ``data``, and ``coded`` to memory of its own there, which is
    returned when all is done.

    That memory is the stream's: what was there before is read by no kernel any more, since :func:`decode`
    waits for its own.
    """
    if data.device.type != "cuda":
        data.copy_(base)
        return coded.clone()
    with torch.cuda.stream(_copies(data.device)):
        data.copy_(base, non_blocking=True)
        beside = torch.empty_like(coded, device=data.device)
        beside.copy_(coded, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
    done.synchronize()
    return beside


class _Kind(NamedTuple):
    """What runs have in common that are decoded by one launch."""

    shift: int
    mask: int
    width: int
    lanes: int
    is_chosen: bool


class _Run(NamedTuple):
    """A run of values: its row of the kernel's plans, with addresses counted from where its arrays were put
    (those of ``coded``), and the lanes' first states (uint32[64])."""

    kind: _Kind
    row: NDArray[np.int64]
    states: NDArray[np.uint32]


class _Chunk(NamedTuple):
    number: int
    start: int  # first byte, within the tensor
    end: int
    run: _Run | None
    patch: codec.Patch | None


class Staged(NamedTuple):
    """Chunks of a tensor whose memory holds the base's bytes."""

    recipe: TensorRecipe
    data: Tensor  # the whole tensor's bytes
    coded: Tensor  # what their runs are decoded from
    chunks: list[_Chunk]

    @property
    def weight(self) -> int:
        """What counts towards how much is decoded at once, in bytes: a small chunk's tables may be large."""
        return len(self.coded) + sum(
            (chunk.end - chunk.start) * (_CHOSEN_COUNT_FOR if chunk.run and chunk.run.kind.is_chosen else 1)
            for chunk in self.chunks
        )


def is_enough(staged: Sequence[Staged]) -> bool:
    """Whether it is time to decode: more would take too much of the device's memory."""
    return sum(one.weight for one in staged) >= _MOST_BYTES


def can_be_staged(recipe: TensorRecipe, data: Tensor) -> list[bool]:
    """Which chunks :func:`stage` may take, as far as their records tell."""
    if recipe.base is None or recipe.base.info.dtype != recipe.info.dtype or not gpu.is_usable(data.device):
        return [False] * recipe.plan.count
    methods = {codec.Method.SAME, codec.Method.SPARSE}
    if codec.element_bytes(recipe.info.dtype, recipe.info.nbytes) <= 2:
        methods.add(codec.Method.DELTA)
    return [
        recipe.plan.has_base(index) and method in methods and gpu.can_check(data, *recipe.plan.span(index))
        for index, method in enumerate(recipe.table[0]["method"].tolist())
    ]


def stage(recipe: TensorRecipe, data: Tensor, first: int, end: int) -> Staged | None:
    """Bring chunks ``first`` to ``end - 1``, each of which :func:`can_be_staged`, to their device, undecoded.
    From any thread.

    Args:
        data: all of the tensor's bytes (uint8).
        first, end: their bytes are at most STAGED_BYTES.

    Returns:
        Those chunks that can be decoded there; None where none can.

    Raises:
        CheckpointError, DeltaError: base or delta cannot be read.
    """
    packed = _Packed(_memory.room("coded", data.device).numpy())
    chunks = []
    for index, (method, coded) in enumerate(recipe.read_coded(first, end), first):
        try:
            found = _read_chunk(recipe, index, recipe.plan.span(index), method, coded, packed)
        except PayloadError:  # whoever decodes it otherwise says what is wrong
            continue
        if found:
            chunks.append(found)
    if not chunks:
        return None
    start, stop = recipe.plan.span(first)[0], recipe.plan.span(end - 1)[1]
    base = _memory.room("base", data.device)[: stop - start]
    recipe.read_base_into(first, base.numpy())
    beside = _memory.room("coded", data.device)[: packed.size]
    return Staged(recipe, data, _copy(base, data[start:stop], beside), chunks)


class _Packed:
    """Arrays put one behind the other."""

    def __init__(self, room: NDArray[np.uint8]) -> None:
        self._room = room
        self.size = 0

    def put(self, arrays: Sequence[NDArray[Any]]) -> list[int] | None:
        """Where each of them begins; None, and none is put, where there is no more room."""
        places, size = [], self.size
        for array in arrays:
            places.append(size)
            size += -(-array.nbytes // _ALIGN) * _ALIGN
        if size > len(self._room):
            return None
        for place, array in zip(places, arrays, strict=True):
            self._room[place : place + array.nbytes] = array.view(np.uint8)
        self.size = size
        return places


def _read_chunk(
    recipe: TensorRecipe,
    index: int,
    span: tuple[int, int],
    method: int,
    coded: NDArray[np.uint8],
    packed: _Packed,
) -> _Chunk | None:
    """The chunk, its arrays being put to ``packed``; None where it is coded otherwise, or too long."""
    nbytes = span[1] - span[0]
    steps = codec.read_steps(method, coded, nbytes, recipe.info.dtype)
    if steps is None:
        return None
    run, patch = steps
    if run is None:
        return _Chunk(index, *span, None, patch)
    chosen, opened = (run, run.run) if isinstance(run, codec.Chosen) else (None, run)
    if opened.lanes not in (16, 64):
        return None
    marks = chosen.marks if chosen else np.empty(0, np.uint8)
    places = packed.put([opened.words, opened.slots, opened.scales.astype(np.int32), marks])
    if places is None:
        return None
    return _Chunk(index, *span, _plan(opened, chosen, nbytes // opened.form.itemsize, places), patch)


def _plan(opened: codec.OpenRun, chosen: codec.Chosen | None, count: int, places: list[int]) -> _Run:
    """What :mod:`.gpu_kernels` wants to know of a run; the order is that of its columns."""
    words, slots, scales, marks = places
    row = np.array(
        [
            0, 0, count, words, len(opened.words), slots, scales, opened.log_segment or _ONE_SEGMENT,
            opened.lowest, opened.step, (len(opened.slots) >> opened.precision) - 1, opened.precision,
            opened.is_direct, count, marks, chosen.cutoff if chosen else 0, 0,
        ],
        np.int64,
    )  # fmt: skip
    form = opened.form
    kind = _Kind(form.shift, form.mask, 8 * form.itemsize, opened.lanes, chosen is not None)
    return _Run(kind, row, opened.states)


def decode(staged: Sequence[Staged]) -> tuple[list[tuple[TensorRecipe, int]], bool]:
    """Make the target's chunks of the staged ones, all on one device.

    Returns:
        Those that came out wrong, whose memory holds anything; and whether one of them had the right base: so
        the delta is not what it should be, or the device is not.
    """
    chunks = [(one, chunk) for one in staged for chunk in one.chunks]
    device = staged[0].data.device
    spans = [gpu.addresses(one.data, chunk.start, chunk.end) for one, chunk in chunks]
    with gpu.on(device):
        base = gpu.Checksums(device, spans)
        exceptions = [_exceptions(one) for one in staged]  # they count from the base's elements
        ended = _decode_runs(chunks, device)
        for elements in exceptions:
            if elements:
                elements.put()
        target = gpu.Checksums(device, spans)
    records = np.concatenate([one.recipe.table[0][[chunk.number for chunk in one.chunks]] for one in staged])
    has_base = records["base"] == base.values()
    is_right = has_base & (records["target"] == target.values())
    for numbers, is_even in ended:
        is_right[numbers] &= is_even.cpu().numpy() == 1
    failed = [(chunks[number][0].recipe, chunks[number][1].number) for number in np.flatnonzero(~is_right)]
    return failed, bool((has_base & ~is_right).any())


def _decode_runs(
    chunks: Sequence[tuple[Staged, _Chunk]], device: torch.device
) -> list[tuple[list[int], Tensor]]:
    """Decode the runs of some chunks, within :func:`gpu.on` their device. Returns, for those of each kind:
    the chunks' numbers, and 1 (int32) for each whose run came out even."""
    from . import gpu_kernels as kernels

    of_kind: dict[_Kind, list[int]] = {}
    for number, (_, chunk) in enumerate(chunks):
        if chunk.run:
            of_kind.setdefault(chunk.run.kind, []).append(number)
    ended = []
    for kind, numbers in of_kind.items():
        some = [chunks[number] for number in numbers]
        rows = np.stack([_with_addresses(*one) for one in some])
        states = np.stack([chunk.run.states for _, chunk in some if chunk.run]).view(np.int32)
        if kind.is_chosen:
            places = torch.empty(int(rows[:, kernels.ELEMENTS.value].sum()), dtype=torch.int32, device=device)
            before = np.cumsum(rows[:, kernels.ELEMENTS.value]) - rows[:, kernels.ELEMENTS.value]
            rows[:, kernels.CHOSEN.value] = places.data_ptr() + 4 * before
        plans, is_even = gpu.upload(rows, device), torch.empty(len(some), dtype=torch.int32, device=device)
        if kind.is_chosen:
            kernels.choose[(len(some),)](plans, *kind[:3], num_warps=4)
        kernels.decode_runs[(len(some),)](plans, gpu.upload(states, device), is_even, *kind, num_warps=1)
        ended.append((numbers, is_even))
    return ended


def _with_addresses(one: Staged, chunk: _Chunk) -> NDArray[np.int64]:
    """The row of the kernel's plans for a chunk with a run."""
    from . import gpu_kernels as kernels

    assert chunk.run
    row = chunk.run.row.copy()
    row[[kernels.BASE.value, kernels.OUT.value]] = one.data.data_ptr() + chunk.start
    beside = [kernels.WORDS.value, kernels.SLOTS.value, kernels.SCALES.value, kernels.MARKS.value]
    row[beside] += one.coded.data_ptr()
    return row


def _exceptions(one: Staged) -> gpu.Elements | None:
    """What the chunks' patches make of the base's elements."""
    first, end = one.chunks[0].start, one.chunks[-1].end
    patches = [(chunk.start - first, chunk.patch) for chunk in one.chunks if chunk.patch]
    return gpu.patch(one.data[first:end], patches, is_moved=False) if patches else None
