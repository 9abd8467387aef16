"""A program that loads a model by vLLM's loader, and prints two lines of JSON: what that took (seconds, bytes
of memory at the peak), and the SHA-256 of each parameter.

Arguments: the folder, the load format, a free port, JSON of extra options of the loader.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any


class Peak:
    """Watches the memory that the process has of its own, in the block.

    Attributes:
        nbytes: by how much it rose above what it was in the beginning, at most, in bytes.
    """

    def __enter__(self) -> Peak:
        self.nbytes, self._first, self._is_done = 0, _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_done.wait(0.002):
            self.nbytes = max(self.nbytes, _anonymous() - self._first)


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


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
        with Peak() as peak:
            before = time.perf_counter()
            model = get_model(vllm_config=config)
            seconds = time.perf_counter() - before
        print(json.dumps({"seconds": seconds, "peak": peak.nbytes}))
        print(json.dumps(compute_tensor_digests(model)))


if __name__ == "__main__":
    main()
