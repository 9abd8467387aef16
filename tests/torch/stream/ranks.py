"""What the ranks of test_sharded.py do: ``python -m tests.torch.stream.ranks TASK FOLDER RANK RANKS``.

Every state is also gathered on rank 0, and has to be what a subscriber gets.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from deltaweights import CheckpointError, DeltaWeightsError, OutputError
from deltaweights.torch import DeltaPublisher, DeltaSubscriber, Part
from deltaweights.torch.stream.publishing.kept import KeptState
from deltaweights.torch.tensors import DTYPES

from ..process_groups import end_rank, process_group
from .test_prepare import apply

State = dict[str, Any]


def group() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def gathered(state: State) -> dict[str, Tensor]:
    """The whole state, on every rank."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


class Follower:
    """On rank 0, subscribers that have to be equal to what was published: one that goes on step by step, and
    a new one."""

    def __init__(self, stream: Path | str) -> None:
        self._stream = stream
        self._subscriber = DeltaSubscriber(stream)
        self._mirror: dict[str, Tensor] | None = None

    def check(self, whole: dict[str, Tensor]) -> None:
        if dist.get_rank() == 0:
            if self._mirror is None:
                self._mirror = self._subscriber.empty_state()
            new = DeltaSubscriber(self._stream)
            late = new.empty_state()
            new.sync(late)
            expected = {name: bits(tensor) for name, tensor in whole.items()}
            with self._subscriber.prepare(self._mirror) as prepared:
                found = {name: tensor.clone() for name, tensor in self._mirror.items()}
                apply(list(prepared.changes()), found)
                assert {name: bits(tensor) for name, tensor in found.items()} == expected
                prepared.commit()
            assert {name: bits(tensor) for name, tensor in self._mirror.items()} == expected
            assert {name: bits(tensor) for name, tensor in late.items()} == expected
        dist.barrier()


class Net(nn.Module):
    """Tied weights, a buffer of integers, and rows that two or four ranks share unevenly, or have none of."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(24, 37)
        self.down = nn.Linear(37, 24)
        self.few = nn.Linear(3, 1)
        self.embed = nn.Embedding(50, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(0))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(torch.relu(self.up(self.embed(tokens))))
        self.count.add_(1)
        result: Tensor = self.head(hidden) + self.few(hidden[..., :3])
        return result


def fsdp(folder: Path) -> None:
    """FSDP2, step by step, with float32 master weights that are published in bfloat16."""
    model = Net()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    follower = Follower(folder)

    def whole() -> dict[str, Tensor]:
        return {
            n: t.to(torch.bfloat16) if t.is_floating_point() else t
            for n, t in gathered(model.state_dict()).items()
        }

    with DeltaPublisher(
        folder, model, dtype=torch.bfloat16, process_group=group(), anchor_every=2
    ) as publisher:
        follower.check(whole())
        for step in range(1, 5):
            model(torch.arange(50)[step:]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            report = publisher.publish(step, model if step % 2 else model.state_dict())
            assert (report.step, report.number) == (step, step)
            assert "embed.weight" in report.changed
            assert "head.weight" not in report.changed
            assert report.update_bytes
            follower.check(whole())
        own = [t.to_local() for t in model.parameters() if isinstance(t, DTensor)]
        count = model.count.nbytes if dist.get_rank() == 0 else 0
        assert publisher._kept.nbytes == 2 * sum(t.numel() for t in own) + count


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(step: int) -> State:
    """Tensors cut in many ways, of which the ranks have parts; the same whole state for each number of
    ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    line = init_device_mesh("cpu", (ranks,))
    whole = {
        "rows": random((103, 64), 1, torch.bfloat16),
        "columns": random((64, 103), 2),
        "columns.large": random((1100, 2048), 3, torch.bfloat16),
        "middle": random((5, 9, 70), 4, torch.float16),
        "fewer.rows.than.ranks": random((1, 5), 5),
        "norm": random((64,), 6, torch.bfloat16),
        "scalar": random((), 7),
        "nothing": random((0, 4), 8),
        "plain": random((6, 6), 9),
    }
    for k, tensor in enumerate(whole.values()):
        if tensor.numel() > 1:
            flat = tensor.view(-1)
            flat[(7 * step + k) % len(flat)] += step
            flat[-1] = float("nan") if step == 2 else -0.0
    places = {"rows": 0, "columns": 1, "columns.large": 1, "middle": 1, "fewer.rows.than.ranks": 0}
    state: State = {
        name: distribute_tensor(tensor, line, [Shard(places[name]) if name in places else Replicate()])
        for name, tensor in whole.items()
        if name not in ("nothing", "plain")
    }
    state["nothing"], state["plain"] = whole["nothing"], whole["plain"]
    # As of Megatron: several parts a rank, in any order, and some of them on two ranks.
    fused = random((8 * ranks, 12), 10) + step
    parts = [
        Part("fused", fused[k : k + 2].clone(), tuple(fused.shape), (k, 0)) for k in range(0, 8 * ranks, 2)
    ]
    state["fused"] = parts[rank::ranks][::-1] + parts[:1] * (rank == ranks - 1)
    experts = random((ranks, 3, 5), 11) * (1 + step)
    state["experts"] = Part("experts", experts[rank : rank + 1], tuple(experts.shape), (rank, 0, 0))
    if rank == ranks - 1:  # as a stage of a pipeline has it
        state["last.stage"] = random((9,), 12) + step
        state["last.packed"] = packed(step)
    return state


def packed(step: int) -> Tensor:
    """Pairs of elements of four bits, where torch has them."""
    return torch.full((3, 8), step, dtype=torch.uint8).view(DTYPES.get("F4", torch.uint8))


def whole_of(step: int) -> dict[str, Tensor]:
    state = cut(step)
    ranks = dist.get_world_size()
    found = gathered({n: t for n, t in state.items() if isinstance(t, Tensor)})
    found["fused"] = random((8 * ranks, 12), 10) + step
    found["experts"] = random((ranks, 3, 5), 11) * (1 + step)
    found["last.stage"] = random((9,), 12) + step
    found["last.packed"] = packed(step)
    return found


def parts(folder: Path) -> None:
    """Tensors cut in many ways; the next publisher goes on, also where ranks share in another way."""
    stream = f"file://{folder}" if dist.get_world_size() == 2 else folder
    follower = Follower(folder)
    for first in (0, 2):
        with DeltaPublisher(stream, cut(first), process_group=group(), threads=2) as publisher:
            follower.check(whole_of(first))
            for step in (first + 1, first + 2):
                report = publisher.publish(step, cut(step))
                assert "nothing" not in report.changed
                assert {"fused", "experts", "columns", "last.stage"} <= set(report.changed)
                follower.check(whole_of(step))
    names = [path.name for path in folder.glob("*.update.safetensors")]
    assert len({name.split("-")[2] for name in names}) == dist.get_world_size()


def tensor_parallel(folder: Path) -> None:
    """Columns and rows of tensor parallelism, and parts of them under FSDP2 (4 ranks); replicas (HSDP)."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    model = Net()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if ranks > 2:
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh["dp"])
    follower = Follower(folder / "tp")
    with DeltaPublisher(folder / "tp", model, process_group=group()) as publisher:
        for step in (1, 2):
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.mul_(1.25)
            publisher.publish(step, model)
            follower.check(gathered(model.state_dict()))
    if ranks > 2:
        replicas = Net()
        fully_shard(replicas, mesh=mesh)
        follower = Follower(folder / "hsdp")
        with DeltaPublisher(folder / "hsdp", replicas, process_group=group()) as publisher:
            with torch.no_grad():
                for tensor in replicas.parameters():
                    tensor.mul_(1.25)
            report = publisher.publish(1, replicas)
            whole = gathered(replicas.state_dict())
            follower.check(whole)
            own = sum(t.nbytes for n, t in whole.items() if n != "head.weight")
            assert report.state_bytes == own  # each part once
            mine = publisher._kept.nbytes
            assert mine < 0.5 * own  # replicas share the work


def engine(folder: Path) -> None:
    """An engine that is sharded like the trainer: each rank takes its own parts, from its own file."""
    stream = folder / "stream"
    with DeltaPublisher(stream, cut(0), process_group=group(), anchor_every=3) as publisher:
        own = {name: one for name, one in cut(0).items() if name != "fused"}
        own["fused"] = [*{part.offsets: part for part in cut(0)["fused"]}.values()]  # as they are written
        for one in own.values():
            for part in one if isinstance(one, list) else [one]:
                tensor = part.tensor if isinstance(part, Part) else part
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        subscriber = DeltaSubscriber(stream)
        for step in range(1, 5):
            publisher.publish(step, cut(step))
            with subscriber.prepare(own, step=step) as prepared:
                changed = {change.name: change for change in prepared.changes()}
                assert prepared.commit().updates == 1
            assert local_bits(own) == local_bits(cut(step))
            assert subscriber.sync(own).updates == 0
            if step == 2:
                assert prepared.nbytes == 0
                assert "last.stage" not in changed or dist.get_rank() == dist.get_world_size() - 1
                expected = whole_of(step)["columns"].view(torch.int32).view(-1)
                change = changed["columns"]
                assert change.shape == (64, 103)
                assert change.indices is not None
                assert torch.equal(change.values.view(torch.int32), expected[change.indices])
            dist.barrier()
        few = {name: cut(0)[name] for name in ("rows", "experts")}  # which no other rank has
        report = DeltaSubscriber(stream).sync(few)
        assert local_bits(few) == local_bits({name: cut(4)[name] for name in few})
        way = [*stream.glob("0000000003-*.anchor.*"), *stream.glob("0000000004-*.update.*")]
        mine = [path for path in way if path.name.split("-")[2].startswith(f"{dist.get_rank():05d}")]
        assert report.nbytes == sum(path.stat().st_size for path in mine)
        assert len(mine) == 2 < len(way)
        other = {"rows": Part("rows", torch.zeros(3, 64, dtype=torch.bfloat16), (103, 64), (0, 0))}
        with pytest.raises(CheckpointError, match="sharded in another way"):
            subscriber.sync(other)
        with pytest.raises(CheckpointError, match="does not fit the stream"):
            subscriber.sync({"more": other["rows"]} | {"more": Part("more", torch.zeros(1), (2,), (0,))})
        dist.barrier()


def local_bits(state: State) -> dict[tuple[str, object], bytes]:
    """What this rank has, by names and offsets."""
    found: dict[tuple[str, object], bytes] = {}
    for name, one in state.items():
        for part in one if isinstance(one, list) else [one]:
            tensor = part.tensor if isinstance(part, Part) else part
            key = part.offsets if isinstance(part, Part) else None
            found[name, key] = bits(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    return found


def failures(folder: Path) -> None:
    """A failure on either rank is one on both, nothing is published, and the next step is."""
    rank = dist.get_rank()
    stream = folder / "stream"
    follower = Follower(stream)
    with DeltaPublisher(stream, cut(0), process_group=group()) as publisher:

        def fails(step: int, state: State, match: str, guilty: int = 1, **options: Any) -> None:
            before = {path.name for path in stream.glob("0*")}, (stream / "head.json").read_bytes()
            dist.barrier()
            with pytest.raises(
                (DeltaWeightsError, OSError), match=match if rank == guilty else f"Rank {guilty} failed"
            ):
                publisher.publish(step, state, **options)
            dist.barrier()
            assert ({path.name for path in stream.glob("0*")}, (stream / "head.json").read_bytes()) == before
            dist.barrier()

        bad = cut(1)
        if rank == 1:
            bad["rows"] = bad["rows"].to_local().to_sparse()
        fails(1, bad, "not dense")
        bad = cut(1)
        if rank == 1:
            bad["experts"] = Part("experts", torch.zeros(1, 3, 4), (2, 3, 5), (1, 0, 0))
        fails(1, bad, "does not belong to the stream")
        fails(1 + rank, cut(1), "not publish the same step", guilty=0)
        assert publisher.publish(1, cut(1)).anchor_bytes == 0  # what was kept is known
        follower.check(whole_of(1))

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as on a full disk
        fails(2, cut(2), "File too large|No space")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert publisher.publish(2, cut(2)).anchor_bytes  # after a mix of two states
        follower.check(whole_of(2))
        if rank == 0:
            (stream / "head.json").rename(folder / "head.json")
            (stream / "head.json").mkdir()
        with pytest.raises(DeltaWeightsError, match="Rank 0 failed" if rank else "head.json"):
            publisher.publish(3, cut(3))
        dist.barrier()
        if rank == 0:
            (stream / "head.json").rmdir()
            (folder / "head.json").rename(stream / "head.json")
        dist.barrier()
        publisher.publish(3, cut(3))
        follower.check(whole_of(3))
    refused(folder)


def refused(folder: Path) -> None:
    """What cannot be published is refused on every rank."""
    rank = dist.get_rank()
    line = init_device_mesh("cpu", (2,))
    half = torch.zeros(2, 3)

    def refuse(state: Any, match: str, error: type[Exception] = DeltaWeightsError, **options: Any) -> None:
        options = {"process_group": group()} | options
        with pytest.raises(error, match=match):
            DeltaPublisher(folder / "refused", state, **options)
        dist.barrier()

    refuse(
        {"w": distribute_tensor(half, line, [Shard(0)])}, "this publisher has no process group",
        CheckpointError, process_group=None,
    )  # fmt: skip
    sums = DTensor.from_local(half, line, [Partial()])
    refuse({"w": sums}, "has a summand", CheckpointError)
    refuse({"w": Part("w", half, (4, 3), (0, 0))}, "Rank 0 failed" if rank else "incomplete")
    refuse({"w": Part("w", half, (4, 3), (rank, 0))}, "Rank 0 failed" if rank else "overlap")
    refuse({"w": Part("w", half, (2, 3), (rank, 0))}, "Rank 1 failed" if not rank else "does not fit")
    refuse({"w": half if rank else half[:1]}, "Rank 0 failed" if rank else "not the same on all ranks")
    refuse(
        {"w": half, "v": half[:, 1:] if rank else half}, "Rank 0 failed" if rank else "not the same|overlap"
    )
    assert not (folder / "refused").exists() or not any((folder / "refused").iterdir())


def kill(folder: Path) -> None:
    """Rank 1 is killed while it writes: rank 0 gets an error, and readers see the state before."""
    publisher = DeltaPublisher(folder, cut(0), process_group=group())
    publisher.publish(1, cut(1))

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        KeptState.write_anchor = killed  # type: ignore[method-assign, assignment]
    with pytest.raises(OutputError, match="cannot be reached"):
        publisher.publish(2, cut(2), anchor=True)
    os._exit(0)  # as a trainer ends that cannot go on


TASKS: dict[str, Callable[[Path], None]] = {
    task.__name__: task for task in (fsdp, parts, tensor_parallel, engine, failures, kill)
}


if __name__ == "__main__":
    tasks, folder, rank, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    with process_group(init_method=f"file://{folder}/store", rank=rank, world_size=ranks):
        for task in tasks.split(","):
            (folder / task).mkdir(exist_ok=True)
            TASKS[task](folder / task)
    end_rank()
