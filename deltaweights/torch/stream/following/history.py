"""The published states of a stream, as its head and its records tell, and the ways from one to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from ....errors import CheckpointError, NotPublishedError
from ..heads import HeadTrust
from ..records import (
    MAX_RECORD_BYTES,
    Head,
    Kind,
    StateRecord,
    StateReference,
    read_head,
    read_record,
)
from ..transport import Gone, Transport

#: The most records that are read to find a step.
_MOST_BACK = 10_000

#: A way to a state: records, oldest first, and the file to use of each.
Way: TypeAlias = list[tuple[StateRecord, Kind]]


class History:
    """Reads heads and records of the stream at ``transport``. What is there may be removed meanwhile: then
    :class:`Gone` is raised.

    Args:
        trust: who must have signed the heads; None: nobody.
        may_go_back: take signed heads that are earlier than the last one.
    """

    def __init__(
        self, transport: Transport, trust: HeadTrust | None = None, *, may_go_back: bool = False
    ) -> None:
        self._transport = transport
        self._trust = trust
        self._may_go_back = may_go_back
        #: The last head that :meth:`steps` walked back from, and each step's record.
        self._walked: tuple[StateReference, dict[int, StateReference]] | None = None

    def head(self) -> Head:
        """The current head.

        Raises:
            NotPublishedError: there is none yet.
            SignatureError: it is not signed as it must be.
            DeltaError: it is damaged.
        """
        data = self._transport.head()
        if data is None:
            raise NotPublishedError(
                f"There is no weight stream at {self._transport.where}",
                "It has no head yet.",
                "Check the location, or wait.",
            )
        head = read_head(data, self._transport.where)
        if self._trust is not None:
            self._trust.check(head, self._transport.where, may_go_back=self._may_go_back)
        return head

    def read(self, reference: StateReference) -> StateRecord:
        """The record that ``reference`` names. Raises :class:`DeltaError` if it is damaged."""
        data = self._transport.read(reference.name, MAX_RECORD_BYTES)
        return read_record(data, reference, f"{reference.name} in {self._transport.where}")

    def of_step(self, head: Head, step: int) -> StateRecord:
        """The newest record of ``step``, looked for from the head backwards, up to an earlier step.

        Raises:
            NotPublishedError: the newest step is an earlier one.
            CheckpointError: the stream has no such step, or has it no more.
        """
        if step > head.step:
            raise NotPublishedError(
                f"Step {step} is not published yet at {self._transport.where}",
                f"The newest step there is {head.step}.",
                "Wait, and try again.",
            )
        if self._walked and self._walked[0] == head.newest and step in self._walked[1]:
            return self.read(self._walked[1][step])
        later: StateRecord | None = None
        for record, _ in zip(self._back(head.newest), range(_MOST_BACK), strict=False):
            if record.step == step:
                return record
            if record.step < step:
                why = f"Its step {record.step} is followed by "
                why += f"{later.step}." if later else "no later one."
                raise self._no_such_step(step, why)
            later = record
        if later is None:
            raise Gone  # the head's own record: there is a newer one
        raise self._no_such_step(step, f"The steps that are still there are {later.step} to {head.step}.")

    def steps(self, head: Head) -> Iterator[StateRecord]:
        """The records that :meth:`of_step` finds, newest first: of each step the newest one, as far as they
        exist. While the head stays, it finds them without another walk."""
        found: dict[int, StateReference] = {}
        reference, least = head.newest, head.step + 1
        for record, _ in zip(self._back(head.newest), range(_MOST_BACK), strict=False):
            if record.step < least:  # else the training went back from there
                found[record.step], least = reference, record.step
                yield record
            if not (earlier := record.previous or record.last_anchor):
                break
            reference = earlier
        self._walked = head.newest, found

    def _no_such_step(self, step: int, why: str) -> CheckpointError:
        return CheckpointError(
            f"The stream at {self._transport.where} has no step {step}",
            why,
            "Ask for a step that it has, or for the newest. DeltaPublisher's keep_anchors says how far back "
            "files are kept.",
        )

    def ways(self, target: StateRecord, here: str) -> list[Way]:
        """The ways from the state ``here`` (its digest) to the target: by updates alone, and from the last
        anchor, the one with fewer bytes first."""
        updates: Way = []
        anchored: Way = []
        chain: Way = []
        for record in self._updates_back(target):
            if record.anchor and not anchored:
                anchored = [(record, "anchor"), *updates]
            if record.update:
                updates.insert(0, (record, "update"))
            if not chain and record.previous and record.previous.state == here:
                chain = list(updates)
            if anchored and (chain or nbytes_of(updates) > nbytes_of(anchored)):
                break
        return sorted(filter(None, (chain, anchored)), key=nbytes_of)

    def _updates_back(self, record: StateRecord) -> Iterator[StateRecord]:
        """The record and those whose updates lead to it, as far as they exist."""
        yield record
        while record.previous:
            try:
                record = self.read(record.previous)
            except Gone:
                return
            yield record

    def _back(self, reference: StateReference | None) -> Iterator[StateRecord]:
        """The record and those before it, as far as they exist. Where a publisher began anew, the last anchor
        comes before."""
        while reference:
            try:
                record = self.read(reference)
            except Gone:
                return
            yield record
            reference = record.previous or record.last_anchor


def nbytes_of(way: Way) -> int:
    """The size of the way's files."""
    return sum(record.nbytes(kind) for record, kind in way)
