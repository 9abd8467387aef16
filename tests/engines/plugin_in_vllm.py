"""A program that checks the plug-in inside vLLM, without a model.

Argument: a pointer folder of a mixture of experts, with names such as ``layers.0.experts.2.w.weight``.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress


def main() -> None:
    from deltaweights.engines import vllm as plugin

    plugin.register()
    plugin.register()
    compiled = {"llvmlite", "numba", "deltaweights.codec", "deltaweights.codec.compiled"}
    assert not compiled & sys.modules.keys(), "vLLM starts other processes after this"
    _check_loader(sys.argv[1])
    _check_backend()


def _check_loader(pointer: str) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from deltaweights.engines.vllm_loader import DeltaModelLoader
    from deltaweights.storage import total_traffic

    wrong = ({"threads": 0}, {"threads": "2"}, {"threads": True}, {"base": ""}, {"base": 1}, {"unknown": 1})
    for extra in wrong:
        with suppress(ValueError):
            get_model_loader(LoadConfig(load_format="deltaweights", model_loader_extra_config=extra))
            raise AssertionError(extra)
    read, names = [], []
    for experts in (None, {0, 1}, {2, 3}):
        loader = get_model_loader(
            LoadConfig(load_format="deltaweights", model_loader_extra_config={"threads": 2})
        )
        assert isinstance(loader, DeltaModelLoader)
        loader.local_expert_ids = experts
        before = total_traffic()
        source = DefaultModelLoader.Source(pointer, None, prefix="model.")
        names.append({name for name, _ in loader._get_weights_iterator(source)})
        read.append(total_traffic().since(before).read)
    assert names[0] == names[1] | names[2]
    assert {name for name in names[0] if "experts" not in name} == names[1] & names[2] != set()
    assert all(name.startswith("model.") for name in names[0])
    assert max(read[1:]) < 0.6 * read[0], read


def _check_backend() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    kind = WeightTransferEngineFactory._registry["deltaweights"]()
    assert not inspect.isabstract(kind)
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        theirs = getattr(WeightTransferEngine, name, None)
        if theirs is not None and not name.startswith("__"):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(theirs).parameters)
    for info in ({"location": ""}, {"location": "x", "threads": 0}, {"location": "x", "base": 1}):
        with suppress(ValueError):
            kind.init_info_cls(**info)
            raise AssertionError(info)
    for step in (-1, True, "1", 1 << 63):
        with suppress(ValueError):
            kind.update_info_cls(step=step)
            raise AssertionError(step)
    assert kind.update_info_cls(step=3).prepare is False


if __name__ == "__main__":
    main()
