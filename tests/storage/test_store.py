"""Stores and web servers: they keep the contract of sources, pin what they read, and tell no secrets."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaweights import (
    CheckpointError,
    OutputError,
    apply_delta,
    compact_deltas,
    inspect_delta,
    license_of,
    make_delta,
    open_target,
    plan_apply,
    verify_delta,
)
from deltaweights.errors import HubReadError
from deltaweights.storage import Source, Span, open_output, open_source
from deltaweights.storage.store import StoreSource

from ..checkpoints import contents
from ..conftest import CHUNK_BYTES, Trio
from ..hub_server import HubServer
from ..s3_server import S3Server
from ..web_server import WebServer
from .contract import FILES, SourceContract, Subject, flipped

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    pytest.importorskip("aiohttp")
    with WebServer(tmp_path) as server:
        yield server


@pytest.fixture
def buckets(hub: HubServer) -> Iterator[HubServer]:
    """A Hub with storage buckets. The client's file system is made once for all otherwise."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()


def subject_at(url: str, system: Any, root: str) -> Iterator[Subject]:
    for path, data in FILES.items():
        system.pipe_file(f"{root}/{path}", data)

    def changed(path: str) -> Source:
        system.pipe_file(f"{root}/{path}", flipped(FILES[path]))
        return StoreSource(url)

    with StoreSource(url, window_bytes=3 << 20) as source:
        yield Subject(source, FILES, changed)


def stored(s3: S3Server, place: str) -> dict[str, bytes]:
    """The files of a place in the bucket, by relative path, as :func:`contents` gives those of a folder."""
    paths = [path for path in s3.system.find(place) if "/.deltaweights/licenses/" not in path]
    return {path.removeprefix(f"{place}/"): s3.system.cat_file(path) for path in paths}


class TestMemory(SourceContract):
    @pytest.fixture
    def subject(self, memory: Any) -> Iterator[Subject]:
        yield from subject_at("memory://model", memory, "/model")


class TestS3(SourceContract):
    @pytest.fixture
    def subject(self, s3: S3Server) -> Iterator[Subject]:
        yield from subject_at("s3://bucket/model", s3.system, "bucket/model")

    def test_what_is_announced_is_fetched_once(self, subject: Subject, s3: S3Server) -> None:
        spans = [Span("c.bin", 100, 200_000), Span("a.bin", 5, 1000)]
        s3.log.clear()
        planned = subject.source.ranges(spans)
        with subject.source.expect(spans):
            for path, start, end in spans:
                subject.source.open(path).read(start, end - start)
        assert s3.bytes_sent() == sum(span.end - span.start for span in planned)


class TestWeb(SourceContract):
    @pytest.fixture
    def subject(self, web: WebServer, tmp_path: Path) -> Iterator[Subject]:
        for path, data in FILES.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)

        def changed(path: str) -> Source:
            (tmp_path / path).write_bytes(flipped(FILES[path]))
            return StoreSource(web.url)

        with StoreSource(web.url, window_bytes=3 << 20) as source:
            yield Subject(source, FILES, changed)


class TestBuckets(SourceContract):
    """Of the Hub."""

    @pytest.fixture
    def subject(self, buckets: HubServer) -> Iterator[Subject]:
        buckets.fill_bucket("org/bucket", {f"model/{path}": data for path, data in FILES.items()})

        def changed(path: str) -> Source:
            buckets.fill_bucket("org/bucket", {f"model/{path}": flipped(FILES[path])})
            return open_source("hf://buckets/org/bucket/model")

        with StoreSource("hf://buckets/org/bucket/model", window_bytes=3 << 20) as source:
            yield Subject(source, FILES, changed)


class TestPins:
    def test_another_version_in_mid_run_is_an_error_on_s3(self, s3: S3Server) -> None:
        s3.system.pipe_file("bucket/model/a.bin", bytes(5000))
        with StoreSource("s3://bucket/model") as source:
            assert source.open("a.bin").read(0, 1000) == bytes(1000)
            s3.system.pipe_file("bucket/model/a.bin", bytes(4999) + b"1")
            with pytest.raises(HubReadError, match=r"s3://bucket/model/a.bin changed while it was read"):
                source.open("a.bin").read(2000, 1000)

    def test_on_the_web(self, web: WebServer, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(bytes(5000))
        with StoreSource(f"{web.url}/a.safetensors") as source:
            assert dict(source.sizes) == {"a.safetensors": 5000}
            assert source.open("a.safetensors").read(0, 1000) == bytes(1000)
            (tmp_path / "a.safetensors").write_bytes(bytes(4999) + b"1")
            with pytest.raises(HubReadError, match="changed while it was read"):
                source.open("a.safetensors").read(2000, 1000)

    def test_in_a_bucket_of_the_hub(self, buckets: HubServer) -> None:
        """Whose client keeps what it listed."""
        buckets.fill_bucket("org/bucket", {"model/a.bin": bytes(5000), "model/b.bin": b"b"})
        with StoreSource("hf://buckets/org/bucket/model/") as source:
            buckets.fill_bucket("org/bucket", {"model/a.bin": bytes(4999) + b"1"})
            with pytest.raises(HubReadError, match="changed while it was read"):
                source.open("a.bin").read(2000, 1000)

    def test_and_in_memory(self, memory: Any) -> None:
        memory.pipe_file("/model/a.bin", bytes(5000))
        with StoreSource("memory://model/a.bin") as source:
            memory.pipe_file("/model/a.bin", bytes(4999) + b"1")
            with pytest.raises(HubReadError, match="changed while it was read"):
                source.open("a.bin").read(2000, 1000)


class TestFaults:
    def test_what_breaks_is_read_again(self, s3: S3Server) -> None:
        data = bytes(range(250)) * 4000
        s3.system.pipe_file("bucket/model/a.bin", data)
        s3.fail("a.bin", method="GET", status=503, times=2)
        s3.fail("a.bin", method="GET", cut_after=100_000, times=2)
        with StoreSource("s3://bucket/model") as source:
            assert b"".join(source.blocks("a.bin")) == data

    def test_a_store_that_stays_busy_is_an_error_that_may_pass(self, s3: S3Server) -> None:
        s3.system.pipe_file("bucket/model/a.bin", b"x")
        s3.fail("a.bin", method="GET", status=503, times=None)
        with StoreSource("s3://bucket/model") as source, pytest.raises(HubReadError) as caught:
            source.open("a.bin").read(0, 1)
        assert caught.value.retryable

    def test_expired_credentials_are_named_as_the_cause(self, s3: S3Server) -> None:
        s3.system.pipe_file("bucket/model/a.bin", b"x")
        s3.fail("a.bin", method="GET", status=403, times=None)
        with StoreSource("s3://bucket/model") as source, pytest.raises(HubReadError) as caught:
            source.open("a.bin").read(0, 1)
        assert not caught.value.retryable
        assert "credentials" in caught.value.fix

    def test_a_digest_kept_with_the_file_is_compared(self, s3: S3Server) -> None:
        s3.system.pipe_file("bucket/model/a.bin", b"x", Metadata={"deltaweights-sha256": "0" * 64})
        with StoreSource("s3://bucket/model") as source:
            assert source.told_sha256("a.bin") == "0" * 64
            with pytest.raises(HubReadError, match="damaged in transit"):
                list(source.blocks("a.bin"))

    def test_a_web_server_without_ranges_is_refused(self, web: WebServer, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(bytes(5000))
        web.ranges = False
        with StoreSource(f"{web.url}/a.safetensors") as source, pytest.raises(HubReadError):
            source.open("a.safetensors").read(2000, 1000)

    def test_what_breaks_in_a_bucket_of_the_hub_is_read_again(
        self, buckets: HubServer, no_waiting: list[float]
    ) -> None:
        data = bytes(range(250)) * 400
        buckets.fill_bucket("org/bucket", {"a.bin": data})
        buckets.fail("org/bucket", "a.bin", cut_after=1000, times=2)
        buckets.fail("org/bucket", "a.bin", status=500, times=2)
        with StoreSource("hf://buckets/org/bucket") as source:
            assert b"".join(source.blocks("a.bin")) == data

    def test_a_proxy_that_ignores_ranges_is_named(self, buckets: HubServer) -> None:
        buckets.fill_bucket("org/bucket", {"a.bin": bytes(5000)})
        buckets.fail("org/bucket", "a.bin", ignore_range=True, times=None)
        with StoreSource("hf://buckets/org/bucket") as source, pytest.raises(HubReadError) as caught:
            source.open("a.bin").read(100, 1000)
        assert "ranges are not served" in caught.value.why
        assert not caught.value.retryable


class TestLocations:
    def test_nothing_there(self, s3: S3Server) -> None:
        with pytest.raises(HubReadError, match="There is no s3://bucket/nothing"):
            open_source("s3://bucket/nothing")

    @pytest.mark.parametrize(
        ("scheme", "package"),
        [("gs", "gcsfs"), ("gcs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs")],
    )
    def test_a_missing_package_is_named(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(CheckpointError) as caught:
            open_source(f"{scheme}://bucket/x")
        assert caught.value.fix == f"Install what {scheme}:// needs: pip install {package}"

    @pytest.mark.parametrize(
        ("place", "way"),
        [("hf://buckets/org/bucket/out", "hf buckets sync"), ("https://host/out", "Choose a folder")],
    )
    def test_what_is_only_read_is_refused_as_an_output(self, place: str, way: str) -> None:
        with pytest.raises(OutputError, match="cannot be written to") as caught:
            open_output(place)
        assert way in caught.value.fix

    @pytest.mark.parametrize("place", ["hf://buckets/org/nothing", "hf://buckets/org/bucket/nothing"])
    def test_nothing_there_on_the_hub(self, buckets: HubServer, place: str) -> None:
        buckets.fill_bucket("org/bucket", {"a.bin": b"a"})
        with pytest.raises(HubReadError, match=f"There is no {place}"):
            open_source(place)

    def test_a_scheme_that_nobody_knows(self) -> None:
        with pytest.raises(CheckpointError, match="weird://bucket/x cannot be opened"):
            open_source("weird://bucket/x")

    def test_a_url_in_a_url(self) -> None:
        with pytest.raises(CheckpointError, match="a URL in a URL"):
            open_source("zip://x::s3://bucket/x.zip")

    def test_secrets_in_urls_are_shown_nowhere(
        self, web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "a.safetensors").write_bytes(bytes(5000))
        caplog.set_level("DEBUG", logger="deltaweights")
        url = f"{web.url}/a.safetensors?X-Amz-Signature=hush".replace("//", "//me:hush@")
        with StoreSource(url) as source:
            assert source.open("a.safetensors").read(1, 2) == bytes(2)
            assert "hush" in web.log[-1][1]
            shown = [source.where, source.name("a.safetensors"), source.fingerprint("a.safetensors")]
        with pytest.raises(HubReadError) as caught:
            StoreSource(url.replace("a.safe", "b.safe"))
        shown += [caplog.text, "".join(traceback.format_exception(caught.value))]
        assert not [text for text in shown if "hush" in text]


class TestVerbs:
    """Base, target and delta of every verb may lie in a store; results are those of folders."""

    @pytest.fixture
    def there(self, s3: S3Server, trio: Trio) -> str:
        for side in ("base", "target", "delta"):
            s3.system.put(str(getattr(trio, side)), f"bucket/{side}", recursive=True)
        return "s3://bucket"

    def test_diff(self, there: str, trio: Trio, tmp_path: Path) -> None:
        make_delta(f"{there}/base", f"{there}/target", tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
        assert contents(tmp_path / "delta") == contents(trio.delta)

    def test_apply(self, there: str, trio: Trio, tmp_path: Path) -> None:
        apply_delta(f"{there}/delta", tmp_path / "out", base=f"{there}/base")
        assert contents(tmp_path / "out") == contents(trio.target)

    def test_results_go_there_too(self, there: str, trio: Trio, s3: S3Server) -> None:
        base, out = f"{there}/base", f"{there}/out"
        make_delta(base, f"{there}/target", out + "/delta", chunk_bytes=CHUNK_BYTES)
        assert stored(s3, "bucket/out/delta") == contents(trio.delta)
        report = apply_delta(out + "/delta", out + "/model", base=base)
        assert report.out == out + "/model"
        assert stored(s3, "bucket/out/model") == contents(trio.target)
        assert apply_delta(out + "/delta", out + "/model", base=base).rebuilt == ()

    def test_a_base_there_is_not_kept(self, there: str, trio: Trio, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="s3://bucket/base cannot be kept"):
            apply_delta(trio.delta, tmp_path / "out", base=f"{there}/base", keep_base=True)
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError, match="cannot be kept"):
            plan_apply(trio.delta, base=f"{there}/base", keep_base=True)

    def test_the_rest(self, there: str, trio: Trio, tmp_path: Path) -> None:
        delta, base = f"{there}/delta", f"{there}/base"
        assert verify_delta(delta, base=base).ok
        assert inspect_delta(delta) == inspect_delta(trio.delta)
        assert license_of(delta) == license_of(trio.delta)
        plan, local = (plan_apply(at, base=by) for at, by in ((delta, base), (trio.delta, trio.base)))
        assert (plan.delta.needed, plan.base and plan.base.needed) == (
            local.delta.needed,
            local.base and local.base.needed,
        )
        assert plan.delta.download > 0
        compact_deltas([delta], tmp_path / "compact", base=base, chunk_bytes=CHUNK_BYTES)
        with open_target(str(tmp_path / "compact"), base=base) as target:
            assert len(target) > 0
