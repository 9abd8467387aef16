"""Base and delta into a model's memory."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    Manifest,
    apply_delta,
    make_delta,
)
from deltaweights.torch import (
    LoadReport,
    load_into,
    load_state_dict,
    save_delta,
    write_files,
)

from ...checkpoints import Array, contents, write_safetensors
from ...conftest import Trio
from ..process_groups import process_group
from ..tiny_models import (
    WRAPPERS,
    Tied,
    nudge,
    raw,
    raw_state,
    saved_state,
    tiny_llava,
    tiny_mixtral,
    tiny_qwen2,
)


@pytest.fixture
def tied(tmp_path: Path) -> Trio:
    """A base and a target of :class:`Tied`: the tied weight under one name only, chunks of 4 KiB."""
    model = Tied()
    for side, std in (("base", 0.02), ("target", 1e-3)):
        nudge(model, std=std)
        state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
        (tmp_path / side).mkdir()
        save_file(state, tmp_path / side / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    return Trio(tmp_path / "base", tmp_path / "target", tmp_path / "delta")


def test_state_dict_is_the_target(trio: Trio) -> None:
    """Every status; dtypes and shapes too."""
    seen: list[tuple[str, int, int]] = []
    state = load_state_dict(trio.delta, trio.base, progress=lambda *args: seen.append(args))
    assert raw_state(state) == raw_state(saved_state(trio.target))
    assert seen[-1] == ("load", seen[-1][2], seen[-1][2])


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
        ),
        "nonsense",
    ],
)
def test_there_may_be_no_such_device(trio: Trio, device: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_state_dict(trio.delta, trio.base, device=device)


def test_state_dict_is_the_target_for_every_dtype(tmp_path: Path) -> None:
    from deltaweights.torch.tensors import DTYPES

    assert len(DTYPES) >= 18
    generator = torch.Generator().manual_seed(0)
    for side in ("base", "target"):
        bits = torch.randint(0, 256, (3, 4 * 4096), dtype=torch.uint8, generator=generator)
        state = {
            code: (bits & 1).bool() if code == "BOOL" else bits.view(dtype) for code, dtype in DTYPES.items()
        }
        (tmp_path / side).mkdir()
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / side / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    loaded = load_state_dict(tmp_path / "delta", tmp_path / "base")
    assert raw_state(loaded) == raw_state(saved_state(tmp_path / "target"))
    assert loaded["F4"].shape == state["F4"].shape


FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("name", ["v1-low-rank", "v1-parts", "v1-quantized"])
def test_what_is_predicted_or_put_together_is_loaded(name: str, tmp_path: Path) -> None:
    delta, base = FIXTURES / name / "delta", FIXTURES / name / "base"
    apply_delta(delta, tmp_path / "target", base=base)
    expected = saved_state(tmp_path / "target")
    assert raw_state(load_state_dict(delta, base)) == raw_state(expected)
    model = nn.Module()
    for key, tensor in expected.items():
        owner, _, leaf = key.rpartition(".")
        if owner and owner not in dict(model.named_children()):
            model.add_module(owner, nn.Module())
        model.get_submodule(owner).register_buffer(leaf, torch.zeros_like(tensor))
    load_into(model, delta, base)
    assert raw_state(dict(model.named_buffers())) == raw_state(expected)


def test_conversion_is_torch_s(trio: Trio) -> None:
    state = load_state_dict(trio.delta, trio.base, dtype=torch.float32)
    expected = {name: tensor.float() for name, tensor in saved_state(trio.target).items()}
    assert raw_state(state) == raw_state(expected)


def test_integers_are_not_converted(tied: Trio) -> None:
    state = load_state_dict(tied.delta, tied.base, dtype=torch.bfloat16)
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["embed.weight"].dtype == torch.bfloat16


def test_shards_are_chosen_by_pattern(qwen2: Trio) -> None:
    state = load_state_dict(qwen2.delta, qwen2.base, shards="*-00001-of-*")
    index = json.loads((qwen2.target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(state) == {name for name, path in index.items() if "-00001-of-" in path}
    assert 0 < len(state) < len(index)


@pytest.fixture
def twice(tmp_path: Path) -> Trio:
    """As `tied`, but the tied weight is saved twice, in two shards: the first holds a duplicate."""
    model = Tied()
    for side, std in (("base", 0.02), ("target", 1e-3)):
        nudge(model, std=std)
        state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
        head = state.pop("head.weight")
        (tmp_path / side).mkdir()
        if side == "target":
            save_file({"head.weight": head}, tmp_path / side / "model-1.safetensors")
        save_file(state, tmp_path / side / "model-2.safetensors")
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    assert [e.file for e in manifest.tensors if e.status == "duplicate"] == ["model-1.safetensors"]
    return Trio(tmp_path / "base", tmp_path / "target", tmp_path / "delta")


@pytest.mark.parametrize("sha256", [False, True])
def test_duplicates_are_loaded_as_their_own(twice: Trio, sha256: bool) -> None:
    expected = saved_state(twice.target)
    state = load_state_dict(twice.delta, twice.base, sha256=sha256)
    assert raw_state(state) == raw_state(expected)
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    load_into(model, twice.delta, twice.base, sha256=sha256)
    assert raw_state(model.state_dict()) == raw_state(expected)
    tied = Tied()
    load_into(tied, twice.delta, twice.base, sha256=sha256)
    assert raw_state(tied.state_dict()) == raw_state(expected)


def test_a_duplicate_is_loaded_without_the_shard_of_what_it_is_like(twice: Trio) -> None:
    state = load_state_dict(twice.delta, twice.base, shards="model-1*")
    assert raw_state(state) == {
        name: data for name, data in raw_state(saved_state(twice.target)).items() if name == "head.weight"
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_gets_the_target_s_bytes(tied: Trio, device: str) -> None:
    with torch.device(device):
        model = Tied()
    embed = model.embed.weight
    assert load_into(model, tied.delta, tied.base, threads=2) == LoadReport([], [])
    assert model.head.weight is model.embed.weight
    assert (model.embed.weight is embed) == (device == "cpu")
    assert not model.fixed.requires_grad
    assert model.turned.requires_grad
    state = raw_state(model.state_dict())
    assert state.pop("head.weight") == state["embed.weight"]
    assert state == raw_state(saved_state(tied.target))


def test_other_dtypes_are_converted_as_load_state_dict_does(tied: Trio) -> None:
    model, reference = Tied().double(), Tied().double()
    load_into(model, tied.delta, tied.base)
    reference.load_state_dict(saved_state(tied.target), strict=False)
    assert raw_state(model.state_dict()) == raw_state(reference.state_dict())


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_floats_of_8_bits_become_integers_by_their_values(tmp_path: Path, is_contiguous: bool) -> None:
    values = torch.arange(64, dtype=torch.float32).view(8, 8)
    for side, shift in (("base", 0), ("target", 1)):
        (tmp_path / side).mkdir()
        save_file({"w": (values + shift).to(torch.float8_e4m3fn)}, tmp_path / side / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    model, stored = nn.Module(), (values + 1).to(torch.float8_e4m3fn)
    memory = torch.zeros(8, 8, dtype=torch.uint8)
    model.register_buffer("w", memory if is_contiguous else memory.t())
    load_into(model, tmp_path / "delta", tmp_path / "base")
    expected = torch.empty(8, 8, dtype=torch.uint8).copy_(stored)
    assert raw_state(model.state_dict()) == raw_state({"w": expected})


def test_of_two_values_for_one_weight_the_last_counts(tied: Trio) -> None:
    """As with ``load_state_dict``."""
    state = saved_state(tied.target)
    state["head.weight"] = state["embed.weight"] + 1
    save_file(state, tied.target / "model.safetensors")
    shutil.rmtree(tied.delta)
    make_delta(tied.base, tied.target, tied.delta)
    model, reference = Tied(), Tied()
    load_into(model, tied.delta, tied.base)
    reference.load_state_dict(state)
    assert raw(model.embed.weight) == raw(state["head.weight"]) == raw(reference.embed.weight)


class Wrong(Tied):
    """Has a parameter more, and lacks one."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2))
        del self.fixed


def test_names_that_do_not_fit_are_an_error_and_nothing_is_loaded(tied: Trio) -> None:
    model = Wrong()
    before = raw_state(model.state_dict())
    with pytest.raises(CheckpointError, match="lacks 'more'; the model lacks 'fixed'"):
        load_into(model, tied.delta, tied.base)
    assert raw_state(model.state_dict()) == before
    assert load_into(model, tied.delta, tied.base, strict=False) == LoadReport(["more"], ["fixed"])
    loaded = raw_state(model.state_dict())
    assert loaded["embed.weight"] == raw_state(saved_state(tied.target))["embed.weight"]
    assert loaded["more"] == before["more"]


def test_shapes_that_do_not_fit_are_an_error_and_nothing_is_loaded(tied: Trio) -> None:
    model = Tied()
    model.fixed = nn.Parameter(torch.zeros(8))
    before = raw_state(model.state_dict())
    with pytest.raises(CheckpointError, match=r"'fixed' is \[7\] in the target, \[8\] in the model"):
        load_into(model, tied.delta, tied.base, strict=False)
    assert raw_state(model.state_dict()) == before


def test_buffers_that_no_checkpoint_holds_are_found_before_loading(qwen2: Trio) -> None:
    config = AutoConfig.from_pretrained(qwen2.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match="inv_freq"):
        load_into(model, qwen2.delta, qwen2.base)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_outputs_are_those_of_the_rebuilt_folder(qwen2: Trio, tmp_path: Path) -> None:
    """Other files first; then a model without memory for its parameters; then the weights."""
    written = write_files(qwen2.delta, tmp_path / "files", qwen2.base)
    assert written == ["config.json", "generation_config.json"]
    assert contents(tmp_path / "files").items() <= contents(qwen2.target).items()
    config = AutoConfig.from_pretrained(tmp_path / "files")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    assert all(parameter.is_meta for parameter in model.parameters())
    load_into(model, qwen2.delta, qwen2.base)
    reference = AutoModelForCausalLM.from_pretrained(qwen2.target)
    assert raw_state(model.state_dict()) == raw_state(reference.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        assert raw(model.eval()(tokens).logits) == raw(reference(tokens).logits)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_llava], ids=["mixtral", "llava"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_names_are_converted_as_transformers_does(
    tmp_path: Path, make: Callable[[], PreTrainedModel], device: str
) -> None:
    """Models whose names in memory are not those of the checkpoint."""
    model = make()
    model.save_pretrained(tmp_path / "base")
    nudge(model)
    expected = raw_state(model.state_dict())
    save_delta(model, tmp_path / "base", tmp_path / "delta")
    assert not set(load_state_dict(tmp_path / "delta", tmp_path / "base")) <= set(model.state_dict())
    with init_empty_weights(include_buffers=False) if device == "meta" else nullcontext():
        other = type(model)(copy.deepcopy(model.config))
    seen: list[tuple[str, int, int]] = []
    report = load_into(other, tmp_path / "delta", tmp_path / "base", progress=lambda *a: seen.append(a))
    assert report == LoadReport([], [])
    assert raw_state(other.state_dict()) == expected
    assert seen[-1] == ("load", seen[-1][2], seen[-1][2])


def test_experts_that_are_missing_are_an_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = tiny_mixtral()
    (tmp_path / "base").mkdir()
    model.save_pretrained(tmp_path / "whole")
    state = saved_state(tmp_path / "whole")
    save_file(state, tmp_path / "base" / "model.safetensors")
    gone = next(name for name in state if ".experts.2." in name)
    save_delta({k: v for k, v in state.items() if k != gone}, tmp_path / "base", tmp_path / "delta")
    before = raw_state(model.state_dict())
    nudge(model)
    changed = raw_state(model.state_dict())
    assert changed != before
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_into(model, tmp_path / "delta", tmp_path / "base")
    assert raw_state(model.state_dict()) == changed


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_seen_through(
    qwen2: Trio, tmp_path: Path, wrap: Callable[[PreTrainedModel], nn.Module]
) -> None:
    """What is saved of a wrapped model is what it is without; and what is loaded goes into both."""
    model = tiny_qwen2()
    nudge(model)
    save_delta(model, qwen2.base, tmp_path / "plain")
    wrapped = wrap(model)
    save_delta(wrapped, qwen2.base, tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
    expected = raw_state(wrapped.state_dict())
    nudge(model, seed=2)
    assert raw_state(wrapped.state_dict()) != expected
    assert load_into(wrapped, tmp_path / "plain", qwen2.base) == LoadReport([], [])
    assert raw_state(wrapped.state_dict()) == expected


def test_names_that_an_earlier_version_saved_of_wrappers_are_loaded(qwen2: Trio, tmp_path: Path) -> None:
    model = tiny_qwen2(tied=False, seed=5)
    (tmp_path / "base").mkdir()
    state = {f"_orig_mod.module.{name}": value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "base", tmp_path / "delta")
    other = tiny_qwen2(tied=False, seed=6)
    load_into(nn.DataParallel(other), tmp_path / "delta", tmp_path / "base")
    assert raw_state(other.state_dict()) == raw_state(model.state_dict())


def test_what_was_not_loaded_is_returned_and_logged(tied: Trio, caplog: pytest.LogCaptureFixture) -> None:
    class More(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    report = load_into(More(), tied.delta, tied.base, strict=False)
    assert report == LoadReport(["more.weight", "more.bias"], [])
    assert "'more.weight', 'more.bias'" in caplog.text


def test_chains_are_loaded(qwen2: Trio, tmp_path: Path) -> None:
    model = tiny_qwen2()
    load_into(model, qwen2.delta, qwen2.base)
    nudge(model, seed=2)
    model.save_pretrained(tmp_path / "next", max_shard_size="100KB")
    make_delta(qwen2.target, tmp_path / "next", tmp_path / "second")
    loaded = tiny_qwen2(seed=3)
    load_into(loaded, [qwen2.delta, tmp_path / "second"], qwen2.base, sha256=True)
    assert raw_state(loaded.state_dict()) == raw_state(model.state_dict())


def test_wrong_base_is_an_error(qwen2: Trio, tmp_path: Path) -> None:
    other = tiny_qwen2(seed=5)
    other.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError):
        load_state_dict(qwen2.delta, tmp_path)


def test_damage_is_an_error(qwen2: Trio, tmp_path: Path) -> None:
    shutil.copytree(qwen2.delta, tmp_path / "delta")
    path = next((tmp_path / "delta").glob("delta-00001-*"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeltaError):
        load_into(tiny_qwen2(), tmp_path / "delta", qwen2.base)


def edit_manifest(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a delta with another manifest, whole by its own checksum."""
    shutil.copytree(source, folder)
    path = folder / "deltaweights.json"
    manifest = Manifest.from_json(path.read_bytes())
    path.write_bytes(replace(manifest, **changes).to_json())
    return folder


def test_sha256_finds_what_checksums_cannot(qwen2: Trio, tmp_path: Path) -> None:
    """A manifest that promises another file, though every chunk is as its record says."""
    record = Manifest.from_json((qwen2.delta / "deltaweights.json").read_bytes()).target
    files = tuple(replace(f, sha256="0" * 64) if f.stored == "tensors" else f for f in record.files)
    delta = edit_manifest(qwen2.delta, tmp_path / "delta", target=replace(record, files=files))
    assert load_state_dict(delta, qwen2.base)
    with pytest.raises(DeltaError, match="was not rebuilt correctly"):
        load_state_dict(delta, qwen2.base, sha256=True)
    assert load_state_dict(qwen2.delta, qwen2.base, sha256=True)


def test_chunks_that_cut_elements_are_no_crash(qwen2: Trio, tmp_path: Path) -> None:
    entries = Manifest.from_json((qwen2.delta / "deltaweights.json").read_bytes()).tensors
    cut = tuple(replace(e, shared_bytes=max(0, e.shared_bytes - 1)) for e in entries)
    delta = edit_manifest(qwen2.delta, tmp_path / "delta", tensors=cut)
    with pytest.raises(DeltaError):
        load_state_dict(delta, qwen2.base, dtype=torch.float64)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (Array("F6_E2M3", (4,), b"abc"), "F6_E2M3, which torch"),
        (Array("F4", (2, 3), b"abc"), "pairs along the last dimension"),
        (Array("F32", (2**63, 0), b""), r"\[9223372036854775808, 0\] of torch.float32"),
    ],
    ids=["dtype", "pairs", "shape"],
)
def test_what_torch_cannot_hold_is_an_error(tmp_path: Path, array: Array, why: str) -> None:
    for side in ("base", "target"):
        write_safetensors(tmp_path / side / "m.safetensors", {"x": array})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    with pytest.raises(CheckpointError, match=why):
        load_state_dict(tmp_path / "delta", tmp_path / "base")


class WithExtra(nn.Linear):
    """A module with a tensor in its state that is none of its own."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(2)

    def set_extra_state(self, state: Tensor) -> None:
        self.taken = state


def test_a_model_that_gives_copies_of_its_tensors_is_not_said_to_be_loaded(tmp_path: Path) -> None:
    model = WithExtra(3, 3)
    (tmp_path / "base").mkdir()
    save_torch_state_dict(model.state_dict(), tmp_path / "base")
    save_delta({**model.state_dict(), "_extra_state": torch.ones(2)}, tmp_path / "base", tmp_path / "delta")
    with pytest.raises(CheckpointError, match="makes copies of '_extra_state'") as caught:
        load_into(model, tmp_path / "delta", tmp_path / "base")
    assert "model.load_state_dict(" in caught.value.fix
    model.load_state_dict(load_state_dict(tmp_path / "delta", tmp_path / "base"))
    assert model.taken.tolist() == [1, 1]


def test_sharded_tensors_are_refused(qwen2: Trio, tmp_path: Path) -> None:
    """They are distributed checkpoints' business: here, each process has only a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = (tmp_path / "store").as_uri()
    with process_group(init_method=store, rank=0, world_size=1):
        model = tiny_qwen2()
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(model.model.norm.weight.detach(), mesh)
        model.model.norm.weight = nn.Parameter(sharded)
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is sharded"):
            load_into(model, qwen2.delta, qwen2.base)
        with pytest.raises(CheckpointError, match="sharded over several processes"):
            save_delta(model, qwen2.base, tmp_path / "delta")


def test_other_files_are_checked(qwen2: Trio, tmp_path: Path) -> None:
    shutil.copytree(qwen2.base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_bytes(config.read_bytes().replace(b"64", b"46"))
    with pytest.raises(DeltaWeightsError):
        write_files(qwen2.delta, tmp_path / "files", tmp_path / "base")
    assert not (tmp_path / "files" / "config.json").exists()


_MEMORY = """
import re, sys, torch
from pathlib import Path
from torch import nn
from deltaweights.torch import load_into, load_state_dict
delta, base = sys.argv[1:]
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
small = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
load_into(small, delta + "-small", base + "-small")  # everything is imported and compiled
before = peak()
model = nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16, device="meta")
load_into(model, delta, base, threads=2)
print(peak() - before)
"""


def test_memory_is_the_model_and_a_window(tmp_path: Path) -> None:
    """A tensor of 128 MiB, base and delta included: no second copy, not even for a moment."""
    nbytes = 2 * 8192 * 8192
    for size, suffix in ((1024, "-small"), (8192, "")):
        weight = torch.zeros(size, size, dtype=torch.bfloat16)
        for side, value in (("base", 0.5), ("target", 0.51)):
            (tmp_path / f"{side}{suffix}").mkdir()
            save_file({"weight": weight + value}, tmp_path / f"{side}{suffix}" / "model.safetensors")
        make_delta(
            tmp_path / f"base{suffix}", tmp_path / f"target{suffix}", tmp_path / f"delta{suffix}", threads=2
        )
    command = [sys.executable, "-c", _MEMORY, str(tmp_path / "delta"), str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert nbytes <= int(done.stdout) < nbytes + (64 << 20)
