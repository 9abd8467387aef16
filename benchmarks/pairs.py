"""A base and a target to measure on: bf16 checkpoints of any size, made block by block.

Weights are normal with standard deviation 0.02; the target adds a normal update to each. Or, with the tensors
of Qwen2-0.5B, the standard deviation is 0.015 to 0.05 by tensor, and updates have a Laplace distribution.
Nothing of a checkpoint is held in memory but the blocks in work. Called from other benchmarks, or by hand:

    python benchmarks/pairs.py /dev/shm/pair --size 1 --shards 4
    python benchmarks/pairs.py /dev/shm/pair --qwen2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    #: The base's and the target's bytes of a tensor by its number, from one weight on, so many weights.
    DrawBlock: TypeAlias = Callable[[int, int, int], tuple[Bytes, Bytes]]

GIB = 1 << 30
QWEN2_LAYERS = 24

#: The width of a layer: its matrix has 8 MiB.
HIDDEN = 2048
_BLOCK_WEIGHTS = 1 << 19
_WEIGHT_STD = 0.02
#: Of Qwen2's tensors, by what is in the name.
_QWEN2_STDS = {"k_proj": 0.05, "q_proj": 0.03, "down_proj": 0.015, "embed": 0.015, "norm": 0.05, "proj": 0.02}
#: Memory that has to stay free before files are put in a memory file system.
_FREE_MEMORY = 8 * GIB


@dataclass(frozen=True)
class Pair:
    """A made base and target: two folders of .safetensors shards below ``root``."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def target(self) -> Path:
        return self.root / "target"


@dataclass(frozen=True)
class Tensor:
    """A BF16 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def make_in_child(
    pair: Pair, nbytes: int, *, shards: int = 1, big: int = 0, update: float = 2e-4, hidden: int = HIDDEN
) -> None:
    """Make the pair in a process of its own.

    A child's peak RSS starts at what its parent had when it forked, so who measures children stays small.
    """
    size = ["--size", str(nbytes / GIB), "--big", str(big / GIB)]
    more = ["--shards", str(shards), "--update", str(update), "--hidden", str(hidden)]
    subprocess.run([sys.executable, __file__, str(pair.root), *size, *more], check=True)


def make(
    pair: Pair, nbytes: int, *, shards: int = 1, big: int = 0, update: float = 2e-4, hidden: int = HIDDEN
) -> None:
    """Write base and target of about ``nbytes`` bytes each.

    Args:
        shards: how many files each is cut into.
        big: bytes of one large tensor at the front; the rest is layers.
        update: standard deviation of what the target adds to a weight.
        hidden: width of the layers.
    """

    def draw_block(number: int, start: int, weights: int) -> tuple[Bytes, Bytes]:
        return draw((number, start), weights, update)

    _write(pair, list(_tensors(nbytes, big, hidden)), shards, draw_block)


def make_qwen2_in_child(pair: Pair, *, layers: int, update: float) -> None:
    """Make the pair of :func:`make_qwen2` in a process of its own."""
    options = ["--qwen2", "--layers", str(layers), "--update", str(update)]
    subprocess.run([sys.executable, __file__, str(pair.root), *options], check=True)


def make_qwen2(pair: Pair, *, layers: int = QWEN2_LAYERS, update: float = 2e-4) -> None:
    """Write base and target with the tensors of Qwen2-0.5B, 988,065,536 bytes of weights in 24 layers; one
    shard each, as it is published."""
    tensors = list(_qwen2_tensors(layers))
    stds = [next(std for part, std in _QWEN2_STDS.items() if part in tensor.name) for tensor in tensors]

    def draw_block(number: int, start: int, weights: int) -> tuple[Bytes, Bytes]:
        return draw((number, start), weights, update, std=stds[number], laplace=True)

    _write(pair, tensors, 1, draw_block)


def _tensors(nbytes: int, big: int, hidden: int) -> Iterator[Tensor]:
    """A large embedding if asked for, then layers: a square matrix and a norm each."""
    if big:
        yield Tensor("model.embed_tokens.weight", (big // (2 * hidden), hidden))
    for layer in range((nbytes - big) // (2 * hidden * (hidden + 1))):
        yield Tensor(f"model.layers.{layer}.weight", (hidden, hidden))
        yield Tensor(f"model.layers.{layer}.norm.weight", (hidden,))


def _qwen2_tensors(layers: int) -> Iterator[Tensor]:
    """Output and input embeddings are one."""
    hidden, ffn, kv, vocab = 896, 4864, 2 * 64, 151936
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for number in range(layers):
        for name, shape in layer.items():
            yield Tensor(f"model.layers.{number}.{name}", shape)
    yield Tensor("model.norm.weight", (hidden,))


def _write(pair: Pair, tensors: Sequence[Tensor], shards: int, draw_block: DrawBlock) -> None:
    per_shard = -(-len(tensors) // shards)
    pair.base.mkdir(parents=True, exist_ok=True)
    pair.target.mkdir(exist_ok=True)
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        first = index * per_shard
        _write_shard(pair, name, tensors[first : first + per_shard], first, draw_block)
    (pair.target / "config.json").write_text('{"model_type": "benchmark"}')


def _write_shard(pair: Pair, name: str, tensors: Sequence[Tensor], first: int, draw_block: DrawBlock) -> None:
    header, starts = header_of(tensors)
    with open(pair.base / name, "wb") as base, open(pair.target / name, "wb") as target:
        for file in (base, target):
            file.write(header)
            file.flush()

        def write_block(job: tuple[int, int, int]) -> None:
            number, start, offset = job
            weights = min(_BLOCK_WEIGHTS, tensors[number].weights - start)
            blocks = draw_block(first + number, start, weights)
            for file, block in zip((base, target), blocks, strict=True):
                os.pwrite(file.fileno(), block.data, offset + 2 * start)

        jobs = (
            (number, start, len(header) + starts[number])
            for number, tensor in enumerate(tensors)
            for start in range(0, tensor.weights, _BLOCK_WEIGHTS)
        )
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(write_block, jobs):
                pass


def header_of(tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """The shard's header, and where each tensor starts behind it."""
    fields, starts, position = {}, [], 0
    for tensor in tensors:
        end = position + 2 * tensor.weights
        fields[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [position, end]}
        starts.append(position)
        position = end
    text = json.dumps(fields).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, starts


def draw(
    seed: Sequence[int], weights: int, update: float, *, std: float = _WEIGHT_STD, laplace: bool = False
) -> tuple[Bytes, Bytes]:
    """The bytes of so many bf16 weights and of the updated ones; the same for the same ``seed``."""
    import numpy as np

    source = np.random.default_rng(seed)
    base = to_bf16(source.standard_normal(weights, np.float32) * np.float32(std))
    if laplace:  # the difference of two exponential variables, whose standard deviation is the root of 2
        ends = source.standard_exponential((2, weights), np.float32)
        step = (ends[0] - ends[1]) * np.float32(update / 2**0.5)
    else:
        step = source.standard_normal(weights, np.float32) * np.float32(update)
    target = to_bf16((base.astype(np.uint32) << 16).view(np.float32) + step)
    return base.view(np.uint8), target.view(np.uint8)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even; the values are finite."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@contextmanager
def work_folder(chosen: Path | None, nbytes: int) -> Iterator[Path]:
    """A new folder with room for ``nbytes`` bytes, deleted at the end.

    In ``chosen`` if given; else in /dev/shm where enough memory stays free, else on disk.
    """
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tmpfs = Path("/dev/shm")  # noqa: S108
    parent = chosen or (tmpfs if tmpfs.is_dir() and memory - nbytes > _FREE_MEMORY else None)
    folder = Path(tempfile.mkdtemp(prefix="deltaweights-bench-", dir=parent))
    try:
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise SystemExit(f"{folder.parent} has {free / GIB:.1f} GiB free, {nbytes / GIB:.1f} are needed")
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where base/ and target/ are written")
    parser.add_argument("--size", type=float, default=1, metavar="GIB", help="of each, default 1")
    parser.add_argument("--big", type=float, default=0, metavar="GIB", help="of one large tensor, default 0")
    parser.add_argument("--shards", type=int, default=1, help="files of each, default 1")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"width of layers, default {HIDDEN}")
    parser.add_argument("--qwen2", action="store_true", help="the tensors of Qwen2-0.5B, in one shard")
    parser.add_argument("--layers", type=int, default=QWEN2_LAYERS, help=f"of these, default {QWEN2_LAYERS}")
    parser.add_argument("--update", type=float, default=2e-4, metavar="STD", help="default 2e-4")
    options = parser.parse_args()
    if options.qwen2:
        make_qwen2(Pair(options.folder), layers=options.layers, update=options.update)
        return
    size, big = (int(gib * GIB) for gib in (options.size, options.big))
    layers = {"update": options.update, "hidden": options.hidden}
    make(Pair(options.folder), size, shards=options.shards, big=big, **layers)


if __name__ == "__main__":
    main()
