"""Models under wrappers: what torch.compile, DDP, FSDP, activation checkpointing and moving averages put
around a model, and into its tensors' names, is seen through."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..errors import CheckpointError

#: What wrappers call the module inside: words that nobody else uses for a part of a model.
_WORDS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

#: Classes that call it ``module``, as others may call a part of theirs. By name: they need not be imported.
_PARALLEL = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "ModelEmaV2", "ModelEmaV3"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers."""
    while True:
        words = [*_WORDS, *(["module"] if _is_parallel(model) else [])]
        inner = next((model._modules[word] for word in words if word in model._modules), None)
        if inner is None:
            return model
        model = inner


def plain_state(
    state: nn.Module | Mapping[str, Tensor], *, keep_vars: bool = False
) -> dict[str, Tensor | object]:
    """The state's values, in order, under the names that they have without wrappers.

    Args:
        state: a model, or its tensors by name.
        keep_vars: as for ``Module.state_dict``.

    Raises:
        CheckpointError: a key is not a text.
    """
    named = state.state_dict(keep_vars=keep_vars) if isinstance(state, nn.Module) else state
    if odd := [name for name in named if not isinstance(name, str)]:
        raise CheckpointError(
            "The state cannot be read", f"{odd[0]!r} is no name of a tensor.", "Pass tensors by name."
        )
    plain = plain_names(named, parallel_paths(state) if isinstance(state, nn.Module) else None)
    return {plain[name]: value for name, value in named.items()}


def plain_names(names: Collection[str], parallel: Collection[str] | None = None) -> dict[str, str]:
    """For each name the one that it has without wrappers.

    Args:
        names: of all of a state's tensors.
        parallel: where wrappers with a ``module`` are; None: not known, so a ``module.`` that all names begin
            with is taken for that of one.
    """
    plain = {name: _without_words(name, parallel or ()) for name in names}
    while parallel is None and plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):  # then the words were somebody else's
        return {name: name for name in names}
    return plain


def parallel_paths(model: nn.Module) -> set[str]:
    """Where in ``model`` there are wrappers whose inner model is called ``module``."""
    modules = model.named_modules(remove_duplicate=False)
    return {path for path, module in modules if _is_parallel(module)}


def _is_parallel(module: nn.Module) -> bool:
    return "module" in module._modules and any(kind.__name__ in _PARALLEL for kind in type(module).__mro__)


def _without_words(name: str, parallel: Collection[str]) -> str:
    parts = name.split(".")
    return ".".join(
        part
        for number, part in enumerate(parts)
        if part not in _WORDS and not (part == "module" and ".".join(parts[:number]) in parallel)
    )
