"""SGLang's plug-in: it serves pointer folders, and its weights follow a weight stream.

SGLang calls :func:`register` in each of its processes. Updates come by its custom weight loader,
:func:`load_weights`.
"""

from __future__ import annotations

import base64
import logging
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec

from ..errors import CheckpointError, DeltaWeightsError
from .required_keys import required_keys

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .follower import Follower, Reload

_log = logging.getLogger(__name__)

#: The name by which SGLang is told to update weights as :func:`load_weights` does.
LOADER = "deltaweights.engines.sglang.load_weights"

_HOOKED_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
_HOOKED_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"

#: Far above any location.
_MAX_REQUEST_BYTES = 1 << 16


_Location: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"^[^\0]*\Z")]


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    location: _Location
    step: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    base: _Location | None = None
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    prepare: bool = False


#: What this process's models follow, and how.
_followers: dict[nn.Module, tuple[object, Follower]] = {}


def register() -> None:
    """Hook into SGLang's loading of weights and into its updates from tensors."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_HOOKED_LOADER}._get_weights_iterator", read_pointer_folder, HookType.AROUND)
    HookRegistry.register(f"{_HOOKED_UPDATER}.update_weights_from_tensor", answer_errors, HookType.AROUND)


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
    from ..delta.pointer import is_pointer_folder
    from .pointer import open_pointed

    folder: str = source.model_or_path
    if not (os.path.isdir(folder) and is_pointer_folder(folder)):
        found: Iterator[tuple[str, Tensor]] = original(self, source, **options)
        return found
    open_pointed(folder, require_signature=required_keys()).close()  # what is wrong with it is said at once
    return ((source.prefix + name, tensor) for name, tensor in _decoded(folder))


def _decoded(folder: str) -> Iterator[tuple[str, Tensor]]:
    from ..patch import check_base
    from ..workers import Workers
    from .decoding import decoded, shards_to_load
    from .pointer import open_pointed

    with open_pointed(folder, require_signature=required_keys()) as target, Workers() as workers:
        workers.at_stop(target.cancel)
        check_base(target, workers)  # before the first tensor, so that a wrong base is told in seconds
        yield from decoded(target, workers, shards=shards_to_load(target))


def answer_errors(
    original: Callable[..., Any], self: Any, named_tensors: Any, load_format: str | None = None
) -> Any:
    """Around SGLang's update: what is wrong with an update of ours is its answer, and the engine goes on with
    the weights that it has. Else an error would end the engine.

    Args:
        original: SGLang's method.
        self: SGLang's updater.
        named_tensors: what :func:`load_weights` takes, if ``load_format`` names that.
        load_format: the loader's name.
    """
    if load_format != LOADER:
        return original(self, named_tensors, load_format)
    try:
        return original(self, named_tensors, load_format)
    except Exception as error:
        why = str(error) if isinstance(error, DeltaWeightsError) else f"{type(error).__name__}: {error}"
        _log.exception("an update is refused")
        return False, why


def update_request(
    location: str,
    step: int,
    *,
    base: str | None = None,
    threads: int | None = None,
    prepare: bool = False,
    ranks: int = 1,
) -> dict[str, object]:
    """Make what a trainer posts to ``/update_weights_from_tensor`` of SGLang, as JSON.

    Args:
        location, step, base, threads, prepare: as for :func:`load_weights`.
        ranks: the number of tensor-parallel ranks that SGLang was started with.

    Returns:
        The request's fields. The cache of earlier answers is flushed, and the weights' version is the step,
        unless the step is only prepared.
    """
    import torch

    request = _Request(location=location, step=step, base=base, threads=threads, prepare=prepare)
    tensor = torch.frombuffer(bytearray(msgspec.json.encode(request)), dtype=torch.uint8)
    # As SGLang's own clients do it, but by value, so that it may come from another machine.
    data = base64.b64encode(pickle.dumps([("deltaweights", tensor)])).decode()
    return {
        "serialized_named_tensors": [data] * ranks,
        "load_format": LOADER,
        "flush_cache": not prepare,
        "weight_version": None if prepare else str(step),
    }


def load_weights(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Bring SGLang's model to a step of a weight stream, bit for bit, on all tensor-parallel ranks or none.

    SGLang calls this if ``--custom-weight-loader`` names it (``deltaweights.engines.sglang.load_weights``)
    and an update from tensors has that ``load_format``.

    Args:
        model: this rank's.
        named_tensors: one tensor of any name: the bytes (uint8) of a JSON object with ``location``, the
            stream's folder, fsspec URL or repository, and ``step``, the publisher's number. It may have
            ``base``, what the engine was started with, if training began with that; ``threads``, how many
            decode; and ``prepare``: if true, the step is fetched and checked in a thread from now on, and
            nothing is written.

    Raises:
        CheckpointError: the request is none, or the stream cannot be read.
        NotPublishedError: the step is not published yet.
        DeltaError: the stream is damaged.
        DeltaWeightsError: another rank cannot take the step.
    """
    request = _agreed(named_tensors)
    follower = _follower_of(model, request)
    if request.prepare:
        follower.prepare(request.step)
        return
    follower.start()
    follower.commit(request.step)
    follower.finish()


def _agreed(named_tensors: Sequence[tuple[str, Tensor]]) -> _Request:
    """The request, which every rank gets for itself, and may come from anywhere."""
    try:
        request, told = _request(named_tensors), "+"
    except CheckpointError as error:
        request, told = None, f"-{error.why}"
    answers = _exchange(told + msgspec.json.encode(request).decode() if request else told)
    if request is None or len(set(answers)) > 1:
        why = next((one[1:] for one in answers if one.startswith("-")), "Ranks got different ones.")
        raise CheckpointError(
            "The request for an update is none",
            why,
            'Send one uint8 tensor with the bytes of {"location": …, "step": …}, the same to all ranks.',
        )
    return request


def _request(named_tensors: Sequence[tuple[str, Tensor]]) -> _Request:
    """The request in the tensors, which may come from anywhere."""
    import torch

    try:
        ((_, tensor),) = named_tensors
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_REQUEST_BYTES:
            raise ValueError(f"the tensor is {tensor.dtype} of shape {tuple(tensor.shape)}")
        return msgspec.json.decode(tensor.cpu().numpy().tobytes(), type=_Request)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError("The request for an update is none", f"{error}.") from error


def _follower_of(model: nn.Module, request: _Request) -> Follower:
    """The model's follower of the stream, made on all ranks or on none."""
    wanted = request.location, request.base, request.threads
    known, found = _followers.pop(model, (None, None))
    if found is not None and known != wanted:
        found.close()
        found = None
    if found is None:
        key = _exchange(secrets.token_hex(16))[0]  # the first rank's
        error = None
        try:
            found = _follow(model, request, key)
        except Exception as failure:  # told to the other ranks before it is raised
            error = failure
        answers = _exchange(f"-{error}" if error else "+")
        if error is not None:
            raise error
        refused = [one[1:] for one in answers if one.startswith("-")]
        if refused and found is not None:
            found.close()
            raise DeltaWeightsError("The stream is not followed", f"Another rank says: {refused[0]}")
    assert found is not None
    _followers[model] = wanted, found
    return found


def _follow(model: nn.Module, request: _Request, key: str) -> Follower:
    from ..torch import DeltaSubscriber
    from .follower import Follower
    from .host_mirror import HostMirror

    def subscribe(number: int) -> DeltaSubscriber:
        return DeltaSubscriber(
            request.location, threads=request.threads, last_number=number, require_signature=required_keys()
        )

    layout = subscribe(0).newest().tensors
    mirror = HostMirror(layout, key=key, base=request.base, threads=request.threads)
    load: Reload = model.load_weights  # type: ignore[assignment]
    is_quantized = getattr(model, "quant_config", None) is not None
    return Follower(
        model, subscribe, mirror, layout, reload=load, exchange=_exchange, is_quantized=is_quantized
    )


def _exchange(value: str) -> list[str]:
    """What each tensor-parallel rank says."""
    import torch
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    told: list[Any] = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(told, value, group=group.cpu_group)
    return told
