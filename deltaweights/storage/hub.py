"""A model repository on the Hub as a :class:`Source`, read by range requests without a copy on disk.

Files that are complete in the local Hub cache are read from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import HubReadError
from .hub_client import Downloader, download, find_cached, find_repository, find_snapshot, require_cache_space
from .local import LocalFile, LocalSource, is_left_out
from .read_ahead import WINDOW_BYTES, Window
from .remote import FetchedFile, RemoteSource
from .source import HubId, Source


def open_hub(repo_id: str, revision: str | None = None) -> Source:
    """Open a repository on the Hub or, if the Hub cannot be reached, its snapshot in the local cache.

    Raises:
        HubReadError: there is none, or the Hub cannot be reached.
    """
    try:
        return HubSource(repo_id, revision)
    except HubReadError:
        snapshot = find_snapshot(repo_id, revision)
        if snapshot is None:
            raise
        return LocalSource(snapshot)


class HubSource(RemoteSource):
    """The files of one repository at one commit.

    Args:
        repo_id: ``org/name``. If it was renamed, the attribute holds the new name.
        revision: a commit, branch or tag; the main branch if None. Its commit is looked up once.
        window_bytes: the most memory for bytes fetched ahead.

    Raises:
        HubReadError: it cannot be found or read.
    """

    def __init__(
        self, repo_id: str, revision: str | None = None, *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._repository = repository = find_repository(repo_id, revision)
        sizes = {path: file.size for path, file in sorted(repository.files.items()) if not is_left_out(path)}
        super().__init__(
            f"{repository.repo_id}@{repository.commit[:12]}",
            sizes,
            hub_id=HubId(repository.repo_id, repository.commit),
            left_out=tuple(sorted(set(repository.files) - set(sizes))),
        )
        self._downloader = Downloader(repository)
        self.window = Window(self._downloader.fetch, nbytes=window_bytes)
        self._opened: dict[str, FetchedFile | LocalFile] = {}

    @property
    def location(self) -> str:
        """The repository at its commit."""
        return f"hf://{self.hub_id.repo_id}@{self.hub_id.revision}"

    def pin(self, path: str) -> str:
        """Path and size: the location names the commit."""
        return f"{path}:{self.sizes[path]}"

    def open(self, path: str) -> FetchedFile | LocalFile:
        """The file at ``path``, from the cache if it is there."""
        file = self._opened.get(path)
        if file is None:
            cached = find_cached(self._repository, path)
            file = (
                LocalFile(path, cached, pooled=True)
                if cached
                else FetchedFile(path, self.sizes[path], self.window)
            )
            self._opened[path] = file
        return file

    def name(self, path: str) -> str:
        """The file's name for messages."""
        return f"{self.where}/{path}"

    def full_path(self, path: str) -> Path | None:
        """The file's path in the cache; None if it is not there."""
        found = find_cached(self._repository, path)
        return found.resolve() if found else None

    def published_sha256(self, path: str) -> str | None:
        """The SHA-256 that the Hub publishes for the file; None except for LFS files."""
        file = self._repository.files.get(path)
        return file.sha256 if file else None

    def fingerprint(self, path: str) -> str:
        """Repository, commit and git's id of the file."""
        return f"{path}:{self.hub_id.repo_id}:{self.hub_id.revision}:{self._repository.files[path].blob}"

    def keep(self, paths: Iterable[str]) -> Iterator[int]:
        """Download files into the local Hub cache, and read them from there from now on.

        Yields:
            The size of each file once it is downloaded.

        Raises:
            HubReadError: a file cannot be downloaded, or the cache's disk is too small.
        """
        files = [self.open(path) for path in paths]
        missing = [file for file in files if isinstance(file, FetchedFile) and not file.local]
        require_cache_space(sum(file.size for file in missing))
        for file in missing:
            file.local = LocalFile(file.path, download(self._repository, file.path))
            yield file.size

    def cancel(self) -> None:
        """End all reads that wait for the network, and all later ones."""
        self._downloader.cancel()
        self.window.cancel()

    def close(self) -> None:
        """End all connections, close all files."""
        self.cancel()
        self.window.close()
        while self._opened:
            file = self._opened.popitem()[1]
            local = file.local if isinstance(file, FetchedFile) else file
            if local:
                local.close()
