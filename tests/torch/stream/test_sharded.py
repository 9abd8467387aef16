"""Weight streams of sharded trainers: every rank writes its own parts. What the ranks do and compare is in
ranks.py; here is what needs no second process, too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from deltaweights import CheckpointError, DeltaError, FormatVersionError, OutputError, canonical
from deltaweights.torch import DeltaPublisher, DeltaSubscriber, Part
from deltaweights.torch.stream.records import _HEADS, Head

from ..process_groups import ENVIRONMENT, ROOT, SHOWN, process_group
from .make_fixture import digests, state

FIXTURES = ROOT / "tests" / "fixtures"


def run(ranks: int, tasks: str, folder: Path) -> list[tuple[int, str]]:
    """Let ``ranks`` processes do the tasks. Returns their exit codes, and the ends of their outputs."""
    module = [sys.executable, "-m", "tests.torch.stream.ranks"]
    processes = [
        subprocess.Popen(
            [*module, tasks, str(folder), str(rank), str(ranks)],
            env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0][-SHOWN:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_ranks_publish_what_they_have_and_followers_are_equal(tmp_path: Path) -> None:
    """FSDP2, tensor parallelism, parts of all kinds, an engine that is sharded too, and failures."""
    for code, output in run(2, "fsdp,parts,tensor_parallel,engine,failures", tmp_path):
        assert code == 0, output


@pytest.mark.slow
def test_four_ranks_with_replicas_and_two_kinds_of_parallelism(tmp_path: Path) -> None:
    for code, output in run(4, "parts,tensor_parallel", tmp_path):
        assert code == 0, output


@pytest.mark.slow
def test_a_rank_that_is_killed_publishes_nothing_and_the_next_trainers_go_on(tmp_path: Path) -> None:
    (code, output), (killed, _) = run(2, "kill", tmp_path)
    assert (code, killed) == (0, -9), output
    stream = tmp_path / "kill"
    subscriber = DeltaSubscriber(stream)
    mirror = subscriber.empty_state()
    assert subscriber.sync(mirror).step == 1
    with DeltaPublisher(stream, mirror, step=1) as publisher:  # by itself now: other parts, so an anchor
        mirror["rows"] += 1
        report = publisher.publish(2, mirror)
        assert report.anchor_bytes
        publisher.publish(3, mirror)
    assert subscriber.sync(subscriber.empty_state()).step == 3
    assert not [*stream.glob(".deltaweights/*")]


# Files of every version -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stream-v1", "stream-v2"])
def test_frozen_streams_are_read(name: str) -> None:
    """From the base by updates, from nothing by an anchor, and to every step."""
    stream = FIXTURES / name / "stream"
    expected = json.loads((FIXTURES / name / "digests.json").read_text())
    model = {name: tensor.clone() for name, tensor in state(0).items()}
    model["tied"] = model["bf16"]
    report = DeltaSubscriber(stream).sync(model)
    assert (report.updates, report.from_anchor) == (3, False)
    assert digests(model) == expected[3]
    for step in range(4):
        subscriber = DeltaSubscriber(stream)
        mirror = subscriber.empty_state()
        assert subscriber.sync(mirror, step=step).from_anchor
        assert digests(mirror) == expected[step]


@pytest.mark.parametrize("name", ["stream-v1", "stream-v2"])
def test_digests_are_those_of_the_document(name: str) -> None:
    """Computed from the tensors by what docs/format.md says, and by nothing else."""
    stream = FIXTURES / name / "stream"
    for step in range(4):
        record = json.loads((stream / f"{step:010d}.json").read_text())
        tensors, rows = state(step), []
        for row in record["tensors"]:
            array = tensors[row["name"]].view(
                torch.uint8 if row["dtype"] == "BOOL" else tensors[row["name"]].dtype
            )
            array = array.view(torch.int16) if row["dtype"] == "BF16" else array
            boxes = [(offsets, sizes) for offsets, sizes, _ in row.get("parts", [])]
            sums = b""
            for offsets, sizes in boxes or [([0] * array.dim(), list(array.shape))]:
                part = array.numpy()[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                data = part.tobytes()  # in row-major order
                for start in range(0, len(data), 1 << 21):
                    sums += xxhash.xxh3_64_intdigest(data[start : start + (1 << 21)]).to_bytes(8, "little")
            assert row["digest"] == hashlib.sha256(sums).hexdigest()
            facts = [row["name"], row["dtype"], row["shape"], row["digest"]]
            rows.append([*facts, [[o, s] for o, s in boxes]] if boxes else facts)
        canonical = json.dumps(rows, separators=(",", ":"), sort_keys=True, ensure_ascii=False) + "\n"
        assert record["state"] == hashlib.sha256(canonical.encode()).hexdigest()


# Hostile records --------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "stream-v2" / "stream", tmp_path / "stream"))


def rewrite(stream: Path, change: Callable[[dict[str, Any]], object], version: int = 2) -> None:
    """Change the newest record, with all digests right."""
    head = json.loads((stream / "head.json").read_text())
    path = stream / f"{head['newest']['number']:010d}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_bytes(encode(record))
    head["format_version"] = version
    head["newest"]["record"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (stream / "head.json").write_bytes(encode(head))


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def tensor_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (tensor for tensor in record["tensors"] if tensor["name"] == name)
    return found  # type: ignore[no-any-return]


def set_parts(*parts: object, name: str = "columns") -> Callable[[dict[str, Any]], object]:
    return lambda record: tensor_of(record, name).update(parts=list(parts))


FIRST, SECOND = [[0, 0], [61, 7], 1], [[0, 7], [61, 89], 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_parts(FIRST, [[0, 6], [61, 90], 0]), "exactly once"),
        (set_parts(FIRST, [[0, 8], [61, 88], 0]), "exactly once"),
        (set_parts(FIRST, [[0, 7], [61, 90], 0]), "exactly once"),
        (set_parts(FIRST), "exactly once"),
        (set_parts(FIRST, [[1, 7], [61, 89], 0]), "exactly once"),
        (set_parts(FIRST, [[0, 0], [61, 89], 0]), "sorted by offsets"),
        (set_parts(SECOND, FIRST), "sorted by offsets"),
        (set_parts(FIRST, FIRST, SECOND), "sorted by offsets"),
        (set_parts(FIRST, SECOND, [[1, 7], [0, 89], 0]), "no elements"),
        (set_parts(FIRST, [[0, 7, 0], [61, 89], 0]), "exactly once"),
        (set_parts([[0], [61], 0]), "exactly once"),
        (set_parts(FIRST, [[0, 7], [61, 89], 2]), "in a file that it does not have"),
        (set_parts(FIRST, [[0, 7], [61, 89], 10**9]), "is damaged"),
        (set_parts(FIRST, [[0, -7], [61, 89], 0]), "is damaged"),
        (set_parts(FIRST, [[0, 7], [61, 89], 0, 0]), "is damaged"),
        (set_parts(FIRST, [[0, 7], [2**61, 2**61], 0]), "exactly once"),
        (set_parts(*([[0, k], [61, 1], 0] for k in range(97))), "exactly once"),
        (set_parts(*([[k // 96, k % 96], [1, 1], 0] for k in range(96 * 61 - 1))), "exactly once"),
        (lambda record: tensor_of(record, "columns").pop("parts"), "do not have the fields"),
        (lambda record: tensor_of(record, "columns").update(shape=[2**50, 2**50]), "larger than any"),
        (lambda record: tensor_of(record, "columns").update(dtype="F4"), "share a byte"),
        (
            lambda record: tensor_of(record, "count").update(name="columns@0,0"),
            "sorted by name|names of others",
        ),
        (lambda record: tensor_of(record, "tied").update(parts=[]), "cannot be equal"),
        (lambda record: record.update(update=record["update"][0]), "files are not listed"),
        (lambda record: record.update(update=record["update"][:1]), "in a file that it does not have"),
        (lambda record: record.update(update=[]), "no files"),
        (lambda record: record.update(anchor=record["update"][:1]), "another number"),
        (lambda record: record.update(update=record["update"] * 50_001), "too many"),
        (lambda record: record.update(format_version=1), "files are not listed"),
        (set_parts(FIRST, SECOND), None),
    ],
)
def test_a_record_whose_parts_do_not_fit_is_refused(
    stream: Path, change: Callable[[dict[str, Any]], object], match: str | None
) -> None:
    rewrite(stream, change)
    subscriber = DeltaSubscriber(stream)
    if match is None:  # the change itself is right
        assert subscriber.newest().step == 3
        return
    with pytest.raises(DeltaError, match=match):
        subscriber.newest()


def sealed(record: dict[str, Any]) -> None:
    """Make the state's digest right again."""
    rows = [
        [
            t["name"],
            t["dtype"],
            t["shape"],
            t["digest"],
            *([[p[:2] for p in t["parts"]]] if t["parts"] else []),
        ]
        for t in record["tensors"]
    ]
    record["state"] = hashlib.sha256(encode(rows)).hexdigest()


def test_parts_that_change_within_a_chain_are_refused(stream: Path) -> None:
    """Each record is right by itself."""

    def change(record: dict[str, Any]) -> None:
        record["anchor"] = None
        tensor_of(record, "columns")["parts"] = [[[0, 0], [61, 96], 0]]
        sealed(record)

    head = json.loads((stream / "head.json").read_text())
    path = stream / f"{head['newest']['number']:010d}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_bytes(encode(record))
    head["newest"] |= {"record": hashlib.sha256(path.read_bytes()).hexdigest(), "state": record["state"]}
    (stream / "head.json").write_bytes(encode(head))
    subscriber = DeltaSubscriber(stream)
    with pytest.raises(DeltaError, match="cuts tensors in another way"):
        subscriber.sync(subscriber.empty_state())


def test_a_payload_in_another_file_than_its_record_says_is_refused(stream: Path) -> None:
    """Both files, their digests too, are exchanged."""
    first, second = sorted(stream.glob("0000000003-*.update.safetensors"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    rewrite(stream, lambda record: record["update"].reverse())
    subscriber = DeltaSubscriber(stream)
    mirror = subscriber.empty_state()
    subscriber.sync(mirror, step=2)
    before = digests(mirror)
    with pytest.raises(DeltaError, match="which its record lacks there"):
        DeltaSubscriber(stream).sync(mirror)
    assert digests(mirror) == before


def test_one_flipped_byte_in_any_file_is_found_and_writes_nothing(stream: Path) -> None:
    subscriber = DeltaSubscriber(stream)
    mirror = subscriber.empty_state()
    subscriber.sync(mirror, step=2)
    before = digests(mirror)
    for path in stream.glob("0000000003-*"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DeltaError, match="SHA-256"):
            subscriber.sync(mirror)
        path.write_bytes(data)
        assert digests(mirror) == before
    assert subscriber.sync(mirror).updates == 1


def test_a_version_that_comes_later_is_refused(stream: Path) -> None:
    rewrite(stream, lambda record: None, version=4)
    with pytest.raises(FormatVersionError, match="format version 4") as caught:
        DeltaSubscriber(stream).newest()
    assert "reads version 1 to 3" in caught.value.why
    rewrite(stream, lambda record: record.update(format_version=3), version=2)
    with pytest.raises(FormatVersionError, match="format version 3") as caught:
        DeltaSubscriber(stream).newest()
    assert "reads version 1 to 2" in caught.value.why  # version 3 is that of signed heads
    older = _HEADS._replace(version=1)  # what reads format version 1 alone
    with pytest.raises(FormatVersionError, match="format version 2"):
        canonical.decode(
            (FIXTURES / "stream-v2" / "stream" / "head.json").read_bytes(), Head, older, DeltaError
        )


# One process ------------------------------------------------------------------------------------------


Pieces = dict[str, Tensor | list[Part]]


def cut(name: str, tensor: Tensor, rows: int, columns: int) -> list[Part]:
    """A matrix in so many parts."""
    parts = []
    for band in torch.arange(tensor.shape[0]).tensor_split(rows):
        for block in torch.arange(tensor.shape[1]).tensor_split(columns):
            first, second = int(band[0]), int(block[0])
            values = tensor[first : first + len(band), second : second + len(block)].clone()
            parts.append(Part(name, values, tuple(tensor.shape), (first, second)))
    return parts


@pytest.mark.parametrize("is_transposed", [False, True])
def test_changes_are_in_the_coordinates_of_the_whole_tensor(tmp_path: Path, is_transposed: bool) -> None:
    """Parts of several chunks, rows that are apart in the model's memory, NaN and -0.0."""
    whole = torch.randn(1500, 2003, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model = {"w": whole.clone(), "b": torch.zeros(3)}
    if is_transposed:
        model["w"] = whole.T.contiguous().T
    base: Pieces = {"w": cut("w", whole, 2, 3), "b": model["b"]}
    with DeltaPublisher(tmp_path, base) as publisher:
        subscriber = DeltaSubscriber(tmp_path)
        assert subscriber.sync(model).updates == 0  # it is recognized
        for step, share in ((1, 0.01), (2, 0.9)):
            moved = torch.rand(whole.shape, generator=torch.Generator().manual_seed(step)) < share
            whole[moved] *= 2
            whole[700, 1400], whole[3, 5] = float("nan"), -0.0
            base["w"] = cut("w", whole, 2, 3)
            publisher.publish(step, base)
            before = model["w"].clone()
            with subscriber.prepare(model) as prepared:
                (change,) = prepared.changes()
                assert (change.name, change.shape, change.dtype) == ("w", (1500, 2003), torch.bfloat16)
                assert torch.equal(model["w"].view(torch.int16), before.view(torch.int16))
                flat = before.contiguous().view(torch.int16).view(-1)
                assert (change.indices is None) == (step == 2)  # then all of it is there
                indices = torch.arange(whole.numel()) if change.indices is None else change.indices
                assert (indices.diff() > 0).all()
                flat[indices] = change.values.view(torch.int16)
                assert torch.equal(flat.view(whole.shape), whole.view(torch.int16))
                prepared.commit()
            assert torch.equal(model["w"].contiguous().view(torch.int16), whole.view(torch.int16))


def test_wider_floats_are_published_in_the_dtype_and_nothing_else_is_cast(tmp_path: Path) -> None:
    wide = torch.randn(1_100_000, generator=torch.Generator().manual_seed(1))  # of two chunks
    wide[::1000], wide[1::1000], wide[2], wide[3] = float("nan"), -0.0, 3.4e38, float("inf")
    wide[4:6] = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    given = {
        "f32": wide,
        "f64": wide[:999].double(),
        "view": wide[: 600 * 600].view(600, 600).T,
        "f16": wide[:99].half(),
        "bf16": wide[:99].bfloat16(),
        "i32": torch.arange(9, dtype=torch.int32),
        "i64": torch.tensor(2**40 + 1),
    }
    wanted = {
        name: tensor.to(torch.bfloat16) if name in ("f32", "f64", "view") else tensor
        for name, tensor in given.items()
    }
    with DeltaPublisher(tmp_path, given, dtype=torch.bfloat16) as publisher:
        subscriber = DeltaSubscriber(tmp_path)
        mirror = subscriber.empty_state()
        for step in (1, 2):
            wide[7] += step
            given["f64"][8] = wanted["f64"][8] = -step
            wanted["f32"][7] = wide[7].to(torch.bfloat16)
            wanted["view"][7, 0] = wide[7].to(torch.bfloat16)
            publisher.publish(step, given)
            subscriber.sync(mirror)
            assert digests(mirror) == digests(wanted)
    assert json.loads((tmp_path / "head.json").read_text())["format_version"] == 1


def test_whole_tensors_are_published_as_before(tmp_path: Path) -> None:
    """Records of one process have the form that older versions read."""
    for folder, options in ((tmp_path / "old", {}), (tmp_path / "new", {"dtype": torch.float64})):
        with DeltaPublisher(folder, state(0), **options) as publisher:  # type: ignore[arg-type]
            publisher.publish(1, state(1))
    frozen = FIXTURES / "stream-v1" / "stream"
    for number in (0, 1):
        expected = json.loads((frozen / f"{number:010d}.json").read_text())
        for folder in (tmp_path / "old", tmp_path / "new"):
            found = json.loads((folder / f"{number:010d}.json").read_text())
            assert found.keys() == expected.keys()
            assert (found["state"], found["tensors"]) == (expected["state"], expected["tensors"])


def test_names_that_look_like_parts_are_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 2)
    odd: Pieces = {"w": cut("w", tensor, 2, 1), "w@2,0": torch.ones(1)}
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        DeltaPublisher(tmp_path, odd)
    with pytest.raises(CheckpointError, match="Two are called"):
        DeltaPublisher(tmp_path, cut("w", tensor, 2, 1) * 2)
    assert not any(tmp_path.iterdir())


def test_a_repository_takes_one_process_alone(tmp_path: Path) -> None:
    with (
        process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1),
        pytest.raises(OutputError, match="Several processes cannot publish to hf://org/name"),
    ):
        DeltaPublisher("hf://org/name", {"w": torch.zeros(1)}, process_group=dist.group.WORLD)
