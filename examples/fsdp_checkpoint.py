"""Fine-tune a sharded model, save its checkpoints as deltas against the base, and go on with more processes.

Run it: python examples/fsdp_checkpoint.py
It starts two processes and then three, as torchrun would; works in a temporary folder; needs no network.
With a GPU for each process it runs on GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deltaweights.torch import DeltaStorageReader, DeltaStorageWriter

WIDTH = int(os.environ.get("WIDTH", "256"))


def make_model() -> nn.Sequential:
    """Something to fine-tune. Yours comes from transformers or torchtitan."""
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


def make_base(path: Path) -> None:
    """What was published: safetensors."""
    torch.manual_seed(0)
    path.mkdir()
    save_file(make_model().state_dict(), path / "model.safetensors")


def make_training(base: Path, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The base's weights, sharded over all processes, and an optimizer for them."""
    model = make_model()
    model.load_state_dict(load_file(base / "model.safetensors"))
    model.to(device)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, device: str) -> None:
    for _ in range(steps):
        inputs = torch.randn(16, WIDTH, device=device)
        loss = nn.functional.mse_loss(model(inputs), inputs[:, :8])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """What is saved and loaded: shards of weights and moments, and whatever else you need to go on."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": step}


def fingerprint(model: nn.Module) -> int:
    """A number that any other bit in the weights would make another one."""
    total = 0
    for parameter in model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        total += int(whole.detach().view(torch.int32).sum(dtype=torch.int64))
    return total


def show(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def fine_tune(folder: Path, device: str) -> None:
    """Two checkpoints: the second one against the first, in the background."""
    base = folder / "base"
    model, optimizer = make_training(base, device)
    torch.manual_seed(1)
    train(model, optimizer, 5, device)
    save(state_of(model, optimizer, 5), storage_writer=DeltaStorageWriter(folder / "step-5", base=base))

    train(model, optimizer, 5, device)
    earlier = DeltaStorageReader(folder / "step-5", base=base)
    writer = DeltaStorageWriter(folder / "step-10", base=earlier)
    aside = dist.new_group(backend="gloo")  # what saves must not meet what trains
    pending: Any = async_save(state_of(model, optimizer, 10), storage_writer=writer, process_group=aside)
    show(f"trained to step 10, weights {fingerprint(model):x}")
    train(model, optimizer, 1, device)  # the step waits for a copy of the state only
    pending.result()

    weights = {"model": state_of(model, optimizer, 10)["model"]}
    save(weights, checkpoint_id=folder / "plain")
    save(weights, storage_writer=DeltaStorageWriter(folder / "weights", base=base))
    dist.barrier()
    show(f"the weights alone: {size(folder / 'weights'):,} bytes; plain: {size(folder / 'plain'):,} bytes")
    show(f"with the optimizer's moments, which no base has: {size(folder / 'step-5'):,} bytes")


def go_on(folder: Path, device: str) -> None:
    """Another number of processes, and so other shards."""
    model, optimizer = make_training(folder / "base", device)
    state = state_of(model, optimizer, 0)
    earlier = DeltaStorageReader(folder / "step-5", base=folder / "base")
    load(state, storage_reader=DeltaStorageReader(folder / "step-10", base=earlier))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    show(
        f"loaded at step {state['step']} by {dist.get_world_size()} processes, weights {fingerprint(model):x}"
    )
    train(model, optimizer, 1, device)


def main() -> None:
    if "RANK" in os.environ:  # started by torchrun
        device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo beside nccl: checkpoints are coordinated, and saved in the background, on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        {"fine-tune": fine_tune, "go-on": go_on}[sys.argv[1]](Path(sys.argv[2]), device)
        dist.destroy_process_group()
        # gloo's threads may outlive the group, and abort a process that ends in the ordinary way
        # (pytorch/pytorch#190489).
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name) / "base")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        for processes, task in ((2, "fine-tune"), (3, "go-on")):
            command = [*torchrun, f"--nproc-per-node={processes}", __file__, task, name]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            subprocess.run(command, env=environment, check=True)  # noqa: S603


if __name__ == "__main__":
    main()
