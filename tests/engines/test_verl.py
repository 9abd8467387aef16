"""The checkpoint engine of verl, made and driven as verl itself does it, where verl is installed."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaweights import DeltaError, NotPublishedError

pytest.importorskip("verl", reason="needs verl")

#: Rollout workers; every second step, a new one comes.
ROLLOUTS = 2

Weights = dict[str, Tensor]


@pytest.fixture
def registry() -> Any:
    """verl's registry, once it has imported our module by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of verl and what it imports
        from verl.checkpoint_engine import CheckpointEngineRegistry
        from verl.utils.import_utils import import_external_libs

        import_external_libs("deltaweights.engines.verl")
    return CheckpointEngineRegistry


def weights(step: int) -> Weights:
    """Weights that change a little with every step, a NaN with a payload and a -0.0 among them."""
    torch.manual_seed(0)
    state = {
        "model.embed.weight": torch.randn(300, 40).to(torch.bfloat16),
        "model.norm.weight": torch.ones(40),
        "model.scale": torch.zeros((), dtype=torch.float16),
    }
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randperm(12000, generator=generator)[: 100 * step]
    state["model.embed.weight"].view(-1)[chosen] += 0.5
    state["model.embed.weight"].view(torch.int16).view(-1)[step] = 0x7FC1 + step
    state["model.norm.weight"][step] = -0.0
    return state


class Job:
    """verl's manager without Ray: an actor that publishes, one that only gathers, and rollouts."""

    def __init__(self, registry: Any, location: Path, **options: Any) -> None:
        self.registry, self.options = registry, {"location": str(location), "bucket_size": 1 << 20, **options}
        self.actors = [registry.new("deltaweights", is_master=rank == 0, **self.options) for rank in (0, 1)]
        self.rollouts: list[Any] = []
        self.gathered = [0, 0]

    def add_rollout(self) -> None:
        self.rollouts.append(self.registry.new("deltaweights", **self.options))

    def connect(self) -> None:
        everyone = [*self.actors, *self.rollouts]
        topology = self.registry.get("deltaweights").build_topology(
            len(self.actors), len(self.rollouts), [engine.prepare() for engine in everyone]
        )
        for engines, arguments in zip((self.actors, self.rollouts), topology, strict=True):
            assert all(len(values) == len(engines) for values in arguments.values())
            for place, engine in enumerate(engines):
                engine.init_process_group(**{name: values[place] for name, values in arguments.items()})

    def update(self, state: Weights, step: int | None) -> tuple[list[dict[str, float]], list[Weights]]:
        """What the actors' calls return, and what the rollouts get."""
        self.connect()

        async def run() -> Any:
            sent = [
                engine.send_weights(self._gather(rank, state), step)
                for rank, engine in enumerate(self.actors)
            ]
            return await asyncio.gather(
                *map(self._receive, self.rollouts, [step] * len(self.rollouts)), *sent
            )

        results = asyncio.run(run())
        for engine in (*self.actors, *self.rollouts):
            engine.finalize()
        return results[len(self.rollouts) :], results[: len(self.rollouts)]

    def _gather(self, rank: int, state: Weights) -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(12000, dtype=torch.float64)
        for name, tensor in state.items():
            here = buffer.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)  # as verl does, one for all
            self.gathered[rank] += 1
            yield name, here.copy_(tensor)

    async def _receive(self, engine: Any, step: int | None) -> Weights:
        from verl.workers.rollout.utils import ensure_async_iterator

        return {
            name: tensor
            async for name, tensor in ensure_async_iterator(engine.receive_weights(global_steps=step))
        }


class Jobs:
    """Makes jobs, and ends them."""

    def __init__(self, registry: Any) -> None:
        self.registry, self.made = registry, list[Job]()

    def __call__(self, location: Path, **options: Any) -> Job:
        self.made.append(Job(self.registry, location, **options))
        return self.made[-1]

    def end(self) -> None:
        while self.made:
            self.made.pop().actors[0].close()


@pytest.fixture
def jobs(registry: Any) -> Iterator[Jobs]:
    made = Jobs(registry)
    yield made
    made.end()


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8))
        for name in one
    )


def test_every_step_arrives_bit_for_bit(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream")
    for step in range(1, 7):
        if step % 2:
            job.add_rollout()
        ((metrics, nothing), received) = job.update(weights(step), step)
        assert nothing == {}
        assert len(received) == len(job.rollouts)
        assert all(same(one, weights(step)) for one in received)
        if step > 1:
            assert 0 < metrics["deltaweights/update_bytes"] < metrics["deltaweights/state_bytes"] / 4
    assert job.gathered == [18, 18], "every actor takes part in gathering"


def test_steps_without_a_number_arrive_too(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream")
    job.add_rollout()
    for step in (1, 2, 3):
        assert same(job.update(weights(step), None)[1][0], weights(step))


def test_an_engine_that_keeps_its_weights_gets_those_that_changed(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream", changed_only=True)
    job.add_rollout()
    first = weights(1)
    assert same(job.update(first, 1)[1][0], first)
    second = first | {"model.scale": torch.tensor(2.0, dtype=torch.float16)}
    assert same(job.update(second, 2)[1][0], {"model.scale": second["model.scale"]})

    # An engine that fails half way gets what it did not take once more.
    job.connect()
    third = second | {"model.norm.weight": torch.full((40,), 3.0)}
    asyncio.run(job.actors[0].send_weights(iter(third.items()), 3))

    async def fail() -> None:
        async for name, _ in job.rollouts[0].receive_weights(3):
            raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="norm"):
        asyncio.run(fail())
    fourth = third | {"model.scale": torch.tensor(4.0, dtype=torch.float16)}
    received = job.update(fourth, 4)[1][0]
    assert same(received, {name: fourth[name] for name in ("model.norm.weight", "model.scale")})


def test_a_trainer_that_starts_again_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream")
    job.add_rollout()
    for step in (1, 2, 3):
        job.update(weights(step), step)
    jobs.end()
    rollouts, job = job.rollouts, jobs(tmp_path / "stream")
    job.rollouts = rollouts
    job.add_rollout()
    for step in (2, 3):  # from a checkpoint: steps that were there before, with other weights
        assert all(same(one, weights(step + 5)) for one in job.update(weights(step + 5), step)[1])


def test_a_rollout_does_not_wait_for_ever(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream", timeout=0.1)
    job.add_rollout()
    job.connect()
    with pytest.raises(NotPublishedError, match=r"Step 1 was not published in 0\.1 seconds"):
        asyncio.run(job._receive(job.rollouts[0], 1))


def test_nothing_of_a_damaged_update_is_given(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(tmp_path / "stream", keep_anchors=None, anchor_every=None)
    job.add_rollout()
    job.update(weights(1), 1)
    job.connect()
    asyncio.run(job.actors[0].send_weights(iter(weights(2).items()), 2))
    (payload,) = (tmp_path / "stream").glob("*update*")
    data = bytearray(payload.read_bytes())
    data[-5] ^= 1
    payload.write_bytes(data)
    given = []

    async def receive() -> None:
        async for name, _ in job.rollouts[0].receive_weights(2):
            given.append(name)

    with pytest.raises(DeltaError):
        asyncio.run(receive())
    assert given == []
    job.connect()
    state = weights(3)
    asyncio.run(job.actors[0].send_weights(iter(state.items()), 3))
    payload.write_bytes(bytes(data[:-5]) + bytes([data[-5] ^ 1]) + bytes(data[-4:]))
    assert same(asyncio.run(job._receive(job.rollouts[0], 3)), state)


def test_the_module_can_be_imported_again(registry: Any) -> None:
    module = importlib.import_module("deltaweights.engines.verl")
    assert registry.get("deltaweights") is module.DeltaCheckpointEngine
