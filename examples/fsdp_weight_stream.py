"""Publish the weights of a sharded trainer to an inference engine, without gathering them.

Two trainers share a model under FSDP2, with float32 master weights. Each publishes its own part of every
step, in bf16; an engine, which holds the whole model in bf16, follows, and is equal in every bit.

Run it: python examples/fsdp_weight_stream.py
It starts two processes as torchrun would; works in a temporary folder; needs no network.
With a GPU for each process it runs on GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deltaweights.torch import DeltaPublisher, DeltaSubscriber

WIDTH = int(os.environ.get("WIDTH", "256"))
STEPS = 3


def make_model() -> nn.Sequential:
    """Something to train. Yours comes from transformers or torchtitan."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().view(torch.int16)


def train(stream: Path, device: str) -> None:
    """What each trainer does. The first one is also the engine here, to compare the two."""
    model = make_model().to(device)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    engine = make_model().to(torch.bfloat16)  # in other processes, on other machines
    subscriber = DeltaSubscriber(stream)
    with DeltaPublisher(
        stream, model, dtype=torch.bfloat16, process_group=dist.group.WORLD, anchor_every=None
    ) as publisher:
        for step in range(1, STEPS + 1):
            inputs = torch.randn(16, WIDTH, device=device)
            nn.functional.mse_loss(model(inputs), inputs[:, :8]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            published = publisher.publish(step, model)
            whole = {
                name: one.full_tensor() for name, one in model.named_parameters() if isinstance(one, DTensor)
            }
            if dist.get_rank() == 0:
                subscriber.sync(engine)
                for name, parameter in engine.named_parameters():
                    if not torch.equal(bits(parameter), bits(whole[name].to(torch.bfloat16))):
                        raise SystemExit(f"{name} differs")
                print(
                    f"step {step}: {published.update_bytes:,} of {published.state_bytes:,} bytes, by "
                    f"{dist.get_world_size()} trainers; the engine is equal",
                    flush=True,
                )


def main() -> None:
    if "RANK" in os.environ:  # started by torchrun
        device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        train(Path(sys.argv[1]), device)
        dist.destroy_process_group()
        # gloo's threads may outlive the group, and abort a process that ends in the ordinary way
        # (pytorch/pytorch#190489).
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as name:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run([*torchrun, __file__, f"{name}/stream"], env=environment, check=True)  # noqa: S603


if __name__ == "__main__":
    main()
