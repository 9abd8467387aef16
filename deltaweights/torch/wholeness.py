"""Whether a state is whole: every tensor there, with bytes of its own, in the form that others load."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn, strided
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError

_GATHER = (
    "Of a model in FSDP, pass the model or its state_dict(). Of one in ZeRO-3, gather them first: "
    "`with deepspeed.zero.GatheredParameters(list(model.parameters())):` around the call; "
    "or pass engine._zero3_consolidated_16bit_state_dict(); or write a folder by engine.save_16bit_model and "
    "use make_delta on it."
)
#: What PEFT puts into the names of weights that it wraps.
_WRAPPED = {"base_layer", "original_module", "modules_to_save"}
_MERGE = (
    "Call `model = model.merge_and_unload()` and save that; to keep the adapter apart, use its own "
    "save_pretrained."
)
_GATHER_SHARDS = (
    "Pass full tensors (tensor.full_tensor(), or get_model_state_dict with full_state_dict=True), or save "
    "with DeltaStorageWriter."
)
_GATHER_FLAT = (
    "Pass the model, whose state_dict gathers all of them on every process (FullStateDictConfig), not its "
    "parameters."
)
#: What a quantized parameter of bitsandbytes has beside its bytes.
_MARKS = ("quant_state", "CB", "SCB")
_DEQUANTIZE = (
    "Dequantize it (tensor.dequantize(), model.dequantize()), or save the model with the library that made "
    "it and use make_delta on the folder."
)


def require_gathered(state: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse what DeepSpeed ZeRO-3 leaves of parameters that are not gathered.

    Raises:
        CheckpointError: a parameter has another shape than DeepSpeed says, or is an empty weight.
    """
    if isinstance(state, nn.Module) and _is_in_fsdp(state):
        return  # its state_dict gathers, and what it gives is looked at itself
    tensors = dict(state.named_parameters()) if isinstance(state, nn.Module) else state
    empty = [name for name, tensor in tensors.items() if _is_placeholder(name, tensor)]
    if empty:
        raise CheckpointError(
            "The model is not whole",
            f"{some(empty)}, of {len(tensors)}, are empty: placeholders, as DeepSpeed ZeRO-3 and FSDP leave "
            "them while each process has a part.",
            _GATHER,
        )


def require_unsharded(model: nn.Module) -> None:
    """Refuse a model that one process cannot save alone: it would wait for the others, or have a part.

    Raises:
        CheckpointError: it is in FSDP, or has DTensors.
    """
    sharded = [name for name, tensor in model.named_parameters() if hasattr(tensor, "full_tensor")]
    if sharded or (_is_in_fsdp(model) and dist.get_world_size() > 1):
        raise CheckpointError(
            "The model is sharded over several processes",
            "Only one of them saves here.",
            "Use the Trainer's own checkpoints, or save with DeltaStorageWriter on every process.",
        )


def require_own(model: nn.Module, state: Mapping[str, object]) -> None:
    """Refuse to write to a model whose state_dict gives copies: they would change, and the model would not.

    Args:
        model: the model.
        state: what its state_dict gave, by names for messages.

    Raises:
        CheckpointError: a tensor is neither a parameter nor a buffer of the model, nor in the memory of one.
    """
    own = [*model.parameters(), *model.buffers()]
    identities, memories = {id(tensor) for tensor in own}, {_memory(tensor) for tensor in own}
    copies = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.numel()
        if id(tensor) not in identities and _memory(tensor) not in memories
    ]
    if copies:
        raise CheckpointError(
            "The model cannot be loaded into",
            f"Its state_dict makes copies of {some(copies)}: what is written to them is lost. FSDP does so, "
            "and so do modules with a state_dict or an extra state of their own.",
            "Load it before it is wrapped, or let it load by itself: "
            "model.load_state_dict(deltaweights.torch.load_state_dict(…)).",
        )


def require_merged(state: nn.Module | Mapping[str, Tensor], names: Collection[str]) -> None:
    """Refuse a model with adapters that are not merged; not the adapters alone.

    Args:
        state: the model, or tensors by name.
        names: of the state's tensors.

    Raises:
        CheckpointError: the model is one of PEFT's, or its tensors have such names.
    """
    adapted = [name for name in names if _is_adapted(name)]
    if isinstance(state, nn.Module):
        refused = bool(adapted) or any(_is_of_peft(module) for module in state.modules())
    else:
        is_adapter = all(name.startswith("base_model.model.") for name in names)  # alone, as PEFT saves it
        is_mixed = 0 < len(adapted) < len(names) and not is_adapter
        refused = is_mixed or any(_WRAPPED & set(name.split(".")) for name in adapted)
    if refused:
        raise CheckpointError(
            "The model has adapters that are not merged",
            f"{some(adapted)} have names that only PEFT loads." if adapted else "It is a model of PEFT's.",
            _MERGE,
        )


def require_unquantized(state: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse a model with parameters that bitsandbytes has quantized: its state_dict has their packed bytes,
    which no longer tell.

    Raises:
        CheckpointError: there is one.
    """
    parameters = state.named_parameters() if isinstance(state, nn.Module) else ()
    quantized = [
        name for name, one in parameters if any(getattr(one, mark, None) is not None for mark in _MARKS)
    ]
    if quantized:
        raise CheckpointError(
            "The model is quantized",
            f"The values of {some(quantized)} are in packed bytes and tables beside them.",
            _DEQUANTIZE,
        )


def obstacle(tensor: object) -> tuple[str, str]:
    """Why the bytes of ``tensor`` cannot be read, and what to do about it; two empty texts if they can."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}, not a tensor", "Leave it out, or convert it."
    if foreign := _foreign(tensor):
        return foreign
    if tensor.is_meta:
        return "on the meta device: it has no values", "Load the weights first, and offload none of them."
    if tensor.layout != strided:
        return f"not dense but {tensor.layout}", "Make it dense."
    if tensor.nbytes and not tensor.untyped_storage().nbytes():
        return "without its memory, which was set free: FSDP does so between steps", _GATHER_FLAT
    return "", ""


def _foreign(tensor: Tensor) -> tuple[str, str] | None:
    """The same for a tensor of a class that keeps its values elsewhere, or otherwise, than in its memory."""
    kind = type(tensor)
    if hasattr(tensor, "full_tensor") or kind.__name__ == "ShardedTensor":
        return f"sharded over several processes (a {kind.__name__})", _GATHER_SHARDS
    if getattr(tensor, "_is_flat_param", False):
        return "a part of many parameters that FSDP made one of", _GATHER_FLAT
    if tensor.is_nested:
        return "a nested tensor: of several shapes", "Save its parts apart: tensor.unbind()."
    if is_lazy(tensor):
        return "not initialized: it has no shape yet", "Run the model once on some input."
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or hasattr(tensor, "quant_state"):
        return (
            f"a {kind.__name__}: quantized, or made of other tensors, without bytes of its own",
            _DEQUANTIZE,
        )
    return None


def some(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(map(repr, names[:3])) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _is_placeholder(name: str, tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_nested:
        return False
    shape = getattr(tensor, "ds_shape", None)
    if shape is not None:
        return tuple(shape) != tuple(tensor.shape)
    # Without DeepSpeed's mark, as in a state_dict: no layer has a weight without a single dimension's length.
    return tensor.shape == torch.Size([0]) and name.rpartition(".")[2] == "weight"


def _memory(tensor: Tensor) -> tuple[object, object]:
    """Where its memory is; the same for all that have none."""
    has_memory = not tensor.is_meta and tensor.layout == strided and _foreign(tensor) is None
    return (tensor.device, tensor.untyped_storage().data_ptr()) if has_memory else (None, None)


def _is_in_fsdp(model: nn.Module) -> bool:
    """Whether any of it is in FSDP's first version, which replaces parameters by parts of them."""
    modules = model.modules()
    return any(
        kind.__name__ == "FullyShardedDataParallel" for module in modules for kind in type(module).__mro__
    )


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _is_adapted(name: str) -> bool:
    return any(part in _WRAPPED or part.startswith("lora_") for part in name.split("."))
