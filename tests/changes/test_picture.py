"""The picture of a heat map: well-formed, small, the same each time, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights import make_delta
from deltaweights.changes import draw_changes, grid_of, manifest_measures, step_of
from deltaweights.changes.measures import STEPS, few_digits, in_percent, one_digit
from deltaweights.changes.palette import DARK, LIGHT, contrast
from deltaweights.entries import TensorEntry

from ..finetunes import LAYERS, layer_of, moved, write_finetune
from .test_sentences import entry

SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314


def drawn(entries: tuple[TensorEntry, ...], *sentences: str) -> bytes:
    return draw_changes(grid_of(entries), manifest_measures(entries)[0], sentences)


def test_cells_that_changed_are_dark_and_others_have_no_color(tmp_path: Path) -> None:
    def late(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return moved(values) if layer_of(name) >= 4 else values

    base, target = write_finetune(tmp_path, late)
    entries = make_delta(base, target, tmp_path / "delta").tensors
    picture = parsed(drawn(entries))
    cells = {path.get("class"): path.get("d", "").count("M") for path in picture.iter(f"{SVG}path")}
    legend = len([path for path in picture.iter(f"{SVG}path") if path.get("d", "").count("M") == 1])
    assert legend >= STEPS
    modules = 9
    assert cells["s0"] == 4 * modules + 3
    assert sum(count for name, count in cells.items() if name != "s0") - STEPS < 2 * modules + STEPS
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "self_attn.q_proj" in texts
    assert "lm_head" in texts
    assert str(LAYERS - 1) in texts


def test_those_who_do_not_see_it_hear_what_it_shows() -> None:
    picture = parsed(drawn((entry("model.layers.0.a.weight"),), "Attention <changed> most."))
    assert picture.get("role") == "img"
    assert picture.findtext(f"{SVG}desc") == "Attention <changed> most."
    assert "layer" in (picture.findtext(f"{SVG}title") or "")


def test_the_picture_is_small_the_same_each_time_and_loads_nothing() -> None:
    entries = tuple(
        entry(f"model.layers.{n}.{part}.weight", status="changed", changed=n % 60, payload_bytes=n * 3)
        for n in range(80)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "a", "b")
    )
    picture = drawn(entries)
    assert picture == drawn(entries)
    assert len(picture) < 20_000
    text = picture.decode().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|url\(|<script|<image|<foreignObject|href", text)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5, unique=True))
def test_any_names_make_well_formed_pictures(names: list[str]) -> None:
    parsed(drawn(tuple(entry(name) for name in names)))


def test_endless_models_make_small_pictures() -> None:
    entries = [entry(f"model.layers.{n}.x{n % 50}.weight") for n in range(5000)]
    entries += [entry(f"tower{n}.layers.{k}.w{'x' * 500}.weight") for n in range(50) for k in range(2)]
    assert len(drawn(tuple(entries))) < 400_000


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_has_enough_contrast(palette: object) -> None:
    """4.5 to 1, as WCAG 2.2 asks (success criterion 1.4.3); and shades differ from their neighbors."""
    assert isinstance(palette, type(LIGHT))
    for ink in (palette.ink, palette.faint):
        assert contrast(ink, palette.page) >= 4.5
    for fill, ink in palette.steps:
        assert contrast(fill, ink) >= 4.5
    fills = [fill for fill, _ in palette.steps]
    assert len(set(fills)) == STEPS + 1
    assert contrast(fills[0], fills[-1]) > 7


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_is_never_lighter(first: float, second: float) -> None:
    low, high = sorted((first, second))
    steps = step_of(low, high), step_of(high, high)
    assert steps[0] is not None
    assert steps[1] is not None
    assert steps[0] <= steps[1] <= STEPS
    assert (steps[0] == 0) == (low == 0 or high == 0)


@given(st.just(0.0) | st.floats(1e-30, 1e12))
def test_figures_are_short_and_near(value: float) -> None:
    text = few_digits(value)
    assert len(text) <= 7
    assert float(text.replace("k", "e3")) == pytest.approx(value, rel=0.06, abs=0)
    assert len(one_digit(min(value, 1e5))) <= 5


def test_shares_are_numbers_of_percent() -> None:
    assert [in_percent(share) for share in (0, 0.00031, 0.27, 1)] == ["0", "0.031", "27", "100"]
