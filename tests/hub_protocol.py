"""What the Hub on loopback answers: the protocol that huggingface_hub speaks, for repositories of models.

- `/{repo}/resolve/{revision}/{path}` never sends a large file. It answers 302 with `X-Repo-Commit`,
  `X-Linked-Size`, `X-Linked-ETag` (the SHA-256) and a signed link to another host, "the CDN", which wants no
  token and refuses one. A small file of a public repository is a 307 to `/api/resolve-cache/...` with the
  commit in the path; one of a private or gated repository, or an empty one, comes at once. The ETag of a
  small file is its git blob id.
- Text may come gzipped and without a length, and then ranges are ignored, unless `identity` is asked for.
- Lists come in pages, the next one named in a `Link` header.
- What may not be seen is "not found": 401 without a token, 404 with one. A gated repository is seen, but its
  files are refused: 401 without a token, 403 with one. `X-Error-Code` tells these apart.
- A renamed repository is a 307 to its new name.
- An upload asks which files are large (`preupload`), sends those by git LFS (batch, PUT in one or several
  parts, verify), then everything else in one NDJSON commit.

There is no Xet storage: no answer has an `X-Xet-Hash`, so that downloads take the CDN. For uploads the
protocol has no such sign; a client must be told with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import parse_qs, quote, urlencode

from .hub_repos import Blob, Commit, Repo, Stored, User, git_id, tree_id

if TYPE_CHECKING:
    from .hub_server import HubServer, Request

Kind: TypeAlias = Literal["api", "resolve", "content", "upload"]

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Blob = b""


class Refused(Exception):  # noqa: N818 - it is an answer, not an error of the program
    """Ends a request with this reply."""

    def __init__(self, status: int, message: str = "", code: str = "", **headers: str) -> None:
        super().__init__(message)
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = to_json({"error": message}, status, {k: v for k, v in errors.items() if v} | named)


def to_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Reply(status, kind | (headers or {}), json.dumps(value, default=str).encode())


@dataclass
class Call:
    """A request that has found its route."""

    hub: HubServer
    entry: Request
    #: The variable parts of the path, decoded.
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refused(400, f"Malformed body: {error}") from None

    @cached_property
    def user(self) -> User | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        user = self.hub.users.get(token)
        if user is None or scheme != "Bearer":
            raise Refused(401, "Invalid credentials in Authorization header")
        self.entry.user = user.name
        return user

    def repo(self, *, write: bool = False) -> Repo:
        """The repository in the path, for one who may see it (or change it)."""
        repo_id, user = self.parts["repo"], self.user
        if repo_id in self.hub.renamed:
            new = self.entry.path.replace(repo_id, self.hub.renamed[repo_id], 1)
            query = urlencode(self.query, doseq=True)
            raise Refused(307, "Temporary Redirect", Location=f"{new}?{query}" if query else new)
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not repo.admits(user)):
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(repo_id)
        return repo

    def check_write(self, repo_id: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.user.may_write(repo_id):
            raise Refused(403, f"You don't have the rights to write to {repo_id}")

    def check_gate(self, repo: Repo) -> None:
        if repo.gated and not repo.admits(self.user):
            what = f"Access to model {repo.id} is restricted"
            if self.user is None:
                raise Refused(401, f"{what}. You must have access to it and be authenticated.", "GatedRepo")
            raise Refused(403, f"{what} and you are not in the authorized list.", "GatedRepo")

    def commit(self, repo: Repo) -> Commit:
        commit = repo.at(self.parts.get("revision", "main"))
        if commit is None:
            raise Refused(404, f"Invalid rev id: {self.parts['revision']}", "RevisionNotFound")
        return commit

    def blob(self, commit: Commit) -> Blob:
        blob = commit.files.get(self.parts["path"])
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        return blob

    def page(self, items: list[Any]) -> Reply:
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page_items
        headers = {}
        if stop < len(items):
            query = urlencode({**self.query, "cursor": [str(stop)]}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}{self.entry.path}?{query}>; rel="next"'
        return to_json(items[start:stop], headers=headers)


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    kind: Kind
    answer: Callable[[Call], Reply]


HUB_ROUTES: list[Route] = []
CDN_ROUTES: list[Route] = []
_PARTS = {"repo": "[^/]+/[^/]+?", "path": ".+", "part": "[0-9]+"}


def route(
    method: str, *templates: str, kind: Kind = "api", on: list[Route] = HUB_ROUTES
) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
    """Registers the answer to a method on paths like `/api/models/{repo}/refs`. GET is also HEAD."""

    def register(answer: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        for template in templates:
            pattern = re.sub(
                r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{_PARTS.get(m[1], '[^/]+')})", re.escape(template)
            )
            on.append(Route(method, re.compile(pattern), kind, answer))
        return answer

    return register


def opaque_id(name: str) -> str:
    """24 hex digits, as users and repositories have on the Hub."""
    return git_id("blob", name.encode())[:24]


# Reading ---------------------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    role = "write" if call.user.can_write else "read"
    return to_json(
        {
            "type": "user",
            "id": opaque_id(call.user.name),
            "name": call.user.name,
            "orgs": [{"type": "org", "name": org} for org in sorted(call.user.orgs)],
            "auth": {"type": "access_token", "accessToken": {"displayName": "token", "role": role}},
        }
    )


@route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Reply:
    return to_json({"standardEnvVars": [], "harnesses": {}})


@route("GET", "/api/models/{repo}", "/api/models/{repo}/revision/{revision}")
def model_info(call: Call) -> Reply:
    repo = call.repo()
    commit = call.commit(repo)
    card = card_data(commit)
    info: dict[str, Any] = {
        "_id": opaque_id(repo.id),
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": list(commit.history())[-1].date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [f"license:{card['license']}"] if "license" in card else [],
        "cardData": card,
        "siblings": [sibling(repo, path, blob, call.flag("blobs")) for path, blob in commit.files.items()],
        "spaces": [],
        "usedStorage": sum(blob.content.size for blob in commit.files.values()),
    }
    wanted = call.query.get("expand")
    return to_json({k: v for k, v in info.items() if k in ("_id", "id", *wanted)} if wanted else info)


def sibling(repo: Repo, path: str, blob: Blob, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    entry: dict[str, Any] = {"rfilename": path, "blobId": blob.oid, "size": blob.content.size}
    if blob.lfs and repo.lfs_metadata:
        entry["lfs"] = {
            "sha256": blob.content.sha256,
            "size": blob.content.size,
            "pointerSize": len(blob.pointer),
        }
    return entry


def card_data(commit: Commit) -> dict[str, Any]:
    """What the README says of the model; one that cannot be read says nothing."""
    import yaml  # type: ignore[import-untyped]

    readme = commit.files.get("README.md")
    try:
        return read_card(readme.bytes().decode(errors="replace")) if readme else {}
    except yaml.YAMLError:
        return {}


def read_card(readme: str) -> dict[str, Any]:
    """The YAML block at the head of a README."""
    import yaml

    block = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", readme, re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    return data if isinstance(data, dict) else {}


@route("GET", "/api/models/{repo}/tree/{revision}", "/api/models/{repo}/tree/{revision}/{path}")
def tree(call: Call) -> Reply:
    repo = call.repo()
    commit = call.commit(repo)
    folder = call.parts.get("path", "").strip("/")
    if folder and folder not in commit.folders():
        raise Refused(404, f"{folder} does not exist on {call.parts['revision']!r}", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    below = [path for path in (*commit.folders(), *commit.files) if path.startswith(prefix)]
    if not call.flag("recursive"):
        below = [path for path in below if "/" not in path[len(prefix) :]]
    return call.page([tree_entry(repo, commit, path, call.flag("expand")) for path in sorted(below)])


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(call: Call) -> Reply:
    repo = call.repo()
    commit = call.commit(repo)
    form = parse_qs(call.body.decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    known = commit.folders() | set(commit.files)
    asked = [path for path in form.get("paths", []) if path in known]
    return to_json([tree_entry(repo, commit, path, expand) for path in asked])


def tree_entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    blob = commit.files.get(path)
    if blob is None:
        entry = {"type": "directory", "oid": tree_id(commit.files, path), "size": 0, "path": path}
    else:
        entry = {"type": "file", "oid": blob.oid, "size": blob.content.size, "path": path}
        if blob.lfs and repo.lfs_metadata:
            size, pointer_size = blob.content.size, len(blob.pointer)
            entry["lfs"] = {"oid": blob.content.sha256, "size": size, "pointerSize": pointer_size}
    if expand:
        last = commit.last_change_of(path)
        entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return entry


@route("GET", "/api/models/{repo}/refs")
def refs(call: Call) -> Reply:
    repo = call.repo()
    kinds = (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    listed: dict[str, list[dict[str, str]]] = {
        key: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c.id} for n, c in tips.items()]
        for key, ref, tips in kinds
    }
    return to_json({**listed, "converts": [], "pullRequests": []})


@route("GET", "/api/models/{repo}/commits/{revision}")
def commits(call: Call) -> Reply:
    return call.page(
        [
            {"id": c.id, "title": c.title, "message": "", "authors": [{"user": "hub"}], "date": c.date}
            for c in call.commit(call.repo()).history()
        ]
    )


@route("GET", "/api/models/{repo}/auth-check")
def auth_check(call: Call) -> Reply:
    call.check_gate(call.repo())
    return to_json({})


@route("GET", "/{repo}/resolve/{revision}/{path}", kind="resolve")
def resolve(call: Call) -> Reply:
    repo = call.repo()
    call.check_gate(repo)
    commit = call.commit(repo)
    blob = call.blob(commit)
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    place = f"{repo.id}/{commit.id}/{quote(call.parts['path'])}"
    if blob.lfs:
        if repo.lfs_metadata:
            headers |= {"X-Linked-Size": str(blob.content.size), "X-Linked-ETag": blob.etag}
        headers["Location"] = call.hub.signed(f"/{place}")
        return Reply(302, headers, f"Found. Redirecting to {headers['Location']}".encode())
    if repo.private or repo.gated or not blob.content.size:
        call.entry.kind = "content"
        return Reply(200, headers | {"ETag": blob.etag}, blob)
    headers["Location"] = f"/api/resolve-cache/models/{place}?{urlencode({'etag': blob.etag})}"
    return Reply(307, headers, f"Temporary Redirect. Redirecting to {headers['Location']}".encode())


@route("GET", "/api/resolve-cache/models/{repo}/{revision}/{path}", kind="content")
def resolve_cache(call: Call) -> Reply:
    repo = call.repo()
    call.check_gate(repo)
    commit = call.commit(repo)
    blob = call.blob(commit)
    return Reply(200, {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "ETag": blob.etag}, blob)


@route("GET", "/{repo}/{revision}/{path}", kind="content", on=CDN_ROUTES)
def cdn_object(call: Call) -> Reply:
    check_link(call)
    repo_id = call.parts["repo"]
    repo = call.hub.repos[call.hub.renamed.get(repo_id, repo_id)]
    blob = repo.commits[call.parts["revision"]].files[call.parts["path"]]
    name = call.parts["path"].rpartition("/")[2]
    return Reply(
        200,
        {
            "Accept-Ranges": "bytes",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";",
            "Content-Type": "binary/octet-stream",
            "ETag": blob.etag,
        },
        blob,
    )


def check_link(call: Call) -> None:
    """As object stores do: the link is the permission, and a second one is one too many."""
    if "Authorization" in call.headers:
        raise Refused(400, "Only one auth mechanism allowed")
    if call.query.get("Signature") != [call.hub.signature(call.entry.path)]:
        raise Refused(403, "Request has expired")


# Writing ---------------------------------------------------------------------------------------------------


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    asked = call.json()
    repo_id = f"{asked.get('organization') or call.user.name}/{asked['name']}"
    call.check_write(repo_id)
    answer = {
        "url": f"{call.hub.endpoint}/{repo_id}",
        "name": repo_id,
        "id": opaque_id(repo_id),
    }
    with call.hub.lock:
        if repo_id in call.hub.repos:
            return to_json({"error": "You already created this model repo", **answer}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        call.hub.add_repo(repo_id, {".gitattributes": GITATTRIBUTES}, private=private)
    return to_json(answer)


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    import yaml

    try:
        read_card(call.json()["content"])
    except yaml.YAMLError as error:
        return to_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return to_json({"errors": [], "warnings": []})


@route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(call: Call) -> Reply:
    repo = call.repo(write=True)
    return add_ref(call, repo.branches, call.parts["name"], call.json().get("startingPoint"))


@route("POST", "/api/models/{repo}/tag/{revision}")
def create_tag(call: Call) -> Reply:
    repo = call.repo(write=True)
    return add_ref(call, repo.tags, call.json()["tag"], call.parts["revision"])


def add_ref(call: Call, refs: dict[str, Commit], name: str, revision: str | None) -> Reply:
    call.parts["revision"] = revision or "main"
    target = call.commit(call.repo())
    with call.hub.lock:
        if name in refs:
            raise Refused(409, f"Reference {name} already exists")
        refs[name] = target
    return to_json({})


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(call: Call) -> Reply:
    files = call.commit(call.repo(write=True)).files
    ignored = files[".gitignore"].bytes().decode().split() if ".gitignore" in files else []
    answer = []
    for asked in call.json()["files"]:
        path, known = asked["path"], files.get(asked["path"])
        lfs = call.hub.is_lfs(path, asked["size"])
        entry = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
        entry["shouldIgnore"] = any(fnmatch(path, pattern) for pattern in ignored)
        if known:
            entry["oid"] = known.content.sha256 if known.lfs else known.oid
        answer.append(entry)
    return to_json({"files": answer})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    repo, asked = call.repo(write=True), call.json()
    objects: list[dict[str, Any]] = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        entry = {"oid": oid, "size": size, "authenticated": True}
        if oid not in repo.objects:  # nothing to do, where it is there already
            entry["actions"] = upload_actions(call.hub, repo.id, oid, size)
        objects.append(entry)
    return to_json({"transfer": "basic", "objects": objects})


def upload_actions(hub: HubServer, repo_id: str, oid: str, size: int) -> dict[str, Any]:
    verify = {"href": f"{hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
    if size <= hub.multipart_bytes:
        return {"upload": {"href": hub.signed(f"/{repo_id}/{oid}")}, "verify": verify}
    count = -(-size // hub.multipart_bytes)
    parts = {str(n): hub.signed(f"/{repo_id}/{oid}/{n}") for n in range(1, count + 1)}
    href = f"{hub.endpoint}/api/complete_multipart/{repo_id}"
    return {
        "upload": {"href": href, "header": {"chunk_size": str(hub.multipart_bytes), **parts}},
        "verify": verify,
    }


@route("PUT", "/{repo}/{oid}", "/{repo}/{oid}/{part}", kind="upload", on=CDN_ROUTES)
def put_object(call: Call) -> Reply:
    check_link(call)
    repo, oid = call.hub.repos[call.parts["repo"]], call.parts["oid"]
    if "part" in call.parts:
        repo.parts[oid, int(call.parts["part"])] = call.body
    else:
        store_object(repo, oid, call.body)
    return Reply(200, {"ETag": f'"{hashlib.md5(call.body, usedforsecurity=False).hexdigest()}"'})


@route("POST", "/api/complete_multipart/{repo}")
def complete_multipart(call: Call) -> Reply:
    repo, asked = call.hub.repos[call.parts["repo"]], call.json()
    oid, numbers = asked["oid"], [part["partNumber"] for part in asked["parts"]]
    if any((oid, number) not in repo.parts for number in numbers):
        raise Refused(400, "A part is missing")
    store_object(repo, oid, b"".join(repo.parts.pop((oid, number)) for number in sorted(numbers)))
    return to_json({})


def store_object(repo: Repo, oid: str, data: bytes) -> None:
    content = Stored(data)
    if content.sha256 != oid:
        raise Refused(400, "The bytes do not have the SHA-256 that was announced")
    repo.objects[oid] = content


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Reply:
    repo, asked = call.repo(write=True), call.json()
    stored = repo.objects.get(asked["oid"])
    if stored is None or stored.size != asked["size"]:
        raise Refused(404, "Object was not uploaded")
    return to_json({})


@route("POST", "/api/models/{repo}/commit/{revision}")
def create_commit(call: Call) -> Reply:
    repo = call.repo(write=True)
    with call.hub.lock:
        tip = repo.branches.get(call.parts["revision"])
        if tip is None:
            raise Refused(404, f"Invalid rev id: {call.parts['revision']}", "RevisionNotFound")
        files, title = dict(tip.files), "commit"
        for line in call.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", tip.id) != tip.id:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            else:
                change(call.hub, repo, files, key, value)
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        is_request = call.flag("create_pr")
        commit = repo.add(files, f"refs/pr/{number}" if is_request else call.parts["revision"], title)
    page = f"{call.hub.endpoint}/{repo.id}"
    answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{page}/commit/{commit.id}"}
    request = {"pullRequestUrl": f"{page}/discussions/{number}"} if is_request else {}
    return to_json(answer | {"hookOutput": ""} | request)


def change(hub: HubServer, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """One line of a commit, done to a copy of the branch's files."""
    path = value["path"]
    if key == "file":
        files[path] = Blob(Stored(base64.b64decode(value["content"])), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refused(400, f"LFS pointer of {path} names an object that was not uploaded")
        files[path] = Blob(repo.objects[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for below in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
            del files[below]
    else:
        raise Refused(400, f"Unknown operation {key!r}")
