"""A rank of an engine follows a weight stream: prepared while it serves, written between two of its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BaseMismatchError, DeltaWeightsError
from ..torch import DeltaSubscriber, Prepared, StreamState
from ..torch.tensors import dtype_of, torch_shape
from .host_mirror import HostMirror, Layout
from .placement import CheckpointTensor, Writes, places

_log = logging.getLogger(__name__)

#: Loads tensors of the checkpoint's names into the model, all of them, as the engine does when it starts.
Reload = Callable[[Iterator[tuple[str, Tensor]]], object]

#: Tells all ranks of the engine a value, and gives back what each of them told, this one included.
Exchange = Callable[[str], list[str]]


@dataclass
class _Ready:
    """A prepared step: what brings the mirror there, and what is written to the model. ``writes`` None: the
    model is loaded whole."""

    prepared: Prepared
    writes: Writes | None

    def close(self) -> None:
        self.prepared.close()
        self.writes = None


class Follower:
    """Brings a model to the states of a weight stream, from one step to the next.

    For each step, :meth:`commit` writes the model, on all ranks or on none. :meth:`finish` brings the mirror
    along, once all ranks have committed. :meth:`prepare` does the rest in a thread of its own.

    Args:
        model: the engine's model: it has a method ``load_weights``.
        subscribe: makes what follows the stream, from a state of this number on.
        mirror: has the stream's tensors; shared with the engine's other processes on this machine.
        reload: loads the model whole, for what cannot be written where it lies.
        exchange: tells the other ranks; None: there are none.
        is_quantized: whether the model's weights are not those of the checkpoint, so that all is loaded
            whole.
    """

    def __init__(
        self,
        model: nn.Module,
        subscribe: Callable[[int], DeltaSubscriber],
        mirror: HostMirror,
        layout: Layout,
        *,
        reload: Reload,
        exchange: Exchange | None = None,
        is_quantized: bool = False,
    ) -> None:
        self._subscribe, self._number = subscribe, 0
        self._subscriber: DeltaSubscriber | None = None
        self._mirror = mirror
        self._mark = mirror.mark
        self._reload = reload
        self._exchange: Exchange = exchange or (lambda value: [value])
        tensors = {
            name: CheckpointTensor(dtype_of(name, code), torch_shape(name, code, shape))
            for name, code, shape in layout
        }
        self._places = places(model, {} if is_quantized else tensors)
        #: Whether the model is where the mirror is. None: its bytes have to be compared first.
        self._agrees: bool | None = None
        #: The tensors whose places hold what the mirror has; the others were changed after they were loaded.
        self._proven: set[str] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltaweights")
        self._step: int | None = None
        self._future: Future[_Ready] | None = None
        self._written: _Ready | None = None

    def start(self) -> None:
        """Begin an update. By now, all processes have the mirror mapped: its file is no longer needed, and
        its memory ends with them."""
        self._mirror.unlink()
        self.abandon()

    def prepare(self, step: int) -> None:
        """Begin to prepare a step, in a thread, and return at once. Another one that is prepared is dropped.
        Again does nothing, unless it has failed."""
        self.abandon()
        if self._future is not None and self._step == step and not _has_failed(self._future):
            return
        former, self._step = self._future, step
        self._future = self._thread.submit(self._prepare, step, former)

    def _prepare(self, step: int, former: Future[_Ready] | None) -> _Ready:
        if former is not None and not _has_failed(former):
            former.result().close()
        if self._mark != self._mirror.mark:  # another process has brought the mirror along
            self._mark = self._mirror.mark
            self._subscriber = self._agrees = self._proven = None
        if self._subscriber is None:  # a new one does not rely on what it knew of the mirror
            self._subscriber = self._subscribe(self._number)
        with torch.no_grad():
            prepared = self._subscriber.prepare(self._mirror.tensors, step=step)
            try:
                self._compare()
                return _Ready(prepared, self._located(prepared))
            except BaseException:
                prepared.close()
                raise

    def _compare(self) -> None:
        """Compare the model's bytes with the mirror's, if it is not known that they agree."""
        if self._proven is None:
            differing = set(self._places.differing(self._mirror.tensors))
            self._proven = self._mirror.tensors.keys() - differing
            if self._agrees is None:
                self._agrees = not differing

    def _located(self, prepared: Prepared) -> Writes | None:
        """What is to be written; None where the model has to be loaded whole."""
        assert self._proven is not None
        writes, why = Writes(), None if self._agrees else "it is not in the state that the mirror has"
        for change in prepared.changes() if why is None else ():
            if change.name not in self._proven:
                why = f"{change.name} changes, and has no place in it"
                break
            for placement in self._places.found[change.name]:
                writes.add(placement, change.indices, change.values)
        if why is None:
            return writes
        _log.warning("step %d: the model will be loaded whole: %s", prepared.state.step, why)
        return None

    def commit(self, step: int) -> StreamState:
        """Write a step to the model, which must not be used meanwhile; wait for what is not prepared yet.

        Raises:
            DeltaWeightsError: this rank or another one cannot, and none has written anything. Or writing
                itself failed, in which case the next step is loaded whole.
        """
        self.prepare(step)
        assert self._future is not None
        ready, error = None, None
        try:
            ready = self._future.result()
        except Exception as failure:  # told to the other ranks before it is raised
            error = failure
        self._agree(step, ready, error)
        assert ready is not None
        self._future = None
        self._agrees = None  # until it is known that all went well
        try:
            self._write(ready)
        except Exception as failure:
            error = failure
        self._require_all_written(step, ready, error)
        self._written = ready
        return ready.prepared.state

    def _write(self, ready: _Ready) -> None:
        if ready.writes is not None:
            ready.writes.write()
        else:
            self._reload(_whole(self._mirror.tensors, ready.prepared))
            self._proven = None

    def _agree(self, step: int, ready: _Ready | None, error: Exception | None) -> None:
        """Raise unless all ranks are ready to write the same state."""
        told = self._exchange(f"+{ready.prepared.state.state}" if ready else f"-{error}")
        if error is not None:
            raise error
        if refusals := _refusals(told):
            raise DeltaWeightsError(
                f"Step {step} was not written",
                f"Another rank says: {refusals[0]}",
                "Mend that, and ask for the step again.",
            )
        if len(set(told)) > 1:
            assert ready is not None
            ready.close()
            self._future = None
            raise BaseMismatchError(
                f"Step {step} was not written",
                "It was published again meanwhile, and the ranks have prepared different states.",
                "Ask for the step again.",
            )

    def _require_all_written(self, step: int, ready: _Ready, error: Exception | None) -> None:
        """Raise if writing itself failed on some rank."""
        told = self._exchange("+" if error is None else f"-{error}")
        refusals = _refusals(told)
        if not refusals:
            return
        ready.close()
        self._agrees = self._proven = None
        raise DeltaWeightsError(
            f"Step {step} was not written on all ranks",
            f"One of them says: {refusals[0]}",
            "Do not serve before a step is written again; it is loaded whole.",
        ) from error

    def finish(self) -> None:
        """Bring the mirror along, once all ranks have committed. Without a commit before, this does
        nothing."""
        ready, self._written = self._written, None
        if ready is not None:
            # Each process writes the same bytes, so that each one's subscriber knows where the mirror is.
            self._number = ready.prepared.state.number
            self._mark = self._mirror.mark = self._number + 1
            try:
                ready.prepared.commit()
                self._agrees = True
            except DeltaWeightsError as error:  # the model has the step: the next one is loaded whole
                _log.warning("the mirror was not brought along: %s", error)
                self._subscriber = self._agrees = self._proven = None
            finally:
                ready.close()

    def abandon(self) -> None:
        """Forget a commit that was not finished: other ranks may not have made it."""
        if self._written is not None:
            self._written.close()
            self._written = None
            self._agrees = self._proven = None

    def close(self) -> None:
        """End the thread, and let go of the mirror."""
        self.abandon()
        self._thread.shutdown(cancel_futures=True)
        if self._future is not None and not _has_failed(self._future):
            self._future.result().close()
        self._future = None
        self._mirror.close()


def _refusals(told: list[str]) -> list[str]:
    """What ranks say that cannot go on, in a line each."""
    return [" ".join(one[1:].splitlines()) for one in told if one.startswith("-")]


def _has_failed(future: Future[_Ready]) -> bool:
    return future.cancelled() or (future.done() and future.exception() is not None)


def _whole(mirror: dict[str, Tensor], prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the state that was prepared, each in memory of its own."""
    changes = prepared.changes()
    change = next(changes, None)
    for name, _, _ in prepared.state.tensors:  # changes come in the same order
        tensor = mirror[name].clone()
        if change is not None and change.name == name:
            if change.indices is None:
                tensor = change.values.reshape(change.shape)
            else:
                flat = tensor.view(-1).view(torch.uint8).view(-1, tensor.element_size())
                flat[change.indices] = change.values.view(torch.uint8).view(-1, tensor.element_size())
            change = next(changes, None)
        yield name, tensor
