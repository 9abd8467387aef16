"""The inference engine's side of a weight stream: brings a model to a published state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ....errors import BaseMismatchError, CheckpointError, DeltaError
from ....storage import Location
from ....workers import Workers
from ..heads import HeadTrust, StreamKeys
from ..payloads import StreamStep
from ..pieces import Published
from ..records import Head, StateRecord, StreamTensor, damaged
from ..split import cuts_of, has_cuts
from ..transport import Gone, open_transport
from .held import HeldChanges
from .history import History, Way
from .mirror import empty_tensors
from .position import Known, Model, Position
from .prepared import Prepared, StreamState, SyncReport
from .replay import Replay
from .writing import Writing

#: The number of attempts to find a way, since files may be removed meanwhile.
_ATTEMPTS = 5

_Result = TypeVar("_Result")


class DeltaSubscriber:
    """Follows a weight stream.

    Args:
        location: the stream's folder, fsspec URL, or repository on the Hub (``hf://org/name``).
        threads: how many; if None, the number of usable cores, at most 8. Beside what is held of the changes
            (:class:`Prepared`), each thread has memory for two chunks of 2 MiB.
        allow_rollback: follow the stream to a state of a lower number than one that was synced before. Else
            that is refused: a publisher never goes back, also where its training does, so that somebody put
            an old head there, or began another stream, or asked for an earlier step.
        last_number: the :attr:`SyncReport.number` of the last state that was synced before, by a process that
            has ended: a subscriber keeps nothing on disk, so what it remembers ends with it. 0: none.
        require_signature: who must have signed the stream's heads: the path of a public key (ECDSA or
            Ed25519), a :class:`deltaweights.TrustedKey`, or several, of which one suffices, while keys are
            changed. None: nobody. A head that they did not sign is refused, and so is one that is earlier
            than another one that was seen, unless ``allow_rollback`` is set.
        stream_name: the name that the publisher gave to the stream, where one key signs several. None: any,
            but the same from the first head on.

    Raises:
        ValueError: ``last_number`` is less than 0, no stream can have that name, or there is a name and no
            signature is required.
        SigningError: a key cannot be read, or the extra ``sign`` is not installed.
    """

    def __init__(
        self,
        location: Location,
        *,
        threads: int | None = None,
        allow_rollback: bool = False,
        last_number: int = 0,
        require_signature: StreamKeys | None = None,
        stream_name: str | None = None,
    ) -> None:
        if last_number < 0:
            raise ValueError(f"last_number is {last_number}, not at least 0")
        if stream_name is not None and require_signature is None:  # anybody can give a stream any name
            raise ValueError("stream_name is given without require_signature")
        self._transport = open_transport(location)
        trust = (
            None if require_signature is None else HeadTrust.of(require_signature, stream_name, last_number)
        )
        self._history = History(self._transport, trust, may_go_back=allow_rollback)
        self._threads = threads
        self._tied: set[str] = set()  # names of the model alone, tied to such as the stream has
        self._allow_rollback = allow_rollback
        self._position = Position(last_number)

    def newest(self) -> StreamState:
        """The stream's newest state. Reads its head and one record.

        Raises:
            NotPublishedError: there is no stream yet.
            CheckpointError: it cannot be read.
            DeltaError: it is damaged.
        """
        return self._attempt(lambda: StreamState.of(self._history.read(self._history.head().newest)))

    def states(self) -> tuple[StreamState, ...]:
        """The states that can be asked for by their steps, oldest first: of each step the newest, as far back
        as the stream has them. Where a training went back to an earlier step, those from there are left out.

        The oldest may be there without an anchor: then only its own weights lead to it. Reads a record for
        each.

        Raises:
            NotPublishedError: there is no stream yet.
            CheckpointError: it cannot be read.
            DeltaError: it is damaged.
        """

        def read() -> tuple[StreamState, ...]:
            found: list[StreamState] = []
            for record in self._history.steps(self._history.head()):
                state = StreamState.of(record)
                if found and found[-1].tensors == state.tensors:
                    state = replace(state, tensors=found[-1].tensors)  # one object instead of thousands
                found.append(state)
            if not found:
                raise Gone
            return tuple(reversed(found))

        return self._attempt(read)

    def empty_state(self, *, shared: bool = False) -> dict[str, Tensor]:
        """Tensors of zeros on the CPU, with the names, dtypes, shapes and ties of the stream: a mirror, for
        engines whose own parameters are fused or sharded. Pass it to :meth:`prepare` or :meth:`sync`; an
        anchor leads there.

        Args:
            shared: put them into one piece of shared memory, which processes of this machine that get the
                tensors through ``torch.multiprocessing`` have in common.

        Raises:
            NotPublishedError: there is no stream yet.
            CheckpointError: it cannot be read, torch does not have one of its dtypes, or the memory does not
                suffice.
            DeltaError: it is damaged.
        """
        record = self._attempt(lambda: self._history.read(self._history.head().newest))
        return empty_tensors(record, self._transport.where, shared=shared)

    def sync(self, model: Published, *, step: int | None = None) -> SyncReport:
        """Bring ``model`` to the stream's newest state, bit for bit: :meth:`prepare` and
        :meth:`Prepared.commit` in one. Do not use the model while this runs.

        It takes less memory than the two if much changes, as where an anchor is loaded: chunks of which much
        changes are not held, but decoded twice, first to check all of them. On a GPU that runs kernels, lists
        of changes are applied and checked there.

        If the model is in the newest state already, only the head is read; and the bytes of a model that was
        made in inference mode, since torch does not count what is written to it. If anything is wrong, the
        model is unchanged. If the machine fails while this writes, the next call notices.

        Args:
            model, step: as for :meth:`prepare`.

        Raises as :meth:`prepare` does.
        """
        with self._prepare(model, step, is_sync=True) as prepared:
            return prepared.commit()

    def prepare(self, model: Published, *, step: int | None = None) -> Prepared:
        """Fetch, check and decode what brings ``model`` to the stream's newest state, or to that of ``step``.
        Nothing is written to the model, which may be read meanwhile, as for serving.

        The model may be in any state of the stream, or in none: then the last anchor leads there. Several
        updates are taken at once: what is held is how the model differs from the last state. When this
        returns, no file and no network is needed any more. :class:`Prepared` says how much memory it takes.

        With ``threads=1``, this leaves the other cores to the engine.

        Args:
            model: a model, or tensors by name: the publisher's names (without wrappers), dtypes and shapes.
                They may lie on any device, and be tied or not as they like; a name that the stream does not
                have may be there if it is tied to one that it has. If it is sharded (DTensors,
                :class:`Part`), each process takes what it has, which need not be all names. Its parts have to
                be parts of the stream's. It begins with an anchor, since no process alone can tell which
                state its parts are in; ``step`` brings all of them to the same one.
            step: the publisher's number of a state, so that several engines take the same one; of those
                published twice the newest. None: the newest state.

        Raises:
            NotPublishedError: there is no stream yet, or ``step`` is not published yet. Wait, and call again.
            CheckpointError: the stream cannot be read, belongs to a different model, or has no such step, or
                has it no more.
            SignatureError: its head is not signed as required; nothing of its records was read.
            BaseMismatchError: the model is in no state of the stream, and there is no anchor.
            DeltaError: the stream is damaged, or this would go back to a state before the last one that was
                synced.
        """
        return self._prepare(model, step, is_sync=False)

    def _prepare(self, given: Published, step: int | None, *, is_sync: bool) -> Prepared:
        def attempt() -> Prepared:
            model = Model.of(given)
            remembered = self._position.latest
            with Workers(self._threads) as workers:
                try:
                    return self._find(model, step, workers, is_sync=is_sync)
                except BaseMismatchError as error:
                    if remembered is None or self._position.latest is not remembered:
                        raise
                    self._position.latest = None  # other code has written to it: look at its bytes
                    try:
                        return self._find(model, step, workers, is_sync=is_sync)
                    except BaseMismatchError:
                        raise error from None  # which names the tensor

        return self._attempt(attempt)

    def _find(self, model: Model, step: int | None, workers: Workers, *, is_sync: bool) -> Prepared:
        head = self._history.head()
        target = None if step is None or step == head.step else self._history.of_step(head, step)
        self._require_forward(target.number if target else head.newest.number)
        model = model.without_tied(model.state.keys() - self._tied)
        known = self._position.known(model)
        if known and known.state == (target.state if target else head.newest.state):
            return self._nothing_new(model, known, head, target)
        target = target or self._history.read(head.newest)
        ours = model.without_tied({tensor.name for tensor in target.tensors})
        self._tied |= model.state.keys() - ours.state.keys()
        self._require_fit(ours, target.tensors)
        model = ours.split(cuts_of(target.tensors))
        known = self._position.recognize(model, target.tensors, workers)
        if known.state == target.state:
            return self._nothing_new(ours, known, head, target)
        ways = self._history.ways(target, known.state)
        if not ways:
            raise BaseMismatchError(
                "The model is in no state of the stream",
                f"{self._transport.where} has neither an update from it nor an anchor.",
                "Load the publisher's base, or publish an anchor.",
            )
        for number, way in enumerate(ways, 1):
            try:
                return self._follow(way, model, known, workers, is_sync=is_sync)
            except (DeltaError, BaseMismatchError):
                if number == len(ways):
                    raise
        raise AssertionError

    def _require_forward(self, number: int) -> None:
        if number < self._position.number and not self._allow_rollback:
            raise DeltaError(
                f"The stream at {self._transport.where} goes back",
                f"This leads to state {number}; this subscriber was already at {self._position.number}.",
                "Sync again later. If it is meant, make a DeltaSubscriber with allow_rollback=True.",
            )

    def _require_fit(self, model: Model, tensors: tuple[StreamTensor, ...]) -> None:
        ours = {(name, *facts) for name, facts in model.facts.items()}
        theirs = {(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors}
        differ = sorted({row[0] for row in (ours - theirs if model.is_partial else ours ^ theirs)})
        if differ:
            raise CheckpointError(
                f"The model does not fit the stream at {self._transport.where}",
                f"Tensor {differ[0]!r} is missing, new, or has a different dtype or shape"
                + (f", and so are {len(differ) - 1} more." if differ[1:] else "."),
                "Pass the model that the publisher trains, or its tensors under the publisher's names.",
            )

    def _nothing_new(self, model: Model, known: Known, head: Head, target: StateRecord | None) -> Prepared:
        """What leads from a state to itself."""
        step, number = (target.step, target.number) if target else (head.step, head.newest.number)
        tensors = tuple((name, *facts) for name, facts in sorted(model.facts.items()))
        state = StreamState(step, number, known.state, tensors)
        report = SyncReport(step, number, known.state, 0, False, 0)
        writing = Writing(model.split(known.cuts), HeldChanges([]), self._threads)
        return Prepared(state, report, writing, self._position, known.sums)

    def _follow(self, way: Way, model: Model, known: Known, workers: Workers, *, is_sync: bool) -> Prepared:
        newest = way[-1][0]
        if not all(has_cuts(record, model.cuts, is_partial=model.is_partial) for record, _ in way):
            raise damaged(self._transport.where, "An update cuts tensors in another way than the one before")
        with ExitStack() as opened:
            folder = opened.enter_context(self._transport.downloading())
            steps, nbytes = [], 0
            for record, kind in way:
                wanted = {place for _, key, _, place in record.payloads() if key in model.state}
                files = {}
                for place, (name, stored) in enumerate(record.files(kind).items()):
                    if place in wanted:
                        files[place] = self._transport.fetch(name, stored, folder)
                        opened.callback(files[place].close)
                        nbytes += stored.size
                steps.append(StreamStep(record, files, kind == "anchor"))
            replay = Replay(model.state, steps, known.sums)
            held = (replay.hold_little if is_sync else replay.hold)(workers)
            writing = Writing(model, held, self._threads)
            if is_sync:
                writing.follow(replay, opened.pop_all())
        updates = sum(kind == "update" for _, kind in way)
        report = SyncReport(newest.step, newest.number, newest.state, updates, way[0][1] == "anchor", nbytes)
        return Prepared(StreamState.of(newest), report, writing, self._position, replay.sums)

    def _attempt(self, read: Callable[[], _Result]) -> _Result:
        for _ in range(_ATTEMPTS):
            try:
                return read()
            except Gone:
                continue  # files were removed meanwhile, so there is a newer state
        raise DeltaError(
            f"{self._transport.where} is not a whole stream",
            "Its head names files that are missing.",
            "Publish an anchor.",
        )
