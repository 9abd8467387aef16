"""A target's tensors for an engine's loader: decoded ahead by threads, checked, one after the other."""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from ..delta.recipes import TensorRecipe
from ..delta.target_recipe import TargetRecipe
from ..errors import DeltaError
from ..manifest import TargetFile
from ..torch.tensors import byte_view, dtype_of, torch_shape
from ..workers import Workers, batches

#: An index of a usual checkpoint: where there is one, shards that it does not name are copies in other forms.
_INDEX = "model.safetensors.index.json"

#: Far above any real index.
_MAX_INDEX_BYTES = 1 << 27

_Piece = tuple["_Decoded", int, int]


class _Decoded:
    """A tensor and its memory, which exists from its first chunk on and is never used for another one."""

    def __init__(self, recipe: TensorRecipe) -> None:
        self.recipe = recipe
        self._tensor: Tensor | None = None

    def pieces(self, nbytes: int) -> Iterator[_Piece]:
        """Its chunks in rows of at most ``nbytes``; one piece without chunks, if it is empty."""
        info = self.recipe.info
        shape = torch_shape(info.name, info.dtype, info.shape)
        self._tensor = torch.empty(shape, dtype=dtype_of(info.name, info.dtype))
        if not info.nbytes:
            yield self, 0, 0
        for first, end in self.recipe.plan.rows(nbytes):
            yield self, first, end

    def decode(self, first: int, end: int) -> None:
        assert self._tensor is not None
        if end > first:
            start, stop = self.recipe.plan.bounds(first, end)
            self.recipe.decode(first, end, byte_view(self._tensor).numpy()[start:stop])

    def take(self) -> tuple[str, Tensor]:
        """Name and tensor; its memory is the caller's from now on."""
        assert self._tensor is not None
        tensor, self._tensor = self._tensor, None
        return self.recipe.info.name, tensor


def decoded(
    target: TargetRecipe,
    workers: Workers,
    *,
    shards: Sequence[str],
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Decode tensors from delta and base, in the order of the shards' bytes.

    Threads run ahead by some chunks, so that memory is what the caller holds, and no more than two tensors
    for each thread.

    Args:
        target: an open target.
        workers: the threads.
        shards: paths of the target's shards; of tensors with one name, the first counts.
        is_wanted: whether a tensor of this name is needed; nothing is read of others.

    Raises:
        BaseMismatchError: the base is the wrong one.
        DeltaError: the delta is damaged.
    """
    seen: set[str] = set()
    for path in shards:
        recipes = target.shard(path).tensors
        chosen = [recipes[name] for name in recipes if name not in seen and is_wanted(name)]
        seen |= recipes.keys()
        yield from _decoded_shard(target, workers, chosen)


def _decoded_shard(
    target: TargetRecipe, workers: Workers, recipes: Sequence[TensorRecipe]
) -> Iterator[tuple[str, Tensor]]:
    def decode(pieces: list[_Piece]) -> list[_Piece]:
        for one, first, end in pieces:
            one.decode(first, end)
        return pieces

    with target.decoding(recipes) as ready:  # chunk records first: they prove that a payload exists
        pieces = (piece for recipe in ready for piece in _Decoded(recipe).pieces(workers.batch_bytes))
        for done in workers.map(decode, batches(pieces, workers.batch_bytes, _nbytes)):
            for one, _, end in done:
                if end == one.recipe.plan.count:
                    yield one.take()


def _nbytes(piece: _Piece) -> int:
    one, first, end = piece
    return one.recipe.plan.length(first, end)


def shards_to_load(
    target: TargetRecipe, *, subfolder: str = "", patterns: Iterable[str] = ("*.safetensors",)
) -> list[str]:
    """The paths of the target's shards that an engine loads: those in the folder itself that match a pattern;
    and if there is an index, those that it names.

    Raises:
        DeltaError: the index is no index, or none of the shards is there.
    """
    patterns = list(patterns)
    files = {file.path: file for file in target.manifest.target.files}
    found = [
        path
        for path, file in files.items()
        if file.stored == "tensors"
        and posixpath.dirname(path) == subfolder.strip("/")
        and any(fnmatch.fnmatchcase(posixpath.basename(path), pattern) for pattern in patterns)
    ]
    index = files.get(posixpath.join(subfolder.strip("/"), _INDEX))
    if index is not None:
        named = {posixpath.join(posixpath.dirname(index.path), name) for name in _named_by(target, index)}
        found = [path for path in found if path in named] or found
    if not found:
        raise DeltaError(
            f"The target of {target.source.where} has no weights to load",
            f"It has no shard that matches {' or '.join(patterns)}.",
            "Rebuild it by apply_delta, and serve the folder.",
        )
    return sorted(found)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _named_by(target: TargetRecipe, index: TargetFile) -> set[str]:
    """The names of the shards in an index."""
    if index.size > _MAX_INDEX_BYTES:
        raise _no_index(index.path, f"It has {index.size} bytes")
    try:
        return set(msgspec.json.decode(b"".join(target.blocks(index)), type=_Index).weight_map.values())
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _no_index(index.path, f"{error}") from error


def _no_index(path: str, why: str) -> DeltaError:
    return DeltaError(f"{path} of the target cannot be read", f"{why}.", "Rebuild the target by apply_delta.")
