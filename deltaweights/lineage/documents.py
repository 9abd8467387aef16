"""What models say of themselves: the bases that cards and configs name, how configs and tokenizers differ.

All of it is untrusted: it decides nothing that the weights do not allow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from ..checkpoint import Checkpoint
from ..license.cards import base_models_of, read_base_models
from ..storage import Source, Span

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_MOST_CONFIG_BYTES = 1 << 20

#: Most differences that are told, and most characters of a value.
_MOST_DIFFERENCES, _MOST_TEXT = 64, 120

#: Fields that differ in every copy.
_PASSING = ("_name_or_path", "transformers_version", "_commit_hash")

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?=\.|$)", re.ASCII)

#: What a tokenizer's vocabulary stands in.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json",
    "merges.txt",
)  # fmt: skip

#: Blocks by which two files of a size are compared.
_BLOCKS, _BLOCK_BYTES = 4, 4096

#: Whether two tokenizers have the same vocabulary; absent where one of the models has none.
TokenizerMatch = Literal["same", "different", "absent"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of the config that differs: its path, and the values as JSON; None where it is missing."""

    field: str
    model: str | None
    candidate: str | None


@dataclass(frozen=True, slots=True)
class Documents:
    """What stands beside a model's weights.

    Attributes:
        names: what others may call the model: its Hub id, its folder's name.
        bases: the Hub ids that its card and config name as what it was made from, without the model's own.
        config: fields of its config and their values, by path.
        version: that of the transformers library that wrote the config; empty if unknown.
    """

    names: frozenset[str]
    bases: tuple[str, ...]
    config: Mapping[str, object]
    version: tuple[int, ...]

    def names_as_base(self, other: Documents) -> bool:
        """Whether this model says that it was made from the other one."""
        return is_named(self.bases, other.names)

    def is_newer_than(self, other: Documents) -> bool | None:
        """Whether its config was written by a later version of the library than the other's; None if that
        is not known, or the version is the same."""
        if not self.version or not other.version or self.version == other.version:
            return None
        return self.version > other.version

    def shares_base(self, other: Documents) -> bool:
        """Whether both say that they were made from the same model."""
        return is_named(self.bases, {base.casefold() for base in other.bases})


def names_of(checkpoint: Checkpoint, repo_id: str | None = None) -> frozenset[str]:
    """What others may call a model, in lower case."""
    root = checkpoint.source.root
    names = (repo_id, checkpoint.source.hub_id.repo_id, root.resolve().name if root else None)
    return frozenset(name.casefold() for name in names if name)


def is_named(models: Collection[str], names: Collection[str]) -> bool:
    """Whether one of the Hub ids is one of the names, or ends in it."""
    return any({model.casefold(), model.casefold().rpartition("/")[2]} & set(names) for model in models)


def read_documents(checkpoint: Checkpoint) -> Documents:
    """Read a model's card and config. What cannot be parsed says nothing.

    Raises:
        CheckpointError: a file cannot be read.
    """
    source, names = checkpoint.source, names_of(checkpoint)
    config = _json(source, _CONFIG)
    told = [
        *read_base_models(source),
        *base_models_of(config.get("_name_or_path")),
        *base_models_of(_json(source, _ADAPTER).get("base_model_name_or_path")),
    ]
    bases = tuple(dict.fromkeys(base for base in told if not is_named([base], names)))
    version = _VERSION.match(str(config.get("transformers_version")))
    numbers = tuple(int(number) for number in version.groups()) if version else ()
    return Documents(names, bases, dict(_flat(config)), numbers)


def _json(source: Source, path: str) -> Mapping[str, object]:
    """The object in a small JSON file; an empty one if there is none."""
    if not 0 < source.sizes.get(path, 0) <= _MOST_CONFIG_BYTES:
        return {}
    try:
        return msgspec.json.decode(b"".join(source.blocks(path)), type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return {}


def _flat(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """The fields, those of one nested object (``text_config``) each by itself."""
    for key, value in config.items():
        if isinstance(value, dict) and not path:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{path}{key}", value


def config_differences(model: Documents, candidate: Documents) -> tuple[Difference, ...]:
    """The fields in which the configs differ, if both models have one."""
    ours, theirs = model.config, candidate.config
    if not ours or not theirs:
        return ()
    fields = [field for field in {**ours, **theirs} if field.rpartition(".")[2] not in _PASSING]
    pairs = ((field, _text(ours, field), _text(theirs, field)) for field in fields)
    found = [Difference(field, _short(one), _short(other)) for field, one, other in pairs if one != other]
    return tuple(found[:_MOST_DIFFERENCES])


def _text(config: Mapping[str, object], field: str) -> str | None:
    return json.dumps(config[field], ensure_ascii=False, sort_keys=True) if field in config else None


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"


def compare_tokenizers(model: Source, candidate: Source) -> TokenizerMatch:
    """Whether two models have the same tokenizer, by published digests, sizes, and some blocks."""
    common = [path for path in _TOKENIZERS if path in model.sizes and path in candidate.sizes]
    if not common:
        return "absent"
    return "same" if all(_is_equal(model, candidate, path) for path in common) else "different"


def _is_equal(model: Source, candidate: Source, path: str) -> bool:
    size = model.sizes[path]
    if size != candidate.sizes[path]:
        return False
    digests = model.told_sha256(path), candidate.told_sha256(path)
    if all(digests):
        return digests[0] == digests[1]
    starts = sorted({max(0, size - _BLOCK_BYTES) * k // (_BLOCKS - 1) for k in range(_BLOCKS)})
    spans = [Span(path, start, min(start + _BLOCK_BYTES, size)) for start in starts]
    return _read(model, spans) == _read(candidate, spans)


def _read(source: Source, spans: list[Span]) -> list[bytes]:
    return [source.open(path).read(start, end - start) for path, start, end in spans]
