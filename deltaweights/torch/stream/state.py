"""A model's state as bytes: every tensor is readable and writable in chunks, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ... import codec
from ...errors import CheckpointError
from ...payload import ChunkPlan
from ...workers import Workers
from ..tensors import byte_span, byte_view, code_of, settle, sharing, stored_shape
from ..wholeness import obstacle, require_gathered, require_merged, require_unquantized, some
from ..wrappers import plain_state
from . import gpu
from .records import CHUNK_BYTES

#: A model, or its tensors by name.
State: TypeAlias = "nn.Module | Mapping[str, Tensor]"

#: Unsigned integers as wide as an element.
WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
#: Integers of torch as wide as an element.
TORCH_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateTensor:
    """One tensor as bytes in row-major order.

    Attributes:
        name: its name in the state.
        code: its safetensors dtype code.
        shape: its shape in a safetensors header.
        nbytes: its size in bytes.
        words: NumPy's unsigned integers that are as wide as its elements.
        identity: a key that only tied tensors share.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        why, fix = obstacle(tensor)
        if why:
            raise CheckpointError(f"Tensor {name!r} has no bytes to read", f"It is {why}.", fix)
        self.name = name
        self.code = code_of(name, tensor.dtype)
        self.shape = stored_shape(name, tensor)
        self._tensor = tensor.detach()
        contiguous = self._tensor.contiguous()
        self._is_copy = contiguous.data_ptr() != tensor.data_ptr()
        self._flat = byte_view(contiguous)
        self.nbytes = self._flat.numel()
        self.words: np.dtype[Any] = WORDS[tensor.element_size()]
        self.identity: tuple[object, ...] = (
            str(tensor.device),
            tensor.data_ptr(),
            self.nbytes,
            self.code,
            self.shape,
            tensor.stride(),
        )
        self._bytes: NDArray[np.uint8] | None = None
        if tensor.device.type == "cpu":
            self._bytes = self._flat.numpy()

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self._tensor

    @property
    def device(self) -> torch.device:
        """The device of its bytes."""
        return self._flat.device

    @property
    def is_on_cpu(self) -> bool:
        """Whether its bytes can be read without a copy."""
        return self._bytes is not None

    @property
    def is_on_cuda(self) -> bool:
        """Whether copies of its bytes are faster to pinned memory."""
        return self._tensor.is_cuda

    @property
    def is_counted(self) -> bool:
        """Whether torch counts what is written to it: not to tensors of inference mode."""
        return not self._tensor.is_inference()

    @property
    def on_gpu(self) -> Tensor | None:
        """Its bytes (uint8) on a GPU that can run kernels; None elsewhere."""
        return self._flat if gpu.is_usable(self._flat.device) else None

    @property
    def memory(self) -> Tensor:
        """Its bytes (uint8)."""
        return self._flat

    @property
    def copied_bytes(self) -> int:
        """The memory of its bytes, where those are a copy in row-major order."""
        return self.nbytes if self._is_copy else 0

    def read(self, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes from ``start`` to ``end`` (uint8): the tensor's own on a CPU, else a copy."""
        if self._bytes is not None:
            return self._bytes[start:end]
        copy: NDArray[np.uint8] = self._flat[start:end].cpu().numpy()
        return copy

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        """Replace the bytes beginning at ``start`` by ``data`` (uint8)."""
        if self._bytes is not None:
            self._bytes[start : start + data.size] = data
        else:
            with torch.inference_mode():  # else its own tensors could not be written to in this thread
                self._flat[start : start + data.size].copy_(torch.from_numpy(data))

    def put(self, start: int, places: NDArray[np.uint32] | None, values: NDArray[Any]) -> None:
        """Replace elements, on a CPU.

        Args:
            start: the byte that places count from.
            places: of elements; None: the first ones from there.
            values: their new bits (of the type ``words``).
        """
        assert self._bytes is not None
        elements = self._bytes[start:].view(self.words)
        if places is None:
            elements[: values.size] = values
        else:
            elements[places.astype(np.intp)] = values  # faster than to let NumPy convert them

    def put_at(self, indices: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Replace the elements at different indices by ``values`` (of the type ``words``), on any device."""
        with torch.inference_mode():
            elements = self._flat.view(TORCH_WORDS[self.words.itemsize])
            bits = torch.from_numpy(values.view(np.uint8)).view(elements.dtype)
            elements.index_copy_(0, torch.from_numpy(indices).to(elements.device), bits.to(elements.device))

    def finish(self) -> None:
        """Say that bytes were written: to a tensor whose memory is not in row-major order, and to torch."""
        if self._is_copy:
            with torch.inference_mode():
                self._tensor.copy_(self._flat.view(self._tensor.dtype).view(self._tensor.shape))
        if not self._tensor.is_inference():  # these have no version
            torch.autograd.graph.increment_version(self._tensor)


def state_of(state: State) -> dict[str, StateTensor]:
    """The state's tensors, sorted by name: the names that they have without wrappers. Their devices have done
    what was asked of them.

    Raises:
        CheckpointError: there is none; one has no bytes (sparse, meta, quantized), or no dtype that
            safetensors has; two have some of their bytes in common, and not all; the model is not whole.
    """
    require_gathered(state)
    named = plain_state(state)
    tensors = {name: tensor for name, tensor in sorted(named.items()) if isinstance(tensor, Tensor)}
    require_merged(state, list(tensors))
    require_unquantized(state)
    if not tensors:
        raise CheckpointError("The state has no tensors", "", "Pass a model or its state_dict().")
    found = {name: StateTensor(name, tensor) for name, tensor in tensors.items()}
    settle(tensors.values())
    require_apart(tensors, found)
    return found


def require_apart(tensors: Mapping[str, Tensor], found: Mapping[str, StateTensor]) -> None:
    """Refuse tensors that have some of their bytes in common, and not all.

    Args:
        tensors: by name, or by any other key.
        found: the same as bytes.

    Raises:
        CheckpointError: there are some.
    """
    # Tensors that are not contiguous may interleave without sharing a byte.
    for names in sharing({name: tensor for name, tensor in tensors.items() if tensor.is_contiguous()}):
        if len({found[name].identity for name in names}) > 1:
            raise CheckpointError(
                "Tensors of the state overlap",
                f"Some of {names} share a part of their bytes.",
                "Pass the one that holds all the bytes, or clone those that should be independent.",
            )


def require_writable(state: Mapping[str, StateTensor]) -> None:
    """Refuse tensors of which a write to one element would change another one, as in expanded tensors, or in
    one beside its transpose.

    Raises:
        CheckpointError: there are some.
    """
    tensors = {name: state[name].tensor for name in set(owners(state).values())}
    alone = [[name] for name, tensor in tensors.items() if not _has_own_places(tensor)]
    together = [names for names in sharing(tensors) if not all(tensors[n].is_contiguous() for n in names)]
    for names in alone + together:
        if _overlap([tensors[name] for name in names]):
            raise CheckpointError(
                "Tensors cannot be written to",
                f"Elements of {some(sorted(names))} are in the same memory as others.",
                "Pass clones, or tensors with memory of their own (Tensor.contiguous).",
            )


def _has_own_places(tensor: Tensor) -> bool:
    """Whether the strides show that no two elements are in the same place."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two elements of tensors, of the same one or not, have a byte in common. Takes as much memory as
    the tensors and what lies between them."""
    first = min(tensor.data_ptr() for tensor in tensors)
    spans = [byte_span(tensor) for tensor in tensors]
    taken = np.zeros(max(end for _, end in spans) - first, np.bool_)
    for tensor, (start, _) in zip(tensors, spans, strict=True):
        strides = (*(stride * tensor.itemsize for stride in tensor.stride()), 1)
        shape = (*tensor.shape, tensor.itemsize)
        np.lib.stride_tricks.as_strided(taken[start - first :], shape, strides)[...] = True
    return int(np.count_nonzero(taken)) < sum(tensor.nbytes for tensor in tensors)


def marks_of(state: State) -> dict[str, object]:
    """For each tensor of the state what shows whether it is still the same one, unchanged as far as torch
    counts."""
    return {
        name: mark_of(tensor) for name, tensor in plain_state(state).items() if isinstance(tensor, Tensor)
    }


def mark_of(tensor: Tensor) -> object:
    """What shows whether a tensor is still the same one, unchanged as far as torch counts."""
    why, _ = obstacle(tensor)
    if why:
        return why
    version = None if tensor.is_inference() else tensor._version
    # As long as this is kept, no other storage is taken for this one; addresses are used again.
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), version


def owners(state: Mapping[str, StateTensor]) -> dict[str, str]:
    """For every tensor, the first one by name that has the same memory, usually itself."""
    first: dict[object, str] = {}
    return {
        name: first.setdefault(tensor.identity, name) if tensor.nbytes else name
        for name, tensor in state.items()
    }


def plan_of(tensor: StateTensor) -> ChunkPlan:
    """The plan that cuts a tensor's bytes into chunks, with a base or without."""
    return ChunkPlan(tensor.nbytes, tensor.nbytes, CHUNK_BYTES)


def sums_of(state: Mapping[str, StateTensor], workers: Workers) -> dict[str, bytes]:
    """The checksums of every tensor's chunks, as :func:`records.tensor_digest` takes them. Reads all bytes,
    those of tied tensors once."""
    first = owners(state)
    own = _checksums({name: state[name] for name in set(first.values())}, workers)
    found = {name: sums.tobytes() for name, sums in own.items()}
    return {name: found[owner] for name, owner in first.items()}


def _checksums(state: Mapping[str, StateTensor], workers: Workers) -> dict[str, NDArray[np.uint64]]:
    """The XXH3-64 of every chunk of every tensor (little-endian)."""
    found = {name: np.zeros(plan_of(tensor).count, "<u8") for name, tensor in state.items()}
    here: list[tuple[str, int, tuple[int, int]]] = []
    there: dict[torch.device, list[tuple[str, int, tuple[int, int]]]] = {}
    for name, tensor in state.items():
        memory = tensor.on_gpu
        for index, span in enumerate(plan_of(tensor)):
            if memory is not None and gpu.can_check(memory, *span):
                there.setdefault(memory.device, []).append((name, index, gpu.addresses(memory, *span)))
            else:
                here.append((name, index, span))
    on_gpus = [(some, gpu.Checksums(device, [span for *_, span in some])) for device, some in there.items()]
    sums = workers.map(lambda one: codec.checksum(state[one[0]].read(*one[2])), here)
    for (name, index, _), value in zip(here, sums, strict=True):
        found[name][index] = value
    for those, checksums in on_gpus:
        for (name, index, _), value in zip(those, checksums.values().tolist(), strict=True):
            found[name][index] = value
    return found
