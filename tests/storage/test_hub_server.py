"""The Hub on loopback, as the real huggingface_hub sees it."""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _cache_manager
from huggingface_hub.utils._http import http_backoff

from ..hub_repos import Buffer, Stored, tree_id
from ..hub_server import HubServer, byte_range

WEIGHTS = bytes(range(256)) * 12_345
FILES = {
    "README.md": b"---\nlicense: mit\nbase_model: org/other\n---\n# A model\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "a folder/tökenizer+1.json": b'{"vocab": []}' * 400,
    "a folder.txt": b"before the folder, to git",
    "a folder/below/model.safetensors": b"small, but LFS by its name",
    "model.safetensors": WEIGHTS,
}
LFS = {"model.safetensors", "a folder/below/model.safetensors"}


@pytest.fixture
def base(hub: HubServer) -> str:
    """The first commit of org/base."""
    return hub.add_repo("org/base", FILES)


def tree_of(folder: str | Path) -> dict[str, bytes]:
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def fetch(url: str, **headers: str) -> Any:
    return get_session().get(url, headers=headers, follow_redirects=True)


# Reading ---------------------------------------------------------------------------------------------------


def test_a_snapshot_has_every_file(hub: HubServer, base: str) -> None:
    folder = snapshot_download("org/base")
    assert tree_of(folder) == FILES
    assert Path(folder).name == base
    assert hub.bytes_sent("org/base", "model.safetensors") == len(WEIGHTS)


def test_the_cache_names_blobs_by_their_digests(base: str) -> None:
    info = model_info("org/base", files_metadata=True)
    for sibling in info.siblings or []:
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        assert Path(hf_hub_download("org/base", sibling.rfilename)).resolve().name == digest


def test_model_info_tells_sizes_and_digests(base: str) -> None:
    info = model_info("org/base", files_metadata=True)
    assert (info.sha, info.private, info.gated) == (base, False, False)
    assert info.card_data is not None
    assert (info.card_data.license, info.card_data.base_model) == ("mit", "org/other")
    siblings = {s.rfilename: s for s in info.siblings or []}
    assert {name: s.size for name, s in siblings.items()} == {n: len(data) for n, data in FILES.items()}
    assert {name for name, s in siblings.items() if s.lfs} == LFS
    lfs = siblings["model.safetensors"].lfs
    assert lfs is not None
    assert lfs.sha256 == Stored(WEIGHTS).sha256
    assert lfs.size == len(WEIGHTS)
    assert lfs.pointer_size == 132
    assert siblings["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object


def test_model_info_says_no_more_than_it_is_asked(base: str) -> None:
    assert {s.size for s in model_info("org/base").siblings or []} == {None}
    info = model_info("org/base", expand=["gated", "sha"])
    assert (info.sha, info.gated, info.siblings) == (base, False, None)


def test_a_card_that_cannot_be_read_is_no_card(hub: HubServer) -> None:
    hub.add_repo("org/bad", {"README.md": b"---\n{unclosed: [\n---\n"})
    assert not model_info("org/bad").card_data


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_ids_are_those_of_git(hub: HubServer, base: str, tmp_path: Path) -> None:
    def git(*args: str) -> str:
        who = {f"GIT_{role}_{k}": v for role in ("AUTHOR", "COMMITTER") for k, v in person.items()}
        done = subprocess.run(
            ["git", *args], cwd=tmp_path / "git", env=os.environ | who, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    person = {"NAME": "hub", "EMAIL": "hub@localhost", "DATE": "1735689600 +0000"}
    files = hub.repos["org/base"].commits[base].files
    for path, blob in files.items():
        file = tmp_path / "git" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(blob.pointer if blob.lfs else blob.bytes())
    git("init", "--quiet")
    git("-c", "core.autocrlf=false", "add", "--all")
    assert git("write-tree") == tree_id(files)
    assert git("commit-tree", tree_id(files), "-m", "initial commit") == base


def test_the_tree_comes_in_pages(hub: HubServer, base: str) -> None:
    hub.page_items = 3
    entries = list(HfApi().list_repo_tree("org/base", recursive=True))
    assert {e.path for e in entries} == FILES.keys() | {"a folder", "a folder/below"}
    assert len(hub.requests("org/base", kind="api")) == 3  # for 9 entries
    (weights,) = (e for e in entries if e.path == "model.safetensors")
    assert weights.lfs.sha256 == Stored(WEIGHTS).sha256  # type: ignore[union-attr]


def test_the_tree_of_a_folder(hub: HubServer, base: str) -> None:
    second = hub.commit("org/base", {"a folder/below/more.txt": b"more"}, title="More")
    entries = HfApi().list_repo_tree("org/base", "a folder", expand=True)
    last = {e.path.rpartition("/")[2]: e.last_commit.oid for e in entries if e.last_commit}
    assert last == {"below": second, "tökenizer+1.json": base}
    with pytest.raises(EntryNotFoundError):
        list(HfApi().list_repo_tree("org/base", "no folder"))


def test_paths_info_leaves_out_what_is_not_there(base: str) -> None:
    infos = HfApi().get_paths_info("org/base", ["config.json", "a folder", "nothing"])
    assert [type(i).__name__ for i in infos] == ["RepoFile", "RepoFolder"]


def test_revisions(hub: HubServer, base: str) -> None:
    hub.tag("org/base", "v1")
    second = hub.commit("org/base", {"config.json": b"[2]"}, delete=["empty.txt"], title="Second")
    side = hub.commit("org/base", {"config.json": b"[3]"}, branch="a/side")
    for revision, commit, content in [
        ("v1", base, b"{}"),
        (base, base, b"{}"),
        ("main", second, b"[2]"),
        ("a/side", side, b"[3]"),
    ]:
        path = Path(hf_hub_download("org/base", "config.json", revision=revision))
        assert (path.parent.name, path.read_bytes()) == (commit, content)
        assert model_info("org/base", revision=revision).sha == commit
    api = HfApi()
    refs = api.list_repo_refs("org/base")
    assert {b.name: b.target_commit for b in refs.branches} == {"main": second, "a/side": side}
    assert {t.ref: t.target_commit for t in refs.tags} == {"refs/tags/v1": base}
    assert [c.commit_id for c in api.list_repo_commits("org/base")] == [second, base]
    assert "empty.txt" not in hub.files("org/base")


def test_metadata_of_a_large_file(hub: HubServer, base: str) -> None:
    metadata = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors"))
    assert (metadata.commit_hash, metadata.size) == (base, len(WEIGHTS))
    assert metadata.etag == Stored(WEIGHTS).sha256
    assert metadata.location.startswith(hub.cdn)
    assert metadata.xet_file_data is None
    assert fetch(metadata.location).content == WEIGHTS


def test_metadata_of_a_small_file(hub: HubServer, base: str) -> None:
    metadata = get_hf_file_metadata(hf_hub_url("org/base", "config.json"))
    assert (metadata.commit_hash, metadata.size) == (base, 2)
    assert metadata.etag == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert urlsplit(metadata.location).path == f"/api/resolve-cache/models/org/base/{base}/config.json"
    assert metadata.location.startswith(hub.endpoint)


@pytest.mark.parametrize(
    ("asked", "status", "span"),
    [
        ("bytes=0-0", 206, (0, 1)),
        ("bytes=100-299", 206, (100, 300)),
        ("bytes=3000000-", 206, (3_000_000, len(WEIGHTS))),
        ("bytes=-7", 206, (len(WEIGHTS) - 7, len(WEIGHTS))),
        ("bytes=-999999999", 206, (0, len(WEIGHTS))),
        ("bytes=3160000-9999999", 206, (3_160_000, len(WEIGHTS))),
        (f"bytes={len(WEIGHTS)}-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=5-4", 200, (0, len(WEIGHTS))),
        ("bytes=0-1,4-5", 200, (0, len(WEIGHTS))),
        ("lines=0-1", 200, (0, len(WEIGHTS))),
        ("bytes=-", 200, (0, len(WEIGHTS))),
    ],
)
def test_ranges(hub: HubServer, base: str, asked: str, status: int, span: tuple[int, int] | None) -> None:
    answer = fetch(hf_hub_url("org/base", "model.safetensors"), Range=asked)
    assert answer.status_code == status
    if span is None:
        assert answer.headers["Content-Range"] == f"bytes */{len(WEIGHTS)}"
        return
    start, stop = span
    assert answer.content == WEIGHTS[start:stop]
    if status == 206:
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(WEIGHTS)}"
    (sent,) = hub.requests("org/base", "model.safetensors", kind="content")
    assert (sent.range, sent.status, sent.nbytes) == (asked, status, stop - start)


def test_a_range_of_nothing_is_not_satisfiable() -> None:
    for asked in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        span = byte_range(asked, 0)
        assert span is not None
        assert span[0] >= 0


def test_a_range_of_another_version_is_not_sent(base: str) -> None:
    url, etag = hf_hub_url("org/base", "model.safetensors"), f'"{Stored(WEIGHTS).sha256}"'
    same = fetch(url, **{"Range": "bytes=0-9", "If-Range": etag})
    other = fetch(url, **{"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (same.status_code, other.status_code) == (206, 200)


def test_text_comes_gzipped_unless_identity_is_asked_for(hub: HubServer, base: str) -> None:
    name = "a folder/tökenizer+1.json"
    url = hf_hub_url("org/base", name)
    packed = fetch(url, **{"Accept-Encoding": "gzip", "Range": "bytes=0-9"})
    assert packed.status_code == 200
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "Content-Length" not in packed.headers
    assert packed.content == FILES[name]
    assert hub.bytes_sent("org/base", name) < len(gzip.compress(FILES[name])) + 20
    plain = fetch(url, **{"Accept-Encoding": "identity", "Range": "bytes=0-9"})
    assert (plain.status_code, plain.content) == (206, FILES[name][:10])


class Made:
    """200 GB that are nowhere: byte i is (i // 4096) % 251."""

    size = 200_000_000_000
    sha256 = "5a" * 32

    def read(self, offset: int, nbytes: int) -> Buffer:
        return bytes((i // 4096) % 251 for i in range(offset, offset + nbytes))


def test_contents_may_be_made_on_the_fly(hub: HubServer) -> None:
    hub.add_repo("org/huge", {"huge.safetensors": Made()})
    (sibling,) = model_info("org/huge", files_metadata=True).siblings or []
    assert sibling.lfs is not None
    assert (sibling.size, sibling.lfs.sha256) == (Made.size, Made.sha256)
    start = 150_000_000_000
    answer = fetch(hf_hub_url("org/huge", "huge.safetensors"), Range=f"bytes={start}-{start + 4999}")
    assert answer.content == Made().read(start, 5000)


# Who may see what ------------------------------------------------------------------------------------------


def test_what_is_not_there(hub: HubServer, base: str) -> None:
    for token in (False, hub.add_user("somebody")):
        with pytest.raises(RepositoryNotFoundError) as caught:
            model_info("org/nothing", token=token)
        assert caught.value.response.status_code == (404 if token else 401)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/nothing", "config.json", token=token)
    with pytest.raises(RevisionNotFoundError):
        model_info("org/base", revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/base", "config.json", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/base", "nothing.json")


def test_a_private_repository(hub: HubServer) -> None:
    hub.add_repo("org/secret", FILES, private=True)
    member, stranger = hub.add_user("member", orgs=["org"]), hub.add_user("stranger")
    for token in (False, stranger):
        with pytest.raises(RepositoryNotFoundError):
            model_info("org/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "config.json", token=token)
    assert model_info("org/secret", token=member).private
    assert tree_of(snapshot_download("org/secret", token=member)) == FILES


def test_a_gated_repository(hub: HubServer) -> None:
    sha = hub.add_repo("org/gated", FILES, gated="manual")
    stranger, reader = hub.add_user("stranger"), hub.add_user("reader")
    hub.repos["org/gated"].readers.add("reader")
    for token in (False, stranger):
        info = model_info("org/gated", token=token)
        assert (info.sha, info.gated) == (sha, "manual")
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("org/gated", "model.safetensors", token=token)
        assert caught.value.response.status_code == (403 if token else 401)
    assert tree_of(snapshot_download("org/gated", token=reader)) == FILES


def test_the_token_of_the_environment_is_taken(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/secret", FILES, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("member", orgs=["org"]))
    assert Path(hf_hub_download("org/secret", "model.safetensors")).read_bytes() == WEIGHTS
    assert {r.user for r in hub.requests("org/secret", kind="resolve")} == {"member"}


def test_a_token_that_nobody_has(base: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        model_info("org/base", token="hf_wrong")  # noqa: S106
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_who_am_i(hub: HubServer) -> None:
    me = HfApi().whoami(token=hub.add_user("me", orgs=["org"], can_write=False))
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("me", ["org"])
    assert me["auth"]["accessToken"]["role"] == "read"


def test_a_renamed_repository(hub: HubServer, base: str) -> None:
    hub.rename("org/base", "new-org/new-name")
    assert model_info("org/base").id == "new-org/new-name"
    assert model_info("org/base", files_metadata=True, revision=base).sha == base
    assert tree_of(snapshot_download("org/base")) == FILES


def test_a_link_to_the_cdn_wants_no_token_and_ends(hub: HubServer, base: str) -> None:
    link = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors")).location
    assert fetch(link, Authorization="Bearer x").status_code == 400
    assert fetch(link.replace("Signature=", "Signature=0")).status_code == 403
    hub.expire_links()
    assert fetch(link).status_code == 403
    assert fetch(hf_hub_url("org/base", "model.safetensors")).content == WEIGHTS


# Faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_status_for_a_while(hub: HubServer, base: str, status: int) -> None:
    hub.fail("org/base", status=status, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            model_info("org/base")
        assert caught.value.response.status_code == status
    assert model_info("org/base").sha == base


def test_a_rate_limit_says_how_long(hub: HubServer, base: str, no_waiting: list[float]) -> None:
    hub.fail(status=429, retry_after=7)
    headers = fetch(f"{hub.endpoint}/api/models/org/base").headers
    assert headers["Retry-After"] == "7"
    assert headers["RateLimit"] == '"api";r=0;t=7'
    hub.fail(status=429, retry_after=7)
    assert http_backoff("GET", f"{hub.endpoint}/api/models/org/base", retry_on_status_codes=429).is_success
    assert len(no_waiting) == 1


def test_a_fault_is_for_one_file_and_one_kind_of_request(hub: HubServer, base: str) -> None:
    hub.fail("org/base", "model.safetensors", on="content", status=503, times=None)
    link = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors")).location
    assert [fetch(link).status_code for _ in range(3)] == [503] * 3
    assert hf_hub_download("org/base", "config.json")
    hub.heal()
    assert fetch(link).content == WEIGHTS


def test_a_connection_is_cut(hub: HubServer, base: str) -> None:
    hub.fail("org/base", "model.safetensors", cut_after=1_500_000)
    url, data = hf_hub_url("org/base", "model.safetensors"), bytearray()
    with (  # noqa: PT012 - the bytes before the cut count
        get_session().stream("GET", url, follow_redirects=True) as answer,
        pytest.raises(Exception, match="closed connection"),
    ):
        for block in answer.iter_raw():
            data += block
    assert data == WEIGHTS[:1_500_000]
    data += fetch(url, Range="bytes=1500000-").content
    assert data == WEIGHTS
    assert hub.bytes_sent("org/base") == len(WEIGHTS)


def test_a_wrong_byte(hub: HubServer, base: str) -> None:
    hub.fail("org/base", "model.safetensors", flip_byte=2_000_000, times=2)
    url = hf_hub_url("org/base", "model.safetensors")
    assert fetch(url, Range="bytes=0-99").content == WEIGHTS[:100]  # the fault waits for its byte
    data = Path(hf_hub_download("org/base", "model.safetensors")).read_bytes()
    assert [i for i in range(len(data)) if data[i] != WEIGHTS[i]] == [2_000_000]
    part = fetch(url, Range="bytes=1999999-2000001").content
    assert part == bytes([WEIGHTS[1_999_999], WEIGHTS[2_000_000] ^ 0xFF, WEIGHTS[2_000_001]])
    assert fetch(url).content == WEIGHTS


def test_a_server_that_ignores_ranges(hub: HubServer, base: str) -> None:
    hub.fail("org/base", ignore_range=True)
    answer = fetch(hf_hub_url("org/base", "model.safetensors"), Range="bytes=5-9")
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


def test_a_length_that_is_not_true(hub: HubServer, base: str) -> None:
    hub.fail("org/base", extra_length=10)
    with pytest.raises(Exception, match="closed connection"):
        fetch(hf_hub_url("org/base", "model.safetensors"))
    hub.fail("org/base", extra_length=-10)
    assert fetch(hf_hub_url("org/base", "model.safetensors")).content == WEIGHTS[:-10]


def test_a_slow_reply(hub: HubServer, base: str) -> None:
    hub.fail("org/base", delay=600)
    with pytest.raises(Exception, match="timed out"):
        model_info("org/base", timeout=0.1)
    assert model_info("org/base").sha == base


def test_a_body_that_stalls(hub: HubServer, base: str) -> None:
    hub.fail("org/base", cut_after=1000, delay=600)
    link = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors")).location
    with pytest.raises(Exception, match="timed out"):
        get_session().get(link, timeout=0.1)


def test_no_reply_at_all(hub: HubServer, base: str) -> None:
    hub.fail("org/base", drop=True)
    with pytest.raises(Exception, match="disconnected"):
        model_info("org/base")
    assert model_info("org/base").sha == base


def test_a_fault_may_let_some_pass_and_wait_for_a_path(hub: HubServer, base: str) -> None:
    hub.fail("org/base", path="/revision/main", status=418, skip=1)
    assert model_info("org/base", revision="main").sha == base
    assert model_info("org/base").sha == base
    with pytest.raises(HfHubHTTPError, match="418"):
        model_info("org/base", revision="main")
    assert model_info("org/base", revision="main").sha == base


def test_a_hub_that_says_nothing_of_lfs(hub: HubServer, base: str) -> None:
    hub.repos["org/base"].lfs_metadata = False
    siblings = model_info("org/base", files_metadata=True).siblings or []
    assert {(s.lfs, s.size is None) for s in siblings} == {(None, False)}
    assert get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors")).etag is None


def test_a_hub_that_is_down(hub: HubServer) -> None:
    hub.close()
    with pytest.raises(Exception, match="refused"):
        model_info("org/base")


# Writing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "to-upload"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.fixture
def writer(hub: HubServer) -> HfApi:
    """The API with the token of one who may write to org."""
    return HfApi(token=hub.add_user("writer", orgs=["org"]))


def uploads(hub: HubServer) -> int:
    return len([r for r in hub.log if r.kind == "upload"])


@pytest.mark.parametrize("multipart_bytes", [1 << 24, 1_000_000])
def test_a_folder_goes_up_and_comes_down(
    hub: HubServer, writer: HfApi, folder: Path, multipart_bytes: int
) -> None:
    hub.multipart_bytes = multipart_bytes
    url = writer.create_repo("org/new", private=True)
    assert url.repo_id == "org/new"
    commit = writer.upload_folder(repo_id="org/new", folder_path=folder, commit_message="All")
    assert uploads(hub) == 1 + -(-len(WEIGHTS) // multipart_bytes)
    assert hub.repos["org/new"].private
    downloaded = tree_of(snapshot_download("org/new", token=writer.token))
    assert downloaded == FILES | {".gitattributes": downloaded[".gitattributes"]}
    assert model_info("org/new", token=writer.token).sha == commit.oid
    assert {p for p, b in hub.repos["org/new"].branches["main"].files.items() if b.lfs} == LFS


def test_what_is_there_is_not_uploaded_again(hub: HubServer, writer: HfApi, folder: Path) -> None:
    writer.create_repo("org/new")
    first = writer.upload_folder(repo_id="org/new", folder_path=folder)
    (folder / "copy.safetensors").write_bytes(WEIGHTS)
    before = uploads(hub)
    second = writer.upload_folder(repo_id="org/new", folder_path=folder)
    assert uploads(hub) == before
    assert second.oid != first.oid
    assert writer.upload_folder(repo_id="org/new", folder_path=folder).oid == second.oid


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not hasattr(HfApi, "upload_large_folder"), reason="huggingface_hub 2 has it no more")
def test_upload_large_folder(hub: HubServer, writer: HfApi, folder: Path) -> None:
    upload: Any = vars(HfApi)["upload_large_folder"]
    upload(writer, "org/new", folder, repo_type="model", private=True, print_report=False)
    assert hub.files("org/new").items() >= FILES.items()


def test_commits_add_and_delete(hub: HubServer, writer: HfApi, base: str) -> None:
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationAdd("new.json", b"[]"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("a folder/", is_folder=True),
    ]
    info = writer.create_commit(
        "org/base", operations, commit_message="Change", parent_commit=base, revision="main"
    )
    assert hub.files("org/base", info.oid).keys() == {
        "README.md",
        "a folder.txt",
        "empty.txt",
        "model.safetensors",
        "new.json",
    }
    assert [c.title for c in writer.list_repo_commits("org/base")] == ["Change", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        writer.create_commit(
            "org/base", [CommitOperationAdd("x", b"")], commit_message="Late", parent_commit=base
        )
    with pytest.raises(EntryNotFoundError):
        writer.create_commit("org/base", [CommitOperationDelete("config.json")], commit_message="Again")


def test_branches_and_tags(hub: HubServer, writer: HfApi, base: str) -> None:
    writer.create_branch("org/base", branch="side")
    writer.upload_file(repo_id="org/base", path_or_fileobj=b"x", path_in_repo="x", revision="side")
    writer.create_tag("org/base", tag="v1", revision="side")
    with pytest.raises(HfHubHTTPError) as caught:
        writer.create_tag("org/base", tag="v1")
    assert caught.value.response.status_code == 409
    assert hub.files("org/base", "v1") == FILES | {"x": b"x"}
    assert hub.files("org/base") == FILES
    with pytest.raises(RevisionNotFoundError):
        writer.upload_file(repo_id="org/base", path_or_fileobj=b"x", path_in_repo="x", revision="nowhere")


def test_an_answer_that_is_lost_after_the_work(hub: HubServer, writer: HfApi, base: str) -> None:
    hub.fail("org/base", path="/commit/main", lose_answer=True)
    with pytest.raises(Exception, match="disconnected"):
        writer.upload_file(repo_id="org/base", path_or_fileobj=b"x", path_in_repo="x.json")
    assert hub.files("org/base") == FILES | {"x.json": b"x"}


def test_what_gitignore_names_is_left_out(hub: HubServer, writer: HfApi) -> None:
    hub.add_repo("org/new", {".gitignore": b"*.tmp\n"})
    for name in ("a.tmp", "a.txt"):
        writer.upload_file(repo_id="org/new", path_or_fileobj=b"x", path_in_repo=name)
    assert sorted(hub.files("org/new")) == [".gitignore", "a.txt"]


def test_who_may_write(hub: HubServer, base: str) -> None:
    reader = hub.add_user("member", orgs=["org"], can_write=False)
    for token, status in [("", 401), (hub.add_user("stranger"), 403), (reader, 403)]:
        api = HfApi(token=token or False)
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(repo_id="org/base", path_or_fileobj=b"x", path_in_repo="x")
        assert caught.value.response.status_code == status
        with pytest.raises(HfHubHTTPError):
            api.create_repo("org/new")
    assert hub.files("org/base") == FILES


def test_a_repository_that_exists_already(writer: HfApi, base: str) -> None:
    assert writer.create_repo("org/base", exist_ok=True).repo_id == "org/base"
    with pytest.raises(HfHubHTTPError) as caught:
        writer.create_repo("org/base")
    assert caught.value.response.status_code == 409


def test_a_card_that_is_not_yaml_is_refused(writer: HfApi, base: str, tmp_path: Path) -> None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\n{unclosed: [\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        writer.upload_folder(repo_id="org/base", folder_path=tmp_path / "card")


def test_an_upload_is_tried_again(hub: HubServer, writer: HfApi, base: str, no_waiting: list[float]) -> None:
    hub.fail("org/base", on="upload", status=503, times=2)
    data = b"other weights" * 1000
    writer.upload_file(repo_id="org/base", path_or_fileobj=data, path_in_repo="other.safetensors")
    assert len(no_waiting) == 2
    assert hub.files("org/base")["other.safetensors"] == data


def test_bytes_of_another_digest_are_not_stored(hub: HubServer, base: str) -> None:
    link = hub.signed(f"/org/base/{Stored(b'announced').sha256}")
    assert get_session().put(link, content=b"sent").status_code == 400
    assert get_session().put(link, content=b"announced").status_code == 200


# The fixture -----------------------------------------------------------------------------------------------


def test_this_process_knows_no_other_hub(hub: HubServer, base: str) -> None:
    assert hub.endpoint == HfApi().endpoint
    assert hf_hub_url("a/b", "c").startswith(hub.endpoint)
    assert hub.env["HF_HUB_CACHE"] == vars(_cache_manager)["HF_HUB_CACHE"]  # a copy
    assert hf_hub_download("org/base", "config.json").startswith(hub.env["HF_HOME"])
    assert get_token() is None


def test_nor_does_a_child(hub: HubServer, base: str) -> None:
    script = (
        "from huggingface_hub import HfApi, model_info\n"
        "print(model_info('org/base').sha)\n"
        "try: HfApi(endpoint='https://huggingface.co').model_info('gpt2')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=hub.env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [base, "ProxyError"]
    assert hub.escapes == ["huggingface.co:443"]
    hub.escapes.clear()


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_no_connection_leaves_this_machine(host: str) -> None:
    with pytest.raises(AssertionError, match=f"tried to reach {host}"):
        socket.create_connection((host, 80), timeout=0.1)
    with socket.socket() as sock, pytest.raises(AssertionError, match=host):
        sock.connect_ex((host, 80))


def test_closing_ends_what_is_open() -> None:
    before = set(threading.enumerate())
    with HubServer() as hub:
        hub.add_repo("org/base", FILES)
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
        connection.request("GET", "/api/models/org/base")
        assert connection.getresponse().read()
    assert set(threading.enumerate()) <= before
    connection.close()
    assert not hub.errors
