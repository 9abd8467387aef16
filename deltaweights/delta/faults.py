"""The errors of a delta with wrong bytes: a wrong base, or a damaged delta."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import BaseMismatchError, PayloadError
from ..manifest import MANIFEST_NAME, Manifest
from ..payload import Faults
from ..storage import Source, sha256_of
from ..words import counted


class DeltaFaults(Faults):
    """The faults of the delta at ``source`` and its base."""

    def __init__(self, source: Source, manifest: Manifest, base: Checkpoint | None) -> None:
        self._source = source
        self._manifest = manifest
        self._base = base

    def damaged(self, path: str, why: str) -> PayloadError:
        """The error to raise if the delta's file at ``path`` differs from the published one."""
        return PayloadError(f"{path} in the delta is damaged", f"{why}.", "Get the delta again.")

    def is_damaged(self, path: str) -> bool:
        """Whether the SHA-256 of the delta's own file at ``path`` differs from the manifest's."""
        record = next(record for record in self._manifest.files if record.path == path)
        found = self._source.published_sha256(path) or sha256_of(self._source.blocks(path))
        return found != record.sha256

    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise if the base is the wrong one."""
        record = self._manifest.base
        revision = f"@{record.revision}" if record.revision else ""
        fix = (
            f"The right one is on the Hub: base={record.repo_id}{revision}"
            if record.repo_id
            else "`inspect_delta` lists the files of the right one, with their SHA-256."
        )
        where = self._base.source.where if self._base else "Nothing"
        if lacking := self._not_cached():
            id = f"{record.repo_id} --revision {record.revision}"
            more = f" and {counted(len(lacking) - 1, 'more file')}" if lacking[1:] else ""
            return BaseMismatchError(
                f"{record.repo_id} is not whole in the local Hub cache",
                f"{where} lacks {lacking[0]}{more}, and {why}.",
                f"Get all of it: hf download {id}",
            )
        return BaseMismatchError(
            f"{where} is not the base that this delta was made from", f"{why[0].upper()}{why[1:]}.", fix
        )

    def _not_cached(self) -> list[str]:
        """The files that the base's own snapshot in the Hub cache lacks."""
        source, record = self._base.source if self._base else None, self._manifest.base
        if source is None or source.is_remote or record.repo_id is None or record.revision is None:
            return []
        if (source.hub_id.repo_id, source.hub_id.revision) != (record.repo_id, record.revision):
            return []
        return [file.path for file in record.files if file.path not in source.sizes]

    def is_proven(self, path: str) -> bool:
        """Whether the base's file at ``path`` is published with the manifest's SHA-256."""
        published = self._base.source.published_sha256(path) if self._base else None
        return published is not None and published == self._recorded.get(path)

    @property
    def _recorded(self) -> dict[str, str]:
        return {record.path: record.sha256 for record in self._manifest.base.files}

    def check_published(self, paths: list[str]) -> set[str]:
        """The files of the base, among ``paths``, that are known to be right without reading them.

        Raises:
            PayloadError: the manifest names what can be no file.
            BaseMismatchError: a file is missing; or a SHA-256 that is published, or that names the file in
                the Hub cache, differs from the manifest's. (Where shards have other names than those of the
                manifest's base, the base is sharded differently, and theirs say nothing.)
        """
        if self._base is None:
            return set()
        records = self._recorded
        shards = self._base.shards.keys() | self._base.broken.keys()
        is_alike = {path for path in records if path.endswith(".safetensors")} == shards
        for path in paths:
            source = self._base.source
            if path not in source.sizes:
                if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
                    raise self.damaged(
                        MANIFEST_NAME, f"It names {path!r} as a file of the base, which no file can be called"
                    )
                raise self.wrong_base(f"it lacks {path!r}, a file that the target has in common with it")
            told = source.told_sha256(path)
            if told is None or path not in records:
                continue
            if told != records[path] and (is_alike or path not in self._base.shards):
                raise self.wrong_base(f"its file {path!r} has SHA-256 {told}, not {records[path]}")
        return {path for path in paths if self.is_proven(path)}

    def remedy(self, path: str) -> str:
        """The fix if bytes of the base's proven file at ``path`` arrive damaged."""
        copy = self._base.source.full_path(path) if self._base else None
        if copy:
            return f"The copy in the Hub cache is damaged: remove {copy} and download it again."
        if self._base and self._base.source.origins != [self._base.source]:
            return "Get the deltas before this one again."
        return "The network changes them: try a different one, or keep_base=True."
