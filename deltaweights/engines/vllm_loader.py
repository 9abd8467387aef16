"""vLLM's load format ``deltaweights``: an engine starts from delta and base."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import LoadConfig, ModelConfig

    from ..delta.target_recipe import TargetRecipe

_log = logging.getLogger(__name__)

#: Keys of ``model_loader_extra_config`` that are ours, with the types of their values.
_OUR_KEYS: dict[str, type] = {"base": str, "public_key": str, "threads": int}


class DeltaModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads the weights of a pointer folder: those that this rank needs, decoded from delta and base, and
    checked.

    Args:
        load_config: vLLM's. Keys of its ``model_loader_extra_config``: ``base``, where the base lies now, if
            it is not where the folder says; ``public_key``, the path of the key by which the delta must be
            signed (those in the environment, DELTAWEIGHTS_PUBLIC_KEYS, come first); ``threads``, how many.

    Raises:
        ValueError: a key has a value of another type, or vLLM's own loader does not know it.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra: dict[str, Any] = dict(load_config.model_loader_extra_config or {})
        ours = {key: extra.pop(key) for key in _OUR_KEYS if key in extra}
        for key, value in ours.items():
            is_small = isinstance(value, int) and value < 1
            if type(value) is not _OUR_KEYS[key] or not value or is_small:
                raise ValueError(f"{key} in model_loader_extra_config is {value!r}")
        super().__init__(dataclasses.replace(load_config, model_loader_extra_config=extra))
        self._base: str | None = ours.get("base")
        self._public_key: str | None = ours.get("public_key")
        self._threads: int | None = ours.get("threads")

    def download_model(self, model_config: ModelConfig) -> None:
        """Check that delta and base are there, and the right ones; nothing is downloaded."""
        from ..patch import check_base
        from ..workers import Workers

        with self._open(model_config.model) as target, Workers(self._threads) as workers:
            workers.at_stop(target.cancel)
            check_base(target, workers)

    def _open(self, folder: str) -> TargetRecipe:
        from .pointer import open_pointed
        from .required_keys import required_keys

        if not os.path.isdir(folder):
            raise CheckpointError(
                f"{folder} is not a folder of this machine",
                "The load format deltaweights serves pointer folders.",
                "Write one by serve_folder.",
            )
        return open_pointed(folder, base=self._base, require_signature=required_keys() or self._public_key)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a source that this rank needs, as vLLM's own loader gives them."""
        if self.counter_before_loading_weights == 0.0:  # type: ignore[has-type]
            self.counter_before_loading_weights = time.perf_counter()
        return ((source.prefix + name, tensor) for name, tensor in self._tensors(source))

    def _tensors(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, Tensor]]:
        from ..patch import glance_at_base
        from ..workers import Workers
        from .decoding import decoded, shards_to_load

        patterns = source.allow_patterns_overrides or ["*.safetensors"]
        is_unused = getattr(source, "is_unused_weight", None) or (lambda name: False)

        def is_wanted(name: str) -> bool:
            return not should_skip_weight(name, self.local_expert_ids) and not is_unused(name)

        with self._open(source.model_or_path) as target, Workers(self._threads) as workers:
            workers.at_stop(target.cancel)
            glance_at_base(target, workers, is_wanted)  # so that a wrong base is told in seconds
            shards = shards_to_load(target, subfolder=source.subfolder or "", patterns=patterns)
            _log.info("%s: decoding %s from delta and base", source.model_or_path, ", ".join(shards))
            yield from decoded(target, workers, shards=shards, is_wanted=is_wanted)
