"""One tensor-parallel rank of SGLang, for test_sglang.py: its own models, loader, updater and hooks.

The index has no kernels of SGLang's for processors. Empty modules stand where they would be: weights are
loaded and updated as ever, but nothing computes with them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaweights.engines.sglang import LOADER, update_request

KERNELS = ("flashinfer", "sgl_kernel", "torchvision")


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *args, **options: None})


class _Empty(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything("", (), {}), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] in KERNELS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Engine:
    """What SGLang's scheduler process makes of its arguments, as far as weights are concerned."""

    def __init__(self, model: str, rank: int, world: int, port: str) -> None:
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed.parallel_state import (
            init_distributed_environment,
            initialize_model_parallel,
        )
        from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
        from sglang.srt.model_loader import get_model
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import ServerArgs

        load_plugins()
        self._rank, self._world = rank, world
        arguments = ServerArgs(
            model_path=model, device="cpu", tp_size=world, skip_tokenizer_init=True,
            attention_backend="torch_native", custom_weight_loader=[LOADER],
        )  # fmt: skip
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=0))
        init_distributed_environment(
            world_size=world, rank=rank, local_rank=rank, backend="gloo",
            distributed_init_method=f"tcp://127.0.0.1:{port}",
        )  # fmt: skip
        initialize_model_parallel()
        self._config = ModelConfig.from_server_args(arguments)
        self._arguments = {"load_config": LoadConfig(), "device_config": DeviceConfig("cpu")}
        self.model = get_model(model_config=self._config, **self._arguments)
        self.updater = WeightUpdater(
            tp_rank=rank, device="cpu", gpu_id=0, model_config=self._config, custom_weight_loaders=[LOADER],
            get_model=lambda: self.model, update_model_fields=lambda *args, **options: None,
            recapture_cuda_graph=lambda: None, get_model_runner=lambda: None,
        )  # fmt: skip

    def fresh(self, folder: Path) -> Any:
        """A second model, loaded from a folder with weights."""
        from sglang.srt.model_loader import get_model

        self._config.model_path = str(folder)
        return get_model(model_config=self._config, **self._arguments)

    def follow(self, location: str, step: int, **options: Any) -> tuple[bool, str]:
        """Ask for an update of ours, as a trainer does."""
        from sglang.srt.utils import MultiprocessingSerializer

        request: Any = json.loads(json.dumps(update_request(location, step, ranks=self._world, **options)))
        tensors = MultiprocessingSerializer.deserialize(request["serialized_named_tensors"][self._rank])
        return self._update(tensors, request["load_format"])

    def ask(self, request: dict[str, object]) -> tuple[bool, str]:
        """Send a request that may be none."""
        import torch

        tensor = torch.frombuffer(bytearray(json.dumps(request).encode()), dtype=torch.uint8)
        return self._update([("", tensor)], LOADER)

    def _update(self, tensors: Any, load_format: str) -> tuple[bool, str]:
        answer: tuple[bool, str] = self.updater.update_weights_from_tensor(tensors, load_format)
        return answer


def bits(model: Any) -> dict[str, bytes]:
    """Every parameter's bytes."""
    import torch

    return {
        name: parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


def run(work: Path, rank: int, world: int, port: str) -> None:
    """Do what test_sglang.py prepared in ``work``, step by step, with all ranks."""
    import torch.distributed as dist

    engine = Engine(str(work / "served"), rank, world, port)

    def is_at(folder: str) -> bool:
        return bits(engine.model) == bits(engine.fresh(work / folder))

    def on_disk(change: Callable[[], object]) -> None:
        """By one rank, while the others wait."""
        dist.barrier()
        if rank == 0:
            change()
        dist.barrier()

    assert is_at("tuned"), "a cold start from the pointer folder"
    assert engine.updater.update_weights_from_disk(str(work / "base"), "auto")[0]
    assert is_at("base")
    assert engine.updater.update_weights_from_disk(str(work / "served"), "auto")[0]
    assert is_at("tuned"), "and /update_weights_from_disk"
    done, said = engine.updater.update_weights_from_disk(str(work / "moved"), "auto")
    assert not done
    assert "is not the one that" in said

    stream = str(work / "stream")
    for step in (0, 1, 3):
        assert engine.follow(stream, step) == (True, "Success")
        assert is_at(f"step-{step}")

    requests: list[tuple[dict[str, Any], str]] = [
        ({"location": stream, "step": 99}, "99"),
        ({"location": stream, "step": -1}, "step"),
        ({"location": stream, "code": "import os"}, "code"),
        ({"step": 1}, "location"),
        ({"location": str(work / "none"), "step": 1}, "no weight stream"),
    ]
    for request, why in requests:
        done, said = engine.ask(request)
        assert not done
        assert why in said, said
        assert is_at("step-3")

    update = next(iter(work.glob("stream/*00004*update*")))
    whole = update.read_bytes()
    on_disk(lambda: update.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]))
    done, said = engine.follow(stream, 4)
    assert not done, "a flipped bit"
    assert is_at("step-3")
    on_disk(lambda: update.write_bytes(whole))
    assert engine.follow(stream, 4)[0]
    assert is_at("step-4"), "the next try is fine"

    assert engine.follow(stream, 5, prepare=True)[0]
    assert is_at("step-4"), "nothing is written yet"
    from deltaweights.engines import sglang

    ((_, follower),) = sglang._followers.values()
    assert follower._future is not None
    assert follower._future.exception() is None
    on_disk(lambda: shutil.move(stream, work / "gone"))
    assert engine.follow(stream, 5)[0]
    assert is_at("step-5"), "the stream is not needed any more"
    dist.barrier()


def main() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    warnings.simplefilter("ignore")
    import transformers.image_utils  # noqa: F401 - which looks for the real torchvision

    sys.meta_path.insert(0, _Finder())
    work, rank, world, port = sys.argv[1:]
    run(Path(work), int(rank), int(world), port)


if __name__ == "__main__":
    main()
