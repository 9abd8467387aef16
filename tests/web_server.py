"""A web server on loopback that serves a folder as many do: lists, ranges, and ETags that If-Match heeds."""

from __future__ import annotations

import hashlib
import html
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit


class WebServer:
    """Serves ``root`` from ``with`` to the end of it.

    Attributes:
        url: of the root.
        log: method, path with query, and status of each request.
        ranges: whether it serves ranges.
        moved: where files are now, by path: a request is sent on to there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[str, str, int]] = []
        self.ranges = True
        self.moved: dict[str, str] = {}
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                ours.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        name = unquote(urlsplit(handler.path).path).lstrip("/")
        if name in self.moved:
            status, body, headers = 302, b"", {"Location": self.moved[name]}
        else:
            status, body, headers = self._of(self.root / name, dict(handler.headers))
        self.log.append((handler.command, handler.path, status))
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    def _of(self, path: Path, asked: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if path.is_dir():
            names = sorted(f"{inner.name}/" if inner.is_dir() else inner.name for inner in path.iterdir())
            lines = (f'<a href="{quote(name)}">{html.escape(name)}</a>' for name in names)
            return 200, "\n".join(lines).encode(), {"Content-Type": "text/html"}
        if not path.is_file():
            return 404, b"", {}
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        if asked.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return 412, b"", {}
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.get("Range", ""))
        if not bounds or not self.ranges:
            return 200, data, headers
        start, end = int(bounds[1]), min(int(bounds[2]) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return 206, data[start:end], headers
