"""A model of an engine that follows a weight stream: fetched and decoded once, written on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from ..torch import DeltaSubscriber, Prepared, StreamState
from ..torch.tensors import dtype_of, torch_shape
from .placement import CheckpointTensor, Places, Writes, located, places
from .ranks import NewElements, Ranks

_log = logging.getLogger(__name__)


class Replica:
    """Keeps an engine's model at states of a stream, bit for bit, on one or several ranks.

    The first rank has a copy of the state in the CPU's memory. It fetches, decodes and checks there, and
    passes on what changes; each rank writes what lies on it. What has no place in the model (it is cast or
    computed by the loader) is loaded whole, by the model's own ``load_weights``.

    Args:
        model: this rank's.
        location: the stream's folder, fsspec URL, or repository on the Hub.
        ranks: those that serve the model; each makes a Replica.
        threads: how many the first rank decodes with; None: as many as there are cores, at most 8.
        is_requantized: the model holds other values than the checkpoint, computed from all of it: each update
            loads the whole state.
    """

    def __init__(
        self,
        model: nn.Module,
        location: str,
        ranks: Ranks,
        *,
        threads: int | None = None,
        is_requantized: bool = False,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._subscriber = DeltaSubscriber(location, threads=threads)
        self._is_requantized = is_requantized
        self._mirror: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "deltaweights-prepare")
        self._coming: tuple[int | None, Future[Prepared]] | None = None
        self._is_current = False  # whether all of the model on this rank is in the mirror's state
        self._places = Places({}, {})
        self._placed_at: object = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def prepare(self, step: int | None = None) -> None:
        """Begin to fetch, decode and check a step in a thread of the first rank, while the model serves.

        Args:
            step: the publisher's number; None: the newest state.
        """
        self._drop_coming()
        if self._ranks.is_first:
            self._coming = step, self._thread.submit(self._prepare, step)

    def update(self, step: int | None = None) -> StreamState:
        """Bring the model to a step, on all ranks or on none. Nobody may use it meanwhile.

        If it fails after it began to write, the next call writes all of the state.

        Args:
            step: the publisher's number; None: the newest state.

        Raises:
            DeltaWeightsError: as for :meth:`deltaweights.torch.DeltaSubscriber.prepare`, on all ranks. The
                model is as before.
        """
        taken: list[Prepared] = []

        def take() -> StreamState:
            taken.append(self._take(step))
            return taken[0].state

        try:
            state = self._ranks.from_first(take)
            self._ranks.together(lambda: self._find_places(state))
            if self._ranks.all(self._is_current):
                self._patch(taken)
            else:
                self._ranks.from_first(lambda: self._commit(taken))
                self._overwrite(state)
            self._is_current = True
            return state
        finally:
            for prepared in taken:
                prepared.close()

    def _prepare(self, step: int | None) -> Prepared:
        if not self._mirror:
            self._mirror = self._subscriber.empty_state()
        return self._subscriber.prepare(self._mirror, step=step)

    def _take(self, step: int | None) -> Prepared:
        """The step, from the thread if that has it or is at it."""
        if self._coming is not None and self._coming[0] == step:
            coming, self._coming = self._coming[1], None
            return coming.result()
        self._drop_coming()
        return self._prepare(step)

    def _drop_coming(self) -> None:
        if self._coming is not None:
            future, self._coming = self._coming[1], None
            if not future.cancel() and future.exception() is None:
                future.result().close()

    def _find_places(self, state: StreamState) -> None:
        """Look again if the engine has replaced parameters since."""
        now = [
            state.tensors,
            *((n, p.data_ptr(), p.dtype, p.shape) for n, p in self._model.named_parameters()),
        ]
        if self._placed_at == now:
            return
        if self._is_requantized:
            self._places = Places({}, {name: "the engine quantizes the model" for name, *_ in state.tensors})
        else:
            tensors = {
                name: CheckpointTensor(dtype_of(name, code), torch_shape(name, code, shape))
                for name, code, shape in state.tensors
            }
            self._places = places(self._model, tensors)
        self._shapes = {name: torch_shape(name, code, shape) for name, code, shape in state.tensors}
        self._placed_at = now

    def _patch(self, taken: list[Prepared]) -> None:
        """Write what changes."""
        changes = (NewElements(c.name, c.indices, c.values) for one in taken for c in one.changes())
        ready: list[Writes] = []
        dense: list[str] = []

        def collect(passed: Iterator[NewElements]) -> None:
            for elements in passed:
                ready.append(located(self._places, [elements], skip=self._places.dense))
                dense.extend({elements.name} & self._places.dense.keys())

        self._ranks.each(changes, collect)
        self._ranks.from_first(lambda: self._commit(taken))
        self._is_current = False
        self._ranks.together(lambda: _write(ready))
        names = self._ranks.union(dense)
        self._load(self._ranks.union(self._places.dense) if names and self._is_requantized else names)

    def _overwrite(self, state: StreamState) -> None:
        """Write all of the mirror, one tensor at a time."""
        self._is_current = False

        def write(passed: Iterator[NewElements]) -> None:
            for elements in passed:
                located(self._places, [elements], skip=self._places.dense).write()

        dense = self._ranks.union(self._places.dense)
        self._ranks.each(self._whole(name for name, *_ in state.tensors), write)
        self._load(dense)

    def _load(self, names: list[str]) -> None:
        """Load tensors by the model's own loader."""
        if not names:
            return
        _log.info("loading %d tensors whole, such as %s", len(names), names[0])
        load: Any = self._model.load_weights

        def work(passed: Iterator[NewElements]) -> None:
            load((elements.name, elements.values.view(self._shapes[elements.name])) for elements in passed)

        self._ranks.each(self._whole(names), work)

    def _whole(self, names: Iterable[str]) -> Iterator[NewElements]:
        return (NewElements(name, None, self._mirror[name].reshape(-1)) for name in names)

    @staticmethod
    def _commit(taken: list[Prepared]) -> None:
        for prepared in taken:
            prepared.commit()


def _write(ready: Iterable[Writes]) -> None:
    for writes in ready:
        writes.write()
