"""Finds the cause of wrong bytes: the base, the payload, or the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError


class BaseBytes(Protocol):
    """The bytes that a payload is coded against: a tensor of the base or a part of it, of dtype ``dtype``.
    ``name`` and ``path`` of the tensor and its file are for messages."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the bytes, beginning at ``start``."""


class Faults(ABC):
    """Tells a wrong base from a damaged payload, and both from a broken network. Subclasses word the errors
    for a delta, a distributed checkpoint or a weight stream."""

    @abstractmethod
    def damaged(self, path: str, why: str) -> DeltaError:
        """The error to raise if the payload file at ``path`` differs from the file that was written."""

    @abstractmethod
    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise if the base is the wrong one."""

    @abstractmethod
    def is_damaged(self, path: str) -> bool:
        """Whether the digest of the payload file at ``path`` differs from its record."""

    def is_proven(self, path: str) -> bool:
        """Whether the base's file at ``path`` is known to be the right one without reading it."""
        return False

    def remedy(self, path: str) -> str:
        """The fix if bytes of the proven file at ``path`` arrive damaged repeatedly."""
        return "The network changes them: try a different one, or download the base first."

    def in_tensor(self, path: str, name: str, why: str) -> DeltaError:
        """:meth:`damaged` for a single tensor's payload."""
        return self.damaged(path, f"Tensor {name!r}: {why}")

    def of_base(self, path: str, name: str, base: BaseBytes, place: str) -> DeltaWeightsError:
        """The error if the base's bytes do not match their checksum: either may be wrong.

        Args:
            path, name: the payload's file, and its tensor.
            place: the bytes of the base's tensor, in words.
        """
        if self.is_damaged(path):
            return self.in_tensor(path, name, "Its chunk records are not those that were written")
        if self.is_proven(base.path):
            return CheckpointError(
                f"{base.path} does not arrive as it is published",
                f"{place[0].upper()}{place[1:]} of its tensor {base.name!r} arrived damaged twice.",
                self.remedy(base.path),
            )
        return self.wrong_base(f"its tensor {base.name!r} differs in {place}")
