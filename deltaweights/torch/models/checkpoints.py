"""Saves a training run's checkpoints as deltas, in the background, each complete or not at all.

A checkpoint is a folder ``step-00000400``, a delta against the base, or ``step-00000500-on-00000400``, a
delta against the named checkpoint. A killed process loses at most the checkpoint that it was writing. What
else training needs is in ``training-00000400``, which is there first.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...delta.pointer import MAX_DELTAS
from ...diff import make_delta
from ...errors import CheckpointError, OutputError
from ...match.names import RenameRule
from ...payload import CHUNK_BYTES
from ...storage import LocalSource, Location, Source, open_source
from ...workers import ProgressCallback, result_of
from ..tensors import copied, settle
from .layout import Layout, lay_out
from .load import load_into
from .memory import MemorySource
from .run_folder import open_run
from .training_state import Snapshots, read

_log = logging.getLogger("deltaweights")


@overload
def list_checkpoints(folder: os.PathLike[str]) -> dict[int, list[Path]]: ...
@overload
def list_checkpoints(folder: Location) -> dict[int, list[Location]]: ...
def list_checkpoints(folder: Location) -> Mapping[int, Sequence[Location]]:
    """List the checkpoints in ``folder`` by step: for each step its chain of deltas, the one against the base
    first. ``load_into``, ``apply_delta`` and ``verify_delta`` accept such a chain.

    A checkpoint with an incomplete chain is left out. Safe to call while another process trains.

    Args:
        folder: a folder, or the URL of a place in a store.

    Returns:
        For each step, paths; in a store, URLs.

    Raises:
        HubReadError: the store cannot be read.
    """
    return open_run(folder).chains()


@dataclass(frozen=True)
class _Made:
    """The checkpoint written last, a possible base for the next one."""

    step: int
    depth: int
    layout: Layout
    digests: Mapping[str, str]


class DeltaCheckpointer:
    """Saves checkpoints of a model in ``folder``, each as a delta; a context manager.

    :meth:`save` copies the weights to the CPU's memory and returns; a thread of its own does the rest.
    Weights, buffers and config come back bit for bit; so does what :meth:`save` is given as ``training``,
    such as the optimizer's state. If the program ends without :meth:`close`, the last checkpoint is finished
    all the same.

    A folder that holds checkpoints of another run takes no more, unless that run is resumed: by
    :meth:`load_into`, :meth:`discard_after` or ``resume``.

    Memory: one copy of the weights on the CPU (pinned if they come from CUDA), or two with ``anchor_every``
    above 1, and one copy of ``training``.

    Args:
        folder: where the checkpoints go, a folder or the URL of a place in a store; made if need be. One
            process at a time may write to it: of several that train together, the first.
        base: what they are deltas against: a folder, one .safetensors file or a Hub id. It has to stay the
            same.
        anchor_every: every so many checkpoints, one is made against the base; those between, against the one
            before, which makes them smaller and slower to restore. 1: all against the base. At most 100.
        keep: how many of the last checkpoints to keep; None: all. Those that a kept one is made against stay.
        resume: whether training goes on from checkpoints that the folder holds, with weights that were loaded
            in another way than by :meth:`load_into`.
        files: as for :func:`save_delta`: a folder whose other files belong to every checkpoint.
        max_shard_size: as for :func:`save_delta`.
        rename, base_repo, base_revision, base_license, target_repo, target_license, chunk_bytes: as for
            :func:`deltaweights.make_delta`.
        threads: number of threads that encode in the background.

    Raises:
        OutputError: ``folder`` cannot be written to, or another process writes to it.
        HubWriteError: the store refuses it.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        folder: Location,
        base: Location,
        *,
        anchor_every: int = 1,
        keep: int | None = None,
        resume: bool = False,
        files: Location | None = None,
        max_shard_size: int | str | None = None,
        rename: Sequence[RenameRule] = (),
        base_repo: str | None = None,
        base_revision: str | None = None,
        base_license: str | None = None,
        target_repo: str | None = None,
        target_license: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        threads: int = 1,
    ) -> None:
        if not 1 <= anchor_every <= MAX_DELTAS:
            raise ValueError(f"anchor_every is {anchor_every}, not between 1 and {MAX_DELTAS}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}, not at least 1")
        self._run = open_run(folder)
        self.folder = self._run.location
        self.base = base
        self._anchor_every, self._keep, self._files = anchor_every, keep, files
        self._max_shard_size = max_shard_size
        self._make_delta = partial(
            make_delta,
            rename=rename,
            base_repo=base_repo,
            base_revision=base_revision,
            base_license=base_license,
            target_repo=target_repo,
            target_license=target_license,
            chunk_bytes=chunk_bytes,
            threads=threads,
        )
        if _is_first():
            self._run.require_writable()
        self._is_ours = resume or not self.steps
        self._thread = ThreadPoolExecutor(1, "deltaweights-checkpoint")
        self._job: Future[None] | None = None
        self._made: _Made | None = None
        self._snapshots: list[dict[str, Tensor]] = []
        self._training = Snapshots()
        self._known: dict[str, str] = {}  # SHA-256 by fingerprint of the base's files
        _open.add(self)

    def __enter__(self) -> DeltaCheckpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.close()
        except Exception:
            if exc[0] is None:  # else the first error is the one to report
                raise

    @property
    def steps(self) -> list[int]:
        """The steps of the existing checkpoints, in order."""
        return list(self._run.chains())

    def save(
        self,
        step: int,
        state: nn.Module | Mapping[str, Tensor],
        *,
        training: Mapping[str, object] | None = None,
    ) -> None:
        """Save the weights of ``state`` as the checkpoint of ``step``.

        Returns once they are copied. If the previous checkpoint is still being written, waits for it.

        Args:
            training: what else training needs to go on, by file name, such as
                ``{"optimizer.pt": optimizer.state_dict()}``: plain data and tensors, which are copied too.
                ``torch.save`` writes each to its file; bytes are written as they are.

        Raises:
            OutputError: there is a checkpoint of this step or a later one, or the folder holds another run's.
            CheckpointError: a tensor cannot be saved.
            DeltaWeightsError: the previous checkpoint failed, and was not saved.
            ValueError: ``step`` is negative, or a key of ``training`` is not a file name.
        """
        if step < 0:
            raise ValueError(f"step is {step}, not at least 0")
        for name in training or ():
            if not name or name != Path(name).name:
                raise ValueError(f"{name!r} in training is not a file name")
        self.wait()
        self.require_resumed()
        self._run.hold()
        later = [other for other in self.steps if other >= step]
        if later:
            raise OutputError(
                f"Checkpoint {step} cannot be written to {self._run.where}",
                f"It holds a checkpoint of step {later[-1]}.",
                f"To drop the later checkpoints: discard_after({step - 1}).",
            )
        layout = self._copy(lay_out(state, self._max_shard_size))
        values = None if training is None else self._training.take(training)
        self._job = self._thread.submit(self._write, step, layout, values)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            DeltaWeightsError: it could not be written.
        """
        job, self._job = self._job, None
        if job:
            result_of(job)

    def close(self) -> None:
        """:meth:`wait`, and let go of the folder."""
        _open.discard(self)
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._snapshots.clear()
            self._training.clear()
            self._made = None
            self._run.release()

    def load_into(
        self,
        model: nn.Module,
        step: int | None = None,
        *,
        device: torch.device | str = "cpu",
        strict: bool = True,
        shards: str = "*",
        sha256: bool = False,
        threads: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> int:
        """Load a checkpoint's weights into ``model``, bit for bit.

        Args:
            step: the checkpoint's step; None for the last one.
            device, strict, shards, sha256, threads, progress: as for :func:`load_into`.

        Returns:
            The step.

        Raises:
            CheckpointError: there is no such checkpoint. Also raises the errors of :func:`load_into`.
        """
        step, chain = self._find(step)
        load_into(
            model,
            chain,
            self.base,
            device=device,
            strict=strict,
            shards=shards,
            sha256=sha256,
            threads=threads,
            progress=progress,
        )
        self.resume()
        return step

    def load_training(self, step: int | None = None) -> dict[str, object]:
        """Load what :meth:`save` was given as ``training``, with tensors on the CPU.

        Args:
            step: the checkpoint's step; None for the last one.

        Returns:
            The values by file name.

        Raises:
            CheckpointError: there is no such checkpoint, nothing was saved beside it, or a file is damaged.
        """
        return read(self.training_folder(step))

    def training_folder(self, step: int | None = None) -> Path:
        """The folder of the files of :meth:`load_training`. What lies in a store is copied to this machine,
        where it stays until :meth:`close`.

        Raises:
            CheckpointError: there is no such checkpoint, nothing was saved beside it, or it is damaged.
        """
        step, _ = self._find(step)
        folder = self._run.training_folder(step)
        if folder is None:
            there = sorted(self._run.training_steps().intersection(self.steps))
            raise CheckpointError(
                f"Checkpoint {step} in {self._run.where} holds weights only",
                "No state of an optimizer was saved with it, or it is kept only for later ones.",
                f"Choose one of these steps: {', '.join(map(str, there))}; or begin anew with its weights: "
                "load_into(model)."
                if there
                else "Begin anew with its weights: load_into(model).",
            )
        return folder

    def _find(self, step: int | None) -> tuple[int, list[Location]]:
        """A checkpoint's step and chain."""
        self.wait()
        chains = self._run.chains()
        if not chains:
            raise CheckpointError(
                f"{self._run.where} holds no checkpoint", "None was finished.", "Save one first."
            )
        step = max(chains) if step is None else step
        if step not in chains:
            there = f"It has those of steps {', '.join(map(str, chains))}."
            raise CheckpointError(
                f"{self._run.where} has no checkpoint {step}", there, "Choose another step."
            )
        return step, chains[step]

    def resume(self) -> None:
        """Go on with the run whose checkpoints the folder holds. Its weights have to be loaded already."""
        self._is_ours = True

    def require_resumed(self) -> None:
        """Refuse a folder that holds checkpoints of another run: pruning would delete them.

        Raises:
            OutputError: there are some, and nothing says that this run goes on from them.
        """
        if not self._is_ours:
            raise OutputError(
                f"{self._run.where} holds checkpoints of another run",
                f"The last one is of step {self.steps[-1]}.",
                "To go on from it: checkpointer.load_into(model), or DeltaCheckpointer(..., resume=True) if "
                "its weights are loaded already. Else choose another folder.",
            )

    def discard_after(self, step: int) -> None:
        """Delete all checkpoints of later steps than ``step``, to resume training from there."""
        self.wait()
        self.resume()
        self._run.hold()
        self._made = None
        for other, chain in sorted(self._run.chains().items(), reverse=True):
            if other > step:
                self._run.remove(chain[-1])
        self._run.prune_training(self.steps)

    def _copy(self, layout: Layout) -> Layout:
        """The layout with its tensors copied to this checkpointer's memory, which is reused."""
        spare = self._snapshots.pop(0) if len(self._snapshots) >= self._sets else {}
        snapshot: dict[str, Tensor] = {}
        for tensors, _ in layout.shards.values():
            for name, tensor in tensors.items():
                snapshot[name] = copied(tensor, spare.get(name))
        settle(tensor for tensors, _ in layout.shards.values() for tensor in tensors.values())
        self._snapshots.append(snapshot)
        shards = {
            path: ({name: snapshot[name] for name in tensors}, metadata)
            for path, (tensors, metadata) in layout.shards.items()
        }
        return Layout(shards, layout.files)

    @property
    def _sets(self) -> int:
        """The number of copies of the weights: the one being written, and its base if that is a
        checkpoint."""
        return 1 if self._anchor_every == 1 else 2

    def _write(self, step: int, layout: Layout, training: Mapping[str, object] | None) -> None:
        """Write and publish one checkpoint, in the background."""
        made, self._made = self._made, None
        parent = made if made and made.depth + 1 < self._anchor_every else None
        before = self._source(parent.layout, parent.digests) if parent else self._open_base()
        with before, self._source(layout) as source:
            prints = {path: before.fingerprint(path) for path in before.sizes}
            make = partial(self._make_delta, before, source)
            manifest = self._run.publish(step, parent.step if parent else None, make, training)
        if parent is None:
            self._known = {prints[file.path]: file.sha256 for file in manifest.base.files}
        digests = {file.path: file.sha256 for file in manifest.target.files}
        self._made = _Made(step, parent.depth + 1 if parent else 0, layout, digests)
        self._prune()

    def _source(self, layout: Layout, digests: Mapping[str, str] | None = None) -> MemorySource:
        others = None if self._files is None else open_source(self._files)
        return MemorySource(layout.shards, layout.files, others, digests)

    def _open_base(self) -> Source:
        source = open_source(self.base)
        return _KnownBase(self.base, self._known) if isinstance(source, LocalSource) else source

    def _prune(self) -> None:
        """Delete all except the last ``keep`` checkpoints and those that they need. The newest go first, so
        that no checkpoint loses one that it needs."""
        if self._keep is None:
            return
        chains = self._run.chains()
        kept = list(chains)[-self._keep :]
        self._run.prune_training(kept)
        needed = {place for step in kept for place in chains[step]}
        for chain in reversed(chains.values()):
            if chain[-1] not in needed:
                self._run.remove(chain[-1])


#: Those that nobody closed yet.
_open: WeakSet[DeltaCheckpointer] = WeakSet()


def _close_all() -> None:
    """Finish what was saved: the program ends, and nobody closed these."""
    for checkpointer in list(_open):
        try:
            checkpointer.close()
        except Exception as error:
            _log.error("The last checkpoint in %s was lost: %s", checkpointer.folder, error)


# What atexit calls comes too late: no pool takes work by then. The last that is registered here is called
# first: before concurrent.futures, which this module imports, ends its threads.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


class _KnownBase(LocalSource):
    """The base on disk, with the known SHA-256 of files that have not changed since they were read."""

    def __init__(self, root: Location, known: Mapping[str, str]) -> None:
        super().__init__(root)
        self._known = known

    def published_sha256(self, path: str) -> str | None:
        return self._known.get(self.fingerprint(path)) if path in self.sizes else None


def _is_first() -> bool:
    """Whether this is the only process of a training, or the first of several. The others just read."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
