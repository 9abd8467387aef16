"""A small model with all that streams have to cope with, steps of its training, and streams to spoil."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaweights.torch import DeltaPublisher
from deltaweights.torch.stream.records import HEAD_NAME

State = dict[str, Tensor]


class Net(nn.Module):
    """Small, but with a tensor of several chunks, tied weights, a scalar, integers and nothing at all."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(600, 2000, dtype=torch.bfloat16)
        self.head = nn.Linear(2000, 600, bias=True, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(33)
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("empty", torch.zeros(0, 7))


@torch.no_grad()
def train(model: nn.Module, seed: int, share: float = 0.01) -> None:
    """A step: some weights of every tensor move a little, here and there."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            moved = torch.rand(tensor.shape, generator=generator) < share
            tensor[moved] *= 1.01
        elif tensor.dtype == torch.int64:
            tensor.add_(1)


def bits(state: nn.Module | State) -> dict[str, bytes]:
    """Every tensor's bytes."""
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    return {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


def streamed(folder: Path, model: nn.Module, steps: int = 2, **options: Any) -> Path:
    """A stream of so many steps."""
    with DeltaPublisher(folder / "s", model, **options) as publisher:
        for step in range(1, steps + 1):
            train(model, step)
            publisher.publish(step, model)
    return folder / "s"


def flip(path: Path, place: float) -> None:
    """Invert a byte."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0xFF
    path.write_bytes(data)


def rewrite(stream: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest record, and have the head name it all the same."""
    head = json.loads((stream / HEAD_NAME).read_bytes())
    path = stream / f"{head['newest']['number']:010d}.json"
    record = json.loads(path.read_bytes())
    change(record)
    data = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    path.write_bytes(data)
    head["newest"]["record"] = hashlib.sha256(data).hexdigest()
    head["newest"]["state"] = record["state"]
    (stream / HEAD_NAME).write_bytes(json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n")
