"""vLLM's weight-transfer backend ``deltaweights``: an engine follows a weight stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ..errors import DeltaWeightsError

if TYPE_CHECKING:
    from .follower import Follower

_log = logging.getLogger(__name__)


@dataclass
class DeltaInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """How an engine follows a stream.

    Attributes:
        location: the stream's folder, fsspec URL, or repository on the Hub (``hf://org/name``).
        base: the checkpoint that the engine has loaded and that training began with: a folder, a Hub id or a
            pointer folder. None: the first update begins at the stream's last anchor.
        threads: how many each rank prepares with. One leaves the other cores to the engine.
        mirror: the folder for the mirror; None: shared memory.
        allow_rollback: take steps that were published earlier than the last one.
        public_keys: paths of the public keys by one of which the stream's heads must be signed; None: no
            signature is required. Those in the engine's environment, DELTAWEIGHTS_PUBLIC_KEYS, come first.
        stream_name: the name that the publisher gave to the stream; None: any.
    """

    location: str
    base: str | None = None
    threads: int = 1
    mirror: str | None = None
    allow_rollback: bool = False
    public_keys: list[str] | None = None
    stream_name: str | None = None

    def __post_init__(self) -> None:
        texts = (self.location, self.base or "", self.mirror or "", self.stream_name or "")
        if not self.location or not all(isinstance(text, str) for text in texts):
            raise ValueError("location, base, mirror and stream_name are texts, and location is not empty")
        keys = [] if self.public_keys is None else self.public_keys
        if type(keys) is not list or not all(isinstance(key, str) and key for key in keys):
            raise ValueError(f"public_keys is {keys!r}, not a list of paths")
        if self.public_keys == []:
            raise ValueError("public_keys is empty, so that nobody could have signed")
        if type(self.threads) is not int or not 1 <= self.threads <= 256:
            raise ValueError(f"threads is {self.threads!r}, not a number from 1 to 256")
        if type(self.allow_rollback) is not bool:
            raise ValueError(f"allow_rollback is {self.allow_rollback!r}, not true or false")


@dataclass
class DeltaUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which state the engine is to take.

    Attributes:
        step: the publisher's number for it.
        prepare: only begin to prepare it, while requests are answered.
    """

    step: int
    prepare: bool = False

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step < 1 << 63:
            raise ValueError(f"step is {self.step!r}, not a number of a step")
        if type(self.prepare) is not bool:
            raise ValueError(f"prepare is {self.prepare!r}, not true or false")


class DeltaTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Takes the states of a weight stream, which the trainer's publisher writes: nothing is sent.

    ``update_weights`` with ``prepare`` returns at once, and what takes long (fetching, checking, decoding)
    happens in a thread. ``update_weights`` without it waits for that, and writes what has changed: on all
    ranks or, if one of them cannot, on none.
    """

    init_info_cls = DeltaInitInfo
    update_info_cls = DeltaUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follower: Follower | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> DeltaInitInfo | None:
        """:class:`DeltaInitInfo`, or None if it is wrong and another rank says so."""
        try:
            info: DeltaInitInfo = super().parse_init_info(init_dict)
        except ValueError as error:
            self._fail(error)
            return None
        return info

    def init_transfer_engine(self, init_info: DeltaInitInfo | None) -> None:
        """Find the stream, make or find the mirror, and find where each tensor lies in this rank's model; on
        all ranks or on none."""
        self.shutdown()
        if init_info is None:
            return
        failure: Exception | None = None
        try:
            self._follower = self._follow(init_info)
        except Exception as error:  # told to the other ranks before it is raised
            failure = error
        refused = [one for one in self._exchange("" if failure is None else f"-{failure}") if one]
        if refused:
            self.shutdown()
            self._fail(failure or DeltaWeightsError("Another rank cannot follow the stream", refused[0][1:]))

    def _follow(self, init_info: DeltaInitInfo) -> Follower:
        from ..torch import DeltaSubscriber
        from .follower import Follower
        from .host_mirror import HostMirror
        from .required_keys import required_keys

        def subscribe(number: int) -> DeltaSubscriber:
            return DeltaSubscriber(
                init_info.location,
                threads=init_info.threads,
                allow_rollback=init_info.allow_rollback,
                last_number=number,
                require_signature=required_keys() or init_info.public_keys,
                stream_name=init_info.stream_name,
            )

        layout = subscribe(0).newest().tensors
        mirror = HostMirror(
            layout,
            key=f"{self.vllm_config.instance_id} {init_info.location}",
            base=init_info.base,
            folder=init_info.mirror,
            threads=init_info.threads,
        )
        return Follower(
            self.model,
            subscribe,
            mirror,
            layout,
            reload=self._reload,
            exchange=self._exchange,
            is_quantized=self.model_config.quantization is not None,
        )

    def start_weight_update(self) -> None:
        """Forget an update that was not finished."""
        if self._follower is not None:
            self._follower.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Prepare a step, or write it.

        Raises:
            DeltaWeightsError: some rank cannot, and none has written anything; on the last rank only.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            self._fail(error)
        if torch.accelerator.is_available():  # vLLM's own method assumes that there is one
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: DeltaUpdateInfo) -> None:
        """Prepare a step, or write it; raises on all ranks what :meth:`update_weights` raises on one."""
        if self._follower is None:
            raise DeltaWeightsError(
                "The engine follows no weight stream yet", "", "Call /init_weight_transfer_engine first."
            )
        if update_info.prepare:
            self._follower.prepare(update_info.step)
            return
        state = self._follower.commit(update_info.step)
        _log.info("step %d is written: state %s", state.step, state.state)

    def finish_weight_update(self) -> None:
        """Bring the mirror along: by now, all ranks have written the step."""
        if self._follower is not None:
            self._follower.finish()

    def shutdown(self) -> None:
        """Let go of stream and mirror."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def _fail(self, error: Exception) -> None:
        """Raise an error that all ranks have met, on the last of them.

        vLLM takes its workers' answers in order, up to the first that failed. It would take those behind it
        for answers to its next call.
        """
        from vllm.distributed.parallel_state import get_world_group

        if get_world_group().is_last_rank:
            raise error
        _log.error("%s", error)

    def _reload(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load the model whole, through vLLM's own loader and what it does to weights afterwards."""
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        self.model.load_weights(tensors)
        finalize_layerwise_reload(self.model, self.model_config)

    def _exchange(self, value: str) -> list[str]:
        """What each rank of the engine says."""
        from vllm.distributed.parallel_state import get_world_group

        group = get_world_group()
        if group.world_size == 1:
            return [value]
        told: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(told, value, group=group.cpu_group)
        return told
