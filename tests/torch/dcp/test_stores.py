"""Distributed checkpoints with base and checkpoint in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException

from deltaweights import OutputError
from deltaweights.torch import DeltaStorageReader, DeltaStorageWriter

from ...s3_server import S3Server
from .ranks import assert_equal, blank
from .test_dcp import failure, save, small, write_base

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


def test_a_checkpoint_is_written_to_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        saver.save(small(1), storage_writer=DeltaStorageWriter("s3://bucket/one"))
    error = failure(caught)
    assert isinstance(error, OutputError)
    assert "folder" in error.fix
