"""A program that loads a model by vLLM's loader, and prints a line of JSON: the SHA-256 of each parameter.

Arguments: the folder, the load format, a free port, JSON of extra options of the loader.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def main() -> None:
    import torch

    torch.set_num_threads(1)
    accelerator: Any = torch.accelerator
    accelerator.empty_cache = lambda: None  # vLLM's loader asks for it without an accelerator
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    from vllm.plugins import load_general_plugins

    folder, load_format, port, extra = sys.argv[1:]
    load_general_plugins()
    config = EngineArgs(
        model=folder, load_format=load_format, dtype="auto", enforce_eager=True, max_model_len=64,
        skip_tokenizer_init=True, model_loader_extra_config=json.loads(extra),
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        before = time.perf_counter()
        model = get_model(vllm_config=config)
        seconds = time.perf_counter() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak_kib": peak}))
        print(json.dumps(compute_tensor_digests(model)))


if __name__ == "__main__":
    main()
