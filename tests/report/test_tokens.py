"""Token texts from tokenizer.json, as real tokenizers have it, and from damaged ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.report.tokens import read_tokens


def read(document: Any, *wanted: int) -> dict[int, str]:
    return read_tokens(json.dumps(document).encode(), wanted).texts


def test_bytes_are_turned_into_text() -> None:
    document = {
        "model": {"vocab": {"Ġhello": 0, "Ã©": 1, "Ċ": 2, "æ": 3, "not used": 4}},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
        "added_tokens": [{"id": 7, "content": "<|end|>"}],
    }
    assert read(document, 0, 1, 2, 3, 7) == {0: " hello", 1: "é", 2: "\n", 3: "\ufffd", 7: "<|end|>"}


def test_sentencepiece_marks_spaces() -> None:
    assert read({"model": {"vocab": {"▁the": 5, "[CLS]": 6}}}, 5, 6) == {5: " the", 6: "[CLS]"}


def test_unigram_models_list_pairs() -> None:
    assert read({"model": {"vocab": [["<s>", 0.0], ["▁a", -3.5]]}}, 0, 1, 2, -1) == {0: "<s>", 1: " a"}


@pytest.mark.parametrize(
    "document",
    [
        {}, [], None, {"model": 1}, {"model": {"vocab": {"a": "x"}}},
        {"model": {"vocab": [1, ["a"], [2, 3]]}},
        {"added_tokens": [{"id": "x"}]}, {"model": {"vocab": "text"}},
    ],
)  # fmt: skip
def test_other_documents_know_few_tokens(document: Any) -> None:
    assert set(read(document, 0, 1, 2)) <= {1}


@given(st.binary(max_size=200))
def test_any_bytes_are_read(data: bytes) -> None:
    assert set(read_tokens(data, [0, 1]).texts) <= {0, 1}


def test_what_every_tokenizer_of_bytes_calls_them_is_known() -> None:
    """All 256 bytes, against the library's own alphabet."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: k for k, character in enumerate(alphabet)}
    document = {"model": {"vocab": vocab}, "decoder": {"type": "ByteLevel"}}
    texts = read(document, *range(256))
    decode = tokenizers.decoders.ByteLevel().decode
    assert [texts[k] for k in range(256)] == [decode([c]) for c in alphabet]
