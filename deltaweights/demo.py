"""``python -m deltaweights demo``: the main job on a small model that is really trained, step by step.

A byte-level language model with Qwen2's architecture and tensor names is trained for some seconds (the base),
then fine-tuned on other text (the target). Needs torch: the extra ``deltaweights[torch]``.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import math
import pydoc_data.topics
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DeltaWeightsError

try:
    import torch
    from safetensors.torch import save_file
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise DeltaWeightsError(
        "The demo trains a small model, and torch is not installed",
        f"{error}.",
        "Install it: pip install 'deltaweights[torch]'",
    ) from error

_HIDDEN, _FFN, _LAYERS, _HEADS, _KV_HEADS, _VOCAB = 256, 768, 4, 4, 1, 256
_CONTEXT, _BATCH = 64, 8

_LICENSE = """A stand-in for the Qwen LICENSE AGREEMENT, for a demonstration.

The weights in this folder were made by `deltaweights demo` and may be used by anybody for anything.
"""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and biases on q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        head = _HIDDEN // _HEADS
        self.q_proj = nn.Linear(_HIDDEN, _HIDDEN)
        self.k_proj = nn.Linear(_HIDDEN, _KV_HEADS * head)
        self.v_proj = nn.Linear(_HIDDEN, _KV_HEADS * head)
        self.o_proj = nn.Linear(_HIDDEN, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, _HIDDEN // _HEADS).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = functional.scaled_dot_product_attention(
            _rotate(q), _rotate(k), v, is_causal=True, enable_gqa=True
        )
        y: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, _HIDDEN))
        return y


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the two halves as pairs."""
    length, size = x.shape[-2:]
    angles = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, size, 2) / size))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_HIDDEN, _FFN, bias=False)
        self.up_proj = nn.Linear(_HIDDEN, _FFN, bias=False)
        self.down_proj = nn.Linear(_FFN, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """One transformer layer, normalised before attention and before the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = nn.RMSNorm(_HIDDEN, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(_HIDDEN, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class LanguageModel(nn.Module):
    """Token ids (batch, length) to logits (batch, length, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(_VOCAB, _HIDDEN),
                "layers": nn.ModuleList(Layer() for _ in range(_LAYERS)),
                "norm": nn.RMSNorm(_HIDDEN, eps=1e-6),
            }
        )
        self.lm_head = nn.Linear(_HIDDEN, _VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"].children():
            x = layer(x)
        y: Tensor = self.lm_head(self.model["norm"](x))
        return y


def _train(model: LanguageModel, text: str, steps: int, peak: float) -> tuple[float, float]:
    """Train with AdamW and a cosine schedule. Returns the loss at the start and at the end, in nats."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(data) - _CONTEXT - 1, (_BATCH,))
        batch = torch.stack([data[int(start) : int(start) + _CONTEXT + 1] for start in starts])
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-5:]) / 5


def _save(model: LanguageModel, folder: Path, shards: int, license: str) -> None:
    """Save in BF16, as a Hub repository would hold it."""
    folder.mkdir(parents=True)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    names = list(state)
    weight_map: dict[str, str] = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    files: dict[str, Any] = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "config.json": _config(),
        "generation_config.json": {"max_new_tokens": 64},
        "tokenizer.json": _tokenizer(),
    }
    for path, content in files.items():
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(f"---\n{license}---\n\n# {folder.name}\n")


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": _VOCAB,
        "max_position_embeddings": _CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, Any]:
    """One token a byte."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(_VOCAB)}
    return {"version": "1.0", "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []}}


def _make_pair(folder: Path) -> None:
    """Train the base and the target; both folders are sharded in their own way."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model trains faster without threads waiting for one another
    model = LanguageModel()
    count = sum(parameter.numel() for parameter in model.parameters())
    manual = "\n".join(pydoc_data.topics.topics.values())
    code = Path(argparse.__file__).read_text(encoding="utf-8")

    began = time.perf_counter()
    first, last = _train(model, manual, steps=80, peak=2e-3)
    print(f"base: {count:,} weights trained on Python's manual, loss {first:.2f} -> {last:.2f} "
          f"({time.perf_counter() - began:.0f} s)")  # fmt: skip
    _save(model, folder / "base", 3, "license: other\nlicense_name: qwen\nlicense_link: LICENSE\n")
    (folder / "base" / "LICENSE").write_text(_LICENSE)
    for parameter in model.parameters():  # a fine-tune starts from what was published: BF16
        parameter.data = parameter.data.to(torch.bfloat16).float()

    began = time.perf_counter()
    first, last = _train(model, code, steps=40, peak=2e-5)
    print(f"fine-tune: on Python code, loss {first:.2f} -> {last:.2f} ({time.perf_counter() - began:.0f} s)")
    _save(model, folder / "fine-tune", 2, "license: mit\nbase_model: demo/base\n")


def _run(folder: Path, command: str) -> float:
    """Run one command as the user would type it, echoed. Returns its seconds."""
    print(f"\n$ {command}", flush=True)
    arguments = [sys.executable, "-m", *shlex.split(command)]
    began = time.perf_counter()
    done = subprocess.run(arguments, cwd=folder, check=False)  # noqa: S603
    if done.returncode:
        raise DeltaWeightsError(f"`{command}` failed with exit code {done.returncode}")
    return time.perf_counter() - began


def run_demo(keep: Path | None = None) -> None:
    """Run the demonstration; print to stdout.

    Args:
        keep: a new folder for its files; None: a temporary one.

    Raises:
        DeltaWeightsError: torch is missing, the folder is not empty, or a step failed.
    """
    with _folder(keep) as folder:
        _make_pair(folder)
        diff = _run(folder, "deltaweights diff base fine-tune -o delta")
        _run(folder, "deltaweights inspect delta")
        apply = _run(folder, "deltaweights apply delta --base base -o rebuilt --accept-license qwen")
        verify = _run(folder, "deltaweights verify delta --base base --target rebuilt")
        _show_result(folder, {"diff": diff, "apply": apply, "verify": verify})


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="deltaweights-demo-") as name:
            yield Path(name)
        return
    if keep.exists() and any(keep.iterdir()):
        raise DeltaWeightsError(f"{keep} is not empty", fix="Choose a new folder.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def _show_result(folder: Path, seconds: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    files = [p.relative_to(folder / "fine-tune") for p in sorted((folder / "fine-tune").rglob("*"))]
    same = [p for p in files if filecmp.cmp(folder / "fine-tune" / p, folder / "rebuilt" / p, shallow=False)]
    sizes = {name: _size(folder / name) for name in ("base", "fine-tune", "delta")}
    table = Table(title="result", title_justify="left")
    for heading in ("", "bytes", "of the fine-tune"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", f"{size / sizes['fine-tune']:.1%}")
    print()
    console = Console(highlight=False)
    console.print(table)
    times = ", ".join(f"{verb} {value:.1f} s" for verb, value in seconds.items())
    console.print(f"times: {times} (whole processes)")
    console.print(f"{len(same)} of {len(files)} files identical")
    if len(same) != len(files):
        raise DeltaWeightsError("The rebuilt files differ from the fine-tune's")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
