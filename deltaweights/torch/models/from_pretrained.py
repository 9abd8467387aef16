"""A transformers model from base and delta, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...delta.chain import Deltas
from ...errors import CheckpointError
from ...signing import SignatureRequirement
from ...storage import Readable
from ...workers import ProgressCallback
from .load import load_state_dict, write_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Arguments that are the model's, though a config may have values of these names.
_FOR_THE_MODEL = ("quantization_config", "attn_implementation", "experts_implementation")


def from_pretrained(
    delta: Deltas,
    base: Readable | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    model_class: type[Any] | None = None,
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    **kwargs: object,
) -> PreTrainedModel:
    """The target as a model of transformers, as its ``from_pretrained`` makes it of the rebuilt folder: the
    same weights, ties, config and generation config, in evaluation mode. No weights are written to disk.

    Memory: the model; and, where transformers fuses tensors, those that it is fusing once more.

    Args:
        delta, base, require_signature, threads, progress: as for :func:`load_state_dict`.
        dtype: of floating-point tensors; None: the one that the config names, else as they are stored.
        device: where the model goes, if ``device_map`` does not say so.
        trust_remote_code: whether to run code that the target brings for its model.
        model_class: which class to make, such as AutoModelForCausalLM; None: the one that the target's config
            names.
        kwargs: as for ``from_pretrained`` of transformers: ``device_map``, ``attn_implementation``,
            ``quantization_config``, values of the config, and so on.

    Raises:
        CheckpointError: transformers 5 is not installed or lacks the class, the target has no config, or base
            or delta cannot be found or read.
        BaseMismatchError: the base is not the right one.
        SignatureError: the delta is not signed as required; no code and no config of it was read.
        DeltaError: the delta is incomplete or damaged.
        OutputError: there is no room for small files in the temporary folder.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "The model cannot be made", f"{error}.", "Install transformers: pip install 'transformers>=5'."
        ) from error
    former = kwargs.pop("torch_dtype", None)  # its name before transformers 5
    with tempfile.TemporaryDirectory(prefix="deltaweights-") as folder:
        files = write_files(delta, folder, base, require_signature=require_signature)
        if "config.json" not in files:
            raise CheckpointError(
                "The target is no model of transformers",
                "It has no config.json.",
                "Use load_state_dict, or load_into a model of your own.",
            )
        config, options = _read_config(folder, trust_remote_code, kwargs)
        mapped = "device_map" in options
        if not mapped and torch.device(device).type != "cpu" and find_spec("accelerate"):
            options["device_map"] = {"": device}  # else the weights would pass through the CPU's memory
        kind = _class_of(config, folder, trust_remote_code, model_class)
        place = "cpu" if mapped else device
        state = load_state_dict(
            delta,
            base,
            device=place,
            require_signature=require_signature,
            threads=threads,
            progress=progress,
        )
        model: PreTrainedModel = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype or former or "auto", **options
        )
        if model.can_generate():
            model.generation_config = _generation_config(folder, files)
        if "device_map" not in options and torch.device(device).type != "cpu":
            nn.Module.to(model, device)
    return model


def _read_config(
    folder: str, trust_remote_code: bool, kwargs: dict[str, object]
) -> tuple[Any, dict[str, Any]]:
    """The target's config, with the values that ``kwargs`` have for it; and the rest of them."""
    import transformers

    for_the_model = {name: kwargs[name] for name in _FOR_THE_MODEL if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in for_the_model}
    try:
        config, rest = transformers.AutoConfig.from_pretrained(
            folder, return_unused_kwargs=True, trust_remote_code=trust_remote_code, **others
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the target's config",
            f"{error}",
            "Update transformers; or pass trust_remote_code=True, if you trust the target's code.",
        ) from error
    return config, rest | for_the_model


def _generation_config(folder: str, files: Collection[str]) -> Any:
    """The target's; of a model that is older than such files, the one in its config."""
    from transformers import GenerationConfig

    where: dict[str, Any] = {}
    if "generation_config.json" not in files:
        where = {"config_file_name": "config.json", "_from_model_config": True}
    return GenerationConfig.from_pretrained(Path(folder), **where)


def _class_of(config: Any, folder: str, trust_remote_code: bool, wanted: type[Any] | None) -> Any:
    """The model's class: the wanted one, else that of the config: transformers' own, or that of the target's
    code, which has to be trusted."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import _get_model_class

    mapping: Any = getattr(wanted, "_model_mapping", None)  # an AutoModel's
    if wanted and mapping is None:
        return wanted
    name = wanted.__name__ if wanted else next(iter(config.architectures or ()), None)
    remote = {
        key: one
        for key, one in (getattr(config, "auto_map", None) or {}).items()
        if key.startswith("AutoModel") and isinstance(one, str)
    }
    fitting = [one for key, one in remote.items() if name in (key, one.rpartition(".")[2])]
    if remote and trust_remote_code:
        return get_class_from_dynamic_module(next(iter(fitting or remote.values())), folder)
    if mapping is None:
        own, why = getattr(transformers, str(name), None), "which transformers does not have"
    else:
        fits = type(config) in mapping
        own = _get_model_class(config, mapping) if fits else None  # type: ignore[no-untyped-call]
        why = f"which has none for a {type(config).__name__}"
    if own is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot make the model",
            f"{'model_class is' if wanted else 'Its config names'} the class {name!r}, {why}.",
            "Pass trust_remote_code=True, if you trust the code that the target brings."
            if remote
            else f"Pass {'another' if wanted else 'a'} model_class, or update transformers.",
        )
    return own
