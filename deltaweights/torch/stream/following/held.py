"""What a subscriber holds of changes that are not written yet: places and new values, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....workers import Workers
from ..state import StateTensor

#: The number of chunks that a thread takes at once, since handing over one takes as long as its work.
BATCH = 8


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """New elements of a tensor.

    Attributes:
        name: the tensor's; or, of a part, its payload's.
        start: the byte of the tensor that ``places`` count from.
        places: elements from there (uint32[m], ascending); None: all, one after the other.
        values: their new bits (unsigned[m], as wide as the tensor's elements).
    """

    name: str
    start: int
    places: NDArray[np.uint32] | None
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return self.values.nbytes + (0 if self.places is None else self.places.nbytes)

    def indices(self) -> NDArray[np.int64]:
        """The elements' indices in the tensor, if that is laid out flat."""
        first = self.start // self.values.itemsize
        if self.places is None:
            return np.arange(first, first + self.values.size, dtype=np.int64)
        indices: NDArray[np.int64] = self.places.astype(np.int64)
        indices += first
        return indices


class HeldChanges:
    """The changes of a whole state, by tensor. Writing them again changes nothing."""

    def __init__(self, chunks: Iterable[HeldChunk]) -> None:
        self._by_name: dict[str, list[HeldChunk]] = {}
        for chunk in chunks:
            self._by_name.setdefault(chunk.name, []).append(chunk)

    @property
    def nbytes(self) -> int:
        """Their memory in bytes."""
        return sum(chunk.nbytes for chunks in self._by_name.values() for chunk in chunks)

    @property
    def names(self) -> list[str]:
        """The tensors that change."""
        return list(self._by_name)

    def of(self, name: str) -> Sequence[HeldChunk]:
        """Those of one tensor, ascending."""
        return self._by_name.get(name, ())

    def write(self, state: Mapping[str, StateTensor], workers: Workers) -> None:
        """Write all of them: on the CPU by all threads, chunk by chunk; elsewhere tensor by tensor."""
        here: list[HeldChunk] = []
        for name, chunks in self._by_name.items():
            if state[name].is_on_cpu:
                here += chunks
            else:
                _write_on_device(state[name], chunks)

        def write(batch: Sequence[HeldChunk]) -> None:
            for chunk in batch:
                state[chunk.name].put(chunk.start, chunk.places, chunk.values)

        with closing(workers.map(write, in_batches(here))) as done:
            for _ in done:
                pass

    def clear(self) -> None:
        """Release the memory."""
        self._by_name.clear()


def _write_on_device(tensor: StateTensor, chunks: Sequence[HeldChunk]) -> None:
    """One upload and one indexed write for all that changes here and there, one copy for each other chunk."""
    scattered = [chunk for chunk in chunks if chunk.places is not None]
    if scattered:
        indices, values = joined(scattered)
        tensor.put_at(indices, values)
    for chunk in chunks:
        if chunk.places is None:
            tensor.write(chunk.start, chunk.values.view(np.uint8))


def joined(chunks: Sequence[HeldChunk]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The indices in the tensor, and the new bits, of one or more of its chunks."""
    return (
        np.concatenate([chunk.indices() for chunk in chunks]),
        np.concatenate([chunk.values for chunk in chunks]),
    )


def in_batches(chunks: Iterable[Any]) -> Iterator[list[Any]]:
    """The chunks, in order, as many at once as a thread takes."""
    remaining = iter(chunks)
    return iter(lambda: list(islice(remaining, BATCH)), [])
