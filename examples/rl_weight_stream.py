"""Reinforcement learning in two processes: a trainer publishes its weights after every step, and an engine,
which samples, follows them through a weight stream.

Run it: python examples/rl_weight_stream.py [STEPS]
It needs torch, works in a temporary folder and needs no network.

The task is a toy (sequences in which letters often rise are good), the rest is not: the trainer has float32
master weights and an optimizer, the engine has bf16 weights and no gradients, and each sample counts by its
advantage over its group's mean (GRPO; since every sample is fresh, nothing has to be clipped).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaweights.torch import DeltaPublisher, DeltaSubscriber

LETTERS, LENGTH, GROUP = 16, 12, 64


class TinyLM(nn.Module):
    """A causal language model of about 300,000 weights."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS + 1, width)  # the last one begins a sequence
        self.place = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Logits of the next letter: (batch, length) integers to (batch, length, LETTERS)."""
        length = letters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.head.weight.dtype)
        hidden = self.embed(letters) + self.place.weight[:length]
        logits: Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return logits

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """So many sequences, (count, LENGTH)."""
        letters = torch.full((count, 1), LETTERS)
        for _ in range(LENGTH):
            chances = self(letters)[:, -1].float().softmax(-1)
            letters = torch.cat([letters, torch.multinomial(chances, 1)], 1)
        return letters[:, 1:]


def digest(state: dict[str, Tensor]) -> str:
    """The SHA-256 of all weights' bytes: what the two processes compare, beside what the stream checks."""
    sha256 = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        sha256.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def reward(samples: Tensor) -> Tensor:
    """The share of neighbors in which the second letter is higher."""
    return (samples[:, 1:] > samples[:, :-1]).float().mean(1)


def serve(stream: Path, asked: Connection) -> None:
    """The engine's process: at every call, take a step's weights, sample, and tell with which weights."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = TinyLM().to(torch.bfloat16).eval()  # other weights than the trainer's: the anchor brings those
    subscriber = DeltaSubscriber(stream)
    while (step := asked.recv()) is not None:
        with subscriber.prepare(model, step=step) as prepared:  # the model could still be sampling here
            report = prepared.commit()  # but not here
        asked.send((report.step, digest(model.state_dict()), model.sample(GROUP)))


def published(model: nn.Module) -> dict[str, Tensor]:
    """The weights as engines want them."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def train_step(model: TinyLM, optimizer: torch.optim.Optimizer, samples: Tensor) -> float:
    """One update by one group of samples. Returns the group's mean reward."""
    scores = reward(samples)
    advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
    letters = torch.cat([torch.full((len(samples), 1), LETTERS), samples[:, :-1]], 1)
    chosen = model(letters).log_softmax(-1).gather(2, samples[:, :, None]).squeeze(2)
    optimizer.zero_grad()
    (-advantages[:, None] * chosen).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(scores.mean())


def main(steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    processes = multiprocessing.get_context("spawn")
    ask, asked = processes.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream"
        engine = processes.Process(target=serve, args=(stream, asked), daemon=True)
        with DeltaPublisher(stream, published(model), anchor_every=10) as publisher:
            engine.start()
            rewards = []
            for step in range(steps):
                ask.send(step)
                seen, weights, samples = ask.recv()
                if (seen, weights) != (step, digest(published(model))):
                    raise SystemExit("the engine's weights are not the trainer's, bit for bit")
                rewards.append(train_step(model, optimizer, samples))
                report = publisher.publish(step + 1, published(model))
                share = report.update_bytes / report.state_bytes
                print(
                    f"step {step + 1:3}: reward {rewards[-1]:.3f}, update {share:.1%} of the weights' bytes"
                )
            ask.send(None)
            engine.join()
    first, last = (sum(part) / len(part) for part in (rewards[:3], rewards[-3:]))
    print(f"mean reward of the first three steps {first:.3f}, of the last three {last:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
