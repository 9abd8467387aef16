"""A cold start of vLLM from base and delta, beside its own loader on the rebuilt folder.

A Llama in bf16 whose fine-tune moves every weight by noise of std 1e-5. Only loading is timed: from the
model's making to its last weight, each time in a process of its own, in turns; the files are in the system's
cache. Memory is the process's own (anonymous) at its peak while it loads, since vLLM's loader maps the files.

Figures: time at most twice, memory at most two of the largest tensors for each thread more than that of
vLLM's own loader.

    .venv-engines/bin/python benchmarks/engines.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from children import MIB, finish, print_table
from safetensors.torch import save_file

from deltaweights import apply_delta, make_delta
from deltaweights.engines import serve_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.engines.vllm_server import environment, free_port  # noqa: E402 - as the tests start it

_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Load(NamedTuple):
    """What it took to load a model: seconds, and bytes at the peak."""

    seconds: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest, nbytes = _make(folder, options.layers)
        loads: dict[str, list[Load]] = {"auto": [], "deltaweights": []}
        for _ in range(options.rounds):
            loads["auto"].append(_load(folder, "model", "auto", {}))
            loads["deltaweights"].append(
                _load(folder, "pointer", "deltaweights", {"threads": options.threads})
            )
    print(f"{nbytes / MIB:.0f} MiB of weights, {options.threads} threads; medians of {options.rounds}\n")
    rows = [("", "seconds", "MiB at the peak")]
    found = {}
    for load_format, title in (("auto", "vLLM, rebuilt folder"), ("deltaweights", "base and delta")):
        times, peaks = zip(*loads[load_format], strict=True)
        found[load_format] = Load(median(times), max(peaks))
        rows.append((title, f"{median(times):.2f}", f"{max(peaks) / MIB:.0f}"))
    ratio = found["deltaweights"].seconds / found["auto"].seconds
    more = (found["deltaweights"].peak - found["auto"].peak) / largest
    rows.append(("", f"{ratio:.2f} x", f"{more:+.2f} of the largest"))
    print_table(rows)
    missed = []
    if ratio > 2:
        missed.append(f"time is {ratio:.2f} x vLLM's, more than 2 x")
    if more > 2 * options.threads:
        missed.append(f"memory is {more:.2f} of the largest tensors more, over 2 a thread")
    finish(missed)


def _make(folder: Path, layers: int) -> tuple[int, int]:
    """Base, delta, rebuilt and pointer folder; bytes of the largest tensor, and of all."""
    random = torch.Generator().manual_seed(0)
    hidden, inner = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, hidden),
        "lm_head.weight": (32000, hidden),
    }
    for k in range(layers):
        rows: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (512, hidden),
            "self_attn.v_proj": (512, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{k}.{name}.weight": shape for name, shape in rows.items()}
    shapes["model.norm.weight"] = (hidden,)
    base = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
        state = {name: tensor.bfloat16() for name, tensor in base.items()}
        save_file(state, folder / side / "model.safetensors", metadata={"format": "pt"})
        for tensor in base.values():
            tensor.add_(torch.randn(tensor.shape, generator=random) * 1e-5)
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    apply_delta(folder / "delta", folder / "model", base=folder / "base")
    serve_folder(folder / "delta", folder / "pointer", base=folder / "base")
    return max(tensor.nbytes for tensor in state.values()), sum(tensor.nbytes for tensor in state.values())


def _load(folder: Path, model: str, load_format: str, extra: dict[str, int]) -> Load:
    program = ROOT / "tests" / "engines" / "load_in_vllm.py"
    command = [sys.executable, str(program), str(folder / model), load_format, str(free_port())]
    done = subprocess.run(
        [*command, json.dumps(extra)], env=environment(folder / "plugins"), capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-3000:])
    said = json.loads(done.stdout.splitlines()[-2])
    return Load(said["seconds"], said["peak"])


if __name__ == "__main__":
    main()
