"""Parts of base tensors are found wherever a conversion of the architecture put them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights.checkpoint import Gathered, HeldExtents, open_checkpoint
from deltaweights.match.parts import find_parts
from deltaweights.match.vectors import numbers

from ..checkpoints import Array, bf16, f32, weights, write_safetensors

Weights = NDArray[np.float32]
State = dict[str, Weights]

HIDDEN, HEAD, FFN, EXPERTS, LAYERS = 128, 32, 192, 4, 2
HEADS, KV_HEADS = 4, 2


class Pair(NamedTuple):
    """Two models of the same weights: ``joined`` has in each tensor what ``single`` has in several."""

    single: State
    joined: State


def dense(*parts: tuple[str, tuple[int, ...]]) -> State:
    """A model with these tensors in each layer."""
    state = {}
    for layer in range(LAYERS):
        for number, (name, shape) in enumerate(parts):
            state[f"model.layers.{layer}.{name}"] = weights(shape, 1000 * layer + number)
    return state


def attention(kv_heads: int = KV_HEADS) -> State:
    kv = (kv_heads * HEAD, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {"q_proj": (HEADS * HEAD, HIDDEN), "k_proj": kv, "v_proj": kv}
    parts = [(f"attn.{name}.weight", shape) for name, shape in shapes.items()]
    return dense(*parts, *((f"attn.{name}.bias", shape[:1]) for name, shape in shapes.items()))


def experts(with_bias: bool = False) -> State:
    shapes: dict[str, tuple[int, ...]] = {
        "gate_proj": (FFN, HIDDEN),
        "up_proj": (FFN, HIDDEN),
        "down_proj": (HIDDEN, FFN),
    }
    parts = [
        (f"mlp.experts.{k}.{name}.weight", shape) for k in range(EXPERTS) for name, shape in shapes.items()
    ]
    if with_bias:
        parts += [
            (f"mlp.experts.{k}.{name}.bias", shape[:1])
            for k in range(EXPERTS)
            for name, shape in shapes.items()
        ]
    return dense(*parts)


def in_layers(state: State, join: Callable[[Callable[[str], Weights]], Mapping[str, Weights]]) -> Pair:
    """The pair whose joined tensors ``join`` makes of those of each layer."""
    joined: State = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        own = {name.removeprefix(stem): array for name, array in state.items() if name.startswith(stem)}
        joined |= {stem + name: array for name, array in join(own.__getitem__).items()}
    return Pair(state, joined)


def fused_rows() -> Pair:
    return in_layers(
        attention(),
        lambda get: {
            f"attn.qkv_proj.{kind}": np.concatenate([get(f"attn.{part}_proj.{kind}") for part in "qkv"])
            for kind in ("weight", "bias")
        },
    )


def fused_mlp() -> Pair:
    shapes = ("mlp.gate_proj.weight", (FFN, HIDDEN)), ("mlp.up_proj.weight", (FFN, HIDDEN))
    return in_layers(
        dense(*shapes), lambda get: {"mlp.gate_up_proj.weight": np.concatenate([get(n) for n, _ in shapes])}
    )


def heads_of(array: Weights, heads: int) -> Weights:
    return array.reshape(heads, -1, *array.shape[1:])


def interleaved_heads() -> Pair:
    """As GPT-NeoX and Bloom have them."""

    def join(kind: str, get: Callable[[str], Weights]) -> Weights:
        parts = [heads_of(get(f"attn.{part}_proj.{kind}"), HEADS) for part in "qkv"]
        joined = np.stack(parts, axis=1)
        return joined.reshape(-1, *joined.shape[3:])

    return in_layers(
        attention(HEADS),
        lambda get: {f"attn.query_key_value.{kind}": join(kind, get) for kind in ("weight", "bias")},
    )


def grouped_heads() -> Pair:
    """As Falcon and InternLM2 have them."""

    def join(kind: str, get: Callable[[str], Weights]) -> Weights:
        parts = [heads_of(get(f"attn.{part}_proj.{kind}"), KV_HEADS) for part in "qkv"]
        joined = np.concatenate(parts, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return in_layers(
        attention(), lambda get: {f"attn.wqkv.{kind}": join(kind, get) for kind in ("weight", "bias")}
    )


def stacked(
    gate_up: Callable[[Weights, Weights], Weights],
    down: Callable[[Weights], Weights] = lambda array: array,
    with_bias: bool = False,
) -> Pair:
    def join(get: Callable[[str], Weights]) -> State:
        def of(expert: int, part: str, kind: str = "weight") -> Weights:
            return get(f"mlp.experts.{expert}.{part}_proj.{kind}")

        every = range(EXPERTS)
        joined = {
            "mlp.experts.gate_up_proj": np.stack([gate_up(of(k, "gate"), of(k, "up")) for k in every]),
            "mlp.experts.down_proj": np.stack([down(of(k, "down")) for k in every]),
        }
        if with_bias:
            biases = [gate_up(of(k, "gate", "bias"), of(k, "up", "bias")) for k in every]
            joined["mlp.experts.gate_up_proj_bias"] = np.stack(biases)
            joined["mlp.experts.down_proj_bias"] = np.stack([of(k, "down", "bias") for k in every])
        return joined

    return in_layers(experts(with_bias), join)


def by_turns(one: Weights, other: Weights) -> Weights:
    return np.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def transposed() -> Pair:
    shapes = ("a.weight", (HIDDEN, HIDDEN)), ("b.weight", (FFN, HIDDEN))
    return in_layers(dense(*shapes), lambda get: {name: get(name).T for name, _ in shapes})


def conv1d() -> Pair:
    """As GPT-2 has its attention."""
    return in_layers(
        attention(),
        lambda get: {
            "attn.c_attn.weight": np.concatenate([get(f"attn.{p}_proj.weight") for p in "qkv"]).T,
            "attn.c_attn.bias": np.concatenate([get(f"attn.{p}_proj.bias") for p in "qkv"]),
        },
    )


def fused_columns() -> Pair:
    shapes = ("a.weight", (96, 64)), ("b.weight", (96, 160))
    return in_layers(
        dense(*shapes), lambda get: {"ab.weight": np.concatenate([get(name) for name, _ in shapes], axis=1)}
    )


def stacked_columns_by_turns() -> Pair:
    """Gates and values alternate, element by element, in experts that were stacked as they are used."""
    parts = [(f"e.{k}.{name}", (HIDDEN, FFN)) for k in range(EXPERTS) for name in ("w", "v")]
    return in_layers(
        dense(*parts),
        lambda get: {
            "e.wv": np.stack(
                [np.stack([get(f"e.{k}.w"), get(f"e.{k}.v")], axis=2).reshape(HIDDEN, -1) for k in range(4)]
            )
        },
    )


PAIRS: dict[str, Callable[[], Pair]] = {
    "rows": fused_rows,
    "mlp": fused_mlp,
    "heads": interleaved_heads,
    "grouped heads": grouped_heads,
    "stack": lambda: stacked(lambda g, u: np.concatenate([g, u])),
    "stack, with biases": lambda: stacked(lambda g, u: np.concatenate([g, u]), with_bias=True),
    "stack, transposed": lambda: stacked(lambda g, u: np.concatenate([g, u]).T, lambda d: d.T),
    "stack, by turns": lambda: stacked(by_turns, with_bias=True),
    "stack, by turns, transposed": lambda: stacked(lambda g, u: by_turns(g, u).T, lambda d: d.T),
    "stack, columns by turns": stacked_columns_by_turns,
    "transposed": transposed,
    "conv1d": conv1d,
    "columns": fused_columns,
}


def tuned(state: State, noise: float = 2e-4) -> State:
    return {
        name: array + weights(array.shape, k + 5000, noise) for k, (name, array) in enumerate(state.items())
    }


def write(folder: Path, state: State, code: Callable[[Weights], Array] = bf16) -> Path:
    arrays = {name: code(np.ascontiguousarray(array)) for name, array in state.items()}
    write_safetensors(folder / "model.safetensors", arrays)
    return folder


def elements(gathered: Gathered) -> NDArray[np.float32]:
    out = np.empty(gathered.nbytes, np.uint8)
    gathered.read_into(0, out)
    return numbers(out, gathered.dtype)


def unlike(base: Path, target: Path, state: State) -> dict[str, str]:
    """What is wrong, for each tensor of the target, whose values are those of ``state``."""
    wrong = {}
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        found = find_parts(new.tensors, old, new, (), HeldExtents())
        for tensor in new.tensors:
            if tensor not in found:
                wrong[tensor.name] = "not found"
            else:
                values = elements(found[tensor])
                expected = state[tensor.name].ravel()
                if values.size != expected.size:
                    wrong[tensor.name] = f"{values.size} of {expected.size} elements"
                elif np.abs(values - expected).max() > 0.01:
                    share = np.mean(np.abs(values - expected) > 0.01)
                    wrong[tensor.name] = f"{share:.0%} are others: {found[tensor].name}"
    return wrong


@pytest.mark.parametrize("noise", [0, 2e-4], ids=["copied", "tuned"])
@pytest.mark.parametrize("is_split", [False, True], ids=["joined", "split"])
@pytest.mark.parametrize("kind", PAIRS)
def test_every_element_is_found(tmp_path: Path, kind: str, is_split: bool, noise: float) -> None:
    pair = PAIRS[kind]()
    base, target = (pair.joined, pair.single) if is_split else pair
    state = tuned(target, noise) if noise else target
    assert unlike(write(tmp_path / "base", base, f32), write(tmp_path / "target", state), state) == {}
