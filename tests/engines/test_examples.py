"""The examples that need an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .vllm_server import ROOT, environment


@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: make engines")
def test_a_training_by_samples_of_vllm_learns_and_its_weights_arrive(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "rl_with_vllm.py"), "16"],
        env=environment(tmp_path / "plugins"), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = map(float, re.findall(r" (0\.\d+)", done.stdout.splitlines()[-1]))
    assert last > first + 0.05
