"""An S3 on loopback, for tests and benchmarks: moto's, with faults and a log of what was asked for.

with S3Server() as s3:
    s3.system.pipe_file("bucket/model/config.json", b"{}")
    s3.fail("model.safetensors", status=503, times=2)
    ...  # any client with the environment s3.env
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BUCKET = "bucket"

#: What S3 says with a status.
_CODES = {
    301: "PermanentRedirect", 400: "ExpiredToken", 403: "AccessDenied", 412: "PreconditionFailed",
    500: "InternalError", 503: "SlowDown",
}  # fmt: skip


@dataclass
class Request:
    """One line of the log. ``nbytes`` counts the body of the answer, as far as it was sent."""

    method: str
    path: str
    query: str
    payer: str = ""
    status: str = ""
    nbytes: int = 0


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests (None: with all) that it is for."""

    path: str
    method: str | None
    times: int | None
    query: str = ""
    status: int | None = None
    cut_after: int | None = None
    #: Only for requests that do not say that who asks will pay.
    unpaid: bool = False
    #: The connection ends instead of an answer.
    drop: bool = False
    #: Called before such a request is answered.
    call: Callable[[], object] | None = None

    def is_for(self, request: Request) -> bool:
        return (
            self.times != 0
            and request.path.endswith(self.path)
            and self.method in (None, request.method)
            and self.query in request.query
            and not (self.unpaid and request.payer == "requester")
        )


class S3Server:
    """Listens from ``with`` to the end of it. Its bucket is ``bucket``."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.log: list[Request] = []
        self._faults: list[Fault] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.env = {
            "AWS_ACCESS_KEY_ID": "key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def empty(self) -> None:
        """One empty bucket, no faults, an empty log."""
        from moto.s3.models import s3_backends

        for account in s3_backends.values():
            for backend in account.values():
                backend.reset()
        self._faults.clear()
        self.system.call_s3("create_bucket", Bucket=BUCKET)
        self.log.clear()

    @cached_property
    def system(self) -> Any:
        """A client of its own, which shares no cache with the one that is tested."""
        import s3fs

        return s3fs.S3FileSystem(
            key="a",
            secret="b",  # noqa: S106
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def fail(self, path: str, *, method: str | None = None, times: int | None = 1, **what: Any) -> None:
        """Let something go wrong with requests for paths that end so."""
        self._faults.append(Fault(path, method, times, **what))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def bytes_sent(self, path: str = "") -> int:
        """The bytes in answers to GETs of files whose path ends so."""
        return sum(r.nbytes for r in self.log if r.method == "GET" and r.path.endswith(path))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ.get("QUERY_STRING", ""),
            environ.get("HTTP_X_AMZ_REQUEST_PAYER", ""),
        )
        self.log.append(request)
        fault = next((fault for fault in self._faults if fault.is_for(request)), None)
        if fault and fault.times:
            fault.times -= 1
        if fault and fault.call:
            fault.call()
        if fault and fault.drop:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if fault and fault.status:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            request.status = str(fault.status)
            body = f"<Error><Code>{_CODES[fault.status]}</Code><Message>no</Message></Error>".encode()
            start_response(f"{fault.status} no", [("Content-Type", "application/xml")])
            return [body]

        def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            request.status = status
            return start_response(status, headers, *rest)

        return self._sent(request, self._app(environ, started), fault.cut_after if fault else None)

    def _sent(self, request: Request, body: Iterable[bytes], cut_after: int | None) -> Iterator[bytes]:
        for piece in body:
            part = piece if cut_after is None else piece[: max(0, cut_after - request.nbytes)]
            request.nbytes += len(part)
            yield part
            if len(part) < len(piece):
                raise ConnectionAbortedError
