"""Folders, files and repositories on the Hub keep the contract of sources; what each promises besides.

Rebuilt targets and files in memory have their turn in test_chain.py and torch/test_save.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from deltaweights.storage import HubSource, LocalSource, Source, Span

from ..hub_server import HubServer
from .contract import FILES, SourceContract, Subject, flipped


def write(folder: Path) -> None:
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def rewrite(path: Path) -> None:
    """Another byte, and the time of the last change as it was."""
    before = path.stat()
    path.write_bytes(flipped(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestFolder(SourceContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        write(tmp_path)

        def changed(path: str) -> Source:
            rewrite(tmp_path / path)
            return LocalSource(tmp_path)

        with LocalSource(tmp_path) as source:
            yield Subject(source, FILES, changed)


class TestFile(SourceContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        write(tmp_path)

        def changed(path: str) -> Source:
            rewrite(tmp_path / path)
            return LocalSource(tmp_path / path)

        with LocalSource(tmp_path / "c.bin") as source:
            yield Subject(source, {"c.bin": FILES["c.bin"]}, changed)


def on_the_hub(hub: HubServer) -> Iterator[Subject]:
    def changed(path: str) -> Source:
        hub.commit("org/name", {path: flipped(FILES[path])})
        return HubSource("org/name")

    with HubSource("org/name", window_bytes=3 << 20) as source:
        yield Subject(source, FILES, changed)


@pytest.mark.usefixtures("no_pauses")
class TestHub(SourceContract):
    @pytest.fixture
    def subject(self, hub: HubServer) -> Iterator[Subject]:
        hub.add_repo("org/name", FILES)
        yield from on_the_hub(hub)

    def test_large_files_have_a_published_digest(self, subject: Subject) -> None:
        assert all(subject.source.published_sha256(path) for path in FILES if path.endswith(".bin"))

    def test_what_is_announced_is_fetched_once(self, subject: Subject, hub: HubServer) -> None:
        spans = [Span("c.bin", 100, 200_000), Span("a.bin", 5, 1000)]
        hub.log.clear()
        planned = subject.source.ranges(spans)
        with subject.source.expect(spans):
            for path, start, end in spans:
                subject.source.open(path).read(start, end - start)
        assert hub.bytes_sent("org/name") == sum(span.end - span.start for span in planned)

    def test_a_cancel_ends_a_read_that_waits(self, subject: Subject, hub: HubServer) -> None:
        hub.fail("org/name", "c.bin", on="content", delay=60, times=None)
        errors: list[BaseException] = []

        def read() -> None:
            try:
                subject.source.open("c.bin").read(0, 10)
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        while not hub.requests("org/name", kind="content") and not hub.requests("org/name", kind="resolve"):
            reader.join(0.01)
        subject.source.cancel()
        reader.join(10)
        assert not reader.is_alive()
        assert [type(error) for error in errors] == [CancelledError]


@pytest.mark.usefixtures("no_pauses")
class TestHubCache(SourceContract):
    """A repository of which all lies in the local cache."""

    @pytest.fixture
    def subject(self, hub: HubServer) -> Iterator[Subject]:
        from huggingface_hub import snapshot_download

        hub.add_repo("org/name", FILES)
        snapshot_download("org/name")
        yield from on_the_hub(hub)

    def test_nothing_is_fetched(self, subject: Subject, hub: HubServer) -> None:
        hub.log.clear()
        for path in FILES:
            assert b"".join(subject.source.blocks(path)) == FILES[path]
        assert not hub.log
