"""Distributed checkpoints as deltas: bit for bit on any number of ranks, and all that is wrong is found."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    FormatVersionError,
    ManifestError,
    OutputError,
    apply_delta,
)
from deltaweights.checkpoint import read_shard
from deltaweights.codec import RECORD
from deltaweights.delta.chain import open_recipe
from deltaweights.delta.rebuilt import RebuiltSource
from deltaweights.manifest import FileRecord, Tool
from deltaweights.storage import LocalSource
from deltaweights.torch import DeltaStorageReader, DeltaStorageWriter
from deltaweights.torch.boxes import Box
from deltaweights.torch.dcp import write as dcp_write
from deltaweights.torch.dcp.record import (
    DTYPES,
    MAX_VALUE_BYTES,
    RECORD_NAME,
    BaseIdentity,
    CheckpointRecord,
    DcpBaseTensor,
    StoredValue,
    parse_record,
    read_record,
    validate,
)
from deltaweights.torch.dcp.write import Item, Written, load_value, make_record

from ...checkpoints import contents
from ...hub_server import HubServer
from ...memory import MIB, peak_memory
from ..process_groups import torchrun
from .ranks import assert_equal, blank, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def nested(step: int) -> dict[str, Any]:
    """The state of tests/torch/dcp/ranks.py, as one process holds it."""
    return {"model": state(step), "run": {"step": step, "names": ["a", {"b": 0.5}], "none": None}}


def small(step: int) -> dict[str, Any]:
    """A state of some tensors and values, in one chunk each."""
    names = ("rows.uneven", "columns.uneven", "norm", "scalar")
    return {"model": {name: state(step)[name] for name in names}, "run": {"step": step}}


def write_base(folder: Path, step: int = 0, **changed: torch.Tensor) -> Path:
    folder.mkdir()
    tensors = {name.replace("_", "."): tensor for name, tensor in changed.items()}
    save_file({**state(step), **tensors}, folder / "model.safetensors")
    return folder


def load(path: Path, base: Any, like: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = blank(like)
    loader.load(found, storage_reader=DeltaStorageReader(path, base=base))
    return found


def save(saved: dict[str, Any], path: Path, base: Any = None, **options: Any) -> None:
    saver.save(saved, storage_writer=DeltaStorageWriter(path, base=base, **options))


def record_of(folder: Path) -> CheckpointRecord:
    return read_record(LocalSource(folder))


def failure(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    """Our own error inside of torch's."""
    ((error, _),) = raised.value.failures.values()
    return error


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``base``, and ``one``: :func:`small` of step 1 against it. Copy what you change."""
    folder = tmp_path_factory.mktemp("dcp")
    write_base(folder / "base")
    save(small(1), folder / "one", folder / "base")
    return folder


@pytest.mark.slow
def test_saved_on_two_ranks_loaded_on_four_and_one_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FSDP2 and tensors sharded by hand; with a base, and with an earlier checkpoint as the base; a save that
    is killed. What the ranks compare is in dcp_ranks.py."""
    base = write_base(tmp_path / "base")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 31), torch.nn.GELU(), torch.nn.Linear(31, 7))
    save_file(model.state_dict(), base / "fsdp.safetensors")

    code, output = torchrun(2, "tests.torch.dcp.ranks", "save", tmp_path)
    assert code == 0, output
    first = DeltaStorageReader(tmp_path / "two", base=base)
    assert_equal(load(tmp_path / "two", base, nested(1)), nested(1))
    shards = {name: tensor.shards for name, tensor in record_of(tmp_path / "two").tensors.items()}
    assert len(shards["model.rows.uneven"]) == len(shards["model.columns.uneven"]) == 2
    assert len(shards["model.norm"]) == len(shards["model.scalar"]) == 1  # replicated, saved once
    assert size(tmp_path / "two") < 0.25 * size(tmp_path / "plain")
    with capsys.disabled():
        print(
            f"\n  delta {size(tmp_path / 'two'):,} bytes, plain dcp.save {size(tmp_path / 'plain'):,} bytes"
        )

    code, output = torchrun(4, "tests.torch.dcp.ranks", "reshard", tmp_path)
    assert code == 0, output
    assert_equal(load(tmp_path / "four", first, nested(2)), nested(2))
    weights = {"model": torch.load(tmp_path / "fsdp.pt")}
    for name in ("fsdp", "fsdp-4"):  # on one rank, without a model
        assert_equal(load(tmp_path / name, base, weights), weights)
        counterparts = [tensor.base for tensor in record_of(tmp_path / name).tensors.values()]
        assert sum(base is not None for base in counterparts) == 4

    before = sorted((tmp_path / "four").iterdir())
    code, output = torchrun(2, "tests.torch.dcp.ranks", "kill", tmp_path)
    assert code != 0
    assert {path.name for path in tmp_path.glob("loaded-*")} == {"loaded-0", "loaded-1"}, output
    assert len(list((tmp_path / "four").iterdir())) > len(before)  # it was on its way
    assert_equal(load(tmp_path / "four", first, nested(2)), nested(2))
    save(nested(3), tmp_path / "four", base)
    assert {path.name for path in (tmp_path / "four").iterdir()} == {
        RECORD_NAME,
        *(file.path for file in record_of(tmp_path / "four").files),
    }
    assert_equal(load(tmp_path / "four", base, nested(3)), nested(3))


def every_dtype(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of random bits: whole, 0-d, empty, and not contiguous."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, (_, itemsize) in DTYPES.items():
        dtype = getattr(torch, name)
        data = torch.randint(0, 256, (40, 30 * itemsize), generator=generator, dtype=torch.uint8)
        tensors[name] = (data % 2 if name == "bool" else data).view(dtype)
        tensors[f"{name}.0d"] = tensors[name].view(-1)[seed].clone()
        tensors[f"{name}.empty"] = torch.empty((0, 3), dtype=dtype)
        tensors[f"{name}.turned"] = tensors[name].clone().T
    return tensors


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Against a base, against an earlier checkpoint, and alone."""
    tensors, later = every_dtype(0), every_dtype(1)
    in_base = {n: t.contiguous() for n, t in tensors.items() if not n.startswith(("complex128", "float4"))}
    (tmp_path / "base").mkdir()
    save_file(in_base, tmp_path / "base" / "model.safetensors")

    save(later, tmp_path / "one", tmp_path / "base")
    first = DeltaStorageReader(tmp_path / "one", base=tmp_path / "base")
    save(tensors, tmp_path / "two", first)
    save(tensors, tmp_path / "alone")
    for path, base, expected in (
        (tmp_path / "one", tmp_path / "base", later),
        (tmp_path / "two", first, tensors),
        (tmp_path / "alone", None, tensors),
    ):
        found = every_dtype(2)
        loader.load(found, storage_reader=DeltaStorageReader(path, base=base))
        for name, tensor in expected.items():
            assert raw(found[name]) == raw(tensor), name
    assert all(tensor.base for tensor in record_of(tmp_path / "two").tensors.values())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_base_of_another_dtype_or_name_serves(tmp_path: Path) -> None:
    """A model in float32 trained from a base in bfloat16, with other names."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((300, 200), generator=generator).bfloat16()
    (tmp_path / "base").mkdir()
    save_file({"old.weight": weight, "head": weight[:7].clone()}, tmp_path / "base" / "m.safetensors")
    tuned = {"net.weight": weight.float(), "model": {"head": weight[:7].float(), "new": torch.ones(3)}}
    save(tuned, tmp_path / "one", tmp_path / "base", rename=[(r"^net\.", "old.")])
    assert_equal(load(tmp_path / "one", tmp_path / "base", tuned), tuned)
    bases = {name: tensor.base for name, tensor in record_of(tmp_path / "one").tensors.items()}
    found = {name: base and (base.name, base.dtype) for name, base in bases.items()}
    assert found == {"net.weight": ("old.weight", "BF16"), "model.head": ("head", "BF16"), "model.new": None}
    assert size(tmp_path / "one") < 4000  # nothing changed: checksums only


@pytest.mark.parametrize("name", ["v1-low-rank", "v1-parts"])
def test_a_base_that_a_delta_rebuilds_serves(name: str, tmp_path: Path) -> None:
    """Parts of its tensors are read as they are asked for, predicted ones too."""
    fixture = Path(__file__).parents[2] / "fixtures" / name
    apply_delta(fixture / "delta", tmp_path / "whole", base=fixture / "base")
    tensors: dict[str, Any] = {}
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        tensors |= load_file(path)
    with open_recipe(fixture / "delta", fixture / "base") as recipe:
        save(tensors, tmp_path / "one", RebuiltSource(recipe))
    with open_recipe(fixture / "delta", fixture / "base") as recipe:
        assert_equal(load(tmp_path / "one", RebuiltSource(recipe), tensors), tensors)
    assert size(tmp_path / "one") < 20_000  # nothing changed: checksums only


def test_loads_into_another_dtype_as_torch_does(folder: Path) -> None:
    found = {"model": {"norm": torch.zeros(64, dtype=torch.float64)}}
    loader.load(found, storage_reader=DeltaStorageReader(folder / "one", base=folder / "base"))
    assert torch.equal(found["model"]["norm"], state(1)["norm"].double())


def test_async_save_and_a_writer_used_again(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    writer = DeltaStorageWriter(tmp_path / "one", base=base)
    pickle.loads(pickle.dumps(writer))  # noqa: S301  # as async_save does for a process of its own
    for step, name in enumerate(("one", "two", "one"), start=1):
        pending: Any = saver.async_save(small(step), storage_writer=writer, checkpoint_id=tmp_path / name)
        pending.result()
    writer.close()
    assert_equal(load(tmp_path / "one", base, small(3)), small(3))
    assert_equal(load(tmp_path / "two", base, small(2)), small(2))
    assert len(list((tmp_path / "one").iterdir())) == 2  # what the first save left is gone


def test_a_save_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    save(small(1), tmp_path / "one")
    save(small(2), tmp_path / "one")
    assert (tmp_path / "one" / "config.json").read_text() == "{}"


def test_base_by_hub_id(hub: HubServer, tmp_path: Path) -> None:
    """The checkpoint names it, so that a reader needs no base; a branch is pinned as its commit."""
    hub.add_repo("org/base", contents(write_base(tmp_path / "base")))
    save(nested(1), tmp_path / "one", "org/base")
    named = record_of(tmp_path / "one").base
    assert named is not None
    assert named.repo_id == "org/base"
    assert re.fullmatch("[0-9a-f]{40}", named.revision or "")
    assert_equal(load(tmp_path / "one", None, nested(1)), nested(1))
    save(nested(2), tmp_path / "two", tmp_path / "one")  # by its path: its own base is known
    assert_equal(load(tmp_path / "two", tmp_path / "one", nested(2)), nested(2))
    other = write_base(tmp_path / "other", step=1)
    with pytest.raises(CheckpointException) as raised:
        load(tmp_path / "one", other, nested(1))
    assert f"org/base@{named.revision}" in str(failure(raised))


WRONG_BASES: dict[str, tuple[Callable[[Path], Any], type[DeltaWeightsError], str]] = {
    "none": (lambda _: None, CheckpointError, "needs its base"),
    "values": (lambda at: write_base(at / "x", norm=state(1)["norm"]), BaseMismatchError, "'norm' differs"),
    "shape": (lambda at: write_base(at / "x", norm=torch.ones(65)), BaseMismatchError, "is F32 \\[65\\]"),
    "dtype": (lambda at: write_base(at / "x", scalar=torch.tensor(1)), BaseMismatchError, "is I64 \\[\\]"),
    "kind": (lambda at: saved(at / "x"), BaseMismatchError, "not an earlier distributed checkpoint"),
    "missing": (lambda at: without(at / "x", "norm"), BaseMismatchError, "has no tensor 'norm'"),
    "nothing there": (lambda at: at / "x", CheckpointError, "no file or folder"),
}


def saved(path: Path) -> Path:
    save(small(0), path)
    return path


def without(path: Path, name: str) -> Path:
    path.mkdir()
    save_file({n: tensor for n, tensor in state(0).items() if n != name}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("kind", WRONG_BASES)
def test_a_wrong_base_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path, kind: str) -> None:
    make, error, message = WRONG_BASES[kind]
    found = blank(small(1))
    with pytest.raises(CheckpointException) as raised:
        loader.load(found, storage_reader=DeltaStorageReader(folder / "one", base=make(tmp_path)))
    assert isinstance(failure(raised), error)
    assert re.search(message, str(failure(raised)))
    assert_equal(found, blank(small(1)))


def test_another_earlier_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    first = DeltaStorageReader(folder / "one", base=folder / "base")
    save(small(2), tmp_path / "two", first)
    save(small(1), tmp_path / "again", folder / "base")  # the same state, but another checkpoint
    for base in (DeltaStorageReader(tmp_path / "again", base=folder / "base"), folder / "base"):
        with pytest.raises(CheckpointException) as raised:
            load(tmp_path / "two", base, small(2))
        assert isinstance(failure(raised), BaseMismatchError)
    with pytest.raises(CheckpointException) as raised:
        save(small(3), folder / "one", DeltaStorageReader(tmp_path / "two", base=first))
    assert isinstance(failure(raised), OutputError)  # it would replace what it is made from
    assert_equal(load(tmp_path / "two", first, small(2)), small(2))


def damaged(folder: Path, name: str) -> Iterator[str]:
    """The file at ``name`` with one bit flipped: in its first bytes, in its last ones, here and there."""
    path = folder / name
    data = path.read_bytes()
    places = sorted({*range(16), *range(0, len(data), len(data) // 60), *range(len(data) - 4, len(data))})
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        yield f"{name}, byte {place}"
    path.write_bytes(data)


def test_flipped_bits_are_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    reader = DeltaStorageReader(tmp_path / "one", base=folder / "base")
    loaded = 0
    for name in sorted(path.name for path in (tmp_path / "one").iterdir()):
        for place in damaged(tmp_path / "one", name):
            with pytest.raises(DeltaError):
                reader.check_files()
            found = blank(small(1))
            try:
                loader.load(found, storage_reader=reader)
            except CheckpointException as raised:
                ((error, _),) = raised.failures.values()
                assert isinstance(error, DeltaError), place
            else:
                loaded += 1
                assert_equal(found, small(1))  # it was the header's white space
    assert loaded < 20
    reader.check_files()


def test_a_damaged_checksum_of_the_base_does_not_blame_the_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    (file,) = record_of(tmp_path / "one").files
    shard = read_shard(LocalSource(tmp_path / "one"), file.path)
    payload = next(info for info in shard.header.tensors if info.name == "model.norm@0")
    data = bytearray((tmp_path / "one" / file.path).read_bytes())
    record = np.frombuffer(data, RECORD, 1, shard.header.data_start + payload.start)
    record["base"] ^= np.uint64(1)
    (tmp_path / "one" / file.path).write_bytes(data)
    with pytest.raises(CheckpointException) as raised:
        load(tmp_path / "one", folder / "base", small(1))
    assert isinstance(failure(raised), DeltaError)


def test_a_missing_or_cut_file_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    (file,) = record_of(tmp_path / "one").files
    path = tmp_path / "one" / file.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DeltaError, match="not a whole checkpoint"):
        DeltaStorageReader(tmp_path / "one", base=folder / "base").check_files()
    path.unlink()
    with pytest.raises(DeltaError, match="not a whole checkpoint"):
        DeltaStorageReader(tmp_path / "one", base=folder / "base").check_files()
    (tmp_path / "one" / RECORD_NAME).unlink()
    with pytest.raises(ManifestError, match="an interrupted save"):
        DeltaStorageReader(tmp_path / "one", base=folder / "base").check_files()


Fields = dict[str, Any]


def _shard(fields: Fields) -> Fields:
    shard: Fields = fields["tensors"]["model.norm"]["shards"][0]
    return shard


CONTRADICTIONS: dict[str, tuple[Callable[[Fields], Any], str]] = {
    "outside": (lambda f: _shard(f).update(offsets=[1]), "do not hold each element exactly once"),
    "gap": (lambda f: _shard(f).update(sizes=[63]), "do not hold each element exactly once"),
    "twice": (lambda f: f["tensors"]["model.norm"]["shards"].append(_shard(f)), "begin at the same place"),
    "rank": (lambda f: _shard(f).update(offsets=[0, 0]), "do not hold each element exactly once"),
    "negative": (lambda f: _shard(f).update(offsets=[-1]), ">= 0"),
    "huge": (lambda f: f["tensors"]["model.norm"].update(shape=[2**40, 2**40]), "larger than any tensor"),
    "dtype": (lambda f: f["tensors"]["model.norm"].update(dtype="save"), "unknown dtype 'save'"),
    "file": (lambda f: _shard(f).update(file=1), "a number that no file has"),
    "path": (lambda f: f["files"][0].update(path="../x.safetensors"), "names a file"),
    "other file": (lambda f: f["files"][0].update(path="model.bin"), "names a file"),
    "files": (lambda f: f["files"].append(f["files"][0]), "names a file twice"),
    "no base": (lambda f: f.update(base=None), "but the checkpoint has none"),
    "base": (lambda f: f["base"].update(kind="delta"), "does not say which"),
    "both": (
        lambda f: f["values"].update({"model.norm": f["values"]["run.step"]}),
        "both a tensor and a value",
    ),
    "value": (lambda f: f["values"]["run.step"].update(nbytes=2**40), "<= 33554432"),
    "list": (lambda f: f["paths"].update({"run.step": ["run", 2**30]}), "<= 1048575"),
    "format": (lambda f: f.update(format="deltaweights"), "Its format is"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_record_that_contradicts_itself_is_refused(folder: Path, kind: str) -> None:
    change, message = CONTRADICTIONS[kind]
    fields = msgspec.json.decode((folder / "one" / RECORD_NAME).read_bytes())
    change(fields)
    data = msgspec.json.encode(fields)
    with suppress(msgspec.ValidationError):
        data = msgspec.json.decode(data, type=CheckpointRecord).to_json()  # sealed anew
    with pytest.raises(ManifestError, match=re.escape(message)):
        parse_record(data)


def test_a_later_format_version_is_named(folder: Path) -> None:
    record = replace(record_of(folder / "one"), format_version=2)
    with pytest.raises(FormatVersionError, match="format version 2"):
        parse_record(record.to_json())


def test_a_record_that_promises_more_than_its_files_is_refused(folder: Path, tmp_path: Path) -> None:
    """A payload that is too short for its tensor, and one that is not there."""
    shutil.copytree(folder / "one", tmp_path / "one")
    record = record_of(tmp_path / "one")
    norm = record.tensors["model.norm"]
    shape = (1 << 30,)
    longer = replace(norm, base=None, shape=shape, shards=(replace(norm.shards[0], sizes=shape),))
    for name, message in (("model.norm", "is too short"), ("model.other", "has no payload 'model.other@0'")):
        hostile = replace(record, tensors={**record.tensors, name: longer}, paths=None)
        (tmp_path / "one" / RECORD_NAME).write_bytes(hostile.to_json())
        found = {name: torch.empty(shape, dtype=torch.bfloat16)}  # takes no memory until it is filled
        with pytest.raises(CheckpointException) as raised:
            loader.load(found, storage_reader=DeltaStorageReader(tmp_path / "one", base=folder / "base"))
        assert isinstance(failure(raised), DeltaError)
        assert message in str(failure(raised))


class Harmful:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_value_that_runs_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmful = {"value": Harmful(tmp_path / "harmed")}
    with pytest.raises(CheckpointException) as raised:
        save(harmful, tmp_path / "one")
    assert isinstance(failure(raised), OutputError)
    assert "weights_only" in str(failure(raised))
    with monkeypatch.context() as patch:  # as somebody else's writer might
        patch.setattr(dcp_write, "load_value", lambda data: None)
        save(harmful, tmp_path / "one")
    with pytest.raises(CheckpointException) as raised:
        loader.load({"value": None}, storage_reader=DeltaStorageReader(tmp_path / "one"))
    assert isinstance(failure(raised), DeltaError)
    assert "weights_only" in str(failure(raised))
    assert not (tmp_path / "harmed").exists()


def _with_pickle(pickled: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save would write of it."""
    usual, made = io.BytesIO(), io.BytesIO()
    torch.save(1, usual)
    with zipfile.ZipFile(usual) as old, zipfile.ZipFile(made, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def test_a_value_of_many_parts_takes_little_memory(tmp_path: Path) -> None:
    values = [(b"]", 4_000_000), (b"}", 2_000_000), (b"]\x85", 1_000_000), (b"K\x01", 12_000_000)]
    for number, (unit, count) in enumerate(values):
        (tmp_path / str(number)).write_bytes(_with_pickle(b"\x80\x02(" + unit * count + b"l."))
    code = """
import sys
from pathlib import Path
from deltaweights.torch.dcp.write import load_value
for path in Path(sys.argv[1]).iterdir():
    try: load_value(path.read_bytes())
    except Exception: pass
"""
    (tmp_path / "none").mkdir()
    usual = peak_memory(code, tmp_path / "none", timeout=60)
    (tmp_path / "none").rmdir()
    assert peak_memory(code, tmp_path, timeout=60) < usual + 200 * MIB


@pytest.mark.parametrize("why", ["too many parts", "compressed", "two ways"])
def test_why_a_value_is_refused(why: str) -> None:
    pickled = b"\x80\x02(" + b"]" * (600_000 if why == "too many parts" else 100) + b"l."
    method = zipfile.ZIP_DEFLATED if why == "compressed" else zipfile.ZIP_STORED
    data = _with_pickle(pickled, method)
    with pytest.raises(ValueError, match=why):
        load_value(data + data if why == "two ways" else data)


def test_a_value_may_be_a_long_list_of_numbers() -> None:
    """The order of a data set's samples, as a loader keeps it."""
    order = [n * 7919 % 1_000_003 for n in range(1_000_000)]
    saved = io.BytesIO()
    torch.save({"order": order}, saved)
    assert load_value(saved.getvalue()) == {"order": order}


def test_values_are_bounded_together() -> None:
    values = {str(k): StoredValue(MAX_VALUE_BYTES, 0) for k in range(5)}
    record = CheckpointRecord(
        None, {}, values, None, (FileRecord("a.safetensors", 0, "0" * 64),), Tool("deltaweights", "0")
    )
    with pytest.raises(ManifestError, match="bytes together"):
        validate(record)


def test_a_value_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_write, "MAX_VALUE_BYTES", 10_000)
    save({"value": (torch.ones(1000),)}, tmp_path / "one")
    with pytest.raises(CheckpointException) as raised:
        save({"value": (torch.ones(10_000),)}, tmp_path / "one")
    assert "not in tuples" in str(failure(raised))


def _written(offset: int, length: int, **changed: Any) -> WriteResult:
    """What a rank says of the elements of ``w`` from ``offset`` on."""
    file = FileRecord(f"delta-{offset:05d}-{0:016x}.safetensors", 1, "0" * 64)
    base = changed.pop("base", None)
    item = replace(Item(4 * length, Box((offset,), (length,)), "float32", None), **changed)
    return WriteResult(MetadataIndex("w", [offset]), 1, Written(item, file, base))


def in_hub_cache(root: Path, folder: Path) -> Path:
    """A snapshot of the folder as the Hub cache has it: links to files called by their SHA-256."""
    repository = root / "models--acme--base"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def test_a_base_that_is_damaged_in_the_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    """A checkpoint against it could be read by nobody who has the right base. An earlier good look at the
    file does not count once it has changed."""
    base = in_hub_cache(tmp_path, folder / "base")
    save(small(1), tmp_path / "one", base)
    blob = (base / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-3] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointException) as raised:
        save(small(2), tmp_path / "two", base)
    assert isinstance(failure(raised), CheckpointError)
    assert "Hub cache is damaged" in str(failure(raised))
    assert not (tmp_path / "two" / RECORD_NAME).exists()
    data[-3] ^= 1
    blob.write_bytes(data)
    save(small(2), tmp_path / "two", base)
    assert_equal(load(tmp_path / "two", folder / "base", small(2)), small(2))


@pytest.mark.parametrize("local_rank", [0, 1])
def test_processes_of_a_machine_share_the_look_at_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    (tmp_path / "base").mkdir()
    for number, name in enumerate(("norm", "rows.uneven")):
        save_file({name: state(0)[name]}, tmp_path / "base" / f"model-{number}.safetensors")
    base = in_hub_cache(tmp_path, tmp_path / "base")
    blob = (base / "model-1.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-2] + b"xy")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if local_rank:
        with pytest.raises(CheckpointException):
            save(small(1), tmp_path / "one", base)
    else:
        save(small(1), tmp_path / "one", base)


def test_rename_rules_are_those_of_diff(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A layer was left out: each of those after it moves once, though the next rule fits its new name. A rule
    without effect is told."""
    weights = {f"layers.{k}.weight": torch.randn(40, 30) for k in range(4)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    pruned = {f"layers.{k}.weight": weights[f"layers.{k + (k > 0)}.weight"] + 0.1 for k in range(3)}
    rules = [(r"layers\.1\.", "layers.2."), (r"layers\.2\.", "layers.3."), ("layrs", "layers")]
    save({"model": pruned}, tmp_path / "one", tmp_path / "base", rename=rules)
    record = record_of(tmp_path / "one")
    assert {name: tensor.base.name for name, tensor in record.tensors.items() if tensor.base} == {
        "model.layers.0.weight": "layers.0.weight",
        "model.layers.1.weight": "layers.2.weight",
        "model.layers.2.weight": "layers.3.weight",
    }
    told = [entry.message for entry in caplog.records if entry.name.startswith("deltaweights")]
    assert told == ["The rename rule 'layrs=layers' changed no name."]


def test_what_ranks_say_has_to_fit_together() -> None:
    """Ranks that had different bases, or only a part of the state, as with no_dist=True."""
    chunks = [ChunkStorageMetadata(torch.Size([n]), torch.Size([5])) for n in (0, 5)]
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size([10]), chunks)
    metadata = Metadata({"w": tensor})
    assert make_record(metadata, [_written(5, 5), _written(0, 5)]).tensors["w"].shape == (10,)
    for results, message in (
        ([_written(0, 5)], "is incomplete"),
        ([_written(0, 10), _written(5, 5)], "is incomplete"),
        ([_written(0, 5), _written(5, 5, dtype="float64")], "alike"),
        ([_written(0, 5), _written(5, 5, counterpart=DcpBaseTensor("w", "F32"))], "alike"),
        ([_written(0, 5), _written(5, 5, base=BaseIdentity("safetensors"))], "against the same base"),
    ):
        with pytest.raises(OutputError, match=message):
            make_record(metadata, results)
    with pytest.raises(OutputError, match="The planner's data"):
        make_record(replace(metadata, planner_data=[1]), [_written(5, 5), _written(0, 5)])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(3, dtype=torch.uint8).view(torch.bits8),
    ],
    ids=["sparse", "dtype"],
)
def test_a_tensor_without_plain_bytes_is_refused_at_once(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointException) as raised:
        save({"a": torch.ones(3), "b": tensor}, tmp_path / "one")
    assert isinstance(failure(raised), OutputError)
    assert not (tmp_path / "one").exists()


def test_what_a_save_cannot_be_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointException) as raised:
        save(small(1), tmp_path / "file" / "one")
    assert isinstance(failure(raised), OutputError)
    with pytest.raises(OutputError, match="use_collectives"):
        saver.save(small(1), storage_writer=DeltaStorageWriter(tmp_path / "one"), use_collectives=False)
    with pytest.raises(DeltaWeightsError, match="rename rule"):
        DeltaStorageWriter(tmp_path / "one", rename=[("(", "")])
    assert DeltaStorageReader.validate_checkpoint_id("s3://bucket/one")
    assert not DeltaStorageReader.validate_checkpoint_id("file://one")
    assert DeltaStorageWriter.validate_checkpoint_id(tmp_path)
