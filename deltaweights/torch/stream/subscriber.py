"""The inference engine's side of a weight stream: brings a model to the newest state, in place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from torch import nn

from ...errors import BaseMismatchError, CheckpointError, DeltaError
from ...storage import Location
from ...workers import Workers
from ..wholeness import require_own
from ..wrappers import plain_state
from .payloads import StreamStep
from .records import (
    MAX_RECORD_BYTES,
    StateRecord,
    StateReference,
    StreamTensor,
    read_head,
    read_record,
    state_digest,
)
from .replay import Replay
from .state import State, StateTensor, digests, state_of
from .transport import Gone, open_transport

#: The number of attempts to find a way, since files may be removed meanwhile.
_ATTEMPTS = 5

#: A way to the newest state: records, oldest first, and the file to use of each.
_Way: TypeAlias = "list[tuple[StateRecord, Literal['update', 'anchor']]]"


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The result of :meth:`DeltaSubscriber.sync`.

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


@dataclass(frozen=True, slots=True)
class _Known:
    """The known content of the model's tensors: the state's digest and theirs, by name. ``marks`` shows
    whether they are still the same tensors, unchanged as far as torch notices."""

    marks: object
    state: str
    tensors: Mapping[str, str]


class DeltaSubscriber:
    """Follows a weight stream.

    Args:
        location: the stream's folder, fsspec URL, or repository on the Hub (``hf://org/name``).
        in_place: keep nothing to undo an update with. Else whatever was written is put back where a chunk
            turns out to be wrong; memory is two chunks a thread and six bytes for each bf16 weight that
            changes, and chunks of which much changes are decoded twice, first to check all of them. In place
            a part of the model is written by then, and the last anchor replaces all of it.
        threads: how many; if None, the number of usable cores, at most 8.
        allow_rollback: follow the stream to a state of a lower number than one that was synced before. Else
            that is refused: a publisher never goes back, also where its training does, so that somebody put
            an old head there, or began another stream.
        last_number: the :attr:`SyncReport.number` of the last state that was synced before, by a process that
            has ended: a subscriber keeps nothing on disk, so what it remembers ends with it. 0: none.

    Raises:
        ValueError: ``last_number`` is less than 0.
    """

    def __init__(
        self,
        location: Location,
        *,
        in_place: bool = False,
        threads: int | None = None,
        allow_rollback: bool = False,
        last_number: int = 0,
    ) -> None:
        if last_number < 0:
            raise ValueError(f"last_number is {last_number}, not at least 0")
        self._transport = open_transport(location)
        self._in_place = in_place
        self._threads = threads
        self._known: _Known | None = None
        self._tied: set[str] = set()  # names of the model alone, tied to such as the stream has
        self._allow_rollback = allow_rollback
        self._number = last_number  # of the last state that was synced

    def sync(self, model: State) -> SyncReport:
        """Bring ``model`` to the stream's newest state, bit for bit.

        The model may be in any state of the stream, or in none: then the last anchor leads there. The whole
        way is found and checked before anything is written. Do not use the model while this runs. If anything
        is wrong, the model is unchanged (except with ``in_place``). If this is interrupted while it writes or
        undoes changes, the next call notices. If the model is in the newest state already, only the head is
        read.

        Args:
            model: a model, or tensors by name: the publisher's names (without wrappers), dtypes and shapes.
                They may lie on any device, and be tied or not as they like; a name that the stream does not
                have may be there if it is tied to one that it has.

        Raises:
            CheckpointError: there is no stream, it cannot be read, or it belongs to a different model.
            BaseMismatchError: the model is in no state of the stream, and there is no anchor.
            DeltaError: the stream is damaged, or goes back to a state before the last one that was synced.
        """
        for _ in range(_ATTEMPTS):
            try:
                state = state_of(model)
                if isinstance(model, nn.Module):
                    require_own(model, plain_state(model))
                with Workers(self._threads) as workers:
                    report = self._sync(state, workers)
                self._number = report.number
                return report
            except Gone:
                continue  # files were removed meanwhile, so there is a newer state
        raise DeltaError(
            f"{self._transport.where} is not a whole stream",
            "Its head names files that are missing.",
            "Publish an anchor.",
        )

    def _sync(self, state: Mapping[str, StateTensor], workers: Workers) -> SyncReport:
        data = self._transport.head()
        if data is None:
            raise CheckpointError(
                f"There is no weight stream at {self._transport.where}",
                "It has no head yet.",
                "Check the location, or wait.",
            )
        head = read_head(data, self._transport.where)
        if head.newest.number < self._number and not self._allow_rollback:
            raise DeltaError(
                f"The stream at {self._transport.where} goes back",
                f"Its head names state {head.newest.number}; this subscriber was already at {self._number}.",
                "Sync again later. If it is meant, make a DeltaSubscriber with allow_rollback=True.",
            )
        state = _without_tied(state, state.keys() - self._tied)
        known = self._recognize(state, workers)
        if known.state == head.newest.state:
            return SyncReport(head.step, head.newest.number, known.state, 0, False, 0)
        newest = self._read(head.newest)
        ours = _without_tied(state, {tensor.name for tensor in newest.tensors})
        if len(ours) < len(state):
            self._tied |= state.keys() - ours.keys()
            return self._sync(ours, workers)
        self._require_fit(state, newest.tensors)
        ways = list(self._ways(newest, known.state))
        if not ways:
            raise BaseMismatchError(
                "The model is in no state of the stream",
                f"{self._transport.where} has neither an update from it nor an anchor.",
                "Load the publisher's base, or publish an anchor.",
            )
        for number, way in enumerate(ways, 1):
            try:
                return self._follow(way, state, known, workers)
            except (DeltaError, BaseMismatchError):
                if number == len(ways):
                    raise
        raise AssertionError

    def _recognize(self, state: Mapping[str, StateTensor], workers: Workers) -> _Known:
        """The state that the tensors are in: the last one if they are unchanged, or else found by their
        bytes."""
        marks = _marks(state)
        if self._known is None or self._known.marks != marks:
            found = digests(state, workers)
            rows = (StreamTensor(name, t.code, t.shape, found[name]) for name, t in state.items())
            self._known = _Known(marks, state_digest(rows), found)
        return self._known

    def _read(self, reference: StateReference) -> StateRecord:
        data = self._transport.read(reference.name, MAX_RECORD_BYTES)
        return read_record(data, reference, f"{reference.name} in {self._transport.where}")

    def _require_fit(self, state: Mapping[str, StateTensor], tensors: tuple[StreamTensor, ...]) -> None:
        ours = {(name, tensor.code, tensor.shape) for name, tensor in state.items()}
        theirs = {(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors}
        differ = sorted({row[0] for row in ours ^ theirs})
        if differ:
            raise CheckpointError(
                f"The model does not fit the stream at {self._transport.where}",
                f"Tensor {differ[0]!r} is missing, new, or has a different dtype or shape"
                + (f", and so are {len(differ) - 1} more." if differ[1:] else "."),
                "Pass the model that the publisher trains, or its tensors under the publisher's names.",
            )

    def _ways(self, newest: StateRecord, here: str) -> Iterator[_Way]:
        """The ways from the state ``here`` to the newest: by updates alone, and from the last anchor, the one
        with fewer bytes first."""
        updates: _Way = []
        anchored: _Way = []
        chain: _Way = []
        for record in self._back_from(newest):
            if record.anchor and not anchored:
                anchored = [(record, "anchor"), *updates]
            if record.update:
                updates.insert(0, (record, "update"))
            if not chain and record.previous and record.previous.state == here:
                chain = list(updates)
            if anchored and (chain or _nbytes(updates) > _nbytes(anchored)):
                break
        yield from sorted(filter(None, (chain, anchored)), key=_nbytes)

    def _back_from(self, record: StateRecord) -> Iterator[StateRecord]:
        """The record and those before it, as far as they exist."""
        yield record
        while record.previous:
            try:
                record = self._read(record.previous)
            except Gone:
                return
            yield record

    def _follow(
        self, way: _Way, state: Mapping[str, StateTensor], known: _Known, workers: Workers
    ) -> SyncReport:
        newest = way[-1][0]
        with ExitStack() as opened:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="deltaweights-")))
            steps = []
            for record, kind in way:
                file = self._transport.fetch(*next(iter(record.files(kind).items())), folder)
                opened.callback(file.close)
                steps.append(StreamStep(record, file, kind == "anchor"))
            replay = Replay(state, steps, known.tensors)
            self._known = None  # unknown until this is done
            replay.apply(workers, in_place=self._in_place)
        found = {tensor.name: tensor.digest for tensor in newest.tensors}
        self._known = _Known(_marks(state), newest.state, found)
        updates = sum(kind == "update" for _, kind in way)
        return SyncReport(
            newest.step, newest.number, newest.state, updates, way[0][1] == "anchor", _nbytes(way)
        )


def _without_tied(state: Mapping[str, StateTensor], names: Set[str]) -> Mapping[str, StateTensor]:
    """The state without those tensors that only share the memory of others that are among ``names``."""
    named = {tensor.identity for name, tensor in state.items() if name in names and tensor.nbytes}
    return {n: tensor for n, tensor in state.items() if n in names or tensor.identity not in named}


def _nbytes(way: _Way) -> int:
    return sum(record.nbytes(kind) for record, kind in way)


def _marks(state: Mapping[str, StateTensor]) -> object:
    return [(name, tensor.identity, tensor.version) for name, tensor in state.items()]
