"""Writes the states of a weight stream as updates of slime, miles and stitch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...checkpoint import open_checkpoint
from ...errors import CheckpointError
from ...storage import Location
from ...torch.stream.following.prepared import StreamState
from ...torch.stream.following.subscriber import DeltaSubscriber
from ...torch.stream.heads import StreamKeys
from ...workers import ProgressCallback, Workers
from .chain import DiskUpdateReport, Version, newest_version
from .checksums import ChecksumFormat
from .encodings import DiskEncoding
from .model_folder import read_into
from .writer import DiskUpdateWriter


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of :func:`export_stream`.

    Attributes:
        written: the versions that were written, in order; empty if there was nothing new.
        first_version, first_step: the version that was there before, and the step of its state. Version 0 is
            what the engines have to begin with.
        nbytes: size of the versions that were written.
        state_bytes: size of a state; 0 if none was read.
    """

    written: tuple[DiskUpdateReport, ...]
    first_version: int
    first_step: int
    nbytes: int
    state_bytes: int


def export_stream(
    location: Location,
    directory: Location,
    *,
    base: Location | None = None,
    encoding: DiskEncoding = "xor",
    checksum: ChecksumFormat = "xxh3-128",
    from_step: int | None = None,
    step: int | None = None,
    full_every: int | None = None,
    run_id: str | None = None,
    require_signature: StreamKeys | None = None,
    stream_name: str | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Write each state of a weight stream as a folder ``weight_v000001`` and so on.

    Called again, it goes on with the states that were published meanwhile: versions that are whole stay. The
    process holds the model twice.

    Args:
        location: the stream: a folder, an fsspec URL, or a repository on the Hub (``hf://org/name``).
        directory: the folder for the versions, created if missing.
        base: the checkpoint that the engines load, a folder or a Hub id: version 0. It is needed where the
            stream has no anchor to begin with, where the model has tied tensors, and for full checkpoints. If
            its weights are not those of the first state, version 1 is that state as a full checkpoint.
        encoding, checksum, run_id: as for :class:`DiskUpdateWriter`.
        from_step: the step of the state to begin with, which is version 0; the oldest one if None. Where
            versions are there already, the export goes on from them.
        step: the step of the last state to write; the newest one if None.
        full_every: write each version that this number divides as a full checkpoint, with which late engines
            can begin; needs ``base``.
        require_signature, stream_name: who must have signed the stream, and its name, as for
            :class:`~deltaweights.torch.DeltaSubscriber`. What is written has no signatures.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with the bytes of states that were written.

    Raises:
        CheckpointError: there is no stream, or no such step; or ``base`` cannot be read, or does not fit.
        BaseMismatchError: the stream has no anchor to begin with.
        SignatureError: the stream is not signed as required.
        DeltaError: the stream is damaged.
        OutputError: the folder cannot be written to.
        ValueError: there is no such encoding or checksum.
    """
    subscriber = DeltaSubscriber(
        location, threads=threads, require_signature=require_signature, stream_name=stream_name
    )
    states = subscriber.states()
    newest = newest_version(directory, run_id)
    chosen = _chosen(states, newest, from_step, step, location)
    if newest and newest.state == chosen[0].state and len(chosen) == 1:
        return ExportReport((), newest.number, chosen[-1].step, 0, 0)
    mirror = _mirror(subscriber, base, threads)
    begun = subscriber.sync(mirror, step=chosen[0].step)
    total = sum(nbytes for _, nbytes in {(tensor.data_ptr(), tensor.nbytes) for tensor in mirror.values()})
    with DiskUpdateWriter(
        directory,
        mirror,
        step=chosen[0].step,
        checkpoint=base,
        encoding=encoding,
        checksum=checksum,
        run_id=run_id,
        digest=begun.state,
        threads=threads,
    ) as writer:
        written = [writer.reset] if writer.reset else []
        for number, state in enumerate(chosen[1:], 1):
            report = subscriber.sync(mirror, step=state.step)
            is_full = full_every is not None and (writer.version + 1) % full_every == 0
            written.append(writer.publish(state.step, mirror, full=is_full, digest=report.state))
            if progress:
                progress("export", number * total, (len(chosen) - 1) * total)
    before = newest.number if newest else 0
    nbytes = sum(report.nbytes for report in written)
    return ExportReport(tuple(written), before, chosen[0].step, nbytes, total)


def _chosen(
    states: Sequence[StreamState],
    newest: Version | None,
    from_step: int | None,
    step: int | None,
    location: Location,
) -> Sequence[StreamState]:
    """The states to write, after the one that is there or that is version 0."""
    end = len(states) if step is None else _last_of(states, step, location) + 1
    if newest is None:
        start = 0 if from_step is None else _last_of(states, from_step, location)
    elif known := [index for index, state in enumerate(states) if state.state == newest.state]:
        same_step = [index for index in known if states[index].step == newest.step]
        start = (same_step or known)[-1]
    else:  # it was removed from the stream: a full checkpoint of a later one comes next
        later = (
            index for index, state in enumerate(states) if newest.step is None or state.step > newest.step
        )
        start = next(later, end)
    if start < end:
        return states[start:end]
    if newest is not None and start < len(states):
        return states[start : start + 1]
    raise CheckpointError(
        f"The stream at {location} has nothing to export",
        "What was exported, or is to be the first state, comes after its last one.",
        "Choose a later step, or a different folder for a different stream.",
    )


def _last_of(states: Sequence[StreamState], step: int, location: Location) -> int:
    found = [index for index, state in enumerate(states) if state.step == step]
    if not found:
        raise CheckpointError(
            f"The stream at {location} has no state of step {step}",
            f"It has steps {states[0].step} to {states[-1].step}." if states else "It has none.",
            "Choose one of them.",
        )
    return found[-1]


def _mirror(subscriber: DeltaSubscriber, base: Location | None, threads: int | None) -> dict[str, Tensor]:
    """A state in memory, with the weights of ``base`` as far as it has them."""
    mirror = subscriber.empty_state()
    if base is not None:
        with open_checkpoint(base) as model, Workers(threads) as workers:
            read_into(mirror, model, workers)
    return mirror
