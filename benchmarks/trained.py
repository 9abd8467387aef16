"""How small the delta of a few real optimizer steps is: a sparse pair, such as reinforcement learning makes.

A byte-level language model of 6.5 million weights is trained for a minute on Python's own library, in F32,
and rounded to bf16: that is the base. Then it is trained as one trains what was published: from those
weights, kept in F32, with a fresh AdamW at learning rate 1e-6, rounded to bf16 after 1, 10 and 40 steps.
Printed are bits a weight: of the delta's weight files, headers included, of XOR + planes + zstd-3 (what BitX
does), and the entropy of the distance in ULPs given the base's exponent. Figure: after one step at most 0.03.

    python benchmarks/trained.py
"""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path

import numpy as np
import torch
from arrays import Arrays, delta_nbytes, entropy_given_exponent
from children import finish, print_table
from peers import Bytes, Planes
from torch import Tensor, nn
from torch.nn import functional

_HIDDEN, _LAYERS, _HEADS, _VOCAB, _CONTEXT, _BATCH = 256, 8, 4, 256, 128, 8
_RATE = 1e-6
_STEPS = (1, 10, 40)
_MOST = 0.03


class LanguageModel(nn.Module):
    """A causal transformer: bytes (batch, length) to logits (batch, length, 256)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            _HIDDEN, _HEADS, 4 * _HIDDEN, 0, functional.gelu, batch_first=True, norm_first=True, bias=False
        )
        self.tokens, self.positions = nn.Embedding(_VOCAB, _HIDDEN), nn.Embedding(_CONTEXT, _HIDDEN)
        self.layers = nn.TransformerEncoder(
            layer, _LAYERS, nn.LayerNorm(_HIDDEN, bias=False), enable_nested_tensor=False
        )
        self.head = nn.Linear(_HIDDEN, _VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(text) + self.positions.weight[:length]
        y: Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
        return y


def step(model: LanguageModel, optimizer: torch.optim.Optimizer, text: Tensor) -> float:
    """One step on random pieces of the text. Returns the loss in nats."""
    starts = torch.randint(len(text) - _CONTEXT, (_BATCH,))
    batch = torch.stack([text[int(start) : int(start) + _CONTEXT] for start in starts])
    loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def pretrain(model: LanguageModel, text: Tensor, steps: int) -> None:
    """Train from scratch, then round to bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses = [step(model, optimizer, text) for _ in range(steps)]
    print(f"pre-training: {steps} steps, loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.2f}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()


def bf16_of(model: LanguageModel) -> dict[str, Bytes]:
    """The weights' bytes in bf16."""
    return {
        name: tensor.to(torch.bfloat16).flatten().view(torch.uint8).numpy().copy()
        for name, tensor in model.state_dict().items()
    }


def row_of(steps: int, arrays: Arrays) -> tuple[list[str], float]:
    """A row of the table, and the delta's bits a weight."""
    planes = sum(map(len, Planes().encode(arrays.base, arrays.target, "BF16")))
    bits, bitx = (8 * nbytes / arrays.weights for nbytes in (delta_nbytes(arrays), planes))
    entropy = entropy_given_exponent(arrays)
    numbers = [f"{arrays.same:.2%}", f"{bits:.4f}", f"{bitx:.4f}", f"{entropy:.4f}"]
    return [f"{steps} step{'s' if steps > 1 else ''}", *numbers], bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="pre-train for some steps only")
    options = parser.parse_args()
    torch.manual_seed(0)
    library = sorted(Path(inspect.getfile(os)).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in library)), dtype=torch.uint8).long()
    model = LanguageModel()
    pretrain(model, text, 30 if options.quick else 200)

    base = bf16_of(model)
    joined, lengths = np.concatenate(list(base.values())), {name: len(data) for name, data in base.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    rows = [[f"{len(joined) // 2:,} weights", "unchanged", "delta, bits/weight", "BitX", "entropy"]]
    missed = []
    for number in range(1, max(_STEPS) + 1):
        step(model, optimizer, text)
        if number in _STEPS:
            target = np.concatenate(list(bf16_of(model).values()))
            row, bits = row_of(number, Arrays("trained", "BF16", joined, target, lengths))
            rows.append(row)
            if number == 1 and bits > _MOST:
                missed.append(f"one step takes {bits:.4f} bits a weight, not {_MOST}")
    print_table(rows)
    finish(missed)


if __name__ == "__main__":
    main()
