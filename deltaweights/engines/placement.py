"""Where a checkpoint's elements lie in an engine's model, which fuses, splits and shards tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..torch import Change

_log = logging.getLogger(__name__)

#: Integer dtypes, by the size of an element: bits are moved as numbers, so that no NaN is made quiet.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckpointTensor(NamedTuple):
    """What is known of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A part of the model that holds a part of a checkpoint's tensor, in the same dtype.

    Element ``[i, j, …]`` of ``view`` is the element of the flat checkpoint's tensor (row-major) at
    ``offset + i * strides[0] + j * strides[1] + …``.

    Attributes:
        view: the part of the model's tensor, in the model's memory.
        offset: where the part begins in the flat checkpoint's tensor, in elements.
        strides: for each dimension of ``view``, the step in the flat checkpoint's tensor, in elements.
    """

    view: Tensor
    offset: int
    strides: tuple[int, ...]

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Find flat indices of the checkpoint's tensor here.

        Args:
            indices: int64, ascending, one dimension.

        Returns:
            Which of them lie here (int64 positions in ``indices``), and where: int64 positions in
            :func:`_flat` of the view.
        """
        sizes = self.view.shape
        last = self.offset + sum((n - 1) * step for n, step in zip(sizes, self.strides, strict=True))
        ends = torch.tensor([self.offset, last + 1], device=indices.device)
        low, high = torch.searchsorted(indices, ends).tolist()
        rest = indices[low:high] - self.offset
        found = torch.zeros_like(rest)
        inside: Tensor | None = None
        for dim in _outermost_first(sizes, self.strides):
            at = torch.div(rest, self.strides[dim], rounding_mode="floor")
            rest = rest - at * self.strides[dim]
            fits = at < sizes[dim]
            inside = fits if inside is None else inside & fits
            found += at * self.view.stride(dim)
        inside = rest == 0 if inside is None else inside & (rest == 0)
        chosen = inside.nonzero().reshape(-1)
        return chosen + low, found[chosen]

    def part_of(self, values: Tensor) -> Tensor:
        """The part of the checkpoint's tensor that lies here, as a view of it.

        Args:
            values: the whole tensor, contiguous, of any shape.
        """
        flat = values.reshape(-1)
        return flat.as_strided(self.view.shape, self.strides, flat.storage_offset() + self.offset)


class Places:
    """Where a checkpoint's tensors lie in a model; made by :func:`places`.

    Attributes:
        found: the places of each tensor; an empty list where the model takes nothing of it, as a rank that
            holds other experts or other layers.
        dense: the tensors that have no place, and why. They have to be loaded by the model's own loader.
    """

    def __init__(self, found: Mapping[str, list[Placement]], dense: Mapping[str, str]) -> None:
        self.found = dict(found)
        self.dense = dict(dense)

    def differing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of ``tensors`` whose places hold other bytes, or that have no places.

        Weights that were repacked after loading differ: their places are no longer those that the loader
        wrote to.
        """
        return [name for name, tensor in tensors.items() if not self._holds(name, tensor)]

    def _holds(self, name: str, tensor: Tensor) -> bool:
        return name in self.found and all(
            torch.equal(_bits(place.view), _bits(place.part_of(tensor)).to(place.view.device))
            for place in self.found[name]
        )


class _Write(NamedTuple):
    """Values for a part of the model. ``indices`` None: for all of it, in its shape."""

    target: Tensor
    indices: Tensor | None
    values: Tensor


class Writes:
    """Values that are ready to be written to a model, on its device; made by :func:`located`."""

    def __init__(self) -> None:
        self._writes: list[_Write] = []

    def add(self, place: Placement, indices: Tensor | None, values: Tensor) -> None:
        """Take in values for a place.

        Args:
            place: where.
            indices: flat indices of the checkpoint's tensor: int64, ascending; None: all of its elements.
            values: the values of these elements, in one dimension.
        """
        device = place.view.device
        if indices is None:
            part = _bits(place.part_of(values))
            # Not a view: the caller's memory may be used again before this is written.
            self._writes.append(_Write(_bits(place.view), None, part.to(device, copy=True)))
            return
        chosen, positions = place.locate(indices)
        if chosen.numel():
            here = _bits(values)[chosen].to(device)
            self._writes.append(_Write(_flat(place.view), positions.to(device), here))

    @property
    def nbytes(self) -> int:
        """What is held until then, in bytes."""
        return sum(
            tensor.nbytes for write in self._writes for tensor in write[1:] if isinstance(tensor, Tensor)
        )

    def write(self) -> None:
        """Write all values to the model. Nothing is read, moved or waited for."""
        with torch.no_grad():
            for target, indices, values in self._writes:
                if indices is None:
                    target.copy_(values)
                else:
                    target.index_copy_(0, indices, values)


def places(model: nn.Module, tensors: Mapping[str, CheckpointTensor | Tensor]) -> Places:
    """Find where each element of a checkpoint's tensors lies in the model, by its own loader.

    The model's ``load_weights`` runs with tensors that have no values, and what it would copy is noted; not a
    byte is written. So this holds for fused, split and sharded weights of any architecture. What is computed
    on the way (another dtype, a sum, a rearrangement by more than views) has no place.

    Args:
        model: an engine's model: it has a method ``load_weights`` that takes pairs of name and tensor.
        tensors: dtype and shape of each tensor of the checkpoint, by name.
    """
    names = list(tensors)
    try:
        recorded = _record(model, {name: tensors[name] for name in names})
    except Exception as error:  # a loader may refuse a tensor in any way; each is tried by itself
        _log.debug("the loader does not take all tensors at once: %s", error)
        recorded = _Recorded()
        for name in names:
            try:
                recorded.take(_record(model, {name: tensors[name]}))
            except Exception as refusal:
                recorded.dense[name] = f"its loader says: {refusal}".splitlines()[0]
    found = {name: recorded.places.get(name, []) for name in names if name not in recorded.dense}
    for name, why in recorded.dense.items():
        _log.debug("%s has no place in the model: %s", name, why)
    if recorded.dense:
        name, why = next(iter(recorded.dense.items()))
        of = len(recorded.dense), len(names), name, why
        _log.warning("%d of %d tensors have no place in the model, such as %s: %s", *of)
    return Places(found, recorded.dense)


def located(places: Places, changes: Iterable[Change]) -> Writes:
    """Turn changes of a checkpoint into values for the model, on its device.

    Args:
        places: where the tensors lie.
        changes: what changes, as :meth:`Prepared.changes` of a weight stream gives it.

    Raises:
        CheckpointError: a change is of a tensor that has no place.
    """
    writes = Writes()
    for change in changes:
        if change.name not in places.found:
            raise CheckpointError(
                f"Tensor {change.name!r} has no place in the model",
                f"{places.dense.get(change.name, 'It was not looked for')}.",
                "Load it with the model's own loader.",
            )
        for place in places.found[change.name]:
            writes.add(place, change.indices, change.values)
    return writes


def write_changes(places: Places, changes: Iterable[Change]) -> None:
    """Write changes of a checkpoint to the model, bit for bit; takes and raises as :func:`located`."""
    located(places, changes).write()


# The loader, overheard --------------------------------------------------------------------------------------


class _Recorded:
    """What a loader did: places by name, and the names without, with the reason."""

    def __init__(self) -> None:
        self.places: dict[str, list[Placement]] = {}
        self.dense: dict[str, str] = {}

    def take(self, other: _Recorded) -> None:
        self.places |= other.places
        self.dense |= other.dense


def _record(model: nn.Module, tensors: Mapping[str, CheckpointTensor | Tensor]) -> _Recorded:
    """Run the model's loader with tensors on the meta device, and record what it copies."""
    sources: dict[str, Tensor] = {
        name: torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    recorder = _Recorder(sources)
    load: Callable[[Iterator[tuple[str, Tensor]]], object] = model.load_weights  # type: ignore[assignment]
    with torch.no_grad(), recorder:
        load(iter(sources.items()))
    return recorder.recorded


class _Recorder(TorchFunctionMode):
    """Notes copies from tensors on the meta device to others, and makes none of them.

    A source is known by its storage, which all views of it share. A tensor computed from it has a storage of
    its own, and is known as derived.
    """

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.recorded = _Recorded()
        # The storages are held, so that their ids are theirs alone.
        self._held = [tensor.untyped_storage() for tensor in sources.values()]
        self._own = {id(storage): name for name, storage in zip(sources, self._held, strict=True)}
        self._names = {key: frozenset({name}) for key, name in self._own.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        names = self._names_in((args, kwargs))
        if names and _writes_to_its_first(func) and isinstance(args[0], Tensor) and not args[0].is_meta:
            return self._written(func, names, args, kwargs)
        result = func(*args, **kwargs)
        if names:
            self._derive(result, names)
        return result

    def _written(
        self, func: Callable[..., Any], names: frozenset[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        target: Tensor = args[0]
        source: object = kwargs.get("src", args[-1])
        if func is Tensor.__setitem__:
            target = target[args[1]]
            if not _is_simple(args[1]):
                return self._no_place(names, "its loader writes it element by element")
        elif func is not Tensor.copy_:
            return self._no_place(names, "its loader puts it in another tensor's place")
        why = self._why_not(target, source)
        if why:
            self._no_place(names, why)
        else:
            assert isinstance(source, Tensor)
            name = self._own[id(source.untyped_storage())]
            place = Placement(target.detach(), int(source.storage_offset()), tuple(source.stride()))
            if target.numel():
                self.recorded.places.setdefault(name, []).append(place)
        return args[0] if func is Tensor.copy_ else None

    def _why_not(self, target: Tensor, source: object) -> str | None:
        """Why what is copied has no place, if so."""
        if not isinstance(source, Tensor) or id(source.untyped_storage()) not in self._own:
            return "something computed from it is copied"
        if source.dtype != target.dtype or source.element_size() not in _BITS:
            return f"it is {source.dtype}, and {target.dtype} in the model"
        if source.shape != target.shape:
            return "its elements are repeated"
        if not _is_nested(source.shape, source.stride()):
            return "its elements are repeated"
        if not _is_nested(target.shape, target.stride()):
            return "the model's tensor has elements that share memory"
        return None

    def _no_place(self, names: frozenset[str], why: str) -> None:
        self.recorded.dense |= dict.fromkeys(names, why)

    def _names_in(self, value: object) -> frozenset[str]:
        """The names of the checkpoint's tensors that arguments are made of."""
        if isinstance(value, Tensor):
            return self._names.get(id(value.untyped_storage()), frozenset()) if value.is_meta else frozenset()
        if isinstance(value, Mapping):
            value = tuple(value.values())
        if isinstance(value, (tuple, list)):
            return frozenset().union(*map(self._names_in, value))
        return frozenset()

    def _derive(self, result: object, names: frozenset[str]) -> None:
        """Remember what a result was computed from."""
        if isinstance(result, Tensor) and result.is_meta:
            storage = result.untyped_storage()
            if id(storage) not in self._names:
                self._held.append(storage)
                self._names[id(storage)] = names
        elif isinstance(result, (tuple, list)):
            for one in result:
                self._derive(one, names)


def _writes_to_its_first(func: Callable[..., Any]) -> bool:
    """Whether a function writes to its first argument: by its name, as torch has it."""
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _is_simple(index: object) -> bool:
    """Whether indexing gives a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, (int, slice, type(None), type(...))) for part in parts)


# Elements as numbers ----------------------------------------------------------------------------------------


def _outermost_first(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions with more than one element, by falling stride."""
    wide = [dim for dim, size in enumerate(sizes) if size > 1]
    return sorted(wide, key=lambda dim: -strides[dim])


def _is_nested(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether each dimension's steps lead beyond all of the dimensions inside it, so that no two elements
    share memory and division finds each."""
    reach = 1
    for dim in reversed(_outermost_first(sizes, strides)):
        if strides[dim] < reach:
            return False
        reach = strides[dim] * (sizes[dim] - 1) + reach
    return True


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's elements as integers of their size, over the same memory."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def _flat(view: Tensor) -> Tensor:
    """The memory from the view's first to its last element, as integers in one dimension."""
    reach = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
    return _bits(view).as_strided((reach,), (1,), view.storage_offset())
