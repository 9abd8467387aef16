"""What was found for tensors whose names tell nothing, and what was not, in words for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoint import Checkpoint, Gathered, Piece, Tensor
from ..codec import is_convertible
from ..words import counted, listed
from .candidates import fold
from .layouts import row_width

#: Most lines of each sort, and names in a line: anyone chooses how many kinds of tensors there are.
_MAX_LINES, _MAX_NAMES = 12, 4

#: Kinds with a smaller part than this of what is not found, such as scales, get no line.
_WORTH_A_LINE = 0.01


def describe_parts(found: Mapping[Tensor, Gathered]) -> list[str]:
    """A line for each kind of tensors that parts of others were found for: what these are."""
    kinds: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for tensor, gathered in found.items():
        sources = tuple(dict.fromkeys(fold(other.name) for other in gathered.tensors))
        kind = fold(tensor.name), _way(gathered), sources
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = [
        f"{_tensors(count, name)} {'looks' if count == 1 else 'look'} like {way} {_sources(name, sources)}."
        for (name, way, sources), count in kinds.items()
    ]
    return _few(lines)


def advise(unfound: Sequence[Tensor], base: Checkpoint, target: Checkpoint) -> list[str]:
    """What may be the matter with target tensors that have no counterpart in the base: a line for each kind,
    the largest first."""
    if not unfound:
        return []
    lines = []
    missing = sum(tensor.nbytes for tensor in unfound)
    is_most = 2 * missing > sum(tensor.nbytes for tensor in target.tensors)
    if is_most and not any(base.named(tensor.name) for tensor in target.tensors):
        lines.append("The base has none of the target's names: is this the base that it was trained from?")
    kinds: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in unfound:
        kinds.setdefault((fold(tensor.name), _reason(tensor, base)), []).append(tensor)
    by_size = sorted(kinds.items(), key=lambda kind: -sum(tensor.nbytes for tensor in kind[1]))
    for (name, reason), tensors in by_size:
        if sum(tensor.nbytes for tensor in tensors) < _WORTH_A_LINE * missing:
            break
        shapes = {_shape(tensor) for tensor in tensors}
        shape = f" of {next(iter(shapes))}" if len(shapes) == 1 else ""
        verb = "has" if len(tensors) == 1 else "have"
        lines.append(f"{_tensors(len(tensors), name, shape)} {verb} {reason}.")
    return _few(lines)


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_LINES
    return lines if more <= 0 else [*lines[:_MAX_LINES], f"And {more} more such lines."]


def _tensors(count: int, name: str, shape: str = "") -> str:
    return f"{counted(count, 'tensor')}{shape}, {name},"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.info.shape)) or "one element"


def _reason(tensor: Tensor, base: Checkpoint) -> str:
    """Why a tensor has no counterpart, as what it has."""
    other = base.find(tensor.name, tensor.path)
    if other and other.dtype != tensor.dtype and not is_convertible(other.dtype, tensor.dtype):
        return f"dtype {tensor.dtype}, but {other.dtype} in the base, which cannot be converted to it"
    if other and other.info.shape != tensor.info.shape:
        return f"a different shape in the base, {_shape(other)}, and resembles no part of it"
    return "no counterpart in the base"


def _way(gathered: Gathered) -> str:
    """How the elements lie in their tensors."""
    pieces = [(piece, group.repeats) for group in gathered.groups for piece in group.pieces]
    if any(piece.stride > 1 or (piece.count == 1 and repeats > 1) for piece, repeats in pieces):
        return "columns of"
    if all(piece.count == piece.tensor.info.numel for piece, _ in pieces):
        return "all of" if sum(repeats for _, repeats in pieces) > len(gathered.tensors) else "the rows of"
    return "rows of" if all(map(_is_rows, (piece for piece, _ in pieces))) else "parts of rows of"


def _is_rows(piece: Piece) -> bool:
    width = row_width(piece.tensor) if len(piece.tensor.info.shape) > 1 else 1
    return piece.count % width == piece.start % width == 0


def _sources(name: str, sources: Sequence[str]) -> str:
    """Names of base tensors, without the words that they begin with in common with the target's."""
    words = [one.split(".") for one in (name, *sources)]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == words[0][shared] for one in words):
        shared += 1
    names = [".".join(one[shared:]) for one in words[1:]]
    return listed(names, _MAX_NAMES)
