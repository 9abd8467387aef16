"""Which of a model's tensors a checkpoint's tensors become: under the same names, without wrappers' words,
and, where transformers holds a model otherwise than it saves it, by that library's own conversion."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...errors import CheckpointError
from ..wrappers import plain_names
from .pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fusion:
    """Tensors of a checkpoint that together become one or several of a model's.

    Attributes:
        sources: their names in the checkpoint, in the order in which they are taken.
    """

    sources: list[str]
    _patterns: list[str]
    _first: str
    _converter: Any
    _model: PreTrainedModel

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by plain name.

        Args:
            tensors: the sources by name; on the meta device, so are the results.

        Raises:
            CheckpointError: transformers cannot convert them.
        """
        converter = copy.deepcopy(self._converter)
        for name, pattern in zip(self.sources, self._patterns, strict=True):
            converter.add_tensor(self._first, name, pattern, tensors[name])
        try:
            made = converter.convert(self._first, model=self._model, config=self._model.config)
        except Exception as error:  # whatever an operation of transformers raises
            raise CheckpointError(
                "The target does not fit the model",
                f"transformers cannot make {self._first!r} of its {len(self.sources)} tensors: {error}",
                "Make the model from the target's own config: write_files gets it.",
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Fit:
    """Where a checkpoint's tensors go.

    Attributes:
        renamed: the model's plain name for each of the checkpoint's names that is one.
        fusions: those that become something else.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    fusions: list[Fusion] = field(default_factory=list)


def fit_names(model: nn.Module, ours: Mapping[str, Tensor], theirs: Collection[str]) -> Fit:
    """Find the place of each of the names ``theirs`` among ``ours``, the model's own without wrappers."""
    plain = plain_names(theirs)
    names = {name if name in ours else plain[name]: name for name in theirs}
    inner = pretrained(model)
    if inner is None:
        return Fit({name: one for one, name in names.items()})
    fit = _fit_pretrained(inner, ours, list(names))
    for fusion in fit.fusions:
        fusion.sources[:] = [names[one] for one in fusion.sources]
    return Fit({names[one]: ours_ for one, ours_ in fit.renamed.items()}, fit.fusions)


def _fit_pretrained(model: PreTrainedModel, ours: Mapping[str, Tensor], theirs: list[str]) -> Fit:
    """As ``from_pretrained`` does it, with that library's own functions for names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 has no other names in memory
        return Fit({name: name for name in theirs})
    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, state = model.base_model_prefix, dict(ours)
    fit, fusions = Fit(), dict[str, Fusion]()
    for name in sorted(theirs, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if found not in ours and name in ours:
            found, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None or found not in ours:
            fit.renamed[name] = found if found in ours else name
        else:
            fusion = fusions.setdefault(found, Fusion([], [], found, by_pattern[pattern], model))
            fusion.sources.append(name)
            fusion._patterns.append(pattern)
    fit.fusions.extend(fusions.values())
    return fit
