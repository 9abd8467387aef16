"""The trainer's side of a weight stream: publishes the changes since the last state as an update."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from ...errors import DeltaError, DeltaWeightsError
from ...storage import Location
from ...workers import Workers
from .kept import KeptState, StateLayout, layout_of
from .records import (
    MAX_RECORD_BYTES,
    Head,
    StateRecord,
    StateReference,
    StreamFile,
    number_of,
    payload_name,
    read_head,
    read_record,
    record_name,
    state_digest,
    write_json,
)
from .state import State, StateTensor, state_of
from .transport import Gone, Publication, open_transport, other_writer


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


class DeltaPublisher:
    """Publishes the states of a model, each as the changes since the one before. A context manager.

    A copy of the state's bytes stays in the CPU's memory (pinned if the state is on a CUDA device). No other
    publisher may write to the stream meanwhile. An existing stream is continued: with an update if its newest
    state is ``base``, else with an anchor.

    Args:
        location: a folder, an fsspec URL (``s3://bucket/run-7``), or a repository on the Hub
            (``hf://org/name``), created if missing.
        base: the model that training starts from, or its ``state_dict()``: dense tensors of any dtype that
            safetensors has, on any device. Its tensors are the stream's: names, dtypes and shapes stay.
        step: the step of ``base``.
        anchor_every: number of updates after which a state is also published whole, for late subscribers;
            None for never.
        anchor_base: also publish ``base`` whole. Without it, only subscribers with these weights can join
            before the first other anchor.
        keep_anchors: number of anchors to keep; older files are removed. None keeps all.
        public: create a public repository on the Hub, or accept an existing one.
        threads: number of threads; if None, the number of usable cores, at most 8.

    Raises:
        OutputError: the stream cannot be written to, another publisher writes to it, or it belongs to a
            different model.
        CheckpointError: ``base`` has tensors without bytes, or of a dtype that safetensors does not have.
        DeltaError: the existing stream is damaged.
    """

    def __init__(
        self,
        location: Location,
        base: State,
        *,
        step: int = 0,
        anchor_every: int | None = 100,
        anchor_base: bool = True,
        keep_anchors: int | None = 2,
        public: bool = False,
        threads: int | None = None,
    ) -> None:
        _check_at_least(1, anchor_every=anchor_every, keep_anchors=keep_anchors, threads=threads)
        self._anchor_every = anchor_every
        self._keep_anchors = keep_anchors
        self._threads = threads
        self._writer = secrets.token_hex(8)
        self._transport = open_transport(location, public=public)
        state = state_of(base)
        with ExitStack() as opened, Workers(threads) as workers:
            self._folder = opened.enter_context(self._transport.writing())
            self._head, self._newest = self._find_newest()
            self._names = set(self._transport.names())
            #: Attempts are numbered too, so that a failed one's files never share a name with a later one's.
            self._number = max((number_of(name) or 0 for name in self._names), default=-1)
            self._anchors = self._find_anchors()
            self._kept = KeptState(state, workers)
            if self._newest:
                self._require_layout(_layout_in(self._newest), self._kept.layout)
                #: Whether the kept state is the newest state, so that an update can follow it.
                self._is_current = self._newest.state == state_digest(self._kept.tensors())
            else:
                self._publish(step, None, workers, with_anchor=anchor_base)
                self._is_current = True
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

    def publish(self, step: int, state: State, *, anchor: bool | None = None) -> PublishReport:
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
        tensors = state_of(state)
        self._require_layout(self._kept.layout, layout_of(tensors))
        if anchor is None:
            since = self._number + 1 - (self._anchors[-1].number if self._anchors else 0)
            anchor = self._anchor_every is not None and since >= self._anchor_every
        follows, self._is_current = self._is_current, False  # until this is done, the kept bytes are a mix
        with Workers(self._threads) as workers:
            if not follows:
                self._settle()
                self._kept.take(tensors, workers)
            update = tensors if follows else None
            report = self._publish(step, update, workers, with_anchor=anchor or not follows)
        self._is_current = True
        return report

    def _find_newest(self) -> tuple[bytes | None, StateRecord | None]:
        """The stream's head and newest record, if there are any."""
        data = self._transport.head()
        if data is None:
            return None, None
        return data, self._read(read_head(data, self._transport.where).newest)

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

    def _require_layout(self, ours: StateLayout, theirs: StateLayout) -> None:
        if ours == theirs:
            return
        differ = sorted({row[0] for row in set(ours) ^ set(theirs)})
        raise DeltaWeightsError(
            f"The state does not belong to the stream at {self._transport.where}",
            f"Tensor {differ[0]!r} is missing, new, tied differently, or has a different dtype or shape"
            + (f", and so are {len(differ) - 1} more." if differ[1:] else "."),
            "Start a new stream for a different model.",
        )

    def _publish(
        self, step: int, state: Mapping[str, StateTensor] | None, workers: Workers, *, with_anchor: bool
    ) -> PublishReport:
        """Publish ``state`` as an update; if None, publish the kept state without an update."""
        _check_at_least(0, step=step)
        self._number += 1
        payloads: dict[str, StreamFile] = {}
        changed: list[str] = []
        if state is not None:
            name = payload_name(self._number, self._writer, "update")
            with self._folder.create(name) as file:
                changed = self._kept.write_update(file, state, workers)
                payloads[name] = StreamFile(*file.digest())
                file.commit()
        if with_anchor:
            name = payload_name(self._number, self._writer, "anchor")
            with self._folder.create(name) as file:
                self._kept.write_anchor(file, workers)
                payloads[name] = StreamFile(*file.digest())
                file.commit()
        record = self._record(step, payloads)
        self._announce(record, payloads)
        update_bytes, anchor_bytes = (file.size if file else 0 for file in (record.update, record.anchor))
        nbytes = self._kept.nbytes
        return PublishReport(
            step, record.number, record.state, tuple(changed), update_bytes, anchor_bytes, nbytes
        )

    def _record(self, step: int, payloads: Mapping[str, StreamFile]) -> StateRecord:
        """The record of the kept state."""

        def payload(kind: Literal["update", "anchor"]) -> StreamFile | None:
            return payloads.get(payload_name(self._number, self._writer, kind))

        tensors = self._kept.tensors()
        return StateRecord(
            number=self._number,
            step=step,
            state=state_digest(tensors),
            tensors=tensors,
            previous=_reference(self._newest) if self._newest and payload("update") else None,
            update=payload("update"),
            anchor=payload("anchor"),
            last_anchor=self._anchors[-1] if self._anchors else None,
            writer=self._writer,
        )

    def _announce(self, record: StateRecord, payloads: Mapping[str, StreamFile]) -> None:
        """Make the record the newest, and remove files that no chain needs any more."""
        reference = _reference(record)
        anchors = [*self._anchors, reference] if record.anchor else self._anchors
        if self._keep_anchors is not None:
            anchors = anchors[-self._keep_anchors :]
        first = anchors[0].number if self._keep_anchors and len(anchors) == self._keep_anchors else 0
        removed = sorted(name for name in self._names if (number_of(name) or 0) < first)
        head = write_json(Head(reference, record.step))
        self._transport.publish(
            self._folder,
            Publication(
                payloads=payloads,
                record=(reference.name, write_json(record)),
                head=head,
                expected=self._head,
                removed=removed,
                message=f"Step {record.step}",
            ),
        )
        self._head, self._newest, self._anchors = head, record, anchors
        self._names = (self._names - set(removed)) | {*payloads, record_name(record.number)}


def _reference(record: StateRecord) -> StateReference:
    return StateReference(record.number, record.state, hashlib.sha256(write_json(record)).hexdigest())


def _layout_in(record: StateRecord) -> StateLayout:
    return [(tensor.name, tensor.dtype, tensor.shape, tensor.like) for tensor in record.tensors]


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
