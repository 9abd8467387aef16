"""A state that was fetched, checked and decoded, and is to be written: all of it or nothing."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....errors import BaseMismatchError, DeltaWeightsError
from ...boxes import Box
from ...tensors import dtype_of, torch_shape
from ..records import StateRecord
from ..split import whole_indices
from ..state import owners
from .held import joined
from .position import Position
from .writing import Writing


@dataclass(frozen=True, slots=True)
class StreamState:
    """A published state.

    Attributes:
        step: the publisher's number for it.
        number: its place in the stream.
        state: its digest.
        tensors: name, dtype (a safetensors code) and shape (as in a safetensors header) of every tensor,
            sorted by name.
    """

    step: int
    number: int
    state: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, record: StateRecord) -> StreamState:
        """The state that a record describes."""
        tensors = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors)
        return cls(record.step, record.number, record.state, tensors)


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The result of :meth:`DeltaSubscriber.sync` and :meth:`Prepared.commit`.

    Attributes:
        step, number, state: the model's state now: the publisher's step, its place in the stream, its digest.
        updates: number of updates applied.
        from_anchor: whether the way began with an anchor.
        nbytes: size of the payload files read.
    """

    step: int
    number: int
    state: str
    updates: int
    from_anchor: bool
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """New elements of one tensor, on the CPU.

    Attributes:
        name: the tensor's name in the stream.
        dtype: its dtype.
        shape: its shape, as torch has it.
        indices: int64[m], ascending: the elements, counted in row-major order through the whole tensor. None:
            all of them.
        values: their new values, [m], of ``dtype``; NaNs and zeros keep their bits.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor


class Prepared:
    """The way from a model's state to another one, made by :meth:`DeltaSubscriber.prepare`: fetched, checked
    and decoded, in the CPU's memory. A context manager, which releases that memory.

    It takes six bytes for each bf16 weight that changes: four for the place, two for the value; of a tensor
    of other elements, four bytes and the element. A chunk of 2 MiB of which so much changes that this would
    be more is held whole. So the changes never take more than the tensors that change. To these, tensors that
    are not contiguous add a copy of themselves.

    Attributes:
        state: the state that it leads to.
        updates: number of updates on the way.
        from_anchor: whether the way begins with an anchor.
    """

    def __init__(
        self,
        state: StreamState,
        report: SyncReport,
        writing: Writing,
        position: Position,
        sums: Mapping[str, bytes],
    ) -> None:
        self.state = state
        self.updates = report.updates
        self.from_anchor = report.from_anchor
        self._report = report
        self._writing = writing
        self._owners = owners(writing.model.state)
        self._position = position
        self._sums = sums  # of the model's chunks afterwards
        self._commits = position.commits
        self._has_begun = self._is_committed = self._is_closed = False

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what is held. Nothing can be committed or listed afterwards."""
        with self._position.lock:
            self._is_closed = True
            self._writing.close()

    @property
    def nbytes(self) -> int:
        """The memory that is held, in bytes."""
        return self._writing.nbytes

    def changes(self) -> Iterator[Change]:
        """What changes, tensor by tensor, in the coordinates of the stream's tensors: for engines whose own
        parameters are fused or sharded. It can be called before and after :meth:`commit`, and again.

        Each name of the stream is there if its tensor changes, tied ones too: they share their values. Names
        that only the model has are not. Some of the elements may have the same value as before. The memory of
        one tensor's indices and values is taken when its turn comes.

        Raises:
            DeltaWeightsError: this was closed.
        """
        for name, code, shape in self.state.tensors:
            self._require_open()  # it may be closed between two tensors
            dtype, size = dtype_of(name, code), torch_shape(name, code, shape)
            boxes = self._writing.model.cuts.get(name, {}).items()
            found = [
                self._changed(key, None if box and box.sizes == shape else box, size) for key, box in boxes
            ]
            changed = [part for part in found if part]
            if not changed:
                continue
            indices, values = (np.concatenate(arrays) for arrays in zip(*changed, strict=True))
            if len(changed) > 1:  # rows of columns; one part's are in order
                order = np.argsort(indices)
                indices, values = indices[order], values[order]
            is_all = len(values) == int(np.prod(size))
            yield Change(
                name,
                dtype,
                size,
                None if is_all else torch.from_numpy(indices),
                torch.from_numpy(values.view(np.uint8)).view(dtype),
            )

    def _changed(
        self, key: str, box: Box | None, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[Any]] | None:
        """What changes in a tensor, or in its part ``box``: indices in the whole tensor, and values."""
        chunks = self._writing.held.of(self._owners[key])
        if not chunks:
            return None
        indices, values = joined(chunks)
        return whole_indices(indices, box, shape), values

    def commit(self) -> SyncReport:
        """Write the changes into the model. Nothing is read, fetched or decoded: this takes as long as the
        writing does. Do not use the model meanwhile.

        It writes all or nothing. If it is interrupted (Ctrl-C), it finishes before the interrupt is raised.

        Raises:
            BaseMismatchError: since :meth:`DeltaSubscriber.prepare`, the model was changed, as far as torch
                counts changes; or one of its tensors was replaced; or the subscriber has written another
                state. Nothing is written.
            DeltaWeightsError: this was committed already, or closed. Nothing is written.
        """
        with self._position.lock:
            self._require_writable()
            _finish(self._write)
        return self._report

    def _require_writable(self) -> None:
        self._require_open()
        if self._is_committed:
            raise DeltaWeightsError(
                f"Step {self.state.step} was committed already",
                "A Prepared can be committed once.",
                "Call prepare again for the next state.",
            )
        if self._position.commits != self._commits:
            raise self._stale("The subscriber has written another state since")
        if not self._has_begun and not self._writing.model.is_unchanged():
            raise self._stale("Other code has changed or replaced its tensors since")

    def _write(self) -> None:
        self._has_begun = True  # after an error, the same writes may be made again
        if self.updates or self.from_anchor:
            self._position.begin()
            self._commits = self._position.commits
            self._writing.write()
            model = self._writing.model
            self._position.end(model, self.state.number, self.state.state, self._sums)
        else:  # others stay valid
            self._position.number = self.state.number
        self._is_committed = True

    def _stale(self, why: str) -> BaseMismatchError:
        return BaseMismatchError(
            f"Step {self.state.step} was prepared for another state of the model",
            f"{why}.",
            "Call prepare again.",
        )

    def _require_open(self) -> None:
        if self._is_closed:
            raise DeltaWeightsError(
                f"What was prepared for step {self.state.step} was released",
                "This Prepared was closed.",
                "Commit inside its with-block, or call prepare again.",
            )


def _finish(write: Callable[[], None]) -> None:
    """Call ``write`` in a thread, which no interrupt reaches; raise an interrupt afterwards. One that comes
    before the thread has begun keeps it from writing.

    Threads and events of ``threading`` are Python code, which an interrupt may leave locked."""
    ticket, end = Lock(), Lock()
    results: list[BaseException | None] = []
    end.acquire()

    def run() -> None:
        if not ticket.acquire(blocking=False):
            return
        try:
            write()
        except BaseException as error:
            results.append(error)
        else:
            results.append(None)
        end.release()

    try:
        start_new_thread(run, ())
        _wait(results, end)
    except BaseException:
        if not ticket.acquire(blocking=False):
            _wait(results, end)
        raise
    if results[0] is not None:
        raise results[0]


def _wait(results: list[BaseException | None], end: Lock) -> None:
    """Wait until there is a result, however often that is interrupted."""
    try:
        while not results:
            end.acquire(timeout=0.5)  # Python misses a signal that comes just before it waits
    except BaseException:
        _wait(results, end)
        raise
