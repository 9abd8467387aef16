"""The demonstration's training, beside torch's and transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from ..test_demo import SMALL, demo


def test_optimizer_is_adamw() -> None:
    """Torch's, with gradients that are clipped among others that are not."""
    rng = np.random.default_rng(2)
    weights = {"a": rng.normal(0, 1, (3, 4)), "b": rng.normal(0, 1, (5,))}
    ours = demo.AdamW(weights)
    parameters = {name: torch.tensor(weight, requires_grad=True) for name, weight in weights.items()}
    theirs = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.01)
    for rate, scale in ((0.1, 0.01), (0.05, 10.0), (0.01, 0.1)):
        gradients = {name: rng.normal(0, scale, weight.shape) for name, weight in weights.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        ours.step(gradients, rate)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(weights[name], parameter.detach().numpy(), rtol=1e-5)


def test_transformers_computes_what_the_demo_computes(tmp_path: Path) -> None:
    """What is saved is a Qwen2 checkpoint, and the model of the demonstration is Qwen2."""
    rng = np.random.default_rng(3)
    weights = {
        name: weight + rng.normal(0, 0.1, weight.shape).astype("<f4")
        for name, weight in demo.initial_weights(SMALL, rng).items()
    }
    stored = {name: demo.to_bf16(weight) for name, weight in weights.items()}
    demo.save(tmp_path / "model", SMALL, stored, 3, "license: mit\n")
    rounded = {name: torch.from_numpy(weight).bfloat16().float().numpy() for name, weight in weights.items()}
    tokens = rng.integers(0, 256, (2, 12))
    logits, _ = demo.Model(SMALL, rounded).logits(tokens)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_is_rounded_to_nearest_even() -> None:
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 0x7F80_0000, 10_000).astype("<u4") | rng.integers(0, 2, 10_000).astype("<u4") << 31
    bits[::2] = bits[::2] & 0xFFFF_0000 | 0x8000  # halfway between two
    expected = torch.from_numpy(bits.view("<f4")).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(demo.to_bf16(bits.view("<f4")), expected)
