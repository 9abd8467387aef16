"""Small models for tests, and how their weights are compared: as bytes, never as floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deltaweights.torch.tensors import byte_view


def tiny_qwen2(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A causal language model in BF16, 90,000 weights, with random ones."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model: PreTrainedModel = Qwen2ForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    return model


def tiny_mixtral() -> PreTrainedModel:
    """Experts are one tensor in memory and many in a checkpoint."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model: PreTrainedModel = MixtralForCausalLM(config)
    return model


def tiny_llava() -> PreTrainedModel:
    """Its parts have other names in memory than in a checkpoint."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**sizes, vocab_size=64),
    )
    model: PreTrainedModel = LlavaForConditionalGeneration(config)
    return model


def _compiled(model: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(model, backend="eager"))


def _with_wrapped_layers(model: PreTrainedModel) -> nn.Module:
    """One layer compiled, one that saves memory, one part that runs on several GPUs."""
    layers = model.model.layers
    layers[0] = _compiled(layers[0])
    layers[1] = checkpoint_wrapper(layers[1])
    model.model.norm = nn.DataParallel(model.model.norm)
    return model


WRAPPERS: list[Callable[[PreTrainedModel], nn.Module]] = [
    _compiled,
    nn.DataParallel,
    checkpoint_wrapper,
    lambda model: _compiled(nn.DataParallel(model)),
    _with_wrapped_layers,
]


def nudge(model: nn.Module, seed: int = 1, std: float = 1e-3) -> None:
    """Move every weight a little, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.empty(parameter.shape).normal_(0, std, generator=generator)
            parameter.add_(step.to(parameter))


class Tied(nn.Module):
    """Layers that share a weight, a buffer, a parameter without gradient, and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.fixed = nn.Parameter(torch.ones(7), requires_grad=False)
        self.turned = nn.Parameter(torch.zeros(12, 5).t())


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return byte_view(tensor.contiguous()).cpu().numpy().tobytes()


def raw_state(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """All that counts of every tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape), raw(tensor)) for name, tensor in state.items()}


def saved_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards in a folder, as safetensors loads them."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        state = load_file(path) | state
    return state
