"""Fixtures of the tests of deltaweights.torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from deltaweights import make_delta

from ..conftest import Trio
from .tiny_models import nudge, tiny_qwen2

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small, and tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A tiny Qwen2, its fine-tune in two shards, and the delta. Shared: copy what you change."""
    folder = tmp_path_factory.mktemp("qwen2")
    model = tiny_qwen2()
    model.save_pretrained(folder / "base")
    nudge(model)
    model.save_pretrained(folder / "target", max_shard_size="100KB")
    make_delta(folder / "base", folder / "target", folder / "delta", chunk_bytes=4096)
    return Trio(folder / "base", folder / "target", folder / "delta")
