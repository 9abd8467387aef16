"""Kernels for GPUs: on a CUDA device where there is one, else in Triton's interpreter, on CPU memory."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaweights import BaseMismatchError, DeltaError, codec, make_delta
from deltaweights.codec import floats, planes, sparse
from deltaweights.codec.ulp import FORMATS, restore
from deltaweights.torch import (
    DeltaPublisher,
    DeltaSubscriber,
    gpu,
    gpu_decode,
    load_into,
    load_state_dict,
    payloads,
)

from ..checkpoints import payload_places
from ..conftest import Trio
from .models import raw_state, saved_state

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
    monkeypatch.setattr(gpu, "_distrusted", set())
    monkeypatch.setattr("deltaweights.torch.state.CHUNK_BYTES", CHUNK_BYTES)
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


def test_a_gpu_that_cannot_be_used_is_not(small: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as without the C compiler that Triton needs."""

    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    with monkeypatch.context() as patched:
        patched.setattr(gpu, "Checksums", fail)
        gpu._passes_test.cache_clear()
        assert not gpu.is_usable(HERE)
    loaded = load_state_dict(small.delta, small.base, device=DEVICE)
    assert raw_state(loaded) == raw_state(saved_state(small.target))
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


@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_follows_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """One step, then two at once, the second of which changes one chunk only."""
    trained, follower, calls = state(), state(), watch(monkeypatch)
    with DeltaPublisher(tmp_path, trained) as publisher:
        subscriber = DeltaSubscriber(tmp_path, in_place=in_place, threads=2)
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
    with pytest.raises(BaseMismatchError, match="was changed by somebody else"):
        subscriber.sync(follower)
    assert raw_state(follower) == before
    assert sorted(calls) == [1, 3]


def test_damaged_patches_are_found_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, follower = state(), state()
    with DeltaPublisher(tmp_path, trained, anchor_base=False) as publisher:
        train(trained, 1)
        publisher.publish(1, trained)
    real = payloads.Payload.data

    def damaged(self: payloads.Payload, index: int, room: NDArray[np.uint8]) -> object:
        method, data = real(self, index, room)
        if index == 1:
            data[len(data) // 2] ^= 255
        return method, data

    before = raw_state(follower)
    monkeypatch.setattr(payloads.Payload, "data", damaged)
    with pytest.raises(DeltaError, match="Chunk 1 of tensor 'large'"):
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


# Loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Small chunks in every way: dense and sparse, of several lanes, dtypes and segments, and others."""
    folder, rng = tmp_path_factory.mktemp("gpu"), np.random.default_rng(0)

    def normal(count: int, std: float) -> Tensor:
        return torch.from_numpy(rng.standard_normal(count) * std)

    base, target = {}, {}
    for dtype, count, update in (
        (torch.bfloat16, 7000, 5e-3),
        (torch.bfloat16, 1700, 1e-3),
        (torch.float16, 4400, 1e-2),
        (torch.float8_e4m3fn, 2000, 3e-2),
        (torch.float32, 9000, 1e-4),
    ):
        name, weights = f"{str(dtype)[6:]}.{update}", normal(count, 0.02)
        base[name], target[name] = weights.to(dtype), (weights + normal(count, update)).to(dtype)
    steps = torch.from_numpy(np.repeat(rng.exponential(size=64) * 3e-3, 128)) * normal(8192, 1)
    base["segments"] = normal(8192, 0.02).bfloat16()
    target["segments"] = (base["segments"].double() + steps).bfloat16()
    base["rows"] = normal(16384, 0.02).bfloat16()
    target["rows"] = base["rows"].clone()
    target["rows"][1024:1792] = (base["rows"][1024:1792].double() + normal(768, 1e-2)).bfloat16()
    target["rows"][5] += 1
    bits = normal(12_000, 1).bfloat16().view(torch.int16)
    low = torch.from_numpy(rng.choice(12_000, 700, replace=False))
    base["low"], target["low"] = bits.clone().view(torch.bfloat16), bits.clone().view(torch.bfloat16)
    for tensors in (base, target):
        tensors["low"].view(torch.int16)[low] = torch.from_numpy(rng.integers(0, 1 << 13, 700, np.int16))
    for name, dtype in (("few", torch.bfloat16), ("wide few", torch.float32)):
        base[name] = normal(8192, 0.02).to(dtype)
        target[name] = base[name].clone()
        target[name][::700] *= 1.01
    base["same"] = target["same"] = normal(4000, 1).bfloat16()
    base["resized"], target["resized"] = normal(900, 1).bfloat16(), normal(1500, 1).bfloat16()
    target["resized"][:900] = base["resized"] * 1.01
    base["resized"], target["resized"] = base["resized"].view(9, 100), target["resized"].view(15, 100)
    base["converted"] = normal(4000, 1).float()
    target["converted"] = (base["converted"] * 1.001).bfloat16()
    target["added"] = normal(4000, 1).bfloat16()
    base["integers"], target["integers"] = torch.arange(3000), torch.arange(1, 3001)
    return write_trio(folder, base, target)


def write_trio(folder: Path, base: State, target: State) -> Trio:
    for side, tensors in (("base", base), ("target", target)):
        (folder / side).mkdir()
        save_file(tensors, folder / side / "model.safetensors")
    make_delta(folder / "base", folder / "target", folder / "delta", chunk_bytes=1 << 15)
    return Trio(folder / "base", folder / "target", folder / "delta")


def count_staged(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, bool] | str]:
    """How many chunks are decoded on the device: by dtype, lanes, whether some are chosen; others by what."""
    counts: Counter[tuple[str, int, bool] | str] = Counter()
    real = gpu_decode.decode

    def counted(staged: list[gpu_decode.Staged]) -> object:
        failed, is_strange = real(staged)
        counts["failed"] += len(failed)
        for one in staged:
            for chunk in one.chunks:
                if chunk.run:
                    counts[one.recipe.info.dtype, chunk.run.kind.lanes, chunk.run.kind.is_chosen] += 1
                counts["patched" if chunk.patch else "other"] += 1
        return failed, is_strange

    monkeypatch.setattr(gpu_decode, "decode", counted)
    return counts


def test_a_target_is_decoded_on_its_device(pair: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_staged(monkeypatch)
    monkeypatch.setattr(gpu_decode, "_MOST_BYTES", 1 << 16)  # several times
    loaded = load_state_dict(pair.delta, pair.base, device=DEVICE, threads=2)
    assert raw_state(loaded) == raw_state(saved_state(pair.target))
    assert counts == {
        ("BF16", 16, False): 1,
        ("BF16", 16, True): 1,
        ("BF16", 64, False): 2,
        ("F16", 64, False): 1,
        ("F8_E4M3", 16, False): 1,
        "patched": 3,
        "other": 6,
        "failed": 0,
    }


def test_exceptions_count_from_the_base() -> None:
    """Also where the run has moved the same elements. No encoder of ours writes such chunks."""
    rng, form = np.random.default_rng(0), FORMATS["BF16"]
    base = rng.integers(0x3C00, 0x3E00, 2000, np.uint16)
    moved = base + rng.integers(0, 99, 2000, np.uint16)
    places, distances = np.arange(0, 2000, 40), rng.integers(0, 1 << 17, 50, np.uint32)
    delta = floats.encode_delta(base.view(np.uint8), moved.view(np.uint8), form)
    assert delta
    gaps = (np.diff(places, prepend=-1) - 1).astype(np.uint32)
    parts = [struct.pack("<hBI", 255, 1, 50), planes.put_plane(np.full(1, 255, np.uint8))]
    data = b"".join([*parts, *sparse._put_exceptions(gaps, distances), delta])
    expected = np.empty(4000, np.uint8)
    codec.decode_chunk(codec.Method.SPARSE, data, base.view(np.uint8), "BF16", expected)
    records = np.zeros(1, codec.RECORD)
    records["base"], records["target"] = codec.checksum(base.view(np.uint8)), codec.checksum(expected)
    recipe: Any = SimpleNamespace(info=SimpleNamespace(dtype="BF16"), table=(records, None))
    room = np.empty(1 << 20, np.uint8)
    packed = gpu_decode._Packed(room)
    chunk = gpu_decode._read_chunk(
        recipe, 0, (0, 4000), codec.Method.SPARSE, np.frombuffer(data, np.uint8), packed
    )
    assert chunk
    assert chunk.run
    memory = on_device(base.view(np.uint8))
    staged = gpu_decode.Staged(recipe, memory, on_device(room[: packed.size]), [chunk])
    assert gpu_decode.decode([staged]) == ([], False)
    assert memory.cpu().numpy().tobytes() == expected.tobytes()


@pytest.fixture
def small(tmp_path: Path) -> Trio:
    """Two chunks in 16 lanes."""
    weights = {name: torch.randn(1200) for name in ("first", "second")}
    moved = {name: (tensor + 0.1 * torch.randn(1200)).bfloat16() for name, tensor in weights.items()}
    return write_trio(tmp_path, {name: tensor.bfloat16() for name, tensor in weights.items()}, moved)


def test_a_wrong_base_is_refused(small: Trio) -> None:
    """As by a load to the CPU, and the GPU is not blamed."""
    state = saved_state(small.base)
    state["second"].view(torch.int16)[700] ^= 1
    save_file(state, small.base / "model.safetensors")
    with pytest.raises(BaseMismatchError, match="'second'"):
        load_state_dict(small.delta, small.base, device=DEVICE)
    assert gpu.is_usable(HERE)


def test_a_damaged_delta_is_refused(small: Trio) -> None:
    (shard,) = small.delta.glob("*.safetensors")
    (place,) = (place for place in payload_places(small.delta) if place.name == "second")
    data = bytearray(shard.read_bytes())
    data[(place.start + place.end) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DeltaError, match="Tensor 'second'"):
        load_state_dict(small.delta, small.base, device=DEVICE)
    assert gpu.is_usable(HERE)


def test_a_gpu_that_computes_wrong_is_found_out(
    small: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it made wrong is decoded without it, and so is all that comes after."""
    monkeypatch.setattr(gpu_decode, "_MOST_BYTES", 1 << 11)
    real, calls = gpu_decode._decode_runs, [0]

    def wrong(*args: Any) -> Any:
        calls[0] += 1
        ended = real(*args)
        for one, chunk in args[0]:
            one.data[chunk.start] ^= 1
        return ended

    monkeypatch.setattr(gpu_decode, "_decode_runs", wrong)
    loaded = load_state_dict(small.delta, small.base, device=DEVICE, threads=1)
    assert raw_state(loaded) == raw_state(saved_state(small.target))
    assert "gave wrong results" in caplog.text
    assert calls[0] == 1
    assert not gpu.is_usable(HERE)


#: Compile every kernel as it is launched, for a processor that need not be here.
_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltaweights.torch import gpu_kernels as kernels

target = GPUTarget("cuda", int(sys.argv[1]), 32)
plans, numbers = {"plans": "*i64", "shift": "i32", "mask": "i32"}, ("addresses", "lengths", "keys", "start")
for kernel, types, constants in [
    (kernels.xxh3_accumulators, dict.fromkeys((*numbers, "accumulators"), "*i64"), {}),
    (kernels.choose, plans, {"width": 16}),
    (kernels.put, {"elements": "*i16", "places": "*i32", "others": "*i16", "count": "i32"}, {}),
    *(
        (
            kernels.patch,
            {"elements": f"*i{w}", "places": "*i32", "distances": "*i32", "others": f"*i{w}", "count": "i32"},
            {"width": w, "is_moved": True},
        )
        for w in (8, 16, 32)
    ),
    *(
        (
            kernels.decode_runs,
            plans | {"first_states": "*i32", "ended": "*i32"},
            {"width": width, "lanes": lanes, "is_chosen": is_chosen},
        )
        for width, lanes, is_chosen in ((8, 16, False), (16, 64, False), (16, 64, True))
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


@pytest.mark.parametrize("place", ["_copy", "_decode_runs"])
def test_a_full_gpu_is_loaded_chunk_by_chunk(
    small: Trio, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    calls = [0]

    def full(*args: Any) -> Any:
        calls[0] += 1
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_decode, place, full)
    loaded = load_state_dict(small.delta, small.base, device=DEVICE)
    assert raw_state(loaded) == raw_state(saved_state(small.target))
    assert calls[0]
    assert gpu.is_usable(HERE)


def test_parameters_that_overlap_are_not_decoded_side_by_side(tmp_path: Path) -> None:
    """Such as views of one buffer in several shapes: each would be the other's base."""
    weights = torch.randn(1200)
    moved = (weights + 0.1 * torch.randn(1200)).bfloat16()
    base = {"flat": weights.bfloat16(), "rows": weights.bfloat16().view(12, 100)}
    trio = write_trio(tmp_path, base, {"flat": moved, "rows": moved.clone().view(12, 100)})
    model = nn.Module()
    memory = torch.zeros(1200, dtype=torch.bfloat16, device=DEVICE)
    model.flat, model.rows = nn.Parameter(memory), nn.Parameter(memory.view(12, 100))
    load_into(model, trio.delta, trio.base)
    assert raw_state(model.state_dict()) == raw_state(saved_state(trio.target))
    assert gpu.is_usable(HERE)
