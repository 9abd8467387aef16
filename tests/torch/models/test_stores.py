"""Base and delta in an object store, for everything in Python that takes a place."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deltaweights import CheckpointError, OutputError, open_target
from deltaweights.engines import read_pointer, serve_folder
from deltaweights.torch import (
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


def test_checkpoints_are_written_to_a_folder_and_say_how_to_copy_it(there: Trio) -> None:
    with pytest.raises(OutputError, match="is a URL, not a folder") as caught:
        DeltaCheckpointer(f"{BUCKET}/run", there.base)
    assert "folder" in caught.value.fix
    with pytest.raises(CheckpointError):
        list_checkpoints(f"{BUCKET}/run")
