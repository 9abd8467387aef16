"""What stores hold that folders do not: keys of any text, markers of folders, versions, buckets of any size;
and what they answer: that it is elsewhere, that somebody has to pay, that a token has expired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaweights import CheckpointError, OutputError, make_delta
from deltaweights.checkpoint import open_checkpoint
from deltaweights.errors import HubReadError, HubWriteError
from deltaweights.storage import open_output, open_source
from deltaweights.storage.store import StoreSource, client

from ..checkpoints import contents, safetensors_bytes
from ..conftest import CHUNK_BYTES, Trio
from ..s3_server import S3Server
from ..web_server import WebServer
from .destination_contract import write

pytestmark = pytest.mark.usefixtures("no_pauses")

URL = "s3://bucket/model"
SHARD = safetensors_bytes({})


def put(s3: S3Server, key: str, data: bytes, **more: Any) -> Any:
    """An object with exactly this key: s3fs would make some of them others."""
    return s3.system.call_s3("put_object", Bucket="bucket", Key=key, Body=data, **more)


# Names ------------------------------------------------------------------------------------------------

NAMES = ["with space.bin", "a%2Fb.bin", "a%20b.bin", "übung/モデル.bin", "what?.bin", "c#1.bin", "+&=;'.bin"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_is_read_and_written(s3: S3Server, name: str) -> None:
    put(s3, f"model/{name}", b"read")
    with StoreSource(URL) as source:
        assert dict(source.sizes) == {name: 4}
        assert b"".join(source.blocks(name)) == b"read"
    with open_output("s3://bucket/out") as folder:
        write(folder, name, b"written")
        assert b"".join(folder.blocks(name)) == b"written"
    found = s3.system.call_s3("list_objects_v2", Bucket="bucket", Prefix="out/")["Contents"]
    assert [one["Key"] for one in found] == [f"out/{name}"]


@pytest.mark.parametrize("name", ["with space", "a%2Fb", "übung", "c#1"])
def test_so_is_any_name_of_a_place(s3: S3Server, name: str) -> None:
    with open_output(f"s3://bucket/{name}") as folder:
        write(folder, "x", b"data")
    with StoreSource(f"s3://bucket/{name}") as source:
        assert source.open("x").read(0, 4) == b"data"
    assert s3.system.call_s3("get_object", Bucket="bucket", Key=f"{name}/x")


@pytest.mark.parametrize("key", ["/x.bin", "../x.bin", "sub/../x.bin", "./x.bin", "sub//x.bin"])
def test_a_name_that_no_file_can_have_is_told_where_it_matters(s3: S3Server, key: str) -> None:
    """It takes no other one's place, and leads nowhere."""
    put(s3, f"model/{key}", b"odd")
    put(s3, "model/x.bin", b"plain")
    put(s3, "model/a.safetensors", SHARD)
    with StoreSource(URL) as source:
        assert set(source.sizes) == {"x.bin", "a.safetensors"}
        assert source.open("x.bin").read(0, 5) == b"plain"
    with open_checkpoint(URL, may_lack=True) as base:
        assert set(base.shards) == {"a.safetensors"}
    with pytest.raises(CheckpointError, match="a name that no file can have") as caught:
        open_checkpoint(URL)
    assert repr(key) in caught.value.why


def test_a_name_that_s3fs_would_cut_is_not_written(s3: S3Server) -> None:
    with (
        open_output("s3://bucket/out") as folder,
        pytest.raises(OutputError, match="cannot be written to S3"),
    ):
        write(folder, "a?versionId=b", b"data")
    assert not s3.system.find("bucket/out")


def test_other_places_whose_names_begin_alike_are_left_out(s3: S3Server) -> None:
    for key in ("model/a.bin", "model-2/b.bin", "model.bin"):
        put(s3, key, b"data")
    with StoreSource(URL) as source:
        assert set(source.sizes) == {"a.bin"}


def test_markers_of_folders_are_no_files(s3: S3Server, trio: Trio, tmp_path: Path) -> None:
    """As consoles make them: objects of no bytes, with names that end so."""
    for side in ("base", "target"):
        s3.system.put(str(getattr(trio, side)), f"bucket/{side}", recursive=True)
        for marker in (f"{side}/", f"{side}/sub/", f"{side}/sub/deep/"):
            put(s3, marker, b"")
    make_delta("s3://bucket/base", "s3://bucket/target", tmp_path / "delta", chunk_bytes=CHUNK_BYTES)
    assert contents(tmp_path / "delta") == contents(trio.delta)
    put(s3, "out/", b"")
    with open_output("s3://bucket/out") as folder:
        assert folder.foreign(()) == []


# Versions ---------------------------------------------------------------------------------------------


@pytest.fixture
def versioned(s3: S3Server) -> S3Server:
    s3.system.call_s3("put_bucket_versioning", Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    return s3


def test_a_run_reads_one_version(versioned: S3Server) -> None:
    put(versioned, "model/a.bin", b"first" * 1000)
    with StoreSource(URL) as source:
        assert source.open("a.bin").read(0, 5) == b"first"
        put(versioned, "model/a.bin", b"other" * 1000)
        with pytest.raises(HubReadError, match="changed while it was read"):
            source.open("a.bin").read(2000, 1000)
    with StoreSource(URL) as source:
        assert source.open("a.bin").read(2000, 5) == b"other"


def test_a_file_that_was_removed_in_mid_run_is_told(versioned: S3Server) -> None:
    put(versioned, "model/a.bin", b"first" * 1000)
    with StoreSource(URL) as source:
        versioned.system.call_s3("delete_object", Bucket="bucket", Key="model/a.bin")
        with pytest.raises(HubReadError, match=r"There is no s3://bucket/model/a\.bin"):
            source.open("a.bin").read(2000, 1000)
    with pytest.raises(HubReadError, match="There is no s3://bucket/model"):
        open_source(URL)


def test_an_older_version_of_a_file_can_be_named(versioned: S3Server) -> None:
    ids = [put(versioned, "a.safetensors", SHARD + tail)["VersionId"] for tail in (b"", b" ")]
    for version, size in zip(ids, (0, 1), strict=True):
        with StoreSource(f"s3://bucket/a.safetensors?versionId={version}") as source:
            assert dict(source.sizes) == {"a.safetensors": len(SHARD) + size}
            assert len(b"".join(source.blocks("a.safetensors"))) == source.sizes["a.safetensors"]


# Buckets of any size ----------------------------------------------------------------------------------


def fill(s3: S3Server, count: int) -> None:
    """Objects, put where moto keeps them: by requests, it would take minutes."""
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for number in range(count):
        backend.put_object("bucket", f"model/{number:06d}.bin", b"")


def test_a_listing_of_several_pages_is_whole(s3: S3Server) -> None:
    fill(s3, 1001)
    with StoreSource(URL) as source:
        assert len(source.sizes) == 1001
    with open_output(URL) as folder:
        assert len(folder.foreign(())) == 1001


def test_of_a_whole_bucket_no_more_is_listed_than_a_place_may_have(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are."""
    monkeypatch.setattr(client, "_MOST_FILES", 1500)
    fill(s3, 2001)
    for opened in (open_source, lambda url: open_output(url).__enter__()):
        s3.log.clear()
        with pytest.raises((HubReadError, HubWriteError), match="s3://bucket/model") as caught:
            opened(URL)
        assert caught.value.why == "it has more than 1,500 files."
        assert len([request for request in s3.log if "list-type=2" in request.query]) == 2


def test_a_hundred_thousand_files_and_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing as S3 gives it, without end."""
    asked: list[dict[str, Any]] = []

    def answer(method: str, **what: Any) -> dict[str, Any]:
        asked.append(what)
        first = 1000 * len(asked)
        objects = [{"Key": f"model/{first + k}.bin", "Size": 1, "ETag": "x"} for k in range(1000)]
        return {"Contents": objects, "IsTruncated": True, "NextContinuationToken": str(first)}

    pytest.importorskip("s3fs")
    store = client.Store(URL)
    monkeypatch.setattr(store.system, "call_s3", answer)
    with pytest.raises(HubReadError, match=URL) as caught:
        store.listing()
    assert "100,000" in caught.value.why
    assert len(asked) == 101


# Answers ----------------------------------------------------------------------------------------------


def test_who_asks_pays_where_the_package_is_told_so(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own settings, such as FSSPEC_S3_REQUESTER_PAYS."""
    import fsspec.config  # type: ignore[import-untyped]

    put(s3, "model/a.bin", b"data")
    s3.fail("", status=403, times=None, unpaid=True)
    with pytest.raises(HubReadError, match=r"Cannot read s3://bucket/model") as caught:
        open_source(URL)
    assert "credentials" in caught.value.fix
    with pytest.raises(HubWriteError, match=r"Cannot write s3://bucket/out"), open_output("s3://bucket/out"):
        pytest.fail("nothing may be written")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": "true"})
    with StoreSource(URL) as source:
        assert source.open("a.bin").read(0, 4) == b"data"
    with open_output("s3://bucket/out") as folder:
        write(folder, "x", b"data")
        write(folder, "y", bytes(7 << 20))
    s3.heal()
    assert set(s3.system.find("bucket/out")) == {"bucket/out/x", "bucket/out/y"}


@pytest.mark.parametrize("status", [400, 403])
def test_credentials_that_expire_are_named_wherever_that_is(s3: S3Server, status: int) -> None:
    put(s3, "model/a.bin", b"data")
    with StoreSource(URL) as source:
        s3.fail("", status=status, times=None)
        failures: list[Callable[[], object]] = [
            lambda: source.open("a.bin").read(0, 4),
            lambda: open_source(URL),
        ]
        for fail in failures:
            with pytest.raises(HubReadError) as caught:
                fail()
            assert not caught.value.retryable
            assert "have not expired" in caught.value.fix
    s3.heal()

    def expire() -> None:
        with open_output("s3://bucket/out") as folder:
            s3.fail("", status=status, times=None)
            write(folder, "x", b"data")

    with pytest.raises(HubWriteError) as caught_writing:
        expire()
    assert "have not expired" in caught_writing.value.fix


def test_a_bucket_that_is_elsewhere_is_an_error(s3: S3Server) -> None:
    put(s3, "model/a.bin", b"data")
    with StoreSource(URL) as source:
        s3.fail("a.bin", status=301, times=None)
        with pytest.raises(HubReadError, match=r"Cannot read s3://bucket/model/a\.bin"):
            source.open("a.bin").read(0, 4)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    pytest.importorskip("aiohttp")
    with WebServer(tmp_path) as server:
        yield server


def test_a_web_server_may_send_us_elsewhere(web: WebServer, tmp_path: Path) -> None:
    """As many do, to a mirror: the version is pinned there, too."""
    data = bytes(range(250)) * 400
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"only listed")
    (tmp_path / "mirror.bin").write_bytes(data)
    web.moved["model/a.safetensors"] = f"{web.url}/mirror.bin?token=hush"
    for url in (f"{web.url}/model", f"{web.url}/model/a.safetensors"):
        with StoreSource(url) as source:
            assert dict(source.sizes) == {"a.safetensors": len(data)}
            assert b"".join(source.blocks("a.safetensors")) == data
    with StoreSource(f"{web.url}/model/a.safetensors") as source:
        (tmp_path / "mirror.bin").write_bytes(data[::-1])
        with pytest.raises(HubReadError, match="changed while it was read") as caught:
            source.open("a.safetensors").read(0, 1000)
    assert "hush" not in str(caught.value)


def test_a_web_server_that_sends_us_round_is_an_error(web: WebServer) -> None:
    web.moved["a.safetensors"] = f"{web.url}/a.safetensors"
    with pytest.raises(HubReadError, match=r"a\.safetensors"):
        open_source(f"{web.url}/a.safetensors")
