"""The delta: what it says of each tensor and file, how small it is, and that it gives the target back."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deltaweights import CheckpointError, Manifest, OutputError, apply_delta, make_delta, verify_delta
from deltaweights.checkpoint import open_checkpoint
from deltaweights.checkpoint.oddities import is_secret
from deltaweights.cli.logs import logs_shown
from deltaweights.codec import RECORD
from deltaweights.dtypes import DTYPE_BITS
from deltaweights.entries import BaseTensor, TensorEntry
from deltaweights.manifest import FileRecord
from deltaweights.storage import LocalSource
from deltaweights.workers import Workers

from .checkpoints import (
    Array,
    bf16,
    contents,
    digests,
    f32,
    random_array,
    safetensors_bytes,
    weights,
    write_safetensors,
)
from .conftest import CHUNK_BYTES, Trio


@pytest.fixture
def diff(tmp_path: Path) -> Differ:
    return Differ(tmp_path)


@dataclass
class Differ:
    """Writes a base and a target, makes the delta, rebuilds the target and compares it byte for byte."""

    folder: Path

    def __post_init__(self) -> None:
        self.base, self.target = self.folder / "base", self.folder / "target"
        self.delta, self.out = self.folder / "delta", self.folder / "out"

    def write(self, side: Path, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            (side / path).parent.mkdir(parents=True, exist_ok=True)
            (side / path).write_bytes(content)

    def __call__(
        self, base: Mapping[str, Array], target: Mapping[str, Array], **options: Any
    ) -> dict[str, TensorEntry]:
        """The entries by name, for two checkpoints of one shard each."""
        return {entry.name: entry for entry in self.tensors(base, target, **options).tensors}

    def tensors(self, base: Mapping[str, Array], target: Mapping[str, Array], **options: Any) -> Manifest:
        return self.files(
            {"m.safetensors": safetensors_bytes(base)},
            {"m.safetensors": safetensors_bytes(target)},
            **options,
        )

    def files(self, base: Mapping[str, bytes], target: Mapping[str, bytes], **options: Any) -> Manifest:
        self.write(self.base, base)
        self.write(self.target, target)
        manifest = make_delta(self.base, self.target, self.delta, **options)
        apply_delta(self.delta, self.out, base=self.base)
        assert contents(self.out) == contents(self.target)
        assert {file.path: file.sha256 for file in manifest.base.files} == digests(self.base)
        return manifest


# What each tensor's entry says -----------------------------------------------------------------------


def test_every_status_occurs(trio: Trio) -> None:
    assert {entry.name: entry.status for entry in _manifest(trio).tensors} == {
        "model.layers.0.weight": "changed",
        "model.layers.1.weight": "changed",
        "model.layers.2.weight": "same",
        "model.layers.3.weight": "changed",
        "model.embed": "resized",
        "model.scalar": "same",
        "model.empty": "same",
        "model.wide": "same",  # after conversion: the base is F32
        "lm_head": "renamed",
        "model.added": "added",
        "tower.a.weight": "renamed",
        "tower.a.bias": "renamed",
        "ema.layers.1.weight": "duplicate",
        "model.gone": "removed",
    }


def test_entries_describe_the_target_and_then_what_was_removed(trio: Trio) -> None:
    with open_checkpoint(trio.target) as target:
        there = [(t.info.name, t.shard.path, t.info.dtype, t.info.shape) for t in target.tensors]
    entries = _manifest(trio).tensors
    assert [(e.name, e.file, e.dtype, e.shape) for e in entries[: len(there)]] == there
    assert [(e.name, e.file, e.status) for e in entries[len(there) :]] == [("model.gone", None, "removed")]


def test_payloads_stand_in_a_row_and_take_up_what_their_entries_say(trio: Trio) -> None:
    manifest = _manifest(trio)
    with open_checkpoint(trio.delta) as delta:
        found = {
            t.shard.path: (t.info.name, t.info.dtype, t.info.shape, t.info.nbytes) for t in delta.tensors
        }
        kinds = {shard.header.metadata["format"] for shard in delta.shards.values()}
    assert kinds == {"deltaweights-row"}
    expected = {}
    for file in manifest.target.files:
        if file.stored == "tensors":
            nbytes = sum(entry.payload_bytes for entry in manifest.tensors if entry.file == file.path)
            expected[file.source] = ("payloads", "U8", (nbytes,), nbytes)
    assert found == expected


def test_a_header_as_safetensors_writes_it_takes_next_to_nothing(tmp_path: Path) -> None:
    """Neither do its tensors: the manifest has their names, lengths and places."""
    tensors = {f"model.layers.{k}.mlp.weight": bf16(weights((30, k + 1), k)) for k in range(100)}
    for side in ("base", "target"):
        (tmp_path / side).mkdir()
        values = {
            name: np.frombuffer(array.data, "<f2").reshape(array.shape) for name, array in tensors.items()
        }
        save_file(values, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    (shard,) = (tmp_path / "delta").glob("*.safetensors")
    assert shard.stat().st_size < 24 * len(manifest.tensors) + 300


def test_changed_counts_the_elements_that_differ_from_the_base(trio: Trio) -> None:
    with open_checkpoint(trio.base) as base, open_checkpoint(trio.target) as target:
        bits = {
            side: {t.info.name: _words(t.info.dtype, _read(t)) for t in checkpoint.tensors}
            for side, checkpoint in (("base", base), ("target", target))
        }
    counted = 0
    for entry in _manifest(trio).tensors:
        if entry.base and entry.base.dtype == entry.dtype:
            new, old = bits["target"][entry.name], bits["base"][entry.base.name]
            shared = min(new.size, old.size)
            assert entry.changed == np.count_nonzero(new[:shared] != old[:shared]), entry.name
            assert entry.shared_bytes == shared * new.itemsize, entry.name
            counted += 1
    assert counted >= 8


@pytest.mark.parametrize("flips", [1, 7, 1000])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "U8", "BOOL", "F8_E4M3", "C64"])
def test_a_few_changed_elements_are_counted_and_cost_little(diff: Differ, dtype: str, flips: int) -> None:
    old = random_array(dtype, (40_000,), 1)
    size = DTYPE_BITS[dtype] // 8
    data = bytearray(old.data)
    for k in range(flips):
        data[k * 40 * size] ^= 1
    entry = diff({"a": old}, {"a": replace(old, data=bytes(data))}, chunk_bytes=CHUNK_BYTES)["a"]
    assert (entry.status, entry.changed, entry.shared_bytes) == ("changed", flips, len(data))
    assert entry.payload_bytes < 0.1 * len(data) + 100 * flips


def test_same_bytes_cost_a_record_a_chunk(diff: Differ) -> None:
    array = random_array("BF16", (200, 300))
    entry = diff({"a": array}, {"a": array}, chunk_bytes=8192)["a"]
    assert (entry.status, entry.changed, entry.shared_bytes) == ("same", 0, 120_000)
    assert entry.payload_bytes == math.ceil(120_000 / 8192) * RECORD.itemsize


def test_bits_count_not_values(diff: Differ) -> None:
    """-0.0 is not 0.0, and one NaN is not another."""
    old = Array("F32", (4,), np.array([0, 0x7FC00000, 0x7FC00001, 0x7F800001], "<u4").tobytes())
    new = Array("F32", (4,), np.array([1 << 31, 0x7FC00000, 0x7FC00002, 0x7FC00001], "<u4").tobytes())
    assert diff({"a": old}, {"a": new})["a"].changed == 3


def test_an_added_tensor_stands_alone(diff: Differ) -> None:
    new = bf16(weights((100, 100)))
    entry = diff({"a": bf16(weights((3,)))}, {"a": bf16(weights((3,))), "b": new})["b"]
    assert (entry.status, entry.base, entry.shared_bytes, entry.changed) == ("added", None, 0, 0)
    assert 0 < entry.payload_bytes < len(new.data)


def test_a_removed_tensor_costs_nothing(diff: Differ) -> None:
    entries = diff({"a": bf16(weights((3,))), "b": f32(weights((5, 2)))}, {"a": bf16(weights((3,)))})
    assert entries["b"] == TensorEntry("b", None, "F32", (5, 2), "removed", None, 0, 0, 0)


def test_a_renamed_tensor_names_the_base_tensor(diff: Differ) -> None:
    array = bf16(weights((30, 30)))
    entry = diff({"old": array}, {"new": array})["new"]
    assert (entry.status, entry.base and entry.base.name, entry.changed) == ("renamed", "old", 0)


def test_a_rename_rule_saves_what_it_promises(diff: Differ) -> None:
    old = bf16(weights((100, 100), 1))
    new = bf16(weights((100, 100), 1) + weights((100, 100), 2, 1e-5))
    entries = diff({"h.w": old}, {"layer.w": new}, rename=[(r"^layer\.", "h.")])
    assert list(entries) == ["layer.w"]
    assert entries["layer.w"].status == "renamed"
    assert entries["layer.w"].payload_bytes < 0.3 * len(new.data)


@pytest.mark.parametrize(("old_rows", "new_rows"), [(300, 324), (324, 300)])
def test_a_resized_vocabulary_shares_its_rows(diff: Differ, old_rows: int, new_rows: int) -> None:
    rows = weights((324, 64), 1)
    entry = diff({"e": bf16(rows[:old_rows])}, {"e": bf16(rows[:new_rows])}, chunk_bytes=4096)["e"]
    assert (entry.status, entry.changed, entry.shared_bytes) == ("resized", 0, 300 * 64 * 2)
    alone = 24 * 64 * 2 if new_rows > old_rows else 0
    assert entry.payload_bytes <= math.ceil(300 * 64 * 2 / 4096) * RECORD.itemsize + alone + RECORD.itemsize


@pytest.mark.parametrize(
    ("old", "new"), [((6, 4), (6, 5)), ((4,), (4, 2)), ((2, 2), ()), ((), (5,)), ((5,), ())], ids=str
)
def test_a_shape_that_does_not_fit_is_coded_standalone(
    diff: Differ, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    entry = diff({"a": random_array("BF16", old, 1)}, {"a": random_array("BF16", new, 2)})["a"]
    assert (entry.status, entry.base, entry.shared_bytes) == ("resized", None, 0)


@pytest.mark.parametrize("new", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("old", ["BF16", "F16", "F32", "F64"])
def test_a_base_of_another_float_type_is_converted(diff: Differ, old: str, new: str) -> None:
    source = random_array(old, (70, 70), 1)
    entry = diff({"a": source}, {"a": random_array(new, (70, 70), 2)}, chunk_bytes=4096)["a"]
    assert (entry.status, entry.base and entry.base.dtype) == ("changed", old)
    assert entry.shared_bytes == 4900 * DTYPE_BITS[new] // 8


def test_a_cast_of_the_base_is_the_same_and_costs_next_to_nothing(diff: Differ) -> None:
    values = weights((100, 100), 1)
    entry = diff({"a": f32(values)}, {"a": bf16(values)})["a"]
    assert (entry.status, entry.changed, entry.payload_bytes) == ("same", 0, RECORD.itemsize)


@pytest.mark.parametrize(("old", "new"), [("I32", "I16"), ("F32", "F8_E4M3"), ("BF16", "I16"), ("?9", "?8")])
def test_a_dtype_without_a_rule_is_coded_standalone(diff: Differ, old: str, new: str) -> None:
    base, target = (Array(dtype, (8,), bytes(8 * DTYPE_BITS.get(dtype, 8) // 8)) for dtype in (old, new))
    entry = diff({"a": base}, {"a": target})["a"]
    assert (entry.status, entry.base, entry.shared_bytes) == ("changed", None, 0)


def test_two_tensors_of_one_name_each_find_their_own(diff: Differ) -> None:
    """A pipeline of models: unet and vae have tensors of the same names."""
    parts = {"unet": 1, "vae": 2}
    manifest = diff.files(
        {
            f"{part}/m.safetensors": safetensors_bytes({"w": bf16(weights((50, 50), k))})
            for part, k in parts.items()
        },
        {
            f"{part}/model.safetensors": safetensors_bytes({"w": bf16(weights((50, 50), k))})
            for part, k in reversed(parts.items())
        },
    )
    bases = [entry.base for entry in manifest.tensors if isinstance(entry.base, BaseTensor)]
    files = zip(manifest.tensors, bases, strict=True)
    assert {(entry.file, base.file, entry.status) for entry, base in files} == {
        (f"{part}/model.safetensors", f"{part}/m.safetensors", "same") for part in parts
    }


# Size ------------------------------------------------------------------------------------------------


def test_the_delta_of_identical_checkpoints_is_under_a_thousandth(diff: Differ) -> None:
    tensors = {f"model.layers.{k}.mlp.weight": random_array("BF16", (1024, 1024), k) for k in range(8)}
    manifest = diff.files(
        {"model.safetensors": safetensors_bytes(tensors), "config.json": b"{}"},
        {
            "model-1.safetensors": safetensors_bytes(dict([*tensors.items()][:3])),
            "model-2.safetensors": safetensors_bytes(dict([*tensors.items()][3:])),
            "config.json": b"{}",
        },
    )
    assert {entry.status for entry in manifest.tensors} == {"same"}
    on_disk = sum(len(data) for data in contents(diff.delta).values())
    assert on_disk < 0.001 * manifest.target_bytes


def test_the_sizes_in_the_manifest_are_those_on_the_disk(trio: Trio) -> None:
    manifest = _manifest(trio)
    files = contents(trio.delta)
    card = files.pop("README.md")
    assert card
    assert manifest.delta_bytes == sum(len(data) for data in files.values())
    assert manifest.target_bytes == sum(len(data) for data in contents(trio.target).values())


def test_a_delta_is_never_much_larger_than_its_target(diff: Differ) -> None:
    """Noise against other noise: nothing helps, nothing harms."""
    old, new = random_array("BF16", (1000, 1000), 1), random_array("BF16", (1000, 1000), 2)
    entry = diff({"a": old}, {"a": new})["a"]
    assert entry.payload_bytes <= len(new.data) + 2 * RECORD.itemsize


# What a delta is made of ------------------------------------------------------------------------------


def test_the_manifest_is_what_was_returned(trio: Trio, tmp_path: Path) -> None:
    returned = make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    assert Manifest.from_json((tmp_path / "delta" / "deltaweights.json").read_bytes()) == returned


def test_the_same_input_gives_the_same_delta(trio: Trio, tmp_path: Path) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES, threads=1)
    assert contents(tmp_path / "delta") == contents(trio.delta)


def test_every_file_of_the_delta_is_in_the_manifest(trio: Trio) -> None:
    found = contents(trio.delta)
    del found["README.md"], found["deltaweights.json"]
    assert _manifest(trio).files == tuple(
        FileRecord(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(found.items())
    )


def test_there_is_one_delta_shard_for_each_target_shard(trio: Trio) -> None:
    names = [f"delta-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(path.name for path in trio.delta.glob("*.safetensors")) == names
    sources = {file.path: file.source for file in _manifest(trio).target.files if file.stored == "tensors"}
    assert sources == {f"model-{k:05d}-of-00003.safetensors": name for k, name in enumerate(names, 1)}


def test_base_and_target_files_are_recorded_with_size_and_sha256(trio: Trio) -> None:
    manifest = _manifest(trio)
    for side, files in ((trio.base, manifest.base.files), (trio.target, manifest.target.files)):
        assert [(file.path, file.size, file.sha256) for file in files] == [
            (path, len(data), hashlib.sha256(data).hexdigest())
            for path, data in sorted(contents(side).items())
        ]


class _WatchedSource(LocalSource):
    """A folder that notes which of its files are read from end to end besides what is read by position."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read_whole: list[str] = []

    def blocks(self, path: str) -> Iterator[bytes]:
        self.read_whole.append(path)
        return super().blocks(path)


@pytest.mark.parametrize(
    ("names", "read_whole"),
    [
        ("abc", []),
        ("abcnew", []),
        ("new1 abc", []),
        ("cab", ["m.safetensors"]),
        ("ab", ["m.safetensors"]),
        ("bc", ["m.safetensors"]),
        ("xyz", ["m.safetensors"]),
    ],
)
def test_a_base_that_is_read_in_order_is_hashed_on_the_way(
    diff: Differ, names: str, read_whole: list[str]
) -> None:
    """Not read once more; whoever cannot do without the base's files in order reads them aside."""
    old = {name: random_array("BF16", (5000 + k,), k) for k, name in enumerate("abc")}
    new = {name: old.get(name) or random_array("F32", (3, k), k) for k, name in enumerate(names)}
    diff.write(diff.base, {"m.safetensors": safetensors_bytes(old), "note": b"text"})
    diff.write(diff.target, {"m.safetensors": safetensors_bytes(new)})
    base = _WatchedSource(diff.base)
    manifest = make_delta(base, diff.target, diff.delta, chunk_bytes=4096, threads=2)
    assert base.read_whole == [*read_whole, "note"]
    assert {file.path: file.sha256 for file in manifest.base.files} == digests(diff.base)


def test_the_base_is_hashed_to_its_end_however_late_that_is(
    diff: Differ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread does so; here it never comes to it before somebody waits for the result."""
    monkeypatch.setattr(Workers, "aside", lambda self, call: call)
    diff.write(diff.base, {"m.safetensors": safetensors_bytes({"a": random_array("BF16", (5000,), 1)})})
    diff.write(diff.target, {"m.safetensors": safetensors_bytes({"a": random_array("BF16", (5000,), 2)})})
    manifest = make_delta(diff.base, diff.target, diff.delta, chunk_bytes=4096)
    assert {file.path: file.sha256 for file in manifest.base.files} == digests(diff.base)


def test_a_resumed_run_records_the_base_of_what_was_finished_before(diff: Differ) -> None:
    shards = {
        f"m{k}.safetensors": safetensors_bytes({f"t{k}": random_array("BF16", (5000,), k)}) for k in range(3)
    }
    diff.write(diff.base, shards)
    diff.write(diff.target, shards)

    def fail(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise RuntimeError(phase)

    with pytest.raises(RuntimeError, match="diff"):
        make_delta(diff.base, diff.target, diff.delta, threads=1, progress=fail)
    assert (diff.delta / "delta-00001-of-00003.safetensors").exists()
    manifest = make_delta(diff.base, diff.target, diff.delta)
    assert {file.path: file.sha256 for file in manifest.base.files} == digests(diff.base)


def test_what_a_delta_was_not_asked_for_is_not_known(trio: Trio) -> None:
    manifest = _manifest(trio)
    assert (manifest.base.repo_id, manifest.base.revision) == (None, None)
    assert (manifest.target.repo_id, manifest.target.revision) == (None, None)
    assert manifest.chunk_bytes == CHUNK_BYTES


@pytest.mark.parametrize("chunk_bytes", [0, -4096, 1, 4095, 5000, 8 << 20])
def test_a_chunk_length_out_of_range_is_a_value_error(trio: Trio, tmp_path: Path, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=chunk_bytes)
    assert not (tmp_path / "delta").exists()


def test_progress_rises_to_the_targets_size(trio: Trio, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    make_delta(trio.base, trio.target, tmp_path / "delta", progress=lambda *step: seen.append(step))
    size = sum(len(data) for data in contents(trio.target).values())
    assert {(phase, total) for phase, _, total in seen} == {("diff", size)}
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, size)


# Other files -----------------------------------------------------------------------------------------

COMPRESSIBLE = json.dumps({f"token{k}": k for k in range(20_000)}).encode()
NOISE = np.random.default_rng(0).bytes(200_000)
SHARD = safetensors_bytes({"a": bf16(weights((4,)))})


@pytest.mark.parametrize(
    ("content", "stored", "source"),
    [
        (b"", "verbatim", "files/sub/x.bin"),
        (b"small", "verbatim", "files/sub/x.bin"),
        (NOISE, "verbatim", "files/sub/x.bin"),
        (COMPRESSIBLE, "zstd", "files/sub/x.bin.zst"),
        (bytes(3_000_000), "zstd", "files/sub/x.bin.zst"),
    ],
    ids=["empty", "small", "noise", "text", "zeros"],
)
def test_a_file_is_stored_as_it_is_smallest(diff: Differ, content: bytes, stored: str, source: str) -> None:
    manifest = diff.files({"m.safetensors": SHARD}, {"m.safetensors": SHARD, "sub/x.bin": content})
    file = next(file for file in manifest.target.files if file.path == "sub/x.bin")
    assert (file.stored, file.source) == (stored, source)
    data = (diff.delta / source).read_bytes()
    if stored == "zstd":
        assert len(data) < 0.9 * len(content)
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    assert data == content


def test_a_file_that_the_base_has_is_not_stored(diff: Differ) -> None:
    """Under whatever name; the first of several."""
    manifest = diff.files(
        {"m.safetensors": SHARD, "a/vocab.json": COMPRESSIBLE, "b/vocab.json": COMPRESSIBLE},
        {"m.safetensors": SHARD, "vocab.json": COMPRESSIBLE, "again/vocab.json": COMPRESSIBLE},
    )
    others = [file for file in manifest.target.files if file.stored != "tensors"]
    assert [(file.stored, file.source) for file in others] == [("base", "a/vocab.json")] * 2
    assert not (diff.delta / "files").exists()


def test_a_file_in_the_base_may_be_a_shard(diff: Differ) -> None:
    """The target calls it otherwise, so it is no shard there."""
    manifest = diff.files({"m.safetensors": SHARD}, {"m.safetensors": SHARD, "copy.bin": SHARD})
    assert {file.path: file.stored for file in manifest.target.files} == {
        "m.safetensors": "tensors",
        "copy.bin": "base",
    }


@pytest.mark.parametrize(
    "others",
    [
        {"a.json": COMPRESSIBLE, "a.json.zst": b"mine"},
        {"a.json": COMPRESSIBLE, "a.json.zst": COMPRESSIBLE + b" "},
        {"a.json": COMPRESSIBLE, "a.json.zst/b": b"in a folder of that name"},
        {"README.md": b"# Mine\n", "deltaweights.json": b"{}", "LICENSE": b"mine"},
        {"delta-00001-of-00001.bin": b"x", "files/x": b"y", "licenses/z": b"z", "files.zst": b""},
        {"A": b"upper", "a": b"lower"},
        {"ü 权重 😀.txt": b"x", "-rf": b"y", "a b/c'd\"e": b"z"},
        {".gitattributes": b"*.bin", ".hidden/x": b"y", "x.pt": NOISE, "sub/x.gguf": NOISE[:70_000]},
        {"x" * 255: b"a long name", "y" * 252: COMPRESSIBLE, "z/" + "z" * 255: COMPRESSIBLE + b"z"},
        {"line\u2028feed/a\u0085b": b"not the ASCII line feed", "b": b"x"},
    ],
    ids=lambda others: " ".join(others)[:40],
)
def test_no_name_of_a_file_is_in_the_way_of_another(diff: Differ, others: dict[str, bytes]) -> None:
    diff.files({"m.safetensors": SHARD}, {"m.safetensors": SHARD, **others})
    assert verify_delta(diff.delta, base=diff.base, target=diff.target).ok


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\x7f", "C:x"])
def test_a_name_that_a_delta_cannot_hold_is_an_error_of_the_checkpoint(diff: Differ, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name") as caught:
        diff.files({"m.safetensors": SHARD}, {"m.safetensors": SHARD, name: b"x"})
    assert repr(name) in caught.value.why
    assert not diff.delta.exists()


@pytest.mark.parametrize("name", ["a\\b", "C:x", "LICENSE.\x01", "NOTICE-" + "x" * 248])
def test_the_names_of_the_bases_files_do_not_matter(diff: Differ, name: str) -> None:
    """It is not written anew, so there is nothing to be afraid of."""
    manifest = diff.files({"m.safetensors": SHARD, name: b"x"}, {"m.safetensors": SHARD})
    assert name in {file.path for file in manifest.base.files}


def test_what_belongs_to_tools_is_left_out_and_listed(diff: Differ) -> None:
    tools = {
        ".git/config": b"secret",
        ".cache/huggingface/x.lock": b"",
        "sub/.cache/x": b"",
        "m.safetensors.incomplete": b"half",
    }
    diff.write(diff.base, {"m.safetensors": SHARD})
    diff.write(diff.target, {"m.safetensors": SHARD, **tools})
    manifest = make_delta(diff.base, diff.target, diff.delta)
    assert manifest.target.left_out == (".cache/", ".git/", "m.safetensors.incomplete", "sub/.cache/")
    assert [file.path for file in manifest.target.files] == ["m.safetensors"]
    assert b"secret" not in b"".join(contents(diff.delta).values())


@pytest.fixture
def oddities() -> Iterator[list[str]]:
    """What is told of odd inputs."""
    with logs_shown(logging.WARNING, quiet=True, warnings_shown=False) as told:
        yield told


def _write_model(folder: Path, shards: int = 1, **others: str) -> None:
    tensors = {f"t{k}": bf16(weights((16,), k)) for k in range(3)}
    index = {}
    for k, (name, array) in enumerate(tensors.items()):
        path = f"m-{k + 1:05d}-of-00003.safetensors" if shards > 1 else "m.safetensors"
        index[name] = path
        write_safetensors(folder / path, {name: array} if shards > 1 else tensors)
    if shards > 1:
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for path, text in others.items():
        (folder / path.replace("__", ".")).write_text(text)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "b" * 64 + "\nsize 17209920\n"


def test_a_pointer_of_git_lfs_is_warned_of_and_needs_no_base(tmp_path: Path, oddities: list[str]) -> None:
    for side in ("base", "target"):
        _write_model(tmp_path / side, tokenizer__json=POINTER)
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert [text.partition(" is a Git LFS pointer")[0] for text in oddities] == [
        "The base's tokenizer.json",
        "The target's tokenizer.json",
    ]
    (tmp_path / "base" / "tokenizer.json").write_text("{}")  # as the Hub has it
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == POINTER


@pytest.mark.parametrize("side", ["base", "target"])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_shard_that_is_not_there_is_warned_of(
    side: str, has_index: bool, tmp_path: Path, oddities: list[str]
) -> None:
    for one in ("base", "target"):
        _write_model(tmp_path / one, 3)
    (tmp_path / side / "m-00002-of-00003.safetensors").unlink()
    if not has_index:
        (tmp_path / side / "m.safetensors.index.json").unlink()
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    missing, *others = oddities
    assert side in missing
    assert "m-00002-of-00003.safetensors" in missing
    assert all("no counterpart in the base" in text for text in others) or side == "target"
    assert len(others) == (side == "base")


def test_a_stale_index_over_whole_files_is_no_loss(tmp_path: Path, oddities: list[str]) -> None:
    for side in ("base", "target"):
        _write_model(tmp_path / side)
    index = '{"weight_map": {"t0": "old-1.safetensors", "t1": "old-1.safetensors"}}'
    (tmp_path / "target" / "m.safetensors.index.json").write_text(index)
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert len(oddities) == 1
    assert "though its tensors are in other files" in oddities[0]


def test_a_dtype_that_no_library_reads_is_warned_of(tmp_path: Path, oddities: list[str]) -> None:
    _write_model(tmp_path / "base")
    write_safetensors(tmp_path / "target" / "m.safetensors", {"a": Array("", (), b"")})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert sum("'a' has the dtype ''" in text for text in oddities) == 1


def test_whole_models_give_no_warning(trio: Trio, tmp_path: Path, oddities: list[str]) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta")
    assert not oddities


def test_what_is_excluded_is_left_out_and_listed(tmp_path: Path, oddities: list[str]) -> None:
    for side in ("base", "target"):
        _write_model(tmp_path / side)
    paths = ("optimizer.pt", "global_step5/mp_rank_0.pt", "runs/1/log.txt", ".env", "keep.txt")
    for path in paths:
        (tmp_path / "target" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "target" / path).write_text("x")
    exclude = ["*.pt", "runs/", "no-such-file"]
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta", exclude=exclude)
    assert manifest.target.left_out == tuple(sorted(paths[:4]))
    assert [file.path for file in manifest.target.files] == ["keep.txt", "m.safetensors"]
    assert len(oddities) == 2
    assert "'no-such-file'" in oddities[0]
    assert ".env is left out" in oddities[1]


@pytest.mark.parametrize("by_id", [True, False])
def test_swapped_arguments_are_noticed_where_the_cards_say_so(
    by_id: bool, tmp_path: Path, oddities: list[str]
) -> None:
    _write_model(tmp_path / "demo-base", README__md="---\nlicense: mit\n---\n")
    _write_model(tmp_path / "tuned", README__md="---\nlicense: mit\nbase_model: acme/demo-base\n---\n")
    base, target = ("me/tuned", "acme/demo-base") if by_id else (None, None)
    places = tmp_path / "tuned", tmp_path / "demo-base", tmp_path / "delta"
    make_delta(*places, base_repo=base, target_repo=target)
    assert ["swapped" in text for text in oddities] == [True]
    oddities.clear()
    make_delta(tmp_path / "demo-base", tmp_path / "tuned", tmp_path / "right")
    assert oddities == []


def test_usual_names_of_secrets_are_known() -> None:
    secrets = ".env .env.local a/server.pem id_rsa .ssh/id_ed25519 credentials credentials.json hf_token"
    secrets += (
        " aws_credentials token token.txt .hf_token secrets.yaml .netrc service-account-key.json api_key.txt"
    )
    others = "tokenizer.json added_tokens.json special_tokens_map.json tokenizer.model token_classifier.py"
    others += " README.md config.json keys.py environment.yml tokenization_x.py vocab.txt model.safetensors"
    assert [path for path in secrets.split() if not is_secret(path)] == []
    assert [path for path in others.split() if is_secret(path)] == []


def test_hundreds_of_files_need_no_hundreds_of_open_files(diff: Differ) -> None:
    """Systems allow 256 or 1024 at once; a checkpoint may have more."""
    others = {f"data/{k:04d}.txt": str(k).encode() for k in range(300)}
    with _open_files_limited_to(150):
        diff.files(
            {"m.safetensors": SHARD, **{f"b{path}": data for path, data in others.items()}},
            {"m.safetensors": SHARD, **{path: data + b"!" for path, data in others.items()}},
        )
        assert verify_delta(diff.delta, base=diff.base, target=diff.target).ok


# Places ----------------------------------------------------------------------------------------------


def test_base_and_target_may_be_single_files(tmp_path: Path) -> None:
    old, new = {"a": bf16(weights((64, 64), 1))}, {"a": bf16(weights((64, 64), 1) + np.float32(1e-4))}
    write_safetensors(tmp_path / "old.safetensors", old)
    write_safetensors(tmp_path / "new.safetensors", new)
    (tmp_path / "unrelated.txt").write_text("not part of either")
    manifest = make_delta(tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "delta")
    assert [file.path for file in manifest.base.files] == ["old.safetensors"]
    assert [file.path for file in manifest.target.files] == ["new.safetensors"]
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "old.safetensors")
    assert contents(tmp_path / "out") == {"new.safetensors": (tmp_path / "new.safetensors").read_bytes()}


def test_a_checkpoint_is_its_own_target(trio: Trio, tmp_path: Path) -> None:
    manifest = make_delta(trio.base, trio.base, tmp_path / "delta")
    assert {entry.status for entry in manifest.tensors} == {"same"}
    apply_delta(tmp_path / "delta", tmp_path / "out", base=trio.base)
    assert contents(tmp_path / "out") == contents(trio.base)


@pytest.mark.parametrize("side", ["base", "target"])
@pytest.mark.parametrize("place", ["", "delta", "deep/in/it", "../{side}/delta"])
def test_a_delta_inside_base_or_target_is_refused(diff: Differ, side: str, place: str) -> None:
    for folder in (diff.base, diff.target):
        diff.write(folder, {"m.safetensors": SHARD})
    before = contents(diff.folder)
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        make_delta(diff.base, diff.target, diff.folder / side / place.format(side=side), force=True)
    assert "which the delta is made from" in caught.value.why
    assert contents(diff.folder) == before
    assert not list(diff.folder.rglob("delta"))


def test_a_delta_inside_a_base_by_way_of_a_link_is_refused(diff: Differ) -> None:
    for folder in (diff.base, diff.target):
        diff.write(folder, {"m.safetensors": SHARD})
    (diff.folder / "link").symlink_to(diff.base)
    with pytest.raises(OutputError, match="cannot be written to"):
        make_delta(diff.base, diff.target, diff.folder / "link" / "delta")


def test_a_folder_that_holds_files_is_refused_and_left_as_it_was(trio: Trio, tmp_path: Path) -> None:
    """However often one tries."""
    (tmp_path / "mine.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(OutputError, match="is not empty") as caught:
            make_delta(trio.base, trio.target, tmp_path)
        assert "mine.txt" in caught.value.why
        assert "force=True" in caught.value.fix
        assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_empty_folder_is_fine(trio: Trio, tmp_path: Path) -> None:
    make_delta(trio.base, trio.target, tmp_path, chunk_bytes=CHUNK_BYTES)
    assert contents(tmp_path) == contents(trio.delta)


def test_force_replaces_a_delta_and_keeps_what_is_not_its_own(trio: Trio, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    make_delta(trio.target, trio.base, delta)
    (delta / "mine.txt").write_text("mine")
    (delta / "files" / "mine too.txt").write_text("mine")
    make_delta(trio.base, trio.target, delta, chunk_bytes=CHUNK_BYTES, force=True)
    assert contents(delta) == {
        **contents(trio.delta),
        "mine.txt": b"mine",
        "files/mine too.txt": b"mine",
    }


def test_a_workspace_of_someone_else_does_not_make_us_delete_files(trio: Trio, tmp_path: Path) -> None:
    """What an interrupted run left is data too: it may have come with a download."""
    (tmp_path / "precious").write_text("mine")
    delta = tmp_path / "delta"
    (delta / ".deltaweights").mkdir(parents=True)
    (delta / ".deltaweights" / "claims").write_text(f"../precious\n{tmp_path}/precious\n")
    make_delta(trio.base, trio.target, delta)
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_interrupted_run_knows_its_files_whatever_their_names(diff: Differ) -> None:
    others = {"a\u2028b": b"1", "c\u0085d/e": b"2", "z": b"3"}
    diff.write(diff.base, {"m.safetensors": SHARD})
    diff.write(diff.target, {"m.safetensors": SHARD, **others})

    def fail(phase: str, done: int, total: int) -> None:
        if done == total:  # the last file is read, the others are written
            raise RuntimeError(phase)

    with pytest.raises(RuntimeError, match="diff"):
        make_delta(diff.base, diff.target, diff.delta, progress=fail)
    make_delta(diff.base, diff.target, diff.delta)
    assert verify_delta(diff.delta, target=diff.target).ok


def test_a_base_without_safetensors_is_refused(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        make_delta(tmp_path / "base", trio.target, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_an_error_half_way_leaves_no_delta(trio: Trio, tmp_path: Path) -> None:
    """And the next run, with the cause gone, is as if nothing had been."""

    def fail(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise RuntimeError(phase)

    with pytest.raises(RuntimeError, match="diff"):
        make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES, progress=fail)
    assert not (tmp_path / "delta" / "deltaweights.json").exists()
    make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    assert contents(tmp_path / "delta") == contents(trio.delta)


# Licenses and identities -----------------------------------------------------------------------------

CARD = b"---\nlicense: other\nlicense_name: qwen\nlicense_link: https://example.org/LICENSE\n---\n# Base\n"


def test_a_license_is_read_from_card_and_texts(diff: Differ) -> None:
    texts = {"LICENSE": b"the agreement", "NOTICE.txt": b"the notice", "USE_POLICY.md": b"the policy"}
    other = {
        "docs/LICENSE": b"of something else",
        "LICENSES.md": b"no license text",
        "my_license": b"nor this",
    }
    manifest = diff.files(
        {"m.safetensors": SHARD, "README.md": CARD, **texts, **other},
        {"m.safetensors": SHARD, "README.md": b"---\nlicense: mit\n---\n", "license.md": b"MIT"},
    )
    license = manifest.base.license
    assert (license.id, license.name, license.link) == ("other", "qwen", "https://example.org/LICENSE")
    assert [(diff.delta / file.path).read_bytes() for file in license.files] == list(texts.values())
    assert {file.sha256 for file in license.files} == {hashlib.sha256(t).hexdigest() for t in texts.values()}
    assert all(file.path.startswith("licenses/") and file in manifest.files for file in license.files)
    assert manifest.target.license.id == "mit"
    assert [(diff.delta / file.path).read_bytes() for file in manifest.target.license.files] == [b"MIT"]


def test_one_text_of_both_is_stored_once(diff: Differ) -> None:
    both = {"m.safetensors": SHARD, "LICENSE": b"the agreement"}
    manifest = diff.files(both, both)
    assert manifest.base.license.files == manifest.target.license.files
    assert len(list((diff.delta / "licenses").iterdir())) == 1


def test_what_is_not_stated_is_null(diff: Differ) -> None:
    manifest = diff.files({"m.safetensors": SHARD}, {"m.safetensors": SHARD})
    assert (manifest.base.license.id, manifest.base.license.name, manifest.base.license.files) == (
        None,
        None,
        (),
    )


def test_options_take_the_place_of_what_the_checkpoints_say(diff: Differ) -> None:
    manifest = diff.files(
        {"m.safetensors": SHARD, "README.md": CARD, "LICENSE": b"the agreement"},
        {"m.safetensors": SHARD, "README.md": CARD},
        base_repo="org/base",
        base_revision="a" * 40,
        base_license="apache-2.0",
        target_repo="me/tuned",
        target_license="mit",
    )
    assert (manifest.base.repo_id, manifest.base.revision) == ("org/base", "a" * 40)
    assert (manifest.target.repo_id, manifest.target.revision) == ("me/tuned", None)
    base, target = manifest.base.license, manifest.target.license
    assert (base.id, base.name, base.link) == ("apache-2.0", None, None)
    assert len(base.files) == 1, "the texts that lie there still count"
    assert (target.id, target.name, target.link) == ("mit", None, None)


@pytest.mark.parametrize(
    "front_matter",
    ["license: mit\ntags: 5", "license: mit\n1: 2", "license: mit\nmodel-index: nonsense", "license: [mit]"],
)
def test_an_odd_field_beside_it_does_not_hide_the_license(diff: Differ, front_matter: str) -> None:
    card = f"---\n{front_matter}\n---\n".encode()
    manifest = diff.files({"m.safetensors": SHARD, "README.md": card}, {"m.safetensors": SHARD})
    assert manifest.base.license.id == "mit"


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"---\n",
        b"---\n---\n",
        b"---\nlicense\n---\n",
        b"---\n- mit\n---\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        b'---\nlicense: "\\ud800"\n---\n',
        b"---\nlicense: 2024-99-99\n---\n",
        b"---\nlicense: !!bool x\n---\n",
        b'---\nlicense: !!float ""\n---\n',
        b"---\nlicense: !!timestamp x\n---\n",
        b"---\nlicense: &x [*x]\n---\n",
        b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        b"---\nlicense: {}\n---\n",
    ],
    ids=lambda card: repr(card[:40]),
)
def test_a_card_that_nobody_can_read_refuses_nothing(diff: Differ, card: bytes) -> None:
    manifest = diff.files(
        {"m.safetensors": SHARD, "README.md": card, "LICENSE": b"the agreement"},
        {"m.safetensors": SHARD, "README.md": card},
    )
    assert len(manifest.base.license.files) == 1


# Any checkpoints at all ------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(
    lambda name: name != "__metadata__"
)
NAMES = st.sampled_from(["model.a", "model.b", "b", "lm.model.a", "lm.model.b", "c.d.e.f"]) | names
paths = st.sampled_from(["m.safetensors", "m-1.safetensors", "m-2.safetensors", "sub/m.safetensors"])


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    dtype = draw(st.sampled_from(["BF16", "F32"]) | st.sampled_from(sorted(DTYPE_BITS)))
    shape: tuple[int, ...] = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 40]), max_size=3).map(tuple))
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        shape = (*shape, 4)
    kind = draw(st.sampled_from(["bits", "zeros", "unknown dtype"]))
    array = random_array(dtype, shape, draw(st.integers(0, 3)))
    if kind == "zeros":
        return replace(array, data=bytes(len(array.data)))
    if kind == "unknown dtype":
        return replace(array, dtype="NEW" + dtype)
    return array


@st.composite
def checkpoints(draw: st.DrawFn, pool: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """Shards by path. Some tensors are those of ``pool``, some a little changed, some new."""
    files: dict[str, dict[str, Array]] = {path: {} for path in draw(st.lists(paths, min_size=1, unique=True))}
    for path in files:
        tensors = draw(st.dictionaries(NAMES, arrays(), max_size=3))
        for name in draw(st.lists(st.sampled_from(sorted(pool)), unique=True)) if pool else []:
            data = bytearray(pool[name].data)
            if data and draw(st.booleans()):
                data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
            tensors[name] = replace(pool[name], data=bytes(data))
        files[path] = tensors
    return files


@settings(max_examples=60)
@given(st.data())
def test_any_target_comes_back_from_any_base(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pool = data.draw(st.dictionaries(NAMES, arrays(), max_size=5), label="pool")
    base, target = (data.draw(checkpoints(pool), label=side) for side in ("base", "target"))
    differ = Differ(tmp_path_factory.mktemp("any"))
    differ.files(
        {path: safetensors_bytes(tensors) for path, tensors in base.items()},
        {
            path: safetensors_bytes(tensors, padding=" " * data.draw(st.integers(0, 9)))
            for path, tensors in target.items()
        },
        chunk_bytes=4096,
        threads=2,
    )
    assert verify_delta(differ.delta, base=differ.base, target=differ.target).ok
    shutil.rmtree(differ.folder)


# Helpers ---------------------------------------------------------------------------------------------


def _manifest(trio: Trio) -> Manifest:
    return Manifest.from_json((trio.delta / "deltaweights.json").read_bytes())


def _read(tensor: Any) -> bytes:
    out = np.empty(tensor.info.nbytes, np.uint8)
    tensor.read_into(0, out)
    return out.tobytes()


def _words(dtype: str, data: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    return np.frombuffer(data, f"<u{DTYPE_BITS[dtype] // 8}")


@contextmanager
def _open_files_limited_to(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
