"""Reinforcement learning with vLLM: it samples over HTTP while a training publishes each step as an update,
and takes them one by one. After every step, its weights are compared with the trainer's, bit for bit.

Run it: python examples/rl_with_vllm.py [STEPS]
It needs vLLM in the same environment, works in a temporary folder, and needs no network and no GPU. vLLM's
build for processors packs its weights, which leaves no bytes to compare; the tests start it without that
(tests/engines/on_cpu.py).

The model is a Llama of 300,000 weights that begins with nothing learned, and the task is a toy: sequences in
which tokens often rise are good. The rest is what one does with a large model. A step is published while the
engine still answers with the weights before; only the writing of what has changed pauses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from deltaweights.torch import DeltaPublisher

#: vLLM pads vocabularies to 64 tokens, so the model has as many; 16 of them are used.
VOCABULARY, TOKENS, LENGTH, GROUP = 64, 16, 12, 64
#: What a machine without a GPU can serve.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


_TOKENS_ONLY = {"return_token_ids": True, "detokenize": False, "allowed_token_ids": list(range(TOKENS))}


class Engine:
    """A vLLM server, called over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def call(self, route: str, body: object = None, *, timeout: float = 120) -> Any:
        """Post to a route; the answer."""
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(  # noqa: S310
            self._url + route, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise SystemExit(f"vLLM answers {route} with an error:\n{error.read().decode()}") from error

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(self._url + "/health", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False

    def sample(self, count: int) -> Tensor:
        """So many sequences after the first token, 0: (count, LENGTH) integers."""
        body = {"prompt": [0], "n": count, "temperature": 1.0, "max_tokens": LENGTH, "ignore_eos": True}
        choices = self.call("/v1/completions", {**body, **_TOKENS_ONLY})
        return torch.tensor([choice["token_ids"] for choice in choices["choices"]])

    def prepare(self, step: int) -> None:
        """Have it fetch, check and decode a step in the background."""
        self.call("/start_weight_update")
        self.call("/update_weights", {"update_info": {"step": step, "prepare": True}})

    def commit(self, step: int) -> None:
        """Have it write the step, between two of its own."""
        self.call("/pause?mode=keep")
        self.call("/update_weights", {"update_info": {"step": step}})
        self.call("/finish_weight_update", {"weight_version": str(step)})
        self.call("/resume")

    def digests(self) -> set[str]:
        """The SHA-256 of each of its parameters."""
        return set(self.call("/weight_checker", {"action": "checksum"})["checksums"].values())


@contextmanager
def served(model: Path, log: Path) -> Iterator[Engine]:
    """vLLM, serving a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64"]
    command += ["--dtype", str(DTYPE).removeprefix("torch."), "--no-enable-prefix-caching"]
    command += ["--weight-transfer-config", json.dumps({"backend": "deltaweights"})]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            engine = Engine(port)
            while not engine.is_up():
                if server.poll() is not None:
                    raise SystemExit(f"vLLM does not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.5)
            yield engine
        finally:
            server.terminate()
            server.wait(60)


def published(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights as the engine has them."""
    return {name: tensor.to(DTYPE) for name, tensor in model.state_dict().items()}


def fused_digests(state: dict[str, Tensor]) -> set[str]:
    """The SHA-256 of each parameter of the engine: it keeps query, key and value, or gate and up, in one."""
    parts: dict[str, list[Tensor]] = {}
    for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
        for name in [name for name in state if first in name]:
            parts[name] = [state[name.replace(first, other)] for other in (first, *others)]
    fused = {id(part) for some in parts.values() for part in some}
    parts |= {name: [tensor] for name, tensor in state.items() if id(tensor) not in fused}
    joined = (torch.cat(some).contiguous().view(torch.uint8).numpy().data for some in parts.values())
    return {hashlib.sha256(data).hexdigest() for data in joined}


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, samples: Tensor) -> float:
    """One step of GRPO by a group of samples: each counts by its advantage over the group's mean, and since
    every sample is fresh, nothing has to be clipped. Returns the mean reward: the share of neighbors that
    rise."""
    scores = (samples[:, 1:] > samples[:, :-1]).float().mean(1)
    advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
    seen = torch.cat([torch.zeros(len(samples), 1, dtype=torch.long), samples[:, :-1]], 1)
    chosen = model(seen).logits[..., :TOKENS].log_softmax(-1).gather(2, samples[:, :, None]).squeeze(2)
    optimizer.zero_grad()
    (-advantages[:, None] * chosen).mean().backward()
    optimizer.step()
    return float(scores.mean())


def main(steps: int) -> None:
    if not find_spec("vllm"):
        raise SystemExit("This needs vLLM in the same environment.")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, stream = folder / "base", folder / "stream"
        LlamaForCausalLM(config).save_pretrained(base)  # other weights: the stream's anchor brings the first
        print("vLLM starts …", flush=True)
        with (
            DeltaPublisher(stream, published(model)) as publisher,
            served(base, folder / "vllm.log") as engine,
        ):
            engine.call("/init_weight_transfer_engine", {"init_info": {"location": str(stream)}})
            engine.prepare(0)
            engine.commit(0)
            rewards = []
            for step in range(1, steps + 1):
                rewards.append(train_step(model, optimizer, engine.sample(GROUP)))
                report = publisher.publish(step, published(model))
                engine.prepare(step)
                engine.sample(1)  # it still answers, with the weights before
                engine.commit(step)
                if engine.digests() != fused_digests(published(model)):
                    raise SystemExit("vLLM's weights are not the trainer's, bit for bit")
                print(f"step {step:3}: reward {rewards[-1]:.3f}, update {report.update_bytes:,} bytes")
    few = max(steps // 4, 1)
    first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
    print(f"mean reward of the first {few} steps {first:.3f}, of the last {few} {last:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
