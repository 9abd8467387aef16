"""torch tensors in the terms of safetensors: dtype codes, shapes, and bytes in row-major order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from .. import dtypes
from ..errors import CheckpointError

#: torch's dtype for each code, without those that this version of torch lacks.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, dtype.torch)
    for code, dtype in dtypes.DTYPES.items()
    if dtype.torch and hasattr(torch, dtype.torch)
}

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def code_of(name: str, dtype: torch.dtype) -> str:
    """The safetensors code of the tensor called ``name``.

    Raises:
        CheckpointError: safetensors has none for its dtype.
    """
    if dtype not in _CODES:
        raise CheckpointError(
            f"Tensor {name!r} cannot be saved", f"safetensors has no {dtype}.", "Convert it first."
        )
    return _CODES[dtype]


def dtype_of(name: str, code: str) -> torch.dtype:
    """torch's dtype for the safetensors code of the tensor called ``name``.

    Raises:
        CheckpointError: torch has none.
    """
    if code not in DTYPES:
        raise CheckpointError(
            f"Tensor {name!r} cannot be loaded",
            f"Its dtype is {code}, which torch {torch.__version__} does not have.",
            "Rebuild the target with apply_delta, or read the bytes with deltaweights.open_target.",
        )
    return DTYPES[code]


def stored_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape in a safetensors header, which counts elements of F4, while torch counts pairs.

    Raises:
        CheckpointError: it is F4 and has no dimension.
    """
    if _CODES[tensor.dtype] != "F4":
        return tuple(tensor.shape)
    if not tensor.dim():
        raise CheckpointError(
            f"Tensor {name!r} cannot be saved", "It is F4 and has no dimension.", "Reshape it."
        )
    return (*tensor.shape[:-1], 2 * tensor.shape[-1])


def torch_shape(name: str, code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The torch shape of a tensor with the header's ``code`` and ``shape``.

    Raises:
        CheckpointError: it is F4, and torch cannot pair its elements.
    """
    if code != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise CheckpointError(
            f"Tensor {name!r} cannot be loaded",
            f"It is F4 of shape {list(shape)}; torch keeps pairs along the last dimension.",
            "Read the bytes with deltaweights.open_target.",
        )
    return (*shape[:-1], shape[-1] // 2)


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: a uint8 tensor of one dimension, over the same memory."""
    # A tensor of one element is contiguous whatever its stride, and keeps the stride when reshaped.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def copied(tensor: Tensor, spare: Tensor | None) -> Tensor:
    """A contiguous copy in the CPU's memory, in that of ``spare`` if it fits; from CUDA, asynchronous."""
    if spare is None or (spare.shape, spare.dtype) != (tensor.shape, tensor.dtype):
        spare = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    is_plain = not (tensor.is_conj() or tensor.is_neg())  # else its memory is not its values
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() and is_plain:
        # memcpy on one core: beside busy threads, torch's copy waits for all its own and takes six times as
        # long.
        np.copyto(byte_view(spare).numpy(), byte_view(tensor).numpy())
    else:
        spare.copy_(tensor, non_blocking=tensor.is_cuda)
    return spare


def settle(tensors: Iterable[Tensor]) -> None:
    """Wait until the tensors' CUDA devices have finished all work, on every stream, so that other threads see
    the same data as the caller."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def byte_span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte of a tensor that has some, and that after its last one."""
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize


def sharing(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of two or more names whose tensors' bytes overlap, or might: a tensor that is not contiguous
    counts from its first byte to its last."""
    storages: dict[tuple[object, int], list[tuple[int, int, str]]] = {}
    for name, tensor in state.items():
        if tensor.nbytes:
            key = tensor.device, tensor.untyped_storage().data_ptr()
            storages.setdefault(key, []).append((*byte_span(tensor), name))
    groups: list[list[str]] = []
    for areas in storages.values():
        last_end = 0
        for start, end, name in sorted(areas):
            if start < last_end:
                groups[-1].append(name)
            else:
                groups.append([name])
            last_end = max(last_end, end)
    return [group for group in groups if len(group) > 1]


def first_line(error: Exception) -> str:
    """An error of torch without advice that does not apply here."""
    return str(error).partition("\n")[0]
