"""Parts of base tensors are found wherever a conversion of the architecture put them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.checkpoint import Gathered, HeldExtents, open_checkpoint
from deltaweights.match import parts
from deltaweights.match.parts import find_parts
from deltaweights.match.vectors import Samples, numbers

from ..checkpoints import Array, bf16, f32, random_array, weights, write_safetensors

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


def halves_of_heads() -> Pair:
    """The rows that are rotated together are half a head apart, or neighbors, as in LLaMA's first files."""

    def join(array: Weights) -> Weights:
        halves = array.reshape(-1, 2, HEAD // 2, HIDDEN)
        return halves.transpose(0, 2, 1, 3).reshape(-1, HIDDEN)

    names = [f"attn.{part}_proj.weight" for part in "qk"]
    shapes = (HEADS * HEAD, HIDDEN), (KV_HEADS * HEAD, HIDDEN)
    return in_layers(
        dense(*zip(names, shapes, strict=True)), lambda get: {name: join(get(name)) for name in names}
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
    "halves of heads": halves_of_heads,
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


def named(base: Path, target: Path) -> dict[str, Gathered]:
    """What is found, by the target's names."""
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        found = find_parts(new.tensors, old, new, (), HeldExtents())
        return {tensor.name: gathered for tensor, gathered in found.items()}


@given(
    groups=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    head=st.sampled_from([8, 12, 20, 32, 36]),
    width=st.sampled_from([32, 48, 80, 130]),
    seed=st.integers(0, 1000),
)
def test_heads_are_found_however_they_are_grouped(
    tmp_path_factory: pytest.TempPathFactory,
    groups: int,
    sizes: list[int],
    head: int,
    width: int,
    seed: int,
) -> None:
    """In each group so many heads of each tensor."""
    folder = tmp_path_factory.mktemp("pair")
    single = {
        f"layers.0.part{k}": weights((groups * size * head, width), seed + k) for k, size in enumerate(sizes)
    }
    by_group = [heads_of(array, groups) for array in single.values()]
    joined = {"layers.0.all": np.concatenate(by_group, axis=1).reshape(-1, width)}
    one, other = write(folder / "one", single, f32), write(folder / "other", tuned(joined))
    assert unlike(one, other, tuned(joined)) == {}


@given(
    count=st.integers(1, 12),
    shape=st.tuples(*[st.sampled_from([32, 33, 48, 100])] * 2),
    layout=st.sampled_from(["behind", "by turns", "apart"]),
    is_transposed=st.booleans(),
    is_split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_experts_are_found_however_they_are_stacked(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    shape: tuple[int, int],
    layout: str,
    is_transposed: bool,
    is_split: bool,
    seed: int,
) -> None:
    """Two tensors of each expert, which are behind each other, alternate row by row, or are stacked apart."""
    folder = tmp_path_factory.mktemp("pair")
    single = {
        f"layers.0.experts.{k}.{part}": weights(shape, 1000 * seed + 2 * k + (part == "v"))
        for k in range(count)
        for part in "wv"
    }
    of = {part: [single[f"layers.0.experts.{k}.{part}"] for k in range(count)] for part in "wv"}
    if layout == "apart":
        joined = {f"layers.0.{part}": np.stack(arrays) for part, arrays in of.items()}
    else:
        join = by_turns if layout == "by turns" else lambda one, other: np.concatenate([one, other])
        joined = {"layers.0.wv": np.stack([join(*pair) for pair in zip(of["w"], of["v"], strict=True)])}
    if is_transposed:
        joined = {name: array.swapaxes(1, 2) for name, array in joined.items()}
    base, target = (joined, single) if is_split else (single, joined)
    state = tuned(target)
    assert unlike(write(folder / "base", base, f32), write(folder / "target", state), state) == {}


@pytest.mark.parametrize("is_stacked", [False, True])
def test_experts_that_were_made_of_one_layer_are_found(tmp_path: Path, is_stacked: bool) -> None:
    base = dense(("mlp.gate", (FFN, HIDDEN)), ("mlp.up", (FFN, HIDDEN)))
    target = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        gate, up = base[f"{stem}mlp.gate"], base[f"{stem}mlp.up"]
        if is_stacked:
            target[f"{stem}experts.gate_up"] = np.stack([np.concatenate([gate, up])] * 8)
        else:
            target |= {f"{stem}experts.{k}.gate": gate for k in range(8)}
    target = tuned(target)
    assert unlike(write(tmp_path / "base", base), write(tmp_path / "target", target), target) == {}


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_are_found_in_any_order(tmp_path: Path, is_transposed: bool) -> None:
    order = np.random.default_rng(0).permutation(20)
    base = {f"layers.0.experts.{k}.w": weights((64, 48), int(k)) for k in order}
    arrays = list(base.values())
    joined = np.stack([array.T if is_transposed else array for array in arrays])
    target = tuned({"layers.0.experts.w": joined})
    one, other = write(tmp_path / "one", base), write(tmp_path / "other", target)
    assert unlike(one, other, target) == {}
    chosen = tuned({f"layers.0.experts.{k}.v": arrays[k] for k in (3, 7, 19)})
    assert unlike(other, write(tmp_path / "chosen", chosen), chosen) == {}


def test_layers_that_moved_are_found(tmp_path: Path) -> None:
    pair = fused_rows()
    target = {name.replace("layers.0.", "layers.7."): array for name, array in tuned(pair.joined).items()}
    target = {name: array for name, array in target.items() if "weight" in name}
    assert unlike(write(tmp_path / "base", pair.single), write(tmp_path / "target", target), target) == {}


def test_parts_of_all_sizes_are_found_in_a_tensor(tmp_path: Path) -> None:
    """As Mamba has them."""
    sizes = {"z": 384, "x": 384, "b": 32, "c": 32, "dt": 12}
    single = {f"layers.0.{name}": weights((size, 96), size) for name, size in sizes.items()}
    single["layers.0.c"] = weights((32, 96), 1)
    base = write(tmp_path / "base", {"layers.0.in_proj": np.concatenate(list(single.values()))})
    target = tuned(single)
    assert unlike(base, write(tmp_path / "target", target), target) == {}


@pytest.mark.parametrize(("known", "is_found"), [(2, True), (1, False)])
def test_leading_rows_count_if_they_are_half(tmp_path: Path, known: int, is_found: bool) -> None:
    base = {f"layers.0.{k}": weights((64, 48), k) for k in range(3)}
    rows = [base[f"layers.0.{k}"] if k < known else weights((64, 48), 9 + k) for k in range(3)]
    target = {"layers.0.all": np.concatenate(rows)}
    found = named(write(tmp_path / "base", base), write(tmp_path / "target", target))
    assert [gathered.numel for gathered in found.values()] == ([known * 64 * 48] if is_found else [])


def test_a_bias_of_zeros_follows_its_weight(tmp_path: Path) -> None:
    pair = grouped_heads()
    zeros = [{n: a * 0 if n.endswith("bias") else a for n, a in state.items()} for state in pair]
    base, target = (write(tmp_path / side, state) for side, state in zip("bt", zeros, strict=True))
    gathered = named(base, target)["model.layers.1.attn.wqkv.bias"]
    assert [tensor.name[-11:] for tensor in gathered.tensors] == [f"{part}_proj.bias" for part in "qkv"]


def test_a_tensor_that_nothing_uses_comes_first(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dict.fromkeys(["a", "b"], weights((64, 64))))
    target = write(tmp_path / "target", {"c": np.concatenate([weights((64, 64))] * 2)})
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        (found,) = find_parts(new.tensors, old, new, old.named("a"), HeldExtents()).values()
        assert found.groups[0].pieces[0].tensor.name == "b"


def test_unrelated_weights_are_not_found(tmp_path: Path) -> None:
    pairs = [make() for make in PAIRS.values()]
    base = {f"{k}.{name}": array for k, pair in enumerate(pairs) for name, array in pair.single.items()}
    target = {name: weights(array.shape, 100_000 + k) for k, (name, array) in enumerate(base.items())}
    assert named(write(tmp_path / "base", base), write(tmp_path / "target", target)) == {}


@pytest.mark.parametrize(
    "dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "U16", "I8", "U8"]
)
def test_parts_are_found_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    one, other = (random_array(dtype, (40, 64), seed) for seed in (1, 2))
    write_safetensors(tmp_path / "b" / "m.safetensors", {"one": one, "other": other})
    joined = Array(dtype, (80, 64), one.data + other.data)
    unrelated = random_array(dtype, (80, 64), 3)
    write_safetensors(tmp_path / "t" / "m.safetensors", {"both": joined, "none": unrelated})
    found = named(tmp_path / "b", tmp_path / "t")
    assert [(name, gathered.name) for name, gathered in found.items()] == [("both", "one, other")]


def test_odd_tensors_are_passed_over(tmp_path: Path) -> None:
    """Of no elements, of one, of many dimensions, of dtypes that are no numbers; all the same."""

    def odd(rows: int) -> dict[str, Array]:
        tensors = {
            "ones": Array("BF16", (rows, 64), b"\x80\x3f" * 64 * rows),
            "zeros": Array("BF16", (rows, 64), bytes(128 * rows)),
            "nan": Array("F32", (rows, 64), b"\xff" * 256 * rows),
            "empty": Array("F32", (rows, 0, 2**60), b""),
            "scalar": Array("F32", (), bytes(4)),
            "deep": Array("F32", (rows,) + (1,) * 63, bytes(4 * rows)),
            "half bytes": random_array("F4", (rows, 64)),
            "flags": Array("BOOL", (rows, 64), bytes(64 * rows)),
            "unknown": Array("X9", (rows, 64), bytes(64 * rows)),
        }
        return {f"{rows}.{name}": tensor for name, tensor in tensors.items()}

    write_safetensors(tmp_path / "b" / "m.safetensors", odd(64))
    write_safetensors(tmp_path / "t" / "m.safetensors", odd(128))
    assert named(tmp_path / "b", tmp_path / "t") == {}


def test_the_time_for_names_and_shapes_of_all_kinds_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was found by then counts."""
    monkeypatch.setattr(parts, "_MAX_COST", 5000)
    costs = []

    class Counted(Samples):
        def spend(self, cost: float) -> None:
            costs.append(cost)
            super().spend(cost)

    monkeypatch.setattr(parts, "Samples", Counted)
    base = {f"x{k}": weights((64, 32), k) for k in range(1000)}
    target = {f"y{k}": weights((65 + k, 32), 5000 + k) for k in range(500)}
    target["z"] = np.concatenate([base["x3"], base["x9"]] * 50)
    assert list(named(write(tmp_path / "b", base), write(tmp_path / "t", target))) == ["z"]
    assert sum(costs) < 8000


def test_rows_in_disorder_are_given_up(tmp_path: Path) -> None:
    rows = weights((4000, 32))
    base = write(tmp_path / "b", {"rows": rows})
    order = np.cumsum(np.random.default_rng(0).integers(1, 4, 2000))
    assert named(base, write(tmp_path / "t", {"some": rows[order % 4000]})) == {}
