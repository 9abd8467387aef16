"""What one process has of a state that is published: whole tensors, and parts of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ..boxes import Box
from ..tensors import settle
from ..wholeness import require_gathered, require_merged, require_unquantized
from ..wrappers import plain_state
from .cast import read_as
from .records import part_key
from .state import StateTensor, require_apart


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of a tensor that no process holds whole, for :class:`DeltaPublisher`.

    Attributes:
        name: the tensor's name.
        tensor: the part's elements: a box, as large as ``tensor``.
        shape: the shape of the whole tensor.
        offsets: where the part begins in it, along each dimension.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


#: What a publisher takes: a model; tensors by name, some of them in parts; or parts alone.
Published: TypeAlias = (
    "nn.Module | Mapping[str, Tensor] | Mapping[str, Tensor | Part | Iterable[Part]] | Iterable[Part]"
)


class Offer(NamedTuple):
    """What a process says about a piece that it has: its tensor's name, dtype code and shape; its place;
    its size in bytes; whether the process was given the whole tensor; and the first name, by order, of the
    tensors whose pieces are all in the same memory."""

    name: str
    code: str
    shape: tuple[int, ...]
    box: Box
    nbytes: int
    is_whole: bool
    like: str

    @property
    def key(self) -> str:
        """The piece's name among all of the process: of a part, that of its payload."""
        return self.name if self.is_whole else part_key(self.name, self.box.offsets)


class Pieces(NamedTuple):
    """A process's pieces of a state: their bytes by :attr:`Offer.key`, and what it says about them, sorted by
    name and offsets."""

    tensors: Mapping[str, StateTensor]
    offers: tuple[Offer, ...]


class _Piece(NamedTuple):
    name: str
    tensor: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    box: Box
    is_whole: bool

    @property
    def key(self) -> str:
        """As :attr:`Offer.key`."""
        return self.name if self.is_whole else part_key(self.name, self.box.offsets)


def is_sharded(state: Published) -> bool:
    """Whether there are DTensors in it, or parts."""
    if not isinstance(state, (nn.Module, Mapping)):
        return True
    values = plain_state(state).values()  # type: ignore[arg-type]
    return any(hasattr(value, "full_tensor") or isinstance(value, (Part, list, tuple)) for value in values)


def local_tensors(state: Published) -> dict[str, Tensor]:
    """The tensors that this process has of a sharded state, by :attr:`Offer.key`."""
    return {p.key: p.tensor for n, value in _named(state) for p in _cut(n, value, is_alone=False)}


def pieces_of(state: Published, dtype: torch.dtype | None, *, is_alone: bool) -> Pieces:
    """The pieces that this process has, without those that have no elements while others have.

    Args:
        dtype: what floating-point tensors with more bits an element are read as; None: as they are.
        is_alone: whether no other process publishes with this one.

    Raises:
        CheckpointError: a tensor cannot be published, or a part does not fit its tensor.
    """
    named = _named(state)
    found = [piece for name, value in named for piece in _cut(name, value, is_alone=is_alone)]
    found.sort(key=lambda piece: (piece.name, piece.box.offsets))
    keys = [piece.key for piece in found]
    tensors = {key: piece.tensor for key, piece in zip(keys, found, strict=True)}
    if len(tensors) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(
            "Parts of tensors cannot be told apart",
            f"Two are called {twice!r}.",
            "Pass each part once, and give tensors no names that look like those of parts.",
        )
    there = {key: read_as(piece.name, piece.tensor, dtype) for key, piece in zip(keys, found, strict=True)}
    settle(tensors.values())
    require_apart(tensors, there)
    first = _first_names(found, there)
    offers = []
    for key, piece in zip(keys, found, strict=True):
        tensor = there[key]
        shape = tensor.shape if piece.is_whole else piece.shape
        box = Box((0,) * len(shape), shape) if piece.is_whole else piece.box
        if tensor.code == "F4" and not piece.is_whole:
            raise CheckpointError(
                f"Tensor {piece.name!r} cannot be published in parts",
                "Two of its elements share a byte.",
                "Publish it whole, or as the uint8 that holds it.",
            )
        offers.append(
            Offer(piece.name, tensor.code, shape, box, tensor.nbytes, piece.is_whole, first[piece.name])
        )
    return Pieces(there, tuple(offers))


def _named(state: Published) -> list[tuple[str, object]]:
    """Tensors and parts under the names that they have without wrappers."""
    if not isinstance(state, (nn.Module, Mapping)):
        return [(part.name, part) for part in state]
    named = plain_state(state)  # type: ignore[arg-type]
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    checked = state if isinstance(state, nn.Module) else tensors
    require_gathered(checked)
    require_merged(checked, [name for name, value in named.items() if _is_published(value)])
    require_unquantized(checked)
    return list(named.items())


def _is_published(value: object) -> bool:
    return isinstance(value, (Tensor, Part, list, tuple))


def _cut(name: str, value: object, *, is_alone: bool) -> Iterator[_Piece]:
    """The pieces of one value of a state; none of what is neither a tensor nor parts of one."""
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):
        if is_alone:
            raise CheckpointError(
                f"Tensor {name!r} is sharded over several processes",
                "It is a DTensor, and this publisher has no process group.",
                "Make a DeltaPublisher on every process, with process_group=torch.distributed.group.WORLD.",
            )
        yield from _cut_dtensor(name, value)
    elif isinstance(value, Tensor):
        yield _Piece(name, value, tuple(value.shape), Box((0,) * value.dim(), tuple(value.shape)), True)
    elif isinstance(value, Part):
        yield from _checked(name, value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Part):
                yield from _checked(name, part)


def _cut_dtensor(name: str, tensor: Tensor) -> Iterator[_Piece]:
    """This process's shard of a DTensor, if it has one."""
    from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"Tensor {name!r} cannot be published",
            "Each process has a summand of it, not a part.",
            "Redistribute it: tensor.redistribute(placements=[…]).",
        )
    items = create_default_local_save_plan({name: tensor}, True).items
    with torch.no_grad():
        local = tensor.to_local()  # type: ignore[attr-defined]
    for item in items:
        assert item.tensor_data is not None
        yield from _placed(name, local, tuple(tensor.shape), tuple(item.tensor_data.chunk.offsets))


def _checked(name: str, part: Part) -> Iterator[_Piece]:
    """A part that its maker has placed."""
    shape, offsets = tuple(part.shape), tuple(part.offsets)
    if part.name != name or not isinstance(part.tensor, Tensor) or hasattr(part.tensor, "full_tensor"):
        raise CheckpointError(
            f"A part of {name!r} cannot be published",
            f"It is called {part.name!r}, or its tensor is a {type(part.tensor).__name__}.",
            "Pass Part(name, tensor, shape, offsets) under the tensor's name.",
        )
    yield from _placed(name, part.tensor, shape, offsets)


def _placed(name: str, tensor: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Iterator[_Piece]:
    sizes = tuple(tensor.shape)
    fits = len(shape) == len(offsets) == len(sizes) and all(
        0 <= offset <= offset + size <= length
        for offset, size, length in zip(offsets, sizes, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"A part does not fit tensor {name!r}",
            f"It has {list(sizes)} elements from {list(offsets)} on, of {list(shape)}.",
            "Pass the shape of the whole tensor, and the place of this part in it.",
        )
    if 0 in shape:  # whoever has a part of nothing has all of it
        yield _Piece(name, tensor.new_empty(shape), shape, Box((0,) * len(shape), shape), True)
    elif tensor.numel():
        yield _Piece(name, tensor, shape, Box(offsets, sizes), False)


def _first_names(pieces: Iterable[_Piece], there: Mapping[str, StateTensor]) -> dict[str, str]:
    """For every tensor, the first one by name whose pieces here are in the same memory, usually itself."""
    identities: dict[str, list[object]] = {}
    for piece in pieces:
        tensor = there[piece.key]
        same = (tensor.identity, piece.box, piece.shape) if tensor.nbytes else piece.name
        identities.setdefault(piece.name, []).append(same)
    first: dict[object, str] = {}
    return {name: first.setdefault(tuple(found), name) for name, found in identities.items()}
