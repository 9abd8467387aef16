"""Chains of deltas: read, applied, verified and compacted without any target on the way on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from deltaweights import (
    BaseMismatchError,
    DeltaError,
    Manifest,
    OutputError,
    apply_delta,
    compact_deltas,
    make_delta,
    open_target,
    verify_delta,
)
from deltaweights.cli.commands import app
from deltaweights.delta.chain import links, open_recipe
from deltaweights.delta.pointer import MAX_DELTAS
from deltaweights.delta.rebuilt import RebuiltSource
from deltaweights.delta.recipes import TensorRecipe
from deltaweights.manifest import MANIFEST_NAME
from deltaweights.patch import rebuild_shard
from deltaweights.storage import Source, Span, sha256_of
from deltaweights.workers import Meter, Workers

from ..checkpoints import Array, bf16, contents, weights, write_pair, write_safetensors
from ..conftest import CHUNK_BYTES, Trio
from ..hub_server import HubServer
from ..storage.contract import SourceContract, Subject, flipped

ACCEPT = ("--accept-license", "qwen", "--accept-license", "openrail")


@dataclass(frozen=True)
class Chain:
    """A base, the targets made of it one after the other, and the deltas between neighbors."""

    base: Path
    targets: list[Path]
    deltas: list[Path]

    @property
    def last(self) -> Path:
        return self.targets[-1]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Four deltas. From one to the next, everything may change: shards, names, dtypes, chunks, files."""
    folder = tmp_path_factory.mktemp("chain")
    base, first = write_pair(folder)
    targets = [first, *(folder / f"target-{k}" for k in (2, 3, 4))]
    for target, seed in zip(targets[1:], (50, 60, 70), strict=True):
        _write_next(target, seed)
    (targets[1] / "README.md").write_text("---\nlicense: openrail\n---\nSecond\n")
    (targets[1] / "LICENSE").write_text("made up, of the second target\n")
    (targets[3] / "README.md").write_text("---\nlicense: mit\n---\nLast\n")
    deltas = []
    sizes = (CHUNK_BYTES, 5 * 4096, CHUNK_BYTES, 1 << 20)
    for k, (old, new, size) in enumerate(zip([base, *targets[:-1]], targets, sizes, strict=True)):
        deltas.append(folder / f"delta-{k + 1}")
        make_delta(old, new, deltas[-1], chunk_bytes=size, base_repo=f"org/step-{k}")
    return Chain(base, targets, deltas)


def _write_next(target: Path, seed: int) -> None:
    """The first target's tensors, trained further, in two shards; one is renamed, one grows, one is cast."""
    move = [weights((300, 200), seed + k, 1e-4) for k in range(4)]
    new: dict[str, Array] = {
        f"model.layers.{k}.weight": bf16(weights((300, 200), k) + step) for k, step in enumerate(move)
    }
    new["model.embed"] = bf16(np.concatenate([weights((400, 64), 20), weights((24 + seed, 64), seed)]))
    new["model.wide"] = bf16(weights((100, 100), 23))
    new["vision.a.weight"] = bf16(weights((20, 3), 25) + weights((20, 3), seed, 1e-3))
    new["vision.a.bias"] = bf16(weights((20,), 26))
    names = list(new)
    for part, shard in enumerate((names[seed % 3 :], names[: seed % 3])):
        tensors = {name: new[name] for name in shard}
        write_safetensors(target / f"model-0000{part + 1}-of-00002.safetensors", tensors)
    (target / "config.json").write_text('{"model_type": "qwen2"}')
    (target / "vocab.json").write_text(json.dumps(list(range(30_000))))
    (target / "notes.txt").write_text(f"step {seed}\n")


# The view ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_view_is_the_last_target(chain: Chain, tmp_path: Path, length: int) -> None:
    target = chain.targets[length - 1]
    make_delta(chain.base, target, tmp_path / "direct")
    with (
        open_target(chain.deltas[:length], chain.base) as view,
        open_target(tmp_path / "direct", chain.base) as direct,
    ):
        assert sorted(view) == sorted(direct)
        for name in direct:
            assert (view.dtype(name), view.shape(name)) == (direct.dtype(name), direct.shape(name))
            assert view[name].data.tobytes() == direct[name].data.tobytes()
    with open_recipe(chain.deltas[:length], chain.base) as recipe:
        assert len(links(recipe)) == length


class TestRebuiltTarget(SourceContract):
    """The last target, as it is rebuilt. What is read at one place must not spoil what is read at another."""

    @pytest.fixture
    def subject(self, chain: Chain, tmp_path: Path) -> Iterator[Subject]:
        files = contents(chain.last)

        def changed(path: str) -> Source:
            target = shutil.copytree(chain.last, tmp_path / "changed")
            (target / path).write_bytes(flipped(files[path]))
            make_delta(chain.targets[2], target, tmp_path / "delta")
            return RebuiltSource(open_recipe([*chain.deltas[:3], tmp_path / "delta"], chain.base))

        with RebuiltSource(open_recipe(chain.deltas, chain.base)) as source:
            yield Subject(source, files, changed)


@pytest.mark.usefixtures("no_pauses")
class TestRebuiltTargetFromTheHub(SourceContract):
    """Delta and base come over a network."""

    @pytest.fixture
    def subject(self, shelf: HubServer, large: Trio, tmp_path: Path) -> Iterator[Subject]:
        files = contents(large.target)

        def changed(path: str) -> Source:
            target = shutil.copytree(large.target, tmp_path / "changed")
            (target / path).write_bytes(flipped(files[path]))
            make_delta("org/base", target, tmp_path / "delta")
            return RebuiltSource(open_recipe(tmp_path / "delta"))

        with RebuiltSource(open_recipe("org/delta")) as source:
            yield Subject(source, files, changed)


def test_a_delta_is_the_same_from_a_chain_as_from_its_folder(chain: Chain, tmp_path: Path) -> None:
    for name, base in (
        ("chain", RebuiltSource(open_recipe(chain.deltas[:3], chain.base))),
        ("folder", chain.targets[2]),
    ):
        make_delta(base, chain.last, tmp_path / name, base_repo="org/step-3", chunk_bytes=1 << 20)
    assert contents(tmp_path / "chain") == contents(tmp_path / "folder") == contents(chain.deltas[3])


def test_closing_the_view_closes_all_files(chain: Chain) -> None:
    def open_files() -> list[str]:
        return [
            str(p.resolve())
            for p in Path("/proc/self/fd").iterdir()
            if str(chain.base.parent) in str(p.resolve())
        ]

    before = open_files()
    with open_target(chain.deltas, chain.base) as view:
        view["model.embed"]
        assert len(open_files()) >= len(before) + 5
    assert open_files() == before


# Apply and verify --------------------------------------------------------------------------------------


def test_apply_rebuilds_the_last_target(chain: Chain, tmp_path: Path) -> None:
    report = apply_delta(chain.deltas, tmp_path / "out", base=chain.base, threads=3)
    assert contents(tmp_path / "out") == contents(chain.last)
    assert sorted(report.rebuilt) == sorted(contents(chain.last))
    again = apply_delta(chain.deltas, tmp_path / "out", base=chain.base)
    assert not again.rebuilt


def test_the_texts_of_every_license_on_the_way_lie_beside_the_result(chain: Chain, tmp_path: Path) -> None:
    apply_delta(chain.deltas, tmp_path / "out", base=chain.base)
    landed = [p.read_bytes() for p in (tmp_path / "out" / ".deltaweights" / "licenses").iterdir()]
    for delta in chain.deltas:
        texts = [*(delta / "licenses").glob("*"), *delta.glob("NOTICE")]
        assert texts
        assert {text.read_bytes() for text in texts} <= set(landed)


def test_verify_goes_over_every_delta(chain: Chain, tmp_path: Path) -> None:
    report = verify_delta(chain.deltas, base=chain.base, target=chain.last)
    assert report.ok
    assert report.checked == sum(len(_manifest(d).files) for d in chain.deltas) + 2 * len(
        contents(chain.last)
    )
    damaged = shutil.copytree(chain.deltas[1], tmp_path / "damaged")
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    report = verify_delta([chain.deltas[0], damaged, *chain.deltas[2:]], base=chain.base)
    assert [(p.place, p.path, p.kind) for p in report.problems] == [("delta", str(shard), "different")]


def test_a_missing_or_misplaced_delta_is_named(chain: Chain, tmp_path: Path) -> None:
    one, two, three, four = chain.deltas
    for broken, pair in (
        ([one, three], (three, one)),
        ([two, one], (one, two)),
        ([one, two, four], (four, two)),
        ([one, one], (one, one)),
    ):
        for action in (
            lambda deltas: open_target(deltas, chain.base),
            lambda deltas: apply_delta(deltas, tmp_path / "out", base=chain.base),
            verify_delta,
            lambda deltas: compact_deltas(deltas, tmp_path / "out", base=chain.base),
        ):
            with pytest.raises(BaseMismatchError, match=f"{pair[0]} does not follow {pair[1]}\n"):
                action(broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, MAX_DELTAS + 1])
def test_the_number_of_deltas_has_bounds(chain: Chain, count: int) -> None:
    with pytest.raises(DeltaError, match="compact"):
        open_target(chain.deltas[:1] * count, chain.base)


def test_the_longest_chain_can_be_read(tmp_path: Path) -> None:
    """No stack ends before the limit does, whatever thread reads."""
    for k in range(MAX_DELTAS + 1):
        write_safetensors(
            tmp_path / str(k) / "a.safetensors", {"w": bf16(weights((64,), 0) + np.float32(1e-3 * k))}
        )
    for k in range(MAX_DELTAS):
        make_delta(tmp_path / str(k), tmp_path / str(k + 1), tmp_path / f"d{k}", threads=1)
    deltas = [tmp_path / f"d{k}" for k in range(MAX_DELTAS)]
    apply_delta(deltas, tmp_path / "out", base=tmp_path / "0")
    assert contents(tmp_path / "out") == contents(tmp_path / str(MAX_DELTAS))


def test_a_wrong_base_is_refused_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    wrong = shutil.copytree(chain.base, tmp_path / "wrong")
    shard = wrong / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for action in (apply_delta, compact_deltas):
        with pytest.raises(BaseMismatchError, match="not the base"):
            action(chain.deltas, tmp_path / "out", base=wrong)
        assert not (tmp_path / "out").exists()
    with pytest.raises(BaseMismatchError, match="not the base"):
        verify_delta(chain.deltas, base=wrong)


def test_a_damaged_delta_on_the_way_is_found(chain: Chain, tmp_path: Path) -> None:
    """Not only in the last one, and by its name."""
    deltas = [shutil.copytree(delta, tmp_path / delta.name) for delta in chain.deltas]
    shard = next(path for path in deltas[1].glob("delta-*.safetensors") if path.stat().st_size > 10_000)
    data = bytearray(shard.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DeltaError, match=f"{shard.name} in the delta is damaged"):
        apply_delta(deltas, tmp_path / "out", base=chain.base)


def test_the_result_must_not_lie_in_what_it_is_made_from(chain: Chain) -> None:
    for place in (chain.base, *chain.deltas):
        for action in (apply_delta, compact_deltas):
            with pytest.raises(OutputError):
                action(chain.deltas, place / "inside", base=chain.base)
            assert not (place / "inside").exists()


# Compact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 4])
def test_one_delta_does_what_several_do(chain: Chain, tmp_path: Path, length: int) -> None:
    made = compact_deltas(chain.deltas[:length], tmp_path / "one", base=chain.base, chunk_bytes=CHUNK_BYTES)
    apply_delta(tmp_path / "one", tmp_path / "out", base=chain.base)
    assert contents(tmp_path / "out") == contents(chain.targets[length - 1])
    assert verify_delta(tmp_path / "one", base=chain.base).ok
    first, last = _manifest(chain.deltas[0]), _manifest(chain.deltas[length - 1])
    assert made.base == first.base
    assert made.target == replace(last.target, files=made.target.files)
    assert [(f.path, f.sha256) for f in made.target.files] == [(f.path, f.sha256) for f in last.target.files]


def test_it_is_the_delta_that_diff_makes(chain: Chain, tmp_path: Path) -> None:
    """Down to the byte, where matching by name finds what the deltas lead to."""
    compact_deltas(chain.deltas, tmp_path / "one", base=chain.base)
    make_delta(chain.base, chain.last, tmp_path / "direct", base_repo="org/step-0")
    assert contents(tmp_path / "one") == contents(tmp_path / "direct")


def test_what_was_stated_by_hand_is_carried(chain: Chain, tmp_path: Path) -> None:
    old, new = tmp_path / "d1", tmp_path / "d2"
    make_delta(chain.base, chain.targets[0], old, base_repo="a/b", base_revision="c0ffee", base_license="mit")
    make_delta(chain.targets[0], chain.targets[1], new, target_repo="x/y", target_license="apache-2.0")
    made = compact_deltas([old, new], tmp_path / "one", base=chain.base)
    assert (made.base.repo_id, made.base.revision, made.base.license.id) == ("a/b", "c0ffee", "mit")
    assert (made.target.repo_id, made.target.license.id) == ("x/y", "apache-2.0")


def test_tensors_are_followed_through_their_names(tmp_path: Path) -> None:
    """Which takes rules to find; without them, the tensor would be stored whole."""
    values = weights((200, 100), 1)
    for k, name in enumerate(("encoder.w", "middle", "decoder_v")):
        write_safetensors(tmp_path / str(k) / "a.safetensors", {name: bf16(values + np.float32(1e-4 * k))})
    make_delta(tmp_path / "0", tmp_path / "1", tmp_path / "d1", rename=[("middle", "encoder.w")])
    make_delta(tmp_path / "1", tmp_path / "2", tmp_path / "d2", rename=[("decoder_v", "middle")])
    made = compact_deltas([tmp_path / "d1", tmp_path / "d2"], tmp_path / "one", base=tmp_path / "0")
    assert [entry.base.name for entry in made.tensors if entry.base] == ["encoder.w"]
    assert made.delta_bytes < values.nbytes // 4
    apply_delta(tmp_path / "one", tmp_path / "out", base=tmp_path / "0")
    assert contents(tmp_path / "out") == contents(tmp_path / "2")


def test_a_base_that_differs_where_no_delta_looks_is_found(tmp_path: Path) -> None:
    """The first delta stores the tensor whole, so it would not notice; the new one is coded against it."""
    layers = {"a": bf16(weights((100,), 1)), "b": bf16(weights((100,), 2))}
    tensors = [layers, layers | {"b": Array("U8", (100,), bytes(100))}, layers]
    for k, one in enumerate(tensors):
        write_safetensors(tmp_path / str(k) / "a.safetensors", one)
    make_delta(tmp_path / "0", tmp_path / "1", tmp_path / "d1")
    make_delta(tmp_path / "1", tmp_path / "2", tmp_path / "d2")
    wrong = layers | {"b": bf16(weights((100,), 3))}
    write_safetensors(tmp_path / "wrong" / "a.safetensors", wrong)
    with pytest.raises(BaseMismatchError, match="SHA-256"):
        compact_deltas([tmp_path / "d1", tmp_path / "d2"], tmp_path / "one", base=tmp_path / "wrong")
    assert not (tmp_path / "one" / MANIFEST_NAME).exists()


_MEASURE = """
import sys, tracemalloc
import deltaweights
deltas, out, base = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
tracemalloc.start()  # counts NumPy's arrays too, whatever the allocator and the system make of them
deltaweights.compact_deltas(deltas, out, base=base, threads=2)
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
def test_memory_grows_neither_with_the_shards_nor_with_the_chain(tmp_path: Path) -> None:
    def peak(name: str, megabytes: int, steps: int) -> int:
        folder = tmp_path / name
        values = weights((megabytes << 9, 1024), 1)
        moved = weights(values.shape, 2, 1e-4)
        for k in range(steps + 1):
            write_safetensors(folder / str(k) / "a.safetensors", {"w": bf16(values + moved * np.float32(k))})
        for k in range(steps):
            make_delta(folder / str(k), folder / str(k + 1), folder / f"d{k}")
        deltas = ",".join(str(folder / f"d{k}") for k in range(steps))
        command = [sys.executable, "-c", _MEASURE, deltas, str(folder / "out"), str(folder / "0")]
        result = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        shutil.rmtree(folder)
        return result

    small = peak("small", 8, 2)
    assert peak("large", 64, 2) < small + (24 << 20)
    assert peak("long", 8, 10) < small + (24 << 20)


# From the Hub, and the command line --------------------------------------------------------------------


def test_a_chain_streams_from_the_hub(chain: Chain, hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/step-0", contents(chain.base))
    names = [f"org/{delta.name}" for delta in chain.deltas]
    for name, delta in zip(names, chain.deltas, strict=True):
        hub.add_repo(name, contents(delta))
    apply_delta(names, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(chain.last)
    assert verify_delta(names, base="org/step-0").ok
    with open_recipe(names) as view:
        spans = [Span("model-00001-of-00002.safetensors", 0, 1000), Span("notes.txt", 0, 5)]
        assert view.is_remote
        assert RebuiltSource(view).ranges(spans)


def test_a_byte_that_comes_wrong_once_does_no_harm(hub: HubServer, tmp_path: Path) -> None:
    """The chunk is decoded again, from a base that nothing may have overwritten meanwhile."""
    values, moved = weights((1500, 1000), 1), weights((1500, 1000), 2, 1e-4)
    for k in range(3):
        write_safetensors(tmp_path / str(k) / "a.safetensors", {"w": bf16(values + moved * np.float32(k))})
    hub.add_repo("org/base", contents(tmp_path / "0"))
    for k in (1, 2):
        make_delta(tmp_path / str(k - 1), tmp_path / str(k), tmp_path / f"d{k}", base_repo="org/base")
        hub.add_repo(f"org/d{k}", contents(tmp_path / f"d{k}"))
    hub.fail("org/d1", "delta-00001-of-00001.safetensors", on="content", flip_byte=300_000)
    apply_delta(["org/d1", "org/d2"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "2")


def _mixed_deltas(folder: Path, count: int) -> list[Path]:
    """Deltas of which each has a chunk, another one, that needs nothing of its base."""
    values = weights((512, 1024), 1)
    write_safetensors(folder / "0" / "a.safetensors", {"w": bf16(values)})
    for k in range(1, count + 1):
        values = values + weights(values.shape, k + 1, 1e-4)
        values[64 * k : 64 * k + 32] = weights((32, 1024), k + 10, 0.5)
        write_safetensors(folder / str(k) / "a.safetensors", {"w": bf16(values)})
        make_delta(folder / str(k - 1), folder / str(k), folder / f"d{k}", chunk_bytes=1 << 16)
    return [folder / f"d{k}" for k in range(1, count + 1)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_nothing_is_decoded_twice_where_some_chunks_need_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """What lies below must not pass through memory that is in use."""
    deltas = _mixed_deltas(tmp_path, count)
    again: list[int] = []
    monkeypatch.setattr(TensorRecipe, "_decode_anew", lambda recipe, index, out: again.append(index))
    with open_recipe(deltas, tmp_path / "0") as target:
        for threads in (1, 3):
            with Workers(threads) as workers:
                digest = rebuild_shard(target.shard("a.safetensors"), workers, Meter(None, "", 0))
            assert digest == sha256_of([(tmp_path / str(count) / "a.safetensors").read_bytes()])
    assert not again


def test_a_damaged_chunk_that_no_later_delta_needs_does_no_harm(tmp_path: Path) -> None:
    first, second = _mixed_deltas(tmp_path, 2)
    with open_recipe(first, tmp_path / "0") as target:
        span = target.shard("a.safetensors").tensors["w"].data_span(4)  # rows 128 to 160
    data = bytearray((first / span.path).read_bytes())
    data[(span.start + span.end) // 2] ^= 1
    (first / span.path).write_bytes(data)
    apply_delta([first, second], tmp_path / "out", base=tmp_path / "0", threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "2")


@pytest.mark.parametrize("count", [3, 4])
def test_only_what_came_wrong_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of several chunks decoded at once, the others are there already, in memory that has two users."""
    values = weights((600, 1000), 1)
    for k in range(count + 1):
        moved = values + weights(values.shape, 2, 1e-4) * np.float32(k)
        write_safetensors(tmp_path / str(k) / "a.safetensors", {"w": bf16(moved)})
        if k:
            size = 1 << 18 if k == count else 1 << 16
            make_delta(tmp_path / str(k - 1), tmp_path / str(k), tmp_path / f"d{k}", chunk_bytes=size)
    deltas = [tmp_path / f"d{k}" for k in range(1, count + 1)]
    read, anew = TensorRecipe.read_data, TensorRecipe._decode_anew
    again: list[int] = []

    def damaged(self: TensorRecipe, first: int, end: int) -> NDArray[np.uint8]:
        data = read(self, first, end)
        if not again and end - first > 1 and self.delta_shard is middle:
            again.append(-1)
            data[-200] ^= 1
        return data

    def counted(
        self: TensorRecipe, index: int, out: NDArray[np.uint8], given: NDArray[np.uint8] | None
    ) -> None:
        again.append(index)
        anew(self, index, out, given)

    with open_recipe(deltas, tmp_path / "0") as target:
        middle = links(target)[count - 2].shard("a.safetensors").delta_shard
        monkeypatch.setattr(TensorRecipe, "read_data", damaged)
        monkeypatch.setattr(TensorRecipe, "_decode_anew", counted)
        with Workers(1) as workers:
            digest = rebuild_shard(target.shard("a.safetensors"), workers, Meter(None, "", 0))
    assert digest == sha256_of([(tmp_path / str(count) / "a.safetensors").read_bytes()])
    assert len(again) == 2


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_takes_chains(chain: Chain, tmp_path: Path) -> None:
    out, one = tmp_path / "out", tmp_path / "one"
    done = run("apply", *chain.deltas, "-o", out, "--base", chain.base, *ACCEPT)
    assert done.exit_code == 0, done.output
    assert contents(out) == contents(chain.last)
    assert run("verify", *chain.deltas, "--base", chain.base).exit_code == 0
    done = run("compact", *chain.deltas, "-o", one, "--base", chain.base)
    assert f"{one}: " in done.stdout
    assert "tensors:" in done.stdout
    summary = json.loads(run("inspect", one, "--json").stdout)
    again = run("compact", *chain.deltas, "-o", tmp_path / "two", "--base", chain.base, "--json", "-q")
    costs = ("seconds", "bytes_read", "bytes_written", "warnings")
    report = json.loads(again.stdout)
    assert {name: value for name, value in report.items() if name not in costs} == summary
    assert set(costs) <= report.keys()
    done = run("compact", chain.deltas[0], chain.deltas[2], "-o", tmp_path / "never", "--base", chain.base)
    assert done.exit_code == 1
    assert "does not follow" in done.stderr


def test_every_license_of_the_chain_has_to_be_accepted(chain: Chain, tmp_path: Path) -> None:
    """That of a target on the way too: it is part of what the last one was made from."""
    command = ("apply", *chain.deltas, "-o", tmp_path / "out", "--base", chain.base)
    done = run(*command, *ACCEPT[:2])
    assert done.exit_code == 3
    assert "openrail" in done.stderr.casefold()
    assert str(chain.deltas[1]) in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert done.stderr.count("Base: org/step-0") == 1
    assert done.stderr.count("Base: org/step-2") == 1


def _manifest(delta: Path) -> Manifest:
    return Manifest.from_json((delta / MANIFEST_NAME).read_bytes())
