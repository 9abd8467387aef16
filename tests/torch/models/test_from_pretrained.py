"""Models of transformers from base and delta, against what that library loads from the rebuilt folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Model,
)

from deltaweights import make_delta
from deltaweights.engines import serve_folder
from deltaweights.errors import CheckpointError
from deltaweights.torch import from_pretrained, save_delta

from ...conftest import Trio
from ..tiny_models import nudge, raw_state, saved_state, tiny_llava, tiny_mixtral, tiny_qwen2


def tiny_untied() -> PreTrainedModel:
    return tiny_qwen2(tied=False)


@pytest.mark.parametrize(
    "make", [tiny_qwen2, tiny_untied, tiny_mixtral, tiny_llava], ids=lambda one: one.__name__
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"dtype": "auto"},
        {"torch_dtype": torch.float16},
        {"device_map": None},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_it_is_the_model_that_transformers_loads(
    tmp_path: Path, make: Callable[[], PreTrainedModel], options: dict[str, Any]
) -> None:
    model = _pair(tmp_path, make())
    expected = type(model).from_pretrained(tmp_path / "target", **options)
    assert_same(from_pretrained(tmp_path / "delta", tmp_path / "base", **options), expected)


def test_a_pointer_folder_says_where_delta_and_base_are(tmp_path: Path) -> None:
    _pair(tmp_path, tiny_qwen2())
    serve_folder(tmp_path / "delta", tmp_path / "served", base=tmp_path / "base")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert_same(from_pretrained(tmp_path / "served"), expected)
    assert_same(from_pretrained(str(tmp_path / "served")), expected)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="no file or folder"):
        from_pretrained(tmp_path / "served")
    assert_same(from_pretrained(tmp_path / "served", tmp_path / "moved"), expected)
    with pytest.raises(OSError, match="served"):  # there are no weights, and transformers says so
        AutoModelForCausalLM.from_pretrained(tmp_path / "served")


@pytest.mark.parametrize("options", [{"use_cache": False}, {"max_position_embeddings": 128}], ids=str)
def test_values_of_the_config_may_be_others(tmp_path: Path, options: dict[str, Any]) -> None:
    _pair(tmp_path, tiny_qwen2())
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "target", **options)
    assert_same(from_pretrained(tmp_path / "delta", tmp_path / "base", **options), expected)


@pytest.mark.parametrize("wanted", [AutoModelForCausalLM, AutoModel, Qwen2Model])
def test_the_class_may_be_another(tmp_path: Path, wanted: Any) -> None:
    _pair(tmp_path, tiny_qwen2())
    loaded = from_pretrained(tmp_path / "delta", tmp_path / "base", model_class=wanted)
    assert_same(loaded, wanted.from_pretrained(tmp_path / "target"))


def test_it_needs_no_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra does not bring it, and transformers refuses any device_map without it."""
    _pair(tmp_path, tiny_qwen2())
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match="requires `accelerate`"):
        from_pretrained(tmp_path / "delta", tmp_path / "base", device_map="cpu")
    loaded = from_pretrained(tmp_path / "delta", tmp_path / "base")
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "target"))


def test_a_class_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    _pair(tmp_path, tiny_qwen2())
    with pytest.raises(CheckpointError, match="has none for a Qwen2Config") as caught:
        from_pretrained(tmp_path / "delta", tmp_path / "base", model_class=AutoModelForImageClassification)
    assert "another model_class" in caught.value.fix


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"dtype": None}, {"architectures": None}], ids=str)
def test_what_the_config_says_counts(tmp_path: Path, change: dict[str, Any]) -> None:
    _pair(tmp_path, tiny_qwen2(), change)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    loaded = from_pretrained(tmp_path / "delta", tmp_path / "base", model_class=AutoModelForCausalLM)
    assert_same(loaded, expected)


def test_how_to_generate_may_stand_in_the_config(tmp_path: Path) -> None:
    _pair(tmp_path, tiny_qwen2(), {"max_length": 33, "do_sample": True}, without="generation_config.json")
    loaded = from_pretrained(tmp_path / "delta", tmp_path / "base")
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    assert loaded.generation_config is not None
    assert loaded.generation_config.max_length == 33


def test_a_chain_over_a_base_in_shards(tmp_path: Path) -> None:
    model = _pair(tmp_path, tiny_qwen2())
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    nudge(model, seed=5)
    model.save_pretrained(tmp_path / "next")
    make_delta(tmp_path / "target", tmp_path / "next", tmp_path / "second")
    loaded = from_pretrained([tmp_path / "delta", tmp_path / "second"], tmp_path / "base")
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "next"))


def test_it_may_be_quantized_on_the_way(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _pair(tmp_path, tiny_qwen2())
    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}  # type: ignore[no-untyped-call]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "target", **options)
    assert_same(from_pretrained(tmp_path / "delta", tmp_path / "base", **options), expected)


CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_own import OwnConfig

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(8, 8)
        self.post_init()

    def _init_weights(self, module):
        pass
"""


def test_the_target_s_own_code_is_run_only_if_it_is_trusted(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    (tmp_path / "files").mkdir()
    for name, text in {
        "config.json": json.dumps(config),
        "configuration_own.py": CONFIGURATION,
        "modeling_own.py": MODELING,
    }.items():
        (tmp_path / "files" / name).write_text(text)
    state = {"layer.weight": torch.ones(8, 8), "layer.bias": torch.ones(8)}
    (tmp_path / "base").mkdir()
    save_file({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "base" / "model.safetensors")
    save_delta(state, tmp_path / "base", tmp_path / "delta", files=tmp_path / "files")
    with pytest.raises(CheckpointError, match="cannot read the target's config") as caught:
        from_pretrained(tmp_path / "delta", tmp_path / "base")
    assert "trust_remote_code=True" in caught.value.fix
    loaded = from_pretrained(tmp_path / "delta", tmp_path / "base", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
    assert raw_state(loaded.state_dict()) == raw_state(state)


def test_what_transformers_cannot_make_is_an_error(trio: Trio, qwen2: Trio, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names the class None"):
        from_pretrained(trio.delta, trio.base)
    save_delta(saved_state(qwen2.target), qwen2.base, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path / "weights", qwen2.base)
    (tmp_path / "files").mkdir()
    config = json.loads((qwen2.target / "config.json").read_text())
    for more, fix in (({}, "model_class"), ({"auto_map": {"AutoModel": "code.Other"}}, "trust_remote_code")):
        (tmp_path / "files" / "config.json").write_text(
            json.dumps(config | {"architectures": ["Other"]} | more)
        )
        state = saved_state(qwen2.target)
        save_delta(state, qwen2.base, tmp_path / "delta", files=tmp_path / "files", force=True)
        with pytest.raises(CheckpointError, match="names the class 'Other'") as caught:
            from_pretrained(tmp_path / "delta", qwen2.base)
        assert fix in caught.value.fix


def _pair(
    folder: Path, model: PreTrainedModel, change: dict[str, Any] | None = None, without: str | None = None
) -> PreTrainedModel:
    """Save a base in shards, a fine-tune and the delta; ``change`` is of the fine-tune's config. Returns the
    fine-tune."""
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    nudge(model)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_dict({"do_sample": True, "max_new_tokens": 5})
    model.save_pretrained(folder / "target")
    if change:
        path = folder / "target" / "config.json"
        config = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if without:
        (folder / "target" / without).unlink()
    make_delta(folder / "base", folder / "target", folder / "delta")
    return model


def assert_same(loaded: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Everything that the two are is the same: class, bits, ties, buffers, config and how they generate."""
    assert type(loaded) is type(expected)
    assert not loaded.training
    assert raw_state(loaded.state_dict()) == raw_state(expected.state_dict())
    assert len(list(loaded.parameters())) == len(list(expected.parameters())), "ties"
    assert raw_state(dict(loaded.named_buffers())) == raw_state(dict(expected.named_buffers()))
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {
        **expected.config.to_dict(),
        "_name_or_path": "",
    }
    if expected.can_generate():
        assert loaded.generation_config is not None
        assert expected.generation_config is not None
        assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
