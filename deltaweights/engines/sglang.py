"""SGLang's plug-in: it serves pointer folders, and its weights follow a weight stream.

SGLang calls :func:`register` in each of its processes. Updates come by its custom weight loader,
:func:`load_weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..errors import CheckpointError, DeltaWeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .ranks import Ranks
    from .replica import Replica

_log = logging.getLogger(__name__)

_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"

#: Far above any location.
_MAX_REQUEST_BYTES = 1 << 16


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    location: Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"^[^\0]*\Z")]
    step: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] | None = None
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    prepare: bool = False


#: The streams that this process's models follow, and with how many threads.
_replicas: dict[nn.Module, tuple[object, Replica]] = {}


def register() -> None:
    """Hook into SGLang's loading of weights and into its updates from tensors."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_LOADER}._get_weights_iterator", read_pointer_folder, HookType.AROUND)
    HookRegistry.register(f"{_UPDATER}.update_weights_from_tensor", answer_errors, HookType.AROUND)


def read_pointer_folder(
    original: Callable[..., Any], self: Any, source: Any, **options: Any
) -> Iterator[tuple[str, Tensor]]:
    """Around SGLang's loader: a pointer folder's tensors are decoded from delta and base, and checked.

    Args:
        original: SGLang's method, for other folders.
        self: SGLang's loader.
        source: what to load; its ``model_or_path`` is the folder, and ``prefix`` goes before names.
        options: what else SGLang passes.

    Raises:
        CheckpointError: base or delta cannot be found or read.
        BaseMismatchError: the base is the wrong one.
        DeltaError: the delta is damaged.
    """
    from .pointer import is_pointer_folder, open_pointed

    folder: str = source.model_or_path
    if not is_pointer_folder(folder):
        found: Iterator[tuple[str, Tensor]] = original(self, source, **options)
        return found
    open_pointed(folder).close()  # what is wrong with it is said at once
    return ((source.prefix + name, tensor) for name, tensor in _decoded(folder))


def _decoded(folder: str) -> Iterator[tuple[str, Tensor]]:
    from ..patch import check_base
    from ..workers import Workers
    from .decoding import decoded, shards_to_load
    from .pointer import open_pointed

    with open_pointed(folder) as target, Workers() as workers:
        workers.at_stop(target.cancel)
        check_base(target, workers)  # before the first tensor, so that a wrong base is told in seconds
        yield from decoded(target, workers, shards=shards_to_load(target))


def answer_errors(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
    """Around SGLang's update: what is wrong with an update of ours is its answer, and the engine goes on with
    the weights that it has. Else an error would end the engine.

    Args:
        original: SGLang's method.
        self: SGLang's updater.
        args, options: what SGLang passes.
    """
    try:
        return original(self, *args, **options)
    except DeltaWeightsError as error:
        _log.error("the update is refused: %s", error)
        return False, str(error)


def load_weights(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Bring SGLang's model to a step of a weight stream, bit for bit, on all tensor-parallel ranks or none.

    SGLang calls this if ``--custom-weight-loader`` names it (``deltaweights.engines.sglang.load_weights``)
    and an update from tensors has that ``load_format``. The first update writes all weights.

    Args:
        model: this rank's.
        named_tensors: one tensor of any name: the bytes (uint8) of a JSON object with ``location``, the
            stream's folder, fsspec URL or repository; ``step``, the publisher's number (if it is not there,
            the newest state is taken); ``threads``, how many decode; and ``prepare``: if true, the step is
            fetched and checked in a thread from now on, and nothing is written.

    Raises:
        CheckpointError: the request is none, or the stream cannot be read.
        NotPublishedError: the step is not published yet.
        DeltaError: the stream is damaged.
    """
    from sglang.srt.distributed import get_tp_group

    from .ranks import Ranks

    ranks = Ranks(get_tp_group().cpu_group)
    request = ranks.from_first(
        lambda: _request(named_tensors)
    )  # a rank that refused alone would be waited for
    replica = _replica_of(model, request, ranks)
    if request.prepare:
        replica.prepare(request.step)
    else:
        replica.update(request.step)


def _request(named_tensors: Sequence[tuple[str, Tensor]]) -> _Request:
    """The request in the tensors, which may come from anywhere."""
    import torch

    try:
        ((_, tensor),) = named_tensors
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_REQUEST_BYTES:
            raise ValueError(f"the tensor is {tensor.dtype} of shape {tuple(tensor.shape)}")
        return msgspec.json.decode(tensor.cpu().numpy().tobytes(), type=_Request)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "The request for an update is none",
            f"{error}.",
            'Send one uint8 tensor with the bytes of {"location": …, "step": …}.',
        ) from error


def _replica_of(model: nn.Module, request: _Request, ranks: Ranks) -> Replica:
    from .replica import Replica

    wanted = request.location, request.threads
    known, found = _replicas.get(model, (None, None))
    if found is None or known != wanted:
        is_requantized = getattr(model, "quant_config", None) is not None
        found = Replica(
            model, request.location, ranks, threads=request.threads, is_requantized=is_requantized
        )
        _replicas[model] = wanted, found
    return found
