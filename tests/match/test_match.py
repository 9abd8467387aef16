"""Which base tensor a target tensor is compared with: by name, by rule, by prefix, by equal bytes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import DeltaWeightsError
from deltaweights.checkpoint import Base, Tensor, open_checkpoint
from deltaweights.cli.logs import logs_shown
from deltaweights.codec import is_convertible
from deltaweights.dtypes import DTYPE_BITS
from deltaweights.match.names import RenameRule, match_tensors

from ..checkpoints import Array, bf16, f32, random_array, weights, write_safetensors

#: Files of a checkpoint by path, each with its tensors.
Files = Mapping[str, Mapping[str, Array]]


@pytest.fixture
def matches(tmp_path: Path) -> Matcher:
    return Matcher(tmp_path)


class Matcher:
    """Writes a base and a target and tells what was matched: ``file:name`` of each target tensor to
    ``file:name`` of the base tensor (None: none) and the shared bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def in_files(
        self, base: Files, target: Files, rename: Sequence[RenameRule] = ()
    ) -> dict[str, tuple[str | None, int]]:
        self._count += 1
        folder = self._folder / str(self._count)
        for side, files in (("base", base), ("target", target)):
            for path, tensors in files.items():
                write_safetensors(folder / side / f"{path}.safetensors", tensors)
        with open_checkpoint(folder / "base") as old, open_checkpoint(folder / "target") as new:
            found = match_tensors(old, new, rename)
            assert [match.target for match in found] == new.tensors

        def label(tensor: Base) -> str:
            assert isinstance(tensor, Tensor)
            return f"{tensor.shard.path.removesuffix('.safetensors')}:{tensor.info.name}"

        return {
            label(match.target): (label(match.base) if match.base else None, match.shared_bytes)
            for match in found
        }

    def __call__(
        self, base: Mapping[str, Array], target: Mapping[str, Array], *rename: RenameRule
    ) -> dict[str, tuple[str | None, int]]:
        """The same for single files, without their names."""
        found = self.in_files({"m": base}, {"m": target}, rename)
        return {
            name.removeprefix("m:"): (other and other.removeprefix("m:"), shared)
            for name, (other, shared) in found.items()
        }

    def names(
        self, base: Mapping[str, Array], target: Mapping[str, Array], *rename: RenameRule
    ) -> dict[str, str | None]:
        """Names alone."""
        return {name: other for name, (other, _) in self(base, target, *rename).items()}


# By name ---------------------------------------------------------------------------------------------


def test_a_tensor_is_matched_by_its_name(matches: Matcher) -> None:
    assert matches({"a": noise(1), "b": noise(2)}, {"b": noise(3), "c": random_array("U8", (5,))}) == {
        "b": ("b", NBYTES),
        "c": (None, 0),
    }


def test_how_the_sides_are_sharded_does_not_matter(matches: Matcher) -> None:
    names = [f"layer.{k}" for k in range(6)]
    base: Files = {f"base-{k}": {name: noise(k)} for k, name in enumerate(names)}
    target: Files = {
        "even": {name: noise(9) for name in names[::2]},
        "odd": {name: noise(9) for name in names[1::2]},
    }
    found = matches.in_files(base, target)
    assert {name.split(":")[1]: other for name, (other, _) in found.items()} == {
        name: f"base-{k}:{name}" for k, name in enumerate(names)
    }


def test_a_name_comes_before_equal_bytes(matches: Matcher) -> None:
    assert matches.names({"a": noise(1), "b": noise(2)}, {"a": noise(2)}) == {"a": "a"}


def test_models_of_one_pipeline_do_not_mix(matches: Matcher) -> None:
    """As in diffusers: subfolders whose tensors have the same names."""
    layout = ["unet/model", "vae/model", "text_encoder/model"]
    base: Files = {path: {"conv.weight": noise(k)} for k, path in enumerate(layout)}
    target: Files = {path: {"conv.weight": noise(10)} for path in reversed(layout)}
    assert matches.in_files(base, target) == {
        f"{path}:conv.weight": (f"{path}:conv.weight", NBYTES) for path in layout
    }


def test_a_subfolder_sharded_anew_is_still_matched_with_its_own(matches: Matcher) -> None:
    base: Files = {"unet/all": {"w": noise(1), "v": noise(2)}, "vae/all": {"w": noise(3), "v": noise(4)}}
    target: Files = {
        "unet/1-of-2": {"w": noise(5)},
        "unet/2-of-2": {"v": noise(6)},
        "vae/all": {"w": noise(7)},
    }
    assert {name: other for name, (other, _) in matches.in_files(base, target).items()} == {
        "unet/1-of-2:w": "unet/all:w",
        "unet/2-of-2:v": "unet/all:v",
        "vae/all:w": "vae/all:w",
    }


def test_of_two_shards_with_one_name_the_one_at_the_same_path_counts(matches: Matcher) -> None:
    base: Files = {"a": {"w": noise(1)}, "b": {"w": noise(2)}}
    assert matches.in_files(base, {"b": {"w": noise(3)}}) == {"b:w": ("b:w", NBYTES)}
    assert matches.in_files(base, {"c": {"w": noise(3)}}) == {"c:w": ("a:w", NBYTES)}


def test_of_tensors_with_one_name_one_that_can_be_compared_counts(matches: Matcher) -> None:
    """A quantized copy beside the shards, under the target's own file name."""
    packed = random_array("U32", (4,))
    base: Files = {"model": {"w": packed}, "part-1": {"w": noise(1)}}
    assert matches.in_files(base, {"model": {"w": noise(3)}}) == {"model:w": ("part-1:w", NBYTES)}
    base = {"model": {"w": f32(weights((4, 3)))}, "part-1": {"w": noise(1)}}
    assert matches.in_files(base, {"model": {"w": noise(3)}}) == {"model:w": ("part-1:w", NBYTES)}


def test_of_tensors_with_one_name_the_one_that_the_index_names_counts(
    matches: Matcher, tmp_path: Path
) -> None:
    index = tmp_path / "1" / "base" / "model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text('{"weight_map": {"w": "part-1.safetensors"}}')
    base: Files = {"model": {"w": noise(2)}, "part-1": {"w": noise(1)}}
    assert matches.in_files(base, {"model": {"w": noise(3)}}) == {"model:w": ("part-1:w", NBYTES)}


# By rule ---------------------------------------------------------------------------------------------


def test_a_rule_turns_target_names_into_base_names(matches: Matcher) -> None:
    base = {"h.0.attn.w": noise(1), "h.1.attn.w": noise(2), "h.1.b": noise(3)}
    target = {"layers.0.self.w": noise(4), "layers.1.self.w": noise(5), "layers.1.other": noise(6)}
    found = matches.names(base, target, (r"^layers\.(\d+)\.self\.", r"h.\1.attn."))
    assert found == {"layers.0.self.w": "h.0.attn.w", "layers.1.self.w": "h.1.attn.w", "layers.1.other": None}


def test_rules_apply_one_after_the_other(matches: Matcher) -> None:
    assert matches.names({"c": noise(1)}, {"a": noise(2)}, ("^a$", "b"), ("^b$", "c")) == {"a": "c"}


@pytest.mark.parametrize("layers", [(3, 2, 1), (1, 2, 3)])
def test_rules_that_move_layers_move_each_once_in_any_order(matches: Matcher, layers: Sequence[int]) -> None:
    base = {f"layers.{k}.w": noise(k) for k in range(3)}
    target = {f"layers.{k}.w": noise(10 + k) for k in (1, 2, 3)}
    rules = [(rf"^layers\.{k}\.", f"layers.{k - 1}.") for k in layers]
    assert matches.names(base, target, *rules) == {f"layers.{k}.w": f"layers.{k - 1}.w" for k in (1, 2, 3)}


def test_rules_for_both_ends_of_a_name_both_apply(matches: Matcher) -> None:
    base = {"vision.a.weight": noise(1), "b.weight": noise(2)}
    target = {"tower.a.gamma": noise(3), "b.gamma": noise(4)}
    for last in ((r"\.gamma$", ".weight"), (r"^(.*)\.gamma$", r"\1.weight")):
        found = matches.names(base, target, (r"^tower\.", "vision."), last)
        assert found == {"tower.a.gamma": "vision.a.weight", "b.gamma": "b.weight"}


def test_a_rule_goes_on_where_another_one_took_a_part_away(matches: Matcher) -> None:
    base = {"a.w": noise(1), "b.w": noise(2)}
    target = {"_orig_mod.model.a.w": noise(3), "model.b.w": noise(4)}
    found = matches.names(base, target, (r"^_orig_mod\.", ""), (r"^model\.", ""))
    assert found == {"_orig_mod.model.a.w": "a.w", "model.b.w": "b.w"}


def test_a_rule_without_effect_is_told_of(matches: Matcher) -> None:
    base, target = {"lm_head": noise(1), "a": noise(2)}, {"head": noise(3), "a": noise(4)}
    with logs_shown(logging.WARNING, quiet=True, warnings_shown=False) as told:
        matches.names(base, target, (r"\.base_layr", ""), ("^head", "output"))
    assert told == [
        r"The rename rule '\\.base_layr=' changed no name.",
        "The rename rule '^head=output' gave names that the base does not have, such as 'output'.",
        "1 tensor of 4 x 3, head, has no counterpart in the base.",
    ]
    with logs_shown(logging.WARNING, quiet=True, warnings_shown=False) as told:
        matches.names(base, target, ("^head", "lm_head"))
    assert told == []


def test_a_rule_comes_before_the_name_itself(matches: Matcher) -> None:
    base = {"a": noise(1), "b": noise(2)}
    assert matches.names(base, {"a": noise(3)}, ("a", "b")) == {"a": "b"}


def test_what_a_rule_does_not_find_is_matched_as_ever(matches: Matcher) -> None:
    """By equal bytes, say."""
    assert matches.names({"b": noise(1)}, {"a": noise(1)}, ("a", "nowhere")) == {"a": "b"}


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("[", "x"),
        ("(", "x"),
        ("*", "x"),
        ("a{2,1}", "x"),
        ("a{99999999999999}", "x"),
        ("(" * 5000 + ")" * 5000, "x"),
        ("a", r"\1"),
        ("(a)", r"\2"),
        ("(a)", r"\g<name>"),
        ("a", r"\g<1"),
        ("a", r"\q"),
    ],
    ids=lambda text: text[:20],
)
def test_an_invalid_rule_is_our_error(matches: Matcher, pattern: str, replacement: str) -> None:
    with pytest.raises(DeltaWeightsError, match="rename rule") as caught:
        matches({"a": noise(1)}, {"b": noise(1)}, (pattern, replacement))
    assert caught.value.why
    assert caught.value.fix.startswith("Rules look like")


# By prefix -------------------------------------------------------------------------------------------

LAYERS = {f"layers.{k}.{part}": shape for k in range(3) for part, shape in (("w", (4, 3)), ("b", (4,)))}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", "language_model.model."),
        ("language_model.model.", "model."),
        ("model.", ""),
        ("", "model."),
        ("bert.", "roberta."),
        ("a.b.c.", "x."),
    ],
)
def test_a_consistent_change_of_prefix_is_found(matches: Matcher, old: str, new: str) -> None:
    base = {old + name: random_array("BF16", shape, 1) for name, shape in LAYERS.items()}
    target = {new + name: random_array("BF16", shape, 2) for name, shape in LAYERS.items()}
    assert matches.names(base, target) == {new + name: old + name for name in LAYERS}


def test_of_competing_prefixes_the_one_that_explains_most_wins(matches: Matcher) -> None:
    """A text model became a part of a multi-modal one; a smaller part has layers of the same names."""
    base = {f"model.layers.{k}.w": noise(k) for k in range(4)}
    base |= {f"tower.layers.{k}.w": noise(k) for k in range(2)}
    target = {f"lm.model.layers.{k}.w": noise(10 + k) for k in range(4)}
    target |= {f"vision.tower.layers.{k}.w": noise(20 + k) for k in range(2)}
    assert matches.names(base, target) == {
        **{f"lm.model.layers.{k}.w": f"model.layers.{k}.w" for k in range(4)},
        **{f"vision.tower.layers.{k}.w": f"tower.layers.{k}.w" for k in range(2)},
    }


def test_a_base_tensor_that_has_its_name_is_not_taken_for_a_prefix(matches: Matcher) -> None:
    base = {f"model.{k}": noise(k) for k in range(3)}
    target = {**{f"model.{k}": noise(9) for k in range(3)}, **{f"ema.model.{k}": noise(8) for k in range(3)}}
    assert matches.names(base, target) == {
        **{f"model.{k}": f"model.{k}" for k in range(3)},
        **{f"ema.model.{k}": None for k in range(3)},
    }


def test_one_tensor_alone_is_no_consistent_change(matches: Matcher) -> None:
    assert matches.names({"a.head": noise(1)}, {"b.head": noise(2)}) == {"b.head": None}


def test_a_prefix_does_not_match_other_shapes(matches: Matcher) -> None:
    base = {f"a.{k}": random_array("U8", (k + 1, 2), 1) for k in range(3)}
    target = {f"b.{k}": random_array("U8", (k + 7, 2), 2) for k in range(3)}
    assert set(matches.names(base, target).values()) == {None}


def test_a_prefix_is_found_in_a_model_of_many_layers(matches: Matcher) -> None:
    names = [f"layers.{k}.{part}.weight" for k in range(100) for part in "qkvo"]
    base = {f"model.{name}": noise(1) for name in names}
    target = {f"text.model.{name}": noise(2) for name in names}
    assert matches.names(base, target) == {f"text.model.{name}": f"model.{name}" for name in names}


def test_each_base_tensor_is_matched_by_prefix_once(matches: Matcher) -> None:
    base = {f"old.{k}": noise(k) for k in range(4)}
    target = {f"{side}.{k}": noise(50 + k) for side in ("one", "two") for k in range(4)}
    found = [other for other in matches.names(base, target).values() if other]
    assert sorted(found) == sorted(base)


# By equal bytes --------------------------------------------------------------------------------------


def test_equal_bytes_under_another_name_are_found(matches: Matcher) -> None:
    """An output layer that was tied to the embeddings and no longer is."""
    base = {"embed": noise(1), "other": noise(2)}
    assert matches(base, {"embed": noise(3), "lm_head": noise(1)}) == {
        "embed": ("embed", NBYTES),
        "lm_head": ("embed", NBYTES),
    }


def test_equal_bytes_that_differ_late_are_told_apart(matches: Matcher) -> None:
    """The first megabytes are alike: it takes the whole to know."""
    data = bytes(3_000_000)
    base = {
        "a": Array("U8", (3_000_001,), data + b"\1"),
        "b": Array("U8", (3_000_001,), data + b"\2"),
    }
    assert matches.names(base, {"x": Array("U8", (3_000_001,), data + b"\2")}) == {"x": "b"}
    assert matches.names(base, {"x": Array("U8", (3_000_001,), data + b"\3")}) == {"x": None}


def test_equal_bytes_of_another_dtype_or_shape_are_not_the_same_tensor(matches: Matcher) -> None:
    base = {"a": Array("U8", (4,), b"abcd")}
    assert matches.names(base, {"x": Array("I8", (4,), b"abcd")}) == {"x": None}
    assert matches.names(base, {"x": Array("U8", (2, 2), b"abcd")}) == {"x": None}


def test_empty_tensors_are_not_found_by_their_bytes(matches: Matcher) -> None:
    assert matches.names({"a": Array("U8", (0,), b"")}, {"x": Array("U8", (0,), b"")}) == {"x": None}


# What is shared --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 2, 2), (0,), (3, 0)])
@pytest.mark.parametrize("dtype", ["BF16", "F64", "U8", "BOOL", "C64", "F8_E4M3"])
def test_one_dtype_and_shape_share_everything(matches: Matcher, dtype: str, shape: tuple[int, ...]) -> None:
    old, new = random_array(dtype, shape, 1), random_array(dtype, shape, 2)
    assert matches({"a": old}, {"a": new}) == {"a": ("a", len(new.data))}


@pytest.mark.parametrize(("old_rows", "new_rows"), [(400, 424), (424, 400), (1, 1000), (5, 1)])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "U8"])
def test_a_vocabulary_that_grew_or_shrank_shares_its_first_rows(
    matches: Matcher, dtype: str, old_rows: int, new_rows: int
) -> None:
    old, new = random_array(dtype, (old_rows, 6), 1), random_array(dtype, (new_rows, 6), 2)
    row = 6 * DTYPE_BITS[dtype] // 8
    assert matches({"embed": old}, {"embed": new}) == {"embed": ("embed", min(old_rows, new_rows) * row)}


def test_rows_may_be_empty_or_of_a_few_bits(matches: Matcher) -> None:
    base = {
        "none": random_array("U8", (0, 4)),
        "wide": random_array("U8", (3, 0)),
        "bits": random_array("F4", (2,)),
    }
    target = {
        "none": random_array("U8", (2, 4)),
        "wide": random_array("U8", (5, 0)),
        "bits": random_array("F4", (6,)),
    }
    assert matches(base, target) == {"none": ("none", 0), "wide": ("wide", 0), "bits": ("bits", 1)}


@pytest.mark.parametrize(
    ("old", "new"), [((6, 4), (4, 6)), ((24,), (2, 3, 4)), ((), (1, 1)), ((1, 24), (24, 1))]
)
def test_a_reshaped_tensor_shares_everything(
    matches: Matcher, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    target = random_array("BF16", new, 2)
    assert matches({"a": random_array("BF16", old, 1)}, {"a": target}) == {"a": ("a", len(target.data))}


@pytest.mark.parametrize(
    ("old", "new"),
    [((6, 4), (6, 5)), ((6, 4), (7, 5)), ((4,), (4, 2)), ((2, 2), ()), ((), (4,)), ((4,), ()), ((), (0,))],
)
def test_incompatible_shapes_share_nothing(
    matches: Matcher, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    found = matches({"a": random_array("BF16", old, 1)}, {"a": random_array("BF16", new, 2)})
    assert found == {"a": ("a", 0)}


@pytest.mark.parametrize("old", ["BF16", "F16", "F32", "F64", "I32", "F8_E4M3", "BOOL"])
@pytest.mark.parametrize("new", ["BF16", "F16", "F32", "F64", "I16", "U8"])
def test_another_dtype_shares_everything_where_there_is_a_rule(matches: Matcher, old: str, new: str) -> None:
    target = random_array(new, (4, 6), 2)
    shared = len(target.data) if is_convertible(old, new) else 0
    assert matches({"a": random_array(old, (4, 6), 1)}, {"a": target}) == {"a": ("a", shared)}


def test_dtype_and_number_of_rows_may_change_together(matches: Matcher) -> None:
    assert matches({"a": f32(weights((10, 4)))}, {"a": bf16(weights((16, 4)))}) == {"a": ("a", 10 * 4 * 2)}
    assert matches({"a": bf16(weights((16, 4)))}, {"a": f32(weights((10, 4)))}) == {"a": ("a", 10 * 4 * 4)}


@given(st.data())
def test_what_is_shared_exists_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dtypes = st.sampled_from(["BF16", "F32", "F64", "U8", "F4", "C64", "I16"])
    shapes = st.lists(st.sampled_from([0, 1, 2, 4, 6]), max_size=3).map(tuple)
    sides = []
    for seed in (1, 2):
        dtype, shape = data.draw(dtypes), data.draw(shapes)
        if np.prod(shape) * DTYPE_BITS[dtype] % 8:
            shape = (*shape, 2)
        sides.append(random_array(dtype, shape, seed))
    old, new = sides
    matcher = Matcher(tmp_path_factory.mktemp("pair"))
    _, shared = matcher({"a": old}, {"a": new})["a"]
    assert 0 <= shared <= len(new.data)
    if shared:
        assert old.dtype == new.dtype or is_convertible(old.dtype, new.dtype)
        assert shared * DTYPE_BITS[old.dtype] <= len(old.data) * DTYPE_BITS[new.dtype]
    if old.shape == new.shape and old.dtype == new.dtype:
        assert shared == len(new.data)


# Helpers ---------------------------------------------------------------------------------------------

NBYTES = 24


def noise(seed: int) -> Array:
    """A tensor like no other but the one of the same seed."""
    return random_array("BF16", (4, 3), seed)
