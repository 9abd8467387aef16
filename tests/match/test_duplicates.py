"""Tensors that are equal to another one of the target: found at little cost, coded once, rebuilt anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaweights import (
    DeltaError,
    Manifest,
    PayloadError,
    apply_delta,
    compact_deltas,
    make_delta,
    open_target,
    plan_apply,
    verify_delta,
)
from deltaweights.checkpoint import Checkpoint
from deltaweights.delta.chain import open_recipe
from deltaweights.entries import TargetTensor, TensorEntry
from deltaweights.match.duplicates import find_duplicates
from deltaweights.match.names import match_tensors
from deltaweights.storage import LocalSource, ReadableFile
from deltaweights.workers import Workers

from .. import independent_reader
from ..checkpoints import Array, bf16, contents, f32, random_array, weights, write_safetensors
from ..hub_server import HubServer

#: Tensors by the path of their shard.
Files = Mapping[str, Mapping[str, Array]]

EMBED = weights((100, 64), 1)
MOVED = EMBED + weights((100, 64), 2, 1e-4)
OTHER = weights((100, 64), 3)


class Pairs:
    """Writes a base and a target, makes their delta, and rebuilds the target from it in every way."""

    def __init__(self, folder: Path) -> None:
        self.base, self.target, self.delta = (folder / name for name in ("base", "target", "delta"))
        self.out = folder / "out"

    def write(self, base: Files, target: Files) -> None:
        for side, files in ((self.base, base), (self.target, target)):
            for path, tensors in files.items():
                write_safetensors(side / path, tensors)

    def diff(self, base: Files, target: Files, **options: Any) -> Manifest:
        self.write(base, target)
        manifest = make_delta(self.base, self.target, self.delta, chunk_bytes=4096, **options)
        apply_delta(self.delta, self.out, base=self.base)
        assert contents(self.out) == contents(self.target)
        return manifest

    def __call__(self, base: Mapping[str, Array], target: Mapping[str, Array]) -> dict[str, TensorEntry]:
        """The entries by name, for checkpoints of one shard; of one name the target's."""
        manifest = self.diff({"m.safetensors": base}, {"m.safetensors": target})
        return {entry.name: entry for entry in reversed(manifest.tensors)}  # the target's, of one name


@pytest.fixture
def diff(tmp_path: Path) -> Pairs:
    return Pairs(tmp_path)


def statuses(entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """The status of each tensor, and after an equals sign what it is like."""
    return {
        name: entry.status + (f"={entry.like.name}" if isinstance(entry.like, TargetTensor) else "")
        for name, entry in entries.items()
    }


# Which one is coded ------------------------------------------------------------------------------------


def test_an_embedding_that_is_saved_twice_is_coded_once(diff: Pairs) -> None:
    entries = diff({"embed": bf16(EMBED), "head": bf16(EMBED)}, {"embed": bf16(MOVED), "head": bf16(MOVED)})
    assert statuses(entries) == {"embed": "changed", "head": "duplicate=embed"}
    assert entries["embed"].payload_bytes > 1000
    head = entries["head"]
    assert (head.base, head.shared_bytes, head.changed, head.payload_bytes) == (None, 0, 0, 0)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_of_two_the_one_that_has_a_base_is_coded(diff: Pairs, names: tuple[str, str]) -> None:
    entries = diff({"b": bf16(EMBED)}, {name: bf16(MOVED) for name in names})
    assert statuses(entries) == {"a": "duplicate=b", "b": "changed"}


@pytest.mark.parametrize("names", [("near", "far"), ("far", "near")])
def test_of_two_the_one_whose_base_is_nearer_is_coded(diff: Pairs, names: tuple[str, str]) -> None:
    base = {"far": bf16(OTHER), "near": bf16(EMBED)}
    entries = diff(base, {name: bf16(MOVED) for name in names})
    assert statuses(entries) == {"near": "changed", "far": "duplicate=near"}


def test_all_others_refer_to_the_one(diff: Pairs) -> None:
    entries = diff({"x": bf16(OTHER)}, {f"t{k}": bf16(EMBED) for k in range(5)})
    assert statuses(entries) == {
        "t0": "added",
        **{f"t{k}": "duplicate=t0" for k in range(1, 5)},
        "x": "removed",
    }


def test_what_is_the_bases_already_stays_the_same(diff: Pairs) -> None:
    """Layers of ones, say, or an embedding that nobody changed: nothing of it is coded anyway."""
    ones = f32(np.ones(2000, np.float32))
    base = {"a": bf16(EMBED), "b": bf16(EMBED), "c": ones, "d": ones, "e.wide": f32(OTHER), "f": bf16(OTHER)}
    entries = diff(base, base | {"e.wide": bf16(OTHER)})  # the base's, after conversion
    assert statuses(entries) == dict.fromkeys(base, "same")


def test_what_became_equal_to_one_that_did_not_change_is_coded_against_its_base(diff: Pairs) -> None:
    base = {"a head": bf16(OTHER), "embed": bf16(EMBED)}
    entries = diff(base, {"a head": bf16(EMBED), "embed": bf16(EMBED)})
    assert statuses(entries) == {"a head": "renamed", "embed": "same"}
    assert all(entry.payload_bytes < 100 for entry in entries.values())


def test_a_copy_of_a_base_tensor_under_another_name_stays_renamed(diff: Pairs) -> None:
    entries = diff({"embed": bf16(EMBED)}, {"embed": bf16(EMBED), "head": bf16(EMBED)})
    assert statuses(entries) == {"embed": "same", "head": "renamed"}


def test_more_rows_than_the_base_has(diff: Pairs) -> None:
    grown = bf16(np.concatenate([EMBED, OTHER[:9]]))
    entries = diff({"embed": bf16(EMBED), "head": bf16(EMBED)}, {"embed": grown, "head": grown})
    assert statuses(entries) == {"embed": "resized", "head": "duplicate=embed"}


def test_equal_bytes_of_another_dtype_or_shape_are_another_tensor(diff: Pairs) -> None:
    data = bf16(EMBED)
    target = {
        "a": data,
        "b": replace(data, shape=(64, 100)),
        "c": replace(data, dtype="F16"),
        "d": replace(data, dtype="NEW"),
    }
    assert set(statuses(diff({"x": f32(OTHER)}, target)).values()) == {"added", "removed"}


def test_dtypes_that_nobody_knows_are_found_too(diff: Pairs) -> None:
    new = Array("NEW", (7,), random_array("U8", (5001,), 1).data)
    assert statuses(diff({"x": bf16(OTHER)}, {"a": new, "b": new}))["b"] == "duplicate=a"


def test_what_takes_less_than_a_reference_is_coded(diff: Pairs) -> None:
    """Small tensors, and those that code to next to nothing."""
    target = {f"small {k}": bf16(weights((60,), 1)) for k in range(2)}
    target |= {f"empty {k}": bf16(weights((0, 3), 1)) for k in range(2)}
    target |= {f"zeros {k}": Array("F32", (1000,), bytes(4000)) for k in range(2)}
    assert set(statuses(diff({"x": bf16(OTHER)}, target)).values()) == {"added", "removed"}


@pytest.mark.parametrize("place", [0, 511, 512, 7000, 12_799])
def test_one_byte_that_differs_anywhere_makes_two_tensors(diff: Pairs, place: int) -> None:
    data = bytearray(bf16(EMBED).data)
    data[place] ^= 1
    entries = diff({"x": bf16(OTHER)}, {"a": bf16(EMBED), "b": Array("BF16", EMBED.shape, bytes(data))})
    assert statuses(entries) == {"a": "added", "b": "added", "x": "removed"}


# What it costs to look for them ------------------------------------------------------------------------


class CountedFile(ReadableFile):
    """A file that adds up what is read of it."""

    def __init__(self, file: ReadableFile, counts: dict[str, int]) -> None:
        super().__init__(file.path, file.size)
        self._file, self._counts = file, counts

    def _read_into(self, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._counts[self.path] = self._counts.get(self.path, 0) + out.size
        self._file.read_into(offset, out)


class CountedSource(LocalSource):
    """A folder that adds up what is read of its files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: dict[str, int] = {}

    def open(self, path: str) -> Any:
        return CountedFile(super().open(path), self.counts)


def bytes_read(pair: Pairs, base: Files, target: Files) -> int:
    """How much of the target is read to find its duplicates."""
    pair.write(base, target)
    source = CountedSource(pair.target)
    with Checkpoint(LocalSource(pair.base)) as old, Checkpoint(source) as new, Workers(2) as workers:
        matches = match_tensors(old, new)
        source.counts.clear()
        find_duplicates(new, matches, 4096, workers)
    return sum(source.counts.values())


def test_where_no_two_can_be_equal_nothing_is_read(diff: Pairs) -> None:
    """Another dtype, shape or length each; or nearly nothing."""
    target = {f"t{k}": bf16(weights((100 + k, 64), k)) for k in range(5)}
    target |= {"wide": f32(weights((100, 64), 9)), "small 0": bf16(OTHER[0]), "small 1": bf16(OTHER[1])}
    assert bytes_read(diff, {"a.safetensors": target}, {"a.safetensors": target}) == 0


def test_of_tensors_that_only_look_alike_a_few_bytes_are_read(diff: Pairs) -> None:
    target = {f"t{k}": bf16(weights((500, 640), k)) for k in range(5)}
    assert bytes_read(diff, {"a.safetensors": target}, {"a.safetensors": target}) == 5 * 512


def test_of_tensors_that_begin_alike_some_more_is_read(diff: Pairs) -> None:
    """Embeddings whose first row is padding, say."""
    target = {
        f"t{k}": bf16(np.concatenate([np.zeros((40, 640)), weights((500, 640), k)]).astype(np.float32))
        for k in range(5)
    }
    size = 540 * 640 * 2
    assert bytes_read(diff, {"a.safetensors": target}, {"a.safetensors": target}) < 5 * size // 5


# Any duplicates at all -----------------------------------------------------------------------------------

PATHS = ["m-1.safetensors", "m-2.safetensors", "sub/m-3.safetensors"]


#: What a tensor is made of: its dtype, its shape, and how many of its bytes are changed.
kinds = st.tuples(
    st.sampled_from(["BF16", "BF16", "I64", "F8_E4M3"]),
    st.sampled_from([(30, 100), (4000,)]),
    st.sampled_from([0, 0, 0, 1, 900]),
)
shards = st.dictionaries(st.sampled_from("abcdef"), kinds, min_size=1, max_size=5)


def made(kind: tuple[str, tuple[int, ...], int]) -> Array:
    """The tensor of a kind: one and the same each time."""
    dtype, shape, flips = kind
    array = random_array(dtype, shape, 1)
    data = np.frombuffer(array.data, np.uint8).copy()
    data[:: len(data) // max(1, flips)] ^= int(flips > 0)
    return replace(array, data=data.tobytes())


@settings(max_examples=50)
@given(st.data())
def test_any_duplicates_in_any_shards_are_coded_once_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    drawn = st.dictionaries(st.sampled_from(PATHS), shards, min_size=1)
    base, target = (
        {path: {n: made(kind) for n, kind in shard.items()} for path, shard in data.draw(drawn, side).items()}
        for side in ("base", "target")
    )
    pair = Pairs(tmp_path_factory.mktemp("any"))
    manifest = pair.diff(base, target, threads=2)

    coded: dict[Array, int] = {}
    for entry in manifest.tensors:
        if entry.file is not None:
            array = target[entry.file][entry.name]
            chunks = -(-len(array.data) // 4096) + 1
            coded[array] = coded.get(array, 0) + (entry.payload_bytes > 24 * chunks + 128)
            if isinstance(entry.like, TargetTensor):
                assert array == target[entry.like.file][entry.like.name]
    assert max(coded.values()) <= 1

    assert verify_delta(pair.delta, base=pair.base, target=pair.out).ok
    independent_reader.rebuild(pair.delta, pair.base, pair.out.with_name("independent"))
    assert contents(pair.out.with_name("independent")) == contents(pair.target)
    with open_recipe(pair.delta, pair.base) as view:
        for path, tensors in target.items():
            recipes = view.shard(path).tensors
            assert {name: view.read(recipes[name]).tobytes() for name in tensors} == {
                name: array.data for name, array in tensors.items()
            }
    for path in target:  # each shard alone, as after an interruption
        (pair.out / path).unlink()
        assert plan_apply(pair.delta, base=pair.base, out=pair.out).disk[0].needed == len(
            contents(pair.target)[path]
        )
        assert apply_delta(pair.delta, pair.out, base=pair.base).rebuilt == (path,)
        assert contents(pair.out) == contents(pair.target)
    shutil.rmtree(pair.base.parent)


def test_an_interrupted_diff_goes_on_with_the_same_duplicates(tmp_path: Path) -> None:
    shards = {path: {f"{path} {k}": bf16(MOVED) for k in range(2)} for path in PATHS}
    whole, cut = Pairs(tmp_path / "whole"), Pairs(tmp_path / "cut")
    base = {"m.safetensors": {"embed": bf16(EMBED)}}
    manifest = whole.diff(base, shards)
    assert [entry.status for entry in manifest.tensors].count("duplicate") == 5

    class Cut(Exception):  # noqa: N818
        pass

    def stop(_phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Cut

    cut.write(base, shards)
    with pytest.raises(Cut):
        make_delta(cut.base, cut.target, cut.delta, chunk_bytes=4096, threads=1, progress=stop)
    assert make_delta(cut.base, cut.target, cut.delta, chunk_bytes=4096, threads=1) == manifest
    assert contents(cut.delta) == contents(whole.delta)


# From the Hub --------------------------------------------------------------------------------------------


@pytest.fixture
def spread(hub: HubServer, tmp_path: Path) -> tuple[HubServer, Path]:
    """org/base and org/delta: tensors with a base and without, each several times in each shard."""
    old, new = weights((300, 1000), 1), weights((300, 1000), 2)
    moved, added = bf16(old + weights(old.shape, 3, 1e-4)), bf16(new)
    shards = {
        path: {
            f"{path} moved": moved,
            f"{path} added": added,
            f"own {path}": bf16(weights((200, 1000), 20 + k)),
        }
        for k, path in enumerate(PATHS)
    }
    shards[PATHS[1]] |= {"layer": moved, "again": added}
    pair = Pairs(tmp_path)
    pair.diff({"m.safetensors": {"layer": bf16(old), f"own {PATHS[2]}": bf16(new[:200])}}, shards)
    hub.add_repo("org/base", contents(pair.base))
    make_delta("org/base", pair.target, tmp_path / "hub", chunk_bytes=1 << 16)
    hub.add_repo("org/delta", contents(tmp_path / "hub"))
    return hub, pair.target


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("missing", [PATHS, PATHS[:1], PATHS[1:2], PATHS[::2]], ids=len)
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_apply_downloads_what_the_plan_says(
    spread: tuple[HubServer, Path], tmp_path: Path, missing: list[str], published: bool, threads: int
) -> None:
    """Payload and base of a tensor come once for each of its duplicates that is rebuilt."""
    hub, target = spread
    for repo in hub.repos.values():
        repo.lfs_metadata = published
    out = shutil.copytree(target, tmp_path / "again")
    for path in missing:
        (out / path).unlink()
    plan = plan_apply("org/delta", out=out, threads=threads)
    assert plan.base
    hub.log.clear()
    assert apply_delta("org/delta", out, threads=threads).rebuilt == tuple(missing)
    assert contents(out) == contents(target)
    assert plan.delta.download == hub.bytes_sent("org/delta")
    assert plan.base.download == hub.bytes_sent("org/base")


# Chains ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """A base, two targets, and the deltas between them. In the second, duplicates of the first stay as they
    are, move together, move apart, and lose what they were like."""
    moved, further = bf16(MOVED), bf16(MOVED + weights(MOVED.shape, 9, 1e-4))
    added = bf16(OTHER)
    base = {name: bf16(EMBED) for name in ("kept 0", "kept 1", "along 0", "along 1", "apart 0", "apart 1")}
    first = dict.fromkeys(base, moved) | {"lost 0": added, "lost 1": added, "untied": moved}
    second = first | {"along 0": further, "along 1": further, "apart 1": further}
    second["untied"] = bf16(MOVED + weights(MOVED.shape, 10, 1e-4))
    del second["lost 0"]
    names = ("base", "first", "second")
    for name, tensors in zip(names, (base, first, second), strict=True):
        for k, path in enumerate(PATHS[:2]):
            write_safetensors(tmp_path / name / path, {n: tensors[n] for n in sorted(tensors)[k::2]})
    make_delta(tmp_path / "base", tmp_path / "first", tmp_path / "delta-1", chunk_bytes=4096)
    make_delta(tmp_path / "first", tmp_path / "second", tmp_path / "delta-2", chunk_bytes=8192)
    return [tmp_path / name for name in (*names, "delta-1", "delta-2")]


def test_a_chain_of_deltas_with_duplicates(chain: list[Path], tmp_path: Path) -> None:
    base, _, second, *deltas = chain
    with open_target(deltas, base) as view, Checkpoint(LocalSource(second)) as target:
        for tensor in target.tensors:
            data = np.empty(tensor.info.nbytes, np.uint8)
            tensor.read_into(0, data)
            assert view[tensor.info.name].data.tobytes() == data.tobytes()
    apply_delta(deltas, tmp_path / "out", base=base)
    assert contents(tmp_path / "out") == contents(second)
    assert verify_delta(deltas, base=base, target=second).ok


def test_what_is_compacted_has_the_duplicates_of_the_last_target(chain: list[Path], tmp_path: Path) -> None:
    base, _, second, *deltas = chain
    compacted = compact_deltas(deltas, tmp_path / "delta", base=base, chunk_bytes=4096)
    direct = make_delta(base, second, tmp_path / "direct", chunk_bytes=4096)
    found = {entry.name: entry for entry in compacted.tensors}
    expected = {entry.name: entry for entry in direct.tensors}
    untied = found.pop("untied")  # coded against the base of what it was like
    assert (untied.status, expected.pop("untied").status) == ("renamed", "renamed")
    assert untied.payload_bytes < 0.5 * MOVED.size * 2
    assert found == expected
    assert [entry.status for entry in found.values()].count("duplicate") == 4
    assert apply_delta(tmp_path / "delta", tmp_path / "out", base=base).kept == ()
    assert contents(tmp_path / "out") == contents(second)


# Damage, and lies ------------------------------------------------------------------------------------


def test_damage_of_what_others_are_like_is_found_in_all_of_them(diff: Pairs) -> None:
    base = {"m.safetensors": {"embed": bf16(EMBED)}}
    diff.diff(base, {PATHS[0]: {"copy": bf16(MOVED)}, PATHS[1]: {"embed": bf16(MOVED)}})
    shard = diff.delta / "delta-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with open_target(diff.delta, diff.base) as view:
        for name in ("embed", "copy"):
            with pytest.raises(PayloadError) as caught:
                view[name]
            assert caught.value.what == f"{shard.name} in the delta is damaged"
            assert repr(name) in caught.value.why
    problems = verify_delta(diff.delta, base=diff.base).problems
    assert {(p.place, p.path) for p in problems} == {
        ("delta", shard.name),
        ("rebuilt", PATHS[0]),
        ("rebuilt", PATHS[1]),
    }


def test_what_is_like_another_that_is_not_equal_never_gets_its_name(diff: Pairs, tmp_path: Path) -> None:
    """Of the same dtype and shape: nothing in the manifest contradicts it but the file's SHA-256."""
    base = {"m.safetensors": {"embed": bf16(EMBED), "other": bf16(OTHER)}}
    other = bf16(OTHER + weights(OTHER.shape, 4, 1e-4))
    manifest = diff.diff(base, {"m.safetensors": {"a": bf16(MOVED), "embed": bf16(MOVED), "other": other}})
    entries = {entry.name: entry for entry in manifest.tensors}
    entries["a"] = replace(entries["a"], like=TargetTensor("other", "m.safetensors"))
    (diff.delta / "deltaweights.json").write_bytes(
        replace(manifest, tensors=tuple(entries.values())).to_json()
    )
    with pytest.raises(DeltaError, match=r"m\.safetensors was not rebuilt correctly"):
        apply_delta(diff.delta, tmp_path / "lie", base=diff.base)
    assert not (tmp_path / "lie" / "m.safetensors").exists()
    assert [p.place for p in verify_delta(diff.delta, base=diff.base).problems] == ["rebuilt"]
