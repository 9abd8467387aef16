"""A transformers model from base and delta, in one call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...delta.chain import Deltas
from ...errors import CheckpointError
from ...storage import Readable
from ...workers import ProgressCallback
from .load import load_state_dict, write_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(
    delta: Deltas,
    base: Readable | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> PreTrainedModel:
    """The target as a model of transformers, as its ``from_pretrained`` makes it of the rebuilt folder: the
    same weights, ties, config and generation config, in evaluation mode. No weights are written to disk.

    Memory: the model; and, where transformers fuses tensors, those that it is fusing once more.

    Args:
        delta, base, threads, progress: as for :func:`load_state_dict`.
        dtype: of floating-point tensors; None: the one that the config names, else as they are stored.
        device: where the model goes.
        trust_remote_code: whether to run code that the target brings for its model.
        model_class: which class to make; None: the one that the target's config names.

    Raises:
        CheckpointError: transformers 5 is not installed or lacks the class, the target has no config, or base
            or delta cannot be found or read.
        BaseMismatchError: the base is not the right one.
        DeltaError: the delta is incomplete or damaged.
        OutputError: there is no room for small files in the temporary folder.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "The model cannot be made", f"{error}.", "Install transformers: pip install 'transformers>=5'."
        ) from error
    with tempfile.TemporaryDirectory(prefix="deltaweights-") as folder:
        files = write_files(delta, folder, base)
        if "config.json" not in files:
            raise CheckpointError(
                "The target is no model of transformers",
                "It has no config.json.",
                "Use load_state_dict, or load_into a model of your own.",
            )
        try:
            config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot read the target's config",
                f"{error}",
                "Update transformers; or pass trust_remote_code=True, if you trust the target's code.",
            ) from error
        kind = model_class or _class_of(config, folder, trust_remote_code)
        state = load_state_dict(delta, base, device=device, threads=threads, progress=progress)
        model: PreTrainedModel = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype or "auto", device_map={"": device}
        )
        if model.can_generate() and "generation_config.json" in files:
            model.generation_config = transformers.GenerationConfig.from_pretrained(Path(folder))
    return model


def _class_of(config: Any, folder: str, trust_remote_code: bool) -> Any:
    """The model's class: transformers' own, or that of the target's code, which has to be trusted."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = next(iter(config.architectures or ()), None)
    own = getattr(transformers, str(name), None)
    remote = [one for key, one in getattr(config, "auto_map", {}).items() if key.startswith("AutoModel")]
    fitting = [one for one in remote if str(one).rpartition(".")[2] == name] or remote
    if fitting and trust_remote_code:
        return get_class_from_dynamic_module(fitting[0], folder)
    if own is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot make the model",
            f"Its config names the class {name!r}, which transformers does not have.",
            "Pass trust_remote_code=True, if you trust the code that the target brings."
            if remote
            else "Pass model_class, or update transformers.",
        )
    return own
