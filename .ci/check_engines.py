"""Checks what our engines rely on in the newest vLLM, SGLang and verl: a release that breaks us is seen.

    .venv/bin/python .ci/check_engines.py

It reads the few source files that it needs out of the wheels on the public index, and imports none of them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contracts import Calls, Equals, Extends, Files, Has, Reliance, Takes, Tree, Wraps
from releases import newest

ROOT = Path(__file__).resolve().parent.parent

_VLLM = "deltaweights/engines/vllm.py"
_VLLM_LOADERS = "vllm/model_executor/model_loader/"
_VLLM_TRANSFER = "vllm/distributed/weight_transfer/"
_SGLANG = "deltaweights/engines/sglang.py"
_SGLANG_LOADER = "sglang/srt/model_loader/loader.py"
_VERL = "deltaweights/engines/verl.py"
_VERL_BASE = "verl/checkpoint_engine/base.py"

#: For each package, what which of our modules relies on.
RELIANCES: dict[str, tuple[Reliance, ...]] = {
    "vllm": (
        Equals(_VLLM, "vllm/plugins/__init__.py", "DEFAULT_PLUGINS_GROUP", "vllm.general_plugins"),
        Calls(_VLLM, "vllm/plugins/__init__.py", "load_general_plugins", "func()"),
        Takes(_VLLM, f"{_VLLM_LOADERS}__init__.py", "register_model_loader", "load_format"),
        Takes(_VLLM, f"{_VLLM_LOADERS}ep_weight_filter.py", "should_skip_weight",
              "weight_name, local_expert_ids"),
        Has(_VLLM, f"{_VLLM_LOADERS}default_loader.py", "DefaultModelLoader", "load_config local_expert_ids"),
        Has(_VLLM, f"{_VLLM_LOADERS}default_loader.py", "DefaultModelLoader.Source", "model_or_path prefix"),
        Takes(_VLLM, f"{_VLLM_TRANSFER}factory.py", "WeightTransferEngineFactory.register_engine",
              "name, module_path_or_cls, class_name"),
        Calls(_VLLM, f"{_VLLM_TRANSFER}factory.py", "WeightTransferEngineFactory.create_engine",
              "engine_cls(config=_, vllm_config=_, device=_, model=_)"),
        Has(_VLLM, f"{_VLLM_TRANSFER}base.py", "WeightTransferEngine",
            "init_info_cls update_info_cls supports_draft_weight_update model"),
        Has(_VLLM, f"{_VLLM_TRANSFER}base.py", "WeightTransferInitInfo"),
        Has(_VLLM, f"{_VLLM_TRANSFER}base.py", "WeightTransferUpdateInfo"),
    ),
    "sglang": (
        Equals(_SGLANG, "sglang/srt/plugins/__init__.py", "GENERAL_PLUGINS_GROUP", "sglang.srt.plugins"),
        Calls(_SGLANG, "sglang/srt/plugins/__init__.py", "load_plugins", "func()"),
        Takes(_SGLANG, "sglang/srt/plugins/hook_registry.py", "HookRegistry.register",
              "target, hook, hook_type"),
        Has(_SGLANG, "sglang/srt/plugins/hook_registry.py", "HookType", "AROUND"),
        Has(_SGLANG, _SGLANG_LOADER, "DefaultModelLoader.Source", "model_or_path prefix"),
        Wraps(f"{_SGLANG}:read_pointer_folder", _SGLANG_LOADER, "DefaultModelLoader._get_weights_iterator"),
        Calls(_SGLANG, "sglang/srt/model_executor/model_runner_components/weight_updater.py",
              "WeightUpdater.update_weights_from_tensor", "custom_loader(_, _)"),
    ),
    "verl": (
        Takes(_VERL, _VERL_BASE, "CheckpointEngineRegistry.register", "backend"),
        Extends(f"{_VERL}:DeltaCheckpointEngine", _VERL_BASE, "CheckpointEngine"),
        Calls(_VERL, _VERL_BASE, "CheckpointEngineWorker.__init__", "new(_, bucket_size=_, **_)"),
        Calls(_VERL, "verl/workers/engine_workers.py", "ActorRolloutRefWorker.init_model",
              "new(_, is_master=_, bucket_size=_, **_)"),
        Calls(_VERL, "verl/workers/engine_workers.py", "ActorRolloutRefWorker.update_weights",
              "send_weights(_, global_steps=_)"),
        Calls(_VERL, _VERL_BASE, "CheckpointEngineWorker.update_weights", "receive_weights(global_steps=_)"),
        Has(_VERL, "verl/workers/config/rollout.py", "CheckpointEngineConfig",
            "custom_backend_module engine_kwargs"),
    ),
}  # fmt: skip


def broken(release: str, reliances: tuple[Reliance, ...], theirs: Files, ours: Files) -> list[str]:
    """What no longer holds, a line each: the release, what changed, and our module that relies on it."""
    found = []
    for one in reliances:
        where = f"{release}: {one.at}"
        if ours.read(one.by.partition(":")[0]) is None:
            found.append(f"{where}: {one.by} relies on it and is not there.")
        elif theirs.read(one.at) is None:
            found.append(f"{where} is not there any more. {one.by} relies on {one.name} in it.")
        else:
            found += [f"{where}: {text}. {one.by} relies on it." for text in one.broken(theirs, ours)]
    return found


def _check(package: str) -> tuple[str, list[str]]:
    release = newest(package)
    name = f"{release.name} {release.version}"
    return name, broken(name, RELIANCES[package], release, Tree(ROOT))


def main() -> None:
    with ThreadPoolExecutor() as threads:
        try:
            results = list(threads.map(_check, RELIANCES))
        except OSError as error:
            sys.exit(f"The newest releases cannot be read: {error}")
    faults = [line for _, lines in results for line in lines]
    print(*faults, sep="\n", end="\n" if faults else "")
    if faults:
        sys.exit("Our engines do not fit the newest releases.")
    kept = sum(map(len, RELIANCES.values()))
    print(
        f"Our engines find the {kept} things that they rely on in {', '.join(name for name, _ in results)}."
    )


if __name__ == "__main__":
    main()
