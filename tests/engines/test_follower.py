"""Ranks of an engine follow a weight stream: two-phase, all or none, by sparse writes or loaded whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaweights import make_delta
from deltaweights.engines import serve_folder
from deltaweights.engines.follower import Follower
from deltaweights.engines.host_mirror import HostMirror
from deltaweights.errors import CheckpointError, DeltaError, DeltaWeightsError, DiskSpaceError
from deltaweights.torch import DeltaPublisher, DeltaSubscriber

from .test_placement import RANKS, Sharded, bits, checkpoint, state_bits


class Engine:
    """An engine of two ranks, each with its part of a model, in two threads."""

    def __init__(
        self,
        stream: Path,
        folder: Path,
        loaded: dict[str, Tensor],
        *,
        base: str | None,
        make: Callable[[int], nn.Module] = Sharded,
    ) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=60)
        self._told = [""] * RANKS
        self.models = [make(rank) for rank in range(RANKS)]
        self.reloads = 0
        self.ranks = []
        for rank, model in enumerate(self.models):
            model.load_weights(iter(loaded.items()))  # type: ignore[operator]
            subscriber = DeltaSubscriber(str(stream), threads=1)
            layout = subscriber.newest().tensors
            mirror = HostMirror(layout, key="engine", base=base, folder=str(folder), threads=1)
            follower = Follower(
                model, subscriber, mirror, layout, reload=self._reload(model), exchange=self._exchange(rank)
            )
            self.ranks.append(follower)

    def _reload(self, model: nn.Module) -> Callable[[Iterator[tuple[str, Tensor]]], object]:
        def reload(tensors: Iterator[tuple[str, Tensor]]) -> object:
            self.reloads += 1
            return model.load_weights(tensors)  # type: ignore[operator]

        return reload

    def _exchange(self, rank: int) -> Callable[[str], list[str]]:
        def exchange(value: str) -> list[str]:
            self._told[rank] = value
            self._barrier.wait()
            told = list(self._told)
            self._barrier.wait()
            return told

        return exchange

    def prepare(self, step: int) -> None:
        for rank in self.ranks:
            rank.prepare(step)

    def commit(self, step: int) -> None:
        """On both ranks at once, as an engine calls its workers; raises what the first of them raises."""
        with ThreadPoolExecutor(RANKS) as pool:
            futures = [pool.submit(rank.commit, step) for rank in self.ranks]
        errors = [future.exception() for future in futures]
        assert len({error is None for error in errors}) == 1, "all ranks or none"
        for error in filter(None, errors):
            raise error

    def step(self, step: int) -> None:
        for rank in self.ranks:
            rank.start()
        self.commit(step)
        for rank in self.ranks:
            rank.finish()

    def bits(self) -> list[dict[str, bytes]]:
        return [state_bits(model) for model in self.models]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


class Setting:
    """A trainer, its stream and its base; engines that follow it."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.folder, self._opened = folder, opened
        self.base = checkpoint(0)
        self.states = {0: self.base}
        (folder / "base").mkdir()
        save_file(self.base, folder / "base" / "model.safetensors")
        self.stream = folder / "stream"
        self.publisher = opened.enter_context(DeltaPublisher(str(self.stream), self.base, threads=1))

    def publish(self, step: int) -> None:
        """A state that differs in a fifth of the weights, with a NaN of odd bits and a negative zero."""
        random = torch.Generator().manual_seed(step)
        state = {name: tensor.clone() for name, tensor in self.states[max(self.states)].items()}
        for tensor in state.values():
            flat = bits(tensor)
            flat[torch.rand(flat.shape, generator=random) < 0.2] ^= 3
        bits(state["up.weight"])[step], bits(state["down.weight"])[step] = 0x7F81, -(2**15)
        self.states[step] = state
        self.publisher.publish(step, state)

    def engine(
        self,
        loaded: dict[str, Tensor] | None = None,
        *,
        base: str | None = "base",
        make: Callable[[int], nn.Module] = Sharded,
    ) -> Engine:
        where = None if base is None else str(self.folder / base)
        engine = Engine(self.stream, self.folder, loaded or self.base, base=where, make=make)
        self._opened.callback(engine.close)
        return engine

    def expected(self, step: int, make: Callable[[int], nn.Module] = Sharded) -> list[dict[str, bytes]]:
        """What a fresh load of the step has on each rank."""
        models = [make(rank) for rank in range(RANKS)]
        for model in models:
            model.load_weights(iter(self.states[step].items()))  # type: ignore[operator]
        return [state_bits(model) for model in models]


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with ExitStack() as opened:
        yield Setting(tmp_path, opened)


def test_ten_steps_are_those_of_fresh_loads(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    engine = setting.engine()
    for step in range(1, 11):
        setting.publish(step)
        engine.prepare(step)
        for rank in engine.ranks:
            assert rank._future is not None
            rank._future.result()
        assert engine.bits() == setting.expected(step - 1), (
            "before the commit, the model serves the step before"
        )
        engine.step(step)
        assert engine.bits() == setting.expected(step)
    assert engine.reloads == 0
    assert "loaded whole" not in caplog.text


def test_steps_may_be_left_out_and_are_prepared_once(setting: Setting) -> None:
    engine = setting.engine()
    for step in (1, 2, 3, 4):
        setting.publish(step)
    engine.prepare(1)
    engine.prepare(3)  # instead
    futures = [rank._future for rank in engine.ranks]
    engine.prepare(3)
    assert [rank._future for rank in engine.ranks] == futures
    engine.step(3)
    assert engine.bits() == setting.expected(3)
    engine.step(3)
    assert engine.bits() == setting.expected(3)
    engine.step(4)
    assert engine.bits() == setting.expected(4)
    assert engine.reloads == 0


def test_a_step_published_between_two_ranks_leaves_both_at_the_one_that_was_asked_for(
    setting: Setting,
) -> None:
    engine = setting.engine()
    setting.publish(1)
    engine.ranks[0].prepare(1)
    assert engine.ranks[0]._future is not None
    engine.ranks[0]._future.result()
    setting.publish(2)
    engine.step(1)
    assert engine.bits() == setting.expected(1)
    engine.step(2)
    assert engine.bits() == setting.expected(2)


def test_a_step_published_twice_is_refused_where_ranks_prepared_different_states(setting: Setting) -> None:
    engine = setting.engine()
    setting.publish(1)
    engine.ranks[0].prepare(1)
    assert engine.ranks[0]._future is not None
    engine.ranks[0]._future.result()
    setting.publish(1)
    with pytest.raises(DeltaWeightsError, match="published again meanwhile"):
        engine.commit(1)
    assert engine.bits() == setting.expected(0)
    engine.step(1)
    assert engine.bits() == setting.expected(1)


def test_a_flipped_byte_is_an_error_on_all_ranks_and_the_next_step_is_fine(setting: Setting) -> None:
    engine = setting.engine()
    setting.publish(1)
    engine.step(1)
    setting.publish(2)
    (update,) = setting.stream.glob("0000000002-*.update.safetensors")
    whole = update.read_bytes()
    update.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DeltaError):
        engine.step(2)
    assert engine.bits() == setting.expected(1)
    update.write_bytes(whole)
    setting.publish(3)
    engine.step(3)
    assert engine.bits() == setting.expected(3)
    assert engine.reloads == 0


def test_where_one_rank_cannot_none_writes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = setting.engine()
    setting.publish(1)

    def fails(*args: object, **kwargs: object) -> None:
        raise CheckpointError("The store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.ranks[1]._subscriber, "prepare", fails)
        with pytest.raises(DeltaWeightsError, match=r"was not written\nAnother rank says: The store is gone"):
            engine.step(1)
        assert engine.bits() == setting.expected(0)
    engine.step(1)
    assert engine.bits() == setting.expected(1)
    assert engine.reloads == 0


def test_an_update_that_was_not_finished_is_made_good(setting: Setting) -> None:
    """As where a rank failed after the others had written: the mirror is behind, and bytes are compared."""
    engine = setting.engine()
    setting.publish(1)
    engine.commit(1)
    setting.publish(2)
    engine.step(2)
    assert engine.bits() == setting.expected(2)
    assert engine.reloads == RANKS
    setting.publish(3)
    engine.step(3)
    assert engine.bits() == setting.expected(3)
    assert engine.reloads == RANKS


def test_an_engine_with_other_weights_is_loaded_whole_once(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    engine = setting.engine(checkpoint(7))
    for step in (1, 2):
        setting.publish(step)
        engine.step(step)
        assert engine.bits() == setting.expected(step)
        assert engine.reloads == RANKS
    assert caplog.text.count("will be loaded whole: it is not in the state that the mirror has") == RANKS


def test_without_a_base_the_first_step_begins_at_an_anchor(setting: Setting) -> None:
    engine = setting.engine(checkpoint(7), base=None)
    for step in (1, 2):
        setting.publish(step)
        engine.step(step)
        assert engine.bits() == setting.expected(step)
    assert engine.reloads == RANKS


def test_what_is_cast_is_loaded_whole_each_time(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    def make(rank: int) -> Sharded:
        return Sharded(rank, torch.float32)

    engine = setting.engine(make=make)
    for step in (1, 2):
        setting.publish(step)
        engine.step(step)
        assert engine.bits() == setting.expected(step, make)
    assert engine.reloads == 2 * RANKS
    assert "tensors have no place in the model, such as down.weight" in caplog.text
    assert "tensors that change have no place in it" in caplog.text


def test_a_step_that_is_not_published_yet_may_be_asked_for_again(setting: Setting) -> None:
    engine = setting.engine()
    with pytest.raises(CheckpointError):
        engine.step(1)
    setting.publish(1)
    engine.step(1)
    assert engine.bits() == setting.expected(1)


# The mirror -------------------------------------------------------------------------------------------------


def test_ranks_share_one_file_whose_name_is_gone_once_they_have_it(setting: Setting) -> None:
    engine = setting.engine()
    (file,) = (path for path in setting.folder.glob("deltaweights-mirror-*") if not path.suffix)
    assert file.stat().st_mode & 0o777 == 0o600
    first, second = (rank._mirror.tensors for rank in engine.ranks)
    first["q.weight"][0, 0] = 7
    assert second["q.weight"][0, 0] == 7
    for rank in engine.ranks:
        rank.start()
    assert not list(setting.folder.glob("deltaweights-mirror-*"))
    second["q.weight"][0, 0] = 8
    assert first["q.weight"][0, 0] == 8


def test_the_mirror_begins_with_a_base_that_a_pointer_folder_stands_for(setting: Setting) -> None:
    folder = setting.folder
    (folder / "other").mkdir()
    save_file(checkpoint(5), folder / "other" / "model.safetensors")
    make_delta(folder / "other", folder / "base", folder / "delta")
    serve_folder(folder / "delta", folder / "pointer", base=folder / "other")
    engine = setting.engine(base="pointer")
    setting.publish(1)
    engine.step(1)
    assert engine.bits() == setting.expected(1)
    assert engine.reloads == 0


@pytest.mark.parametrize("make", ["another dtype", "a tensor less", "pointer"])
def test_a_base_that_has_not_the_streams_tensors_is_refused(setting: Setting, make: str) -> None:
    folder = setting.folder
    state = checkpoint(0, torch.float32) if make == "another dtype" else checkpoint(0)
    if make != "another dtype":
        del state["norm.weight"]
    (folder / "other").mkdir()
    save_file(state, folder / "other" / "model.safetensors")
    if make == "pointer":
        make_delta(folder / "base", folder / "other", folder / "delta")
        serve_folder(folder / "delta", folder / "pointer", base=folder / "base")
    with pytest.raises(CheckpointError, match="is not the base of the stream"):
        setting.engine(base="pointer" if make == "pointer" else "other")
    assert not [path for path in folder.glob("deltaweights-mirror-*") if path.suffix != ".lock"]


def test_a_mirror_without_room_is_refused(tmp_path: Path) -> None:
    layout = (("weight", "BF16", (1 << 30, 1 << 20)),)
    with pytest.raises(DiskSpaceError, match="There is no room for the mirror"):
        HostMirror(layout, key="engine", base=None, folder=str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_what_killed_engines_left_is_removed_after_a_day(tmp_path: Path) -> None:
    layout = (("weight", "BF16", (4,)),)
    HostMirror(layout, key="killed", base=None, folder=str(tmp_path))
    HostMirror(layout, key="starts", base=None, folder=str(tmp_path))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 4
    for path in tmp_path.glob("*.lock"):
        os.utime(path, (time.time() - 90_000,) * 2)
        break
    with HostMirror(layout, key="new", base=None, folder=str(tmp_path)):
        now = {found.name for found in tmp_path.iterdir()}
    assert not now & {path.name, path.stem}
    assert len(now & set(left)) == 2
