"""The trainer's side: writes each state as a folder that slime, miles and stitch read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

import numpy as np

from ...checkpoint import open_checkpoint
from ...errors import DeltaWeightsError, OutputError
from ...storage import Location
from ...torch.stream.records import StreamTensor, state_digest, tensor_digest
from ...torch.stream.state import State, StateTensor, owners, state_of, sums_of
from ...workers import Workers
from .chain import DiskUpdateReport, Version, VersionChain
from .checksums import ChecksumFormat
from .encodings import DiskEncoding
from .model_folder import has_weights_of, named_as_in
from .writing import Bytes, frame_of


class DiskUpdateWriter:
    """Writes the states of a model as folders ``weight_v000001`` and so on, each as the changes since the one
    before. A context manager.

    The format is that of slime, miles and stitch, and of SGLang's ``/pull_weights``. Beside a
    :class:`~deltaweights.torch.DeltaPublisher`, it serves engines that do not know weight streams yet. Each
    of the two keeps a copy of the state's bytes in the CPU's memory.

    Attributes:
        reset: the full checkpoint of ``base`` that it began with; None where there was no need.

    Args:
        directory: the folder for the versions, created if missing. An existing one is continued: with an
            update if its newest version is ``base``, else with a full checkpoint.
        base: the model that training starts from, or its ``state_dict()``: version 0, which the engines have
            already.
        step: the step of ``base``.
        checkpoint: the folder or Hub id that the engines load. Its names are used, of which tied tensors
            often have one, and full checkpoints get its configuration and tokenizer: without it, none can be
            written. If its weights are not those of ``base``, the first version is a full checkpoint.
        encoding: ``xor`` or ``overwrite``.
        checksum: ``xxh3-128``, ``adler32``, or ``blake3``, which needs the package of that name.
        run_id: for stitch: a folder of this name gets the versions, and the file ``latest`` names the newest.
        digest: the digest of ``base`` where it is known (:attr:`~deltaweights.torch.SyncReport.state`), by
            which a writer knows the newest version again; computed if None.
        threads: number of threads; if None, the number of usable cores, at most 8.

    Raises:
        OutputError: the folder cannot be written to, another process writes to it, or its newest version is a
            different state.
        CheckpointError: ``base`` cannot be read, or does not fit ``checkpoint``.
        ValueError: there is no such encoding or checksum.
        DeltaWeightsError: the package blake3 is missing, where it is needed.
    """

    def __init__(
        self,
        directory: Location,
        base: State,
        *,
        step: int = 0,
        checkpoint: Location | None = None,
        encoding: DiskEncoding = "xor",
        checksum: ChecksumFormat = "xxh3-128",
        run_id: str | None = None,
        digest: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._threads = threads
        state = state_of(base)
        with ExitStack() as opened, Workers(threads) as workers:
            self._model = opened.enter_context(open_checkpoint(checkpoint)) if checkpoint else None
            self._chain = opened.enter_context(
                VersionChain(
                    directory, run_id=run_id, encoding=encoding, checksum=checksum, model=self._model
                )
            )
            named = named_as_in(state, self._model)
            self.reset = self._begin(named, digest or _digest_of(state, workers), step, workers)
            self._layout = _layout(state)
            self._kept = {name: _copy(state[name]) for name in set(owners(state).values())}
            self._is_current = True
            self._opened = opened.pop_all()

    def __enter__(self) -> DiskUpdateWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder for other writers. This one cannot write afterwards."""
        self._opened.close()

    def publish(
        self, step: int, state: State, *, full: bool = False, digest: str | None = None
    ) -> DiskUpdateReport:
        """Write the state after ``step`` as the next version.

        When this returns, readers can take it: its index was written last, and lies on the disk. After an
        error, the version is not there, and the next call writes it. ``state`` must not change meanwhile.

        Args:
            step: a number chosen by the caller, at least 0.
            state: the model or its ``state_dict()``, with the names, dtypes, shapes and ties of ``base``.
            full: write a full checkpoint, with which late engines can begin; needs ``checkpoint``.
            digest: the state's digest, where it is known; computed if None.

        Raises:
            OutputError: the folder cannot be written to, or a tensor is too large for ``overwrite``.
            DeltaWeightsError: ``state`` has different tensors.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be at least 0")
        tensors = state_of(state)
        self._require_layout(tensors)
        if not self._is_current:
            raise OutputError("The writer was interrupted", "", "Make a new DiskUpdateWriter.")
        named, owner = named_as_in(tensors, self._model), owners(tensors)
        with Workers(self._threads) as workers:
            digest = digest or _digest_of(tensors, workers)
            if full:
                report = self._chain.write_checkpoint(digest, step, _reader(named))
            else:
                facts = self._chain.facts(digest, step)
                frames = workers.map(
                    lambda name: frame_of(facts, name, self._kept[owner[name]], _bytes(named[name])), named
                )
                sizes = {name: tensor.nbytes for name, tensor in named.items()}
                report = self._chain.write_update(facts, sizes, frames)
        self._is_current = False  # until this is done, the kept bytes are a mix
        for name in self._kept if full else {owner[name] for name in report.changed}:
            self._kept[name][:] = _bytes(tensors[name])
        self._is_current = True
        return report

    def _begin(
        self, named: Mapping[str, StateTensor], digest: str, step: int, workers: Workers
    ) -> DiskUpdateReport | None:
        """Let the next version follow this state: as it is, or else with a full checkpoint of it."""
        newest = self._chain.newest
        if newest is None and (self._model is None or has_weights_of(self._model, named, workers)):
            self._chain.newest = Version(0, digest, step)
            return None
        if newest is not None and newest.state == digest:
            return None
        if newest is not None and self._model is None:
            raise self._other_state(newest)
        return self._chain.write_checkpoint(digest, step, _reader(named))

    @property
    def version(self) -> int:
        """The newest version; 0 before the first."""
        assert self._chain.newest
        return self._chain.newest.number

    def _require_layout(self, state: Mapping[str, StateTensor]) -> None:
        differ = sorted({row[0] for row in self._layout ^ _layout(state)})
        if differ:
            raise DeltaWeightsError(
                f"The state does not belong to the updates in {self._chain.where}",
                f"Tensor {differ[0]!r} is missing, new, tied differently, or has a different dtype or shape"
                + (f", and so are {len(differ) - 1} more." if differ[1:] else "."),
                "Choose a different folder for a different model.",
            )

    def _other_state(self, newest: Version) -> OutputError:
        step = "" if newest.step is None else f", of step {newest.step}"
        return OutputError(
            f"The updates in {self._chain.where} cannot be continued from this state",
            f"Their newest version is {newest.number}{step}, with other weights.",
            "Load these weights first, pass the engines' model folder, or choose a different output folder.",
        )


def _digest_of(state: Mapping[str, StateTensor], workers: Workers) -> str:
    """The state's digest, as in weight streams."""
    sums = sums_of(state, workers)
    return state_digest(
        StreamTensor(name, tensor.code, tensor.shape, tensor_digest(sums[name]))
        for name, tensor in state.items()
    )


def _layout(state: Mapping[str, StateTensor]) -> set[tuple[str, str, tuple[int, ...], str]]:
    owner = owners(state)
    return {(name, tensor.code, tensor.shape, owner[name]) for name, tensor in state.items()}


def _bytes(tensor: StateTensor) -> Bytes:
    return tensor.read(0, tensor.nbytes)


def _copy(tensor: StateTensor) -> Bytes:
    return np.array(_bytes(tensor))


def _reader(named: Mapping[str, StateTensor]) -> Callable[[str], Bytes | None]:
    return lambda name: _bytes(named[name]) if name in named else None
