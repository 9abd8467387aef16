"""Whether a state is whole: every tensor there, with bytes of its own, in the form that others load."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn, strided
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError

_GATHER = (
    "Gather them first: `with deepspeed.zero.GatheredParameters(list(model.parameters())):` around the call; "
    "or pass engine._zero3_consolidated_16bit_state_dict(); or write a folder by engine.save_16bit_model and "
    "use make_delta on it."
)
_MERGE = (
    "Call `model = model.merge_and_unload()` and save that; to keep the adapter apart, use its own "
    "save_pretrained."
)
_GATHER_SHARDS = (
    "Pass full tensors (tensor.full_tensor(), or get_model_state_dict with full_state_dict=True), or save "
    "with DeltaStorageWriter."
)
_DEQUANTIZE = (
    "Dequantize it (tensor.dequantize(), model.dequantize()), or save the model with the library that made "
    "it and use make_delta on the folder."
)


def require_gathered(state: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse what DeepSpeed ZeRO-3 leaves of parameters that are not gathered.

    Raises:
        CheckpointError: a parameter has another shape than DeepSpeed says, or is an empty weight.
    """
    tensors = dict(state.named_parameters()) if isinstance(state, nn.Module) else state
    empty = [name for name, tensor in tensors.items() if _is_placeholder(name, tensor)]
    if empty:
        raise CheckpointError(
            "The model is not whole",
            f"{some(empty)}, of {len(tensors)}, are empty: placeholders, as DeepSpeed ZeRO-3 leaves them "
            "while each process has a part.",
            _GATHER,
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
        refused = any("base_layer" in name for name in adapted) or 0 < len(adapted) < len(names)
    if refused:
        raise CheckpointError(
            "The model has adapters that are not merged",
            f"{some(adapted)} have names that only PEFT loads." if adapted else "It is a model of PEFT's.",
            _MERGE,
        )


def obstacle(tensor: object) -> tuple[str, str]:
    """Why the bytes of ``tensor`` cannot be read, and what to do about it; two empty texts if they can."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}, not a tensor", "Leave it out, or convert it."
    if foreign := _foreign(tensor):
        return foreign
    if tensor.is_meta:
        return "on the meta device: it has no values", "Load the weights first, and offload none of them."
    return ("", "") if tensor.layout == strided else (f"not dense but {tensor.layout}", "Make it dense.")


def _foreign(tensor: Tensor) -> tuple[str, str] | None:
    """The same for a tensor of a class that keeps its values elsewhere, or otherwise, than in its memory."""
    kind = type(tensor)
    if hasattr(tensor, "full_tensor"):
        return "sharded over several processes (a DTensor)", _GATHER_SHARDS
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
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        return False
    shape = getattr(tensor, "ds_shape", None)
    if shape is not None:
        return tuple(shape) != tuple(tensor.shape)
    # Without DeepSpeed's mark, as in a state_dict: no layer has a weight without a single dimension's length.
    return tensor.shape == torch.Size([0]) and name.rpartition(".")[2] == "weight"


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _is_adapted(name: str) -> bool:
    return any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
