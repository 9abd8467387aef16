"""A Hub on loopback, for tests and benchmarks: repositories, faults, and a log of what was asked for.

    with HubServer() as hub:
        first = hub.add_repo("org/base", {"config.json": b"{}", "model.safetensors": weights})
        hub.fail("org/base", "model.safetensors", status=503, times=2)
        ...  # any client with HF_ENDPOINT=hub.endpoint
        assert hub.bytes_sent("org/base", "model.safetensors") == len(weights)

What it answers is in hub_protocol.py, what it holds in hub_repos.py.
"""

from __future__ import annotations

import contextlib
import gzip
import hmac
import os
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from . import hub_buckets as _buckets  # noqa: F401 - its routes
from .hub_protocol import CDN_ROUTES, HUB_ROUTES, Call, Kind, Refused, Reply, Route, to_json
from .hub_repos import Blob, Commit, Content, Gate, Repo, Stored, User

#: Bytes handed to the socket at once.
BLOCK_BYTES = 1 << 20
#: As on the Hub: smaller text is not worth compressing.
GZIP_BYTES = 1 << 10
TEXT_SUFFIXES = (".json", ".md", ".txt", ".py", ".yaml", ".jinja")


@dataclass
class Request:
    """One line of the log. `nbytes` counts the body as sent, while it is sent."""

    method: str
    kind: Kind
    path: str
    repo: str | None = None
    file: str | None = None
    range: str | None = None
    user: str | None = None
    status: int = 0
    nbytes: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that it is for (None: with all of them)."""

    repo: str | None
    file: str | None
    on: Kind | None
    times: int | None
    #: Only for requests with paths that end so.
    path: str = ""
    #: Answer with this status instead.
    status: int | None = None
    #: With status 429 or 503: seconds that the client is asked to wait.
    retry_after: int | None = None
    #: Let so many of them pass first.
    skip: int = 0
    #: Close the connection without an answer.
    drop: bool = False
    #: Do what was asked for, and close the connection without an answer.
    lose_answer: bool = False
    #: Seconds before the answer, or before a cut.
    delay: float = 0
    #: Close the connection after so many bytes of the body.
    cut_after: int | None = None
    #: Invert the byte of the file at this offset, where it is sent.
    flip_byte: int | None = None
    #: Answer 200 and the whole file to a range request.
    ignore_range: bool = False
    #: Content-Length says so many bytes more than there are (fewer, if negative).
    extra_length: int = 0

    def __post_init__(self) -> None:
        assert not (self.is_of_body and (self.status or self.drop)), "these are two faults"

    @property
    def is_of_body(self) -> bool:
        """Concerns the bytes of a file, as against the answer to a request of any kind."""
        offsets = (self.cut_after, self.flip_byte)
        return offsets != (None, None) or self.ignore_range or self.extra_length != 0

    def is_for(self, request: Request, *, body: bool) -> bool:
        return (
            self.times != 0
            and self.is_of_body == body
            and self.repo in (None, request.repo)
            and self.file in (None, request.file)
            and self.on in (None, request.kind)
            and request.path.endswith(self.path)
        )

    def concerns(self, start: int, stop: int) -> bool:
        """Whether there is anything for it to spoil in these bytes of the file."""
        return self.flip_byte is None or start <= self.flip_byte < stop

    def reply(self) -> Reply:
        assert self.status
        phrase = HTTPStatus(self.status).phrase
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 429:
            headers["RateLimit"] = f'"api";r=0;t={self.retry_after or 0}'
            headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
        if self.status >= 500:  # from the load balancer, which knows no JSON
            return Reply(self.status, headers | {"Content-Type": "text/html"}, f"<h1>{phrase}</h1>".encode())
        return to_json({"error": phrase}, self.status, headers)


#: Nothing goes wrong.
NO_FAULT = Fault(None, None, None, None)


class HubServer:
    """A Hub and its CDN, each on a port of 127.0.0.1, from `with` to the end of it.

    Files of `lfs_bytes` and more, and those with one of `lfs_suffixes`, are LFS files; uploads of more than
    `multipart_bytes` come in parts of that size; lists come in pages of `page_items`.
    """

    def __init__(
        self,
        *,
        lfs_bytes: int = 1 << 20,
        lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin", ".gguf", ".zst"),
        multipart_bytes: int = 1 << 24,
        page_items: int = 1000,
    ) -> None:
        self.lfs_bytes = lfs_bytes
        self.lfs_suffixes = lfs_suffixes
        self.multipart_bytes = multipart_bytes
        self.page_items = page_items
        self.log: list[Request] = []
        #: Requests for other hosts that came here because `client_env` makes this server the proxy.
        self.escapes: list[str] = []
        #: What went wrong in the server itself: always empty, or it is a bug here.
        self.errors: list[BaseException | None] = []
        #: The environment for a child process, where a fixture has made one.
        self.env: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        #: The storage buckets by id, and their files by path.
        self.buckets: dict[str, dict[str, Blob]] = {}
        self.renamed: dict[str, str] = {}
        self.users: dict[str, User] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._link_secret = secrets.token_bytes(16)
        # Two names for one address: some clients take what differs in the port alone for the same site.
        self._hub = _Listener(self, HUB_ROUTES, "127.0.0.1")
        self._cdn = _Listener(self, CDN_ROUTES, "localhost")

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return self._hub.url

    @property
    def cdn(self) -> str:
        return self._cdn.url

    def close(self) -> None:
        """Stops listening and cuts what is open. From then on connections are refused."""
        self.closing.set()
        self._hub.close()
        self._cdn.close()

    def client_env(self, home: Path) -> dict[str, str]:
        """The environment for a process whose Hub this is, with an empty cache under `home` and no token.

        Requests for other hosts come to this server as their proxy, which refuses them: see `escapes`.
        """
        ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_|\w*_PROXY$", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not ours.match(name)}
        return env | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "ALL_PROXY": self.endpoint,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # repositories and users

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Content],
        *,
        private: bool = False,
        gated: Gate = False,
    ) -> str:
        """A new repository with one commit on `main`; returns the commit's id."""
        with self.lock:
            assert repo_id not in self.repos, repo_id
            self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
            return self.commit(repo_id, files, title="initial commit")

    def fill_bucket(self, bucket_id: str, files: Mapping[str, bytes]) -> None:
        """Put files into a storage bucket, which is made if need be."""
        with self.lock:
            bucket = self.buckets.setdefault(bucket_id, {})
            bucket |= {path: Blob(Stored(data), lfs=True) for path, data in files.items()}

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Content],
        *,
        delete: Iterable[str] = (),
        branch: str = "main",
        title: str = "commit",
    ) -> str:
        """Adds or replaces files, and deletes some, on top of a branch; returns the new commit's id."""
        with self.lock:
            repo = self.repos[repo_id]
            tip = repo.tip(branch)
            kept = dict(tip.files) if tip else {}
            for path in delete:
                del kept[path]
            return repo.add(kept | {p: self.blob(p, f) for p, f in files.items()}, branch, title).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, by path."""
        return {path: blob.bytes() for path, blob in self._commit(repo_id, revision).files.items()}

    def _commit(self, repo_id: str, revision: str) -> Commit:
        commit = self.repos[repo_id].at(revision)
        assert commit is not None, f"{repo_id} has no {revision}"
        return commit

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        self.repos[repo_id].tags[name] = self._commit(repo_id, revision)

    def rename(self, old: str, new: str) -> None:
        """Gives a repository another id; the old one redirects."""
        with self.lock:
            repo = self.repos.pop(old)
            repo.id = new
            self.repos[new] = repo
            self.renamed[old] = new

    def add_user(self, name: str, *, orgs: Iterable[str] = (), can_write: bool = True) -> str:
        """A user, who owns what is under that name and those of the organizations; returns a token."""
        token = f"hf_{name}{'' if can_write else '_read'}"
        self.users[token] = User(name, frozenset(orgs), can_write)
        return token

    def blob(self, path: str, content: bytes | Content) -> Blob:
        if isinstance(content, bytes):
            return Blob(Stored(content), lfs=self.is_lfs(path, len(content)))
        return Blob(content, lfs=True)

    def is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (size >= self.lfs_bytes or path.endswith(self.lfs_suffixes))

    # faults and the log

    def fail(
        self,
        repo: str | None = None,
        file: str | None = None,
        *,
        on: Kind | None = None,
        times: int | None = 1,
        **what: Any,
    ) -> None:
        """From now on something goes wrong with a file, with a repository or with everything: see `Fault`.

        Each request meets the oldest fault that is for it: one for its answer, and one for its body.
        """
        with self.lock:
            self._faults.append(Fault(repo, file, on, times, **what))

    def heal(self) -> None:
        """Forgets all faults."""
        with self.lock:
            self._faults.clear()

    def fault_for(
        self, request: Request, *, body: bool = False, span: tuple[int, int] = (0, 0)
    ) -> Fault | None:
        """The fault that a request meets; ``span``: which bytes of the file its body is."""
        with self.lock:
            for fault in self._faults:
                if fault.is_for(request, body=body) and fault.concerns(*span):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def requests(
        self, repo: str | None = None, file: str | None = None, *, kind: Kind | None = None
    ) -> list[Request]:
        """The log's lines for a repository, a file, a kind of request."""
        wanted = ((repo, "repo"), (file, "file"), (kind, "kind"))
        return [r for r in self.log if all(v is None or getattr(r, name) == v for v, name in wanted)]

    def bytes_sent(self, repo: str | None = None, file: str | None = None) -> int:
        """Bytes of files sent so far, repeated ones counted again."""
        return sum(request.nbytes for request in self.requests(repo, file, kind="content"))

    def weight_bytes(self, repo: str) -> int:
        """:meth:`bytes_sent` of a repository's safetensors files."""
        files = {request.file for request in self.requests(repo) if request.file}
        return sum(self.bytes_sent(repo, file) for file in files if file.endswith(".safetensors"))

    # links to the CDN

    def signed(self, path: str) -> str:
        return f"{self.cdn}{path}?{urlencode({'Expires': 3600, 'Signature': self.signature(path)})}"

    def signature(self, path: str) -> str:
        return hmac.new(self._link_secret, path.encode(), "sha256").hexdigest()

    def expire_links(self) -> None:
        """No link to the CDN that was given out so far works any longer (the Hub's last about an hour)."""
        self._link_secret = secrets.token_bytes(16)


class _Listener(ThreadingHTTPServer):
    """A port on loopback, a thread that accepts, and one more for each connection."""

    request_queue_size = 128

    def __init__(self, hub: HubServer, routes: list[Route], host: str) -> None:
        self.hub = hub
        self.routes = routes
        self.connections: dict[Any, threading.Thread] = {}
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://{host}:{self.server_address[1]}"
        self.acceptor = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.acceptor.start()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would look up a host name
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        self.connections[request] = thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # the other side may leave at any time
            self.hub.errors.append(error)

    def close(self) -> None:
        if not self.acceptor.is_alive():
            return
        self.shutdown()
        self.acceptor.join()
        for connection, thread in list(self.connections.items()):
            with contextlib.suppress(OSError):  # the other side was quicker
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
        self.server_close()


class _Connection(BaseHTTPRequestHandler):
    """One client's connection, kept open from request to request."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self) -> None:
        hub = self.server.hub
        body = self.read_body()
        if not self.path.startswith("/"):  # sent to us as a proxy
            hub.escapes.append(self.path)
            self.close_connection = True
            self.send(Request(self.command, "api", self.path), Refused(403, "No way out of a test").reply)
            return
        url = urlsplit(self.path)
        entry = Request(self.command, "api", url.path, range=self.headers.get("Range"))
        hub.log.append(entry)
        self.send(entry, self.reply_to(entry, parse_qs(url.query), body))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve  # noqa: N815

    def reply_to(self, entry: Request, query: dict[str, list[str]], body: bytes) -> Reply:
        hub = self.server.hub
        try:
            for route in self.server.routes:
                match = route.pattern.fullmatch(entry.path)
                if match and route.method == entry.method.replace("HEAD", "GET"):
                    break
            else:
                raise Refused(404, "Not Found")
            parts = {name: unquote(part) for name, part in match.groupdict().items()}
            entry.kind, entry.repo, entry.file = route.kind, parts.get("repo"), parts.get("path")
            call = Call(hub, entry, parts, query, self.headers, body)
            fault = hub.fault_for(entry)
            if fault:
                hub.closing.wait(fault.delay)
                if fault.drop:
                    raise ConnectionAbortedError
                if fault.status:
                    return fault.reply()
                if fault.lose_answer:
                    route.answer(call)
                    raise ConnectionAbortedError
            return route.answer(call)
        except Refused as refused:
            return refused.reply

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def send(self, entry: Request, reply: Reply) -> None:
        if isinstance(reply.body, Blob):
            self.send_file(entry, reply, reply.body)
        else:
            self.send_head(entry, reply.status, reply.headers, len(reply.body))
            if entry.method != "HEAD":
                self.wfile.write(reply.body)

    def send_head(self, entry: Request, status: int, headers: Mapping[str, str], length: int | None) -> None:
        entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_file(self, entry: Request, reply: Reply, blob: Blob) -> None:
        size = blob.content.size
        zipped = self.may_gzip(entry, blob)
        asked = None if zipped else self.asked_range(reply, size)
        span = asked or (0, size)
        fault = None if entry.method == "HEAD" else self.server.hub.fault_for(entry, body=True, span=span)
        fault = fault or NO_FAULT
        if fault.ignore_range:
            asked = None
        start, stop = asked or (0, size)
        headers, status = reply.headers, reply.status
        if asked:
            if start >= size:
                self.send(entry, Refused(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}").reply)
                return
            headers, status = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, 206
        blocks = file_blocks(blob.content, start, stop, fault.flip_byte)
        if zipped:
            headers = headers | {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            blocks = gzip_chunks(blocks)
        self.send_head(entry, status, headers, None if zipped else stop - start + fault.extra_length)
        if entry.method != "HEAD":
            self.send_blocks(entry, blocks, fault)

    def may_gzip(self, entry: Request, blob: Blob) -> bool:
        text = (entry.file or "").endswith(TEXT_SUFFIXES) and not blob.lfs and blob.content.size >= GZIP_BYTES
        return text and "gzip" in self.headers.get("Accept-Encoding", "")

    def asked_range(self, reply: Reply, size: int) -> tuple[int, int] | None:
        if self.headers.get("If-Range", reply.headers["ETag"]) != reply.headers["ETag"]:
            return None
        return byte_range(self.headers.get("Range", ""), size)

    def send_blocks(self, entry: Request, blocks: Iterable[memoryview], fault: Fault) -> None:
        left = fault.cut_after
        for block in blocks:
            if left is not None:
                block = block[:left]  # noqa: PLW2901
                left -= len(block)
            entry.nbytes += len(block)  # before sending: who has the bytes may read the log
            self.wfile.write(block)
            if left == 0:
                self.server.hub.closing.wait(fault.delay)
                break
        if left == 0 or fault.extra_length:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def byte_range(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header asks for; start >= size where there are none.

    None means all of them: object stores send the whole file for several ranges and for malformed ones.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


def file_blocks(content: Content, start: int, stop: int, flip_byte: int | None) -> Iterator[memoryview]:
    for offset in range(start, stop, BLOCK_BYTES):
        nbytes = min(BLOCK_BYTES, stop - offset)
        block = memoryview(content.read(offset, nbytes)).cast("B")
        assert len(block) == nbytes, "a Content must read what it is asked for"
        if flip_byte is not None and offset <= flip_byte < offset + nbytes:
            wrong = bytearray(block)
            wrong[flip_byte - offset] ^= 0xFF
            block = memoryview(wrong)
        yield block


def gzip_chunks(blocks: Iterable[memoryview]) -> Iterator[memoryview]:
    """The body in gzip and in HTTP's chunks, as one block: it is text, and small."""
    packed = gzip.compress(b"".join(blocks), mtime=0)
    yield memoryview(b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed))
