"""SGLang, its own loader and updater, with one rank and with two: each in a process as SGLang makes it.

The environment's SGLANG is a folder that has it, and what it needs besides the packages here: `make engines`
makes one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaweights import make_delta
from deltaweights.engines import serve_folder, sglang
from deltaweights.errors import CheckpointError
from deltaweights.torch import DeltaPublisher

from ..torch.tiny_models import nudge

ROOT = Path(__file__).parents[2]
SGLANG = os.path.abspath(os.environ["SGLANG"]) if "SGLANG" in os.environ else None

STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with base, fine-tune and each step of a stream; and the stream, a pointer folder, and one whose
    delta has changed."""
    folder = tmp_path_factory.mktemp("sglang")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    for side in ("base", "tuned"):
        model.save_pretrained(folder / side)
        (folder / side / "README.md").write_text("---\nlicense: mit\n---\n")
        nudge(model, std=1e-2)
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    serve_folder(folder / "delta", folder / "served", base=folder / "base")
    make_delta(folder / "base", folder / "tuned", folder / "other")
    serve_folder(folder / "other", folder / "moved", base=folder / "base")
    make_delta(folder / "tuned", folder / "base", folder / "other", force=True)

    publisher: DeltaPublisher | None = None
    for step in range(STEPS):
        _disturb(model, step)
        model.save_pretrained(folder / f"step-{step}")
        state = dict(model.state_dict())
        if publisher is None:
            publisher = DeltaPublisher(folder / "stream", state, anchor_every=None)
        else:
            publisher.publish(step, state)
    assert publisher
    publisher.close()
    return folder


def _disturb(model: LlamaForCausalLM, step: int) -> None:
    """Change one weight in fifty, and put a NaN with a payload and a -0.0 among them."""
    random = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1).view(torch.int16)
            chosen = torch.randperm(flat.numel(), generator=random)[: 1 + flat.numel() // 50]
            flat[chosen] ^= 3
            flat[chosen[0]] = (0x7FC1 + step, -(2**15))[step % 2]


@pytest.mark.skipif(not SGLANG and not find_spec("sglang"), reason="needs SGLang")
@pytest.mark.parametrize("world", [1, 2])
def test_sglang_serves_the_folder_and_follows_the_stream(work: Path, world: int) -> None:
    if not entry_points(group="sglang.srt.plugins"):
        _install_plugin(work / "site")
    if (work / "gone").exists():
        (work / "gone").rename(work / "stream")
    path = os.pathsep.join([str(work / "site"), str(ROOT), *filter(None, [SGLANG])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.engines.sglang_rank", str(work)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-4000:]


def as_tensor(text: str | bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([], "expected 1"),
        ([("", as_tensor("{}")), ("", as_tensor("{}"))], "expected 1"),
        ([("", torch.zeros(4))], "float32"),
        ([("", as_tensor("{}").view(1, 2))], r"shape \(1, 2\)"),
        ([("", torch.zeros(1 << 17, dtype=torch.uint8))], r"shape \(131072,\)"),
        ([("", as_tensor("[" * 60_000))], ""),
        ([("", as_tensor(b"\xff{}"))], ""),
        ([("", as_tensor("[]"))], "object"),
        ([("", as_tensor('{"step": 1}'))], "location"),
        ([("", as_tensor('{"location": "a"}'))], "step"),
        ([("", as_tensor('{"location": "", "step": 1}'))], "location"),
        ([("", as_tensor('{"location": "a\\u0000", "step": 1}'))], "location"),
        ([("", as_tensor('{"location": "a", "step": 1.5}'))], "step"),
        ([("", as_tensor('{"location": "a", "step": true}'))], "step"),
        ([("", as_tensor(f'{{"location": "a", "step": {1 << 63}}}'))], "step"),
        ([("", as_tensor('{"location": "a", "step": 1, "threads": 0}'))], "threads"),
        ([("", as_tensor('{"location": "a", "step": 1, "base": []}'))], "base"),
        ([("", as_tensor('{"location": "a", "step": 1, "code": "import os"}'))], "code"),
    ],
)
def test_a_hostile_request_is_refused(tensors: list[tuple[str, torch.Tensor]], why: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)request for an update is none.*{why}"):
        sglang._request(tensors)


def test_a_request_is_what_it_says() -> None:
    tensor = as_tensor('{"location": "s3://bucket/run", "step": 7, "base": "org/name", "threads": 2}')
    request = sglang._request([("any", tensor)])
    assert (request.location, request.step, request.base, request.threads) == (
        "s3://bucket/run",
        7,
        "org/name",
        2,
    )
    assert not request.prepare


def _install_plugin(site: Path) -> None:
    """The metadata by which SGLang finds the plug-in, where the package is not installed."""
    lines = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."sglang.srt.plugins"]\n')
    place = site / "deltaweights_entry_points-0.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    entry = lines[2].partition("\n")[0].replace('"', "")
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: deltaweights-entry-points\nVersion: 0\n")
    (place / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entry}\n")
