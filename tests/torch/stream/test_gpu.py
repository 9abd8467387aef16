"""Kernels for GPUs: on a CUDA device where there is one, else in Triton's interpreter, on CPU memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from deltaweights import BaseMismatchError, DeltaError, codec
from deltaweights.codec.methods.ulp import FORMATS, restore
from deltaweights.torch import DeltaPublisher, DeltaSubscriber
from deltaweights.torch.stream import gpu, payloads

from ..tiny_models import raw_state

pytest.importorskip("triton", reason="there is no Triton for this machine")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: As tensors name it.
HERE = torch.empty(0, device=DEVICE).device
#: Of streams here, for Triton's interpreter is slow.
CHUNK_BYTES = 1 << 15
_few = settings(max_examples=20, deadline=None)


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_runs_kernels", lambda device: device.type == DEVICE.type)
    monkeypatch.setattr("deltaweights.torch.stream.state.CHUNK_BYTES", CHUNK_BYTES)
    if DEVICE.type == "cpu":
        one_at_a_time = threading.RLock()  # as Triton's interpreter wants it
        monkeypatch.setattr(gpu, "on", lambda device: one_at_a_time)


def on_device(data: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(data.copy()).to(DEVICE)


@given(st.lists(st.integers(31, 400), min_size=1, max_size=5), st.integers(0, 2**32))
@_few
def test_checksums_are_those_of_xxhash(words: list[int], seed: int) -> None:
    """Lengths on all sides of stripes (64 bytes) and blocks (1024)."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, 8 * sum(words), np.uint8)
    ends = np.cumsum(8 * np.array(words)).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    memory = on_device(data)
    found = gpu.Checksums(DEVICE, [gpu.addresses(memory, *span) for span in spans])
    assert found.values().tolist() == [
        xxhash.xxh3_64_intdigest(data[start:end].tobytes()) for start, end in spans
    ]


def test_what_the_kernel_cannot_read_is_not_taken() -> None:
    data = torch.zeros(4096, dtype=torch.uint8, device=DEVICE)
    assert gpu.can_check(data, 0, 4096)
    assert not gpu.can_check(data, 0, 240)
    assert not gpu.can_check(data, 4, 1028)
    assert not gpu.can_check(data, 0, 1028)


@given(st.sampled_from(sorted(set(FORMATS) - {"F64"})), st.integers(1, 3000), st.integers(0, 2**32))
@_few
def test_patches_move_elements_as_the_codec_does(dtype: str, count: int, seed: int) -> None:
    form, rng = FORMATS[dtype], np.random.default_rng(seed)
    before = rng.integers(0, 256, form.itemsize * 2 * count, np.uint8).view(form.dtype)
    places = np.sort(rng.choice(2 * count, count, replace=False))
    distances = rng.integers(0, 1 << 32, count, np.uint32)  # they count modulo 2^N
    data = on_device(before.view(np.uint8))
    cut = count // 3  # two patches, the second from the third element on that the first has not
    start = int(places[cut])
    overwritten = gpu.patch(
        data,
        [
            (0, codec.Patch(places[:cut].astype(np.int32), distances[:cut], form.itemsize)),
            (
                start * form.itemsize,
                codec.Patch((places[cut:] - start).astype(np.int32), distances[cut:], form.itemsize),
            ),
        ],
    )
    expected = before.copy()
    expected[places] = restore(before[places], distances.astype(form.dtype))
    assert data.cpu().numpy().tobytes() == expected.tobytes()
    overwritten.put()
    assert data.cpu().numpy().tobytes() == before.tobytes()


def test_which_devices_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert gpu._has_triton()
    assert gpu._runs_kernels(torch.device("cuda:0"))
    assert not gpu.is_usable(torch.device("cpu"))
    assert not gpu.is_usable(torch.device("meta"))


def test_a_gpu_that_cannot_be_used_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as without the C compiler that Triton needs."""

    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    with monkeypatch.context() as patched:
        patched.setattr(gpu, "Checksums", fail)
        gpu._passes_test.cache_clear()
        assert not gpu.is_usable(HERE)
    gpu._passes_test.cache_clear()
    assert gpu.is_usable(HERE)


# Streams ------------------------------------------------------------------------------------------------

State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    """Two chunks and a half of bf16, others of float32 and float16 (at no address that a kernel reads), one
    too small, and integers."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "large": torch.randn(5 * CHUNK_BYTES // 4, generator=generator).to(torch.bfloat16),
        "wide": torch.randn(40, 100, generator=generator),
        "half": torch.randn(9000, generator=generator).to(torch.float16)[1:],
        "small": torch.randn(7, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(seed),
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def train(tensors: State, seed: int, share: float = 0.003) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name == "count":
            tensor.add_(1)
        else:
            moved = (torch.rand(tensor.shape, generator=generator) < share).to(DEVICE)
            tensor[moved] *= 1.01


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each call patches."""
    calls: list[int] = []
    real = gpu.patch

    def counted(data: Tensor, patches: list[tuple[int, codec.Patch]]) -> gpu.Elements:
        calls.append(len(patches))
        return real(data, patches)

    monkeypatch.setattr(gpu, "patch", counted)
    return calls


def test_a_state_follows_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, then two at once, the second of which changes one chunk only."""
    trained, follower, calls = state(), state(), watch(monkeypatch)
    with DeltaPublisher(tmp_path, trained) as publisher:
        subscriber = DeltaSubscriber(tmp_path, threads=2)
        train(trained, 1)
        publisher.publish(1, trained)
        subscriber.sync(follower)
        assert raw_state(follower) == raw_state(trained)
        assert sorted(calls) == [1, 3]
        train(trained, 2)
        publisher.publish(2, trained)
        trained["large"][5] += 1
        publisher.publish(3, trained)
        calls.clear()
        assert subscriber.sync(follower).updates == 2
    assert raw_state(follower) == raw_state(trained)
    assert sorted(calls) == [1, 1, 3]


@pytest.mark.parametrize("share", [0.04, 0.5])
def test_chunks_that_are_no_patches_are_decoded_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    trained, follower, calls = state(), state(), watch(monkeypatch)
    with DeltaPublisher(tmp_path, trained) as publisher:
        train(trained, 1, share)
        publisher.publish(1, trained)
    DeltaSubscriber(tmp_path).sync(follower)
    assert raw_state(follower) == raw_state(trained)
    assert not calls


def test_a_chunk_that_comes_out_wrong_leaves_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is found out without the GPU; whatever it patched is put back."""
    trained, follower, calls = state(), state(), watch(monkeypatch)
    with DeltaPublisher(tmp_path, trained, anchor_base=False) as publisher:
        subscriber = DeltaSubscriber(tmp_path)
        subscriber.sync(follower)
        train(trained, 1)
        publisher.publish(1, trained)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    follower["large"].data.view(torch.int16)[-3] ^= 1  # behind torch's back: no version is counted
    before = raw_state(follower)
    with pytest.raises(BaseMismatchError, match="was changed by other code"):
        subscriber.sync(follower)
    assert raw_state(follower) == before
    assert sorted(calls) == [1, 3]


def test_damaged_patches_are_found_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, follower = state(), state()
    with DeltaPublisher(tmp_path, trained, anchor_base=False) as publisher:
        train(trained, 1)
        publisher.publish(1, trained)
    real = payloads.StreamPayload.chunk

    def damaged(self: payloads.StreamPayload, index: int) -> object:
        method, data = real(self, index)
        if index == 1:
            data[len(data) // 2] ^= 255
        return method, data

    before = raw_state(follower)
    monkeypatch.setattr(payloads.StreamPayload, "chunk", damaged)
    with pytest.raises(DeltaError, match="Tensor 'large': Chunk 1"):
        DeltaSubscriber(tmp_path).sync(follower)
    assert raw_state(follower) == before


def test_a_gpu_without_memory_leaves_the_work_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, follower = state(), state()
    real, calls = gpu.patch, [0]

    def full(*args: Any) -> gpu.Elements:
        calls[0] += 1
        if calls[0] > 1:
            raise torch.cuda.OutOfMemoryError
        return real(*args)

    with DeltaPublisher(tmp_path, trained) as publisher:
        train(trained, 1)
        publisher.publish(1, trained)
    monkeypatch.setattr(gpu, "patch", full)
    DeltaSubscriber(tmp_path, threads=1).sync(follower)
    assert raw_state(follower) == raw_state(trained)
    assert calls[0] == 2


#: Compile every kernel as it is launched, for a processor that need not be here.
_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltaweights.torch.stream import gpu_kernels

target = GPUTarget("cuda", int(sys.argv[1]), 32)
numbers = ("addresses", "lengths", "keys", "start")
for kernel, types, constants in [
    (gpu_kernels.xxh3_accumulators, dict.fromkeys((*numbers, "accumulators"), "*i64"), {}),
    (gpu_kernels.put, {"elements": "*i16", "places": "*i32", "others": "*i16", "count": "i32"}, {}),
    *(
        (
            gpu_kernels.patch,
            {"elements": f"*i{w}", "places": "*i32", "distances": "*i32", "others": f"*i{w}", "count": "i32"},
            {"width": w},
        )
        for w in (8, 16, 32)
    ),
]:
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
    made = triton.compile(source, target=target, options={"num_warps": 1})
    assert made.asm["cubin"]
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(tmp_path: Path, capability: int) -> None:
    """The interpreter takes more than the compiler does. That needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", _COMPILE, str(capability)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
