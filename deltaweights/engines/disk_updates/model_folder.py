"""The model's folder that an engine begins with: version 0. It decides which names updates use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint import Tensor as StoredTensor
from ...errors import CheckpointError
from ...torch.stream.state import StateTensor
from ...torch.tensors import byte_view, code_of, dtype_of, stored_shape, torch_shape
from ...workers import Workers
from .writing import weight_shards

_CHUNK_BYTES = 1 << 24


def stored_tensors(model: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors that the engine loads, by name."""
    paths = {shard.path for shard in weight_shards(model)}
    return {tensor.name: tensor for tensor in model.tensors if tensor.path in paths}


def load_tensors(model: Checkpoint, workers: Workers) -> dict[str, Tensor]:
    """The weights, in the CPU's memory.

    Raises:
        CheckpointError: torch lacks the dtype of one of them, or they cannot be read.
    """
    state = {}
    for name, tensor in stored_tensors(model).items():
        shape = torch_shape(name, tensor.dtype, tensor.info.shape)
        state[name] = torch.empty(shape, dtype=dtype_of(name, tensor.dtype))
    read_into(state, model, workers)
    return state


def read_into(state: Mapping[str, Tensor], model: Checkpoint, workers: Workers) -> None:
    """Fill the tensors (contiguous, in the CPU's memory) with the folder's weights, as far as it has them in
    the same dtype and shape."""
    stored = {
        name: tensor
        for name, tensor in stored_tensors(model).items()
        if name in state
        and (tensor.dtype, tensor.info.shape)
        == (code_of(name, state[name].dtype), stored_shape(name, state[name]))
    }
    jobs = (
        (name, start) for name, tensor in stored.items() for start in range(0, tensor.nbytes, _CHUNK_BYTES)
    )

    def read(job: tuple[str, int]) -> None:
        name, start = job
        data = byte_view(state[name]).numpy()
        stored[name].read_into(start, data[start : start + _CHUNK_BYTES])

    for _ in workers.map(read, jobs):
        pass


def named_as_in(state: Mapping[str, StateTensor], model: Checkpoint | None) -> dict[str, StateTensor]:
    """The state's tensors by the names that the engine's folder has: of tied tensors, it often has one.

    Raises:
        CheckpointError: the folder lacks a tensor, or has another dtype or shape for it.
    """
    if model is None:
        return dict(state)
    stored = stored_tensors(model)
    found = {name: tensor for name, tensor in state.items() if name in stored}
    there = {tensor.identity for tensor in found.values()}
    for name, tensor in state.items():
        other = stored.get(name)
        if other is None and (tensor.identity not in there or not tensor.nbytes):
            raise _misfit(model, name, "The folder lacks it.")
        if other is not None and (other.dtype, other.info.shape) != (tensor.code, tensor.shape):
            theirs = f"{other.dtype} of shape {list(other.info.shape)}"
            raise _misfit(model, name, f"It is {tensor.code} of shape {list(tensor.shape)}, not {theirs}.")
    return found


def _misfit(model: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Tensor {name!r} does not fit {model.source.where}",
        why,
        "Pass the folder of this model, as the engine loads it.",
    )


def has_weights_of(model: Checkpoint, named: Mapping[str, StateTensor], workers: Workers) -> bool:
    """Whether the folder's weights are the state's, byte for byte."""
    stored = stored_tensors(model)
    jobs = ((name, start) for name, t in named.items() for start in range(0, t.nbytes, _CHUNK_BYTES))

    def is_same(job: tuple[str, int]) -> bool:
        name, start = job
        ours = named[name].read(start, min(start + _CHUNK_BYTES, named[name].nbytes))
        theirs = np.empty(ours.size, np.uint8)
        stored[name].read_into(start, theirs)
        return np.array_equal(ours, theirs)

    return all(workers.map(is_same, jobs))
