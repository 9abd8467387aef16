"""Plans the files of a saved state: names, shards, index and config, without the bytes of weights.

The layout is that of transformers' ``save_pretrained`` for its own models, and of huggingface_hub's
``save_torch_state_dict`` for all others: tied weights once, in shards of limited size, with an index if there
are several.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...errors import CheckpointError
from ..tensors import sharing
from ..wholeness import obstacle, require_gathered, require_merged, require_unquantized
from ..wrappers import plain_state
from .pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATTERN = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"

#: The content of a shard: its tensors by name, contiguous, and its metadata.
Shard = tuple[dict[str, Tensor], dict[str, str]]


@dataclass(frozen=True)
class Layout:
    """The files of a state: shards by path, and the bytes of the other files."""

    shards: dict[str, Shard] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def lay_out(state: nn.Module | Mapping[str, Tensor], max_shard_size: int | str | None = None) -> Layout:
    """Return the files that ``state`` would be saved as.

    Args:
        state: a model, or its tensors by name; their names are those without wrappers. Nothing is copied
            except tensors that are not contiguous.
        max_shard_size: in bytes, or a text like ``"5GB"``; None: the default of the library
            that saves such a state.

    Raises:
        CheckpointError: a tensor cannot be saved, tied weights cannot be told apart, or a model is not whole:
            it is quantized, has adapters that are not merged, or its parameters are not gathered.
        ValueError: ``max_shard_size`` is not a size.
    """
    size: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    require_gathered(state)
    named = plain_state(state)
    require_merged(state, list(named))
    require_unquantized(state)
    if not named and isinstance(state, nn.Module) and any(True for _ in state.parameters()):
        raise CheckpointError(
            "The model cannot be saved from this process",
            "It has parameters, and its state_dict is empty: FSDP gathers all of them on the first process "
            "alone (rank0_only).",
            "Save it there, after model.state_dict() on every process.",
        )
    model = pretrained(state) if isinstance(state, nn.Module) else None
    if isinstance(state, AveragedModel) and pretrained(state.module):
        raise CheckpointError(
            "The averaged model cannot be saved with its wrapper",
            "transformers would not find its weights: their names begin with 'module.'.",
            "Pass the model inside: averaged.module",
        )
    if model:
        return _lay_out_pretrained(model, named, size)
    kept, removed = _without_ties(_checked(named))
    tensors = _dense(kept)
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=_PATTERN, **size)
    metadata = {"format": "pt"} | ({} if split.is_sharded else removed)
    layout = Layout({path: ({n: tensors[n] for n in ns}, metadata) for path, ns in _parts(split)})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **removed}, "weight_map": split.tensor_to_filename}
        layout.files[_INDEX] = json.dumps(index, indent=2).encode()
    return layout


def _parts(split: Any) -> list[tuple[str, list[str]]]:
    """Paths and names of the shards; a state without tensors is one empty shard."""
    return list(split.filename_to_tensors.items()) or [(_PATTERN.format(suffix=""), [])]


def _dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with readable bytes: detached, contiguous, with lazy negation and conjugation resolved."""
    return {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in state.items()}


def _checked(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The state, all of it tensors that can be saved."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        why, fix = obstacle(value)
        if why:
            raise CheckpointError(f"{name!r} cannot be saved", f"It is {why}.", fix)
        assert isinstance(value, Tensor)
        tensors[name] = value
    return tensors


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """For tensors that share memory, the one that covers all of it. Also maps each name that is left out to
    the name that stays (the first in alphabetical order)."""
    removed: dict[str, str] = {}
    for names in sharing(state):
        whole = sorted(
            name
            for name in names
            if state[name].data_ptr() == state[name].untyped_storage().data_ptr()
            and state[name].nbytes == state[name].untyped_storage().nbytes()
        )
        if not whole:
            raise CheckpointError(
                "Tensors that share memory cannot be saved",
                f"None of {sorted(names)} covers all of it.",
                "Clone those that should be independent.",
            )
        removed |= {name: whole[0] for name in sorted(names) if name != whole[0]}
    return {name: tensor for name, tensor in state.items() if name not in removed}, removed


def _lay_out_pretrained(model: PreTrainedModel, named: Mapping[str, object], size: dict[str, Any]) -> Layout:
    """As ``model.save_pretrained`` does it, in the same order; with that library's own functions for what
    depends on the kind of model (which names stay of tied weights, how a checkpoint's tensors were fused).
    ``named`` is the model's state, which its wrappers gave."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved from memory",
            f"{error}.",
            "Install transformers 5; or save it to a folder and use make_delta.",
        ) from error
    if getattr(model, "hf_quantizer", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved from memory",
            "It is quantized, or has adapters that are not merged.",
            "Merge them; or save it with save_pretrained and use make_delta on the folder.",
        )
    ignored = model._keys_to_ignore_on_save or ()
    state = _checked({name: value for name, value in named.items() if name not in ignored})
    try:
        state = remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        raise CheckpointError(
            "Tied weights cannot be saved", f"{error}", "Tie them through the config."
        ) from error
    tensors = _dense(revert_weight_conversion(model, state))
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=_PATTERN, **({"max_shard_size": "50GB"} | size)
    )
    shards: dict[str, Shard] = {
        path: ({name: tensors[name] for name in names}, {"format": "pt"}) for path, names in _parts(split)
    }
    files = _config_files(model)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        files[_INDEX] = f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode()
    return Layout(shards, files)


def _config_files(model: PreTrainedModel) -> dict[str, bytes]:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
