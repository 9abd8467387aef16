"""A checkpoint engine of verl: the trainer publishes a weight stream, and rollouts take it.

It is registered when this is imported, as ``checkpoint_engine.custom_backend_module`` asks for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from ..errors import NotPublishedError
from ..signing.signers import KeySigner
from ..torch import DeltaPublisher, DeltaSubscriber

#: Seconds between two looks at the stream: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


@CheckpointEngineRegistry.register("deltaweights")
class DeltaCheckpointEngine(CheckpointEngine):  # type: ignore[misc,unused-ignore]
    """Moves weights from verl's actor to its rollouts by a weight stream, bit for bit.

    The first actor publishes. It holds two copies of the state in the CPU's memory: what it compares with,
    and what the actor gives. A rollout worker holds one, in the form of the checkpoint.

    Args:
        bucket_size: not used: nothing goes by buckets.
        is_master: whether this is the actor that publishes.
        location: the stream's folder, fsspec URL, or repository on the Hub, as seen from every worker.
        changed_only: give the rollout only the tensors that changed. Its engine has to keep its weights from
            step to step, asleep too.
        timeout: how long a rollout waits for the actor to publish, in seconds.
        private_key: path of the private key that signs the stream; needed where the first actor runs.
        public_key: path of the public key by which rollouts require it to be signed. None: it need not be.
        anchor_every, keep_anchors, threads: as for :class:`deltaweights.torch.DeltaPublisher`.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        location: str,
        changed_only: bool = False,
        timeout: float = 1800.0,
        anchor_every: int | None = 100,
        keep_anchors: int | None = 2,
        private_key: str | None = None,
        public_key: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._is_master = is_master
        self._location = location
        self._changed_only = changed_only
        self._timeout = timeout
        self._open = partial(
            DeltaPublisher,
            location,
            anchor_every=anchor_every,
            keep_anchors=keep_anchors,
            signer=KeySigner(private_key) if private_key else None,
            threads=threads,
        )
        self._subscriber = DeltaSubscriber(location, threads=threads, require_signature=public_key)
        self._publisher: DeltaPublisher | None = None
        self._state: dict[str, torch.Tensor] = {}  # what was sent last, or received
        self._owed: set[str] = set()  # tensors that the rollout's engine does not have yet
        self._after = -1

    def prepare(self) -> dict[str, Any]:
        """Say, on the actor that publishes, at which state the stream is."""
        return {"number": self._newest_number()} if self._is_master else {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tell every worker which state was the newest, so that the rollouts wait for the next."""
        (number,) = (one["number"] for one in metadata if one)
        return {"after": [number] * actor_wg_world_size}, {"after": [number] * rollout_world_size}

    def init_process_group(self, after: int) -> None:
        """Take in what :meth:`build_topology` says. There is no process group."""
        self._after = after

    def finalize(self) -> None:
        """Do nothing: stream and copies stay open for the next step."""

    def close(self) -> None:
        """Release the stream for another publisher. The end of the process does that, too."""
        if self._publisher is not None:
            self._publisher.close()

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Publish the actor's weights; when this returns, rollouts see them.

        Args:
            weights: names and full tensors. Every actor goes through them, since they are gathered from all.
            global_steps: the step's number; None: the stream's number for the state.

        Returns:
            What verl logs: the bytes that were published, and those of the state.
        """
        state: dict[str, torch.Tensor] = {}
        async for name, tensor in ensure_async_iterator(weights):
            if self._is_master:
                state[name] = self._copied(name, tensor.detach())
        if not self._is_master:
            return {}
        self._state = state
        step = self._after + 1 if global_steps is None else global_steps
        return await asyncio.to_thread(self._publish, step)

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Wait for the state that the actor publishes, fetch and check it, and yield its tensors.

        Nothing is yielded before all of it is checked.

        Args:
            global_steps: the step's number; None: the newest state.

        Yields:
            Name and full tensor, in the memory of the rollout's device.

        Raises:
            NotPublishedError: the actor did not publish in time.
            DeltaWeightsError: as for :meth:`deltaweights.torch.DeltaSubscriber.prepare`.
        """
        await self._published(global_steps)
        await asyncio.to_thread(self._take, global_steps)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        for name in sorted(self._owed):
            # A copy: the engine may read it when the next step is written to ours.
            yield name, self._state[name].to(device, copy=True)
        self._owed = set() if self._changed_only else set(self._state)

    def _newest_number(self) -> int:
        try:
            return self._subscriber.newest().number
        except NotPublishedError:
            return -1

    def _copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the CPU's memory, in that of the step before if it fits."""
        before = self._state.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            return tensor.to("cpu", copy=True)
        return before.copy_(tensor)

    def _publish(self, step: int) -> dict[str, float]:
        if self._publisher is None:
            is_new = self._newest_number() < 0
            self._publisher = self._open(self._state, step=step)
            if is_new:  # the stream begins with this state
                return {"deltaweights/state_bytes": float(_nbytes(self._state))}
        report = self._publisher.publish(step, self._state)
        return {
            "deltaweights/update_bytes": float(report.update_bytes),
            "deltaweights/anchor_bytes": float(report.anchor_bytes),
            "deltaweights/state_bytes": float(report.state_bytes),
        }

    async def _published(self, step: int | None) -> None:
        """Wait until the stream has a state after the one that it had before this step."""
        pause, end = _FIRST_PAUSE, time.monotonic() + self._timeout
        while await asyncio.to_thread(self._newest_number) <= self._after:
            if time.monotonic() > end:
                raise NotPublishedError(
                    f"Step {step} was not published in {self._timeout:g} seconds",
                    f"{self._location} has no state after number {self._after}.",
                    "See why the actor does not publish, or give the engine a longer timeout.",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _take(self, step: int | None) -> None:
        """Bring our copy to the step, and note what the engine does not have."""
        if not self._state:
            self._state = self._subscriber.empty_state()
            self._owed = set(self._state)
        with self._subscriber.prepare(self._state, step=step) as prepared:
            self._owed |= {change.name for change in prepared.changes()}
            prepared.commit()


def _nbytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
