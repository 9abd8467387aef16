"""Reads the target's tensors straight from base and delta, without writing it to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPE_BITS, DTYPES
from ..entries import TensorEntry
from ..errors import CheckpointError
from ..manifest import Manifest
from ..signing import SignatureRequirement
from ..storage import Readable
from .chain import Deltas, open_recipe
from .recipes import TensorRecipe
from .target_recipe import TargetRecipe

if TYPE_CHECKING:
    import torch


def open_target(
    delta: Deltas,
    base: Readable | None = None,
    *,
    require_signature: SignatureRequirement | None = None,
) -> Target:
    """Open the target of ``delta`` and ``base`` without writing files.

    Args:
        delta: a folder or a Hub id; or several, oldest first, each made from the target of the one before; or
            a pointer folder (:func:`deltaweights.engines.serve_folder`), which names them and the base.
        base: the (first) delta's base: a folder, one file or a Hub id; if None, the one that the pointer
            folder names, or the repository that the manifest names, at its commit.
        require_signature: who must have signed the delta, or each of several: the path of a public key, a
            :class:`TrustedKey`, :class:`TrustedCertificates` or :class:`TrustedIdentity`, or several of
            these, of which one suffices. None: nobody. Then the delta's files are compared by SHA-256 before
            any is used; a delta that is far away is copied to a temporary folder for that.

    Returns:
        A lazy, read-only view; use it in a ``with`` block.

    Raises:
        SignatureError: a delta is not signed as required.
        DeltaError: a delta is incomplete or damaged, or there are too many.
        CheckpointError: the base cannot be found or read.
        BaseMismatchError: the base's tensors differ in name, dtype or shape from those that the delta needs,
            or a delta does not follow the one before it.
    """
    return Target(open_recipe(delta, base, require_signature=require_signature, into_memory=True))


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor of the target, decoded.

    Attributes:
        name: its name.
        dtype: its safetensors code, such as ``BF16``.
        shape: its shape.
        data: its bytes (uint8, little-endian, row-major).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def numpy(self) -> NDArray[Any]:
        """The tensor as a NumPy array of its shape, over the same memory.

        Raises:
            CheckpointError: NumPy has no such dtype (for BF16 and F8, see :meth:`torch`).
        """
        known = DTYPES.get(self.dtype)
        if known is None or known.numpy is None:
            raise CheckpointError(
                f"Tensor {self.name!r} has no NumPy array",
                f"NumPy has no dtype for {self.dtype}.",
                "Use torch().",
            )
        return self.data.view(known.numpy).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """The tensor as a torch tensor over the same memory. Needs the extra ``torch``.

        Raises:
            CheckpointError: this version of torch has no such dtype.
        """
        import torch

        known = DTYPES.get(self.dtype)
        dtype = known and known.torch and known.itemsize and getattr(torch, known.torch, None)
        if not dtype:
            raise CheckpointError(
                f"Tensor {self.name!r} has no torch tensor",
                f"torch {torch.__version__} has no dtype for {self.dtype}.",
                "Read its bytes: they are in `data`.",
            )
        return torch.from_numpy(self.data).view(dtype).reshape(self.shape)


class TensorSlice:
    """A tensor of the target whose rows can be decoded separately, like ``get_slice`` of safetensors."""

    def __init__(self, recipe: TensorRecipe, target: TargetRecipe) -> None:
        self._recipe = recipe
        self._target = target

    @property
    def dtype(self) -> str:
        """Its safetensors code."""
        return self._recipe.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._recipe.info.shape

    def __getitem__(self, rows: slice) -> TensorView:
        """Decode rows of the first dimension: only the chunks that hold them are read.

        Raises:
            IndexError: the tensor has no first dimension, or its rows do not fill bytes.
            ValueError: the slice has a step other than 1.
            BaseMismatchError, DeltaError: base or delta contradicts the manifest.
        """
        info = self._recipe.info
        if not info.shape:
            raise IndexError(f"tensor {info.name!r} has no dimension to slice")
        first, end, step = rows.indices(info.shape[0])
        if step != 1:
            raise ValueError("slices of rows must have step 1")
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        bits = DTYPE_BITS.get(info.dtype, 0)
        if row * info.shape[0] != info.nbytes or not bits:
            raise IndexError(f"rows of tensor {info.name!r} do not fill bytes")
        end = max(first, end)
        data = self._target.read(self._recipe, first * row, end * row)
        return TensorView(info.name, info.dtype, (end - first, *info.shape[1:]), data)


class Target(Mapping[str, TensorView]):
    """A lazy mapping from the target's tensor names to :class:`TensorView`, decoded on access. A context
    manager that holds delta and base open.

    If two shards hold a tensor of the same name, the first shard's counts.
    """

    def __init__(self, recipe: TargetRecipe) -> None:
        self._recipe = recipe
        self._entries: dict[str, TensorEntry] = {}
        for entry in recipe.manifest.tensors:
            if entry.file is not None:
                self._entries.setdefault(entry.name, entry)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of delta and base."""
        self._recipe.close()

    @property
    def manifest(self) -> Manifest:
        """The (last) delta's manifest."""
        return self._recipe.manifest

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the inherited one would decode the tensor

    def dtype(self, name: str) -> str:
        """The tensor's safetensors dtype code; reads nothing."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; reads nothing."""
        return self._entries[name].shape

    def __getitem__(self, name: str) -> TensorView:
        """Decode one whole tensor.

        Raises:
            KeyError: the target has no such tensor.
            BaseMismatchError, DeltaError: base or delta contradicts the manifest.
        """
        tensor = self._tensor(name)
        return TensorView(name, tensor.info.dtype, tensor.info.shape, self._recipe.read(tensor))

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor, whose rows are decoded on access: ``target.get_slice(name)[0:16]``.

        Raises:
            KeyError: the target has no such tensor.
        """
        return TensorSlice(self._tensor(name), self._recipe)

    def _tensor(self, name: str) -> TensorRecipe:
        file = self._entries[name].file
        assert file is not None
        return self._recipe.shard(file).tensors[name]
