"""The rehearsal of Kimi-Dev-72B is what it claims to be, and its figures hold at a small scale."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.checkpoint import parse_header

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import qwen  # noqa: E402
import rehearsal  # noqa: E402

#: 142 MB each. At 1/64, which is what CI does, and the benchmark by itself, it takes half a minute.
SCALE = os.environ.get("REHEARSAL_SCALE", "1/1024")
#: Of the adapter that is merged. At 1/1024, rank 16 would be half as large as the narrowest matrices.
RANK = 16 if Fraction(SCALE) >= Fraction(1, 64) else 4

#: Where only names and shapes count.
NO_WEIGHTS = qwen.Pool(memoryview(b""), memoryview(b""))

Sides = dict[qwen.Side, dict[str, qwen.Shard]]


def make_sides(pool: qwen.Pool, shrink: int) -> Sides:
    return {side: qwen.make_shards(side, pool, shrink) for side in get_args(qwen.Side)}


@pytest.fixture(scope="module")
def pool() -> qwen.Pool:
    return qwen.Pool.draw(0, 12 << 20)


@pytest.fixture(scope="module")
def sides(pool: qwen.Pool) -> Sides:
    """At 1/64: the embeddings have several blocks."""
    return make_sides(pool, 8)


# The made checkpoints ----------------------------------------------------------------------------------


def test_tensors_are_those_of_the_real_model() -> None:
    tensors = {tensor.name: tensor.shape for tensor in qwen.list_tensors()}
    assert len(tensors) == 963
    assert sum(map(prod, tensors.values())) == 72_706_203_648
    full = make_sides(NO_WEIGHTS, 1)
    assert [len(shards) for shards in full.values()] == [37, 41]
    for shards in full.values():
        headers = [parse_header(shard.header, shard.size, name) for name, shard in shards.items()]
        infos = [info for header in headers for info in header.tensors]
        assert {info.name: info.shape for info in infos} == tensors
        assert {info.dtype for info in infos} == {"BF16"}
        assert sum(info.nbytes for info in infos) == 145_412_407_296


@pytest.mark.parametrize("shrink", [2, 8, 128])
def test_smaller_scales_have_the_same_tensors(shrink: int) -> None:
    full, small = qwen.list_tensors(), qwen.list_tensors(shrink)
    assert [tensor.name for tensor in small] == [tensor.name for tensor in full]
    for a, b in zip(full, small, strict=True):
        assert a.shape == tuple(width * shrink for width in b.shape)
    for shards in make_sides(NO_WEIGHTS, shrink).values():
        for name, shard in shards.items():
            parse_header(shard.header, shard.size, name)


@settings(max_examples=30)
@given(data=st.data())
def test_any_range_is_its_parts_joined(sides: Sides, data: st.DataObject) -> None:
    shard = sides["base"]["model-00001-of-00037.safetensors"]
    start, middle, end = sorted(data.draw(st.integers(0, shard.size)) for _ in range(3))
    whole = bytes(shard.read(start, end - start))
    assert len(whole) == end - start
    assert whole == bytes(shard.read(start, middle - start)) + bytes(shard.read(middle, end - middle))


def test_target_is_the_base_moved_a_little(sides: Sides) -> None:
    base, target = (tensor_places(shards) for shards in sides.values())
    assert list(base) != list(target)
    for name, (shard, start, end) in base.items():
        old, new = weights_of(shard, start, end), weights_of(*target[name])
        assert 0.015 < old.std() < 0.025, name
        assert 2e-5 < (new - old).std() < 5e-4, name


def test_a_merged_target_is_the_base_with_products_of_a_low_rank(pool: qwen.Pool) -> None:
    base, target = (tensor_places(qwen.make_shards(side, pool, 8, 4)) for side in get_args(qwen.Side))
    for tensor in qwen.list_tensors(8)[:14]:
        (old, start, end), (new, *place) = base[tensor.name], target[tensor.name]
        before, after = (side.read(first, end - start) for side, first in ((old, start), (new, place[0])))
        if "proj.weight" not in tensor.name:
            assert before == after
            continue
        values = [(np.frombuffer(side, "<u2").astype("<u4") << 16).view("<f4") for side in (before, after)]
        update = (values[1] - values[0]).reshape(tensor.shape)[:200, :200]
        strengths = np.linalg.svd(update, compute_uv=False)
        assert strengths[3] > 5 * strengths[4], tensor.name
        assert 1e-4 < update.std() < 3e-4


Place = tuple[qwen.Shard, int, int]


def tensor_places(shards: dict[str, qwen.Shard]) -> dict[str, Place]:
    """Where each tensor lies: shard, first byte, the byte after the last."""
    places: dict[str, Place] = {}
    for name, shard in shards.items():
        header = parse_header(shard.header, shard.size, name)
        start = header.data_start
        places |= {info.name: (shard, start + info.start, start + info.end) for info in header.tensors}
    return places


def weights_of(shard: qwen.Shard, start: int, end: int) -> NDArray[np.float32]:
    """The weights in a range of bytes; of a large one, some in each block."""
    steps = range(start, end, 3 << 20)
    data = b"".join(bytes(shard.read(step, min(20_000, end - step))) for step in steps)
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def test_digests_are_of_the_bytes_and_worked_out_once(tmp_path: Path, pool: qwen.Pool) -> None:
    memory = tmp_path / "digests.json"
    first = make_sides(pool, 64)
    sizes = list(qwen.add_digests(first, memory))
    for shards in first.values():
        for shard in shards.values():
            assert shard.sha256 == hashlib.sha256(shard.read(0, shard.size)).hexdigest()
    assert sum(sizes) == sum(shard.size for shards in first.values() for shard in shards.values())

    kept = json.loads(memory.read_text())
    marked = dict.fromkeys(kept["sha256"], "from the file")
    memory.write_text(json.dumps(kept | {"sha256": marked}))
    again = make_sides(pool, 64)
    assert list(qwen.add_digests(again, memory)) == sizes
    assert {shard.sha256 for shards in again.values() for shard in shards.values()} == {"from the file"}

    other = make_sides(qwen.Pool.draw(1, 12 << 20), 64)
    list(qwen.add_digests(other, memory))
    shard = other["base"]["model-00001-of-00037.safetensors"]
    assert shard.sha256 == hashlib.sha256(shard.read(0, shard.size)).hexdigest()


# The rehearsal -----------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "rehearsal.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rehearsal_holds_and_notices_a_wrong_delta(tmp_path: Path) -> None:
    """Two runs: the second goes on with the delta of the first, of which one byte was changed."""
    done = run("--scale", SCALE, "--folder", str(tmp_path), "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All figures hold." in done.stdout
    folder = tmp_path / f"rehearsal-{SCALE.replace('/', '-of-')}"
    assert sorted(path.name for path in folder.iterdir()) == ["delta", "digests.json", "results.json"]
    results = rehearsal.Results.load(folder / "results.json")
    assert list(results.steps) == ["diff", "verify --base"]
    assert 0.1 < results.delta_bytes / results.target_bytes < 0.22
    for name, step in results.steps.items():
        assert step.needed <= step.fetched <= rehearsal._FETCHED[name] * step.needed
        assert results.delta_bytes <= step.disk
        assert 0 < step.requests < 200

    with open(folder / "delta" / "delta-00002-of-00041.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    done = run("--scale", SCALE, "--folder", str(tmp_path), "--resume")
    assert done.returncode == 1
    assert "diff begins" not in done.stdout
    assert "model-00002-of-00041.safetensors" in done.stdout
    assert "All figures hold." not in done.stdout
    assert rehearsal.Results.load(folder / "results.json").steps["diff"] == results.steps["diff"]
    shutil.rmtree(folder)  # pytest would keep it for the next three runs


@pytest.mark.slow
def test_merged_adapters_are_rehearsed(tmp_path: Path) -> None:
    done = run("--scale", SCALE, "--rank", str(RANK), "--folder", str(tmp_path), "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All figures hold." in done.stdout
    folder = tmp_path / f"rehearsal-{SCALE.replace('/', '-of-')}-rank-{RANK}"
    results = rehearsal.Results.load(folder / "results.json")
    assert results.delta_bytes / results.target_bytes < 0.05
    shutil.rmtree(folder)


def test_figures_that_do_not_hold_are_named() -> None:
    step = rehearsal.Step(1, 1, memory=768 << 20, disk=1000 + (8 << 30) // 64, fetched=1050, needed=1000,
                          requests=1, hub_cpu=1)  # fmt: skip
    good = rehearsal.Results("1/64", 2, {"diff": step}, target_bytes=5000, delta_bytes=1000)
    assert not rehearsal.find_missed(good)
    for change in ({"memory": step.memory + 1}, {"disk": step.disk + 1}, {"fetched": step.fetched + 1}):
        bad = replace(good, steps={"diff": step, "verify --base": replace(step, **change)})
        (missed,) = rehearsal.find_missed(bad)
        assert missed.startswith("verify --base ")
    assert rehearsal.find_missed(replace(good, wrong=["a file"])) == ["a file"]


def test_disk_is_watched(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(bytes(100_000))
    with rehearsal.watch_disk(tmp_path) as disk:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "during").write_bytes(bytes(200_000))
    assert 300_000 <= disk.peak < 400_000


@pytest.mark.parametrize("scale", ["1/2", "1/100", "3/64", "4", "1/65536", "0", "-1"])
def test_other_scales_are_refused(scale: str) -> None:
    with pytest.raises(ValueError, match="the scale is"):
        rehearsal.shrink_of(Fraction(scale))
