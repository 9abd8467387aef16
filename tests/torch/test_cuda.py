"""What runs on the CPU runs on CUDA as well, bit for bit. Skipped where there is no such device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from transformers import AutoConfig, AutoModelForCausalLM

from deltaweights import apply_delta, make_delta
from deltaweights.torch import (
    DeltaCheckpointer,
    DeltaPublisher,
    DeltaStorageReader,
    DeltaStorageWriter,
    DeltaSubscriber,
    load_into,
    load_state_dict,
    save_delta,
)
from deltaweights.torch.tensors import DTYPES

from ..checkpoints import contents
from ..conftest import Trio
from .tiny_models import Tied, nudge, raw_state, saved_state, tiny_qwen2

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def on_cuda(model: nn.Module) -> nn.Module:
    return model.to("cuda")


def test_state_dict_on_cuda_is_the_target(trio: Trio) -> None:
    state = load_state_dict(trio.delta, trio.base, device="cuda")
    assert {tensor.device.type for tensor in state.values()} == {"cuda"}
    assert raw_state(state) == raw_state(saved_state(trio.target))


def test_state_dict_on_cuda_for_every_dtype(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for side in ("base", "target"):
        (tmp_path / side).mkdir()
        save_file(
            {
                code: torch.randint(0, 2, [700, dtype.itemsize], dtype=torch.uint8, generator=generator)
                .view(dtype)
                .reshape(70, 10)
                for code, dtype in DTYPES.items()
            },
            tmp_path / side / "model.safetensors",
        )
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    state = load_state_dict(tmp_path / "delta", tmp_path / "base", device="cuda")
    assert raw_state(state) == raw_state(saved_state(tmp_path / "target"))


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_model_on_cuda_is_loaded(qwen2: Trio, is_empty: bool) -> None:
    if is_empty:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(qwen2.target))  # type: ignore[no-untyped-call]
        model.tie_weights()
    else:
        model = on_cuda(tiny_qwen2(seed=3))
    load_into(model, qwen2.delta, qwen2.base, device="cuda")
    state, expected = raw_state(model.state_dict()), raw_state(saved_state(qwen2.target))
    assert {name: state[name] for name in expected} == expected


def test_tensors_of_other_dtypes_and_strides_are_loaded_to_cuda(tmp_path: Path) -> None:
    """``turned`` is not contiguous; the model is in float64, the target in float32."""
    model = Tied()
    for side in ("base", "target"):
        nudge(model, std=1e-3)
        (tmp_path / side).mkdir()
        state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
        save_file(state, tmp_path / side / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    same, wide = on_cuda(Tied()), on_cuda(Tied().double())
    for loaded in (same, wide):
        load_into(loaded, tmp_path / "delta", tmp_path / "base")
    assert raw_state(same.state_dict()) == raw_state(model.state_dict())
    assert raw_state(wide.state_dict()) == raw_state(model.double().state_dict())


def test_a_model_on_cuda_is_saved(tmp_path: Path) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path / "base")
    nudge(model)
    model.save_pretrained(tmp_path / "target")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "expected")
    save_delta(on_cuda(model), tmp_path / "base", tmp_path / "found")
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")
    apply_delta(tmp_path / "found", tmp_path / "rebuilt", base=tmp_path / "base")
    assert contents(tmp_path / "rebuilt") == contents(tmp_path / "target")


@pytest.mark.parametrize("anchor_every", [1, 3])
def test_checkpoints_of_a_model_on_cuda(qwen2: Trio, tmp_path: Path, anchor_every: int) -> None:
    """Each is what the model was when it was saved, though it goes on being trained at once."""
    model, states = on_cuda(tiny_qwen2()), {}
    with DeltaCheckpointer(tmp_path / "kept", qwen2.base, anchor_every=anchor_every) as checkpointer:
        for step in range(4):
            nudge(model, seed=step)
            states[step] = raw_state(model.state_dict())
            checkpointer.save(step, model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
    with DeltaCheckpointer(tmp_path / "kept", qwen2.base) as checkpointer:
        for step, expected in states.items():
            loaded = on_cuda(tiny_qwen2(seed=9))
            assert checkpointer.load_into(loaded, step) == step
            assert raw_state(loaded.state_dict()) == expected


class Layers(nn.Module):
    """Weights of several chunks, tied ones, an empty one, and one whose bytes are not in row-major order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(900, 2000, dtype=torch.bfloat16)
        self.head = nn.Linear(2000, 900, bias=True, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.halves = nn.Linear(500, 600, dtype=torch.float16)
        self.wide = nn.Linear(300, 400)
        self.turned = nn.Parameter(torch.randn(700, 900, dtype=torch.bfloat16).t())
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("empty", torch.zeros(0, 7))


@torch.no_grad()
def train(model: nn.Module, seed: int, share: float) -> None:
    """Move this share of the weights a little, wherever the model lies."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            moved = (torch.rand(tensor.shape, generator=generator) < share).to(tensor.device)
            tensor[moved] *= 1.01
        elif tensor.dtype == torch.int64:
            tensor.add_(1)


@pytest.mark.parametrize(("trainer", "engine"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.7])
def test_streams_from_and_to_cuda(tmp_path: Path, trainer: str, engine: str, share: float) -> None:
    model, follower, late = Layers().to(trainer), Layers().to(engine), Layers().to(engine)
    with torch.no_grad():
        late.embed.weight.zero_()
    with DeltaPublisher(tmp_path, model, anchor_every=3) as publisher:
        subscriber = DeltaSubscriber(tmp_path)
        for step in range(1, 6):
            train(model, step, share)
            publisher.publish(step, model)
            if step == 5:
                with subscriber.prepare(follower) as prepared:
                    prepared.commit()
            elif step != 3:  # several steps at once
                subscriber.sync(follower)
            if step != 3:
                assert raw_state(follower.state_dict()) == raw_state(model.state_dict())
    report = DeltaSubscriber(tmp_path).sync(late)
    assert report.from_anchor
    assert raw_state(late.state_dict()) == raw_state(model.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_distributed_checkpoint_of_tensors_on_cuda(qwen2: Trio, tmp_path: Path) -> None:
    """One rank; the ranks of test_dcp.py are on CPUs."""
    model = on_cuda(tiny_qwen2())
    nudge(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    state_dict_saver.save(state, storage_writer=DeltaStorageWriter(tmp_path / "checkpoint", qwen2.base))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    state_dict_loader.load(loaded, storage_reader=DeltaStorageReader(tmp_path / "checkpoint", qwen2.base))
    assert raw_state(loaded) == raw_state(state)
