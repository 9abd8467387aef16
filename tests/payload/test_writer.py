"""Files of payloads, as streams and distributed checkpoints have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltaweights.checkpoint import read_shard
from deltaweights.payload import ChunkPlan, PayloadFile, encode_row
from deltaweights.storage import LocalSource, PartialFile


@pytest.mark.parametrize("nbytes", [200, (1 << 20) - 25, 2 << 20])
@pytest.mark.parametrize("order", [("moved", "same"), ("same", "moved"), ("same", "same")])
def test_what_is_the_same_leaves_no_bytes(tmp_path: Path, order: tuple[str, str], nbytes: int) -> None:
    """Also as the last payload, and behind one with which it would be as much as is written at once."""
    base = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    plan = ChunkPlan(base.size, base.size, 1 << 21)
    with PartialFile("f.safetensors", tmp_path / "f.partial", tmp_path / "f.safetensors") as file:
        payloads = PayloadFile(file, dict.fromkeys(("a", "b"), base.size), {})
        for name, kind in zip(("a", "b"), order, strict=True):
            target = base if kind == "same" else base[::-1].copy()
            payloads.write(name, plan, encode_row(target, base, "U8", 1 << 21), skip_same=True)
        names = [info.name for info in payloads.finish()]
        file.commit()
    assert names == [name for name, kind in zip(("a", "b"), order, strict=True) if kind == "moved"]
    with LocalSource(tmp_path) as source:  # a file that is longer than its header says is refused
        assert [info.name for info in read_shard(source, "f.safetensors").header.tensors] == names
