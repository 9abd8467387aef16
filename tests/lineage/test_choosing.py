"""Samples: of all kinds and layers, within their bounds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.checkpoint import Tensor, open_checkpoint
from deltaweights.checkpoint.checkpoint import Shard
from deltaweights.checkpoint.header import Header, TensorInfo
from deltaweights.lineage.choosing import choose, tells
from deltaweights.match.candidates import fold
from deltaweights.storage import LocalFile

from ..checkpoints import bf16, random_array, weights, write_safetensors

SHAPES = st.lists(st.lists(st.integers(1, 3000), min_size=2, max_size=3), min_size=1, max_size=40)


def tensor(name: str, *shape: int, dtype: str = "BF16") -> Tensor:
    """A tensor of a file that nobody opens."""
    info = TensorInfo(name, dtype, shape, 0, 0)
    return Tensor(
        info, Shard("m.safetensors", LocalFile("m.safetensors", Path(__file__)), Header(b"", (), {}))
    )


@given(SHAPES, st.integers(1 << 12, 1 << 24))
def test_runs_lie_in_their_tensors_and_apart(shapes: list[list[int]], nbytes: int) -> None:
    tensors = [tensor(f"layers.{k}.w", *shape) for k, shape in enumerate(shapes)]
    chosen = choose(tensors, nbytes)
    assert [one.tensor for one in chosen] == [one for one in tensors if tells(one)]
    for one in chosen:
        ends = [0, *(edge for run in one.runs for edge in run), one.tensor.info.numel]
        assert ends == sorted(ends)
        assert all(start < end for start, end in one.runs)
    assert sum(one.nbytes for one in chosen) <= max(nbytes, 2048 * len(chosen))


def test_of_very_many_tensors_all_kinds_and_layers_are_sampled() -> None:
    names = [f"layers.{k}.experts.{e}.{w}" for k in range(60) for e in range(64) for w in ("up", "down")]
    tensors = [tensor(name, 64, 64) for name in [*names, "embed", *(f"layers.{k}.router" for k in range(60))]]
    chosen = choose(tensors)
    kinds = Counter(fold(one.tensor.name) for one in chosen)
    assert len(chosen) <= 384
    assert kinds["embed"] == 1
    assert kinds["layers.*.router"] == 60
    assert kinds["layers.*.experts.*.up"] > 100
    assert len({one.tensor.name.split(".")[1] for one in chosen if "experts" in one.tensor.name}) > 50


@pytest.mark.parametrize("shape", [(), (5,), (100_000,), (1, 5000), (8, 8), (0, 600)])
def test_vectors_and_tiny_tensors_tell_nothing(shape: tuple[int, ...]) -> None:
    assert not tells(tensor("w", *shape))


def test_dtypes_that_are_no_numbers_tell_nothing(tmp_path: Path) -> None:
    dtypes = ("U8", "BOOL", "I64", "F4", "F8_E4M3", "I8", "F64")
    arrays = {dtype: random_array(dtype, (32, 32)) for dtype in dtypes} | {"BF16": bf16(weights((32, 32)))}
    write_safetensors(tmp_path / "m.safetensors", arrays)
    with open_checkpoint(tmp_path) as found:
        assert {one.name for one in found.tensors if tells(one)} == {"F8_E4M3", "I8", "F64", "BF16"}
