"""Opens a delta: reads and checks its manifest, looks for missing files, and finds its base."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckpointError, DeltaError, HubReadError, ManifestError
from ..license.rules import MAX_TEXT_BYTES, text_records
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ..storage import Readable, Source, open_hub

#: The manifests of open sources.
_manifests: WeakKeyDictionary[Source, Manifest] = WeakKeyDictionary()


def read_manifest(source: Source) -> Manifest:
    """Read and check the manifest of the delta at ``source``. Of one open source it is read once: a server
    cannot show one to who checks its signature or its license, and another one to who applies it.

    Raises:
        ManifestError: there is none, or it is damaged.
    """
    if (known := _manifests.get(source)) is not None:
        return known
    size = source.sizes.get(MANIFEST_NAME)
    if size is None:
        raise ManifestError(
            f"{source.where} is not a delta",
            f"It has no {MANIFEST_NAME}: it is something else, or an interrupted diff.",
            "Check the path, or run the diff again.",
        )
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{MANIFEST_NAME} is damaged",
            f"It has {size} bytes, more than a manifest may have.",
            "Get the delta again.",
        )
    _manifests[source] = found = Manifest.from_json(source.open(MANIFEST_NAME).read(0, size))
    return found


def license_texts(source: Source, manifest: Manifest) -> dict[str, bytes]:
    """The license texts and notices of the delta, by path, as they are there."""
    here = (record.path for record in text_records(manifest))
    return {
        path: b"".join(source.blocks(path))
        for path in here
        if source.sizes.get(path, MAX_TEXT_BYTES + 1) <= MAX_TEXT_BYTES
    }


def require_whole(source: Source, manifest: Manifest) -> None:
    """Raise :class:`DeltaError` if a file of the delta is missing or cut (a broken download)."""
    wrong = [file.path for file in manifest.files if source.sizes.get(file.path) != file.size]
    if wrong:
        raise DeltaError(
            f"{source.where} is not a whole delta",
            f"{_some(wrong)} missing or not of the manifest's size.",
            "Get the delta again.",
        )
    other = [f.path for f in manifest.files if source.published_sha256(f.path) not in (None, f.sha256)]
    if other:
        raise DeltaError(
            f"{source.where} is not the delta that its manifest describes",
            f"{_some(other)} published with a different SHA-256.",
            "Tell its publisher; an earlier revision may be whole.",
        )


def open_base(manifest: Manifest, base: Readable | None) -> Checkpoint | None:
    """Open the given base, or the one that the manifest names; None if the delta needs none.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    if base is not None:
        try:
            return open_checkpoint(base, may_lack=True)
        except HubReadError:
            # Offline, the cache may have the commit and no branch that leads to it.
            if base != manifest.base.repo_id or manifest.base.revision is None:
                raise
    if manifest.needs_base and manifest.base.repo_id:  # never a path: a manifest must not name our folders
        return Checkpoint(open_hub(manifest.base.repo_id, manifest.base.revision), may_lack=True)
    if manifest.needs_base:
        raise CheckpointError(
            "This delta needs its base",
            "The delta does not say where on the Hub it is.",
            "Pass it: base=PATH or base=ORG/NAME",
        )
    return None


def _some(names: list[str]) -> str:
    """The first name, and the number of others."""
    return (
        repr(names[0])
        + (f" and {len(names) - 1} more" if names[1:] else "")
        + (" are" if names[1:] else " is")
    )
