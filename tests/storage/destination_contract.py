"""What every kind of destination promises: one suite that all of them pass.

A kind of destination is tested by a class that inherits :class:`DestinationContract` and has a fixture
``place``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from deltaweights import OutputError
from deltaweights.storage import Destination, UnlockedPlace, join_output

#: Empty, short, and as long as several parts of an upload, the last of them short.
SIZES = (0, 1, (12 << 20) + 5)


@dataclass(frozen=True)
class Place:
    """A place for files.

    Attributes:
        open: it as a new run sees it.
        there: what lies there now, notes included.
        put: lets another program put a file there.
    """

    open: Callable[[], Destination]
    there: Callable[[], dict[str, bytes]]
    put: Callable[[str, bytes], object]

    def write(self, path: str, data: bytes) -> None:
        """A run that writes one file."""
        with self.open() as folder:
            write(folder, path, data)


def write(folder: Destination, path: str, data: bytes) -> None:
    with folder.create(path) as file:
        file.write_at(0, data)
        file.commit()


def sample(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class UnlockedContract:
    """The laws of a place that nobody holds. Processes put files of their own there, whole or not at all."""

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
    def test_a_committed_file_is_there(self, unlocked: UnlockedPlace, size: int, is_known: bool) -> None:
        data = sample(size)
        known = {"size": size, "sha256": sha256(data)} if is_known else {}
        with unlocked.create("x.bin", **known) as file:  # type: ignore[arg-type]
            file.write_blocks([data[: size // 2], data[size // 2 :]])
            file.commit()
        assert unlocked.sizes() == {"x.bin": size}
        assert unlocked.read("x.bin") == data

    def test_one_that_is_not_committed_never_was(self, unlocked: UnlockedPlace) -> None:
        with unlocked.create("x") as file:
            file.write_at(0, b"half")
        assert unlocked.sizes() == {}
        assert unlocked.read("x") == b""

    def test_several_processes_put_files_there(self, unlocked: UnlockedPlace) -> None:
        with unlocked.create("x") as one, unlocked.create("y") as other:
            for file in (one, other):
                file.write_at(0, b"data")
                file.commit()
        assert unlocked.sizes() == {"x": 4, "y": 4}

    def test_a_file_is_replaced_and_removed(self, unlocked: UnlockedPlace) -> None:
        marks = []
        for data in (b"old", b"newer"):
            marks.append(unlocked.mark("x"))
            with unlocked.create("x", over=marks[-1]) as file:
                file.write_at(0, data)
                file.commit()
        assert unlocked.read("x") == b"newer"
        assert len({*marks, unlocked.mark("x")}) == 3
        unlocked.remove("x")
        unlocked.remove("x")
        assert unlocked.sizes() == {}
        assert unlocked.mark("x") is None


class DestinationContract:
    """The laws. A file is there once it is committed, whole; notes are there until a run succeeds."""

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
    def test_a_committed_file_is_there(self, place: Place, size: int, is_known: bool) -> None:
        data = sample(size)
        known = {"size": size, "sha256": sha256(data)} if is_known else {}
        with place.open() as folder:
            with folder.create("sub/x.bin", **known) as file:  # type: ignore[arg-type]
                file.write_blocks([data[: size // 2], data[size // 2 :]])
                assert file.digest() == (size, sha256(data))
                assert "sub/x.bin" not in place.there()
                file.commit()
            assert folder.is_regular("sub/x.bin")
            assert folder.size("sub/x.bin") == size
            assert b"".join(folder.blocks("sub/x.bin")) == data
        assert place.there() == {"sub/x.bin": data}

    @pytest.mark.parametrize("size", SIZES[1:])
    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_one_that_is_not_committed_never_was(
        self, place: Place, size: int, error: type[BaseException] | None
    ) -> None:
        data = sample(size)

        def give_up() -> None:
            with place.open() as folder, folder.create("x", size=size, sha256=sha256(data)) as file:
                file.write_at(0, data)
                if error:
                    raise error

        with suppress(RuntimeError, KeyboardInterrupt):
            give_up()
        assert place.there() == {}

    def test_threads_may_write_at_once_and_out_of_order(self, place: Place) -> None:
        step = 1 << 18
        data = sample(41 * step + 3)
        with place.open() as folder:
            for known in ({"size": len(data), "sha256": sha256(data)}, {}):
                with (
                    ThreadPoolExecutor(4) as threads,
                    folder.create("x" if known else "y", **known) as file,  # type: ignore[arg-type]
                ):
                    starts = [start ^ step for start in range(0, 42 * step, step)]  # neighbors swapped
                    list(threads.map(lambda at: file.write_at(at, memoryview(data)[at : at + step]), starts))
                    file.commit()
        assert place.there() == {"x": data, "y": data}

    def test_another_content_than_was_promised_is_refused(self, place: Place) -> None:
        if type(place.open()).__name__ == "OutputFolder":
            pytest.skip("who writes to a folder compares the digests")

        def write_another() -> None:
            with place.open() as folder, folder.create("x", size=3, sha256=sha256(b"abc")) as file:
                file.write_at(0, b"abd")
                file.commit()

        with pytest.raises(OutputError, match="damaged on its way"):
            write_another()
        assert place.there() == {}

    def test_what_was_there_can_be_replaced_and_removed(self, place: Place) -> None:
        place.put("x", b"an old, longer content")
        place.put("y", b"old")
        with place.open() as folder:
            assert folder.foreign([]) == ["x", "y"]
            assert folder.exists("x")
            write(folder, "x", b"new")
            write(folder, "x", b"newer")
            folder.remove("y")
            assert not folder.exists("y")
            write(folder, "y", b"another")
        assert place.there() == {"x": b"newer", "y": b"another"}

    def test_a_run_that_fails_leaves_its_notes_to_the_next(self, place: Place) -> None:
        def fail() -> None:
            with place.open() as folder:
                assert folder.recall("x") == b""
                folder.claim(["x", "y", "z"])
                write(folder, "x", b"finished")
                write(folder, "z", b"of no use")
                folder.remember("x", b"a note")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        with place.open() as folder:
            assert folder.claims == {"x", "y", "z"}
            assert folder.foreign(folder.claims) == []
            assert folder.recall("x") == b"a note"
            assert b"".join(folder.blocks("x")) == b"finished"
            folder.remove_claims(keep=["x"])
        assert place.there() == {"x": b"finished"}

    def test_a_run_without_claims_leaves_no_notes(self, place: Place) -> None:
        def fail() -> None:
            with place.open() as folder:
                write(folder, "x", b"finished")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert place.there() == {"x": b"finished"}

    def test_others_may_join_while_it_is_open(self, place: Place) -> None:
        with place.open() as folder:
            shared = folder.share()
            with join_output(shared) as joined:
                write(joined, "x", b"by another process")
            assert place.there()["x"] == b"by another process"
        assert place.there() == {"x": b"by another process"}

    def test_it_can_be_looked_at_without_being_opened(self, place: Place) -> None:
        place.put("x", b"four")
        folder = place.open()
        assert folder.sizes(["x", "y"]) == {"x": 4}
        assert place.there() == {"x": b"four"}
        assert folder.where

    def test_what_it_holds_is_a_source(self, place: Place) -> None:
        place.put("x", b"four")
        with place.open() as folder, folder.source() as source:
            assert dict(source.sizes) == {"x": 4}
            assert folder.is_inside(source)
            with pytest.raises(OutputError, match="which the output is made from"):
                folder.require_apart(["a", "x"], [source])
            folder.require_apart(["a", "b"], [source])
