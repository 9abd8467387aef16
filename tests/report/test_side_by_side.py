"""Fine-tunes of one base side by side: against NumPy, in words, and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from deltaweights import BaseMismatchError, DeltaError, make_delta, report_side_by_side
from deltaweights.cli.commands import app
from deltaweights.report.overlaps import Overlap, combined_overlap

from ..checkpoints import f32, write_safetensors
from ..chromium import Shown, started
from ..conftest import Trio
from ..finetunes import Update, layer_of, llama, moved

BASE = llama(layers=3)


def attention(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if "self_attn" in name else values


def attention_and_further(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same direction, twice as far."""
    return values + 2 * (moved(values) - values) if "self_attn" in name else values


def attention_another_way(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values, seed=99) if "self_attn" in name else values


def back(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values - (moved(values) - values) if "self_attn" in name else values


def mlp_of_layer_1(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if "mlp" in name and layer_of(name) == 1 else values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, and a delta of each fine-tune above, by its name."""
    made = tmp_path_factory.mktemp("side-by-side")
    write_safetensors(made / "base" / "model.safetensors", {name: f32(v) for name, v in BASE.items()})
    updates: list[Update] = [
        attention, attention_and_further, attention_another_way, back, mlp_of_layer_1,
    ]  # fmt: skip
    for update in updates:
        name = update.__name__
        tensors = {tensor: f32(update(tensor, values)) for tensor, values in BASE.items()}
        write_safetensors(made / f"{name}-target" / "model.safetensors", tensors)
        make_delta(made / "base", made / f"{name}-target", made / name, chunk_bytes=4096)
    return made


@pytest.mark.parametrize(
    ("names", "cosine", "same", "said"),
    [
        (("attention", "attention_and_further"), 1, 1, "point the same way"),
        (("attention", "attention_another_way"), 0, 1, "are nearly at right angles"),
        (("attention", "back"), -1, 1, "point opposite ways"),
        (("attention", "mlp_of_layer_1"), 0, 0, "attention and mlp_of_layer_1 moved no weight in common."),
    ],
)
def test_directions_and_weights_are_compared(
    names: tuple[str, str], cosine: float, same: float, said: str, folder: Path
) -> None:
    report = report_side_by_side([folder / name for name in names], base=folder / "base")
    (pair,) = report.pairs
    assert pair.cosine == pytest.approx(cosine, abs=0.05)
    assert pair.same_weights == pytest.approx(same, abs=0.01)
    assert pair.same_tensors == same
    assert report.labels == names
    assert any(said in text for text in report.sentences)


def test_figures_are_those_of_numpy(folder: Path) -> None:
    report = report_side_by_side(
        [folder / "attention", folder / "attention_another_way"], base=folder / "base", threads=2
    )
    found: Any = report.to_dict()
    name = "model.layers.2.self_attn.q_proj.weight"
    moves = [update(name, BASE[name]) - BASE[name] for update in (attention, attention_another_way)]
    (cell,) = [one for one in found["layers"] if (one["layer"], one["module"]) == (2, "self_attn.q_proj")]
    expected = np.vdot(moves[0], moves[1]) / np.linalg.norm(moves[0]) / np.linalg.norm(moves[1])
    assert cell["cosine_0_1"] == pytest.approx(expected, abs=1e-5)
    assert cell["relative_0"] == pytest.approx(
        np.linalg.norm(moves[0]) / np.linalg.norm(BASE[name]), rel=1e-4
    )
    assert cell["same_weights_0_1"] > 0.99
    untouched = [one for one in found["layers"] if one["module"].startswith("mlp")]
    assert untouched
    assert not any("cosine_0_1" in one for one in untouched)
    json.dumps(found, allow_nan=False)


def test_without_the_base_tensors_are_compared(folder: Path) -> None:
    names = "attention", "mlp_of_layer_1", "back"
    report = report_side_by_side([folder / name for name in names])
    assert [(one.first, one.second, one.same_tensors) for one in report.pairs] == [
        (0, 1, 0),
        (0, 2, 1),
        (1, 2, 0),
    ]
    assert all(one.cosine is None and one.same_weights is None for one in report.pairs)
    assert (
        "attention and back: of the weights in tensors that either changed, 100% are in tensors of both."
        in (report.sentences)
    )


def test_fine_tunes_of_other_bases_are_refused(folder: Path, trio: Trio) -> None:
    with pytest.raises(BaseMismatchError, match="not made from one base"):
        report_side_by_side([folder / "attention", trio.delta])
    with pytest.raises(BaseMismatchError):
        report_side_by_side([folder / "attention", folder / "back"], base=trio.base)
    for count in (0, 1, 9):
        with pytest.raises(DeltaError, match=f"{count} deltas"):
            report_side_by_side([folder / "attention"] * count)


def test_every_status_can_be_compared(trio: Trio, tmp_path: Path) -> None:
    """With itself, the other one cut into other chunks."""
    make_delta(trio.base, trio.target, tmp_path / "again", chunk_bytes=4096)
    report = report_side_by_side([trio.delta, tmp_path / "again"], base=trio.base)
    (pair,) = report.pairs
    assert pair.cosine == pytest.approx(1, abs=1e-6)
    assert (pair.same_tensors, pair.same_weights) == (1, 1)


def test_the_command_prints_words_and_writes_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    deltas = [str(folder / "attention"), str(folder / "back")]
    done = CliRunner().invoke(app, ["report", *deltas, "--base", str(folder / "base"), "-o", str(page), "-q"])
    assert done.exit_code == 0, done.output
    with started() as browser:
        shown = Shown(browser.new_page(viewport={"width": 360, "height": 800}), page.as_uri())
        assert shown.page.title() == "2 fine-tunes of one base, side by side"
        assert shown.texts(".said li")[0].endswith("Their updates point opposite ways: cosine -1.")
        rows = shown.texts("table.list tbody tr")
        assert re.split(r"\t", rows[-1])[0] == "attention and back"
        labels = [text.strip() for text in shown.texts("fieldset label")]
        assert labels == [
            "attention",
            "back",
            "Cosine: attention and back",
            "Same weights: attention and back",
        ]
        shown.page.get_by_role("radio", name="Cosine: attention and back").check()
        cells = shown.texts(".v2 .map:not(:has(.o)) tbody tr")
        assert cells[0].split("\t")[1:6] == ["-1", "-1", "-1", "-1", "·"]
        assert shown.overflow() <= 0
        assert shown.requests == []
        assert shown.messages == []
    refused = CliRunner().invoke(app, ["report", *deltas, "--svg", str(tmp_path / "x.svg")])
    assert refused.exit_code == 2


def test_shades_of_fine_tunes_can_be_compared(folder: Path, tmp_path: Path) -> None:
    """The one that moved twice as far is darker."""
    report = report_side_by_side(
        [folder / "attention", folder / "attention_and_further"], base=folder / "base"
    )
    first, second = (
        set(re.findall(r'<td class="s(\d)">(?!0<)', part))
        for part in report.html().decode().split('<div class="v v')[1:3]
    )
    assert max(first) < min(second)


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=1, max_size=20))
def test_overlaps_add_up(pairs: list[tuple[float, float]]) -> None:
    def of(part: list[tuple[float, float]]) -> Overlap:
        first, second = np.array(part, np.float64).reshape(-1, 2).T
        both = int(np.count_nonzero((first != 0) & (second != 0)))
        either = int(np.count_nonzero((first != 0) | (second != 0)))
        return Overlap(both, either, float(first @ second), (float(first @ first), float(second @ second)))

    whole, half = of(pairs), len(pairs) // 2
    parts = combined_overlap([of(pairs[:half]), of(pairs[half:])])
    assert (parts.both, parts.either) == (whole.both, whole.either)
    if whole.cosine is not None and min(whole.squares) > 1e-30:
        assert parts.cosine == pytest.approx(whole.cosine, abs=1e-9)
        assert -1 <= parts.cosine <= 1  # type: ignore[operator]
