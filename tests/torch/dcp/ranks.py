"""What the ranks of test_dcp.py do, started by torchrun: ``python -m tests.torch.dcp.ranks TASK FOLDER``."""

from __future__ import annotations

import io
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from deltaweights.torch import DeltaStorageReader, DeltaStorageWriter

from ..process_groups import end_rank, process_group

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Along which dimension a tensor is sharded by 2 ranks and by 4, if it is.
SHARDED: dict[str, tuple[int, int]] = {
    "rows.uneven": (0, 0),
    "columns.uneven": (1, 1),
    "rows.then.columns": (0, 1),
    "columns.then.rows": (1, 0),
    "fewer.rows.than.ranks": (0, 0),
    "middle": (1, 1),
    "without.counterpart": (0, 0),
}


@cache
def state(step: int) -> dict[str, torch.Tensor]:
    """The whole state at a step, the same on every rank: step 0 is the base. Nobody may change it."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "rows.uneven": ((103, 64), torch.bfloat16),
        "columns.uneven": ((64, 103), torch.float32),
        "rows.then.columns": ((1500, 1024), torch.bfloat16),
        "columns.then.rows": ((1025, 1500), torch.bfloat16),
        "fewer.rows.than.ranks": ((3, 5), torch.float32),
        "middle": ((5, 9, 700), torch.float16),
        "norm": ((64,), torch.bfloat16),
        "scalar": ((), torch.float32),
    }
    found = {}
    for seed, (name, (shape, dtype)) in enumerate(shapes.items()):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        update = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + seed)) * 1e-4
        found[name] = (start + step * update).to(dtype)
    if step:
        generator = torch.Generator().manual_seed(step)
        found["without.counterpart"] = torch.randn((50, 30), generator=generator)
        found["count"] = torch.tensor(step)
    return found


def sharded(step: int) -> dict[str, Any]:
    """:func:`state` as the ranks hold it, nested as in a training script; with 4 ranks, one tensor is cut
    along two dimensions."""
    ranks = dist.get_world_size()
    line = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, ranks // 2))
    tensors: dict[str, Any] = {}
    for name, tensor in state(step).items():
        places: list[Placement] = [Replicate()]
        if name in SHARDED:
            places = [Shard(SHARDED[name][ranks > 2])]
        tensors[name] = distribute_tensor(tensor, line, places)
        if name == "middle" and ranks > 2:
            tensors[name] = distribute_tensor(tensor, square, [Shard(1), Shard(2)])
        if name in ("scalar", "count"):
            tensors[name] = tensor.clone()
    return {"model": tensors, "run": {"step": step, "names": ["a", {"b": 0.5}], "none": None}}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, what this rank has of it."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        if isinstance(one, dict):
            assert_equal(one, other)
        elif isinstance(one, torch.Tensor):
            pair = [t.to_local() if isinstance(t, DTensor) else t for t in (one.detach(), other.detach())]
            first, second = (t.view(WORDS[t.element_size()]) for t in pair)
            assert torch.equal(first, second), name
        else:
            assert one == other, name


def blank(like: Any) -> Any:
    """A state of the same form with other values."""
    if isinstance(like, dict):
        return {name: blank(one) for name, one in like.items()}
    if isinstance(like, list):
        return [blank(one) for one in like]
    return like + 1 if isinstance(like, torch.Tensor) else None


def load(reader: DeltaStorageReader, step: int) -> None:
    """Load the state of a step, and compare it."""
    expected = sharded(step)
    found = blank(expected)
    loader.load(found, storage_reader=reader)
    assert_equal(found, expected)


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that FSDP2 shards, after one step of AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 31), nn.GELU(), nn.Linear(31, 7))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    torch.manual_seed(seed)
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save_fsdp(folder: Path) -> None:
    model, optimizer = trained(1)
    weights, moments = get_state_dict(model, optimizer)
    whole = {name: tensor.full_tensor() for name, tensor in weights.items()}  # type: ignore[union-attr]
    if dist.get_rank() == 0:
        torch.save(whole, folder / "fsdp.pt")
    writer = DeltaStorageWriter(folder / "fsdp", base=folder / "base")
    saver.save({"model": weights, "optim": moments}, storage_writer=writer)


def load_fsdp(folder: Path) -> None:
    """Into a model that went another way, on another number of ranks."""
    model, optimizer = trained(2)
    weights, moments = get_state_dict(model, optimizer)
    found = {"model": weights, "optim": moments}
    loader.load(found, storage_reader=DeltaStorageReader(folder / "fsdp", base=folder / "base"))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    whole = torch.load(folder / "fsdp.pt")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), whole[name]), name
    (step,) = {float(slot["step"]) for slot in optimizer.state.values()}
    assert step == 1.0
    saver.save(found, storage_writer=DeltaStorageWriter(folder / "fsdp-4", base=folder / "base"))


class Killed(DefaultSavePlanner):
    """Kills rank 1 in the middle of a save."""

    def resolve_data(self, write_item: Any) -> torch.Tensor | io.BytesIO:
        if dist.get_rank() == 1 and write_item.index.fqn.endswith("middle"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def run(task: str, folder: Path) -> None:
    base = folder / "base"
    first = DeltaStorageReader(folder / "two", base=base)
    if task == "save":  # 2 ranks
        saver.save(sharded(1), storage_writer=DeltaStorageWriter(folder / "two", base=base, threads=2))
        load(first, 1)
        saver.save(sharded(1), checkpoint_id=folder / "plain")
        save_fsdp(folder)
    elif task == "reshard":  # 4 ranks
        load(first, 1)
        writer = DeltaStorageWriter(folder / "four", base=first)
        pending: Any = saver.async_save(sharded(2), storage_writer=writer)
        pending.result()
        load(DeltaStorageReader(folder / "four", base=first, threads=2), 2)
        load_fsdp(folder)
    elif task == "kill":  # 2 ranks
        load(DeltaStorageReader(folder / "four", base=first), 2)
        (folder / f"loaded-{dist.get_rank()}").touch()
        writer = DeltaStorageWriter(folder / "four", base=base)
        saver.save(sharded(3), storage_writer=writer, planner=Killed())
    elif task == "store":  # 2 ranks
        saver.save(sharded(1), storage_writer=DeltaStorageWriter("s3://bucket/one", base=base))
        load(DeltaStorageReader("s3://bucket/one", base=base), 1)


if __name__ == "__main__":
    with process_group():
        run(sys.argv[1], Path(sys.argv[2]))
    end_rank()
