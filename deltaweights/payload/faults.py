"""Who is to blame where bytes are wrong: the base, the payload, or the way that they came."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BaseMismatchError, CheckpointError, DeltaError, DeltaWeightsError


class BaseBytes(Protocol):
    """What a payload is coded against: bytes of the dtype ``dtype``, those of a tensor of the base or of a
    part of it. ``name`` and ``path`` are the tensor's and its file's, for messages."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` (uint8) with the bytes from ``start`` on."""


class Faults(ABC):
    """Tells a wrong base from a damaged payload, and both from a broken network, in the words of whatever the
    payload belongs to: a delta, a distributed checkpoint, a weight stream."""

    @abstractmethod
    def damaged(self, path: str, why: str) -> DeltaError:
        """The error to raise where the payload file at ``path`` is not what was written."""

    @abstractmethod
    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise where the base is not the right one."""

    @abstractmethod
    def is_damaged(self, path: str) -> bool:
        """Whether the payload file at ``path`` as a whole has another digest than was recorded."""

    def is_proven(self, path: str) -> bool:
        """Whether the base's file at ``path`` is known to be the right one without reading it."""
        return False

    def remedy(self, path: str) -> str:
        """What helps where bytes of the proven file at ``path`` come wrong time and again."""
        return "Something on the way changes them: try a different network, or download the base first."

    def in_tensor(self, path: str, name: str, why: str) -> DeltaError:
        """:meth:`damaged`, where it is one tensor's payload."""
        return self.damaged(path, f"Tensor {name!r}: {why}")

    def of_base(self, path: str, name: str, base: BaseBytes, place: str) -> DeltaWeightsError:
        """The error where the base's bytes and their checksum differ: one of the two is wrong.

        Args:
            path, name: the file that holds the payload, and its tensor.
            place: which bytes of the base's tensor.
        """
        if self.is_damaged(path):
            return self.in_tensor(path, name, "Its chunk records are not those that were written")
        if self.is_proven(base.path):
            return CheckpointError(
                f"{base.path} does not arrive as it is published",
                f"{place[0].upper()}{place[1:]} of its tensor {base.name!r} came wrong twice.",
                self.remedy(base.path),
            )
        return self.wrong_base(f"its tensor {base.name!r} differs in {place}")
