"""The text of tokens, from the tokenizer.json that lies beside a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from ..delta.target_recipe import TargetRecipe
from ..errors import DeltaWeightsError

_NAME = "tokenizer.json"

#: Larger ones are not read.
_MOST_BYTES = 1 << 26


class _Added(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: Any = None


class _Tokenizer(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    added_tokens: list[_Added] = []
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"")
    decoder: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """Some tokens of a vocabulary: their texts by id, and how many the vocabulary has."""

    texts: dict[int, str]
    count: int


def token_texts(target: TargetRecipe, wanted: Collection[int]) -> TokenTexts:
    """The text of some tokens of the target, by their ids.

    Args:
        wanted: the ids.

    Returns:
        Those that its tokenizer knows; none if it has no tokenizer.json that can be read.
    """
    file = next((file for file in target.manifest.target.files if file.path == _NAME), None)
    if file is None or file.size > _MOST_BYTES or not wanted:
        return _NONE
    try:
        return read_tokens(b"".join(target.blocks(file)), wanted)
    except DeltaWeightsError:
        return _NONE


def read_tokens(data: bytes, wanted: Collection[int]) -> TokenTexts:
    """:func:`token_texts` from the bytes of a tokenizer.json. One that is damaged knows no tokens."""
    try:
        tokenizer = msgspec.json.decode(data, type=_Tokenizer)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _NONE
    ids, vocab = set(wanted), tokenizer.model.vocab
    if isinstance(vocab, dict):
        found = {number: text for text, number in vocab.items() if isinstance(number, int) and number in ids}
    elif isinstance(vocab, list):  # of pairs with scores
        pairs = {number: vocab[number] for number in ids if 0 <= number < len(vocab)}
        found = {n: p[0] for n, p in pairs.items() if isinstance(p, list) and p and isinstance(p[0], str)}
    else:
        return _NONE
    is_bytes = b'"ByteLevel"' in bytes(tokenizer.decoder) or b'"ByteLevel"' in bytes(tokenizer.pre_tokenizer)
    texts = {number: _decoded(text) if is_bytes else text.replace("▁", " ") for number, text in found.items()}
    texts |= {one.id: one.content for one in tokenizer.added_tokens if one.id in ids}
    return TokenTexts(texts, len(vocab))


_NONE = TokenTexts({}, 0)


def _decoded(text: str) -> str:
    """A token of a byte-level vocabulary, in which characters stand for bytes. Those that are no whole
    character are shown as the replacement character."""
    table = _bytes_of_characters()
    if not all(character in table for character in text):
        return text
    return bytes(table[character] for character in text).decode("utf-8", "replace")


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character stands for: printable ones for themselves, and from U+0100 on, in order,
    for all others. As in Radford et al.: Language models are unsupervised multitask learners (2019)."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): byte for byte in own}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
