"""Updates on disk beside a weight stream: written whole or not at all, and read by independent code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaweights import CheckpointError, DeltaWeightsError, OutputError
from deltaweights.engines import DiskUpdateWriter, import_stream
from deltaweights.engines.disk_updates import writing
from deltaweights.engines.disk_updates.folder import is_whole, versions_in
from deltaweights.torch import DeltaPublisher, DeltaSubscriber
from deltaweights.torch.tensors import DTYPES, byte_view

from . import independent_disk_updates as independent
from .independent_disk_updates import Stored

State = dict[str, Tensor]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def stored(state: State) -> dict[str, Stored]:
    """The tensors as they lie in a checkpoint."""
    return {
        name: Stored(_CODES[t.dtype], list(t.shape), byte_view(t.contiguous()).numpy().tobytes())
        for name, t in state.items()
    }


def bits(state: State) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in stored(state).items()}


def copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def small_state() -> State:
    """Floats, integers, a scalar, nothing; a NaN and a -0.0 among them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator).bfloat16()
    weight[0, :2] = torch.tensor([float("nan"), -0.0])
    return {
        "count": torch.tensor(7),
        "half": torch.randn(3, 4, generator=generator).half(),
        "nothing": torch.zeros(0, 7),
        "weight": weight,
    }


def stepped(state: State, seed: int) -> State:
    """A step: some weights move, a NaN changes its bits, a zero its sign."""
    new = copy(state)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(2, 1200, (12,), generator=generator)
    new["weight"].view(-1)[places] *= 1.01
    new["weight"].view(torch.int16)[0, :2] ^= torch.tensor([1, -0x8000], dtype=torch.int16)
    new["count"] += 1
    return new


def save_model(folder: Path, state: State) -> Path:
    """An engine's folder: the weights in one file, and a configuration."""
    independent.write_safetensors(folder / "model.safetensors", stored(state), {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def read_all(directory: Path, base: State) -> list[dict[str, bytes]]:
    """Every version's bytes, by the independent reader."""
    state, found = stored(base), []
    for version in range(1, 1 + len(list(directory.glob("weight_v*")))):
        state = independent.read_version(directory, version, state)
        found.append({name: tensor.data for name, tensor in state.items()})
    return found


@pytest.mark.parametrize("encoding", independent.ENCODINGS)
@pytest.mark.parametrize("checksum", independent.CHECKSUMS)
def test_an_independent_reader_reads_what_is_written(tmp_path: Path, encoding: str, checksum: str) -> None:
    if checksum == "blake3":
        pytest.importorskip("blake3")
    states = [small_state()]
    with DiskUpdateWriter(tmp_path, states[0], encoding=encoding, checksum=checksum) as writer:  # type: ignore[arg-type]
        for step in (10, 20, 30):
            states.append(stepped(states[-1], step) if step < 30 else copy(states[-1]))
            report = writer.publish(step, states[-1])
            assert (report.step, report.version) == (step, step // 10)
    assert report.changed == ()
    assert read_all(tmp_path, states[0]) == [bits(state) for state in states[1:]]
    assert sorted(path.name for path in (tmp_path / "weight_v000003").iterdir()) == [
        "model.safetensors.index.json"
    ]


def test_only_what_the_format_has_stands_in_a_folder(tmp_path: Path) -> None:
    with DiskUpdateWriter(tmp_path, small_state()) as writer:
        report = writer.publish(1, stepped(small_state(), 1))
    assert [path.name for path in tmp_path.iterdir()] == ["weight_v000001"]
    files = sorted((tmp_path / "weight_v000001").iterdir())
    assert [file.name for file in files] == [
        "model-00000-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert sum(file.stat().st_size for file in files) == report.nbytes
    index = json.loads(files[1].read_text())
    known = ["version", "base_version", "delta_encoding", "compression_format", "checksum_format"]
    assert list(index["metadata"])[:5] == known
    assert all(name.startswith("deltaweights_") for name in list(index["metadata"])[5:])


_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.float8_e4m3fn]


@st.composite
def runs(draw: st.DrawFn) -> list[State]:
    """The states of a run, of any bits: tensors of any dtype and shape, of which some change."""
    layout = [
        (draw(st.sampled_from(_DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3)))
        for _ in range(draw(st.integers(1, 4)))
    ]

    def tensor(dtype: torch.dtype, shape: list[int]) -> Tensor:
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        made = torch.empty(shape, dtype=dtype)
        byte_view(made).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0))
        return made

    states = [{f"t{k}": tensor(*row) for k, row in enumerate(layout)}]
    for _ in range(draw(st.integers(1, 3))):
        new = {n: tensor(*layout[int(n[1:])]) if draw(st.booleans()) else t for n, t in states[-1].items()}
        states.append(new)
    return states


@settings(max_examples=25)
@given(runs(), st.sampled_from(independent.ENCODINGS))
def test_written_and_imported_states_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, states: list[State], encoding: str
) -> None:
    """Any bits, so NaNs of any payload, infinities and -0.0 as well."""
    folder = tmp_path_factory.mktemp("run")
    model = save_model(folder / "model", states[0])
    with DiskUpdateWriter(folder / "out", states[0], encoding=encoding) as writer:  # type: ignore[arg-type]
        for step, state in enumerate(states[1:], 1):
            writer.publish(step, state)
            import_stream(folder / "out", folder / "stream", model, threads=1)
            follower = copy(states[0])
            assert DeltaSubscriber(folder / "stream").sync(follower).step == step
            assert bits(follower) == bits(state)
    assert read_all(folder / "out", states[0]) == [bits(state) for state in states[1:]]


def test_a_trainer_writes_both_formats_at_once(tmp_path: Path) -> None:
    states = [small_state()]
    with (
        DeltaPublisher(tmp_path / "stream", states[0]) as publisher,
        DiskUpdateWriter(tmp_path / "disk", states[0]) as writer,
    ):
        for step in (1, 2):
            states.append(stepped(states[-1], step))
            publisher.publish(step, states[-1])
            writer.publish(step, states[-1])
    follower = small_state()
    DeltaSubscriber(tmp_path / "stream").sync(follower)
    assert bits(follower) == read_all(tmp_path / "disk", states[0])[-1] == bits(states[-1])


def test_a_new_writer_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    states = [small_state()]
    for step in (1, 2, 3):
        states.append(stepped(states[-1], step))
        with DiskUpdateWriter(tmp_path, states[-2], step=step - 1) as writer:
            assert writer.publish(step, states[-1]).version == step
    with pytest.raises(OutputError, match="newest version is 3, of step 3, with other weights"):
        DiskUpdateWriter(tmp_path, states[0])
    assert read_all(tmp_path, states[0]) == [bits(state) for state in states[1:]]


def test_from_other_weights_it_goes_on_with_a_full_checkpoint(tmp_path: Path) -> None:
    """It has the files of the engine's folder, which the format's readers make it."""
    states = [small_state(), stepped(small_state(), 1), stepped(small_state(), 2)]
    model = save_model(tmp_path / "model", states[0])
    with DiskUpdateWriter(tmp_path / "out", states[0], checkpoint=model) as writer:
        assert writer.reset is None
        writer.publish(1, states[1])
    with DiskUpdateWriter(tmp_path / "out", states[0], checkpoint=model) as writer:  # back to the start
        assert writer.reset
        assert (writer.reset.version, writer.reset.is_full) == (2, True)
        writer.publish(2, states[2])
        assert writer.publish(3, states[1], full=True).changed == ()
    expected = [states[1], states[0], states[2], states[1]]
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in expected]
    assert (tmp_path / "out" / "weight_v000004" / "config.json").read_text() == "{}"


def test_an_engine_with_other_weights_gets_a_full_checkpoint_first(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", small_state())
    trained = stepped(small_state(), 5)
    with DiskUpdateWriter(tmp_path / "out", trained, step=5, checkpoint=model) as writer:
        assert writer.reset
        assert writer.reset.step == 5
    assert read_all(tmp_path / "out", small_state()) == [bits(trained)]


def test_tied_tensors_have_the_names_of_the_engines_folder(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    model = save_model(tmp_path / "model", {"embed.weight": weight.clone()})
    tied = {"embed.weight": weight, "a_head.weight": weight}
    with DiskUpdateWriter(tmp_path / "out", tied, checkpoint=model) as writer:
        weight += 1
        assert writer.publish(1, tied).changed == ("embed.weight",)
    with DiskUpdateWriter(tmp_path / "both", tied) as writer:  # nobody said which names there are
        weight += 1
        assert writer.publish(1, tied).changed == ("a_head.weight", "embed.weight")


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = small_state()
    model = save_model(tmp_path / "model", {name: t for name, t in state.items() if name != "half"})
    with pytest.raises(CheckpointError, match=r"'half' does not fit.*\n.*lacks it"):
        DiskUpdateWriter(tmp_path / "out", state, checkpoint=model)
    other = save_model(tmp_path / "other", {**state, "half": state["half"].float()})
    with pytest.raises(CheckpointError, match=r"'half' does not fit.*\n.*F16 of shape \[3, 4\], not F32"):
        DiskUpdateWriter(tmp_path / "out", state, checkpoint=other)
    with DiskUpdateWriter(tmp_path / "out", state) as writer:
        with pytest.raises(DeltaWeightsError, match="'half' is missing"):
            writer.publish(1, {name: t for name, t in state.items() if name != "half"})
        with pytest.raises(OutputError, match="full checkpoint cannot be written"):
            writer.publish(1, state, full=True)
        assert writer.publish(1, stepped(state, 1)).version == 1
    for options in ({"encoding": "zip"}, {"checksum": "md5"}, {"run_id": "../run"}, {"run_id": ""}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DiskUpdateWriter(tmp_path / "out", state, **options)  # type: ignore[arg-type]


def test_an_interrupted_version_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index comes last: without it, a version is not there."""
    states = [small_state(), stepped(small_state(), 1)]
    with DiskUpdateWriter(tmp_path, states[0]) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(writing, "write_index", _fail)
            with pytest.raises(KeyboardInterrupt):
                writer.publish(1, states[1])
        assert os.listdir(tmp_path / "weight_v000001") == ["model-00000-of-00001.safetensors"]
        assert writer.publish(1, states[1]).version == 1
    assert read_all(tmp_path, states[0]) == [bits(states[1])]


def _fail(*_: object) -> bytes:
    raise KeyboardInterrupt


_KILLED = """
import os, signal, sys
from deltaweights.engines import DiskUpdateWriter
from deltaweights.storage import output
from tests.engines.test_disk_writer import small_state, stepped
left = int(sys.argv[2])
flush = output.flush
def killed_at(fd):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(fd)
output.flush = killed_at
state = small_state()
with DiskUpdateWriter(sys.argv[1], state) as writer:
    for step in (1, 2):
        state = stepped(state, step)
        writer.publish(step, state)
"""


@pytest.mark.parametrize(("flushed", "whole"), [(1, 0), (2, 1)])
def test_a_killed_writer_leaves_whole_versions(flushed: int, whole: int, tmp_path: Path) -> None:
    """Killed before the first index reaches the disk, and before the second shard does."""
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "out"), str(flushed)]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    states = [small_state()]
    for step in (1, 2):
        states.append(stepped(states[-1], step))
    there = [version for version in versions_in(tmp_path / "out") if is_whole(tmp_path / "out", version)]
    assert there == list(range(1, whole + 1))
    with DiskUpdateWriter(tmp_path / "out", states[whole]) as writer:
        for step in range(whole + 1, 3):
            assert writer.publish(step, states[step]).version == step
    assert read_all(tmp_path / "out", states[0]) == [bits(state) for state in states[1:]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["weight_v000001", "weight_v000002"]


def test_blake3_names_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(DeltaWeightsError, match="need the package blake3"):
        DiskUpdateWriter(tmp_path / "out", small_state(), checksum="blake3")
    assert not (tmp_path / "out").exists()


def test_a_version_that_is_not_whole_is_written_again_by_the_next_writer(tmp_path: Path) -> None:
    states = [small_state(), stepped(small_state(), 1), stepped(small_state(), 2)]
    with DiskUpdateWriter(tmp_path, states[0]) as writer:
        writer.publish(1, states[1])
        writer.publish(2, states[2])
    shard = tmp_path / "weight_v000002" / "model-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "weight_v000002" / "model-00001-of-00002.safetensors").write_bytes(b"of another run")
    with DiskUpdateWriter(tmp_path, states[1]) as writer:
        assert writer.publish(2, states[2]).version == 2
    assert read_all(tmp_path, states[0]) == [bits(state) for state in states[1:]]


def test_stitch_finds_the_newest_version_of_a_run(tmp_path: Path) -> None:
    states = [small_state(), stepped(small_state(), 1)]
    with DiskUpdateWriter(tmp_path, states[0], run_id="run-7") as writer:
        writer.publish(1, states[1])
    assert (tmp_path / "latest").read_text() == "run-7/weight_v000001"
    assert read_all(tmp_path / "run-7", states[0]) == [bits(states[1])]


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    with DiskUpdateWriter(tmp_path, small_state()), pytest.raises(OutputError, match="another deltaweights"):
        DiskUpdateWriter(tmp_path, small_state())
