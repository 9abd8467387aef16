"""The page as a reader sees it, in Chromium: at the width of a phone, by keyboard, in the dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import DeltaReport, make_delta, report_delta
from deltaweights.changes import describe_changes, grid_of, manifest_measures
from deltaweights.changes.palette import contrast
from deltaweights.entries import BaseTensor, TensorEntry
from deltaweights.inspect import load_manifest, summarize

from ..chromium import Shown, started
from ..conftest import Trio
from ..finetunes import layer_of, moved, write_finetune

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Show = Callable[..., Shown]

HOSTILE = (
    "<script>alert(1)</script>",
    "</title><img src=https://example.org/x onerror=alert(1)>",
    "\u202eevil\u2066.layers.3.weight",
    "model.layers.0." + "very_long" * 200 + ".weight",
    "{{ 7 * 7 }}{% raw %}.layers.1.weight",
    "&lt;b&gt;.layers.2.\x00\x1b[31m.weight",
    "שלום.layers.4.مرحبا.weight",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    contexts = []

    def shown(content: bytes, *, width: int = 1000, scheme: str = "light") -> Shown:
        path = tmp_path / "report.html"
        path.write_bytes(content)
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        contexts.append(context)
        return Shown(context.new_page(), path.as_uri())

    yield shown
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DeltaReport:
    folder = tmp_path_factory.mktemp("report")

    def late(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return moved(values) if "self_attn" in name and layer_of(name) >= 3 else values

    base, target = write_finetune(folder, late)
    make_delta(base, target, folder / "delta", base_repo="org/base", target_repo="org/tuned")
    return report_delta(folder / "delta", base=base)


def hostile_report(trio: Trio) -> DeltaReport:
    """A report of a delta whose names were chosen by somebody who means harm."""
    manifest = load_manifest(trio.delta)
    entries = [entry for entry in manifest.tensors if entry.file]
    named = [replace(entry, name=name) for entry, name in zip(entries, HOSTILE, strict=False)]
    named.append(replace(named[0], name=HOSTILE[0] + "2", status="renamed", base=_base(HOSTILE[1])))
    target = replace(manifest.target, left_out=HOSTILE)
    license = replace(manifest.base.license, name=HOSTILE[0], link=HOSTILE[1], obligations=HOSTILE)
    changed = replace(
        manifest, tensors=tuple(named), target=target, base=replace(manifest.base, license=license)
    )
    grid = grid_of(changed.tensors)
    return DeltaReport(
        delta=HOSTILE[0],
        summary=summarize(changed),
        sentences=tuple(describe_changes(changed.tensors, grid)),
        tables=(),
        has_base=False,
        _grid=grid,
        _measures=tuple(manifest_measures(changed.tensors)),
        _moves=None,
    )


def _base(name: str) -> BaseTensor:
    return BaseTensor(name, "BF16", (300, 200))


def test_the_page_shows_words_figures_and_the_heat_map(report: DeltaReport, show: Show) -> None:
    shown = show(report.html())
    assert shown.page.title() == "What org/tuned changed"
    assert shown.texts("h1") == ["What org/tuned changed"]
    assert shown.texts(".said li") == list(report.sentences)
    facts = dict(zip(shown.texts("dl:first-of-type dt"), shown.texts("dl:first-of-type dd"), strict=True))
    assert facts["Base"] == "org/base"
    assert facts["Measured from"] == "base and delta, weight by weight"
    headings = shown.texts(".map thead th")
    assert headings[:4] == [f"self_attn.{one}_proj" for one in "qkvo"]
    rows = [row.split("\t") for row in shown.texts(".map:not(:has(.o)) tbody tr")]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    for row in rows:
        is_late = int(row[0]) >= 3
        assert all((float(cell) > 0) == is_late for cell in row[1:5]), row
        assert row[5:] == ["0"] * 5
    assert shown.texts(".map .o") == ["model.embed_tokens", "model.norm", "lm_head"]


def test_a_measure_is_chosen_by_keyboard(report: DeltaReport, show: Show) -> None:
    shown = show(report.html())
    page = shown.page
    before = shown.texts(".map tbody tr")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "m0"
    page.keyboard.press("ArrowDown")
    assert page.locator("input:checked").evaluate("one => one.parentElement.innerText").strip() == "Moved"
    assert len(shown.texts(".map tbody tr")) == len(before)
    assert shown.texts(".map tbody tr") != before
    assert any("bit for bit" in text for text in shown.texts(".v > p"))


def test_the_keyboard_reaches_everything_in_its_order(trio: Trio, show: Show) -> None:
    """Choices, tables that scroll, lists that open: in the page's order, each with a frame that is seen."""
    page = show(report_delta(trio.delta, base=trio.base).html()).page
    places = []
    for _ in range(40):
        page.keyboard.press("Tab")
        place = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName, e.getBoundingClientRect().top + "
            "scrollY, getComputedStyle(e).outlineStyle] })()"
        )
        if place[0] == "BODY":
            break
        places.append(place)
    assert [name for name, _, _ in places][:2] == ["INPUT", "DIV"]
    assert {name for name, _, _ in places} == {"INPUT", "DIV", "SUMMARY"}
    assert [top for _, top, _ in places] == sorted(top for _, top, _ in places)
    assert all(outline not in ("none", "") for _, _, outline in places)


def test_lists_open_by_keyboard(trio: Trio, show: Show) -> None:
    page = show(report_delta(trio.delta).html()).page
    summary = page.locator("summary", has_text="only the base has")
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("li", has_text="model.gone").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_it_fits_the_window_and_can_be_read(report: DeltaReport, show: Show, width: int, scheme: str) -> None:
    shown = show(report.html(), width=width, scheme=scheme)
    assert shown.overflow() <= 0
    colors = shown.page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
            [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
              let ground = e;
              while (ground && getComputedStyle(ground).backgroundColor == 'rgba(0, 0, 0, 0)')
                ground = ground.parentElement;
              return [getComputedStyle(e).color, getComputedStyle(ground || document.body).backgroundColor,
                      e.tagName] })"""
    )
    assert len(colors) > 50
    for ink, ground, tag in colors:
        assert contrast(_hex(ink), _hex(ground)) >= 4.5, (ink, ground, tag)
    body = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(_hex(body), "#000000") > 10) == (scheme == "light")


def _hex(color: str) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)[:3])


def test_it_loads_nothing_and_runs_nothing(report: DeltaReport, show: Show) -> None:
    content = report.html()
    assert not re.search(rb"https?://|<script|<link|<iframe|url\(|@import|\bsrc=|javascript:", content)
    shown = show(content)
    assert shown.requests == []
    assert shown.messages == []


def test_hostile_names_are_text(trio: Trio, show: Show) -> None:
    shown = show(hostile_report(trio).html(), width=360)
    assert shown.requests == []
    assert shown.messages == []
    assert shown.overflow() <= 0
    assert shown.page.evaluate("document.querySelectorAll('script, img, b, title').length") == 1
    shown.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    text = shown.page.evaluate("document.body.innerText")
    assert "<script>alert(1)</script>" in text
    assert r"\u202eevil\u2066" in text
    assert r"\x00\x1b[31m" in text
    assert "{{ 7 * 7 }}" in text
    assert not re.search("[\x00-\x08\x1b\u202a-\u202e\u2066-\u2069]", text)


def test_screen_readers_hear_names(report: DeltaReport, show: Show) -> None:
    """Every table, region and choice has a name; cells have headings."""
    page = show(report.html()).page
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("main").count() == 1
    assert page.locator("fieldset > legend").inner_text() == "What the colors show"
    nameless = "[...document.querySelectorAll('[role=region]')].filter(e => !e.ariaLabel).length"
    assert page.evaluate(nameless) == 0
    for table in page.locator("table.map").all():
        assert table.locator("caption").text_content()
        headings = table.locator("thead th[scope=col]").count()
        for row in table.locator("tbody tr").all()[:2]:
            assert row.locator("th[scope=row]").count() == 1
            assert row.locator("td").count() == max(1, headings)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_picture_is_shown_as_one(report: DeltaReport, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "changes.svg"
    path.write_bytes(report.svg())
    page = browser.new_page(color_scheme="dark")
    page.set_content(f'<img src="data:image/svg+xml,{_quoted(report.svg())}">')
    size = page.evaluate("(() => { const i = document.images[0]; return [i.naturalWidth, i.complete] })()")
    assert size == [720, True]
    shown = Shown(page, path.as_uri())
    dark = page.evaluate("getComputedStyle(document.querySelector('rect')).fill")
    assert contrast(_hex(dark), "#ffffff") > 10
    assert shown.messages == []
    page.close()


def _quoted(content: bytes) -> str:
    from urllib.parse import quote

    return quote(content)


def test_endless_manifests_make_pages_that_load(trio: Trio) -> None:
    """Thousands of layers, modules, stacks and statuses, each with a long name: at most 500 KB."""
    base = _base("x")
    entries = [
        TensorEntry(
            f"stack{n % 7}.layers.{n}.module{n % 90}{'y' * 300}.weight", "a.safetensors", "BF16", (300, 200),
            ("changed", "renamed", "added", "resized")[n % 4], None if n % 4 == 2 else base,
            0 if n % 4 == 2 else 120_000, 0, 5000 + n,
        )
        for n in range(20_000)
    ]  # fmt: skip
    manifest = load_manifest(trio.delta)
    summary = summarize(replace(manifest, tensors=tuple(entries)))
    grid = grid_of(entries)
    sentences = tuple(describe_changes(entries, grid))
    measures = tuple(manifest_measures(entries))
    made = DeltaReport("x", summary, sentences, (), False, grid, measures, None).html()
    assert len(made) < 500_000
