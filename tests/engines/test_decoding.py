"""A target's tensors for an engine's loader: which, in what order, and what is read for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaweights import make_delta
from deltaweights.delta.chain import open_recipe
from deltaweights.delta.target_recipe import TargetRecipe
from deltaweights.engines.decoding import decoded, shards_to_load
from deltaweights.errors import BaseMismatchError, DeltaError
from deltaweights.patch import glance_at_base
from deltaweights.storage import total_traffic
from deltaweights.workers import Workers

EXPERTS = 4


def experts(seed: int) -> dict[str, Tensor]:
    """Mostly experts, as mixtures of them are."""
    random = torch.Generator().manual_seed(seed)
    names = {f"layers.{k}.experts.{e}.w.weight": (64, 512) for k in range(2) for e in range(EXPERTS)}
    shapes = {"embed.weight": (16, 512), "empty": (0, 4), **names, "norm.weight": (512,)}
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, target in two shards, and delta."""
    folder = tmp_path_factory.mktemp("mixture")
    base, change = experts(0), experts(1)
    target = {name: tensor + change[name] * 1e-3 for name, tensor in base.items()}
    target["norm.weight"][:2] = torch.tensor([float("nan"), -0.0])
    for side in ("base", "target"):
        (folder / side).mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in target.items():
        shards["layers.1" in name][name] = tensor
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for path, shard in zip(names, shards, strict=True):
        save_file(shard, folder / "target" / path)
    weight_map = {name: path for path, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "target" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": base["norm.weight"]}, folder / "target" / "consolidated.safetensors")
    (folder / "target" / "encoder").mkdir()
    save_file({"inner": base["norm.weight"]}, folder / "target" / "encoder" / "model.safetensors")
    make_delta(folder / "base", folder / "target", folder / "delta", chunk_bytes=1 << 14)
    return folder


@pytest.fixture
def target(mixture: Path) -> Iterator[TargetRecipe]:
    with open_recipe(mixture / "delta", mixture / "base") as opened:
        yield opened


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_come_in_the_order_of_the_shards_bit_for_bit(
    mixture: Path, target: TargetRecipe, threads: int
) -> None:
    shards = shards_to_load(target)
    assert shards == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    with Workers(threads) as workers:
        found = list(decoded(target, workers, shards=shards))
    stored = [pair for path in shards for pair in load_file(mixture / "target" / path).items()]
    assert dict(found).keys() == dict(stored).keys()
    for name, tensor in stored:
        mine = dict(found)[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mine.view(torch.int16), tensor.view(torch.int16))
    places = [tensor.data_ptr() for _, tensor in found if tensor.numel()]
    assert len(set(places)) == len(places), "loaders keep what they get: no memory is used twice"


def test_shards_are_chosen_as_engines_choose_them(target: TargetRecipe) -> None:
    assert shards_to_load(target, subfolder="encoder") == ["encoder/model.safetensors"]
    assert shards_to_load(target, patterns=["consolidated*.safetensors"]) == ["consolidated.safetensors"]
    with pytest.raises(DeltaError, match=r"no shard that matches \*\.gguf"):
        shards_to_load(target, patterns=["*.gguf"])


def test_an_index_that_is_none_is_an_error(mixture: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture / "target", tmp_path / "target")
    (tmp_path / "target" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    make_delta(mixture / "base", tmp_path / "target", tmp_path / "delta")
    with (
        open_recipe(tmp_path / "delta", mixture / "base") as target,
        pytest.raises(DeltaError, match=r"index\.json of the target cannot be read"),
    ):
        shards_to_load(target)


def test_with_experts_split_a_rank_reads_its_own_only(mixture: Path) -> None:
    """Two ranks: each reads less than 60% of what a rank reads that needs all."""

    def reads(wanted: set[int]) -> int:
        def is_wanted(name: str) -> bool:
            return ".experts." not in name or int(name.split(".")[3]) in wanted

        before = total_traffic()
        with open_recipe(mixture / "delta", mixture / "base") as target, Workers(2) as workers:
            glance_at_base(target, workers, is_wanted)
            found = dict(decoded(target, workers, shards=shards_to_load(target), is_wanted=is_wanted))
            assert set(found) == {name for name in experts(0) if is_wanted(name)}
        return total_traffic().since(before).read

    every = reads(set(range(EXPERTS)))
    for wanted in ({0, 1}, {2, 3}):
        assert reads(wanted) < 0.6 * every


def test_a_wrong_base_and_a_flipped_byte_are_errors(mixture: Path, tmp_path: Path) -> None:
    def load(delta: Path, base: Path, *, glance: bool = False) -> None:
        with open_recipe(delta, base) as target, Workers(2) as workers:
            if glance:
                glance_at_base(target, workers, lambda name: name != "norm.weight")
                return
            for _ in decoded(target, workers, shards=shards_to_load(target)):
                pass

    (tmp_path / "base").mkdir()
    other = experts(0)
    other["layers.0.experts.2.w.weight"][5, 7] = 0
    save_file(other, tmp_path / "base" / "model.safetensors")
    with pytest.raises(BaseMismatchError):
        load(mixture / "delta", tmp_path / "base")
    load(mixture / "delta", mixture / "base", glance=True)
    with pytest.raises(BaseMismatchError):
        load(mixture / "delta", mixture / "target", glance=True)
    shutil.copytree(mixture / "delta", tmp_path / "delta")
    path = max((tmp_path / "delta").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = np.fromfile(path, np.uint8)
    data[-100] ^= 1
    data.tofile(path)
    with pytest.raises(DeltaError):
        load(tmp_path / "delta", mixture / "base")
