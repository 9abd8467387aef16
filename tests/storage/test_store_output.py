"""Files go to stores whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltaweights import OutputError, apply_delta, compact_deltas, make_delta, plan_apply
from deltaweights.bom import bom_of
from deltaweights.cli.commands import app
from deltaweights.errors import HubWriteError
from deltaweights.storage import OutputFolder, UnlockedPlace, open_output, open_unlocked, write_document
from deltaweights.storage.store import upload
from deltaweights.storage.store.files import SpooledFile

from ..checkpoints import contents
from ..conftest import CHUNK_BYTES, Trio
from ..s3_server import S3Server
from .destination_contract import DestinationContract, Place, UnlockedContract, sample, sha256, write

pytestmark = pytest.mark.usefixtures("no_pauses")

_PART = 5 << 20
_URL = "s3://bucket/out"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as S3 lets them be."""
    monkeypatch.setattr(upload, "_PART_BYTES", _PART)


def there(system: Any, root: str) -> dict[str, bytes]:
    """All that lies at a place, but for license texts beside a target."""
    paths = [path for path in system.find(root) if "/.deltaweights/licenses/" not in path]
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in paths}


def place_in(system: Any, url: str, root: str) -> Place:
    return Place(
        lambda: open_output(url),
        lambda: there(system, root),
        lambda path, data: system.pipe_file(f"{root}/{path}", data),
    )


class TestFolder(DestinationContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        root = tmp_path / "out"

        def found() -> dict[str, bytes]:
            return {
                path: data
                for path, data in contents(root).items()
                if not path.startswith(".deltaweights/") or path.endswith((".memory", "claims"))
            }

        def put(path: str, data: bytes) -> None:
            root.mkdir(exist_ok=True)
            (root / path).write_bytes(data)

        return Place(lambda: OutputFolder(root), found, put)


class TestUnlockedFolder(UnlockedContract):
    @pytest.fixture
    def unlocked(self, tmp_path: Path) -> UnlockedPlace:
        return open_unlocked(tmp_path / "out")


class TestUnlockedMemory(UnlockedContract):
    @pytest.fixture
    def unlocked(self, memory: Any) -> UnlockedPlace:
        return open_unlocked("memory://out")


class TestUnlockedS3(UnlockedContract):
    @pytest.fixture
    def unlocked(self, s3: S3Server) -> UnlockedPlace:
        return open_unlocked(_URL)

    @pytest.mark.parametrize("is_new", [True, False])
    def test_of_two_who_put_the_same_file_the_second_is_refused(
        self, unlocked: UnlockedPlace, s3: S3Server, is_new: bool
    ) -> None:
        if not is_new:
            s3.system.pipe_file("bucket/out/x", b"earlier")
        mark = unlocked.mark("x")

        def put_late() -> None:
            with unlocked.create("x", over=mark) as file:
                file.write_at(0, b"mine")
                s3.system.pipe_file("bucket/out/x", b"the other's")
                file.commit()

        with pytest.raises(HubWriteError, match="is being written to by another run"):
            put_late()
        assert unlocked.read("x") == b"the other's"

    def test_uploads_of_killed_processes_are_ended(self, unlocked: UnlockedPlace, s3: S3Server) -> None:
        for key in ("out/x", "out/y", "other/x"):
            s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        unlocked.end_uploads(lambda path: path == "x")
        left = {upload["Key"] for upload in s3.system.list_multipart_uploads("bucket")}
        assert left == {"out/y", "other/x"}


class TestDocuments:
    """Single files, such as bills of materials."""

    @pytest.mark.parametrize("place", ["bucket/a.json", "bucket/a/b.json"])
    def test_it_is_written_and_replaced(self, s3: S3Server, place: str) -> None:
        for data in (b"{}", b"[1]"):
            write_document(f"s3://{place}", data)
            assert s3.system.cat_file(place) == data
        assert s3.system.find("bucket") == [place]

    @pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/folder/"])
    def test_a_url_that_names_no_file_is_refused(self, s3: S3Server, url: str) -> None:
        with pytest.raises(OutputError, match="names no file"):
            write_document(url, b"{}")

    def test_the_command_writes_there(self, s3: S3Server, trio: Trio) -> None:
        pytest.importorskip("cyclonedx")
        done = CliRunner().invoke(app, ["bom", str(trio.delta), "-o", "s3://bucket/bom.json"])
        assert done.exit_code == 0, done.output
        assert s3.system.cat_file("bucket/bom.json") == bom_of(trio.delta)


class TestMemory(DestinationContract):
    @pytest.fixture
    def place(self, memory: Any) -> Place:
        def found() -> dict[str, bytes]:
            notes = {path for path in there(memory, "/out") if path.startswith(".deltaweights/claims-")}
            return {path: data for path, data in there(memory, "/out").items() if path not in notes or data}

        return Place(
            lambda: open_output("memory://out"),
            lambda: {path: data for path, data in found().items() if not path.endswith(".partial")},
            place_in(memory, "memory://out", "/out").put,
        )


class TestS3(DestinationContract):
    @pytest.fixture
    def place(self, s3: S3Server) -> Iterator[Place]:
        yield place_in(s3.system, _URL, "bucket/out")
        assert not s3.system.list_multipart_uploads("bucket")

    def test_digests_are_kept_with_the_files(self, place: Place, s3: S3Server) -> None:
        data = sample(3 * _PART)
        with place.open() as folder:
            with folder.create("large", size=len(data), sha256=sha256(data)) as file:
                file.write_at(0, data)
                file.commit()
            write(folder, "small", b"small")
            with folder.source() as source:
                assert source.told_sha256("large") == sha256(data)
                assert source.told_sha256("small") == sha256(b"small")

    def test_a_file_never_has_more_parts_than_the_store_takes(self) -> None:
        for nbytes in (1, 80 << 30, (80 << 30) + 1, 5 << 40):
            assert -(-nbytes // upload.part_bytes(nbytes)) <= 10_000
        assert upload.part_bytes(1 << 30) == _PART


def send(data: bytes, *, is_known: bool = True) -> None:
    known = {"size": len(data), "sha256": sha256(data)} if is_known else {}
    with open_output(_URL) as folder, folder.create("x", **known) as file:  # type: ignore[arg-type]
        file.write_blocks(data[start : start + _PART] for start in range(0, len(data), _PART))
        file.commit()


#: The requests of an upload in three parts, and of one in a single part.
_REQUESTS = {
    "begin": ("POST", "uploads"),
    "first part": ("PUT", "partNumber=1"),
    "last part": ("PUT", "partNumber=3"),
    "end": ("POST", "uploadId"),
}
_steps = pytest.mark.parametrize("step", _REQUESTS)


@pytest.mark.parametrize("is_known", [True, False], ids=["streamed", "spooled"])
class TestFaults:
    @_steps
    def test_a_busy_store_is_asked_again(self, s3: S3Server, step: str, is_known: bool) -> None:
        data = sample(2 * _PART + 9)
        method, query = _REQUESTS[step]
        s3.fail("x", method=method, query=query, status=503, times=3)
        send(data, is_known=is_known)
        assert there(s3.system, "bucket/out") == {"x": data}

    @_steps
    def test_so_is_one_whose_connection_is_cut(self, s3: S3Server, step: str, is_known: bool) -> None:
        data = sample(2 * _PART + 9)
        method, query = _REQUESTS[step]
        s3.fail("x", method=method, query=query, drop=True, times=2)
        send(data, is_known=is_known)
        assert there(s3.system, "bucket/out") == {"x": data}
        assert not s3.system.list_multipart_uploads("bucket")

    def test_an_answer_that_is_lost_after_the_end_is_no_error(self, s3: S3Server, is_known: bool) -> None:
        data = sample(2 * _PART + 9)
        s3.fail("x", method="POST", query="uploadId", cut_after=10)
        send(data, is_known=is_known)
        assert there(s3.system, "bucket/out") == {"x": data}

    @_steps
    @pytest.mark.parametrize(("status", "is_retryable"), [(503, True), (403, False)])
    def test_what_stays_broken_leaves_nothing(
        self, s3: S3Server, step: str, status: int, is_retryable: bool, is_known: bool
    ) -> None:
        method, query = _REQUESTS[step]
        s3.fail("x", method=method, query=query, status=status, times=None)
        with pytest.raises(HubWriteError, match=r"Cannot write s3://bucket/out/x") as caught:
            send(sample(2 * _PART + 9), is_known=is_known)
        assert caught.value.retryable == is_retryable
        assert is_retryable or "credentials" in caught.value.fix
        assert there(s3.system, "bucket/out") == {}
        assert not s3.system.list_multipart_uploads("bucket")

    @pytest.mark.parametrize("size", [9, 2 * _PART + 9])
    def test_of_two_writers_one_is_refused(self, s3: S3Server, size: int, is_known: bool) -> None:
        data = sample(size)
        known = {"size": size, "sha256": sha256(data)} if is_known else {}

        def write_late() -> None:
            with open_output(_URL) as folder, folder.create("x", **known) as file:  # type: ignore[arg-type]
                file.write_at(0, data)
                s3.system.pipe_file("bucket/out/x", b"the other's")
                file.commit()

        with pytest.raises(HubWriteError, match="is being written to by another run"):
            write_late()
        assert there(s3.system, "bucket/out") == {"x": b"the other's"}
        assert not s3.system.list_multipart_uploads("bucket")


def test_a_place_that_may_not_be_written_to_is_refused_at_once(s3: S3Server) -> None:
    s3.fail("", method="PUT", status=403, times=None)
    with pytest.raises(HubWriteError, match="Cannot write s3://bucket/out"), open_output(_URL):
        pytest.fail("nothing may be written")


def test_a_loser_claims_nothing_of_the_winners(s3: S3Server) -> None:
    def lose() -> None:
        with open_output(_URL) as folder:
            for path in ("a", "b"):
                folder.claim([path])
                if path == "b":
                    s3.system.pipe_file("bucket/out/b", b"the other's")
                write(folder, path, b"mine")

    with pytest.raises(HubWriteError):
        lose()
    with open_output(_URL) as folder:
        assert folder.claims == {"a"}
        assert folder.foreign(folder.claims) == ["b"]


def test_uploads_of_killed_runs_are_ended_but_for_others(s3: S3Server) -> None:
    for key in ("out/x", "out/y", "elsewhere/x"):
        s3.system.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    place_in(s3.system, _URL, "bucket/out").write("x", b"done")
    left = {upload["Key"] for upload in s3.system.list_multipart_uploads("bucket")}
    assert left == {"out/y", "elsewhere/x"}


class TestVerbs:
    """Every verb that writes, in a store whatever goes wrong."""

    @pytest.fixture
    def large_there(self, s3: S3Server, large: Trio) -> Trio:
        for side in ("base", "target", "delta"):
            s3.system.put(str(getattr(large, side)), f"bucket/{side}", recursive=True)
        return large

    def test_nothing_of_a_result_touches_a_disk(
        self, s3: S3Server, large_there: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_spool(*args: object, **options: object) -> None:
            raise AssertionError("a spool")

        monkeypatch.setattr(
            "deltaweights.storage.store.folder.SpooledFile",
            lambda path, *rest: no_spool() if path.endswith(".safetensors") else SpooledFile(path, *rest),
        )
        apply_delta("s3://bucket/delta", _URL, base="s3://bucket/base")
        assert there(s3.system, "bucket/out") == contents(large_there.target)

    @pytest.mark.parametrize("shard", [1, 2])
    def test_apply_goes_on_where_it_was_interrupted(
        self, s3: S3Server, large_there: Trio, shard: int
    ) -> None:
        broken = f"model-0000{shard}-of-00002.safetensors"
        s3.fail(f"out/{broken}", method="PUT", status=403, times=1)
        with pytest.raises(HubWriteError):
            apply_delta("s3://bucket/delta", _URL, base="s3://bucket/base", threads=1)
        found = there(s3.system, "bucket/out")
        assert found.items() <= contents(large_there.target).items()
        report = apply_delta("s3://bucket/delta", _URL, base="s3://bucket/base")
        assert set(report.kept) == set(found)
        assert there(s3.system, "bucket/out") == contents(large_there.target)

    def test_so_does_diff_and_its_manifest_comes_last(self, s3: S3Server, large_there: Trio) -> None:
        def run() -> None:
            make_delta("s3://bucket/base", "s3://bucket/target", _URL, chunk_bytes=CHUNK_BYTES, threads=1)

        s3.fail("out/delta-00002-of-00002.safetensors", method="PUT", status=403)
        with pytest.raises(HubWriteError):
            run()
        found = there(s3.system, "bucket/out")
        assert "delta-00001-of-00002.safetensors" in found
        assert "deltaweights.json" not in found
        s3.log.clear()
        run()
        put = [request.path for request in s3.log if request.method == "PUT" and "/out/delta" in request.path]
        assert put == ["/bucket/out/delta-00002-of-00002.safetensors", "/bucket/out/deltaweights.json"]
        assert there(s3.system, "bucket/out") == contents(large_there.delta)

    def test_a_delta_is_replaced_only_with_force(self, s3: S3Server, large_there: Trio) -> None:
        def run(force: bool) -> None:
            base, target = "s3://bucket/base", "s3://bucket/target"
            make_delta(base, target, "s3://bucket/delta", chunk_bytes=CHUNK_BYTES, force=force)

        s3.system.pipe_file("bucket/delta/README.md", b"old")
        with pytest.raises(OutputError, match="s3://bucket/delta is not empty"):
            run(False)
        run(True)
        assert there(s3.system, "bucket/delta") == contents(large_there.delta)

    @pytest.mark.parametrize(
        "run",
        [
            lambda: apply_delta("s3://bucket/delta", "s3://bucket/base", base="s3://bucket/base"),
            lambda: apply_delta("s3://bucket/delta", "s3a://bucket/base/in", base="s3://bucket/base/"),
            lambda: make_delta("s3://bucket/base", "s3://bucket/target", "s3://bucket/target/delta"),
            lambda: compact_deltas(["s3://bucket/delta"], "s3://bucket/base/delta", base="s3://bucket/base"),
        ],
    )
    def test_no_output_lies_in_its_inputs(
        self, s3: S3Server, large_there: Trio, run: Callable[[], object]
    ) -> None:
        with pytest.raises(OutputError, match=r"cannot be written to"):
            run()
        assert there(s3.system, "bucket/base") == contents(large_there.base)

    def test_plan_counts_what_is_there(self, s3: S3Server, large_there: Trio) -> None:
        def planned() -> int:
            return plan_apply("s3://bucket/delta", base="s3://bucket/base", out=_URL).disk[0].needed

        before = planned()
        path = "model-00001-of-00002.safetensors"
        s3.system.put_file(str(large_there.target / path), f"bucket/out/{path}")
        assert before - planned() == (large_there.target / path).stat().st_size

    def test_memory_stores_too(self, memory: Any, large: Trio) -> None:
        make_delta(large.base, large.target, "memory://out/delta", chunk_bytes=CHUNK_BYTES)
        assert there(memory, "/out/delta") == contents(large.delta)
        apply_delta("memory://out/delta", "memory://out/model", base=large.base)
        assert there(memory, "/out/model") == contents(large.target)
