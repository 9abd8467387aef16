"""What every kind of source promises: one suite that all of them pass.

A kind of source is tested by a class that inherits :class:`SourceContract` and has a fixture ``subject``.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaweights import CheckpointError
from deltaweights.storage import Source, Span

_MIB = 1 << 20

#: Files at which something may go wrong: empty, short, as long as a block, longer than what is read at first.
FILES = {
    "empty.txt": b"",
    "one.txt": b"\x07",
    "sub/vocab.json": b"[1, 2, 3]\n" * 9000,
    "a.bin": np.random.default_rng(1).bytes(_MIB - 1),
    "b.bin": np.random.default_rng(2).bytes(_MIB),
    "c.bin": np.random.default_rng(3).bytes(2 * _MIB + 1),
}

#: Each example reads from the same source; and each kind of source has its own run of them.
_examples = settings(
    max_examples=40,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)


@dataclass(frozen=True)
class Subject:
    """A source, the files that it has to have, and a way to it after a byte of one of them was changed."""

    source: Source
    files: dict[str, bytes]
    changed: Callable[[str], Source]

    def spans(self) -> st.SearchStrategy[Span]:
        """Any part of any file."""
        return st.sampled_from(sorted(self.files)).flatmap(self._spans_of)

    def _spans_of(self, path: str) -> st.SearchStrategy[Span]:
        place = st.integers(0, len(self.files[path]))
        return st.tuples(place, place).map(lambda ends: Span(path, min(ends), max(ends)))

    def check(self, span: Span) -> None:
        """The bytes are the right ones, both ways of reading."""
        path, start, end = span
        file = self.source.open(path)
        assert file.read(start, end - start) == self.files[path][start:end]
        out = np.empty(end - start, np.uint8)
        file.read_into(start, out)
        assert out.tobytes() == self.files[path][start:end]


def flipped(data: bytes) -> bytes:
    """The same number of bytes, one of which is another one."""
    return data[:-1] + bytes([data[-1] ^ 1])


class SourceContract:
    """The laws. A file may be read at any position, by any number of threads, whatever was announced."""

    def test_sizes_are_those_of_the_files(self, subject: Subject) -> None:
        assert dict(subject.source.sizes) == {path: len(data) for path, data in subject.files.items()}
        assert {path: subject.source.open(path).size for path in subject.files} == dict(subject.source.sizes)

    @_examples
    @given(data=st.data())
    def test_any_part_of_any_file_can_be_read(self, subject: Subject, data: st.DataObject) -> None:
        subject.check(data.draw(subject.spans()))

    def test_several_threads_may_read_at_once(self, subject: Subject) -> None:
        choice = np.random.default_rng(0)
        spans = []
        for _ in range(60):
            path = str(choice.choice(sorted(subject.files)))
            start, end = sorted(choice.integers(0, len(subject.files[path]), 2, endpoint=True).tolist())
            spans.append(Span(path, start, end))
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(subject.check, spans))

    def test_what_a_file_does_not_have_is_refused_and_takes_no_memory(self, subject: Subject) -> None:
        for path, data in subject.files.items():
            size = len(data)
            file = subject.source.open(path)
            assert file.read(size, 0) == b""
            tracemalloc.start()
            try:
                for offset, nbytes in (
                    (size, 1), (0, size + 1), (0, 1 << 30), (0, 1 << 62), (1 << 62, 1), (1 << 63, 1 << 63),
                    (-1, 1), (-1, 0), (0, -1), (size + 1, -1), (-(1 << 63), 1 << 62),
                ):  # fmt: skip
                    with pytest.raises(CheckpointError):
                        file.read(offset, nbytes)
                assert tracemalloc.get_traced_memory()[1] < 1 << 18
            finally:
                tracemalloc.stop()
            for offset in (-1, size, 1 << 62):
                out = np.full(1, 99, np.uint8)
                with pytest.raises(CheckpointError):
                    file.read_into(offset, out)
                assert out[0] == 99

    def test_blocks_are_the_file(self, subject: Subject) -> None:
        for path, data in subject.files.items():
            blocks = list(subject.source.blocks(path))
            assert b"".join(blocks) == data
            assert all(0 < len(block) <= _MIB for block in blocks)

    def test_a_published_digest_is_the_files(self, subject: Subject) -> None:
        for path, data in subject.files.items():
            assert subject.source.published_sha256(path) in (None, hashlib.sha256(data).hexdigest())
        assert subject.source.published_sha256("no such file") is None

    @_examples
    @given(data=st.data())
    def test_announcements_change_no_result(self, subject: Subject, data: st.DataObject) -> None:
        """Whether what was announced is read, or not, or twice, or something else is."""
        announced = data.draw(st.lists(subject.spans(), max_size=5))
        others = data.draw(st.lists(subject.spans(), max_size=2))
        read = data.draw(st.lists(st.sampled_from(announced + others), max_size=6)) if announced else others
        with subject.source.expect(announced):
            for span in read:
                subject.check(span)

    @_examples
    @given(data=st.data())
    def test_only_what_is_far_away_comes_over_a_network(self, subject: Subject, data: st.DataObject) -> None:
        ranges = subject.source.ranges(data.draw(st.lists(subject.spans(), max_size=5)))
        assert subject.source.is_remote or not ranges
        assert all(range.start < range.end for range in ranges)

    def test_origins_tell_whether_it_is_remote(self, subject: Subject) -> None:
        origins = subject.source.origins
        assert origins
        assert subject.source.is_remote == any(origin.is_remote for origin in origins)

    def test_what_is_kept_is_the_same(self, subject: Subject) -> None:
        source, files = subject.source, subject.files
        whole = [Span(path, 0, len(data)) for path, data in files.items()]
        kept = list(source.keep(files))
        assert sum(kept) in (0, sum(map(len, files.values())))
        assert not kept or source.ranges(whole) == []
        for span in whole:
            subject.check(span)

    def test_a_fingerprint_changes_with_its_file_alone(self, subject: Subject) -> None:
        source = subject.source
        before = {path: source.fingerprint(path) for path in subject.files}
        assert before == {path: source.fingerprint(path) for path in subject.files}
        assert len(set(before.values())) == len(before)
        path = max(subject.files, key=lambda path: len(subject.files[path]))
        with subject.changed(path) as changed:
            assert b"".join(changed.blocks(path)) == flipped(subject.files[path])
            assert changed.fingerprint(path) != before[path]

    def test_names_are_for_messages(self, subject: Subject) -> None:
        assert subject.source.where
        names = {path: subject.source.name(path) for path in subject.files}
        assert all(path in name for path, name in names.items())

    def test_where_it_lies_are_its_bytes(self, subject: Subject) -> None:
        for path, data in subject.files.items():
            place = subject.source.full_path(path)
            assert place is None or place.read_bytes() == data

    def test_after_a_cancel_no_read_waits(self, subject: Subject) -> None:
        """Neither does one bring other bytes."""
        subject.source.cancel()
        for path, data in subject.files.items():
            try:
                assert subject.source.open(path).read(0, len(data)) == data
            except CancelledError:
                assert subject.source.is_remote

    def test_it_may_be_closed_more_than_once(self, subject: Subject) -> None:
        with subject.source as source:
            assert source is subject.source
            assert [source.open(path).size for path in subject.files]
        source.close()
        source.close()
