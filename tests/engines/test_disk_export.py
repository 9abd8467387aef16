"""Updates on disk made of a weight stream's states: continued, begun anywhere, the same after a way back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaweights import BaseMismatchError, CheckpointError, OutputError
from deltaweights.engines import export_stream, import_stream
from deltaweights.torch import DeltaPublisher, DeltaSubscriber, Part

from ..torch.process_groups import process_group
from . import independent_disk_updates as independent
from .test_disk_writer import bits, copy, read_all, runs, save_model, small_state, stepped

State = dict[str, Tensor]


def publish(stream: Path, states: list[State], steps: list[int], *, anchors: bool = True) -> None:
    with DeltaPublisher(
        stream, states[0], step=steps[0], anchor_base=anchors, anchor_every=None
    ) as publisher:
        for step, state in zip(steps[1:], states[1:], strict=True):
            publisher.publish(step, state)


def run_of(count: int) -> list[State]:
    states = [small_state()]
    for seed in range(1, count):
        states.append(stepped(states[-1], seed))
    return states


@pytest.mark.parametrize("encoding", independent.ENCODINGS)
def test_each_state_of_a_stream_becomes_a_version(encoding: str, tmp_path: Path) -> None:
    states = run_of(4)
    publish(tmp_path / "stream", states, [0, 10, 20, 30])
    report = export_stream(tmp_path / "stream", tmp_path / "out", encoding=encoding, checksum="adler32")  # type: ignore[arg-type]
    assert [(one.version, one.step) for one in report.written] == [(1, 10), (2, 20), (3, 30)]
    assert (report.first_version, report.first_step) == (0, 0)
    assert report.state_bytes == sum(len(data) for data in bits(states[0]).values())
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in states[1:]]


def test_an_export_goes_on_with_what_was_published_meanwhile(tmp_path: Path) -> None:
    states = run_of(5)
    publish(tmp_path / "stream", states[:3], [0, 1, 2])
    assert len(export_stream(tmp_path / "stream", tmp_path / "out", step=1).written) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    publish(tmp_path / "stream", states[2:], [2, 3, 4])
    assert [one.version for one in export_stream(tmp_path / "stream", tmp_path / "out").written] == [2, 3, 4]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    again = export_stream(tmp_path / "stream", tmp_path / "out")
    assert (again.written, again.first_version, again.first_step) == ((), 4, 4)
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in states[1:]]
    assert export_stream(tmp_path / "stream", tmp_path / "out", step=2).written == ()
    publish(tmp_path / "other", [small_state()], [0])
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_stream(tmp_path / "other", tmp_path / "out")


def test_an_export_can_begin_later_and_end_earlier(tmp_path: Path) -> None:
    states = run_of(5)
    publish(tmp_path / "stream", states, [0, 1, 2, 3, 4])
    report = export_stream(tmp_path / "stream", tmp_path / "out", from_step=1, step=3)
    assert [one.step for one in report.written] == [2, 3]
    assert report.first_step == 1
    assert read_all(tmp_path / "out", states[1]) == [bits(state) for state in states[2:4]]
    for options in ({"step": 9}, {"from_step": 9}):
        with pytest.raises(CheckpointError, match=r"no state of step 9\n.*steps 0 to 4"):
            export_stream(tmp_path / "stream", tmp_path / "other", **options)  # type: ignore[arg-type]


def test_a_state_in_which_nothing_changed_is_a_version_too(tmp_path: Path) -> None:
    states = run_of(2)
    publish(tmp_path / "stream", [states[0], states[1], states[1]], [0, 1, 2])
    for step in (1, 2):
        assert len(export_stream(tmp_path / "stream", tmp_path / "out", step=step).written) == 1
    assert read_all(tmp_path / "out", states[0]) == [bits(states[1])] * 2


def test_a_training_that_went_back_is_exported_as_it_went_on(tmp_path: Path) -> None:
    states = run_of(6)
    publish(tmp_path / "stream", states, [0, 1, 2, 3, 2, 3])
    assert [state.step for state in DeltaSubscriber(tmp_path / "stream").states()] == [0, 1, 2, 3]
    export_stream(tmp_path / "stream", tmp_path / "out")
    expected = [states[1], states[4], states[5]]
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in expected]


def test_a_stream_of_parts_is_exported_whole_and_continued(tmp_path: Path) -> None:
    """Sharded trainers publish parts; the digests of such states are others than those of whole tensors."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    with process_group(store=store, rank=0, world_size=1):
        group = torch.distributed.group.WORLD
        halves = [Part("weight", torch.randn(2, 3), (4, 3), (row, 0)) for row in (0, 2)]
        base = {"weight": torch.cat([half.tensor for half in halves])}
        with DeltaPublisher(tmp_path / "stream", halves, process_group=group) as publisher:
            for step in (1, 2):
                halves[1].tensor[0, step] += 1
                publisher.publish(step, halves)
                report = export_stream(tmp_path / "stream", tmp_path / "out")
                assert [one.version for one in report.written] == [step]
    assert export_stream(tmp_path / "stream", tmp_path / "out").written == ()
    whole = {"weight": torch.cat([half.tensor for half in halves])}
    assert read_all(tmp_path / "out", base)[-1] == bits(whole)


def test_a_stream_without_an_anchor_needs_the_base(tmp_path: Path) -> None:
    states = run_of(3)
    publish(tmp_path / "stream", states, [0, 1, 2], anchors=False)
    with pytest.raises(BaseMismatchError):
        export_stream(tmp_path / "stream", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = save_model(tmp_path / "model", states[0])
    export_stream(tmp_path / "stream", tmp_path / "out", base=model)
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in states[1:]]


def test_full_checkpoints_stand_among_the_updates(tmp_path: Path) -> None:
    """Each is the engine's folder with other weights, so a late engine can begin there."""
    states = run_of(6)
    model = save_model(tmp_path / "model", states[0])
    publish(tmp_path / "stream", states, [0, 1, 2, 3, 4, 5])
    report = export_stream(tmp_path / "stream", tmp_path / "out", base=model, full_every=2)
    assert [one.is_full for one in report.written] == [False, True, False, True, False]
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in states[1:]]
    for version in (1, 2, 3):
        shutil.rmtree(tmp_path / "out" / f"weight_v{version:06d}")
    assert import_stream(tmp_path / "out", tmp_path / "back", model).versions == (4, 5)
    late = tmp_path / "out" / "weight_v000004"
    assert (late / "config.json").read_text() == "{}"
    assert bits_of_folder(late) == bits(states[4])
    with pytest.raises(OutputError, match="full checkpoint cannot be written"):
        export_stream(tmp_path / "stream", tmp_path / "other", full_every=1)


def bits_of_folder(folder: Path) -> dict[str, bytes]:
    tensors, _ = independent.read_safetensors(folder / "model.safetensors")
    return {name: tensor.data for name, tensor in tensors.items()}


def test_what_the_stream_has_no_more_is_passed_by_a_full_checkpoint(tmp_path: Path) -> None:
    states = run_of(6)
    model = save_model(tmp_path / "model", states[0])
    options = {"anchor_every": 1, "keep_anchors": 1}
    with DeltaPublisher(tmp_path / "stream", states[0], **options) as publisher:  # type: ignore[arg-type]
        publisher.publish(1, states[1])
        export_stream(tmp_path / "stream", tmp_path / "out", base=model)
        for step in (2, 3, 4):
            publisher.publish(step, states[step])
    with pytest.raises(OutputError, match="newest version is 1, of step 1, with other weights"):
        export_stream(tmp_path / "stream", tmp_path / "out")
    report = export_stream(tmp_path / "stream", tmp_path / "out", base=model)
    assert [(one.version, one.step, one.is_full) for one in report.written] == [(2, 4, True)]
    assert read_all(tmp_path / "out", states[0]) == [bits(states[1]), bits(states[4])]


def test_tied_tensors_are_exported_under_the_names_of_the_base(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    model = save_model(tmp_path / "model", {"embed.weight": weight.clone()})
    state = {"embed.weight": weight, "a_head.weight": weight}
    with DeltaPublisher(tmp_path / "stream", state) as publisher:
        weight += 1
        publisher.publish(1, state)
    (written,) = export_stream(tmp_path / "stream", tmp_path / "out", base=model).written
    assert written.changed == ("embed.weight",)
    assert import_stream(tmp_path / "out", tmp_path / "back", model).version == 1


@settings(max_examples=15)
@given(runs(), st.sampled_from(independent.ENCODINGS), st.sampled_from([None, 2]))
def test_a_stream_comes_back_from_their_format_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, states: list[State], encoding: str, full_every: int | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    model = save_model(folder / "model", states[0])
    publish(folder / "stream", states, list(range(len(states))))
    options = {"base": model, "encoding": encoding, "full_every": full_every}
    export_stream(folder / "stream", folder / "out", **options)  # type: ignore[arg-type]
    import_stream(folder / "out", folder / "back", model)
    ours, theirs = (DeltaSubscriber(folder / name) for name in ("stream", "back"))
    assert [state.state for state in ours.states()] == [state.state for state in theirs.states()]
    for step, state in enumerate(states):
        follower = copy(states[0])
        assert theirs.sync(follower, step=step).step == step
        assert bits(follower) == bits(state)
