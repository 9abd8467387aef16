"""A base and a target with the tensors of Qwen2.5-72B, made on the fly: any bytes of any shard, at once.

Names, dtypes and shapes are the model's. The values are windows of a pool of made weights: 64 MiB for the
base, and the same weights updated for the target. Each 8 MiB block of a tensor is the window whose place
follows from the tensor's name and the block's number, so base and target correspond element by element
however they are sharded. Bytes come at the speed of memory, and nothing is stored.

So at full size each pooled weight occurs some two thousand times, at other places in other chunks. That helps
no coder that works on chunks of 1 MiB alone, as this project's does; one that looks for repetitions over
gigabytes would find them here, and not in a real model.

Or the target is the base into which an adapter was merged: every matrix of the layers has an update of its
own, of a given rank; embeddings, biases and norms stay.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pairs import Tensor, draw, header_of, to_bf16

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Side = Literal["base", "target"]

#: Shards of each side: the base has as many as on the Hub.
SHARDS: dict[Side, int] = {"base": 37, "target": 41}

TENSORS = 963
WEIGHTS = 72_706_203_648
NBYTES = 145_412_407_296

#: The widths of the model. They may be divided by any power of two up to 128.
HIDDEN, FFN, KV, VOCAB = 8192, 29568, 1024, 152064
LAYERS = 80

_POOL_BYTES = 64 << 20
_BLOCK_BYTES = 8 << 20
#: Each run of so many bytes of the pool has an update of its own standard deviation: log-normal, with this
#: median and this sigma. A delta of such a pair takes about 19% of the target, 27 GB of 145.
_RUN_BYTES = 1 << 18
_UPDATE, _SIGMA = 1e-4, 0.5
_READ_BYTES = 1 << 20
#: The standard deviation of what merging an adapter adds, and that of its factors. These are integers, for
#: sums of products that are exact in float32, whatever their order.
_MERGED, _FACTOR, _MOST_FACTOR = 2e-4, 300, 1023
_MOST_RANK = 16


def list_tensors(shrink: int = 1) -> list[Tensor]:
    """The model's tensors in its own order, every width divided by ``shrink``: 1 / shrink² of the bytes."""
    hidden, ffn, kv, vocab = (width // shrink for width in (HIDDEN, FFN, KV, VOCAB))
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
    tensors = [
        Tensor("model.embed_tokens.weight", (vocab, hidden)),
        *(Tensor(f"model.layers.{n}.{name}", shape) for n in range(LAYERS) for name, shape in layer.items()),
        Tensor("model.norm.weight", (hidden,)),
        Tensor("lm_head.weight", (vocab, hidden)),
    ]
    assert len(tensors) == TENSORS
    assert shrink > 1 or 2 * sum(tensor.weights for tensor in tensors) == 2 * WEIGHTS == NBYTES
    return tensors


def cut(tensors: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    """The tensors in ``count`` runs of about equal bytes."""
    total, start, numbers = sum(tensor.weights for tensor in tensors), 0, []
    for tensor in tensors:
        numbers.append(start * count // total)
        start += tensor.weights
    for _, run in groupby(zip(numbers, tensors, strict=True), key=lambda pair: pair[0]):
        yield [tensor for _, tensor in run]


@dataclass(frozen=True)
class Pool:
    """Weights and the same ones updated, as bytes."""

    base: memoryview
    target: memoryview

    @staticmethod
    def draw(seed: int, nbytes: int = _POOL_BYTES) -> Pool:
        import numpy as np

        updates = _UPDATE * np.random.default_rng(seed).lognormal(0, _SIGMA, nbytes // _RUN_BYTES)
        runs = [draw((seed, n), _RUN_BYTES // 2, float(update)) for n, update in enumerate(updates)]
        base, target = (np.concatenate(side).data for side in zip(*runs, strict=True))
        return Pool(base, target)


class Shard:
    """A safetensors file whose bytes are made when they are read.

    Attributes:
        tensors: those in it, in order.
        header: its first bytes.
        pool: the weights that its blocks are windows of.
        rank: of what is added to matrices; nothing is if 0.
        size: in bytes.
        sha256: in hex; empty until :func:`add_digests` has worked it out.
    """

    def __init__(self, tensors: Sequence[Tensor], pool: memoryview, rank: int = 0) -> None:
        if rank > _MOST_RANK:
            raise ValueError(f"the rank is at most {_MOST_RANK}")
        self.tensors = sorted(tensors, key=lambda tensor: tensor.name)  # as the safetensors library does
        self.header, starts = header_of(self.tensors)
        self.size = len(self.header) + sum(2 * tensor.weights for tensor in tensors)
        self.sha256 = ""
        self._starts = [len(self.header) + start for start in starts]
        self.pool = pool
        self.rank = rank
        self._merged = lru_cache(maxsize=8)(self._merge)

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        """The ``nbytes`` bytes from byte ``offset`` on."""
        pieces = []
        while nbytes:
            piece = self._piece(offset, nbytes)
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, offset: int, nbytes: int) -> memoryview:
        """The first of these bytes, as many as lie together in memory."""
        if offset < len(self.header):
            return memoryview(self.header)[offset : offset + nbytes]
        index = bisect_right(self._starts, offset) - 1
        tensor, position = self.tensors[index], offset - self._starts[index]
        block, skipped = divmod(position, _BLOCK_BYTES)
        length = min(nbytes, _BLOCK_BYTES - skipped, 2 * tensor.weights - position)
        if self.rank and "proj.weight" in tensor.name:
            return self._merged(tensor, block)[skipped : skipped + length]
        start = self._place(tensor.name, block) + skipped
        return self.pool[start : start + length]

    def _merge(self, tensor: Tensor, block: int) -> memoryview:
        """A block of a tensor, with an adapter merged."""
        import numpy as np

        place, first = self._place(tensor.name, block), block * _BLOCK_BYTES // 2
        stop = min(first + _BLOCK_BYTES // 2, tensor.weights)
        bits = np.frombuffer(self.pool[place : place + 2 * (stop - first)], np.uint16)
        left, right = _factors(tensor, self.rank)
        columns = right.shape[1]
        row = first // columns
        update = (left[row : -(-stop // columns)] @ right).reshape(-1)[first - row * columns :][
            : stop - first
        ]
        scale = np.float32(_MERGED / (_FACTOR**2 * self.rank**0.5))
        return to_bf16((bits.astype(np.uint32) << 16).view(np.float32) + update * scale).view(np.uint8).data

    def _place(self, name: str, block: int) -> int:
        """Where in the pool a block of a tensor starts: at an element, and whole."""
        digest = hashlib.blake2b(f"{name}:{block}".encode(), digest_size=8).digest()
        return 2 * (int.from_bytes(digest, "little") % ((len(self.pool) - _BLOCK_BYTES) // 2))


@lru_cache(maxsize=8)
def _factors(tensor: Tensor, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of what merging an adapter adds: [rows, rank] and [rank, columns]."""
    import numpy as np

    source = np.random.default_rng(list(hashlib.blake2b(tensor.name.encode(), digest_size=8).digest()))
    rows, columns = tensor.shape

    def some(*shape: int) -> NDArray[np.float32]:
        drawn = np.rint(source.standard_normal(shape, np.float32) * np.float32(_FACTOR))
        clipped: NDArray[np.float32] = np.clip(drawn, -_MOST_FACTOR, _MOST_FACTOR)
        return clipped

    return some(rows, rank), some(rank, columns)


def make_shards(side: Side, pool: Pool, shrink: int = 1, rank: int = 0) -> dict[str, Shard]:
    """One side's shards by file name. The base is cut in the model's order, the target in that of the names:
    ``lm_head`` comes first, and layer 10 before layer 2. With a rank, the target is a merged adapter's."""
    tensors, count = list_tensors(shrink), SHARDS[side]
    if side == "target":
        tensors.sort(key=lambda tensor: tensor.name)
    weights = pool.target if side == "target" and not rank else pool.base
    added = rank if side == "target" else 0
    runs = [Shard(run, weights, added) for run in cut(tensors, count)]
    return {f"model-{n:05d}-of-{count:05d}.safetensors": shard for n, shard in enumerate(runs, 1)}


def other_files(side: Side, shards: dict[str, Shard], shrink: int = 1) -> dict[str, bytes]:
    """What else there is in such a repository."""
    index = {tensor.name: name for name, shard in shards.items() for tensor in shard.tensors}
    size = {"total_size": sum(2 * tensor.weights for tensor in list_tensors(shrink))}
    config = {"model_type": "qwen2", "hidden_size": HIDDEN // shrink, "num_hidden_layers": LAYERS}
    files = {
        "model.safetensors.index.json": json.dumps({"metadata": size, "weight_map": index}, indent=2),
        "config.json": json.dumps(config, indent=2),
    }
    if side == "base":
        title = "Qwen LICENSE AGREEMENT"
        files["README.md"] = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
        files["LICENSE"] = (
            f"{title}\n\n{title} Release Date: September 19, 2024\n\n(stand-in for a rehearsal)\n"
        )
    else:
        files["README.md"] = "---\nlicense: mit\n---\n"
    return {name: text.encode() for name, text in files.items()}


def add_digests(sides: dict[Side, dict[str, Shard]], memory: Path) -> Iterator[int]:
    """Work out the SHA-256 of every shard, on all cores; or take it from the file ``memory``, where an
    earlier run with the same bytes left it.

    Yields:
        The size of each shard when its digest is there.
    """
    key = _fingerprint(sides)
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):  # there is none, or a run was killed while it wrote
        kept = json.loads(memory.read_text())
        known = kept["sha256"] if kept["key"] == key else {}
    shards = {f"{side}/{name}": shard for side in sides for name, shard in sides[side].items()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        digests = threads.map(lambda place: known.get(place) or _digest(shards[place]), shards)
        for place, digest in zip(shards, digests, strict=True):
            shards[place].sha256 = known[place] = digest
            memory.write_text(json.dumps({"key": key, "sha256": known}, indent=1))
            yield shards[place].size


def _fingerprint(sides: dict[Side, dict[str, Shard]]) -> str:
    """Another one whenever bytes differ: of the pool, of headers, or in the places of blocks."""
    sha256 = hashlib.sha256()
    for shards in sides.values():
        for shard in shards.values():
            sha256.update(shard.header)
            sha256.update(f"{shard.rank} {_MERGED}".encode())
            sha256.update(shard.read(shard.size - 4096, 4096))
        sha256.update(shard.pool)
    return sha256.hexdigest()


def _digest(shard: Shard) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, shard.size, _READ_BYTES):
        sha256.update(shard.read(offset, min(_READ_BYTES, shard.size - offset)))
    return sha256.hexdigest()
