"""The lazy view of the target: its tensors, byte for byte, decoded on demand and without writing files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import deserialize

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    ManifestError,
    Target,
    TensorView,
    apply_delta,
    make_delta,
    open_target,
)
from deltaweights.checkpoint import Tensor, open_checkpoint
from deltaweights.delta.chain import open_recipe

from ..checkpoints import Array, bf16, contents, f32, payload_places, random_array, weights, write_safetensors
from ..conftest import CHUNK_BYTES, Trio


@pytest.fixture
def target(trio: Trio) -> Iterator[Target]:
    with open_target(trio.delta, trio.base) as target:
        yield target


# What the view shows ---------------------------------------------------------------------------------


def test_every_tensor_is_the_targets_byte_for_byte(trio: Trio, target: Target) -> None:
    expected = _arrays(trio.target)
    assert {name: _array(view) for name, view in target.items()} == expected
    assert len(expected) == 13


def test_the_safetensors_library_reads_the_same(trio: Trio, target: Target) -> None:
    seen = 0
    for path in trio.target.glob("*.safetensors"):
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            view = target[name]
            assert view.data.tobytes() == bytes(tensor["data"])
            assert view.shape == tuple(tensor["shape"])
            seen += 1
    assert seen == len(target)


def test_it_is_a_mapping_from_names(trio: Trio, target: Target) -> None:
    with open_checkpoint(trio.target) as checkpoint:
        names = [tensor.info.name for tensor in checkpoint.tensors]
    assert list(target) == list(target.keys()) == names
    assert len(target) == len(names)
    assert "lm_head" in target
    assert isinstance(target, Mapping)


def test_what_the_target_does_not_have_is_a_key_error(target: Target) -> None:
    """Nor what only the base has."""
    for name in ("nothing", "model.gone"):
        assert name not in target
        assert target.get(name) is None
        for access in (target.__getitem__, target.dtype, target.shape):
            with pytest.raises(KeyError, match=name):
                access(name)


def test_dtype_and_shape_are_known_without_decoding(target: Target) -> None:
    assert (target.dtype("model.embed"), target.shape("model.embed")) == ("BF16", (424, 64))
    assert (target.dtype("model.scalar"), target.shape("model.scalar")) == ("F32", ())
    assert (target.dtype("model.empty"), target.shape("model.empty")) == ("F32", (0, 4))


def test_a_tensor_can_be_read_again_and_is_ones_own(target: Target) -> None:
    first = target["model.embed"]
    before = first.data.tobytes()
    first.data[:] = 0
    assert target["model.embed"].data.tobytes() == before


def test_of_two_tensors_of_one_name_the_first_shards_counts(tmp_path: Path) -> None:
    for side, seed in (("base", 1), ("target", 2)):
        for part in ("unet", "vae"):
            array = random_array("U8", (9,), seed + 10 * (part == "vae"))
            write_safetensors(tmp_path / side / part / "m.safetensors", {"w": array})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    with open_target(tmp_path / "delta", tmp_path / "base") as target:
        assert list(target) == ["w"]
        assert _array(target["w"]) == random_array("U8", (9,), 2)


# What it does not do ---------------------------------------------------------------------------------


def test_reading_writes_nothing(trio: Trio, tmp_path: Path) -> None:
    folder = tmp_path / "trio"
    for place in trio:
        shutil.copytree(place, folder / place.name)
    before = _state(tmp_path)
    with open_target(folder / "delta", folder / "base") as target:
        assert all(view.data.size >= 0 for view in target.values())
    assert _state(tmp_path) == before


def test_asking_for_a_name_reads_no_weights(trio: Trio, tmp_path: Path) -> None:
    """A tensor may have gigabytes. The base is made wrong, so reading it would be an error."""
    shutil.copytree(trio.base, tmp_path / "base")
    with open_target(trio.delta, tmp_path / "base") as target:
        for path in (tmp_path / "base").glob("*.safetensors"):
            with open(path, "r+b") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                file.seek(start)
                file.write(b"\xa5" * (path.stat().st_size - start))
        assert all(name in target for name in list(target))
        assert len(target) == 13
        assert target.dtype("model.layers.0.weight") == "BF16"
        with pytest.raises(BaseMismatchError):
            target["model.layers.0.weight"]


# The base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["one file", "a single .safetensors file", "a file a tensor", "subfolders"]
)
def test_the_base_may_be_sharded_otherwise_than_when_the_delta_was_made(
    trio: Trio, tmp_path: Path, layout: str
) -> None:
    arrays = _arrays(trio.base)
    base = tmp_path / "base"
    if layout in ("one file", "a single .safetensors file"):
        write_safetensors(base / "all.safetensors", dict(reversed(arrays.items())))
    elif layout == "a file a tensor":
        for name, array in arrays.items():
            write_safetensors(base / f"{name}.safetensors", {name: array})
    else:
        for k, (name, array) in enumerate(arrays.items()):
            write_safetensors(base / f"part-{k % 3}" / f"{k}.safetensors", {name: array})
    for other in ("config.json", "README.md", "LICENSE"):  # what the target takes from the base as it is
        shutil.copy(trio.base / other, base / other)
    with open_target(trio.delta, base) as target:
        assert {name: _array(view) for name, view in target.items()} == _arrays(trio.target)
    if layout == "a single .safetensors file":
        with open_target(trio.delta, base / "all.safetensors") as target:
            assert {name: _array(view) for name, view in target.items()} == _arrays(trio.target)
    apply_delta(trio.delta, tmp_path / "out", base=base)
    assert contents(tmp_path / "out") == contents(trio.target)


def test_a_base_is_not_needed_where_nothing_is_taken_from_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "base.safetensors", {"a": random_array("U8", (3,), 1)})
    write_safetensors(tmp_path / "target.safetensors", {"b": random_array("U8", (5,), 2)})
    make_delta(tmp_path / "base.safetensors", tmp_path / "target.safetensors", tmp_path / "delta")
    with open_target(tmp_path / "delta") as target:
        assert _array(target["b"]) == random_array("U8", (5,), 2)


def test_of_chunks_in_a_row_only_those_are_read_of_the_base_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on the Hub, and `plan` counts on it."""
    old = random_array("BF16", (5 * 2048,), 1)
    bits = np.frombuffer(old.data, np.uint16) + np.uint16(1)
    bits[2048:4096] = np.random.default_rng(2).integers(0, 1 << 16, 2048, np.uint16)
    for side, data in (("base", old.data), ("target", bits.tobytes())):
        write_safetensors(tmp_path / side / "m.safetensors", {"w": Array("BF16", old.shape, data)})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", chunk_bytes=4096)
    spans: list[tuple[int, int]] = []
    real = Tensor.read_into

    def watched(self: Tensor, start: int, out: NDArray[np.uint8]) -> None:
        if self.shard.path == "m.safetensors":
            spans.append((start, start + out.size))
        real(self, start, out)

    with open_recipe(tmp_path / "delta", tmp_path / "base") as target:
        recipe = target.shard("m.safetensors").tensors["w"]
        assert [recipe.needs_base(index) for index in range(5)] == [True, False, True, True, True]
        monkeypatch.setattr(Tensor, "read_into", watched)
        out = np.empty(recipe.info.nbytes, np.uint8)
        recipe.decode(0, 5, out)
    assert out.tobytes() == bits.tobytes()
    assert spans == [(0, 4096), (8192, 20480)]


def test_a_base_that_is_needed_must_be_given(trio: Trio) -> None:
    with pytest.raises(CheckpointError, match="needs its base") as caught:
        open_target(trio.delta)
    assert "base=" in caught.value.fix


def test_a_base_without_the_tensors_is_refused_and_named(trio: Trio, tmp_path: Path) -> None:
    arrays = _arrays(trio.base)
    del arrays["model.layers.0.weight"]
    write_safetensors(tmp_path / "base.safetensors", arrays)
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.weight") as caught:
        open_target(trio.delta, tmp_path / "base.safetensors")
    assert "base.safetensors" in caught.value.what


@pytest.mark.parametrize(
    "wrong", [f32(weights((300, 200))), bf16(weights((200, 300))), bf16(weights((300, 199)))]
)
def test_a_base_whose_tensors_have_another_dtype_or_shape_is_refused(
    trio: Trio, tmp_path: Path, wrong: Array
) -> None:
    write_safetensors(tmp_path / "base.safetensors", {**_arrays(trio.base), "model.layers.0.weight": wrong})
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.weight"):
        open_target(trio.delta, tmp_path / "base.safetensors")


def test_a_wrong_bit_in_the_base_is_found_in_the_chunk_where_it_is(trio: Trio, tmp_path: Path) -> None:
    arrays = _arrays(trio.base)
    old = arrays["model.layers.0.weight"]
    data = bytearray(old.data)
    data[CHUNK_BYTES + 5] ^= 1
    arrays["model.layers.0.weight"] = Array(old.dtype, old.shape, bytes(data))
    write_safetensors(tmp_path / "base.safetensors", arrays)
    expected = _arrays(trio.target)
    with open_target(trio.delta, tmp_path / "base.safetensors") as target:
        for name in target:
            if name == "model.layers.0.weight":
                with pytest.raises(BaseMismatchError, match=f"bytes {CHUNK_BYTES} to {len(data)}"):
                    target[name]
            else:
                assert _array(target[name]) == expected[name]


# The delta -------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_delta_is_refused(trio: Trio) -> None:
    with pytest.raises(ManifestError, match=r"is not a delta") as caught:
        open_target(trio.base, trio.base)
    assert "deltaweights.json" in caught.value.why


def test_a_delta_whose_download_is_incomplete_is_refused(trio: Trio, tmp_path: Path) -> None:
    for path in [file.relative_to(trio.delta) for file in trio.delta.rglob("*") if file.is_file()]:
        if path.name in ("deltaweights.json", "README.md"):
            continue
        for change in (Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 1)):
            delta = tmp_path / "delta"
            shutil.copytree(trio.delta, delta)
            change(delta / path)
            with pytest.raises(DeltaError, match="not a whole delta") as caught:
                open_target(delta, trio.base)
            assert str(path) in caught.value.why
            shutil.rmtree(delta)


def test_a_flipped_bit_in_a_payload_is_found(trio: Trio, tmp_path: Path) -> None:
    """In one bit of each payload, in turn: the tensor is refused, and what is like it; the others come."""
    expected = _arrays(trio.target)
    shutil.copytree(trio.delta, tmp_path / "delta")
    places = [place for place in payload_places(tmp_path / "delta") if place.end > place.start]
    assert len(places) == 11
    for path, damaged, start, end in places:
        position = (start + end) // 2
        _flip(path, position)
        with open_target(tmp_path / "delta", trio.base) as target:
            for name in target:
                if name == damaged or (name, damaged) == ("ema.layers.1.weight", "model.layers.1.weight"):
                    with pytest.raises(DeltaError, match="damaged"):
                        target[name]
                else:
                    assert _array(target[name]) == expected[name]
        _flip(path, position)


# Helpers ---------------------------------------------------------------------------------------------


def _arrays(folder: Path) -> dict[str, Array]:
    """All tensors of a checkpoint by name."""
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for tensor in checkpoint.tensors:
            data = np.empty(tensor.info.nbytes, np.uint8)
            tensor.read_into(0, data)
            found[tensor.info.name] = Array(tensor.info.dtype, tensor.info.shape, data.tobytes())
    return found


def _array(view: TensorView) -> Array:
    assert view.data.dtype == np.uint8
    return Array(view.dtype, view.shape, view.data.tobytes())


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def _flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
