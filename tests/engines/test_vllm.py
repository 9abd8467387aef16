"""vLLM itself, on the CPU: started from base and delta, and following a weight stream over HTTP.

`make engines` runs these in an environment of their own, which has vLLM.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaweights import make_delta
from deltaweights.engines import serve_folder
from deltaweights.torch import DeltaPublisher

from .vllm_server import RefusedError, VllmServer, environment, free_port

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: make engines")

_LOADED = Path(__file__).with_name("load_in_vllm.py")
_BACKEND = ("--weight-transfer-config", '{"backend": "deltaweights"}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, ``base``, its fine-tune in several shards, ``tuned``, their delta, and ``pointer``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.model.layers[1].mlp.up_proj.weight[3, 3:5] = torch.tensor([float("nan"), -0.0])
    model.save_pretrained(folder / "tuned", max_shard_size="500KB")
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    serve_folder(folder / "delta", folder / "pointer", base=folder / "base")
    return folder


# Cold starts ------------------------------------------------------------------------------------------------


def _load(folder: Path, model: Path, load_format: str, **extra: object) -> dict[str, str] | str:
    """What vLLM's loader makes of a folder: the checksums of the parameters, or its error."""
    command = [sys.executable, str(_LOADED), str(model), load_format, str(free_port()), json.dumps(extra)]
    done = subprocess.run(
        command, env=environment(folder / "plugins"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr
    sums: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return sums


def test_a_cold_start_has_the_weights_of_the_fine_tune(folder: Path) -> None:
    ours = _load(folder, folder / "pointer", "deltaweights", threads=2)
    assert isinstance(ours, dict), ours[-3000:]
    assert len(ours) == 15
    assert ours == _load(folder, folder / "tuned", "auto")


def test_a_wrong_base_and_a_flipped_byte_stop_the_start(folder: Path, tmp_path: Path) -> None:
    why = _load(folder, folder / "pointer", "deltaweights", base=str(folder / "tuned"))
    assert "BaseMismatchError" in why
    assert "tensors sampled, 21 differ, such as" in why
    shutil.copytree(folder / "delta", tmp_path / "delta")
    serve_folder(tmp_path / "delta", tmp_path / "pointer", base=folder / "base")
    path = max((tmp_path / "delta").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    why = _load(folder, tmp_path / "pointer", "deltaweights")
    assert "DeltaError" in why or "PayloadError" in why
    assert "Get the delta again." in why


# A stream ---------------------------------------------------------------------------------------------------


class Trainer:
    """Publishes states of the base, and writes each as a folder that vLLM's own loader can read."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.stream = place / "stream"
        self._base, self._place = folder / "base", place
        self.state: dict[str, Tensor] = load_file(self._base / "model.safetensors")
        self.publisher = DeltaPublisher(str(self.stream), self.state, threads=1)

    def publish(self, step: int) -> None:
        """A state that differs in a tenth of the weights, with a NaN and a negative zero."""
        random = torch.Generator().manual_seed(step)
        for tensor in self.state.values():
            chosen = torch.rand(tensor.shape, generator=random) < 0.1
            tensor.add_(torch.randn(tensor.shape, generator=random) * 1e-3 * chosen)
        for name in ("q_proj", "o_proj"):  # fused rows, and split columns
            attention = self.state[f"model.layers.1.self_attn.{name}.weight"]
            attention[step, step], attention[-1, step] = float("nan"), -0.0
        self.publisher.publish(step, self.state)
        shutil.copytree(self._base, self.folder_of(step), dirs_exist_ok=True)
        save_file(self.state, self.folder_of(step) / "model.safetensors", metadata={"format": "pt"})

    def folder_of(self, step: int) -> Path:
        return self._place / f"step-{step}"


class Client:
    """What drives an engine over HTTP."""

    def __init__(self, server: VllmServer, trainer: Trainer, base: Path) -> None:
        self.server = server
        server.post(
            "init_weight_transfer_engine", init_info={"location": str(trainer.stream), "base": str(base)}
        )

    def begin(self, step: int) -> None:
        """Let all ranks prepare a step, and return at once."""
        self.server.post("start_weight_update")
        self.server.post("update_weights", update_info={"step": step, "prepare": True})

    def write(self, step: int) -> None:
        """Write the step between two of the engine's."""
        self.server.post("pause?mode=keep")
        try:
            self.server.post("update_weights", update_info={"step": step})
            self.server.post("finish_weight_update", weight_version=str(step))
        finally:
            self.server.post("resume")

    def fresh(self, folder: Path) -> dict[str, str]:
        """The checksums after vLLM's own loader read a folder in place."""
        self.server.post("collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
        return self.server.checksums()


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(folder, tmp_path)
    with trainer.publisher:
        yield trainer


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def engine(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[VllmServer]:
    """An engine that has loaded the base, with one or two tensor-parallel ranks."""
    with VllmServer(folder / "base", tmp_path / "engine", *_BACKEND, ranks=request.param) as server:
        yield server


def test_steps_over_http(engine: VllmServer, trainer: Trainer, folder: Path) -> None:
    """All in one, since a server takes a while to start: ten steps, one published between two ranks'
    prepares, a flipped byte."""
    client = Client(engine, trainer, folder / "base")
    sums = {0: engine.checksums()}
    for step in range(1, 11):
        trainer.publish(step)
        client.begin(step)
        if step % 2:
            trainer.publisher.publish(100 + step, trainer.state)  # newer than what was asked for
        assert len(engine.generate()) == 4, "requests are answered while the step is prepared"
        assert engine.checksums() == sums[step - 1]
        if step == 5:
            _with_a_flipped_byte(client, trainer, step)
            assert engine.checksums() == sums[step - 1]
            assert len(engine.generate()) == 4
            client.begin(step)
        client.write(step)
        sums[step] = engine.checksums()
        assert sums[step] != sums[step - 1]
    assert engine.get("weight_info") == {"weight_version": "10"}
    log = engine.log.read_text()
    assert "loaded whole" not in log
    assert not list(Path("/dev/shm").glob("deltaweights-mirror-*"))  # noqa: S108
    for step in range(1, 11):
        assert client.fresh(trainer.folder_of(step)) == sums[step]


def _with_a_flipped_byte(client: Client, trainer: Trainer, step: int) -> None:
    """The step was prepared, but another one is asked for, whose update is damaged."""
    trainer.publisher.publish(50, {name: tensor * 2 for name, tensor in trainer.state.items()}, anchor=False)
    update = max(trainer.stream.glob("*.update.safetensors"))
    whole = update.read_bytes()
    update.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(RefusedError):
        client.write(50)
    assert " is damaged" in client.server.log.read_text()
    trainer.publisher.publish(step, trainer.state)
    update.write_bytes(whole)


def test_killed_in_mid_step_it_recovers(trainer: Trainer, folder: Path, tmp_path: Path) -> None:
    """From base and delta, as it starts: the stream goes on where the fine-tune is."""
    options = ("--load-format", "deltaweights", *_BACKEND)
    back = tmp_path / "back"  # a delta whose target is the base of the stream
    make_delta(folder / "tuned", folder / "base", back)
    serve_folder(back, tmp_path / "pointer", base=folder / "tuned")
    pointer = tmp_path / "pointer"
    with VllmServer(pointer, tmp_path / "engine", *options) as server:
        client = Client(server, trainer, pointer)
        first = server.checksums()
        trainer.publish(1)
        client.begin(1)
        server.kill()
    trainer.publish(2)
    with VllmServer(pointer, tmp_path / "engine", *options) as server:
        assert server.checksums() == first
        client = Client(server, trainer, pointer)
        client.begin(2)
        client.write(2)
        sums = server.checksums()
    expected: Any = _load(folder, trainer.folder_of(2), "auto")
    assert {name.rpartition(":")[2]: digest for name, digest in sums.items()} == expected
    assert "loaded whole" not in server.log.read_text()
