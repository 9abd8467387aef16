"""A plug-in of vLLM that lets its tests run on a small machine's processor; not part of the package.

Virtual machines announce AMX and die of its instructions, and vLLM's build for processors packs linear
weights and drops the originals, so that there would be no bytes to compare.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    import torch
    import vllm._custom_ops

    cpu: Any = torch.cpu
    cpu._is_amx_tile_supported = lambda: False
    vllm._custom_ops._supports_onednn = False
