"""Distributed checkpoints with base and checkpoint in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException

from deltaweights import OutputError
from deltaweights.errors import HubWriteError
from deltaweights.torch import DeltaStorageReader, DeltaStorageWriter
from deltaweights.torch.dcp.record import RECORD_NAME, parse_record

from ...s3_server import S3Server
from ..process_groups import torchrun
from .ranks import assert_equal, blank
from .test_dcp import failure, nested, save, small, write_base

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_base_and_checkpoint_may_lie_there(s3: S3Server, tmp_path: Path) -> None:
    base, place = write_base(tmp_path / "base"), "s3://bucket"
    s3.system.put(str(base), "bucket/base", recursive=True)
    save(small(1), tmp_path / "one", f"{place}/base")
    s3.system.put(str(tmp_path / "one"), "bucket/one", recursive=True)
    save(small(2), tmp_path / "two", DeltaStorageReader(f"{place}/one", f"{place}/base"))
    s3.system.put(str(tmp_path / "two"), "bucket/two", recursive=True)
    found: dict[str, Any] = blank(small(2))
    reader = DeltaStorageReader(f"{place}/two", DeltaStorageReader(f"{place}/one", f"{place}/base"))
    loader.load(found, storage_reader=reader)
    assert_equal(found, small(2))
    reader.check_files()


def there(s3: S3Server) -> set[str]:
    return {path.removeprefix("bucket/one/") for path in s3.system.find("bucket/one")}


def files_of(s3: S3Server) -> set[str]:
    """Record and files of the checkpoint."""
    record = parse_record(s3.system.cat_file(f"bucket/one/{RECORD_NAME}"))
    return {RECORD_NAME, *(file.path for file in record.files)}


def test_a_checkpoint_is_written_there_and_replaced(s3: S3Server, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for step in (1, 2):
        s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=f"one/{_LEFT_OVER}")
        s3.system.pipe_file(f"bucket/one/{_LEFT_OVER}", b"of a killed save")
        saver.save(small(step), storage_writer=DeltaStorageWriter("s3://bucket/one", base))
        found: dict[str, Any] = blank(small(step))
        loader.load(found, storage_reader=DeltaStorageReader("s3://bucket/one", base))
        assert_equal(found, small(step))
        assert there(s3) == files_of(s3)
        assert not s3.system.list_multipart_uploads("bucket")
    puts = [request.path for request in s3.log if request.method == "PUT"]
    assert puts[-1] == f"/bucket/one/{RECORD_NAME}"


_LEFT_OVER = "delta-00007-0123456789abcdef.safetensors"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("path", [".safetensors", RECORD_NAME])
def test_a_save_that_fails_leaves_what_was_there(s3: S3Server, path: str) -> None:
    saver.save(small(1), storage_writer=DeltaStorageWriter("s3://bucket/one"))
    s3.fail(path, method="PUT", status=503, times=None)
    with pytest.raises(CheckpointException) as caught:
        saver.save(small(2), storage_writer=DeltaStorageWriter("s3://bucket/one"))
    assert isinstance(failure(caught), HubWriteError)
    s3.heal()
    found: dict[str, Any] = blank(small(1))
    loader.load(found, storage_reader=DeltaStorageReader("s3://bucket/one"))
    assert_equal(found, small(1))
    assert not s3.system.list_multipart_uploads("bucket")
    saver.save(small(3), storage_writer=DeltaStorageWriter("s3://bucket/one"))
    assert there(s3) == files_of(s3)


@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_saves_to_one_place_the_second_is_refused(s3: S3Server, is_first: bool) -> None:
    """Whether a checkpoint was there before, or none."""
    if not is_first:
        saver.save(small(1), storage_writer=DeltaStorageWriter("s3://bucket/one"))

    class Late(DeltaStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            saver.save(small(2), storage_writer=DeltaStorageWriter("s3://bucket/one"))
            return super().write_data(plan, planner)

    with pytest.raises(CheckpointException) as caught:
        saver.save(small(3), storage_writer=Late("s3://bucket/one"))
    assert "is being written to by another run" in str(failure(caught))
    found: dict[str, Any] = blank(small(2))
    loader.load(found, storage_reader=DeltaStorageReader("s3://bucket/one"))
    assert_equal(found, small(2))


@pytest.mark.slow
def test_ranks_write_their_own_files_there(s3: S3Server, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    code, output = torchrun(2, "tests.torch.dcp.ranks", "store", tmp_path)
    assert code == 0, output
    found: dict[str, Any] = blank(nested(1))
    loader.load(found, storage_reader=DeltaStorageReader("s3://bucket/one", base))
    assert_equal(found, nested(1))
    assert sum(path.startswith("delta-00001-") for path in there(s3)) == 1
    assert there(s3) == files_of(s3)


def test_in_memory_too(memory: Any) -> None:
    saver.save(small(1), storage_writer=DeltaStorageWriter("memory://one"))
    found: dict[str, Any] = blank(small(1))
    loader.load(found, storage_reader=DeltaStorageReader("memory://one"))
    assert_equal(found, small(1))


@pytest.mark.parametrize("place", ["https://host/one", "hf://org/name"])
def test_what_is_only_read_is_refused(place: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(CheckpointException) as caught:
        saver.save(small(1), storage_writer=DeltaStorageWriter(place))
    assert isinstance(failure(caught), OutputError)


def test_a_checkpoint_is_not_written_over_its_base(s3: S3Server) -> None:
    saver.save(small(1), storage_writer=DeltaStorageWriter("s3://bucket/one"))
    with pytest.raises(CheckpointException) as caught:
        saver.save(small(2), storage_writer=DeltaStorageWriter("s3://bucket/one/", "s3a://bucket/one"))
    assert "It holds the base of the new checkpoint" in str(failure(caught))
