"""vLLM's plug-in: names the load format and the weight-transfer backend.

vLLM calls :func:`register` in each of its processes before it starts others, so this imports none of the
package's compiled parts.
"""

from __future__ import annotations

from functools import cache

#: The load format, and the weight-transfer backend.
NAME = "deltaweights"


@cache  # a second time is an error there
def register() -> None:
    """Register the load format and the weight-transfer backend ``deltaweights``. Again does nothing."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import register_model_loader

    from .vllm_loader import DeltaModelLoader

    register_model_loader(NAME)(DeltaModelLoader)
    backend = "deltaweights.engines.vllm_transfer", "DeltaTransferEngine"
    WeightTransferEngineFactory.register_engine(NAME, *backend)
