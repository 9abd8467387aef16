"""What a model is to each candidate: families of models with every kind of relation, and no false answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights.compare import Comparison, compare_models

from ..checkpoints import Array, bf16, f32, random_array, write_safetensors
from .families import (
    Weights,
    draw_model,
    f16,
    merge_adapter,
    mix,
    rename_layers,
    slerp,
    tune,
    write_model,
)

#: Verdicts of candidates by their names.
Verdicts = dict[str, str]


@dataclass
class Family:
    """A base, its fine-tunes (a and b), one of a's (aa), and a stranger, written once."""

    folder: Path
    hidden: int
    layers: int
    models: dict[str, Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = draw_model(0, self.hidden, self.layers)
        a = tune(base, 1, 2e-3)
        self.models = {
            "base": base,
            "a": a,
            "b": tune(base, 2, 2e-3),
            "c": tune(base, 3, 2e-3),
            "aa": tune(a, 4, 2e-3),
            "stranger": draw_model(9, self.hidden, self.layers),
        }
        for name, model in self.models.items():
            write_model(self.folder / name, model)

    def __getitem__(self, name: str) -> Weights:
        return self.models[name]

    def compare(self, model: Weights | str, *candidates: str, dtype: Callable[..., Array] = bf16) -> Verdicts:
        """The verdict on each candidate."""
        place = self.folder / "model"
        if isinstance(model, str):
            place = self.folder / model
        else:
            write_model(place, model, dtype)
        found = compare_models(place, [self.folder / name for name in candidates])
        return {Path(one.name).name: one.verdict for one in found.candidates}


@pytest.fixture(
    scope="module",
    params=[pytest.param((32, 2), id="32 wide"), pytest.param((64, 3), id="64 wide", marks=pytest.mark.slow)],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"), *request.param)


def test_a_fine_tune_is_told_from_a_stranger(family: Family) -> None:
    assert family.compare("a", "base", "stranger") == {"base": "fine-tune", "stranger": "unrelated"}
    assert family.compare("stranger", "base", "a") == {"base": "unrelated", "a": "unrelated"}


def test_two_fine_tunes_of_a_base_are_siblings_with_and_without_it(family: Family) -> None:
    assert family.compare("a", "b") == {"b": "sibling"}
    assert family.compare("a", "b", "c") == {"b": "sibling", "c": "sibling"}
    assert family.compare("a", "b", "base") == {"base": "fine-tune", "b": "sibling"}


def test_a_fine_tune_of_a_fine_tune_descends_from_both(family: Family) -> None:
    assert family.compare("aa", "a", "base") == {"a": "fine-tune", "base": "fine-tune"}
    assert family.compare("aa", "a", "b") == {"a": "fine-tune", "b": "sibling"}


def test_a_base_is_no_fine_tune_of_its_fine_tunes(family: Family) -> None:
    assert family.compare("base", "a") == {"a": "cannot tell"}
    assert family.compare("base", "a", "b") == {"a": "cannot tell", "b": "cannot tell"}


@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=["BF16", "F16", "F32"])
def test_copies_in_other_dtypes_are_found(family: Family, dtype: Callable[..., Array]) -> None:
    found = family.compare(family["a"], "a", "b", "base", dtype=dtype)
    assert found.pop("b") in ("sibling", "cannot tell")
    assert found == {"a": "fine-tune", "base": "fine-tune"}


def test_sharding_and_prefixes_do_not_matter(family: Family, tmp_path: Path) -> None:
    model = {name.replace("model.", "language_model.model."): value for name, value in family["a"].items()}
    write_model(tmp_path / "model", model, shards=5)
    found = compare_models(tmp_path / "model", [family.folder / "base", family.folder / "stranger"])
    assert [one.verdict for one in found.candidates] == ["fine-tune", "unrelated"]


def test_pruned_and_permuted_layers_are_found(family: Family) -> None:
    last = family.layers - 1
    pruned = rename_layers(family["a"], lambda layer: 0 if layer == last else None)
    assert family.compare(pruned, "base", "stranger") == {"base": "fine-tune", "stranger": "unrelated"}
    turned = rename_layers(family["a"], lambda layer: last - layer)
    assert family.compare(turned, "base", "stranger") == {"base": "fine-tune", "stranger": "unrelated"}


def test_weights_set_to_zero_do_not_hide_where_the_others_come_from(family: Family) -> None:
    rng = np.random.default_rng(0)
    model = {n: v * (rng.random(v.shape) < 0.5) if v.ndim > 1 else v for n, v in family["a"].items()}
    assert family.compare(model, "a", "stranger") == {"a": "fine-tune", "stranger": "unrelated"}
    assert family.compare(model, "base", "b") == {"base": "fine-tune", "b": "sibling"}


def test_quantized_copies_are_found(family: Family) -> None:
    """Each row by a scale of its own, as INT8; norms and the like stay."""
    arrays: dict[str, Array] = {}
    for name, value in family["a"].items():
        if value.ndim == 2:
            scale = np.abs(value).max(axis=1, keepdims=True) / 127
            arrays[name] = Array("I8", value.shape, np.rint(value / scale).astype("i1").tobytes())
            arrays[f"{name}_scale"] = f32(scale)
        else:
            arrays[name] = bf16(value)
    write_safetensors(family.folder / "int8" / "model.safetensors", arrays)
    assert family.compare("int8", "a", "stranger") == {"a": "fine-tune", "stranger": "unrelated"}
    assert family.compare("int8", "base") == {"base": "cannot tell"}  # a sibling would look the same


def test_a_merged_adapter_is_a_fine_tune(family: Family) -> None:
    model = merge_adapter(family["base"], 5)
    assert family.compare(model, "base", "b") == {"base": "fine-tune", "b": "sibling"}


def test_a_grown_vocabulary_tells_which_came_first(family: Family) -> None:
    model = dict(family["b"])
    more = draw_model(8, family.hidden)["lm_head.weight"][:10]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model[name] = np.concatenate([model[name], more])
    assert family.compare(model, "base") == {"base": "fine-tune"}


@pytest.mark.parametrize("dtype", [bf16, f32], ids=["BF16", "F32"])
@pytest.mark.parametrize("part", [0.3, 0.5])
def test_a_merge_of_two_is_recognized(family: Family, part: float, dtype: Callable[..., Array]) -> None:
    for model in (
        mix([(part, family["a"]), (1 - part, family["b"])]),
        slerp(family["a"], family["b"], 1 - part),
    ):
        assert family.compare(model, "a", "b", dtype=dtype) == {"a": "merge", "b": "merge"}
        found = family.compare(model, "a", "b", "base", "stranger", dtype=dtype)
        assert found == {"a": "merge", "b": "merge", "base": "fine-tune", "stranger": "unrelated"}


def test_merges_of_three_of_updates_and_of_layers_are_recognized(family: Family) -> None:
    a, b, c, base = (family[name] for name in ("a", "b", "c", "base"))
    three = mix([(0.4, a), (0.3, b), (0.3, c)])
    assert set(family.compare(three, "a", "b", "c").values()) == {"merge"}
    updates = mix([(0.4, base), (0.3, a), (0.3, b)])
    assert set(family.compare(updates, "a", "b", "base").values()) == {"merge"}
    stacked = {name: a[name] if ".0." in name else b[name] for name in a}
    assert set(family.compare(stacked, "a", "b").values()) == {"merge"}


def test_a_merge_with_a_part_missing_is_none(family: Family) -> None:
    model = mix([(0.5, family["a"]), (0.5, family["b"])])
    assert "merge" not in family.compare(model, "a", "c").values()
    assert "merge" not in family.compare(model, "a").values()


def test_a_weight_of_a_merge_is_told(family: Family) -> None:
    found = _compared(family, mix([(0.25, family["a"]), (0.75, family["b"])]), "a", "b")
    assert {Path(one.name).name: round(one.weight or 0, 2) for one in found.candidates} == {
        "a": 0.25,
        "b": 0.75,
    }


def _compared(family: Family, model: Weights, *candidates: str) -> Comparison:
    place = write_model(family.folder / "model", model)
    return compare_models(place, [family.folder / name for name in candidates])


def test_what_any_model_has_is_no_evidence(family: Family) -> None:
    """Ones, zeros, identities, masks and positions are the same in models that have nothing in common."""
    shared: Weights = {
        "model.layers.0.mask": np.tril(np.ones((64, 64), np.float32)),
        "model.layers.0.unit": np.eye(64, dtype=np.float32),
        "model.positions.weight": np.sin(np.outer(np.arange(64), 1 / 50 ** np.linspace(0, 1, 64))).astype(
            np.float32
        ),
    }
    write_model(family.folder / "other", family["stranger"] | shared)
    assert family.compare(family["a"] | shared, "other") == {"other": "unrelated"}


def test_one_shared_tensor_makes_no_relation(family: Family) -> None:
    model = family["stranger"] | {"model.embed_tokens.weight": family["base"]["model.embed_tokens.weight"]}
    assert family.compare(model, "base") == {"base": "cannot tell"}


def test_nothing_to_compare_is_no_answer(family: Family) -> None:
    write_model(family.folder / "wide", draw_model(3, 2 * family.hidden))
    assert family.compare("a", "wide") == {"wide": "cannot tell"}
    packed = {
        name: Array("U8", value.shape, bytes(value.size))
        for name, value in family["a"].items()
        if value.ndim == 2
    }
    write_safetensors(family.folder / "packed" / "model.safetensors", packed)
    assert family.compare("a", "packed") == {"packed": "cannot tell"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("std", [2e-4, 5e-4])
def test_small_updates_give_no_false_answer(tmp_path: Path, std: float, seed: int) -> None:
    base = draw_model(seed, 32)
    models = {"base": base, "a": tune(base, 10 * seed + 1, std), "b": tune(base, 10 * seed + 2, std)}
    for name, model in models.items():
        write_model(tmp_path / name, model)

    def verdicts(model: str, *others: str) -> list[str]:
        found = compare_models(tmp_path / model, [tmp_path / name for name in others])
        assert all(one.is_related for one in found.candidates)
        return sorted(one.verdict for one in found.candidates)

    assert verdicts("a", "b")[0] in ("sibling", "cannot tell")
    assert verdicts("a", "base")[0] in ("fine-tune", "cannot tell")
    assert verdicts("base", "a") == ["cannot tell"]


def test_siblings_stay_siblings_when_they_grow_or_lose_layers(family: Family) -> None:
    grown = dict(family["b"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = np.concatenate([grown[name], draw_model(8, family.hidden)[name][:10]])
    pruned = rename_layers(family["b"], lambda layer: 0 if layer == 0 else None)
    for model in (grown, pruned):
        assert family.compare(model, "a")["a"] in ("sibling", "cannot tell")


def test_a_base_is_not_made_from_what_was_cut_from_it_or_added_to_it(family: Family) -> None:
    base, hidden = family["base"], family.hidden
    small = {name: np.where(np.abs(v) < 0.01, 0, v) if v.ndim == 2 else v for name, v in base.items()}
    narrow = {
        name: value[: 2 * hidden]
        if "gate" in name or "up_proj" in name
        else value[:, : 2 * hidden]
        if "down_proj" in name
        else value
        for name, value in base.items()
    }
    grown = dict(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = np.concatenate([base[name], base[name][:10]])
    shallow = rename_layers(base, lambda layer: 0 if layer == 0 else None)
    for number, made in enumerate((small, narrow, grown, shallow)):
        name = f"made {number}"
        write_model(family.folder / name, made)
        assert family.compare("base", name) == {name: "cannot tell"}
        assert family.compare(made, "base") == {"base": "fine-tune"}


def _int8(values: NDArray[np.float32]) -> Array:
    """The values as integers, with a scale for each row that is left out."""
    if values.ndim < 2:
        return f32(values)
    scaled = values / np.abs(values).max(axis=1, keepdims=True) * 127
    return Array("I8", values.shape, np.rint(scaled).astype("i1").tobytes())


def test_a_quantized_model_is_told_as_a_copy_or_not_at_all(family: Family) -> None:
    write_model(family.folder / "integers", family["base"], _int8)
    assert family.compare("integers", "base") == {"base": "fine-tune"}
    assert family.compare("integers", "a", "b") == {"a": "cannot tell", "b": "cannot tell"}
    assert family.compare("integers", "stranger") == {"stranger": "unrelated"}
    assert family.compare("base", "integers") == {"integers": "cannot tell"}
    assert family.compare("a", "integers", "base") == {"integers": "cannot tell", "base": "fine-tune"}


def test_what_went_into_a_merge_is_no_merge(family: Family) -> None:
    write_model(family.folder / "merged", mix([(0.5, family["a"]), (0.5, family["b"])]), f32)
    assert set(family.compare(family["a"], "merged", "b", dtype=f32).values()) == {"cannot tell"}
    write_model(family.folder / "summed", _summed(family, 1.0), f32)
    assert "merge" not in family.compare(family["base"], "a", "b", "summed", dtype=f32).values()


def _summed(family: Family, part: float) -> Weights:
    """The base, and a part of both updates."""
    return mix([(1 - 2 * part, family["base"]), (part, family["a"]), (part, family["b"])])


def test_merges_that_are_no_combinations_are_no_siblings(family: Family) -> None:
    drawn = np.random.default_rng(3)
    base = family["base"]

    def dropped(name: str) -> NDArray[np.float32]:
        """The base and a random half of each update, as DARE takes them."""
        value = base[name]
        kept = ((family[one][name] - value) * (drawn.random(value.shape) < 0.5) for one in ("a", "b"))
        return (value + sum(kept)).astype(np.float32)

    for model in ({name: dropped(name) for name in base}, _summed(family, 0.8)):
        found = family.compare(model, "a", "b", dtype=f32)
        assert "sibling" not in found.values()


def test_a_model_whose_candidates_came_from_it_is_neither_their_fine_tune_nor_sibling(family: Family) -> None:
    assert set(family.compare("base", "a", "aa").values()) == {"cannot tell"}
    for factor in (0.5, 0.9, 0.99):
        scaled = {name: value * np.float32(factor) for name, value in family["base"].items()}
        write_model(family.folder / "scaled", scaled)
        assert family.compare("base", "scaled") == {"scaled": "cannot tell"}


def test_weights_in_another_order_are_not_unrelated(family: Family) -> None:
    drawn = np.random.default_rng(4)
    turned = {
        name: drawn.permutation(value) if value.ndim == 2 else value for name, value in family["base"].items()
    }
    assert family.compare(turned, "base") == {"base": "cannot tell"}
    inner = drawn.permutation(3 * family.hidden)
    same = {
        name: value[inner]
        if "gate" in name or "up_proj" in name
        else value[:, inner]
        if "down_proj" in name
        else value
        for name, value in family["a"].items()
    }
    assert family.compare(same, "base")["base"] in ("fine-tune", "cannot tell")
    assert family.compare(same, "b")["b"] in ("sibling", "cannot tell")


def test_parts_that_only_the_other_one_moved_make_no_fine_tune(family: Family) -> None:
    """One trained all but the head, the other one the head alone."""
    base, a, b = family["base"], family["a"], family["b"]
    write_model(family.folder / "head", base | {"lm_head.weight": b["lm_head.weight"]})
    model = a | {"lm_head.weight": base["lm_head.weight"]}
    assert family.compare(model, "head")["head"] in ("sibling", "cannot tell")
    write_model(family.folder / "weak", tune(base, 12, 1e-3))
    strong = tune(base, 11, 3e-3)
    assert family.compare(strong, "weak")["weak"] in ("sibling", "cannot tell")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"])
def test_any_bits_are_compared(tmp_path: Path, dtype: str) -> None:
    """NaNs, infinities, the largest and the smallest numbers: without a warning, and without a relation."""
    for number, name in enumerate(("one", "other")):
        arrays = {f"layers.{k}.w": random_array(dtype, (48, 64), 10 * number + k) for k in range(5)}
        arrays["zero.w"] = Array(dtype, (48, 64), bytes(len(arrays["layers.0.w"].data)))
        write_safetensors(tmp_path / name / "model.safetensors", arrays)
    (found,) = compare_models(tmp_path / "one", [tmp_path / "other"]).candidates
    assert found.verdict in ("unrelated", "cannot tell")
    (same,) = compare_models(tmp_path / "one", [tmp_path / "one"]).candidates
    assert same.verdict in ("fine-tune", "cannot tell")
