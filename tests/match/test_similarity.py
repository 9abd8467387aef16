"""Matches that names do not tell: wrapper words anywhere, layers that moved, weights that are unlike."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import apply_delta, make_delta
from deltaweights.checkpoint import open_checkpoint
from deltaweights.match.names import match_tensors

from ..checkpoints import Array, bf16, contents, weights, write_safetensors

State = dict[str, np.ndarray]


def model(layers: int, seed: int = 0) -> State:
    state = {"embed.weight": weights((40, 16), seed)}
    for layer in range(layers):
        for number, part in enumerate(("attn.q_proj", "attn.o_proj", "mlp.up_proj")):
            shape = (32, 16) if "up" in part else (16, 16)
            state[f"model.layers.{layer}.{part}.weight"] = weights(
                shape, 10 * layer + number + 100 * seed + 1
            )
        state[f"model.layers.{layer}.norm.weight"] = np.ones(16, np.float32)
    return state


def tuned(state: State) -> State:
    return {name: array + weights(array.shape, k, 1e-4) for k, (name, array) in enumerate(state.items())}


def layers_of(state: State, order: list[int]) -> State:
    """A model whose layers are these of another."""
    found = {name: array for name, array in state.items() if ".layers." not in name}
    for new, old in enumerate(order):
        for name, array in state.items():
            if f".layers.{old}." in name:
                found[name.replace(f".layers.{old}.", f".layers.{new}.")] = array
    return found


def write(folder: Path, state: State) -> Path:
    arrays: dict[str, Array] = {name: bf16(array) for name, array in state.items()}
    write_safetensors(folder / "model.safetensors", arrays)
    return folder


def matched(base: Path, target: Path, rename: tuple[tuple[str, str], ...] = ()) -> dict[str, str | None]:
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        found = match_tensors(old, new, rename)
        return {match.target.name: match.base.name if match.base else None for match in found}


@pytest.mark.parametrize("words", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module.", "xyz."])
@pytest.mark.parametrize("layers", [3, 24])
def test_words_that_one_side_lacks_do_not_count(tmp_path: Path, words: str, layers: int) -> None:
    """Wherever they stand, on either side, in however many layers."""
    plain = model(layers)
    wrapped = {re.sub(r"(layers\.\d+\.)", rf"\1{words}", name): array for name, array in plain.items()}
    one, other = write(tmp_path / "plain", plain), write(tmp_path / "wrapped", tuned(wrapped))
    assert matched(one, other) == dict(zip(wrapped, plain, strict=True))
    assert matched(other, one) == dict(zip(plain, wrapped, strict=True))


@given(
    order=st.permutations(range(6)).flatmap(lambda order: st.integers(1, 6).map(lambda n: list(order)[:n]))
)
def test_layers_are_found_wherever_they_went(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    """Pruned, reordered or doubled, then tuned. Norms, which are all alike, follow their layer."""
    folder = tmp_path_factory.mktemp("pair")
    base = model(6)
    found = matched(write(folder / "base", base), write(folder / "target", tuned(layers_of(base, order))))
    for name, other in found.items():
        if part := re.search(r"layers\.(\d+)\.", name):
            assert other == name.replace(part[0], f"layers.{order[int(part[1])]}.")


def test_a_model_with_layers_twice_is_small_and_comes_back(tmp_path: Path) -> None:
    base = model(4)
    target = tuned(layers_of(base, [0, 1, 2, 1, 2, 3]))
    old, new = write(tmp_path / "base", base), write(tmp_path / "target", target)
    manifest = make_delta(old, new, tmp_path / "delta")
    assert all(entry.base for entry in manifest.tensors)
    apply_delta(tmp_path / "delta", tmp_path / "out", base=old)
    assert contents(tmp_path / "out") == contents(new)


def test_weights_that_resemble_nothing_keep_the_base_of_their_name(tmp_path: Path) -> None:
    base, other = model(3), model(3, seed=7)
    found = matched(write(tmp_path / "base", base), write(tmp_path / "target", other))
    assert found == {name: name for name in base}


def test_a_rule_is_the_users_word(tmp_path: Path) -> None:
    base = model(3)
    target = layers_of(base, [2, 1, 0])
    rules = ((r"layers\.0\.", "layers.1."),)
    found = matched(write(tmp_path / "base", base), write(tmp_path / "target", target), rules)
    assert found["model.layers.0.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    assert found["model.layers.2.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"


def test_what_is_no_number_is_not_compared(tmp_path: Path) -> None:
    values = np.full((16, 16), np.nan, np.float32)
    values[:8] = np.inf
    base, target = (
        write(tmp_path / "base", {"a": values}),
        write(tmp_path / "target", {"b": np.zeros_like(values)}),
    )
    assert matched(base, target)["b"] in (None, "a")
