"""Checkpoints as deltas: whole or not there, and back bit for bit."""

from __future__ import annotations

import copy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaweights import CheckpointError, DeltaWeightsError, Manifest, OutputError, apply_delta
from deltaweights.torch import DeltaCheckpointer, list_checkpoints, load_state_dict

from ...checkpoints import contents
from ...conftest import Trio
from ..tiny_models import nudge, raw_state, saved_state, tiny_qwen2


def train(checkpointer: DeltaCheckpointer, steps: range) -> dict[int, dict[str, object]]:
    """Save a model at every step; returns what it was then, bit for bit."""
    model = tiny_qwen2()
    states: dict[int, dict[str, object]] = {}
    for step in steps:
        nudge(model, seed=step)
        checkpointer.save(step, model)
        states[step] = dict(raw_state(model.state_dict()))  # while it is written
    checkpointer.wait()
    return states


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def check_restored(folder: Path, base: Path, states: dict[int, dict[str, object]]) -> None:
    """Every checkpoint that is there is what was saved."""
    chains = list_checkpoints(folder)
    with DeltaCheckpointer(folder, base) as checkpointer:
        assert checkpointer.steps == list(chains)
        for step in chains:
            model = tiny_qwen2(seed=99)
            assert checkpointer.load_into(model, step) == step
            assert raw_state(model.state_dict()) == states[step]


def test_checkpoints_against_the_base(qwen2: Trio, folder: Path) -> None:
    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        states = train(checkpointer, range(100, 400, 100))
    assert names(folder) == ["step-00000100", "step-00000200", "step-00000300"]
    check_restored(folder, qwen2.base, states)


def test_checkpoints_against_each_other(qwen2: Trio, folder: Path) -> None:
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3, max_shard_size="100KB") as checkpointer:
        states = train(checkpointer, range(5))
    assert names(folder) == [
        "step-00000000", "step-00000001-on-00000000", "step-00000002-on-00000001",
        "step-00000003", "step-00000004-on-00000003",
    ]  # fmt: skip
    assert [path.name for path in list_checkpoints(folder)[2]] == names(folder)[:3]
    check_restored(folder, qwen2.base, states)


def test_a_checkpoint_is_what_save_pretrained_writes(qwen2: Trio, tmp_path: Path, folder: Path) -> None:
    """Config and files of a folder too; so apply_delta makes a folder for anybody."""
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "tokenizer.json").write_text("{}")
    (tmp_path / "extras" / "README.md").write_text("# Mine\n")
    model = tiny_qwen2()
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=2, files=tmp_path / "extras") as checkpointer:
        for step in (1, 2):
            nudge(model, seed=step)
            checkpointer.save(step, model)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "extras", tmp_path / "saved", dirs_exist_ok=True)
    assert "# Mine\n" in (folder / "step-00000001" / "README.md").read_text()
    apply_delta(list_checkpoints(folder)[2], tmp_path / "out", base=qwen2.base)
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")


@pytest.mark.parametrize(
    ("anchor_every", "keep", "left"),
    [(1, 2, [6, 7]), (3, 1, [6, 7]), (3, 3, [3, 4, 5, 6, 7]), (4, 1, [4, 5, 6, 7]), (100, 1, list(range(8)))],
)
def test_pruning_never_breaks_a_chain(
    qwen2: Trio, folder: Path, anchor_every: int, keep: int, left: list[int]
) -> None:
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=anchor_every, keep=keep) as checkpointer:
        states = train(checkpointer, range(8))
    assert list(list_checkpoints(folder)) == left
    check_restored(folder, qwen2.base, states)


def test_training_does_not_wait_and_may_change_the_weights(qwen2: Trio, folder: Path) -> None:
    """The checkpoint is what was saved, though the weights change while it is written."""
    state = saved_state(qwen2.target)
    expected = raw_state(state)
    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        checkpointer.save(1, state)
        for tensor in state.values():
            tensor.zero_()
        checkpointer.wait()
        assert raw_state(load_state_dict(list_checkpoints(folder)[1], qwen2.base)) == expected


def test_memory_of_copies_is_used_again(qwen2: Trio, folder: Path) -> None:
    """Two copies at most, in the same memory; also when a tensor changes its shape."""
    state = saved_state(qwen2.target)
    state["more"] = torch.zeros(3)
    places: list[set[int]] = []
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state)
            places.append({t.data_ptr() for copy in checkpointer._snapshots for t in copy.values()})
        assert places[1] == places[2] == places[3]
        assert len(places[1]) == 2 * len(state)
        state["more"] = torch.ones(5)
        checkpointer.save(4, state)
        checkpointer.wait()
        assert load_state_dict(list_checkpoints(folder)[4], qwen2.base)["more"].tolist() == [1] * 5


def test_steps_go_up_unless_later_ones_are_discarded(qwen2: Trio, folder: Path) -> None:
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=4) as checkpointer:
        states = train(checkpointer, range(1, 5))
        with pytest.raises(OutputError, match="It holds a checkpoint of step 4"):
            checkpointer.save(3, tiny_qwen2())
        with pytest.raises(ValueError, match="not at least 0"):
            checkpointer.save(-1, tiny_qwen2())
        checkpointer.discard_after(2)
        assert checkpointer.steps == [1, 2]
        states |= train(checkpointer, range(3, 5))
    assert names(folder)[2:] == ["step-00000003", "step-00000004-on-00000003"]
    check_restored(folder, qwen2.base, states)


def test_a_new_process_begins_with_an_anchor(qwen2: Trio, folder: Path) -> None:
    states: dict[int, dict[str, object]] = {}
    for steps in (range(2), range(2, 4)):
        with DeltaCheckpointer(folder, qwen2.base, anchor_every=10, resume=True) as checkpointer:
            states |= train(checkpointer, steps)
    assert names(folder)[2] == "step-00000002"
    check_restored(folder, qwen2.base, states)


def test_another_run_s_checkpoints_are_kept(qwen2: Trio, folder: Path) -> None:
    """A script that runs twice: pruning would delete what the first one left."""
    with DeltaCheckpointer(folder, qwen2.base, keep=3) as checkpointer:
        states = train(checkpointer, range(1, 4))
    with DeltaCheckpointer(folder, qwen2.base, keep=3) as checkpointer:
        with pytest.raises(OutputError, match="another run") as caught:
            checkpointer.save(4, tiny_qwen2())
        assert "load_into(model)" in caught.value.fix
    check_restored(folder, qwen2.base, states)
    ways: list[Callable[[DeltaCheckpointer], object]] = [
        lambda checkpointer: checkpointer.load_into(tiny_qwen2()),
        lambda checkpointer: checkpointer.discard_after(4),
        lambda checkpointer: checkpointer.resume(),
    ]
    for step, resumed in enumerate(ways, 4):
        with DeltaCheckpointer(folder, qwen2.base, keep=3) as checkpointer:
            resumed(checkpointer)
            checkpointer.save(step, tiny_qwen2())
    assert list(list_checkpoints(folder)) == [4, 5, 6]


def optimizer_state(model: torch.nn.Module) -> tuple[torch.optim.AdamW, dict[str, Any]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, copy.deepcopy(optimizer.state_dict())


def test_the_state_of_an_optimizer_comes_back_as_it_was_then(qwen2: Trio, folder: Path) -> None:
    """Though training goes on while it is written, and overwrites it."""
    model = tiny_qwen2()
    optimizer, expected = optimizer_state(model)
    odd = {
        "sparse": torch.eye(3).to_sparse(), "conjugate": torch.tensor([1 + 2j]).conj(), "none": None,
        "strided": torch.arange(6).view(2, 3).t(), "tuple": (1, torch.zeros(())), "empty": torch.zeros(0, 2),
    }  # fmt: skip
    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        for step in (1, 2):
            training = {"optimizer.pt": optimizer.state_dict(), "odd.pt": odd, "note.txt": b"\0plain"}
            checkpointer.save(step, model, training=training)
        for value in optimizer.state.values():
            value["exp_avg"].zero_()
        optimizer.param_groups[0]["lr"] = 0.5
        checkpointer.wait()
        for at in (1, None):
            loaded = checkpointer.load_training(at)
            torch.testing.assert_close(loaded.pop("optimizer.pt"), expected, rtol=0, atol=0)
            torch.testing.assert_close(loaded.pop("odd.pt"), odd, rtol=0, atol=0)
            assert loaded == {"note.txt": b"\0plain"}
    assert list(list_checkpoints(folder)) == [1, 2]


def test_only_kept_checkpoints_have_an_optimizer_s_state(qwen2: Trio, folder: Path) -> None:
    """What a later one is made against needs its weights only. What a killed process left goes away."""
    (folder / ".partial-training").mkdir(parents=True)
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3, keep=2) as checkpointer:
        assert not (folder / ".partial-training").exists()
        (folder / "training-00000004").mkdir()
        for step in range(6):
            checkpointer.save(step, tiny_qwen2(), training={"step.pt": step})
        checkpointer.wait()
        assert checkpointer.steps == [3, 4, 5]
        assert [checkpointer.load_training(step) for step in (4, 5)] == [{"step.pt": 4}, {"step.pt": 5}]
        with pytest.raises(CheckpointError, match=r"Checkpoint 3 .* holds weights only") as caught:
            checkpointer.load_training(3)
        assert "4, 5;" in caught.value.fix
        checkpointer.discard_after(4)
        assert sorted(path.name for path in folder.glob("training-*")) == ["training-00000004"]


_FULL = """
import resource, signal, sys, torch
from deltaweights.torch import DeltaCheckpointer
folder, base = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with DeltaCheckpointer(folder, base) as checkpointer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    checkpointer.save(1, {"w0": torch.zeros(8, 8)}, training={"optimizer.pt": torch.zeros(1 << 18)})
"""


def test_a_disk_that_fills_up_under_the_optimizer_s_state_is_told(tmp_path: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(state_of(0), tmp_path / "base.safetensors")
    command = [sys.executable, "-c", _FULL, str(folder), str(tmp_path / "base.safetensors")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "OutputError: Cannot write optimizer.pt\nFile too large." in ended.stderr
    assert list_checkpoints(folder) == {}
    assert not list(folder.glob("training-*"))


class NotPlain:
    """What ``weights_only`` does not build."""


@pytest.mark.parametrize("value", [NotPlain(), lambda: 5], ids=["class", "function"])
def test_what_could_not_be_loaded_again_is_refused(qwen2: Trio, folder: Path, value: object) -> None:
    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        checkpointer.save(1, tiny_qwen2(), training={"optimizer.pt": {"state": [value]}})
        with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be saved"):
            checkpointer.wait()
        assert checkpointer.steps == []
        checkpointer.save(1, tiny_qwen2(), training={"optimizer.pt": 5})
        checkpointer.wait()
        assert checkpointer.load_training() == {"optimizer.pt": 5}
        with pytest.raises(ValueError, match="not a file name"):
            checkpointer.save(2, tiny_qwen2(), training={"../optimizer.pt": 5})


def test_a_state_with_code_in_it_is_not_run(qwen2: Trio, folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        checkpointer.save(1, tiny_qwen2(), training={"optimizer.pt": 5})
        checkpointer.wait()
        path = checkpointer.training_folder() / "optimizer.pt"
        torch.save(Attack(), path)
        with pytest.raises(CheckpointError, match="more than plain data"):
            checkpointer.load_training()
        assert not (tmp_path / "ran").exists()
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpointer.load_training()


def test_of_several_processes_only_the_first_holds_the_folder(
    qwen2: Trio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others read from it; one that writes all the same is refused."""
    with DeltaCheckpointer(folder, qwen2.base) as first:
        first.save(1, tiny_qwen2())
        first.wait()
        monkeypatch.setenv("RANK", "1")
        with DeltaCheckpointer(folder, qwen2.base) as other:
            assert other.load_into(tiny_qwen2()) == 1
            with pytest.raises(OutputError, match="another process"):
                other.save(2, tiny_qwen2())


_ENDS = """
import sys, torch
from deltaweights.torch import DeltaCheckpointer
folder, base = sys.argv[1:]
checkpointer = DeltaCheckpointer(folder, base)
generator = torch.Generator().manual_seed(5)
checkpointer.save(5, {f"w{k}": torch.randn(128, 128, generator=generator) for k in range(8)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ZeroDivisionError"])
def test_a_script_that_does_not_close_loses_nothing(tmp_path: Path, folder: Path, end: str) -> None:
    from safetensors.torch import save_file

    save_file(state_of(0), tmp_path / "base.safetensors")
    command = [sys.executable, "-c", _ENDS + end, str(folder), str(tmp_path / "base.safetensors")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1), ended.stderr
    loaded = load_state_dict(list_checkpoints(folder)[5], tmp_path / "base.safetensors")
    assert raw_state(loaded) == raw_state(state_of(5))


@pytest.mark.slow
def test_what_a_script_loses_at_its_end_is_told(tmp_path: Path, folder: Path) -> None:
    command = [sys.executable, "-c", _ENDS, str(folder), str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "was lost" in ended.stderr
    assert "nowhere" in ended.stderr


def test_a_chain_with_a_gap_is_left_out(qwen2: Trio, folder: Path) -> None:
    with DeltaCheckpointer(folder, qwen2.base, anchor_every=3) as checkpointer:
        train(checkpointer, range(4))
        shutil.rmtree(folder / "step-00000001-on-00000000")
        assert checkpointer.steps == [0, 3]
        with pytest.raises(CheckpointError, match="has no checkpoint 2"):
            checkpointer.load_into(tiny_qwen2(), 2)


def test_a_folder_without_checkpoints(qwen2: Trio, folder: Path) -> None:
    assert list_checkpoints(folder) == {}
    with DeltaCheckpointer(folder, qwen2.base) as checkpointer:
        assert checkpointer.steps == []
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpointer.load_into(tiny_qwen2())


def test_one_writer_at_a_time(qwen2: Trio, folder: Path) -> None:
    with (
        DeltaCheckpointer(folder, qwen2.base),
        pytest.raises(OutputError, match="being written to by another process"),
    ):
        DeltaCheckpointer(folder, qwen2.base)
    DeltaCheckpointer(folder, qwen2.base).close()


def test_an_error_in_the_background_is_raised_by_the_next_call(qwen2: Trio, folder: Path) -> None:
    checkpointer = DeltaCheckpointer(folder, folder / "nowhere")
    checkpointer.save(1, saved_state(qwen2.target))
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpointer.save(2, saved_state(qwen2.target))
    checkpointer.save(3, saved_state(qwen2.target))
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpointer.close()
    DeltaCheckpointer(folder, qwen2.base).close()
    assert names(folder) == []


def test_an_error_of_the_training_is_not_hidden(qwen2: Trio, folder: Path) -> None:
    def train_and_fail() -> None:
        with DeltaCheckpointer(folder, folder / "nowhere") as checkpointer:
            checkpointer.save(1, saved_state(qwen2.target))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()


@pytest.mark.parametrize("options", [{"anchor_every": 0}, {"anchor_every": 101}, {"keep": 0}])
def test_numbers_out_of_range(qwen2: Trio, folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is "):
        DeltaCheckpointer(folder, qwen2.base, **options)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made(qwen2: Trio, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write to"):
        DeltaCheckpointer(tmp_path / "file" / "folder", qwen2.base)


def test_the_base_is_hashed_once_unless_it_changes(qwen2: Trio, folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen2.base, base)

    def recorded(step: int) -> dict[str, str]:
        text = (list_checkpoints(folder)[step][0] / "deltaweights.json").read_bytes()
        return {file.path: file.sha256 for file in Manifest.from_json(text).base.files}

    with DeltaCheckpointer(folder, base) as checkpointer:
        train(checkpointer, range(1, 3))
        assert recorded(1) == recorded(2)
        known = dict(checkpointer._known)
        assert set(known.values()) == set(recorded(2).values())
        (base / "notes.txt").write_text("new")
        (base / "config.json").write_text("{}")
        train(checkpointer, range(3, 4))
    changed = recorded(3)
    assert {path for path in changed if changed[path] != recorded(2).get(path)} == {
        "notes.txt",
        "config.json",
    }


_WRITER = """
import sys, torch
from deltaweights.torch import DeltaCheckpointer
folder, base = sys.argv[1:]
with DeltaCheckpointer(folder, base, anchor_every=3, keep=4, resume=True) as checkpointer:
    first = max(checkpointer.steps, default=-1) + 1
    print("first", first, flush=True)
    for step in range(first, 10_000):
        generator = torch.Generator().manual_seed(step)
        checkpointer.save(step, {f"w{k}": torch.randn(128, 128, generator=generator) for k in range(8)})
"""


def state_of(step: int) -> dict[str, Tensor]:
    """What the process above saves at a step."""
    generator = torch.Generator().manual_seed(step)
    return {f"w{k}": torch.randn(128, 128, generator=generator) for k in range(8)}


def moments(folder: Path) -> Iterator[bool]:
    """Whether a checkpoint is half made, looked at again and again for a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        yield any((folder / ".partial").glob("*"))
        time.sleep(0.001)
    raise AssertionError("no checkpoint was written in a minute")


@pytest.mark.slow
def test_a_kill_loses_one_checkpoint_at_most(tmp_path: Path, folder: Path) -> None:
    """A real process, killed twice in the middle of a save; the second goes on from what the first left."""
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file(state_of(0), tmp_path / "base" / "model.safetensors")
    last = -1
    for _ in range(2):
        command = [sys.executable, "-c", _WRITER, str(folder), str(tmp_path / "base")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            assert writer.stdout.readline() == f"first {last + 1}\n"
            begun = last
            for half_made in moments(folder):
                begun = max([begun, *list_checkpoints(folder)])
                if half_made and begun >= last + 5:
                    break
            writer.send_signal(signal.SIGKILL)
        chains = list_checkpoints(folder)
        assert max(chains) >= begun
        assert len(chains) >= 4
        for step, chain in chains.items():
            assert raw_state(load_state_dict(chain, tmp_path / "base")) == raw_state(state_of(step))
        last = max(chains)
    with DeltaCheckpointer(folder, tmp_path / "base") as checkpointer:
        assert not (folder / ".partial").exists()
        assert checkpointer.steps[-1] == last


def test_errors_are_ours(qwen2: Trio, folder: Path) -> None:
    """A folder that vanishes under the process."""
    checkpointer = DeltaCheckpointer(folder, qwen2.base)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    checkpointer.save(1, saved_state(qwen2.target))
    with pytest.raises(DeltaWeightsError):
        checkpointer.close()
