"""Checks what our engines rely on in the newest vLLM, SGLang and verl: a release that breaks us is seen.

    .venv/bin/python .ci/check_engines.py

It reads the few source files that it needs out of the wheels on the public index, and imports none.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contracts import Calls, Equals, Extends, Files, Has, Reliance, Takes, Tree, Wraps
from releases import Release, newest

ROOT = Path(__file__).resolve().parent.parent

_PLUGIN = "deltaweights/engines/vllm.py"
_LOADER = "deltaweights/engines/vllm_loader.py"
_TRANSFER = "deltaweights/engines/vllm_transfer.py"
_SGLANG = "deltaweights/engines/sglang.py"
_VERL = "deltaweights/engines/verl.py"

_VLLM_LOADERS = "vllm/model_executor/model_loader/"
_VLLM_TRANSFER = "vllm/distributed/weight_transfer/"
_SGLANG_LOADER = "sglang/srt/model_loader/loader.py"
_SGLANG_UPDATER = "sglang/srt/model_executor/model_runner_components/weight_updater.py"
_VERL_ENGINE = "verl/checkpoint_engine/base.py"
_VERL_WORKERS = "verl/workers/engine_workers.py"

#: For each package, what which of our modules relies on.
RELIANCES: dict[str, tuple[Reliance, ...]] = {
    "vllm": (
        Equals(_PLUGIN, "vllm/plugins/__init__.py", "DEFAULT_PLUGINS_GROUP", "vllm.general_plugins"),
        Calls(_PLUGIN, "vllm/plugins/__init__.py", "load_general_plugins", "func()"),
        Takes(_PLUGIN, f"{_VLLM_LOADERS}__init__.py", "register_model_loader", "load_format"),
        Takes(_PLUGIN, f"{_VLLM_TRANSFER}__init__.py", "WeightTransferEngineFactory.register_engine",
              "name, module_path_or_cls, class_name"),
        Extends(f"{_LOADER}:DeltaModelLoader", f"{_VLLM_LOADERS}default_loader.py", "DefaultModelLoader"),
        Has(_LOADER, f"{_VLLM_LOADERS}default_loader.py", "DefaultModelLoader",
            "counter_before_loading_weights load_config local_expert_ids"),
        Has(_LOADER, f"{_VLLM_LOADERS}default_loader.py", "DefaultModelLoader.Source",
            "allow_patterns_overrides model_or_path prefix subfolder"),
        Has(_LOADER, "vllm/config/load.py", "LoadConfig", "model_loader_extra_config"),
        Takes(_LOADER, f"{_VLLM_LOADERS}ep_weight_filter.py", "should_skip_weight",
              "weight_name, local_expert_ids"),
        Extends(f"{_TRANSFER}:DeltaTransferEngine", f"{_VLLM_TRANSFER}base.py", "WeightTransferEngine"),
        Has(_TRANSFER, f"{_VLLM_TRANSFER}base.py", "WeightTransferEngine",
            "device init_info_cls model model_config supports_draft_weight_update update_info_cls "
            "vllm_config"),
        Has(_TRANSFER, f"{_VLLM_TRANSFER}base.py", "WeightTransferInitInfo"),
        Has(_TRANSFER, f"{_VLLM_TRANSFER}base.py", "WeightTransferUpdateInfo"),
        Takes(_TRANSFER, f"{_VLLM_TRANSFER}base.py", "WeightTransferEngine.parse_update_info", "update_dict"),
        Has(_TRANSFER, "vllm/config/vllm.py", "VllmConfig", "instance_id"),
        Has(_TRANSFER, "vllm/config/model.py", "ModelConfig", "quantization"),
        Takes(_TRANSFER, f"{_VLLM_LOADERS}reload/__init__.py", "initialize_layerwise_reload", "model"),
        Takes(_TRANSFER, f"{_VLLM_LOADERS}reload/layerwise.py", "finalize_layerwise_processing",
              "model, model_config"),
        Takes(_TRANSFER, f"{_VLLM_LOADERS}reload/__init__.py", "finalize_layerwise_reload", ""),
        Takes(_TRANSFER, "vllm/distributed/parallel_state.py", "get_world_group", ""),
        Has(_TRANSFER, "vllm/distributed/parallel_state.py", "GroupCoordinator", "cpu_group world_size"),
        Calls(_TRANSFER, "vllm/v1/worker/gpu_worker.py", "Worker.update_weights", "update_weights(_)"),
    ),
    "sglang": (
        Equals(_SGLANG, "sglang/srt/plugins/__init__.py", "GENERAL_PLUGINS_GROUP", "sglang.srt.plugins"),
        Calls(_SGLANG, "sglang/srt/plugins/__init__.py", "load_plugins", "func()"),
        Takes(_SGLANG, "sglang/srt/plugins/hook_registry.py", "HookRegistry.register",
              "target, hook, hook_type"),
        Has(_SGLANG, "sglang/srt/plugins/hook_registry.py", "HookType", "AROUND"),
        Wraps(f"{_SGLANG}:read_pointer_folder", _SGLANG_LOADER, "DefaultModelLoader._get_weights_iterator"),
        Has(_SGLANG, _SGLANG_LOADER, "DefaultModelLoader.Source", "model_or_path prefix"),
        Wraps(f"{_SGLANG}:answer_errors", _SGLANG_UPDATER, "WeightUpdater.update_weights_from_tensor"),
        Calls(_SGLANG, _SGLANG_UPDATER, "WeightUpdater.update_weights_from_tensor", "custom_loader(_, _)"),
        Takes(_SGLANG, "sglang/srt/distributed/parallel_state.py", "get_tp_group", ""),
        Has(_SGLANG, "sglang/srt/distributed/parallel_state.py", "GroupCoordinator", "cpu_group world_size"),
    ),
    "verl": (
        Takes(_VERL, _VERL_ENGINE, "CheckpointEngineRegistry.register", "backend"),
        Extends(f"{_VERL}:DeltaCheckpointEngine", _VERL_ENGINE, "CheckpointEngine"),
        Takes(_VERL, "verl/workers/rollout/utils.py", "ensure_async_iterator", "iterable"),
        Calls(_VERL, _VERL_ENGINE, "CheckpointEngineWorker.__init__", "new(_, bucket_size=_, **_)"),
        Calls(_VERL, _VERL_ENGINE, "CheckpointEngineWorker.update_weights",
              "receive_weights(global_steps=_)"),
        Calls(_VERL, _VERL_WORKERS, "ActorRolloutRefWorker.init_model",
              "new(_, is_master=_, bucket_size=_, **_)"),
        Calls(_VERL, _VERL_WORKERS, "ActorRolloutRefWorker.update_weights",
              "send_weights(_, global_steps=_)"),
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


def _check(release: Release) -> list[str]:
    return broken(_named(release), RELIANCES[release.name], release, Tree(ROOT))


def _named(release: Release) -> str:
    return f"{release.name} {release.version}"


def main() -> None:
    try:
        releases = newest(RELIANCES)
        with ThreadPoolExecutor() as threads:
            faults = [line for lines in threads.map(_check, releases) for line in lines]
    except OSError as error:
        sys.exit(f"The newest releases cannot be read: {error}")
    if faults:
        sys.exit("\n".join([*faults, "Our engines do not fit the newest releases."]))
    kept = sum(map(len, RELIANCES.values()))
    print(f"Our engines find the {kept} things that they rely on in {', '.join(map(_named, releases))}.")


if __name__ == "__main__":
    main()
