"""Models of transformers, told from all others without importing that library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

from ..wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model that ``model`` is or wraps."""
    library = sys.modules.get("transformers.modeling_utils")  # else it cannot be one
    inner = unwrapped(model)
    return inner if library and isinstance(inner, library.PreTrainedModel) else None
