"""Live weights to a delta: the bytes are those of the saved folder's delta."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_model, save_torch_state_dict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from deltaweights import CheckpointError, apply_delta, make_delta
from deltaweights.storage import open_source
from deltaweights.torch import DeltaPublisher, load_into, save_delta
from deltaweights.torch.models.memory import MemorySource
from deltaweights.torch.tensors import DTYPES, byte_view

from ...checkpoints import contents
from ...conftest import Trio
from ...storage.contract import SourceContract, Subject
from ..tiny_models import Tied, nudge, saved_state, tiny_mixtral, tiny_qwen2

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=12))
def test_files_in_memory_are_those_that_safetensors_writes(
    described: dict[str, tuple[str, list[int]]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (code, shape) in described.items():
        dims = shape or [1] * (code == "F4")  # safetensors has no pair of F4 without a dimension
        bits = torch.randint(0, 2, [*dims, DTYPES[code].itemsize], dtype=torch.uint8, generator=generator)
        tensors[name] = bits.view(DTYPES[code]).reshape(dims)
    expected = save(tensors, {"format": "pt"})
    source = MemorySource({"m.safetensors": (tensors, {"format": "pt"})}, {})
    assert b"".join(source.blocks("m.safetensors")) == expected


class TestMemory(SourceContract):
    """A state's shards, files in memory, and files of a folder beside them."""

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        (tmp_path / "others").mkdir()
        (tmp_path / "others" / "vocab.txt").write_bytes(b"words\n" * 1000)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(700, 900, generator=generator)
        tensors = {"a": values, "b": values[:3].to(torch.bfloat16), "empty": torch.zeros(0)}

        def opened(tensors: dict[str, torch.Tensor]) -> MemorySource:
            shards = {"m.safetensors": (tensors, {"format": "pt"})}
            return MemorySource(shards, {"config.json": b"{}"}, open_source(tmp_path / "others"))

        def changed(path: str) -> MemorySource:
            assert path == "m.safetensors"
            last = tensors["b"].clone()  # the narrowest elements come last
            last.view(torch.uint8)[-1, -1] ^= 1
            return opened(tensors | {"b": last})

        files = {
            "m.safetensors": save(tensors, {"format": "pt"}),
            "config.json": b"{}",
            "vocab.txt": b"words\n" * 1000,
        }
        with opened(tensors) as source:
            yield Subject(source, files, changed)


def test_bytes_of_one_element_are_had_whatever_its_stride() -> None:
    tensor = torch.arange(6, dtype=torch.int16)[3::2][:1]
    assert tensor.stride() == (2,)
    assert byte_view(tensor).tolist() == [3, 0]
    assert byte_view(torch.zeros(0, 7)).numel() == 0
    assert byte_view(torch.tensor(258, dtype=torch.int16)).tolist() == [2, 1]


def check_equal(folder: Path, base: Path, state: Any, **options: Any) -> None:
    """The delta from memory is the one of the target in ``folder / "target"``, and makes it again."""
    make_delta(base, folder / "target", folder / "expected")
    save_delta(state, base, folder / "found", **options)
    assert contents(folder / "found") == contents(folder / "expected")
    apply_delta(folder / "found", folder / "rebuilt", base=base)
    assert contents(folder / "rebuilt") == contents(folder / "target")


@pytest.mark.parametrize("size", [None, "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_pretrained_models_are_saved_as_save_pretrained_does(
    tmp_path: Path, tied: bool, size: str | None
) -> None:
    model = tiny_qwen2(tied=tied)
    model.save_pretrained(tmp_path / "base")
    nudge(model)
    options: dict[str, Any] = {} if size is None else {"max_shard_size": size}
    model.save_pretrained(tmp_path / "target", **options)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == (1 if size is None else 2 + (not tied))
    check_equal(tmp_path, tmp_path / "base", model, **options)


def test_tensors_that_transformers_fuses_are_saved_apart(tmp_path: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "base")
    nudge(model)
    model.save_pretrained(tmp_path / "target")
    saved = saved_state(tmp_path / "target")
    assert not set(saved) <= set(model.state_dict())
    check_equal(tmp_path, tmp_path / "base", model)


def test_files_of_a_folder_belong_to_the_target(qwen2: Trio, tmp_path: Path) -> None:
    """All but weights and their index; the model's own config counts more."""
    model = tiny_qwen2()
    nudge(model)
    model.save_pretrained(tmp_path / "target")
    extras = tmp_path / "extras"
    shutil.copytree(qwen2.target, extras)
    (extras / "tokenizer").mkdir()
    (extras / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (extras / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    shutil.copytree(extras / "tokenizer", tmp_path / "target" / "tokenizer")
    shutil.copy(extras / "README.md", tmp_path / "target")
    (extras / "config.json").write_text("{}")
    check_equal(tmp_path, qwen2.base, model, files=extras)
    page = next(path.read_text() for path in tmp_path.glob("*/README.md") if "how to use" in path.read_text())
    assert "# Mine\n" in page
    assert "from_pretrained" in page, "the config is the model's"


@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_other_models_are_saved_as_huggingface_hub_does(tmp_path: Path, size: str) -> None:
    model = Tied()
    for side in ("base", "target"):
        nudge(model)
        (tmp_path / side).mkdir()
        save_torch_model(model, tmp_path / side, max_shard_size=size)
    shards = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(shards) == (1 if size == "5GB" else 2)
    sorted_metadata = b'{"__metadata__":{"format":"pt"' + b',"head.weight":"embed.weight"' * (
        len(shards) == 1
    )
    for _ in range(100):  # safetensors writes metadata in an order that is another one each time
        if shards[0].read_bytes()[8:].startswith(sorted_metadata):
            break
        save_torch_model(model, tmp_path / "target", max_shard_size=size)
    check_equal(tmp_path, tmp_path / "base", model, max_shard_size=size)


def test_slices_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(64, dtype=torch.float32)
    state = {"low": whole[:32], "high": whole[32:], "turned": torch.ones(3, 4).t(), "empty": whole[:0]}
    for side in ("base", "target"):
        whole += 1
        (tmp_path / side).mkdir()
        copies = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(copies, tmp_path / side / "model.safetensors", {"format": "pt"})
    check_equal(tmp_path, tmp_path / "base", state)


def test_conjugates_are_saved_by_value(tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    (tmp_path / "base").mkdir()
    save_torch_state_dict({"x": value}, tmp_path / "base")
    save_delta({"x": value.conj()}, tmp_path / "base", tmp_path / "delta")
    apply_delta(tmp_path / "delta", tmp_path / "target", base=tmp_path / "base")
    assert saved_state(tmp_path / "target")["x"].tolist() == [1 - 2j, 3 + 4j]


def test_a_model_without_tensors_is_one_empty_shard(qwen2: Trio, tmp_path: Path) -> None:
    manifest = save_delta(nn.ReLU(), qwen2.base, tmp_path / "delta")
    assert [file.path for file in manifest.target.files] == ["model.safetensors"]
    assert {entry.status for entry in manifest.tensors} == {"removed"}


_STORAGE = torch.zeros(6)
_FREED = torch.zeros(3)
_FREED.untyped_storage().resize_(0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"x": torch.zeros(2, device="meta")}, "meta device"),
        ({"x": torch.zeros(2).to_sparse()}, "not dense"),
        ({"x": "text"}, "a str, not a tensor"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "no torch.complex128"),
        ({"x": torch.zeros((1,), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)[0]}, "has no dimension"),
        ({"x": _STORAGE[:4], "y": _STORAGE[2:]}, "None of .* covers all of it"),
        ({"x": _FREED}, "memory, which was set free"),
        ({"x": _NESTED}, "a nested tensor"),
        ({3: torch.zeros(2)}, "3 is no name"),
    ],
    ids=["meta", "sparse", "text", "dtype", "pair", "overlap", "freed", "nested", "number"],
)
def test_what_cannot_be_saved_is_an_error(qwen2: Trio, tmp_path: Path, state: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        save_delta(state, qwen2.base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_models_with_adapters_are_refused(qwen2: Trio, tmp_path: Path) -> None:
    model = tiny_qwen2()
    model._hf_peft_config_loaded = True
    with pytest.raises(CheckpointError, match="adapters that are not merged"):
        save_delta(model, qwen2.base, tmp_path / "delta")


def with_adapters(folder: Path) -> Any:
    """A real model of PEFT's on a saved one."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_peft_is_refused_until_it_is_merged(qwen2: Trio, tmp_path: Path) -> None:
    model = with_adapters(qwen2.base)
    for state in (model, model.state_dict(), nn.DataParallel(model)):
        with pytest.raises(CheckpointError, match="adapters that are not merged") as caught:
            save_delta(state, qwen2.base, tmp_path / "delta")
        assert "merge_and_unload()" in caught.value.fix
    with pytest.raises(CheckpointError, match="adapters that are not merged"):
        DeltaPublisher(tmp_path / "stream", model)
    manifest = save_delta(model.merge_and_unload(), qwen2.base, tmp_path / "delta")
    assert {entry.status for entry in manifest.tensors} == {"same", "changed"}
    assert sum(entry.status == "changed" for entry in manifest.tensors) == 4


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.q_proj.base_layer.weight",
        "layers.0.q_proj.lora_A.default.weight",
        "lm_head.original_module.weight",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_names_of_adapters_among_others_are_refused(qwen2: Trio, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="adapters that are not merged"):
        save_delta({"embed.weight": torch.ones(3), name: torch.ones(3)}, qwen2.base, tmp_path / "delta")


def test_an_adapter_alone_is_saved(tmp_path: Path) -> None:
    """With a layer that was trained whole beside it, as PEFT saves ``modules_to_save``."""
    state = {f"base_model.model.layers.0.q_proj.lora_{k}.weight": torch.ones(3) for k in "AB"}
    state["base_model.model.lm_head.weight"] = torch.ones(3)
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    manifest = save_delta(state, tmp_path / "base", tmp_path / "delta")
    assert {entry.status for entry in manifest.tensors} <= {"same", "duplicate"}


def test_parameters_that_bitsandbytes_has_quantized_are_refused(tmp_path: Path) -> None:
    """Not bitsandbytes itself: what it leaves on a parameter, and state_dict takes away."""
    model = nn.Linear(4, 4)
    (tmp_path / "base").mkdir()
    save_torch_model(model, tmp_path / "base")
    model.weight.quant_state = object()  # type: ignore[attr-defined]
    for save_it in (
        lambda: save_delta(model, tmp_path / "base", tmp_path / "delta"),
        lambda: DeltaPublisher(tmp_path / "stream", model),
    ):
        with pytest.raises(CheckpointError, match="The model is quantized") as caught:
            save_it()
        assert "dequantize()" in caught.value.fix


def test_a_moving_average_is_saved_as_the_model_inside(qwen2: Trio, tmp_path: Path) -> None:
    class ModelEmaV2(nn.Module):  # timm's
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    manifest = save_delta(ModelEmaV2(tiny_qwen2()), qwen2.base, tmp_path / "delta")
    assert "config.json" in {file.path for file in manifest.target.files}
    averaged = AveragedModel(tiny_qwen2())
    with pytest.raises(CheckpointError, match="with its wrapper") as caught:
        save_delta(averaged, qwen2.base, tmp_path / "delta-2")
    assert "averaged.module" in caught.value.fix
    save_delta(averaged.module, qwen2.base, tmp_path / "delta-2")


def test_placeholders_of_zero_3_are_refused_until_they_are_gathered(qwen2: Trio, tmp_path: Path) -> None:
    """Not deepspeed itself: what it leaves of parameters between two gathers."""
    model = tiny_qwen2()
    whole = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        if "norm" not in name:  # small ones stay
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    for state in (model, model.state_dict(), nn.DataParallel(model)):
        with pytest.raises(CheckpointError, match="ZeRO-3") as caught:
            save_delta(state, qwen2.base, tmp_path / "delta")
        assert "GatheredParameters" in caught.value.fix
        with pytest.raises(CheckpointError, match="ZeRO-3"):
            DeltaPublisher(tmp_path / "stream", state)
    with pytest.raises(CheckpointError, match="ZeRO-3"):
        load_into(model, qwen2.delta, qwen2.base)
    for name, parameter in model.named_parameters():
        parameter.data = whole[name]
    save_delta(model, qwen2.base, tmp_path / "delta")


def test_tensors_of_other_tensors_are_refused(qwen2: Trio, tmp_path: Path) -> None:
    """So are quantized ones: torchao's are of this kind."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny_qwen2()
    weight = model.model.norm.weight.data
    model.model.norm.weight = nn.Parameter(TwoTensor(weight, weight))  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match="It is a TwoTensor: quantized"):
        save_delta(model, qwen2.base, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="It is a TwoTensor: quantized"):
        DeltaPublisher(tmp_path / "stream", model)
    with pytest.raises(CheckpointError, match="is a TwoTensor: quantized"):
        load_into(model, qwen2.delta, qwen2.base)


def test_weights_that_are_tied_against_the_config_are_refused(qwen2: Trio, tmp_path: Path) -> None:
    """As by save_pretrained."""
    model = tiny_qwen2(tied=False)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(CheckpointError, match="Tied weights cannot be saved"):
        save_delta(model, qwen2.base, tmp_path / "delta")


def test_it_takes_all_that_make_delta_takes() -> None:
    """With the same defaults: an option that one of them learns is not forgotten in the other. Only an
    executor, which cannot read this process's memory, is none for tensors."""
    own, wanted = (signature(function).parameters for function in (save_delta, make_delta))
    options = {name: one.default for name, one in wanted.items() if one.kind is one.KEYWORD_ONLY}
    del options["executor"]
    assert {name: own[name].default for name in options} == options
