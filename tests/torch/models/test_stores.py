"""Base and delta in an object store, for everything in Python that takes a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deltaweights import CheckpointError, OutputError, open_target
from deltaweights.engines import read_pointer, serve_folder
from deltaweights.errors import HubWriteError
from deltaweights.torch import (
    DeltaCallback,
    DeltaCheckpointer,
    from_pretrained,
    list_checkpoints,
    load_into,
    load_state_dict,
    save_delta,
)

from ...checkpoints import contents
from ...conftest import Trio
from ...s3_server import S3Server
from ..tiny_models import nudge, raw_state, tiny_qwen2

BUCKET = "s3://bucket"
RECORD_NAME = "deltaweights-training.json"


@pytest.fixture
def there(s3: S3Server, qwen2: Trio) -> Trio:
    """The same on the store as on disk."""
    for side in ("base", "delta"):
        s3.system.put(str(getattr(qwen2, side)), f"bucket/{side}", recursive=True)
    s3.log.clear()
    return qwen2


def test_weights_are_loaded(there: Trio) -> None:
    model, expected = tiny_qwen2(seed=9), AutoModelForCausalLM.from_pretrained(there.target)
    load_into(model, f"{BUCKET}/delta", f"{BUCKET}/base", sha256=True)
    assert raw_state(model.state_dict()) == raw_state(expected.state_dict())
    model = from_pretrained(f"{BUCKET}/delta", f"{BUCKET}/base")
    assert raw_state(model.state_dict()) == raw_state(expected.state_dict())
    with open_target(f"{BUCKET}/delta", f"{BUCKET}/base") as target:
        state = load_state_dict(there.delta, there.base)
        assert all(target[name].torch().equal(tensor) for name, tensor in state.items())


def test_a_live_model_is_compared_with_a_base_there(there: Trio, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(there.target)
    for place, base in (("near", there.base), ("far", f"{BUCKET}/base")):
        save_delta(model, base, tmp_path / place, max_shard_size="100KB")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


def test_a_pointer_folder_names_places_in_a_store(there: Trio, tmp_path: Path) -> None:
    report = serve_folder(f"{BUCKET}/delta", tmp_path / "served", base=f"{BUCKET}/base")
    assert (report.deltas, report.base) == ((f"{BUCKET}/delta",), f"{BUCKET}/base")
    expected = AutoModelForCausalLM.from_pretrained(there.target)
    model = from_pretrained(tmp_path / "served")
    assert raw_state(model.state_dict()) == raw_state(expected.state_dict())
    with read_pointer(tmp_path / "served", base=there.base) as target:
        assert len(target) > 0


def test_a_place_that_needs_a_secret_in_its_url_is_not_written_down(there: Trio, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no place that could be named"):
        serve_folder(f"{BUCKET}/delta", tmp_path / "served", base=f"{BUCKET}/base?versionId=hush")


def test_checkpoints_against_a_base_there(there: Trio, s3: S3Server, tmp_path: Path) -> None:
    model = tiny_qwen2()
    with DeltaCheckpointer(tmp_path / "run", f"{BUCKET}/base", anchor_every=2) as checkpointer:
        for step in (1, 2):
            nudge(model, seed=step)
            checkpointer.save(step, model)
        restored = tiny_qwen2(seed=9)
        assert checkpointer.load_into(restored) == 2
    assert raw_state(restored.state_dict()) == raw_state(model.state_dict())
    chain = list_checkpoints(tmp_path / "run")[2]
    for path in chain:  # as a mirror of the folder
        s3.system.put(str(path), f"bucket/run/{path.name}", recursive=True)
    restored = tiny_qwen2(seed=8)
    load_into(restored, [f"{BUCKET}/run/{path.name}" for path in chain], f"{BUCKET}/base")
    assert raw_state(restored.state_dict()) == raw_state(model.state_dict())


RUN = f"{BUCKET}/run"


def save(checkpointer: DeltaCheckpointer, steps: range) -> dict[int, dict[str, object]]:
    """Save a model at every step, with a training state; returns what it was then."""
    model, states = tiny_qwen2(), dict[int, dict[str, object]]()
    for step in steps:
        nudge(model, seed=step)
        checkpointer.save(step, model, training={"step.pt": {"step": step}, "note.txt": b"plain"})
        states[step] = dict(raw_state(model.state_dict()))
    checkpointer.wait()
    return states


def check(base: Path, states: dict[int, dict[str, object]]) -> None:
    """Every checkpoint that is there is what was saved."""
    with DeltaCheckpointer(RUN, base) as checkpointer:
        for step in checkpointer.steps:
            model = tiny_qwen2(seed=99)
            checkpointer.load_into(model, step)
            assert raw_state(model.state_dict()) == states[step]


def folders(s3: S3Server) -> set[str]:
    return {path.split("/")[2] for path in s3.system.find("bucket/run")}


def test_checkpoints_are_written_there(there: Trio, s3: S3Server) -> None:
    with DeltaCheckpointer(RUN, f"{BUCKET}/base", anchor_every=3, keep=2) as checkpointer:
        states = save(checkpointer, range(1, 6))
        assert checkpointer.steps == [4, 5]
        assert checkpointer.load_training(4) == {"step.pt": {"step": 4}, "note.txt": b"plain"}
        copy = checkpointer.training_folder()
        assert sorted(path.name for path in copy.iterdir()) == ["note.txt", "step.pt"]
        with pytest.raises(CheckpointError, match="has no checkpoint 3"):
            checkpointer.load_training(3)
    assert not copy.exists()
    chains = list_checkpoints(RUN)
    assert chains[5] == [f"{RUN}/step-00000004", f"{RUN}/step-00000005-on-00000004"]
    load_into(restored := tiny_qwen2(seed=8), chains[5], there.base)
    assert raw_state(restored.state_dict()) == states[5]
    assert folders(s3) == {
        "step-00000004", "step-00000005-on-00000004", "training-00000004", "training-00000005"
    }  # fmt: skip
    check(there.base, states)
    with DeltaCheckpointer(RUN, there.base) as checkpointer:
        checkpointer.discard_after(4)
    assert folders(s3) == {"step-00000004", "training-00000004"}


def test_readers_see_whole_checkpoints(there: Trio, s3: S3Server) -> None:
    """The manifest comes last, after the training state and its record, and goes first."""
    s3.log.clear()
    with DeltaCheckpointer(RUN, there.base, keep=1) as checkpointer:
        save(checkpointer, range(1, 3))
    written = [
        request.path.removeprefix("/bucket/run/")
        for request in s3.log
        if request.method == "PUT" and "/.deltaweights/" not in request.path
    ]
    first = [path for path in written if "1/" in path.replace("00000001", "1")]
    assert first[2] == "training-00000001/deltaweights-training.json"
    assert first[-1] == "step-00000001/deltaweights.json"
    gone = [request.path for request in s3.log if request.method == "DELETE" and "00000001/" in request.path]
    gone = [path.removeprefix("/bucket/run/") for path in gone if "/.deltaweights/" not in path]
    assert gone[0] == "training-00000001/deltaweights-training.json"
    assert next(path for path in gone if path.startswith("step")) == "step-00000001/deltaweights.json"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("path", ["step.pt", "model.safetensors", "deltaweights.json"])
def test_a_checkpoint_that_fails_never_was(there: Trio, s3: S3Server, path: str) -> None:
    with DeltaCheckpointer(RUN, there.base) as checkpointer:
        states = save(checkpointer, range(1, 2))
        name = path.replace("model", "delta-00001-of-00001")
        s3.fail(f"2/{name}", method="PUT", status=503, times=None)
        checkpointer.save(2, tiny_qwen2(), training={"step.pt": 2})
        with pytest.raises(HubWriteError):
            checkpointer.wait()
        s3.heal()
        assert checkpointer.steps == [1]
        assert folders(s3) == {"step-00000001", "training-00000001", ".deltaweights"}
        states |= save(checkpointer, range(2, 3))
    check(there.base, states)
    assert folders(s3) == {f"{kind}-0000000{step}" for kind in ("step", "training") for step in (1, 2)}
    assert not s3.system.list_multipart_uploads("bucket")


def test_what_a_killed_run_left_is_removed(there: Trio, s3: S3Server) -> None:
    for path in ("step-00000002-on-00000001/delta-00001-of-00001.safetensors", "training-00000002/step.pt"):
        s3.system.pipe_file(f"bucket/run/{path}", b"half")
        s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=f"run/{path}")
    s3.system.pipe_file("bucket/run/notes/step.txt", b"the user's")
    with DeltaCheckpointer(RUN, there.base) as checkpointer:
        assert checkpointer.steps == []
        save(checkpointer, range(1, 2))
    assert folders(s3) == {"step-00000001", "training-00000001", "notes"}
    assert not s3.system.list_multipart_uploads("bucket")


def test_who_comes_last_holds_the_place(there: Trio, s3: S3Server) -> None:
    with DeltaCheckpointer(RUN, there.base) as first, DeltaCheckpointer(RUN, there.base) as second:
        states = save(first, range(1, 2))
        assert second.load_into(tiny_qwen2()) == 1  # takes nothing over
        states |= save(first, range(2, 3))
        states |= save(second, range(3, 4))
        first.save(4, tiny_qwen2())
        with pytest.raises(OutputError, match="is being written to by another process"):
            first.wait()
        states |= save(second, range(4, 5))
    check(there.base, states)
    assert ".deltaweights" not in folders(s3)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("content", "The SHA-256 of 'step.pt' is not the record's"),
        ("size", "missing or not of the record's size"),
        ("path", "one that lies elsewhere"),
        ("record", "is damaged"),
    ],
)
def test_a_damaged_training_state_is_refused(there: Trio, s3: S3Server, what: str, error: str) -> None:
    with DeltaCheckpointer(RUN, there.base) as checkpointer:
        save(checkpointer, range(1, 2))
    place = "bucket/run/training-00000001"
    state, record = (s3.system.cat_file(f"{place}/{name}") for name in ("step.pt", RECORD_NAME))
    if what in ("content", "size"):
        s3.system.pipe_file(f"{place}/step.pt", state[:-1] + (b"" if what == "size" else b"?"))
    else:
        bad = record.replace(b"step.pt", b"../a.pt") if what == "path" else b"{}"
        s3.system.pipe_file(f"{place}/{RECORD_NAME}", bad)
    with (
        DeltaCheckpointer(RUN, there.base) as checkpointer,
        pytest.raises(CheckpointError, match=error),
    ):
        checkpointer.load_training()


def test_in_memory_too(there: Trio, memory: Any) -> None:
    with DeltaCheckpointer("memory://run", there.base, anchor_every=2) as checkpointer:
        save(checkpointer, range(1, 3))
        assert checkpointer.load_into(tiny_qwen2()) == 2
        assert checkpointer.load_training()["step.pt"] == {"step": 2}


def test_the_trainer_goes_on_from_there(there: Trio, tmp_path: Path) -> None:
    data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4

    def train(steps: int) -> dict[str, object]:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_strategy="no", report_to="none", use_cpu=True
        )
        model = tiny_qwen2()
        with DeltaCheckpointer(RUN, there.base, keep=1) as checkpointer:
            callback = DeltaCallback(checkpointer, every=1)
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
            trainer.train(resume_from_checkpoint=callback.restore(trainer))
            assert checkpointer.steps == [steps]
        return dict(raw_state(model.state_dict()))

    train(1)
    assert train(2)
    assert list(list_checkpoints(RUN)) == [2]


def test_a_place_that_is_only_read_is_refused(there: Trio) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(OutputError, match="A web server is only read"):
        DeltaCheckpointer("https://host/run", there.base)


def test_a_pointer_folder_is_written_to_a_store(there: Trio, s3: S3Server, tmp_path: Path) -> None:
    place = f"{BUCKET}/served"
    report = serve_folder(f"{BUCKET}/delta", place, base=f"{BUCKET}/base")
    assert (report.out, report.base) == (place, f"{BUCKET}/base")
    paths = [path.removeprefix("bucket/served/") for path in s3.system.find("bucket/served")]
    serve_folder(f"{BUCKET}/delta", tmp_path / "served", base=f"{BUCKET}/base")
    assert {path: s3.system.cat_file(f"bucket/served/{path}") for path in paths} == contents(
        tmp_path / "served"
    )
    puts = [request.path for request in s3.log if request.method == "PUT" and "/served/" in request.path]
    assert puts[-1] == "/bucket/served/deltaweights-pointer.json"
    with read_pointer(place) as target, open_target(place) as same:
        assert list(target) == list(same)
        assert len(target) > 0
    report = serve_folder(place, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "served")
