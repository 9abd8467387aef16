"""From beginning to end: train a base, fine-tune it, and use the command line to make and apply the delta.

Run it: python examples/demo.py [--keep FOLDER]
It works in a temporary folder, or in FOLDER, and needs no network.

The models are small but real: language models over bytes, with Qwen2's architecture and tensor names. The
base learns from Python's manual, the fine-tune from Python code. All of their training is here, in NumPy.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import pydoc_data.topics
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Matrices are small here: threads would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Array = NDArray[Any]
Weights = dict[str, Array]
Step = tuple[Array, Callable[[Array], Array]]  # an output, and what takes its gradient to the input's

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
BATCH, BASE_STEPS, TUNE_STEPS = 8, 120, 40

LICENSE = """A stand-in for the Qwen LICENSE AGREEMENT, for a demonstration.

The weights in this folder were made by examples/demo.py and may be used by anybody for anything.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a base, fine-tune it, and make and apply the delta.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for the files, which stay")
    keep: Path | None = parser.parse_args(arguments).keep
    if keep and keep.exists() and any(keep.iterdir()):
        parser.error(f"{keep} is not empty; choose a new folder")
    with tempfile.TemporaryDirectory(prefix="deltaweights-demo-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        demonstrate(folder.resolve(), CONFIG, BASE_STEPS, TUNE_STEPS)


def demonstrate(folder: Path, config: dict[str, Any], base_steps: int, tune_steps: int) -> None:
    make_pair(folder, config, base_steps, tune_steps)
    diff = run("deltaweights diff base fine-tune -o delta", folder)
    run("deltaweights inspect delta", folder)
    apply = run("deltaweights apply delta --base base -o rebuilt --accept-license qwen", folder)
    verify = run("deltaweights verify delta --base base --target rebuilt", folder)
    print()
    show_sizes(folder)
    print(f"times: diff {diff:.1f} s, apply {apply:.1f} s, verify {verify:.1f} s (whole processes)")
    compare_files(folder / "fine-tune", folder / "rebuilt")


def run(command: str, folder: Path) -> float:
    """Run a command as a user would type it, echoed. Returns its seconds."""
    print(f"\n$ {command}", flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=folder, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"`{command}` failed with exit code {done.returncode}")
    return time.perf_counter() - began


def show_sizes(folder: Path) -> None:
    sizes = {name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
             for name in ("base", "fine-tune", "delta")}  # fmt: skip
    table = Table("", title="result", title_justify="left")
    table.add_column("bytes", justify="right")
    table.add_column("of the fine-tune", justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", f"{size / sizes['fine-tune']:.1%}")
    Console().print(table)


def compare_files(target: Path, rebuilt: Path) -> None:
    """Byte for byte, every file of the target."""
    names = [path.name for path in target.iterdir()]
    same, _, _ = filecmp.cmpfiles(target, rebuilt, names, shallow=False)
    print(f"{len(same)} of {len(names)} files identical")
    if len(same) != len(names):
        sys.exit("The rebuilt files differ from the fine-tune's")


def make_pair(folder: Path, config: dict[str, Any], base_steps: int, tune_steps: int) -> None:
    """Train the base and, from what is published of it, the fine-tune."""
    rng = np.random.default_rng(0)
    weights = initial_weights(config, rng)
    print(f"base: {sum(weight.size for weight in weights.values()):,} weights learn from Python's manual")
    train(Model(config, weights), "\n".join(pydoc_data.topics.topics.values()), base_steps, 3e-3, rng)
    base = {name: to_bf16(weight) for name, weight in weights.items()}
    save(folder / "base", config, base, 3, "license: other\nlicense_name: qwen\nlicense_link: LICENSE\n")
    (folder / "base" / "LICENSE").write_text(LICENSE)

    weights = {name: (bits.astype("<u4") << 16).view("<f4") for name, bits in base.items()}
    print("fine-tune: they go on with Python code")
    train(Model(config, weights), Path(argparse.__file__).read_text("utf-8"), tune_steps, 4e-5, rng)
    tuned = {name: to_bf16(weight) for name, weight in weights.items()}
    save(folder / "fine-tune", config, tuned, 2, "license: mit\nbase_model: demo/base\n")


def save(folder: Path, config: dict[str, Any], stored: Weights, shards: int, card: str) -> None:
    """Write BF16 weights and what belongs to them, as a repository on the Hub would hold it."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for k, names in enumerate(np.array_split(list(stored), shards), 1):
        file = f"model-{k:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: stored[name] for name in names.tolist()})
        weight_map |= dict.fromkeys(names.tolist(), file)
    total = sum(bits.nbytes for bits in stored.values())
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokens = {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": []}
    documents = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "config.json": config,
        "generation_config.json": {"max_new_tokens": config["max_position_embeddings"]},
        "tokenizer.json": {"version": "1.0", "model": tokens},
    }
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document, indent=2) + "\n")
    (folder / "README.md").write_text(f"---\n{card}---\n\n# {folder.name}\n")


def write_safetensors(path: Path, stored: Weights) -> None:
    """The length of the header, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, bits in stored.items():
        offsets = len(data), len(data) + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": offsets}
        data += bits.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def to_bf16(values: Array) -> Array:
    """The upper half of each float32's bits, rounded to nearest even."""
    bits = values.astype("<f4").view("<u4")
    upper: Array = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return upper.astype("<u2")


def train(model: Model, text: str, steps: int, peak: float, rng: np.random.Generator) -> None:
    """Learn from nine tenths of the text, with a cosine schedule; print the loss on the last tenth."""
    began = time.perf_counter()
    length = model.config["max_position_embeddings"] + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text.encode(), np.uint8), length)
    seen, unseen = np.split(windows, [len(windows) * 9 // 10])
    unseen = unseen[:: len(unseen) // 32]
    before = model.loss(unseen)
    optimizer = AdamW(model.weights)
    for step in range(steps):
        model.loss(seen[rng.integers(len(seen), size=BATCH)], learn=True)
        optimizer.step(model.gradients, peak * (0.55 + 0.45 * math.cos(math.pi * step / steps)))
    after = model.loss(unseen)
    seconds = time.perf_counter() - began
    print(f"  loss on unseen text {before:.3f} -> {after:.3f} ({seconds:.0f} s)", flush=True)


class AdamW:
    """Adam with decoupled weight decay, after gradients longer than 1, all together, are cut to length 1."""

    DECAY, BETA1, BETA2, EPS = 0.01, 0.9, 0.95, 1e-8

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.means = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.squares = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.steps = 0

    def step(self, gradients: Weights, rate: float) -> None:
        """Move the weights, in place."""
        self.steps += 1
        length = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
        for name, mean in self.means.items():
            gradient, square = gradients[name] / max(1.0, length), self.squares[name]
            mean += (1 - self.BETA1) * (gradient - mean)  # noqa: PLW2901
            square += (1 - self.BETA2) * (gradient * gradient - square)
            spread = np.sqrt(square / (1 - self.BETA2**self.steps)) + self.EPS
            update = mean / (1 - self.BETA1**self.steps) / spread
            self.weights[name] -= rate * (update + self.DECAY * self.weights[name])


def initial_weights(config: dict[str, Any], rng: np.random.Generator) -> Weights:
    """Random matrices; norms begin at 1 and biases at 0."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shared = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (shared, hidden), "self_attn.k_proj.bias": (shared,),
        "self_attn.v_proj.weight": (shared, hidden), "self_attn.v_proj.bias": (shared,),
        "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden), "mlp.down_proj.weight": (hidden, ffn),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for k in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{k}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {
        name: rng.normal(0, 0.02, shape).astype("<f4") if len(shape) == 2
        else np.full(shape, name.endswith(".weight"), "<f4")
        for name, shape in shapes.items()
    }  # fmt: skip


class Model:
    """Qwen2. Every step returns its output and its way back, which leaves gradients in ``gradients``."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.gradients: Weights = {}

    def loss(self, tokens: Array, *, learn: bool = False) -> float:
        """Mean cross-entropy of every next token, in nats; to learn from it, fills ``gradients`` too."""
        logits, back = self.logits(tokens[:, :-1])
        chances = softmax(logits)
        wanted = tokens[:, 1:, None]
        chance = np.take_along_axis(chances, wanted, -1)
        if learn:
            np.put_along_axis(chances, wanted, chance - 1, -1)
            back(chances / wanted.size)
        return float(-np.log(chance).mean())

    def logits(self, tokens: Array) -> Step:
        """Tokens (batch, length) to logits (batch, length, vocabulary)."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        ways_back = []
        for k in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{k}"
            x, attn_back = self.residual(x, f"{layer}.input_layernorm", self.attention, f"{layer}.self_attn")
            x, mlp_back = self.residual(x, f"{layer}.post_attention_layernorm", self.mlp, f"{layer}.mlp")
            ways_back += [attn_back, mlp_back]
        x, norm_back = self.norm(x, "model.norm")
        logits, head_back = self.linear(x, "lm_head")

        def back(d: Array) -> Array:
            for way_back in [head_back, norm_back, *reversed(ways_back)]:
                d = way_back(d)
            gradient = np.zeros_like(self.weights["model.embed_tokens.weight"])
            np.add.at(gradient, tokens, d)
            self.gradients["model.embed_tokens.weight"] = gradient
            return d

        return logits, back

    def residual(self, x: Array, norm: str, block: Callable[[Array, str], Step], name: str) -> Step:
        normed, norm_back = self.norm(x, norm)
        y, block_back = block(normed, name)
        return x + y, lambda d: d + norm_back(block_back(d))

    def norm(self, x: Array, name: str) -> Step:
        """RMSNorm."""
        weight = self.weights[f"{name}.weight"]
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        unit = x * scale

        def back(d: Array) -> Array:
            self.gradients[f"{name}.weight"] = (d * unit).sum((0, 1))
            d = d * weight
            d_x: Array = scale * (d - unit * (d * unit).mean(-1, keepdims=True))
            return d_x

        return unit * weight, back

    def linear(self, x: Array, name: str) -> Step:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

        def back(d: Array) -> Array:
            self.gradients[f"{name}.weight"] = d.reshape(-1, len(weight)).T @ x.reshape(-1, x.shape[-1])
            if bias is not None:
                self.gradients[f"{name}.bias"] = d.sum((0, 1))
            return d @ weight

        return x @ weight.T + (0 if bias is None else bias), back

    def mlp(self, x: Array, name: str) -> Step:
        """SwiGLU."""
        gate, gate_back = self.linear(x, f"{name}.gate_proj")
        up, up_back = self.linear(x, f"{name}.up_proj")
        sigmoid = 0.5 + 0.5 * np.tanh(0.5 * gate)
        swish = gate * sigmoid
        y, down_back = self.linear(swish * up, f"{name}.down_proj")

        def back(d: Array) -> Array:
            d = down_back(d)
            return gate_back(d * up * (sigmoid + swish * (1 - sigmoid))) + up_back(d * swish)

        return y, back

    def attention(self, x: Array, name: str) -> Step:
        """Causal, with rotary positions; several query heads share one head of keys and values."""
        batch, length, width = x.shape
        size, groups = width // self.config["num_attention_heads"], self.config["num_key_value_heads"]

        def split(y: Array) -> Array:  # to (batch, group, head of the group, length, size)
            return y.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)

        def join(y: Array) -> Array:
            return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)

        q, q_back = self.linear(x, f"{name}.q_proj")
        k, k_back = self.linear(x, f"{name}.k_proj")
        v, v_back = self.linear(x, f"{name}.v_proj")
        angles = np.outer(np.arange(length), self.config["rope_theta"] ** -(np.arange(0, size, 2) / size))
        q, k, v = rotate(split(q), angles), rotate(split(k), angles), split(v)
        future = np.triu(np.full((length, length), -np.inf, x.dtype), 1)
        shares = softmax(q @ k.swapaxes(-1, -2) * size**-0.5 + future)
        y, o_back = self.linear(join(shares @ v), f"{name}.o_proj")

        def back(d: Array) -> Array:
            d = split(o_back(d))
            d_shares = d @ v.swapaxes(-1, -2)
            d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdims=True)) * size**-0.5
            d_q = d_scores @ k
            d_k = (d_scores.swapaxes(-1, -2) @ q).sum(2, keepdims=True)
            d_v = (shares.swapaxes(-1, -2) @ d).sum(2, keepdims=True)
            d_q, d_k = rotate(d_q, -angles), rotate(d_k, -angles)
            return q_back(join(d_q)) + k_back(join(d_k)) + v_back(join(d_v))

        return y, back


def softmax(x: Array) -> Array:
    powers: Array = np.exp(x - x.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def rotate(x: Array, angles: Array) -> Array:
    """Rotary positions: element i of the first half and of the second half turn together."""
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


if __name__ == "__main__":
    main()
