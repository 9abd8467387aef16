"""Users read what was found for their tensors, and what may be wrong where nothing was."""

from __future__ import annotations

from pathlib import Path

from deltaweights.checkpoint import Gathered, Group, HeldExtents, Piece, open_checkpoint
from deltaweights.match.advice import advise, describe_parts

from ..checkpoints import Array, bf16, random_array, weights, write_safetensors


def write(folder: Path, tensors: dict[str, Array]) -> Path:
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def described(
    tmp_path: Path, layers: int, *pieces: tuple[str, tuple[int, ...]], repeats: int = 1
) -> list[str]:
    """The lines for a tensor in each layer that has these pieces, of tensors of 64 x 64."""
    names = {f"layers.{k}.{name}" for k in range(layers) for name, _ in pieces}
    base = write(tmp_path / "base", {name: bf16(weights((64, 64))) for name in sorted(names)})
    target = write(tmp_path / "target", {f"layers.{k}.ab": bf16(weights((64, 64))) for k in range(layers)})
    with open_checkpoint(base) as old, open_checkpoint(target) as new:
        found = {}
        for k, tensor in enumerate(new.tensors):
            of = [Piece(old.named(f"layers.{k}.{name}")[0], *numbers) for name, numbers in pieces]
            found[tensor] = Gathered([Group(repeats, tuple(of))], HeldExtents())
        return describe_parts(found)


def test_a_line_tells_which_rows_tensors_look_like(tmp_path: Path) -> None:
    lines = described(tmp_path, 3, ("a", (0, 0, 1024)), ("b", (64, 0, 3072)))
    assert lines == ["3 tensors, layers.*.ab, look like rows of a and b."]


def test_other_ways_have_other_words(tmp_path: Path) -> None:
    assert "looks like all of a." in described(tmp_path, 1, ("a", (0, 0, 4096)), repeats=4)[0]
    assert "look like the rows of a and b." in described(tmp_path, 2, *[(n, (0, 0, 4096)) for n in "ab"])[0]
    assert "like columns of a." in described(tmp_path, 1, ("a", (0, 1, 64, 64)), repeats=64)[0]
    assert "like parts of rows of a." in described(tmp_path, 1, ("a", (32, 64, 32)), repeats=64)[0]
    many = described(tmp_path, 1, *[(n, (0, 0, 64)) for n in "abcdef"])
    assert "a, b, c, d and 2 more" in many[0]


def test_advice_says_what_is_unlike(tmp_path: Path) -> None:
    base = {
        "layers.0.cut": bf16(weights((8, 8))),
        "layers.0.packed": bf16(weights((8, 8))),
        "same": bf16(weights((4,))),
    }
    target = {
        "layers.0.cut": bf16(weights((8, 6))),
        "layers.0.packed": random_array("U8", (8, 8)),
        "layers.0.new": bf16(weights((16, 8))),
        "layers.1.new": bf16(weights((16, 8))),
        "same": bf16(weights((4,))),
    }
    with (
        open_checkpoint(write(tmp_path / "base", base)) as old,
        open_checkpoint(write(tmp_path / "target", target)) as new,
    ):
        assert advise([tensor for tensor in new.tensors if tensor.name != "same"], old, new) == [
            "2 tensors of 16 x 8, layers.*.new, have no counterpart in the base.",
            "1 tensor of 8 x 6, layers.*.cut, has a different shape in the base, 8 x 8, "
            "and resembles no part of it.",
            "1 tensor of 8 x 8, layers.*.packed, has dtype U8, but BF16 in the base, "
            "which cannot be converted to it.",
        ]
        assert advise([], old, new) == []


def test_a_base_without_any_of_the_names_is_doubted(tmp_path: Path) -> None:
    base, target = ({f"{side}{k}": bf16(weights((2,))) for k in range(20)} for side in "bt")
    with (
        open_checkpoint(write(tmp_path / "base", base)) as old,
        open_checkpoint(write(tmp_path / "target", target)) as new,
    ):
        lines = advise(new.tensors, old, new)
        assert "is this the base" in lines[0]
        assert lines[-1] == "And 9 more such lines."


def test_what_is_small_gets_no_line_and_what_was_found_no_doubt(tmp_path: Path) -> None:
    """A quantised model whose names have a new prefix: two thirds of it were found."""
    base = {"a": bf16(weights((64, 64)))}
    target = {
        "new.a": bf16(weights((64, 64))),
        "new.fused": random_array("I8", (64, 64)),
        "new.fused_scale": bf16(weights((4, 4))),
    }
    with (
        open_checkpoint(write(tmp_path / "base", base)) as old,
        open_checkpoint(write(tmp_path / "target", target)) as new,
    ):
        unfound = [tensor for tensor in new.tensors if tensor.name != "new.a"]
        assert advise(unfound, old, new) == [
            "1 tensor of 64 x 64, new.fused, has no counterpart in the base."
        ]
