"""A merged adapter at the size of a Llama of 7 billion weights: diff and verify, as a user would type them.

    python benchmarks/llama.py --folder /somewhere
    python benchmarks/llama.py --layers 4

The base has Llama-7B's tensors in bf16; the target is the base with an adapter of rank 16 merged into every
matrix of the layers (qwen.py says how both are made). Both are written to disk, 13.5 GB each, and deleted in
the end. Figures: memory at most 768 MiB, the delta at most 3% of the target, and the SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pairs
import qwen
from children import MIB, deltaweights, finish, print_table, run_measured

_LAYERS, _HIDDEN, _FFN, _VOCAB = 32, 4096, 11008, 32000
_SHARDS = 3
_MEMORY, _SHARE = 768 * MIB, 0.03


def list_tensors(layers: int = _LAYERS) -> Iterator[pairs.Tensor]:
    """The model's tensors, in its own order."""
    yield pairs.Tensor("model.embed_tokens.weight", (_VOCAB, _HIDDEN))
    for number in range(layers):
        name = f"model.layers.{number}"
        for matrix in "qkvo":
            yield pairs.Tensor(f"{name}.self_attn.{matrix}_proj.weight", (_HIDDEN, _HIDDEN))
        for matrix in ("gate", "up"):
            yield pairs.Tensor(f"{name}.mlp.{matrix}_proj.weight", (_FFN, _HIDDEN))
        yield pairs.Tensor(f"{name}.mlp.down_proj.weight", (_HIDDEN, _FFN))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield pairs.Tensor(f"{name}.{norm}.weight", (_HIDDEN,))
    yield pairs.Tensor("model.norm.weight", (_HIDDEN,))
    yield pairs.Tensor("lm_head.weight", (_VOCAB, _HIDDEN))


def write_pair(folder: Path, layers: int, rank: int) -> dict[str, str]:
    """Write base and target; the SHA-256 of each of the target's files, in hex."""
    pool, digests = qwen.Pool.draw(0), {}
    for side, added in (("base", 0), ("target", rank)):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text('{"model_type": "llama"}')
        for number, run in enumerate(qwen.cut(list(list_tensors(layers)), _SHARDS), 1):
            name = f"model-{number:05d}-of-{_SHARDS:05d}.safetensors"
            digests[name] = _write(qwen.Shard(run, pool.base, added), folder / side / name)
    return digests


def _write(shard: qwen.Shard, path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "wb") as file:
        for start in range(0, shard.size, MIB):
            piece = shard.read(start, min(MIB, shard.size - start))
            file.write(piece)
            sha256.update(piece)
    return sha256.hexdigest()


def measure(folder: Path, layers: int, rank: int) -> list[str]:
    """Both commands, and a table; the figures that do not hold, in words."""
    # In a process of its own: a child's peak memory starts at what its parent has.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        digests = process.submit(write_pair, folder, layers, rank).result()
    base, delta = folder / "base", folder / "delta"
    steps = {
        "diff": run_measured(deltaweights("diff", base, folder / "target", "-o", delta)),
        "verify --base": run_measured(deltaweights("verify", delta, "--base", base)),
    }
    nbytes = sum(2 * tensor.weights for tensor in list_tensors(layers))
    print_table(
        [
            [f"Llama-7B, {layers} layers, rank {rank}", *steps],
            ["wall time, s", *(f"{step.wall:.0f}" for step in steps.values())],
            ["CPU time, s", *(f"{step.cpu:.0f}" for step in steps.values())],
            ["peak memory, MiB", *(f"{step.peak / MIB:.0f}" for step in steps.values())],
        ]
    )
    share = sum(file.stat().st_size for file in delta.rglob("*") if file.is_file()) / nbytes
    print(
        f"The delta takes {share * nbytes / 1e6:.0f} MB, {share:.2%} of the target's {nbytes / 1e9:.2f} GB."
    )
    manifest = json.loads((delta / "deltaweights.json").read_text())
    recorded = {file["path"]: file["sha256"] for file in manifest["target"]["files"]}
    missed = [f"{name} has another SHA-256" for name, sha in digests.items() if recorded.get(name) != sha]
    missed += [f"{name} takes too much memory" for name, step in steps.items() if step.peak > _MEMORY]
    return [*missed, *(["the delta is too large"] if share > _SHARE else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room; a new folder in it is deleted")
    parser.add_argument("--layers", type=int, default=_LAYERS, help=f"default {_LAYERS}")
    parser.add_argument("--rank", type=int, default=16, help="at most 16")
    options = parser.parse_args()
    nbytes = sum(2 * tensor.weights for tensor in list_tensors(options.layers))
    with pairs.work_folder(options.folder, int((2 + _SHARE) * nbytes)) as folder:
        missed = measure(folder, options.layers, options.rank)
    finish(missed)


if __name__ == "__main__":
    main()
