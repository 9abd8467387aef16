"""Real merged adapters: a small llama of random weights, for which PEFT trains adapters and merges them.

Needs torch, transformers and peft, which nothing else of the project does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ALL = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_TEXT = 61  # period of the made-up text that adapters learn


@dataclass(frozen=True)
class Merge:
    """How an adapter is made.

    Attributes:
        rank: of the adapter.
        attention_only: whether it has the attention's matrices only.
        dtype: of the adapter.
        dora: whether rows have magnitudes as well.
        twice: whether a second adapter is trained and merged after the first.
        stabilized: whether the product is divided by the root of the rank (rsLoRA).
        start: how PEFT makes the adapter: "pissa" and "olora" take it from the weights themselves.
    """

    rank: int = 16
    attention_only: bool = False
    dtype: torch.dtype = torch.float32
    dora: bool = False
    twice: bool = False
    stabilized: bool = False
    start: bool | str = True


MERGES = {
    "rank 8": Merge(8),
    "rank 16": Merge(16),
    "rank 16, attention": Merge(16, attention_only=True),
    "rank 16, bf16 adapter": Merge(16, dtype=torch.bfloat16),
    "rank 16, DoRA": Merge(16, dora=True),
    "rank 16, two adapters": Merge(16, twice=True),
    "rank 16, rsLoRA": Merge(16, stabilized=True),
    "rank 16, PiSSA": Merge(16, start="pissa_niter_4"),
    "rank 16, OLoRA": Merge(16, start="olora"),
    "rank 64": Merge(64),
    "rank 256": Merge(256),
}


def base_model(hidden: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A llama whose weights are normally distributed, as large ones' are, with a scale for each matrix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


def merged(model: Any, merge: Merge, steps: int) -> Any:
    """A copy of a model with an adapter trained and merged."""
    for seed in range(2 if merge.twice else 1):
        model = _merged_once(copy.deepcopy(model), merge, steps, seed)
    return model


def _merged_once(model: Any, merge: Merge, steps: int, seed: int) -> Any:
    torch.manual_seed(seed + 1)
    config = LoraConfig(
        r=merge.rank,
        lora_alpha=2 * merge.rank,
        target_modules=_ATTENTION if merge.attention_only else _ALL,
        use_dora=merge.dora,
        use_rslora=merge.stabilized,
        init_lora_weights=merge.start,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=merge.dtype == torch.float32)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-4)
    for step, tokens in enumerate(_texts(steps, seed)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del step
    return adapted.merge_and_unload()


def _texts(count: int, seed: int) -> Iterator[torch.Tensor]:
    """Texts that are the more predictable the better one knows how far back to look."""
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 1024, (_TEXT,), generator=random)
    for _ in range(count):
        starts = torch.randint(0, _TEXT, (2, 1), generator=random)
        yield words[(starts + torch.arange(64)) % _TEXT]
