"""Two phases: what prepare holds, and what commit writes, all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    DiskSpaceError,
    codec,
)
from deltaweights.torch import Change, DeltaPublisher, DeltaSubscriber
from deltaweights.torch.stream.following import prepared as prepared_module
from deltaweights.torch.stream.records import CHUNK_BYTES
from deltaweights.torch.stream.state import StateTensor
from deltaweights.torch.tensors import DTYPES

from .streams import Net, State, bits, flip, streamed, train


def apply(changes: list[Change], state: State) -> None:
    """As an engine would do it, whose weights lie flat in memory of its own."""
    for change in changes:
        words = state[change.name].reshape(-1).view(torch.uint8).numpy().reshape(-1, change.dtype.itemsize)
        values = change.values.view(torch.uint8).numpy().reshape(-1, change.dtype.itemsize)
        assert change.shape == tuple(state[change.name].shape)
        if change.indices is None:
            words[:] = values
        else:
            assert change.indices.dtype == torch.int64
            assert (change.indices.diff() > 0).all()
            words[change.indices.numpy()] = values


def clone(state: State | nn.Module) -> State:
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bf16(words: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


#: How many of a thousand elements a step changes.
shares = st.sampled_from([0, 1, 15, 100, 1000])


@settings(max_examples=25)
@given(
    code=st.sampled_from(sorted(DTYPES)), steps=st.lists(shares, min_size=1, max_size=3), late=st.booleans()
)
def test_any_elements_are_held_and_written(
    tmp_path_factory: pytest.TempPathFactory, code: str, steps: list[int], late: bool
) -> None:
    """NaNs with a payload and -0.0 among them. What a commit writes, the changes alone give too; until then
    the model is as it was."""
    place = tmp_path_factory.mktemp("any") / "s"
    dtype, rng = DTYPES[code], np.random.default_rng(sum(steps))

    def random(count: int) -> np.ndarray[Any, Any]:
        return rng.integers(0, 2 if code == "BOOL" else 256, (count, dtype.itemsize), np.uint8)

    now = random(3000)
    model = {"w": torch.from_numpy(now).view(dtype)[:, 0]}
    engine = clone(model) if not late else {"w": torch.from_numpy(random(3000)).view(dtype)[:, 0]}
    with DeltaPublisher(place, model) as publisher:
        subscriber = DeltaSubscriber(place)
        for number, share in enumerate(steps, 1):
            moved = rng.integers(0, 1000, len(now)) < share
            now[moved] = random(int(moved.sum()))
            publisher.publish(number, model)
        before, mirror = bits(engine), clone(engine)
        with subscriber.prepare(engine) as prepared:
            assert bits(engine) == before
            assert prepared.nbytes <= engine["w"].nbytes
            assert (prepared.state.step, prepared.from_anchor) == (len(steps), late)
            apply(list(prepared.changes()), mirror)
            assert prepared.commit().step == len(steps)
            assert bits(engine) == bits(mirror) == bits(model)
            apply(list(prepared.changes()), mirror)
            assert bits(mirror) == bits(model)
        assert subscriber.sync(engine).updates == 0
    shutil.rmtree(place)


@pytest.mark.parametrize("missed", [1, 2])
def test_six_bytes_are_held_for_each_weight_that_changes(tmp_path: Path, missed: int) -> None:
    """Of those that change back, none."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 0x7F00, CHUNK_BYTES, np.uint16)  # two chunks
    model, engine = {"w": bf16(words)}, {"w": bf16(words.copy())}
    with DeltaPublisher(tmp_path / "s", model, anchor_base=False) as publisher:
        for step in range(1, missed + 1):
            words[7] ^= 1
            words[rng.choice(len(words), 1000, replace=False)] ^= 1
            publisher.publish(step, model)
        with DeltaSubscriber(tmp_path / "s").prepare(engine) as prepared:
            changed = int((engine["w"].view(torch.int16) != model["w"].view(torch.int16)).sum())
            assert prepared.updates == missed
            assert prepared.nbytes == 6 * changed
            (change,) = prepared.changes()
            assert change.values.numel() == changed
        assert prepared.nbytes == 0


def test_what_many_steps_change_is_held_whole_if_that_is_less(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 0x7F00, CHUNK_BYTES // 2, np.uint16)  # one chunk
    model = {"w": bf16(words)}
    engine, other = {"w": model["w"].clone()}, {"w": model["w"].clone()}
    with DeltaPublisher(tmp_path / "s", model, anchor_base=False) as publisher:
        for step in range(1, 31):
            words[rng.choice(len(words), len(words) // 60, replace=False)] += 1
            publisher.publish(step, model)
    with DeltaSubscriber(tmp_path / "s").prepare(engine) as prepared:
        (change,) = prepared.changes()
        assert (prepared.updates, prepared.nbytes, change.indices) == (30, CHUNK_BYTES, None)
        prepared.commit()
    DeltaSubscriber(tmp_path / "s").sync(other)
    assert bits(engine) == bits(other) == bits(model)


def test_nothing_is_needed_after_prepare(tmp_path: Path) -> None:
    """Neither files, nor the transport, nor a decoder."""
    model, engine, late = Net(), Net(), Net(9)
    stream = streamed(tmp_path, model, anchor_every=1)
    both = [DeltaSubscriber(stream).prepare(each) for each in (engine, late)]
    shutil.rmtree(stream)
    for prepared in both:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("decode_chunk", "patch_chunk", "checksum"):
                patch.setattr(codec, name, None)
            assert prepared.commit().step == 2
    assert bits(engine) == bits(late) == bits(model)


def test_the_model_is_not_written_to_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, steps=1)
    train(engine.embed, 7, share=0.9)  # so that an anchor leads on: dense chunks
    for each in (engine, Net()):
        looks: list[dict[str, bytes]] = []
        before, checksum = bits(each), codec.checksum

        def watched(data: Any, each: nn.Module = each, real: Any = checksum, looks: Any = looks) -> int:
            looks.append(bits(each))
            return int(real(data))

        with monkeypatch.context() as patch:
            patch.setattr(codec, "checksum", watched)
            DeltaSubscriber(stream, threads=1).prepare(each)
        assert len(looks) > 5
        assert all(look == before for look in looks)


def test_sync_holds_no_copy_of_a_model_that_an_anchor_replaces(tmp_path: Path) -> None:
    state = {"w": torch.randn(24 << 20).to(torch.bfloat16)}  # 48 MiB
    with DeltaPublisher(tmp_path / "s", state):
        pass
    engine = {"w": torch.zeros_like(state["w"])}
    subscriber = DeltaSubscriber(tmp_path / "s", threads=1)
    subscriber.prepare(engine).close()  # so that working memory is there
    tracemalloc.start()
    try:
        assert subscriber.sync(engine).from_anchor
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert bits(engine) == bits(state)


def test_changes_have_the_names_of_the_stream(tmp_path: Path) -> None:
    """Tied ones each, those that only the model has not."""
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, steps=1)
    tensors = engine.state_dict()
    with DeltaSubscriber(stream).prepare({**tensors, "other": tensors["embed.weight"]}) as prepared:
        changes = {change.name: change for change in prepared.changes()}
        assert sorted(changes) == [
            name for name, data in sorted(bits(model).items()) if data != bits(Net())[name]
        ]
        assert torch.equal(changes["head.weight"].values, changes["embed.weight"].values)
        assert changes["count"].shape == ()
        assert changes["count"].indices is None


def test_tensors_that_are_not_in_row_major_order_are_written(tmp_path: Path) -> None:
    base = torch.arange(4000.0).reshape(40, 100)
    engine = {"t": torch.zeros(100, 40).t().copy_(base), "strided": torch.zeros(80, 100)[::2].copy_(base)}
    state = {"t": base + 1, "strided": base * 2}
    with DeltaPublisher(tmp_path / "s", {"t": base, "strided": base.clone()}) as publisher:
        publisher.publish(1, state)
    prepared = DeltaSubscriber(tmp_path / "s").prepare(engine)
    assert torch.equal(engine["t"], base)
    assert prepared.nbytes >= 2 * base.nbytes  # with the copies
    prepared.commit()
    assert torch.equal(engine["t"], state["t"])
    assert torch.equal(engine["strided"], state["strided"])


@pytest.mark.parametrize("is_inference", [False, True])
def test_tensors_elsewhere_and_of_inference_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_inference: bool
) -> None:
    """As on other devices, where places and values are uploaded; from threads that know of no inference."""
    monkeypatch.setattr(StateTensor, "is_on_cpu", False)
    rng = np.random.default_rng(0)
    words = rng.integers(0, 0x7F00, 3 * CHUNK_BYTES // 2, np.uint16)  # three chunks
    model = {"w": bf16(words), "t": torch.arange(60.0)}
    with torch.inference_mode(is_inference):
        engine = {"w": model["w"].clone(), "t": model["t"].view(6, 10).t().contiguous().t()}
    model["t"] = model["t"].view(6, 10)
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        subscriber = DeltaSubscriber(tmp_path / "s")
        for step in (1, 2):
            words[:CHUNK_BYTES][rng.choice(CHUNK_BYTES, 100)] ^= 1
            words[CHUNK_BYTES:] ^= rng.integers(0, 4, CHUNK_BYTES // 2, np.uint16)  # the third one whole
            model["t"] += 1
            publisher.publish(step, model)
            subscriber.prepare(engine).commit()
            assert torch.equal(engine["w"].view(torch.int16), model["w"].view(torch.int16))
            assert torch.equal(engine["t"], model["t"])
            assert engine["t"].stride() == (1, 6)


def test_tensors_whose_elements_share_memory_are_refused(tmp_path: Path) -> None:
    """They could not have the stream's values, or torch would refuse to write them after others."""
    base = {"a": torch.zeros(4, 6), "b": torch.zeros(6, 4)}
    with DeltaPublisher(tmp_path / "s", base) as publisher:
        publisher.publish(1, {"a": torch.ones(4, 6), "b": torch.ones(6, 4) * 2})
    subscriber, memory = DeltaSubscriber(tmp_path / "s"), torch.zeros(60)
    for a, b in (
        (memory[:24].view(4, 6), memory[:24].view(4, 6).t()),
        (torch.zeros(6).expand(4, 6), torch.zeros(6, 4)),
        (memory.as_strided((4, 6), (2, 1)), torch.zeros(6, 4)),
        (memory.as_strided((4, 6), (10, 1)), memory.as_strided((6, 4), (10, 1), 5)),
    ):
        with pytest.raises(CheckpointError, match="same memory"):
            subscriber.prepare({"a": a, "b": b})
    beside = {"a": memory.as_strided((4, 6), (10, 1)), "b": memory.as_strided((6, 4), (10, 1), 6)}
    subscriber.sync(beside)
    assert (beside["a"] == 1).all()
    assert (beside["b"] == 2).all()


# All or nothing ----------------------------------------------------------------------------------------


def test_a_commit_that_is_interrupted_finishes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(streamed(tmp_path, model), threads=1)
    prepared, put, calls = subscriber.prepare(engine), StateTensor.put, []

    def slow(self: StateTensor, *arguments: Any) -> None:
        calls.append(self.name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        put(self, *arguments)

    monkeypatch.setattr(StateTensor, "put", slow)
    with pytest.raises(KeyboardInterrupt):
        prepared.commit()
    assert len(calls) > 2
    assert bits(engine) == bits(model)
    assert subscriber.sync(engine).updates == 0


def test_a_commit_that_fails_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same Prepared, or by a new one, which notices what was written."""
    model = Net()
    stream = streamed(tmp_path, model, anchor_every=1)
    for again in (True, False):
        calls: list[str] = []
        engine, subscriber = Net(), DeltaSubscriber(stream, threads=1)
        prepared, put = subscriber.prepare(engine), StateTensor.put

        def failing(self: StateTensor, *arguments: Any, real: Any = put, calls: Any = calls) -> None:
            calls.append(self.name)
            if len(calls) == 3:
                raise MemoryError
            real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(StateTensor, "put", failing)
            with pytest.raises(MemoryError):
                prepared.commit()
        assert bits(engine) not in (bits(Net()), bits(model))
        report = prepared.commit() if again else subscriber.sync(engine)
        assert report.from_anchor == (not again)
        assert bits(engine) == bits(model)


def changed(engine: State) -> None:
    engine["norm.weight"].add_(1)


def replaced(engine: State) -> None:
    engine["norm.weight"] = engine["norm.weight"].clone()


def resized(engine: State) -> None:
    engine["norm.weight"] = torch.zeros(34)


def removed(engine: State) -> None:
    del engine["norm.weight"]


@pytest.mark.parametrize("change", [changed, replaced, resized, removed])
def test_a_model_that_was_changed_meanwhile_is_not_written_to(
    tmp_path: Path, change: Callable[[State], None]
) -> None:
    engine: State = dict(Net().state_dict())
    prepared = DeltaSubscriber(streamed(tmp_path, Net())).prepare(engine)
    change(engine)
    before = bits(engine)
    with pytest.raises(BaseMismatchError, match="another state of the model"):
        prepared.commit()
    assert bits(engine) == before


def test_a_prepared_is_committed_once_and_before_any_other(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(streamed(tmp_path, model))
    first, second = subscriber.prepare(engine, step=1), subscriber.prepare(engine)
    elsewhere = DeltaSubscriber(tmp_path / "s").prepare(engine)
    second.commit()
    for stale in (first, elsewhere):
        with pytest.raises(BaseMismatchError, match="another state of the model"):
            stale.commit()
    with pytest.raises(DeltaWeightsError, match="committed already"):
        second.commit()
    second.close()
    with pytest.raises(DeltaWeightsError, match="was released"):
        second.commit()
    with pytest.raises(DeltaWeightsError, match="was released"):
        list(second.changes())
    assert bits(engine) == bits(model)
    with subscriber.prepare(engine) as nothing, subscriber.prepare(engine) as nothing_either:
        assert not list(nothing.changes())
        assert nothing_either.commit().step == 2
        assert (nothing.nbytes, nothing.updates, nothing.commit().step) == (0, 0, 2)


@pytest.mark.parametrize("kind", ["update", "anchor"])
def test_no_damaged_byte_is_prepared(tmp_path: Path, kind: str) -> None:
    """The next step is fine, and leads there."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 0x7F00, 2000, np.uint16)
    model, engine = {"w": bf16(words)}, {"w": bf16(words.copy())}
    stream, copies = tmp_path / "s", tmp_path / "copies"
    with DeltaPublisher(stream, model, anchor_base=kind == "anchor") as publisher:
        words[::100] ^= 1
        publisher.publish(1, model)
        (payload,) = stream.glob(f"*.{kind}.safetensors")
        if kind == "anchor":
            engine["w"].zero_()
        before = bits(engine)
        for place in np.linspace(0, 0.9999, 25):
            copy = shutil.copytree(stream, copies / str(place))
            flip(copy / payload.name, place)
            with pytest.raises(DeltaError):
                DeltaSubscriber(copy).prepare(engine)
        flip(payload, 0.5)
        subscriber = DeltaSubscriber(stream)
        with pytest.raises(DeltaError):
            subscriber.prepare(engine)
        assert bits(engine) == before
        words[::90] ^= 1
        publisher.publish(2, model, anchor=True)
        assert subscriber.prepare(engine).commit().step == 2
        assert bits(engine) == bits(model)


def test_damage_that_no_digest_of_a_file_shows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each chunk's checksum."""
    from deltaweights.torch.stream.payloads import StreamPayload

    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, anchor_base=False)
    before, real, hit = bits(engine), StreamPayload.chunk, []

    def damaged(self: StreamPayload, index: int) -> Any:
        method, data = real(self, index)
        if (self.name, index) == ("embed.weight", 1):
            data[len(data) // 2] ^= 255
            hit.append(index)
        return method, data

    monkeypatch.setattr(StreamPayload, "chunk", damaged)
    subscriber = DeltaSubscriber(stream)
    with pytest.raises(DeltaError, match=r"Tensor 'embed.weight': Chunk 1"):
        subscriber.prepare(engine)
    assert hit
    assert bits(engine) == before


def test_another_tensor_at_the_same_address_is_looked_at(tmp_path: Path) -> None:
    """As after an engine has dropped a model and loaded it again: with as many writes, as torch counts."""
    memory = np.zeros(100, np.float32)
    with DeltaPublisher(tmp_path / "s", {"w": torch.zeros(100)}) as publisher:
        publisher.publish(1, {"w": torch.ones(100)})
    subscriber = DeltaSubscriber(tmp_path / "s")
    first = {"w": torch.from_numpy(memory)}
    subscriber.sync(first)  # one write
    del first
    second = {"w": torch.from_numpy(memory)}
    second["w"].zero_()  # one write
    assert subscriber.sync(second).updates == 1
    assert memory.min() == 1


def test_what_is_written_in_inference_mode_is_noticed(tmp_path: Path) -> None:
    """Torch does not count it."""
    with DeltaPublisher(tmp_path / "s", {"w": torch.zeros(100)}) as publisher:
        publisher.publish(1, {"w": torch.ones(100)})
    subscriber = DeltaSubscriber(tmp_path / "s")
    with torch.inference_mode():
        engine, mirror = {"w": torch.zeros(100)}, subscriber.empty_state()
        for _ in range(2):
            engine["w"].zero_()
            assert subscriber.sync(engine).updates == 1
            assert engine["w"].min() == 1
    assert not mirror["w"].is_inference()  # so that its bytes need not be read each time


def test_wherever_a_commit_is_interrupted_all_is_written_or_nothing(tmp_path: Path) -> None:
    """An interrupt is raised at each line in turn, also of the standard library, such as while a thread
    starts."""
    old, new = {"w": torch.zeros(100), "v": torch.zeros(9)}, {"w": torch.ones(100), "v": torch.ones(9)}
    with DeltaPublisher(tmp_path / "s", old) as publisher:
        publisher.publish(1, new)
    subscriber = DeltaSubscriber(tmp_path / "s", threads=1)
    traced = {prepared_module.__file__, threading.__file__}
    engines, results, before = [], [], sys.gettrace()
    lines = last = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename in traced and event == "line":
            lines += 1
            if lines == last:
                raise KeyboardInterrupt
        return trace

    while lines == last:
        lines, last = 0, last + 1
        engines.append(clone(old))
        prepared = subscriber.prepare(engines[-1])
        sys.settrace(trace)
        try:
            prepared.commit()
        except KeyboardInterrupt:
            sys.settrace(before)
            prepared.close()
        finally:
            sys.settrace(before)
        results.append(bits(engines[-1]))
    assert results[0] == bits(old)
    assert results[-1] == bits(new)
    assert all(found in (bits(old), bits(new)) for found in results)
    assert list(map(bits, engines)) == results  # nothing was written afterwards


def test_what_is_closed_meanwhile_is_not_taken_for_all_that_changes(tmp_path: Path) -> None:
    prepared = DeltaSubscriber(streamed(tmp_path, Net())).prepare(Net())
    changes = prepared.changes()
    next(changes)
    prepared.close()
    with pytest.raises(DeltaWeightsError, match="was released"):
        next(changes)


def test_nothing_is_released_or_written_beside_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A with-block that ends, or another commit, in another thread."""
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(streamed(tmp_path, model), threads=1)
    first, second = subscriber.prepare(engine), subscriber.prepare(engine, step=1)
    begun, put = threading.Event(), StateTensor.put

    def slow(self: StateTensor, *arguments: Any) -> None:
        begun.set()
        time.sleep(0.02)
        put(self, *arguments)

    monkeypatch.setattr(StateTensor, "put", slow)
    with ThreadPoolExecutor(3) as pool:
        committed = pool.submit(first.commit)
        begun.wait()
        closed, stale = pool.submit(first.close), pool.submit(second.commit)
        assert committed.result().updates == 2
        closed.result()
        with pytest.raises(BaseMismatchError, match="another state of the model"):
            stale.result()
    assert bits(engine) == bits(model)


def test_what_other_code_wrote_does_not_stop_a_subscriber_for_good(tmp_path: Path) -> None:
    """The base is loaded again by writes that torch does not count, as engines' loaders make them."""
    base = {"w": torch.zeros(100)}
    engine = clone(base)
    with DeltaPublisher(tmp_path / "s", base, anchor_base=False) as publisher:
        subscriber = DeltaSubscriber(tmp_path / "s")
        for step in (1, 2):
            publisher.publish(step, {"w": torch.full((100,), float(step))})
            assert subscriber.sync(engine).updates == step
            assert (engine["w"] == step).all()
            engine["w"].data.copy_(base["w"])
        publisher.publish(3, {"w": torch.full((100,), 3.0)})
        engine["w"].data[5] = 7
        with pytest.raises(BaseMismatchError, match="'w' was changed by other code"):
            subscriber.sync(engine)


def test_a_local_stream_needs_no_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers whose root cannot be written to. Else there is one of our errors."""
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(DiskSpaceError, match="TMPDIR"):
        DeltaSubscriber(f"file://{stream}").prepare(engine)
    DeltaSubscriber(stream).sync(engine)
    assert bits(engine) == bits(model)


def test_a_full_disk_is_told_from_a_place_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_file(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.get_file", get_file)
    with pytest.raises(DiskSpaceError, match="There is no room"):
        DeltaSubscriber(f"file://{streamed(tmp_path, Net())}").prepare(Net())


# Exact steps -------------------------------------------------------------------------------------------


def test_ranks_take_the_same_step_whatever_is_published_between(tmp_path: Path) -> None:
    model, ranks = Net(), [Net(), Net()]
    subscribers = [DeltaSubscriber(tmp_path / "s") for _ in ranks]
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        train(model, 1)
        publisher.publish(1, model)
        wanted = bits(model)
        first = subscribers[0].prepare(ranks[0], step=1)
        train(model, 2)
        publisher.publish(2, model)
        second = subscribers[1].prepare(ranks[1], step=1)
        for rank, prepared in zip(ranks, (first, second), strict=True):
            assert prepared.commit().step == 1
            assert bits(rank) == wanted
        assert subscribers[0].newest().step == 2
        for rank, subscriber in zip(ranks, subscribers, strict=True):
            assert subscriber.sync(rank, step=2).updates == 1
            assert bits(rank) == bits(model)


def test_steps_that_are_not_there_are_told_apart(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(tmp_path / "s")
    for call in (subscriber.newest, subscriber.empty_state, lambda: subscriber.prepare(engine)):
        with pytest.raises(CheckpointError, match="no weight stream") as caught:
            call()
        assert getattr(caught.value, "retryable", False)
    with DeltaPublisher(tmp_path / "s", model, anchor_every=2, keep_anchors=1) as publisher:
        for step in (2, 4, 6, 8, 10):
            train(model, step)
            publisher.publish(step, model)
        before = bits(engine)
        with pytest.raises(
            CheckpointError, match=r"Step 11 is not published yet[^!]*newest step there is 10"
        ) as later:
            subscriber.prepare(engine, step=11)
        assert getattr(later.value, "retryable", False)
        with pytest.raises(CheckpointError, match=r"no step 9\n[^!]*step 8 is followed by 10") as between:
            subscriber.prepare(engine, step=9)
        with pytest.raises(CheckpointError, match=r"no step 4\n[^!]*still there are 8 to 10") as gone:
            subscriber.prepare(engine, step=4)
        assert not any(getattr(error.value, "retryable", False) for error in (between, gone))
        assert bits(engine) == before
        assert subscriber.sync(engine, step=8).from_anchor


def test_of_a_step_published_twice_the_newest_record_counts(tmp_path: Path) -> None:
    """As after a crash, from an older checkpoint."""
    engine, model = Net(), Net()
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        for step in (1, 2, 3):
            train(model, step)
            publisher.publish(step, model)
    with DeltaPublisher(tmp_path / "s", Net()) as publisher:
        again = Net()
        wanted = {}
        for step in (1, 3, 4):
            train(again, 10 + step)
            publisher.publish(step, again)
            wanted[step] = bits(again)
    subscriber = DeltaSubscriber(tmp_path / "s", allow_rollback=True)
    for step in (3, 1, 4):
        subscriber.sync(engine, step=step)
        assert bits(engine) == wanted[step]
    with pytest.raises(CheckpointError, match="no step 2"):
        subscriber.sync(engine, step=2)


def test_an_earlier_step_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model)
    subscriber = DeltaSubscriber(stream)
    early = subscriber.prepare(engine, step=1)
    subscriber.sync(engine)
    with pytest.raises(DeltaError, match="goes back"):
        subscriber.prepare(engine, step=1)
    with pytest.raises(BaseMismatchError):
        early.commit()
    assert bits(engine) == bits(model)
    report = DeltaSubscriber(stream, allow_rollback=True).sync(engine, step=1)
    assert (report.step, report.number) == (1, 1)


def test_files_may_be_removed_while_a_state_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest state is found anew; a step that is gone is said to be."""
    from deltaweights.torch.stream.transport import FolderTransport

    state = {"w": torch.zeros(3000)}
    with DeltaPublisher(tmp_path / "s", state, anchor_every=1, keep_anchors=1) as publisher:
        publisher.publish(1, state)
        engine, fetch, left = {"w": torch.full((3000,), -1.0)}, FolderTransport.fetch, [2]

        def late(self: FolderTransport, *arguments: Any) -> Any:
            if left[0]:
                left[0] -= 1
                state["w"] += 1
                publisher.publish(10 - left[0], state)
            return fetch(self, *arguments)

        monkeypatch.setattr(FolderTransport, "fetch", late)
        subscriber = DeltaSubscriber(tmp_path / "s")
        assert subscriber.prepare(engine).commit().step == 10
        assert torch.equal(engine["w"], state["w"])
        publisher.publish(11, state)
        left[0] = 1
        with pytest.raises(CheckpointError, match="no step 10"):
            subscriber.prepare({"w": torch.full((3000,), -1.0)}, step=10)


# Mirrors -----------------------------------------------------------------------------------------------


def _is_seen(mirror: State, expected: dict[str, bytes], answer: Any) -> None:
    answer.put(bits(mirror) == expected)


def test_a_mirror_in_shared_memory_is_one_for_all_processes(tmp_path: Path) -> None:
    model = Net()
    stream = streamed(tmp_path, model)
    subscriber = DeltaSubscriber(stream)
    mirror = subscriber.empty_state(shared=True)
    assert {name: (t.dtype, t.shape) for name, t in mirror.items()} == {
        name: (t.dtype, t.shape) for name, t in model.state_dict().items()
    }
    assert mirror["head.weight"].data_ptr() == mirror["embed.weight"].data_ptr()
    assert not any(tensor.any() for tensor in mirror.values())
    processes = torch.multiprocessing.get_context("spawn")
    assert subscriber.sync(mirror).from_anchor
    answer = processes.SimpleQueue()
    process = processes.Process(target=_is_seen, args=(mirror, bits(model), answer))
    process.start()
    assert answer.get()
    process.join()


def test_a_mirror_of_a_huge_state_is_refused() -> None:
    from deltaweights.torch.stream.following.mirror import empty_tensors
    from deltaweights.torch.stream.records import StateRecord, StreamTensor

    tensor = StreamTensor("w", "F32", (1 << 30, 1 << 30), "0" * 64)
    record = StateRecord(0, 0, "0" * 64, (tensor,), None, None, None, None, "0" * 16)
    for shared in (False, True):
        with pytest.raises(CheckpointError, match="does not fit this machine"):
            empty_tensors(record, "there", shared=shared)
