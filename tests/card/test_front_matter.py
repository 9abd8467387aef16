"""What a delta's card keeps of the fine-tune's front matter: as it was, and nothing that does harm."""

from __future__ import annotations

from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.card.front_matter import dump, read_fields, true_tags

TYPED = """\
language: [en, no]
metrics:
- accuracy
inference: false
co2_eq_emissions: {emissions: 1.50, source: "code"}
date: 2024-01-02
version: "007"
seed: 007
rate: 1e-3
none: ~
time: 12:30:45
text: |
  two
  lines
model-index:
- name: Tuned
  results:
  - task: {type: text-generation}
    dataset: {type: a/b, name: B}
    metrics:
    - {type: acc, value: 60.40, verified: yes}
"""


def test_values_stay_what_they_were() -> None:
    kept = dump(read_fields(TYPED))
    assert yaml.safe_load(kept) == yaml.safe_load(TYPED)
    for written in ("no", "60.40", "12:30:45", "1e-3", '"007"', "yes"):
        assert written in kept, "YAML 1.2, as the Hub reads it, takes other words for numbers"


names = st.text("abcdefgh_", min_size=1, max_size=8)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.dates()
    | st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(names, values.filter(lambda value: value not in ([], {})), max_size=5))
def test_any_plain_field_comes_back(fields: dict[str, Any]) -> None:
    text = yaml.safe_dump(fields, allow_unicode=True)
    assert yaml.safe_load(dump(read_fields(text))) == fields


@given(
    st.text(st.characters(codec="utf-8"), max_size=60)
    | st.text("[]{}:-!&*'\"\n <=ab1e0~|>?#%@.", max_size=60)
    | st.lists(st.sampled_from(["a: ", "&x ", "*x", "- ", "[", "]", "{", "}", "!!int ", "!!binary ", "<<: ",
        "2024-13-45", "\n", "0x", "1", '"\\u202e"', "? ", "e", "!!python/name:os.system "]),
        max_size=20).map("".join)
)  # fmt: skip
def test_whatever_is_kept_can_be_read_by_the_hubs_library(text: str) -> None:
    kept = dump(read_fields(text) or {"a": "b"})
    data: Any = ModelCard(f"---\n{kept}---\n").data
    assert all(isinstance(name, str) for name in data.to_dict())
    assert "!" not in kept or "!" in text
    assert "\u202e" not in kept
    assert "\\u202e" not in kept.lower()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x: !!python/object/apply:os.getcwd []", {}),
        ("x: !!python/name:os.system ''", {"x": ""}),
        ("x: !!int abc", {"x": "abc"}),
        ("x: 2024-13-45", {"x": "2024-13-45"}),
        ("x: 1\nx: 2", {"x": 2}),
        ("x: {a: 1, a: 2}", {"x": {"a": 2}}),
        ("1: a\nnull: b\n[c]: d\n? {e: f}\n: g", {}),
        ("self: a\nignore_metadata_errors: true\neval_results: 1", {}),
        ("x: &x [a]\ny: *x", {"x": ["a"], "y": ["a"]}),
        ("x: &x [*x]\ny: 1", {"y": 1}),
        ("<<: {a: 1}\nx: {<<: {b: 2}}\ny: 1", {"y": 1}),
        ("x: '\u202eabc\u2066'\ny: \"\\0\\x1b[0m\"", {"x": "abc", "y": "[0m"}),
        ("datasets: [a/b, ./data, /home/me/data, imdb]", {"datasets": ["a/b", "imdb"]}),
        ("model-index: 5", {}),
        ("model-index: [{name: a}]", {}),
        ("model-index: [{name: a, results: [{task: 1}]}]", {}),
        ("- a\n- b", {}),
        ("[" * 5000, {}),
        ("x: " + "[" * 100 + "]" * 100 + "\ny: 1", {"y": 1}),
        ("x: " + "9" * 5000, {"x": "9" * 5000}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_odd_and_hostile_fields(text: str, kept: dict[str, Any]) -> None:
    assert (yaml.safe_load(dump(read_fields(text))) or {}) == kept


def test_a_nest_of_aliases_is_not_written_out() -> None:
    lines = ["a0: &a0 lol"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    assert len(dump(read_fields("\n".join(lines)))) < 10 << 20


def test_a_long_text_is_not_repeated_without_end() -> None:
    text = f"a: &a {'x' * 100_000}\n" + "".join(f"b{k}: *a\n" for k in range(5000))
    assert len(dump(read_fields(text))) < 2 << 20


def test_files_that_a_field_names_are_where_they_are_now() -> None:
    text = "thumbnail: logo.png\nwidget:\n- {text: logo.png, src: a.wav, output: {url: b.png}}"
    kept = yaml.safe_load(dump(read_fields(text, lambda path: f"files/{path}")))
    assert kept == {
        "thumbnail": "files/logo.png",
        "widget": [{"text": "logo.png", "src": "files/a.wav", "output": {"url": "files/b.png"}}],
    }


def test_tags_that_would_be_false() -> None:
    tags = [
        "code",
        "Transformers",
        "license:mit",
        "base_model:adapter:a/b",
        "endpoints_compatible",
        "arxiv:1.2",
    ]
    assert true_tags(tags) == ["code", "arxiv:1.2"]
