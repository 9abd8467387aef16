"""Which layer and which module of a model a tensor belongs to, by the names alone.

Nothing here knows an architecture: a layer is what stands behind a number in many names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

#: A number in a name has no more digits, and a name no more words that are looked at.
_MOST_DIGITS, _MOST_WORDS = 6, 40

#: What a number that counts layers follows, as a word of its own or as the end of one: ``down_blocks``.
_LAYER = re.compile(r".*(?:layers?|blocks?|stages?|levels?)|h|blk|resblocks", re.IGNORECASE)

#: ``layer1`` of a ResNet, ``layers_12`` of Flax.
_NUMBERED = re.compile(r"(.*(?:layer|block|stage)s?)_?(\d{1,6})", re.IGNORECASE)

#: The last word of a name where it says what the numbers are, not which module they are in.
_PARAMETER = re.compile(
    r"(?:q?(?:weight|bias)|weight_\w+|bias_\w+|gamma|beta|kernel|embedding|qzeros|scales?|g_idx|zero_point"
    r"|running_(?:mean|var)|num_batches_tracked|lora_[AB]|.*_scale(?:_inv)?)"
)

#: So many different numbers at one place are told apart: two linear layers of an MLP, but not 128 experts.
_FEW = 4

#: What a word of a module says it is for. The last word of which one of these is true decides.
_PARTS = {
    "norms": re.compile(r".*norm.*|(?:ln|bn)_?\w{0,3}", re.IGNORECASE),
    "attention": re.compile(
        r".*att(?:n|ention).*|(?:q|k|v|o|qkv|query|key|value)(?:_(?:proj|lin))?|(?:query_key|to_[qkv]|w?qkv).*",
        re.IGNORECASE,
    ),
    "MLP": re.compile(
        r".*(?:mlp|ffn|feed_?forward|expert|moe|relu).*|ff\d?|(?:c_)?fc\d?|intermediate|dense_(?:h|4h)_to_\w+"
        r"|(?:gate|up|down|gate_up)_proj|w[123]|lin[12]",
        re.IGNORECASE,
    ),
}
#: Outside of layers these are asked first, of the whole name.
_OUTSIDE = {
    "norms": _PARTS["norms"],
    "head": re.compile(
        r".*head.*|embed_out|(?:.*\.)?classifier|score|output|.*pooler.*|qa_outputs", re.IGNORECASE
    ),
    "embeddings": re.compile(r".*embed.*|wte|wpe|shared", re.IGNORECASE),
}

#: Modules of one part stand in this order, where their last word is one of these.
_ORDER = re.compile(
    r"(?:.*[._])?(?:(?P<a>q|query|to_q|wq)|(?P<b>k|key|to_k|wk)|(?P<c>v|value|to_v|wv)|(?P<d>o|out|to_out|wo)"
    r"|(?P<e>gate)|(?P<f>up)|(?P<g>down))(?:_proj|_lin|_attn)?"
)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where in a model a tensor is.

    Attributes:
        stack: the words before its layer's number, such as ``model.layers``; empty outside of layers.
        layer: that number; None outside of layers.
        module: the other words, without the parameter's own, such as ``self_attn.q_proj``. Numbers that take
            many values, such as those of experts, are ``*``.
        part: what the module is for: "attention", "MLP", "norms", "embeddings", "head"; else its first word,
            or "weights" where there is none.
    """

    stack: str
    layer: int | None
    module: str
    part: str

    @property
    def order(self) -> tuple[int, str]:
        """Sorts modules as people expect them: attention, MLP, others, norms; q, k, v, o; gate, up, down."""
        parts = ("embeddings", "attention", "MLP", "", "norms", "head")
        found = _ORDER.fullmatch(self.module)
        rank = parts.index(self.part) if self.part in parts else parts.index("")
        return rank, f"{found.lastgroup if found else '~'} {self.module}"


def place_tensors(names: Collection[str]) -> dict[str, TensorPlace]:
    """The place of each tensor, by its name.

    Args:
        names: those of all tensors of one model: which numbers count layers follows from all of them.
    """
    split = {name: _words(name) for name in names}
    values: dict[tuple[str, ...], set[str]] = {}
    for words in split.values():
        for position in _numbers(words):
            values.setdefault(_folded(words[:position]), set()).add(words[position])
    return {name: _place(words, values) for name, words in split.items()}


def _words(name: str) -> list[str]:
    words: list[str] = []
    for word in re.split(r"[./]", name, maxsplit=_MOST_WORDS):
        numbered = _NUMBERED.fullmatch(word)
        words += numbered.groups() if numbered else [word]
    return words


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= _MOST_DIGITS


def _numbers(words: list[str]) -> list[int]:
    return [position for position, word in enumerate(words) if _is_number(word)]


def _folded(words: list[str]) -> tuple[str, ...]:
    return tuple("*" if _is_number(word) else word for word in words)


def _place(words: list[str], values: dict[tuple[str, ...], set[str]]) -> TensorPlace:
    numbers = _numbers(words)
    counts = {position: len(values[_folded(words[:position])]) for position in numbers}
    named = (p for p in numbers if p and _LAYER.fullmatch(words[p - 1]))
    varied = (p for p in numbers if counts[p] > 1 and p + 2 < len(words))
    layer = next(named, next(varied, None))
    shown = ["*" if counts.get(p, 0) > _FEW else word for p, word in enumerate(words)]
    rest = shown if layer is None else shown[layer + 1 :] or words[layer - 1 : layer]
    if len(rest) > 1 and _PARAMETER.fullmatch(rest[-1]):
        rest = rest[:-1]
    module = ".".join(rest) or "(unnamed)"
    if layer is None:
        return TensorPlace("", None, module, _part(rest, is_outside=True))
    stack = ".".join(words[:layer]) or "(top level)"
    return TensorPlace(stack, int(words[layer]), module, _part(rest, is_outside=False))


def _part(words: list[str], *, is_outside: bool) -> str:
    for patterns in (_OUTSIDE, _PARTS) if is_outside else (_PARTS,):
        for word in reversed(words):
            for part, pattern in patterns.items():
                if pattern.fullmatch(word):
                    return part
    if words[0] == "output":  # BERT's second half of the MLP
        return "MLP"
    named = (word for word in words if word and word != "*" and not _is_number(word))
    return next((word for word in named if not _PARAMETER.fullmatch(word)), "weights")
