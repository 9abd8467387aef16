"""The front matter of a delta's card: the fine-tune's fields, copied, and the delta's own.

The fine-tune's is untrusted. It is copied as YAML nodes, so each scalar stays as it was written (``no``,
``1e-3``, ``"007"``), and nothing is made of it but text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import yaml  # type: ignore[import-untyped]

#: A field of the fine-tune, or one of the delta's own: a text or a list of texts.
Field: TypeAlias = "yaml.Node | str | Sequence[str]"

#: Above the longest front matter on the Hub (embedding models list thousands of results).
_MAX_TEXT = 1 << 18
#: What may be copied, in characters and nodes: aliases can make far more of a text than it has.
_MAX_COPIED = 1 << 20
_MAX_DEPTH = 20

_STR = "tag:yaml.org,2002:str"
_TYPED = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "timestamp")}

#: The arguments of huggingface_hub's ModelCardData that are no fields.
_NO_FIELDS = {"self", "ignore_metadata_errors", "eval_results"}

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

#: Tags that say what is false of a delta: another license or base, how to load it, where it can be deployed.
_FALSE_TAG = re.compile(
    r"(license|base_model|region|deploy):.*|.*(_compatible|-inference)|custom_code|transformers(\.js)?"
    r"|sentence-transformers|adapter-transformers|setfit|peft|diffusers|timm|unsloth|gguf|mlx|onnx|vllm"
)


class _TooMuchError(Exception):
    """The copy would be larger or deeper than any card needs."""


def plain(text: str) -> str:
    """``text`` without control characters and those that turn the direction of writing; line ends are LF."""
    return _INVISIBLE.sub("", re.sub(r"\r\n?", "\n", text))


def read_fields(text: str, relocate: Callable[[str], str] = str) -> dict[str, yaml.Node]:
    """The fields of a front matter that mean the same in another repository's, each copied.

    Args:
        text: YAML, of any origin. What cannot be read has no fields.
        relocate: gives the place of a file of the fine-tune that a field names.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader) if len(text) <= _MAX_TEXT else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(root, yaml.MappingNode):
        return {}
    copier, fields = _Copier(relocate), dict[str, yaml.Node]()
    for key, value in root.value:
        if isinstance(key, yaml.ScalarNode) and key.tag == _STR and key.value not in _NO_FIELDS:
            try:
                fields[plain(key.value)[:200]] = copier.copy(value, key.value)
            except _TooMuchError:
                continue
    if "datasets" in fields:
        fields["datasets"] = _node(list(filter(_DATASET.fullmatch, texts(fields["datasets"]))))
    if not _is_model_index(fields.get("model-index")):
        fields.pop("model-index", None)
    return {name: node for name, node in fields.items() if node.value or isinstance(node, yaml.ScalarNode)}


def texts(node: yaml.Node | None) -> list[str]:
    """A field's value as a list of texts: it may be one text or several."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [one.value for one in nodes if isinstance(one, yaml.ScalarNode) and one.value]


def true_tags(tags: Iterable[str]) -> list[str]:
    """Those of a fine-tune's tags that are true of its delta, too."""
    return [tag for tag in tags if not _FALSE_TAG.fullmatch(tag.casefold())]


def dump(fields: Mapping[str, Field]) -> str:
    """The fields as YAML, in their order."""
    pairs = [
        (_node(name), value if isinstance(value, yaml.Node) else _node(value))
        for name, value in fields.items()
    ]
    root = yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
    text: str = yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, width=float("inf"))
    return text


def _node(value: str | Sequence[str]) -> yaml.Node:
    if isinstance(value, str):
        return yaml.ScalarNode(_STR, value)
    return yaml.SequenceNode("tag:yaml.org,2002:seq", [_node(one) for one in value], flow_style=False)


class _Copier:
    """Copies nodes, so that none is shared, and counts what that takes."""

    def __init__(self, relocate: Callable[[str], str]) -> None:
        self._relocate = relocate
        self._left = _MAX_COPIED
        self._loader = yaml.SafeLoader("")

    def copy(self, node: yaml.Node, key: str, depth: int = 0) -> yaml.Node:
        """A copy of ``node``, which stands under ``key``.

        Raises:
            _TooMuchError: it is too deep, or too much was copied.
        """
        self._left -= 1 + 2 * depth + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._left < 0 or depth > _MAX_DEPTH:
            raise _TooMuchError
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if isinstance(node, yaml.SequenceNode):
            items = [self.copy(one, key, depth + 1) for one in node.value]
            return yaml.SequenceNode("tag:yaml.org,2002:seq", items, flow_style=node.flow_style)
        pairs = {  # of a key that is there twice, which the Hub refuses, the last one
            one.value: (self._scalar(one, ""), self.copy(value, one.value, depth + 1))
            for one, value in node.value
            if isinstance(one, yaml.ScalarNode) and one.tag in {_STR, *_TYPED}
        }
        return yaml.MappingNode("tag:yaml.org,2002:map", list(pairs.values()), flow_style=node.flow_style)

    def _scalar(self, node: yaml.ScalarNode, key: str) -> yaml.ScalarNode:
        if node.tag in _TYPED and self._is_value(node):
            return yaml.ScalarNode(node.tag, node.value)
        text = plain(node.value)
        if key in ("thumbnail", "src", "url"):
            text = self._relocate(text)
        return yaml.ScalarNode(_STR, text, style=node.style)

    def _is_value(self, node: yaml.ScalarNode) -> bool:
        """Whether a scalar is the number, date or such that it looks like, and is read so without a tag."""
        if self._loader.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:
            return False
        try:
            self._loader.construct_object(node)
        except (ValueError, OverflowError, KeyError, yaml.YAMLError):
            return False
        return True


def _is_model_index(node: yaml.Node | None) -> bool:
    """Whether the Hub's library can read it, which takes no card with another one."""
    if node is None:
        return False
    try:
        for model in yaml.SafeLoader("").construct_document(node):
            str(model["name"])
            for result in model["results"]:
                result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return False
    return True
