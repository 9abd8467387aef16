"""Deltas that must be signed: checked before anything is read of them but the manifest.

The signature covers the manifest, and that has the SHA-256 of every other file. Those that are on this
machine are compared now. What comes over a network is compared where it is used: a target's file that is
written has its own SHA-256; for a target that stays in memory, the delta is copied to this machine first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

from ..errors import DeltaError
from ..manifest import MANIFEST_NAME, FileRecord, Manifest
from ..signing import SignatureRequirement, require_signed
from ..storage import LocalSource, OutputFolder, Source, sha256_of
from ..workers import Lane, Meter, ProgressCallback, Workers
from .opening import read_manifest


class _CopiedSource(LocalSource):
    """A copy of a delta in a temporary folder, which is removed when it is closed."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], where: str) -> None:
        super().__init__(folder.name)
        self.where = where
        self._temporary = folder

    def close(self) -> None:
        super().close()
        self._temporary.cleanup()


def check_signers(sources: Sequence[Source], requirement: SignatureRequirement | None) -> None:
    """Refuse deltas that are not signed as required, before anything of them is shown, asked or looked for.

    Raises:
        SignatureError: one is not signed so.
        DeltaError: a manifest is damaged.
    """
    if requirement is not None:
        for source in sources:
            require_signed(source, read_manifest(source), requirement)


def require_signatures(
    sources: Sequence[Source],
    manifests: Sequence[Manifest],
    requirement: SignatureRequirement,
    *,
    into_memory: bool,
    progress: ProgressCallback | None = None,
) -> list[Source]:
    """Check that each of several deltas is signed as it must be, and that its files are those that were.

    Args:
        sources: the deltas; one that is copied is closed.
        manifests: theirs, as they were read.
        into_memory: the target will stay in memory, where no SHA-256 of its files is compared.
        progress: called with a phase ("check signed"), bytes done and total bytes.

    Returns:
        The deltas to read from.

    Raises:
        SignatureError: one is not signed so.
        DeltaError: a file is not the one in its manifest.
        DiskSpaceError: there is no room for the copy of a delta that is far away.
    """
    for source, manifest in zip(sources, manifests, strict=True):
        require_signed(source, manifest, requirement)
    pairs = zip(sources, manifests, strict=True)
    read = [manifest for source, manifest in pairs if into_memory or not source.is_remote]
    meter = Meter(progress if read else None, "check signed", sum(map(_nbytes, read)))
    with ExitStack() as on_error:
        found: list[Source] = []
        for source, manifest in zip(sources, manifests, strict=True):
            if not source.is_remote:
                require_same_files(source, manifest, meter)
            elif into_memory:
                found.append(on_error.enter_context(_copied(source, manifest, meter)))
                continue
            found.append(source)
        on_error.pop_all()
    return found


def _nbytes(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files)


def require_same_files(source: Source, manifest: Manifest, meter: Meter) -> None:
    """Raise :class:`DeltaError` where a file's SHA-256 is not the manifest's."""

    def compare(lane: Lane, record: FileRecord) -> None:
        if sha256_of(lane.watch(source.blocks(record.path), meter)) != record.sha256:
            raise _other(source, record.path)

    with Workers() as workers:
        workers.each(compare, manifest.files)


def _copied(source: Source, manifest: Manifest, meter: Meter) -> Source:
    """A copy of the files that the manifest lists, each with its SHA-256."""
    folder = tempfile.TemporaryDirectory(prefix="deltaweights-")
    try:
        with OutputFolder(folder.name) as output:
            output.require_space(_nbytes(manifest))
            for record in manifest.files:
                with output.create(record.path) as file:
                    file.write_blocks(source.blocks(record.path))
                    if file.digest() != (record.size, record.sha256):
                        raise _other(source, record.path)
                    file.commit()
                meter.add(record.size)
            with output.create(MANIFEST_NAME) as file:
                file.write_blocks([manifest.to_json()])
                file.commit()
        copy = _CopiedSource(folder, source.where)
    except BaseException:
        folder.cleanup()
        raise
    source.close()
    return copy


def _other(source: Source, path: str) -> DeltaError:
    return DeltaError(
        f"{source.name(path)} is not the file that was signed",
        "Its SHA-256 is not the one in the signed manifest.",
        "Get the delta again.",
    )
