"""Finds what each entry of a manifest is coded against: a tensor of the base, or parts of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..checkpoint import Base, Checkpoint, Gathered, Group, HeldExtents, Piece, Tensor
from ..entries import BaseParts, BaseTensor, TensorEntry
from ..errors import ManifestError
from ..manifest import MANIFEST_NAME, Manifest
from ..words import counted
from .faults import DeltaFaults


def find_bases(
    manifest: Manifest, base: Checkpoint | None, faults: DeltaFaults, held: HeldExtents
) -> dict[tuple[str, str], Base]:
    """The base of every entry that has one, by the entry's file and name.

    Raises:
        BaseMismatchError: the base lacks a tensor, or its dtype or shape differs.
        ManifestError: an entry names parts that cannot be put together.
    """
    found: dict[tuple[str, str], Base] = {}
    wrong: list[str] = []
    for entry in manifest.tensors:
        if not entry.base or not entry.shared_bytes or entry.file is None:
            continue
        tensors = _Tensors(base, entry.file)
        if isinstance(entry.base, BaseTensor):
            tensor = tensors.whole(entry.base)
            if tensor:
                found[entry.file, entry.name] = tensor
        elif groups := tensors.groups(entry.base):
            found[entry.file, entry.name] = _gather(entry, groups, held)
        wrong += tensors.wrong
    if wrong:
        more = f" ({counted(len(wrong) - 1, 'more tensor')} missing or different)" if wrong[1:] else ""
        raise faults.wrong_base(wrong[0] + more)
    return found


class _Tensors:
    """Looks up tensors of the base for an entry of the target's shard at ``path``; collects what is wrong."""

    def __init__(self, base: Checkpoint | None, path: str) -> None:
        self._base = base
        self._path = path
        self.wrong: list[str] = []

    def whole(self, reference: BaseTensor) -> Tensor | None:
        """The tensor that a manifest refers to; of several with its name, the one in the file that it names,
        or else one of its dtype and shape."""
        kind = reference.dtype, reference.shape

        def misfit(tensor: Tensor) -> tuple[bool, ...]:
            return reference.file not in (None, tensor.path), (tensor.dtype, tensor.info.shape) != kind

        tensor = self._closest(reference.name, reference.file, misfit)
        if not tensor:
            self._lacks(reference.name, reference.file)
        elif (tensor.dtype, tensor.info.shape) != kind:
            self.wrong.append(
                f"tensor {reference.name!r} is {tensor.dtype} {list(tensor.info.shape)}, "
                f"not {reference.dtype} {list(reference.shape)}"
            )
        return tensor

    def groups(self, parts: BaseParts) -> list[Group] | None:
        """The tensors' parts; None if one is not there."""
        found = []
        for group in parts.groups:
            pieces = []
            for part in group.parts:
                end = part.start + (group.repeats - 1) * part.step + (part.count - 1) * part.stride + 1

                def misfit(tensor: Tensor, file: str | None = part.file, end: int = end) -> tuple[bool, ...]:
                    is_long = tensor.info.numel >= end
                    return file not in (None, tensor.path), tensor.dtype != parts.dtype, not is_long

                tensor = self._closest(part.name, part.file, misfit)
                if not tensor:
                    self._lacks(part.name, part.file)
                    return None
                if any(misfit(tensor, None)):
                    self.wrong.append(
                        f"tensor {part.name!r} is {tensor.dtype} {list(tensor.info.shape)}, "
                        f"not {parts.dtype} with {end} elements or more"
                    )
                    return None
                pieces.append(Piece(tensor, part.start, part.step, part.count, part.stride))
            found.append(Group(group.repeats, tuple(pieces)))
        return found

    def _closest(
        self, name: str, file: str | None, misfit: Callable[[Tensor], tuple[bool, ...]]
    ) -> Tensor | None:
        return self._base.closest(name, file or self._path, misfit) if self._base else None

    def _lacks(self, name: str, file: str | None) -> None:
        if self._base:
            self._base.require_found(name, file or self._path)
        self.wrong.append(f"it has no tensor {name!r}{''.join(self._unread())}")

    def _unread(self) -> Iterator[str]:
        """Which of the base's files might hold what is missing, and cannot be read."""
        for first in list(self._base.broken.values())[:1] if self._base else ():
            yield f" ({first.what}: {first.why.rstrip('.')})"


def _gather(entry: TensorEntry, groups: list[Group], held: HeldExtents) -> Gathered:
    try:
        return Gathered(groups, held)
    except ValueError as error:
        raise ManifestError(
            f"{MANIFEST_NAME} is damaged",
            f"The base of tensor {entry.name!r} cannot be put together: {error}.",
            "Get the delta again.",
        ) from error
