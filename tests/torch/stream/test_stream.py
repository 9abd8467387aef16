"""Weight streams: a model's states published as updates, and followed bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from fsspec.exceptions import FSTimeoutError  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    HubError,
    NotPublishedError,
    OutputError,
    codec,
    payload,
)
from deltaweights.checkpoint import parse_header
from deltaweights.storage import hub_client
from deltaweights.torch import DeltaPublisher, DeltaSubscriber, SyncReport
from deltaweights.torch.stream.records import CHUNK_BYTES, HEAD_NAME, read_head, read_record

from ...hub_server import HubServer
from ...s3_server import S3Server
from .streams import Net, State, bits, flip, rewrite, streamed, train


def names(stream: Path) -> list[str]:
    """The stream's files, without numbers that differ from run to run."""
    return sorted(
        f"{int(path.name[:10])}{'.json' if path.suffix == '.json' else '.' + path.name.split('.')[1]}"
        for path in stream.iterdir()
        if path.name[:10].isdigit()
    )


@pytest.fixture(params=["folder", "url", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a stream may lie."""
    if request.param == "folder":
        yield str(tmp_path / "stream")
    elif request.param == "url":
        yield f"memory://{tmp_path.name}/stream"
        memory = fsspec.filesystem("memory")
        for path in memory.find(f"/{tmp_path.name}"):
            memory.rm_file(path)
    else:
        hub: HubServer = request.getfixturevalue("hub")
        request.getfixturevalue("monkeypatch").setattr(hub_client, "RETRY_DELAYS", (0.0,) * 8)
        request.getfixturevalue("monkeypatch").setenv("HF_TOKEN", hub.add_user("org"))
        yield "hf://org/stream"


# What a stream promises, wherever it lies --------------------------------------------------------------


def test_a_follower_is_bit_equal_at_every_step(place: str) -> None:
    model, engine = Net(), Net()
    with DeltaPublisher(place, model) as publisher:
        subscriber = DeltaSubscriber(place)
        for step in range(1, 4):
            train(model, step)
            made = publisher.publish(step, model)
            assert bits(engine) != bits(model)
            report = subscriber.sync(engine)
            assert bits(engine) == bits(model)
            assert (report.step, report.number, report.state) == (step, made.number, made.state)
            assert (report.updates, report.from_anchor, report.nbytes) == (1, False, made.update_bytes)
            assert subscriber.sync(engine) == SyncReport(step, made.number, made.state, 0, False, 0)


def test_missed_steps_are_caught_up_and_late_ones_join_through_an_anchor(place: str) -> None:
    model, engine, late = Net(), Net(), Net(99)
    with DeltaPublisher(place, model, anchor_every=3) as publisher:
        subscriber = DeltaSubscriber(place)
        for step in range(1, 6):
            train(model, step)
            made = publisher.publish(step, model)
            assert bool(made.anchor_bytes) == (step == 3)
    report = subscriber.sync(engine)
    assert (report.updates, report.from_anchor) == (5, False)
    report = DeltaSubscriber(place).sync(late)
    assert (report.updates, report.from_anchor) == (2, True)
    assert bits(engine) == bits(late) == bits(model)


def test_a_step_can_be_prepared_and_committed(place: str) -> None:
    model, engine = Net(), Net()
    states = {}
    with DeltaPublisher(place, model) as publisher:
        for step in (1, 2, 4):
            train(model, step)
            publisher.publish(step, model)
            states[step] = bits(model)
    subscriber = DeltaSubscriber(place)
    assert subscriber.newest().step == 4
    for step in (2, 4):
        with subscriber.prepare(engine, step=step) as prepared:
            assert bits(engine) != states[step]
            assert prepared.commit().step == step
        assert bits(engine) == states[step]
    with pytest.raises(NotPublishedError, match="Step 5"):
        subscriber.prepare(engine, step=5)


def test_a_stream_goes_on_where_its_publisher_ended(place: str) -> None:
    model, engine = Net(), Net()
    for step in range(1, 4):
        with DeltaPublisher(place, model) as publisher:
            train(model, step)
            assert not publisher.publish(step, model).anchor_bytes
    report = DeltaSubscriber(place).sync(engine)
    assert (report.updates, report.from_anchor) == (3, False)
    assert bits(engine) == bits(model)


def test_training_that_goes_back_makes_an_anchor(place: str) -> None:
    """As after a crash, from an older checkpoint: its state is not the stream's newest."""
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(place)
    with DeltaPublisher(place, model) as publisher:
        train(model, 1)
        publisher.publish(1, model)
    subscriber.sync(engine)
    restarted = Net()
    with DeltaPublisher(place, restarted) as publisher:
        train(restarted, 77)
        made = publisher.publish(1, restarted)
        assert made.anchor_bytes
        assert not made.update_bytes
        train(restarted, 78)
        assert not publisher.publish(2, restarted).anchor_bytes
    report = subscriber.sync(engine)
    assert (report.updates, report.from_anchor) == (1, True)
    assert bits(engine) == bits(restarted)


def test_a_second_writer_is_an_error(place: str) -> None:
    model = Net()
    with DeltaPublisher(place, model) as first:
        if "://" not in place:
            with pytest.raises(OutputError, match="another deltaweights process"):
                DeltaPublisher(place, model)
        else:  # where there are no locks, the one that comes later finds out
            with DeltaPublisher(place, model) as second:
                train(model, 1)
                second.publish(1, model)
                published = bits(model)
                for step in (1, 2):
                    train(model, step)
                    with pytest.raises(OutputError, match="Another publisher writes"):
                        first.publish(step, model)
            engine = Net()
            DeltaSubscriber(place).sync(engine)
            assert bits(engine) == published


def test_where_there_is_no_stream_nothing_is_synced(place: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        DeltaSubscriber(place).sync(Net())


# States ------------------------------------------------------------------------------------------------


words = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40)


@settings(max_examples=25)
@given(steps=st.lists(words, min_size=1, max_size=6), seen=st.lists(st.booleans(), min_size=6, max_size=6))
def test_any_bits_arrive(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[int]], seen: list[bool]
) -> None:
    """NaNs with a payload, -0.0, states that come back: bytes are compared, not floats."""
    place = tmp_path_factory.mktemp("any")

    def state(values: list[int]) -> State:
        data = np.resize(np.array(values, np.uint16), 40)
        return {"w": torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)}

    engine = state([0])
    with DeltaPublisher(place / "s", state([0]), anchor_every=2) as publisher:
        subscriber = DeltaSubscriber(place / "s")
        for step, (values, look) in enumerate(zip(steps, seen, strict=False)):
            publisher.publish(step, state(values))
            if look:
                assert subscriber.sync(engine).step == step
                assert bits(engine) == bits(state(values))
        subscriber.sync(engine)
        assert bits(engine) == bits(state(steps[-1]))
    shutil.rmtree(place)


#: How many of a thousand weights a step moves: chunks of all kinds.
moved = st.sampled_from([0, 1, 15, 40, 900])


@settings(max_examples=8)
@given(before=st.lists(moved, max_size=1), missed=st.lists(moved, min_size=1, max_size=3))
def test_a_state_is_reached_or_left_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, before: list[int], missed: list[int]
) -> None:
    """Where the last of several chunks turns out to be wrong, what was written before is undone."""
    place = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    sizes = {"a": CHUNK_BYTES // 2 + 1000, "b": 5000}  # three chunks
    weights = {n: rng.normal(0, 0.02, size).astype("<f4").view("<i2")[1::2] for n, size in sizes.items()}
    engine, model = (
        {n: torch.from_numpy(w.copy()).view(torch.bfloat16) for n, w in weights.items()} for _ in range(2)
    )

    def step(number: int, share: int) -> None:
        for name, tensor in model.items():
            words = tensor.view(torch.int16).numpy()
            words += rng.integers(0, 1000, words.size) < share
            words[0] += name == "b"
        publisher.publish(number, model)

    with DeltaPublisher(place / "s", model, anchor_base=False, anchor_every=None) as publisher:
        subscriber = DeltaSubscriber(place / "s")
        for number, share in enumerate(before, 1):
            step(number, share)
        subscriber.sync(engine)
        for number, share in enumerate(missed, 1 + len(before)):
            step(number, share)
        last = engine["b"].view(torch.int16).numpy()
        last[-1] ^= 1  # nothing that torch would notice
        was = bits(engine)
        with pytest.raises(BaseMismatchError, match="'b' was changed"):
            subscriber.sync(engine)
        assert bits(engine) == was
        last[-1] ^= 1
        assert subscriber.sync(engine).updates == len(missed)
        assert bits(engine) == bits(model)
    shutil.rmtree(place)


def test_a_sync_that_is_interrupted_while_it_checks_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(streamed(tmp_path, model, anchor_base=False), threads=1)
    before, checksum = bits(engine), codec.checksum
    left = done = 0

    def interrupted(data: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return checksum(data)

    monkeypatch.setattr(codec, "checksum", interrupted)
    while bits(engine) != bits(model):
        left = done
        with suppress(KeyboardInterrupt):
            subscriber.sync(engine)
        assert bits(engine) in (before, bits(model))
        done += 1
    assert done >= 10  # the model's chunks, after each of two steps


def test_every_dtype_arrives(tmp_path: Path) -> None:
    from deltaweights.torch.tensors import DTYPES

    def state(seed: int) -> State:
        found = {}
        for code, dtype in DTYPES.items():
            data = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, 320, np.uint8)
            found[code] = torch.from_numpy(data).view(dtype).reshape(4, -1)
        return found

    engine = state(0)
    with DeltaPublisher(tmp_path / "s", state(0)) as publisher:
        publisher.publish(1, state(1))
    DeltaSubscriber(tmp_path / "s").sync(engine)
    assert bits(engine) == bits(state(1))


def test_tensors_that_are_not_in_row_major_order_arrive(tmp_path: Path) -> None:
    base = torch.arange(4000.0).reshape(40, 100)
    engine = {"t": torch.zeros(100, 40).t().copy_(base), "strided": torch.zeros(80, 100)[::2].copy_(base)}
    state = {"t": (base + 1).t().contiguous().t(), "strided": base * 2}
    with DeltaPublisher(tmp_path / "s", {"t": base, "strided": base.clone()}) as publisher:
        publisher.publish(1, state)
    DeltaSubscriber(tmp_path / "s").sync(engine)
    assert torch.equal(engine["t"], state["t"])
    assert torch.equal(engine["strided"], state["strided"])
    assert engine["t"].stride() == (1, 40)


def test_tied_weights_travel_once(tmp_path: Path) -> None:
    model, tied, untied = Net(), Net(), Net()
    untied.head.weight = nn.Parameter(untied.head.weight.clone())
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        train(model, 1)
        made = publisher.publish(1, model)
        assert "embed.weight" in made.changed
        assert "head.weight" not in made.changed
        assert made.state_bytes == sum(len(data) for data in bits(model).values()) - 600 * 2000 * 2
        for engine in (tied, untied):
            DeltaSubscriber(tmp_path / "s").sync(engine)
            assert bits(engine) == bits(model)
        assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()


def test_tensors_that_overlap_in_part_are_refused(tmp_path: Path) -> None:
    """What changes in one would change in the other, behind the back of the checks."""
    fused = torch.zeros(6, 10)
    with pytest.raises(CheckpointError, match="overlap"):
        DeltaPublisher(tmp_path / "s", {"qkv": fused, "q": fused[:2]})
    columns = {"left": fused[:, :5], "right": fused[:, 5:]}  # one between the other, nothing in common
    with DeltaPublisher(tmp_path / "s", columns) as publisher:
        columns["left"][1, 1] = 1
        publisher.publish(1, columns)
        engine = {name: torch.zeros(6, 5) for name in columns}
        DeltaSubscriber(tmp_path / "s").sync(engine)
    assert all(torch.equal(engine[name], columns[name]) for name in columns)


def test_a_name_that_only_the_model_has_is_brought_along_by_its_tie(tmp_path: Path) -> None:
    """A trainer publishes what it would save: of tied weights one. The engine's model has both names."""
    weights = torch.arange(10.0)
    shared, other = torch.zeros(10), torch.zeros(3)
    engine = {"embed": shared, "head": shared, "other": other}
    subscriber = DeltaSubscriber(tmp_path / "s")
    with DeltaPublisher(tmp_path / "s", {"embed": weights, "other": torch.zeros(3)}) as publisher:
        for step in (1, 2):
            weights += 1
            publisher.publish(step, {"embed": weights, "other": torch.zeros(3)})
            assert subscriber.sync(engine).step == step
            assert torch.equal(engine["head"], weights)
        assert subscriber.sync(engine).updates == 0
    with pytest.raises(CheckpointError, match="'head' is missing, new"):
        DeltaSubscriber(tmp_path / "s").sync(engine | {"head": torch.zeros(10)})
    with pytest.raises(CheckpointError, match="'head' is missing, new"):
        subscriber.sync(engine | {"head": torch.zeros(10)})


def test_wrappers_on_either_side_are_seen_through(tmp_path: Path) -> None:
    trained, serving = Net(), Net(seed=4)
    with DeltaPublisher(tmp_path / "s", nn.DataParallel(trained)) as publisher:
        train(trained, 1)
        publisher.publish(1, checkpoint_wrapper(trained))
        DeltaSubscriber(tmp_path / "s").sync(serving)
    assert bits(serving) == bits(trained)


def test_a_model_that_ties_what_the_stream_does_not_is_refused(tmp_path: Path) -> None:
    shared = torch.zeros(10)
    with DeltaPublisher(tmp_path / "s", {"a": torch.zeros(10), "b": torch.zeros(10)}) as publisher:
        publisher.publish(1, {"a": torch.ones(10), "b": torch.zeros(10)})
    with pytest.raises(CheckpointError, match="ties 'b' to 'a'"):
        DeltaSubscriber(tmp_path / "s").sync({"a": shared, "b": shared})
    assert not shared.any()


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(10)},
        {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(1)},
        {"a": torch.zeros(10), "b": torch.zeros(2, 5)},
        {"a": torch.zeros(10), "b": torch.zeros(10, dtype=torch.int32)},
    ],
)
def test_another_model_is_refused_on_both_sides(tmp_path: Path, other: State) -> None:
    state = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with DeltaPublisher(tmp_path / "s", state) as publisher:
        with pytest.raises(DeltaWeightsError, match="does not belong to the stream"):
            publisher.publish(1, other)
        state["a"] += 1
        publisher.publish(2, state)
        with pytest.raises(CheckpointError, match="does not fit the stream"):
            DeltaSubscriber(tmp_path / "s").sync(other)
    with pytest.raises(DeltaWeightsError, match="does not belong to the stream"):
        DeltaPublisher(tmp_path / "s", other)


def test_tensors_without_bytes_are_refused(tmp_path: Path) -> None:
    for bad in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(CheckpointError, match="has no bytes to read"):
            DeltaPublisher(tmp_path / "s", {"w": bad})
    with pytest.raises(CheckpointError, match="no tensors"):
        DeltaPublisher(tmp_path / "s", {})
    assert not (tmp_path / "s").exists()


def test_an_unchanged_state_costs_a_record(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        made = publisher.publish(7, model)
        assert not made.changed
        assert made.update_bytes < 100
        assert DeltaSubscriber(tmp_path / "s").sync(engine).step == 7


def test_unchanged_tensors_take_no_payload(tmp_path: Path) -> None:
    model = Net()
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model.norm.weight[3] += 1
            model.embed.weight[599] *= 2  # in its last chunk
        assert publisher.publish(1, model).changed == ("embed.weight", "norm.weight")
    (path,) = (tmp_path / "s").glob("*.update.safetensors")
    with safe_open(path, "np") as file:
        payloads = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    assert sorted(payloads) == ["embed.weight", "norm.weight"]
    old, new = bits(before), bits(model)
    for name, code in (("embed.weight", "BF16"), ("norm.weight", "F32")):
        decoded = payload.decode(old[name], payloads[name], code, chunk_bytes=CHUNK_BYTES)
        assert decoded.tobytes() == new[name]


# What is kept ------------------------------------------------------------------------------------------


def test_only_what_no_chain_needs_is_removed(tmp_path: Path) -> None:
    model = Net()
    followers = {step: (Net(), DeltaSubscriber(tmp_path / "s")) for step in range(9)}
    with DeltaPublisher(tmp_path / "s", model, anchor_every=3, keep_anchors=2) as publisher:
        for step in range(1, 9):
            train(model, step)
            publisher.publish(step, model)
            for engine, subscriber in list(followers.values())[step:]:
                subscriber.sync(engine)
        assert names(tmp_path / "s") == [
            "3.anchor", "3.json", "3.update", "4.json", "4.update", "5.json", "5.update",
            "6.anchor", "6.json", "6.update", "7.json", "7.update", "8.json", "8.update",
        ]  # fmt: skip
        for step, (engine, subscriber) in followers.items():
            report = subscriber.sync(engine)
            assert report.from_anchor == (step < 2)  # what leads from 1 to 2 is gone
            assert bits(engine) == bits(model)


def test_the_shorter_way_is_taken(tmp_path: Path) -> None:
    """Many large updates against one anchor."""
    model, engine = Net(), Net()
    with DeltaPublisher(tmp_path / "s", model, anchor_every=6) as publisher:
        subscriber = DeltaSubscriber(tmp_path / "s")
        for step in range(1, 8):
            with torch.no_grad():
                model.embed.weight.normal_()
            publisher.publish(step, model)
    report = subscriber.sync(engine)
    assert (report.updates, report.from_anchor) == (1, True)
    assert bits(engine) == bits(model)


def test_without_an_anchor_only_the_base_can_join(tmp_path: Path) -> None:
    model, engine, other = Net(), Net(), Net(5)
    before = bits(other)
    with DeltaPublisher(tmp_path / "s", model, anchor_base=False, anchor_every=None) as publisher:
        train(model, 1)
        publisher.publish(1, model)
        DeltaSubscriber(tmp_path / "s").sync(engine)
        assert bits(engine) == bits(model)
        with pytest.raises(BaseMismatchError, match="in no state of the stream"):
            DeltaSubscriber(tmp_path / "s").sync(other)
        assert bits(other) == before
        assert publisher.publish(2, model, anchor=True).anchor_bytes
        DeltaSubscriber(tmp_path / "s").sync(other)
        assert bits(other) == bits(model)


# Damage, and other people's hands ----------------------------------------------------------------------


@pytest.mark.parametrize("is_url", [False, True])
@pytest.mark.parametrize("which", ["head.json", "0000000002.json", "*.update.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_file_that_never_ends_is_refused_at_once(
    tmp_path: Path, kind: str, which: str, is_url: bool
) -> None:
    stream = streamed(tmp_path, Net(), anchor_base=False, anchor_every=None)
    path = sorted(stream.glob(which))[-1]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    engine = Net()
    before = bits(engine)
    with pytest.raises(DeltaWeightsError, match=r"not a regular file|Its size is not the one"):
        DeltaSubscriber(stream.as_uri() if is_url else stream).sync(engine)
    assert bits(engine) == before


def test_an_old_head_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    states, heads = [], []
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        for step in (1, 2):
            train(model, step)
            publisher.publish(step, model)
            states.append(bits(model))
            heads.append((tmp_path / "s" / HEAD_NAME).read_bytes())
    subscriber = DeltaSubscriber(tmp_path / "s")
    report = subscriber.sync(engine)
    (tmp_path / "s" / HEAD_NAME).write_bytes(heads[0])
    with pytest.raises(DeltaError, match="goes back"):
        subscriber.sync(engine)
    assert bits(engine) == states[1]
    with pytest.raises(DeltaError, match="already at 2"):  # in a new process, which was told
        DeltaSubscriber(tmp_path / "s", last_number=report.number).sync(Net())
    with pytest.raises(ValueError, match="last_number"):
        DeltaSubscriber(tmp_path / "s", last_number=-1)
    meant = DeltaSubscriber(tmp_path / "s", allow_rollback=True)
    (tmp_path / "s" / HEAD_NAME).write_bytes(heads[1])
    subscriber.sync(engine)
    meant.sync(engine)
    (tmp_path / "s" / HEAD_NAME).write_bytes(heads[0])
    meant.sync(engine)
    assert bits(engine) == states[0]


def test_a_model_that_somebody_changed_is_led_back_by_an_anchor(tmp_path: Path) -> None:
    """Noticed by torch's count or not; in the last chunk too, when others are written already."""
    model, engine = Net(), Net()
    with DeltaPublisher(tmp_path / "s", model) as publisher:
        subscriber = DeltaSubscriber(tmp_path / "s")
        for step, is_seen in enumerate((True, False), 1):
            subscriber.sync(engine)
            weight = engine.state_dict()["norm.weight"]
            if is_seen:
                weight.add_(1)
            else:
                weight.numpy()[:] += 1
            train(model, step)
            publisher.publish(step, model)
            report = subscriber.sync(engine)
            assert report.from_anchor
            assert bits(engine) == bits(model)


@pytest.mark.parametrize("kind", ["update", "anchor"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_a_damaged_payload_is_never_written(tmp_path: Path, kind: str, place: float) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, anchor_base=kind == "anchor", anchor_every=None)
    flip(sorted(stream.glob(f"*.{kind}.safetensors"))[-1], place)
    engine = Net(0 if kind == "update" else 3)
    before = bits(engine)
    with pytest.raises(DeltaError, match="damaged"):
        DeltaSubscriber(stream).sync(engine)
    assert bits(engine) == before


def test_where_updates_are_damaged_the_anchor_serves(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, steps=3, anchor_every=3)
    flip(sorted(stream.glob("*.update.safetensors"))[1], 0.5)
    assert DeltaSubscriber(stream).sync(engine).from_anchor
    assert bits(engine) == bits(model)


@pytest.mark.parametrize("name", [HEAD_NAME, "0000000002.json", "0000000001.json"])
def test_a_damaged_record_is_refused(tmp_path: Path, name: str) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, anchor_base=False, anchor_every=None)
    before = bits(engine)
    for place in (0.0, 0.2, 0.5, 0.9, 0.999):
        copy = shutil.copytree(stream, tmp_path / f"copy-{place}")
        flip(copy / name, place)
        with pytest.raises(DeltaWeightsError):
            DeltaSubscriber(copy).sync(engine)
    assert bits(engine) == before


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda r: r.update(format_version=2),
    "another format": lambda r: r.update(format="deltaweights"),
    "an unknown field": lambda r: r.update(more=1),
    "a state that its tensors do not have": lambda r: r.update(state="0" * 64),
    "a tensor too few": lambda r: r["tensors"].pop(),
    "a tensor twice": lambda r: r["tensors"].append(r["tensors"][-1]),
    "tensors unsorted": lambda r: r["tensors"].reverse(),
    "like itself": lambda r: r["tensors"][0].update(like=r["tensors"][0]["name"]),
    "like nothing": lambda r: r["tensors"][0].update(like="nothing"),
    "a path for a writer": lambda r: r.update(writer="../../../../etc"),
    "a negative number": lambda r: r.update(number=-1),
    "before its predecessor": lambda r: r["previous"].update(number=r["number"]),
    "an update from nowhere": lambda r: r.update(previous=None),
    "a predecessor without an update": lambda r: r.update(update=None),
    "a huge file": lambda r: r["update"].update(size=1 << 70),
    "another file": lambda r: r["update"].update(size=12),
    "a negative shape": lambda r: r["tensors"][0].update(shape=[-1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_refused(tmp_path: Path, name: str) -> None:
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, steps=1, anchor_base=False)
    before = bits(engine)
    rewrite(stream, HOSTILE[name])
    with pytest.raises(DeltaError):
        DeltaSubscriber(stream).sync(engine)
    assert bits(engine) == before


def test_a_payload_that_contradicts_its_record_is_refused(tmp_path: Path) -> None:
    """A whole and right payload file, but of another update."""
    model, engine = Net(), Net()
    stream = streamed(tmp_path, model, steps=1, anchor_base=False)
    other = Net()
    streamed(tmp_path / "other", other, steps=1, anchor_base=False)
    train(other, 50)
    (wrong,) = streamed(tmp_path / "third", other, steps=1, anchor_base=False).glob("*.update.safetensors")
    (right,) = stream.glob("*.update.safetensors")
    shutil.copy(wrong, right)
    digest = {"size": right.stat().st_size, "sha256": hashlib.sha256(right.read_bytes()).hexdigest()}
    rewrite(stream, lambda record: record.update(update=digest))
    before = bits(engine)
    with pytest.raises(DeltaError, match="does not lead to tensor"):
        DeltaSubscriber(stream).sync(engine)
    assert bits(engine) == before


@pytest.mark.parametrize("method", [codec.Method.SPARSE, codec.Method.SAME])
def test_an_update_that_follows_another_state_is_refused(tmp_path: Path, method: codec.Method) -> None:
    """By the checksums of its base, also of chunks that it does not change."""
    model, engine = Net(), Net()
    stream = tmp_path / "s"
    with DeltaPublisher(stream, model, anchor_base=False) as publisher:
        with torch.no_grad():
            model.embed.weight[0, :50] += 1  # one of the tensor's chunks
        publisher.publish(1, model)
    (path,) = stream.glob("*.update.safetensors")
    data = bytearray(path.read_bytes())
    header = parse_header(bytes(data[: 8 + int.from_bytes(data[:8], "little")]), len(data), path.name)
    start = header.data_start + header.tensors[0].start
    records = np.frombuffer(data, codec.RECORD, 2, start)
    assert set(records["method"]) == {codec.Method.SPARSE, codec.Method.SAME}
    records["base"][records["method"] == method] ^= 1
    path.write_bytes(data)
    digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(stream, lambda record: record.update(update=digest))
    before = bits(engine)
    with pytest.raises(DeltaError, match="does not follow the state before"):
        DeltaSubscriber(stream).sync(engine)
    assert bits(engine) == before


def test_a_publication_that_failed_is_followed_by_an_anchor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the publisher keeps is neither state then; readers never notice."""
    model, engine = Net(), Net()
    stream = tmp_path / "s"
    subscriber = DeltaSubscriber(stream)
    with DeltaPublisher(stream, model) as publisher:
        subscriber.sync(engine)
        before = bits(engine)
        train(model, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _full_disk)
            with pytest.raises(OutputError):
                publisher.publish(1, model)
        subscriber.sync(engine)
        assert bits(engine) == before
        train(model, 2)
        assert publisher.publish(2, model).anchor_bytes
        subscriber.sync(engine)
        assert bits(engine) == bits(model)
        train(model, 3)
        assert not publisher.publish(3, model).anchor_bytes
    assert DeltaSubscriber(stream).sync(Net()).step == 3


def _full_disk(*paths: object, **handles: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_publication_that_came_through_though_its_answer_was_lost_counts(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher does not take its own commit for somebody else's."""
    monkeypatch.setattr(hub_client, "RETRY_DELAYS", (0.0,) * 8)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("org"))
    model, engine = Net(), Net()
    with DeltaPublisher("hf://org/stream", model) as publisher:
        train(model, 1)
        publish = type(publisher._transport).publish

        def lost(*arguments: Any) -> None:
            publish(*arguments)
            raise OutputError("the answer was lost")

        with monkeypatch.context() as patch:
            patch.setattr(type(publisher._transport), "publish", lost)
            with pytest.raises(OutputError):
                publisher.publish(1, model)
        train(model, 2)
        publisher.publish(2, model)
    assert DeltaSubscriber("hf://org/stream").sync(engine).step == 2
    assert bits(engine) == bits(model)


def sync_patiently(subscriber: DeltaSubscriber, model: State | nn.Module) -> tuple[SyncReport, int]:
    """As the docstring of :class:`HubError` says, without the pauses; and how often it had to."""
    attempts = 0
    while True:
        try:
            return subscriber.sync(model), attempts
        except HubError as error:
            if not error.retryable:
                raise
            attempts += 1


FAULTS: list[dict[str, Any]] = [
    {"on": "api", "status": 503},
    {"on": "api", "status": 429, "retry_after": 0},
    {"on": "resolve", "status": 500},
    {"on": "content", "drop": True},
    {"on": "content", "cut_after": 0},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_passes_on_the_hub_is_told_from_what_stays(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    monkeypatch.setattr(hub_client, "RETRY_DELAYS", ())
    monkeypatch.setenv("HF_TOKEN", hub.add_user("org"))
    model, engine = Net(), Net()
    with DeltaPublisher("hf://org/stream", model) as publisher:
        train(model, 1)
        publisher.publish(1, model)
    subscriber = DeltaSubscriber("hf://org/stream")
    hub.fail("org/stream", **fault, times=3)
    report, attempts = sync_patiently(subscriber, engine)
    assert (report.step, attempts) == (1, 3)
    assert bits(engine) == bits(model)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    with pytest.raises(HubError, match="cannot be found"):
        sync_patiently(subscriber, engine)
    hub.repos["org/stream"].private, hub.repos["org/stream"].gated = False, "manual"
    with pytest.raises(CheckpointError, match="is gated"):
        sync_patiently(subscriber, engine)


def test_what_passes_while_a_publisher_writes_is_retryable(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "RETRY_DELAYS", ())
    monkeypatch.setenv("HF_TOKEN", hub.add_user("org"))
    model = Net()
    with DeltaPublisher("hf://org/stream", model) as publisher:
        train(model, 1)
        hub.fail("org/stream", path="/commit/main", status=503)
        with pytest.raises(HubError, match="503") as caught:
            publisher.publish(1, model)
        assert caught.value.retryable
        assert isinstance(caught.value, OutputError)
        publisher.publish(1, model)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="not logged in") as caught, DeltaPublisher("hf://org/other", model):
        pass
    assert not caught.value.retryable


class UnreliableFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory behind a network that has its days: each error of the list comes once."""

    protocol = "unreliable"
    store: ClassVar[dict[str, Any]] = {}
    errors: ClassVar[list[Exception]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.errors:
            raise self.errors.pop()
        data: bytes = super().cat_file(path, start, end, **options)
        return data


class ClientConnectionError(Exception):
    """As aiohttp calls it."""


class HttpError(Exception):
    """As gcsfs calls it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}")
        self.code = code


def test_what_passes_at_a_url_is_told_from_what_stays(tmp_path: Path) -> None:
    fsspec.register_implementation("unreliable", UnreliableFileSystem, clobber=True)
    place = f"unreliable://{tmp_path.name}"
    model, engine = Net(), Net()
    with DeltaPublisher(place, model) as publisher:
        train(model, 1)
        publisher.publish(1, model)
    subscriber = DeltaSubscriber(place)
    UnreliableFileSystem.errors += [
        ConnectionResetError("reset"),
        TimeoutError("late"),
        FSTimeoutError(),
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.ENETUNREACH, "no route"),
        ClientConnectionError("gone"),
        HttpError(503),
    ]
    report, attempts = sync_patiently(subscriber, engine)
    assert (report.step, attempts) == (1, 7)
    for error in (PermissionError("no"), OSError(errno.EINVAL, "odd"), HttpError(403), ValueError("odd")):
        UnreliableFileSystem.errors.append(error)
        with pytest.raises(HubError, match=r"Cannot read .*head") as caught:
            sync_patiently(subscriber, engine)
        assert isinstance(caught.value, CheckpointError)
        assert caught.value.__cause__ is error


def test_a_stream_in_a_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 itself refuses a second publisher's record; what cannot be reached is told as of any store."""
    monkeypatch.setattr(hub_client, "RETRY_DELAYS", ())
    place, model, engine = "s3://bucket/run/7", Net(), Net()
    with DeltaPublisher(place, model) as publisher, DeltaPublisher(place, model) as second:
        subscriber = DeltaSubscriber(place)
        train(model, 1)
        publisher.publish(1, model)
        subscriber.sync(engine)
        assert bits(engine) == bits(model)
        with pytest.raises(OutputError, match="Another publisher"):
            second.publish(1, model)
        train(model, 2)
        publisher.publish(2, model)
    s3.fail(HEAD_NAME, status=403, times=None)
    with pytest.raises(HubError, match=r"Cannot read s3://bucket/run/7/head") as caught:
        subscriber.sync(engine)
    assert "credentials" in caught.value.fix
    s3.heal()
    assert subscriber.sync(engine).step == 2
    assert bits(engine) == bits(model)


def test_a_url_that_nothing_opens() -> None:
    with pytest.raises(CheckpointError, match="weird://bucket/run cannot be opened"):
        DeltaSubscriber("weird://bucket/run")


_PUBLISH_FOR_EVER = """
import sys, torch
from deltaweights.torch import DeltaPublisher
state = {"w": torch.zeros(300_000)}
with DeltaPublisher(sys.argv[1], state, anchor_every=2) as publisher:
    step = 0
    while True:
        step += 1
        state["w"] += 1
        publisher.publish(step, state)
        print(step, flush=True)
"""


def test_a_publisher_may_be_killed_at_any_time(tmp_path: Path) -> None:
    """Readers have a whole state at each moment, and the next publisher goes on from it."""
    stream = tmp_path / "s"
    engine = {"w": torch.full((300_000,), -1.0)}
    subscriber = DeltaSubscriber(stream)
    for round in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _PUBLISH_FOR_EVER, str(stream)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(3 + 2 * round)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert all(lines)
        report = subscriber.sync(engine)
        assert report.step >= int(lines[-1])
        assert torch.equal(engine["w"], torch.full((300_000,), float(report.step)))


_FOLLOW = """
import json, sys, torch
from deltaweights.torch import DeltaSubscriber
subscriber = DeltaSubscriber(sys.argv[1])
state = {"w": torch.full((300_000,), -1.0)}
seen = set()
while max(seen, default=0) < int(sys.argv[2]):
    step = subscriber.sync(state).step
    assert torch.equal(state["w"], torch.full((300_000,), float(step))), step
    seen.add(step)
print(len(seen))
"""


def test_files_may_be_removed_under_a_reader(tmp_path: Path) -> None:
    """Another process follows at full speed while the publisher removes what is old with every step."""
    state = {"w": torch.zeros(300_000)}
    with DeltaPublisher(tmp_path / "s", state, anchor_every=1, keep_anchors=1) as publisher:
        reader = subprocess.Popen(
            [sys.executable, "-c", _FOLLOW, str(tmp_path / "s"), "60"], stdout=subprocess.PIPE, text=True
        )
        for step in range(1, 61):
            state["w"] += 1
            publisher.publish(step, state)
        output, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert int(output) >= 1
    assert len(names(tmp_path / "s")) == 3


# The documented record ---------------------------------------------------------------------------------


def test_digests_are_the_documents(tmp_path: Path) -> None:
    """Worked out again, from the words of docs/format.md."""
    import xxhash

    model = Net()
    stream = streamed(tmp_path, model)
    head = read_head((stream / HEAD_NAME).read_bytes(), "head")
    data = (stream / head.newest.name).read_bytes()
    record = read_record(data, head.newest, "record")
    rows = []
    for name, content in sorted(bits(model).items()):
        chunks = [content[k : k + 2**21] for k in range(0, len(content), 2**21)]
        sums = b"".join(xxhash.xxh3_64_intdigest(chunk).to_bytes(8, "little") for chunk in chunks)
        tensor = next(tensor for tensor in record.tensors if tensor.name == name)
        assert tensor.digest == hashlib.sha256(sums).hexdigest()
        rows.append([name, tensor.dtype, list(tensor.shape), tensor.digest])
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert record.state == hashlib.sha256(text.encode()).hexdigest()
    assert hashlib.sha256(data).hexdigest() == head.newest.record
    assert record.previous
    previous = (stream / record.previous.name).read_bytes()
    assert hashlib.sha256(previous).hexdigest() == record.previous.record


def test_the_document_s_script_runs(tmp_path: Path) -> None:
    document = Path(__file__).parents[3] / "docs" / "train.md"
    section = document.read_text().partition("\n## Publish weights to engines\n")[2].partition("\n## ")[0]
    (script,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    shown = [line.split(" ")[2:] for line in done.stdout.splitlines()]
    assert shown == [["1", "1", "True"], ["2", "1", "False"], ["3", "1", "False"]]


def test_an_update_that_may_take_longer_is_smaller(tmp_path: Path) -> None:
    """Of a step that moves few weights, the small ones: as an optimizer does."""
    generator = torch.Generator().manual_seed(0)
    master = 0.02 * torch.randn(1 << 18, generator=generator)
    states = [{"w": (master + moved).bfloat16()} for moved in (0, 4e-7)]
    assert 0.002 < (states[0]["w"] != states[1]["w"]).float().mean() < 0.02
    sizes = []
    for quick in (True, False):
        place = tmp_path / str(quick)
        with DeltaPublisher(place, states[0], quick=quick) as publisher:
            sizes.append(publisher.publish(1, states[1]).update_bytes)
        model = {"w": torch.zeros_like(states[0]["w"])}
        DeltaSubscriber(place).sync(model)
        assert bits(model) == bits(states[1])
    assert sizes[1] < 0.8 * sizes[0]
