"""Which base tensor each target tensor is compared with: by name or rename rule, by the words that both
sides' names share, by equal or similar bytes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Base, Checkpoint, Gathered, HeldExtents, Tensor
from ..checkpoint.oddities import tell
from ..codec import Predictor, convert, element_bytes, is_convertible, rescale
from ..dtypes import DTYPE_BITS
from ..errors import DeltaWeightsError
from .advice import advise, describe_parts
from .parts import find_parts
from .similarity import find_similar

_log = logging.getLogger(__name__)


class _Blocks(NamedTuple):
    """Blocks that are compared to find two tensors equal: at most so many, each of so many bytes, with at
    most so many candidates."""

    most: int
    nbytes: int
    candidates: int | None = None


_WHOLE_BLOCKS, _GLANCE_BLOCKS = _Blocks(64, 1 << 20), _Blocks(4, 4 << 10, 1024)

#: The part of the target's weights without a base that is worth a word.
_MUCH = 0.02

#: Bounds of the search for common prefixes: names with the same ending, and pairs of prefixes.
_MAX_NAMES = 64
_MAX_PAIRS = 64

#: A rename rule: a regular expression, searched in a target tensor's name, and its replacement (``re.sub``),
#: which gives the base tensor's name.
RenameRule = tuple[str, str]

_Key = tuple[str, tuple[int, ...]]

CompiledRule = tuple[re.Pattern[str], str]


@dataclass(frozen=True, slots=True)
class FoundPrediction:
    """A prediction that was found for a tensor.

    Attributes:
        method: as the manifest names it.
        stored: its bytes, as they stand in the payload.
        predictor: the prediction itself.
        rank: for people, of a low-rank one.
    """

    method: Literal["quantized", "low_rank"]
    stored: bytes
    predictor: Predictor
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A target tensor and the base tensor to code it against, if any, or parts of several. The first
    ``shared_bytes`` bytes of the target tensor have counterparts there.

    ``prediction`` makes the base more like the target. ``like`` is another tensor of the target with the same
    bytes, which is coded in its place; ``shared_bytes`` is 0 then."""

    target: Tensor
    base: Base | None
    shared_bytes: int
    like: Tensor | None = None
    prediction: FoundPrediction | None = None

    def read(self, start: int, end: int) -> NDArray[np.uint8]:
        """The target tensor's bytes ``start`` to ``end``."""
        return _read(self.target, start, end)

    def read_base(self, start: int, end: int) -> NDArray[np.uint8]:
        """The base tensor's bytes, in its own dtype, for the target tensor's bytes ``start`` to ``end``."""
        assert self.base is not None
        dtypes = self.target.dtype, self.base.dtype
        return _read(self.base, rescale(start, *dtypes), rescale(end, *dtypes))

    def compared(self, base: NDArray[np.uint8], start: int) -> NDArray[np.uint8]:
        """What the target's bytes from ``start`` on are compared with: the base's, from :meth:`read_base`, in
        the target's dtype and as :attr:`prediction` changes them."""
        assert self.base is not None
        if self.prediction:
            return self.prediction.predictor.predict(base, start // element_bytes(self.target.dtype, start))
        return convert(base, self.base.dtype, self.target.dtype)


def _read(tensor: Base, start: int, end: int) -> NDArray[np.uint8]:
    out = np.empty(end - start, np.uint8)
    tensor.read_into(start, out)
    return out


def match_tensors(base: Checkpoint, target: Checkpoint, rename: Sequence[RenameRule] = ()) -> list[Match]:
    """A match for every tensor of ``target``, in the order of ``target.tensors``.

    Raises:
        DeltaWeightsError: a rename rule is not a valid regular expression or replacement.
        CheckpointError: a file of the base is broken that should hold a tensor of the target's.
    """
    names = Names(compile_rules(rename), (tensor.name for tensor in target.tensors))
    found = _search(names, base, target)
    for line in describe_parts(found.parts):
        _log.info("%s", line)
    tell(names.useless(lambda name: bool(base.named(name))))
    if _is_much([*found.unfound, *found.unlike], target):
        tell(advise(found.unfound, base, target, found.unlike))
    for tensor in found.unfound if base.broken else ():
        base.require_found(names.of_base(tensor.name), tensor.path)
    return found.matches(target)


@dataclass(frozen=True, slots=True)
class Glance:
    """Bounds of a search for matches that is to stay cheap: what it does not find is not compared.

    Attributes:
        sampled: the target tensors that are compared by samples, over a network, too.
        cost: what the search for parts of tensors may cost, in small reads. There is none over a network.
    """

    sampled: Collection[Tensor]
    cost: float


def glance_at_matches(base: Checkpoint, target: Checkpoint, glance: Glance) -> list[Match]:
    """Like :func:`match_tensors`, but cheap, and without a word on what is odd."""
    names = Names((), (tensor.name for tensor in target.tensors))
    return _search(names, base, target, glance).matches(target)


class _Found(NamedTuple):
    """What was found for target tensors: a whole base tensor, or parts; nothing; or, by name only, one that
    is unlike them."""

    whole: dict[Tensor, Tensor]
    parts: dict[Tensor, Gathered]
    unfound: list[Tensor]
    unlike: list[Tensor]

    def matches(self, target: Checkpoint) -> list[Match]:
        """A match for every tensor of the target."""
        return [
            match_pair(tensor, self.parts.get(tensor) or self.whole.get(tensor)) for tensor in target.tensors
        ]


def _search(names: Names, base: Checkpoint, target: Checkpoint, glance: Glance | None = None) -> _Found:
    whole = _match_named(names, base, target)
    lone = [tensor for tensor in target.tensors if tensor not in whole]
    if glance:
        chosen = set(glance.sampled)
        lone = [tensor for tensor in lone if tensor in chosen]
    whole |= _match_bytes(lone, base, target, _GLANCE_BLOCKS if glance else _WHOLE_BLOCKS)
    unmatched = [tensor for tensor in target.tensors if tensor not in whole]
    by_name = {  # a rule is the user's word
        tensor: other
        for tensor, other in whole.items()
        if tensor.info.numel == other.info.numel and names.of_base(tensor.name) == tensor.name
    }
    similar = find_similar(by_name, unmatched, base, target, glance.sampled if glance else None)
    whole |= similar.found
    wanted = [tensor for tensor in unmatched if tensor not in whole]
    if glance:
        parts = find_parts(wanted, base, target, set(whole.values()), HeldExtents(), glance.cost)
    else:
        wanted += similar.doubtful
        parts = find_parts(wanted, base, target, set(whole.values()), HeldExtents())
    unfound = [tensor for tensor in unmatched if tensor not in whole and tensor not in parts]
    return _Found(whole, parts, unfound, [tensor for tensor in similar.doubtful if tensor not in parts])


def _is_much(tensors: Iterable[Tensor], target: Checkpoint) -> bool:
    """Whether these make a good part of the target's weights."""
    return sum(tensor.nbytes for tensor in tensors) > _MUCH * sum(tensor.nbytes for tensor in target.tensors)


def _match_named(names: Names, base: Checkpoint, target: Checkpoint) -> dict[Tensor, Tensor]:
    """The base tensor of each target tensor that has one by its name or by words that names share."""
    found: dict[Tensor, Tensor] = {}
    for tensor in target.tensors:
        if candidate := find_named(base, names.of_base(tensor.name), tensor):
            found[tensor] = candidate
    for search in (_match_common_words, _match_prefixes):
        used = set(found.values())
        unmatched = [tensor for tensor in target.tensors if tensor not in found]
        found |= search(unmatched, [tensor for tensor in base.tensors if tensor not in used])
    return found


def find_named(base: Checkpoint, name: str, target: Tensor) -> Tensor | None:
    """The base tensor called ``name``; of several, one that ``target`` can be compared with, of its dtype."""

    def misfit(tensor: Tensor) -> tuple[bool, ...]:
        return not _shared_bytes(target, tensor), tensor.dtype != target.dtype

    return base.closest(name, target.path, misfit)


class Names:
    """The base's names for the tensors of a target, by rename rules, one after the other.

    A rule that fits names of the target's own does not take up what an earlier rule put in: else
    ``layers.3=layers.2`` and ``layers.2=layers.1`` would move layer 3 twice.

    Args:
        rules: as :func:`compile_rules` gives them.
        names: of all of the target's tensors.
    """

    def __init__(self, rules: Sequence[CompiledRule], names: Iterable[str]) -> None:
        self._rules = rules
        self._by_name: dict[str, str] = {}
        self._results: list[set[str]] = [set() for _ in rules]
        given = set(names)
        self._fits_own = [any(map(pattern.search, given)) for pattern, _ in rules]
        for name in given:
            self._by_name[name] = self._rename(name)

    def of_base(self, name: str) -> str:
        """The name to look for in the base."""
        return self._by_name.get(name, name)

    def useless(self, is_in_base: Callable[[str], bool]) -> Iterator[str]:
        """What to say of rules that had no effect. ``is_in_base`` says whether the base has a name."""
        for (pattern, replacement), results in zip(self._rules, self._results, strict=True):
            rule = f"The rename rule {f'{pattern.pattern}={replacement}'!r}"
            if not results:
                yield f"{rule} changed no name."
            elif not any(map(is_in_base, results)):
                yield f"{rule} gave names that the base does not have, such as {min(results)!r}."

    def _rename(self, given: str) -> str:
        name, put_in = given, [False] * len(given)  # for each character, whether a rule put it in
        changed = []
        for index, (pattern, replacement) in enumerate(self._rules):
            is_meant_for_others = self._fits_own[index] and not pattern.search(given)
            parts, marks, position = [], [], 0
            for match in pattern.finditer(name):
                start, end = match.span()
                if is_meant_for_others and any(put_in[start:end]):
                    continue
                text = match.expand(replacement)
                parts += [name[position:start], text]
                marks += [*put_in[position:start], *[True] * len(text)]
                position = end
            if position or parts:
                before = name
                name, put_in = "".join(parts) + name[position:], marks + put_in[position:]
                changed += [index] if name != before else []
        for index in changed:
            self._results[index].add(name)
        return name


def compile_rules(rename: Sequence[RenameRule]) -> list[CompiledRule]:
    """The rules, checked, for :class:`Names`.

    Raises:
        DeltaWeightsError: one is not a valid regular expression or replacement.
    """
    compiled = []
    for pattern, replacement in rename:
        try:
            compiled.append((re.compile(pattern), replacement))
            compiled[-1][0].sub(replacement, "")
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise DeltaWeightsError(
                f"The rename rule {pattern}={replacement} is not valid",
                f"{error}.".capitalize(),
                r"Rules look like '^model\.=language_model.model.' (target's name = base's name).",
            ) from error
    return compiled


def match_pair(target: Tensor, base: Base | None) -> Match:
    """Match a target tensor with the base tensor found for it, or with parts."""
    if isinstance(base, Gathered):
        dtypes = base.dtype, target.dtype
        is_known = dtypes[0] == dtypes[1] or is_convertible(*dtypes)
        return Match(target, base, min(rescale(base.nbytes, *dtypes), target.nbytes) if is_known else 0)
    return Match(target, base, _shared_bytes(target, base) if base else 0)


def _shared_bytes(target: Tensor, base: Tensor) -> int:
    """The number of leading bytes of ``target`` with a counterpart in ``base``: all, or whole rows if only
    the number of rows differs (a vocabulary that grew or shrank)."""
    new, old = target.info, base.info
    if new.dtype != old.dtype and not is_convertible(old.dtype, new.dtype):
        return 0
    if new.shape == old.shape or new.numel == old.numel:
        same_size = new.dtype != old.dtype or new.nbytes == old.nbytes
        return new.nbytes if same_size else 0
    if not new.shape or not old.shape or new.shape[1:] != old.shape[1:] or not DTYPE_BITS.get(new.dtype):
        return 0
    rows = min(new.shape[0], old.shape[0])
    return rows * new.nbytes // new.shape[0] if new.shape[0] else 0


def _match_common_words(unmatched: Sequence[Tensor], free: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Match names that are the same without the words that only one side uses, wherever they stand: what
    wrappers put in (``_orig_mod.``, ``_fsdp_wrapped_module.``, ``module.``). Numbers are not such words."""
    ours, theirs = _words(unmatched), _words(free)
    common = ours & theirs

    def key(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
        words = (word for word in tensor.info.name.split(".") if word in common or word.isdigit())
        return ".".join(words), tensor.info.shape

    targets, bases = _by_key(unmatched, key), _by_key(free, key)
    found = {
        tensors[0]: bases[name][0]
        for name, tensors in targets.items()
        if name[0] and len(tensors) == 1 and len(bases.get(name, ())) == 1
    }
    return found if len(found) > 1 else {}  # one name alone shows no consistent difference


def _words(tensors: Iterable[Tensor]) -> set[str]:
    return {word for tensor in tensors for word in tensor.info.name.split(".")}


def _by_key(tensors: Iterable[Tensor], key: Callable[[Tensor], _Key]) -> dict[_Key, list[Tensor]]:
    found: dict[_Key, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(key(tensor), []).append(tensor)
    return found


def _match_prefixes(unmatched: Iterable[Tensor], free: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Match names that differ only in a leading part, such as ``model.`` and ``language_model.model.``.

    The pair of prefixes that explains most tensors wins, then the next, until a pair explains only one
    tensor. Endings that very many names share, and pairs far down the list, are skipped: names are untrusted,
    and the time must not grow with the square of their number.
    """
    by_name = {tensor.info.name: tensor for tensor in free}
    left = {tensor.info.name: tensor for tensor in unmatched}
    by_suffix: dict[str, list[str]] = {}
    for name in by_name:
        for suffix in _suffixes(name):
            by_suffix.setdefault(suffix, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, tensor in left.items():
        for suffix in _suffixes(name):
            others = by_suffix.get(suffix, [])
            for other in others if len(others) <= _MAX_NAMES else ():
                if by_name[other].info.shape == tensor.info.shape:
                    votes[name.removesuffix(suffix), other.removesuffix(suffix)] += 1
    found: dict[Tensor, Tensor] = {}
    for (new, old), count in votes.most_common(_MAX_PAIRS):
        if count < 2:
            break
        for name in [name for name in left if name.startswith(new)]:
            other = old + name.removeprefix(new)
            if other in by_name and by_name[other].info.shape == left[name].info.shape:
                found[left.pop(name)] = by_name.pop(other)
    return found


def _suffixes(name: str) -> list[str]:
    """``a.b.c`` → ``a.b.c``, ``b.c``, ``c``; at most the eight longest."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(min(len(parts), 8))]


def _match_bytes(
    unmatched: Sequence[Tensor], base: Checkpoint, target: Checkpoint, blocks: _Blocks
) -> dict[Tensor, Tensor]:
    """Match tensors that the base has bit for bit under another name (an untied output layer, say)."""
    unmatched = [tensor for tensor in unmatched if tensor.info.nbytes]
    kinds = {(tensor.info.dtype, tensor.info.shape) for tensor in unmatched}
    alike = [tensor for tensor in base.tensors if (tensor.info.dtype, tensor.info.shape) in kinds]
    alike = alike[: blocks.candidates]
    by_start: dict[tuple[str, bytes], list[Tensor]] = {}
    with base.source.expect(tensor.span(0, _start_bytes(tensor)) for tensor in alike):
        for tensor in alike:
            by_start.setdefault(_start(tensor), []).append(tensor)
    found = {}
    with target.source.expect(tensor.span(0, _start_bytes(tensor)) for tensor in unmatched):
        starts = [_start(tensor) for tensor in unmatched]
    for tensor, start in zip(unmatched, starts, strict=True):
        candidates = by_start.get(start, [])
        equal = (other for other in candidates if _equal(tensor, other, base, target, blocks))
        if match := next(equal, None):
            found[tensor] = match
    return found


def _start_bytes(tensor: Tensor) -> int:
    return min(tensor.info.nbytes, 4096)


def _start(tensor: Tensor) -> tuple[str, bytes]:
    """A key that differs for most tensors and takes one small read: dtype, shape, first bytes."""
    first = _read(tensor, 0, _start_bytes(tensor))
    return f"{tensor.info.dtype}{tensor.info.shape}", hashlib.sha256(first.data).digest()


def _equal(one: Tensor, other: Tensor, base: Checkpoint, target: Checkpoint, blocks: _Blocks) -> bool:
    """Whether a target tensor and a base tensor of the same size are equal, judged by some blocks spread over
    them (a wrong answer only makes the delta longer). Stops at the first difference."""
    nbytes = one.info.nbytes
    if nbytes != other.info.nbytes:
        return False
    starts = range(0, nbytes, blocks.nbytes * -(-nbytes // (blocks.nbytes * blocks.most)))
    ends = [min(start + blocks.nbytes, nbytes) for start in starts]
    compared = list(zip(starts, ends, strict=True))
    with (
        target.source.expect(one.span(start, end) for start, end in compared),
        base.source.expect(other.span(start, end) for start, end in compared),
    ):
        for start, end in compared:
            if not np.array_equal(_read(one, start, end), _read(other, start, end)):
                return False
    return True
