"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from deltaweights import make_delta

from .checkpoints import write_pair

settings.register_profile(
    "deltaweights",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deltaweights")

#: Small, so that small tensors have several chunks.
CHUNK_BYTES = 1 << 16


class Trio(NamedTuple):
    """A base, a target and the delta between them, as folders."""

    base: Path
    target: Path
    delta: Path


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A pair with every status, and its delta. Shared: copy what you change."""
    folder = tmp_path_factory.mktemp("trio")
    base, target = write_pair(folder)
    make_delta(base, target, folder / "delta", chunk_bytes=CHUNK_BYTES)
    return Trio(base, target, folder / "delta")
