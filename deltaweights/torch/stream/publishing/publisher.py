"""The trainer's side of a weight stream: publishes the changes since the last state as an update."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from ....errors import DeltaError, DeltaWeightsError, OutputError, SigningError
from ....storage import Location
from ....workers import Workers
from ..heads import HeadSigner, StreamSigners, require_name
from ..pieces import Offer, Pieces, Published, pieces_of
from ..records import (
    MAX_RECORD_BYTES,
    PARTS_VERSION,
    WHOLE_VERSION,
    Head,
    Kind,
    StateRecord,
    StateReference,
    StreamFile,
    StreamTensor,
    number_of,
    payload_name,
    read_head,
    read_record,
    record_name,
    state_digest,
    write_json,
)
from ..state import StateTensor
from ..transport import Gone, Publication, open_transport, other_writer
from .division import Task, plan
from .kept import KeptState
from .ranks import RankLostError, Ranks

_KINDS: tuple[Kind, ...] = ("update", "anchor")


@dataclass(frozen=True, slots=True)
class PublishReport:
    """The result of :meth:`DeltaPublisher.publish`.

    Attributes:
        step: the step that was published.
        number: its place in the stream.
        state: the state's digest.
        changed: names of the tensors that changed, tied ones once; empty if there is no update.
        update_bytes, anchor_bytes: size of the payload files; 0 if there is none.
        state_bytes: size of all tensors, tied ones once.
    """

    step: int
    number: int
    state: str
    changed: tuple[str, ...]
    update_bytes: int
    anchor_bytes: int
    state_bytes: int


#: What has to stay as it is within a stream, of a tensor or a piece of one, its name first.
Facts: TypeAlias = tuple[object, ...]


class _Start(NamedTuple):
    """What rank 0 tells the others when they begin: the writer's name, and each rank's task."""

    writer: str
    tasks: Sequence[Task]


class _Attempt(NamedTuple):
    """What rank 0 tells the others before they write: the state's number, whether an update leads to it, and
    whether it is published whole."""

    number: int
    has_update: bool
    has_anchor: bool


class _Written(NamedTuple):
    """What a rank tells rank 0 after it has written: the checksums of its pieces, their size, the names of
    the payloads that changed, and its files, if it has any."""

    sums: Mapping[str, bytes]
    nbytes: int
    changed: Sequence[str]
    files: Mapping[Kind, StreamFile]


class DeltaPublisher:
    """Publishes the states of a model, each as the changes since the one before. A context manager.

    A copy of the state's bytes stays in the CPU's memory (pinned if the state is on a CUDA device). No other
    publisher may write to the stream meanwhile. An existing stream is continued: with an update if its newest
    state is ``base``, else with an anchor.

    With ``process_group``, the ranks of the group publish one state together: each makes a publisher with the
    same arguments, and calls :meth:`publish` whenever the others do. Each compares, encodes and writes the
    parts of tensors that it has, and keeps a copy of these alone. If one fails, every rank gets an error, and
    nothing is published.

    Args:
        location: a folder, an fsspec URL (``s3://bucket/run-7``), or a repository on the Hub
            (``hf://org/name``), created if missing. With a process group it is a folder that all ranks share,
            or an URL.
        base: the model that training starts from, or its ``state_dict()``: dense tensors of any dtype that
            safetensors has, on any device. Its tensors are the stream's: names, dtypes and shapes stay.
            With a process group, tensors may be DTensors (FSDP2, tensor parallelism), or :class:`Part` (one
            or several under a name; or all of them without names, in a list), and a rank need not have
            all names. Parts that several ranks have are taken to be equal, and written by one of them; so
            are whole tensors, by the first rank that has them.
        step: the step of ``base``.
        dtype: what to publish floating-point tensors in that have more bits an element, such as float32
            master weights: bit for bit ``tensor.to(dtype)``, without a copy of the whole model. All others
            stay as they are. None: all stay.
        process_group: the ranks that publish together; None: this process alone.
        anchor_every: number of updates after which a state is also published whole, for late subscribers;
            None for never.
        anchor_base: also publish ``base`` whole. Without it, only subscribers with these weights can join
            before the first other anchor.
        keep_anchors: number of anchors to keep; older files are removed. None keeps all.
        public: create a public repository on the Hub, or accept an existing one.
        signer: the key that signs each head (ECDSA or Ed25519), or several, each of which does, while keys
            are changed; with a process group, rank 0 reads them. None: heads are not signed. An existing
            stream whose head none of these keys signed is not continued: it begins anew, with an anchor.
        stream_name: the name that is signed, too, so that no other stream of these keys can take this one's
            place: at most 200 letters, digits and ``.:/_-``. None: that of the stream that is continued, or a
            random one.
        quick: save time rather than the last bytes where fewer than 2% of some weights changed. False: such
            updates of trained bf16 weights take a third fewer bytes, and longer to encode and to decode.
        threads: number of threads of each process; if None, the number of usable cores, at most 8. With a
            process group, the cores are divided among the processes of this machine.

    Raises:
        OutputError: the stream cannot be written to, another publisher writes to it, or it belongs to a
            different model, or has another name; or another rank failed.
        SigningError: a key cannot be read, or the extra ``sign`` is not installed.
        CheckpointError: ``base`` has tensors without bytes, or of a dtype that safetensors does not have; or
            parts that do not make up a tensor.
        DeltaError: the existing stream is damaged.
    """

    def __init__(
        self,
        location: Location,
        base: Published,
        *,
        step: int = 0,
        dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
        anchor_every: int | None = 100,
        anchor_base: bool = True,
        keep_anchors: int | None = 2,
        public: bool = False,
        signer: StreamSigners | None = None,
        stream_name: str | None = None,
        quick: bool = True,
        threads: int | None = None,
    ) -> None:
        _check_at_least(1, anchor_every=anchor_every, keep_anchors=keep_anchors, threads=threads)
        self._ranks = Ranks(process_group)
        self._anchor_every = anchor_every
        self._keep_anchors = keep_anchors
        self._threads = self._ranks.share_of_cores() if threads is None else threads
        self._dtype = dtype
        require_name(stream_name)
        self._signing = (signer, stream_name)
        self._signer: HeadSigner | None = None  # of rank 0
        with ExitStack() as opened:
            with self._ranks.together() as told:
                _check_at_least(0, step=step)
                self._transport = open_transport(location, public=public)
                if not self._ranks.is_alone:
                    self._transport.joining()  # refused at once where it cannot be
                pieces = self._pieces(base)
                self._offers = pieces.offers
                told.say(self._offers)
            start = self._ranks.first(lambda: self._begin(opened, told.heard))
            self._writer, self._task = start.writer, start.tasks[self._ranks.rank]
            with self._ranks.together() as told, Workers(self._threads) as workers:
                if self._ranks.rank:
                    self._folder = opened.enter_context(self._transport.joining())
                self._kept = KeptState(self._own(pieces), workers, quick=quick)
                told.say(self._kept.sums)
            #: Whether the kept state is the newest state, so that an update can follow it.
            is_current = self._ranks.first(lambda: self._is_newest(told.heard))
            self._is_current = is_current is not False
            if is_current is None:
                attempt = self._ranks.first(lambda: self._attempt(has_update=False, has_anchor=anchor_base))
                self._publish(step, {}, attempt)
            self._opened = opened.pop_all()

    def __enter__(self) -> DeltaPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the stream for other publishers. This one cannot publish afterwards."""
        self._opened.close()

    def publish(self, step: int, state: Published, *, anchor: bool | None = None) -> PublishReport:
        """Publish the state after ``step``.

        When this returns, readers see the state. After an error, they see the state before (or this one, if
        only a server's answer was lost), and the next call publishes an anchor instead of an update.
        ``state`` must not change meanwhile.

        Args:
            step: a number chosen by the caller, at least 0.
            state: the model or its ``state_dict()``, with the stream's names, dtypes, shapes and ties.
            anchor: whether to publish the state whole as well; if None, ``anchor_every`` decides.

        Raises:
            OutputError: another publisher wrote to the stream, or it cannot be written to.
            DeltaWeightsError: ``state`` has different tensors.
        """
        with self._ranks.together() as told:
            _check_at_least(0, step=step)
            pieces = self._pieces(state)
            self._require_layout(self._offers, pieces.offers)
            told.say((step, anchor))
        attempt = self._ranks.first(lambda: self._decide(told.heard))
        self._is_current = False  # until this is done, the kept bytes are a mix
        report = self._publish(step, self._own(pieces), attempt)
        self._is_current = True
        return report

    def _pieces(self, state: Published) -> Pieces:
        return pieces_of(state, self._dtype, is_alone=self._ranks.is_alone)

    def _own(self, pieces: Pieces) -> dict[str, StateTensor]:
        """What this rank writes, by the names of the payloads."""
        return {name: pieces.tensors[key] for name, key in self._task.keys.items()}

    def _begin(self, opened: ExitStack, offers: Sequence[Sequence[Offer]]) -> _Start:
        """On rank 0: take the stream, and decide who writes what."""
        self._division = plan(offers)
        signer, name = self._signing
        if name is not None and signer is None:
            raise SigningError("The stream's name needs a signer", "It is signed.", "Pass its signer.")
        self._signer = None if signer is None else HeadSigner(signer, name)
        self._folder = opened.enter_context(self._transport.writing())
        self._head, self._newest = self._find_newest()
        self._names = set(self._transport.names())
        #: Attempts are numbered too, so that a failed one's files never share a name with a later one's.
        self._number = max((number_of(name) or 0 for name in self._names), default=-1)
        self._anchors = self._find_anchors()
        if self._newest:
            self._require_layout(_layout_in(self._newest.tensors), self._division.facts)
        return _Start(secrets.token_hex(8), self._division.tasks(self._ranks.size))

    def _is_newest(self, sums: Sequence[Mapping[str, bytes]]) -> bool | None:
        """On rank 0: whether the kept state is the newest one, in the same parts; None if there is none."""
        return None if self._newest is None else self._newest.state == state_digest(self._tensors(sums))

    def _tensors(self, sums: Sequence[Mapping[str, bytes]]) -> tuple[StreamTensor, ...]:
        """The record's entries for the kept state, from the checksums of every rank's pieces."""
        return self._division.tensors({name: one for own in sums for name, one in own.items()})

    def _decide(self, asked: Sequence[tuple[int, bool | None]]) -> _Attempt:
        """On rank 0: what kind of files to write."""
        if len(set(asked)) > 1:
            raise OutputError(
                "The ranks do not publish the same step",
                f"They passed {sorted({step for step, _ in asked})}, or differ in `anchor`.",
                "Call publish on every rank with the same step.",
            )
        if not self._is_current:
            self._settle()
        anchor = asked[0][1]
        if anchor is None:
            since = self._number + 1 - (self._anchors[-1].number if self._anchors else 0)
            anchor = self._anchor_every is not None and since >= self._anchor_every
        return self._attempt(has_update=self._is_current, has_anchor=anchor or not self._is_current)

    def _attempt(self, *, has_update: bool, has_anchor: bool) -> _Attempt:
        """On rank 0: an attempt to publish, with a number of its own."""
        self._number += 1
        return _Attempt(self._number, has_update, has_anchor)

    def _find_newest(self) -> tuple[bytes | None, StateRecord | None]:
        """The stream's head and newest record, if there are any."""
        data = self._transport.head()
        if data is None:
            return None, None
        head = read_head(data, self._transport.where)
        if self._signer is None and head.signatures:
            raise OutputError(
                f"The stream at {self._transport.where} is signed",
                "Subscribers that know its keys would refuse the next state.",
                "Pass its signer, or choose a different location.",
            )
        if self._signer is not None and not self._signer.vouches_for(head, self._transport.where):
            return data, None
        return data, self._read(head.newest)

    def _read(self, reference: StateReference) -> StateRecord:
        where = f"{reference.name} in {self._transport.where}"
        try:
            return read_record(self._transport.read(reference.name, MAX_RECORD_BYTES), reference, where)
        except Gone:
            raise DeltaError(
                f"{self._transport.where} is not a whole stream",
                f"{reference.name} is missing.",
                "Choose a different location.",
            ) from None

    def _find_anchors(self) -> list[StateReference]:
        """The anchors that decide which files can be removed, oldest first."""
        found: list[StateReference] = []
        record = self._newest
        while record and (self._keep_anchors is None or len(found) < self._keep_anchors):
            if record.anchor:
                found.insert(0, _reference(record))
            earlier = record.last_anchor
            record = self._read(earlier) if earlier and earlier.name in self._names else None
        return found

    def _settle(self) -> None:
        """After a failed attempt, find out whether it succeeded nevertheless."""
        head, newest = self._find_newest()
        if head == self._head:
            return
        if newest is None or newest.writer != self._writer:
            raise other_writer(self._transport.where)
        self._head, self._newest, self._anchors = head, newest, self._find_anchors()

    def _require_layout(self, ours: Sequence[Facts], theirs: Sequence[Facts]) -> None:
        differ = sorted({str(row[0]) for row in set(ours) ^ set(theirs)})
        if not differ:
            return
        raise DeltaWeightsError(
            f"The state does not belong to the stream at {self._transport.where}",
            f"Tensor {differ[0]!r} is missing, new, tied or cut differently, or has another dtype or shape"
            + (f", and so are {len(differ) - 1} more." if differ[1:] else "."),
            "Start a new stream for a different model.",
        )

    def _publish(self, step: int, pieces: Mapping[str, StateTensor], attempt: _Attempt) -> PublishReport:
        """Publish ``pieces``; if there is none, what is kept."""
        files: dict[Kind, StreamFile] = {}
        names = {kind: payload_name(attempt.number, self._writer, kind, self._task.place) for kind in _KINDS}
        try:
            with self._ranks.together() as told:
                with Workers(self._threads) as workers:
                    changed = self._write(pieces, attempt, files, names, workers)
                if not self._ranks.is_alone:
                    self._transport.send(self._folder, {names[kind]: file for kind, file in files.items()})
                told.say(_Written(self._kept.sums, self._kept.nbytes, changed, files))
        except RankLostError:  # rank 0 may go on with the files
            raise
        except BaseException:
            self._transport.withdraw(self._folder, [names[kind] for kind in files])
            raise
        return self._ranks.first(lambda: self._announce(step, attempt, told.heard))

    def _write(
        self,
        pieces: Mapping[str, StateTensor],
        attempt: _Attempt,
        files: dict[Kind, StreamFile],
        names: Mapping[Kind, str],
        workers: Workers,
    ) -> list[str]:
        """Write this rank's payload files. Puts each into ``files``. Returns the names of the payloads that
        changed."""
        if pieces and not attempt.has_update:
            self._kept.take(pieces, workers)
        changed: list[str] = []
        if self._task.keys and attempt.has_update:
            with self._folder.create(names["update"]) as file:
                changed = self._kept.write_update(file, pieces, workers)
                files["update"] = StreamFile(*file.digest())
                file.commit()
        if self._task.keys and attempt.has_anchor:
            with self._folder.create(names["anchor"]) as file:
                self._kept.write_anchor(file, workers)
                files["anchor"] = StreamFile(*file.digest())
                file.commit()
        return changed

    def _record(self, step: int, attempt: _Attempt, written: Sequence[_Written]) -> StateRecord:
        """The record of the kept state."""

        def files(kind: Kind, is_there: bool) -> StreamFile | tuple[StreamFile, ...] | None:
            found = tuple(one.files[kind] for one in written if kind in one.files)
            return None if not is_there else found if self._division.has_parts else found[0]

        tensors = self._tensors([one.sums for one in written])
        return StateRecord(
            number=attempt.number,
            step=step,
            state=state_digest(tensors),
            tensors=tensors,
            previous=_reference(self._newest) if self._newest and attempt.has_update else None,
            update=files("update", attempt.has_update),
            anchor=files("anchor", attempt.has_anchor),
            last_anchor=self._anchors[-1] if self._anchors else None,
            writer=self._writer,
            format_version=PARTS_VERSION if self._division.has_parts else WHOLE_VERSION,
        )

    def _announce(self, step: int, attempt: _Attempt, written: Sequence[_Written]) -> PublishReport:
        """On rank 0: make the record the newest, and remove files that no chain needs any more."""
        record = self._record(step, attempt, written)
        reference, content = _reference(record), write_json(record)
        if len(content) > MAX_RECORD_BYTES:
            raise OutputError(
                "There are too many tensors, or too many parts of them",
                f"The record has {len(content):,} bytes; readers accept at most {MAX_RECORD_BYTES:,}.",
                "Publish from fewer ranks, or fewer tensors.",
            )
        anchors = [*self._anchors, reference] if attempt.has_anchor else self._anchors
        if self._keep_anchors is not None:
            anchors = anchors[-self._keep_anchors :]
        first = anchors[0].number if self._keep_anchors and len(anchors) == self._keep_anchors else 0
        removed = sorted(name for name in self._names if (number_of(name) or 0) < first)
        named = Head(reference, record.step, format_version=record.format_version)
        head = write_json(named) if self._signer is None else self._signer.sign(named)
        payloads = record.files("update") | record.files("anchor")
        self._transport.publish(
            self._folder,
            Publication(
                payloads=payloads,
                record=(reference.name, content),
                head=head,
                expected=self._head,
                removed=removed,
                message=f"Step {record.step}",
                is_shared=not self._ranks.is_alone,
            ),
        )
        self._head, self._newest, self._anchors = head, record, anchors
        self._names = (self._names - set(removed)) | {*payloads, record_name(record.number)}
        return PublishReport(
            step,
            record.number,
            record.state,
            self._division.names(name for one in written for name in one.changed),
            record.nbytes("update"),
            record.nbytes("anchor"),
            sum(one.nbytes for one in written),
        )


def _reference(record: StateRecord) -> StateReference:
    return StateReference(record.number, record.state, hashlib.sha256(write_json(record)).hexdigest())


def _layout_in(tensors: Sequence[StreamTensor]) -> list[Facts]:
    return [(tensor.name, tensor.dtype, tensor.shape, tensor.like) for tensor in tensors]


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
