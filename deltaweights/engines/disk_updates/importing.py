"""Publishes the updates of slime, miles or stitch as a weight stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...checkpoint import open_checkpoint
from ...errors import CheckpointError, DeltaError
from ...storage import Location, local_path
from ...torch.stream.following.subscriber import DeltaSubscriber
from ...torch.stream.heads import StreamSigners
from ...torch.stream.publishing.publisher import DeltaPublisher
from ...torch.stream.transport import open_transport
from ...torch.tensors import byte_view, code_of, stored_shape
from ...workers import ProgressCallback, Workers
from .folder import VersionFolder, is_whole, require_directory, versions_in
from .layout import INDEX_NAME, folder_name
from .model_folder import load_tensors

_log = logging.getLogger("deltaweights")


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of :func:`import_stream`.

    Attributes:
        versions: the versions that were published, in order; empty if there was nothing new.
        version: the version that the stream is at.
        read_bytes: size of the folders that were read.
        published_bytes: size of the updates and anchors that were published.
    """

    versions: tuple[int, ...]
    version: int
    read_bytes: int
    published_bytes: int


def import_stream(
    directory: Location,
    location: Location,
    base: Location,
    *,
    anchor_every: int | None = 100,
    keep_anchors: int | None = 2,
    public: bool = False,
    signer: StreamSigners | None = None,
    stream_name: str | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ImportReport:
    """Publish the versions in a folder of slime, miles or stitch as updates of a weight stream.

    The step of a state is its version. Each version is decoded, and its checksums are compared, before it is
    published; what is wrong stops the import, and the stream stays at the version before. Called again, it
    goes on with the versions that came meanwhile. Full checkpoints are published as anchors. The process
    holds the model twice.

    Args:
        directory: the folder with ``weight_v000001`` and so on. For stitch, that of one run.
        location: the stream: a folder, an fsspec URL, or a repository on the Hub (``hf://org/name``), created
            if missing.
        base: version 0, which the engines began with: a checkpoint, as a folder or a Hub id.
        anchor_every, keep_anchors, public, signer, stream_name: as for
            :class:`~deltaweights.torch.DeltaPublisher`.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with the bytes of folders that were read.

    Raises:
        CheckpointError: a folder or ``base`` cannot be read, or they do not fit together.
        SignatureError: the stream is there, and ``signer`` did not sign it.
        DeltaError: a version is damaged, made against other weights, or missing.
        BaseMismatchError: the stream cannot be followed from ``base``.
        OutputError: the stream cannot be written to.
    """
    folder = local_path(directory)
    require_directory(folder)
    with open_checkpoint(base) as model, Workers(threads) as workers:
        state = load_tensors(model, workers)
    version = 0
    if open_transport(location).head() is not None:
        subscriber = DeltaSubscriber(
            location, threads=threads, require_signature=signer, stream_name=stream_name
        )
        version = subscriber.sync(state).step
    if not (waiting := _waiting(folder, version)):
        return ImportReport((), version, 0, 0)
    with DeltaPublisher(
        location,
        state,
        anchor_every=anchor_every,
        keep_anchors=keep_anchors,
        public=public,
        signer=signer,
        stream_name=stream_name,
        threads=threads,
    ) as publisher:
        return _import(folder, waiting, version, state, publisher, threads, progress)


def _import(
    folder: Path,
    waiting: list[int],
    version: int,
    state: Mapping[str, Tensor],
    publisher: DeltaPublisher,
    threads: int | None,
    progress: ProgressCallback | None,
) -> ImportReport:
    done, read, published = list[int](), 0, 0
    total = _size(folder, waiting)
    for number in waiting:
        with VersionFolder(folder, number) as found, Workers(threads) as workers:
            if found.update and found.update.base_version != version:
                if _has_checkpoint(folder, waiting[waiting.index(number) :]):
                    _log.warning(
                        "%s is passed over: it needs version %d", found.where, found.update.base_version
                    )
                    continue
                raise _no_way(found, version)
            _take(found, state, workers)
            nbytes = found.nbytes
            is_full = found.update is None
        report = publisher.publish(number, state, anchor=True if is_full else None)
        version = number
        done.append(number)
        read += nbytes
        published += report.update_bytes + report.anchor_bytes
        if progress:
            progress("import", read, total)
    return ImportReport(tuple(done), version, read, published)


def _waiting(folder: Path, version: int) -> list[int]:
    """The versions after this one that are there. The last ones may still be in the making."""
    return [number for number in versions_in(folder) if number > version and is_whole(folder, number)]


def _size(folder: Path, versions: list[int]) -> int:
    """The size of these versions' weights and indexes, as far as they are files."""
    files = (path for version in versions for path in (folder / folder_name(version)).iterdir())
    return sum(
        path.stat().st_size
        for path in files
        if path.is_file() and (path.suffix == ".safetensors" or path.name == INDEX_NAME)
    )


def _has_checkpoint(folder: Path, versions: list[int]) -> bool:
    for version in versions:
        with VersionFolder(folder, version) as found:
            if found.update is None:
                return True
    return False


def _no_way(found: VersionFolder, version: int) -> DeltaError:
    assert found.update
    return DeltaError(
        f"{found.where} cannot follow version {version}",
        f"It leads from version {found.update.base_version}, which is not there.",
        "Get the versions in between, or a full checkpoint.",
    )


def _take(found: VersionFolder, state: Mapping[str, Tensor], workers: Workers) -> None:
    """Bring the state to the folder's version. After an error it may be in no version."""
    for name in found.tensors:
        if name not in state:
            raise _misfit(found, name, "The base lacks it.")
    if found.update is None:
        for name, tensor in state.items():
            other = found.tensors.get(name)
            if other is None:
                raise _misfit(found, name, "This version lacks it.")
            if (other.dtype, other.info.shape) != (code_of(name, tensor.dtype), stored_shape(name, tensor)):
                raise _misfit(found, name, f"It is {other.dtype} of shape {list(other.info.shape)} here.")
    write = found.apply_to if found.update else found.read
    jobs = [(name, byte_view(state[name]).numpy()) for name in found.tensors]
    for _ in workers.map(lambda job: write(*job), jobs):
        pass


def _misfit(found: VersionFolder, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Tensor {name!r} in {found.where} does not fit the base", why, "Pass the engines' model folder."
    )
