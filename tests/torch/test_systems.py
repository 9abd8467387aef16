"""Streams and checkpoints on systems that lack what Linux has."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from deltaweights import OutputError
from deltaweights.torch import DeltaCheckpointer, DeltaPublisher, DeltaSubscriber

from ..conftest import Trio
from ..storage.test_systems import LOCKLESS, raises
from .stream.streams import Net, bits, train


@pytest.mark.usefixtures("elsewhere")
def test_a_stream_is_published_and_followed_elsewhere(tmp_path: Path) -> None:
    model, engine = Net(), Net()
    subscriber = DeltaSubscriber(tmp_path / "stream")
    with DeltaPublisher(tmp_path / "stream", model, anchor_every=2) as publisher:
        for step in (1, 2, 3):
            train(model, step)
            publisher.publish(step, model)
            subscriber.sync(engine)
            assert bits(engine) == bits(model)
    late = Net(seed=5)
    assert DeltaSubscriber(tmp_path / "stream").sync(late).from_anchor
    assert bits(late) == bits(model)


@pytest.mark.parametrize("code", LOCKLESS)
def test_checkpoints_are_kept_on_a_file_system_without_locks(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", raises(getattr(errno, code)))
    with DeltaCheckpointer(tmp_path / "run", trio.base) as checkpointer:
        assert checkpointer.steps == []


def test_checkpoints_that_cannot_be_locked_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", raises(errno.EIO))
    with pytest.raises(OutputError, match="Cannot lock") as caught:
        DeltaCheckpointer(tmp_path / "run", "base")
    assert caught.value.fix
