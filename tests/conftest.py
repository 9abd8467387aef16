"""Fixtures that several test modules share."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from deltaweights import make_delta
from deltaweights.storage import hub_client

from .checkpoints import bf16, contents, weights, write_pair, write_safetensors
from .hub_server import HubServer
from .s3_server import S3Server

MISSING = [name for name in ("accelerate", "torch", "transformers") if not importlib.util.find_spec(name)]
if MISSING:
    collect_ignore = ["torch", *(["engines"] if "torch" in MISSING else [])]
if not importlib.util.find_spec("model_signing"):
    collect_ignore = [*globals().get("collect_ignore", ()), "signing"]

settings.register_profile(
    "deltaweights",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
#: Examples that no run saw before, and more of them: `make test-random`.
settings.register_profile(
    "random",
    settings.get_profile("deltaweights"),
    derandomize=False,
    database=None,
    max_examples=500,
    print_blob=True,
)
settings.load_profile("deltaweights")

#: Small, so that small tensors have several chunks.
CHUNK_BYTES = 1 << 16


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"tests/torch was left out: there is no {', '.join(MISSING)}.")


#: What Python has on Linux and not, or not everywhere, on other systems.
LINUX_ONLY = (
    "copy_file_range", "eventfd", "fdatasync", "getrandom", "memfd_create", "pidfd_open", "posix_fadvise",
    "posix_fallocate", "preadv", "pwritev", "sched_getaffinity", "sched_setaffinity", "sendfile", "setns",
    "splice", "sync", "timerfd_create", "unshare", "getxattr", "setxattr", "listxattr",
    "O_DIRECT", "O_LARGEFILE", "O_NOATIME", "O_PATH", "O_RSYNC", "O_TMPFILE",
)  # fmt: skip


#: A run in the background ignores Ctrl-C, and would hand that down to what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Trio(NamedTuple):
    """A base, a target and the delta between them, as folders."""

    base: Path
    target: Path
    delta: Path


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A pair with every status, and its delta. Shared: copy what you change."""
    folder = tmp_path_factory.mktemp("trio")
    base, target = write_pair(folder)
    make_delta(base, target, folder / "delta", chunk_bytes=CHUNK_BYTES)
    return Trio(base, target, folder / "delta")


@pytest.fixture(autouse=True, scope="session")
def _only_loopback() -> Iterator[None]:
    """No test reaches the network: no name is looked up and no connection is made, except on loopback."""
    look_up, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex

    def check(host: object) -> None:
        assert host in (None, "localhost", "127.0.0.1", "::1"), f"a test tried to reach {host}"

    def checked_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return look_up(host, *args, **kwargs)

    def checked_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])
        connect(self, address)

    def checked_connect_ex(self: socket.socket, address: Any) -> int:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", checked_look_up)
        patch.setattr(socket.socket, "connect", checked_connect)
        patch.setattr(socket.socket, "connect_ex", checked_connect_ex)
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback, which is the Hub for this process, and with `env=hub.env` for a child process.

    The cache is empty, there is no token, and Xet is off.
    """
    from huggingface_hub import close_session

    # huggingface_hub uploads in a way that its own HTTP library advises against.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # until the end of the test
    with HubServer() as server:
        server.env = server.client_env(tmp_path / "hf-home")
        _point_client_at(server, monkeypatch)
        close_session()
        yield server
        close_session()
    assert not server.errors, server.errors
    assert not server.escapes, f"requests for other hosts: {server.escapes}"


def _point_client_at(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does for this process what the environment does for a new one.

    huggingface_hub reads the environment when it is imported, and its modules copy each other's constants. So
    work the constants out again under the new environment and replace each one wherever it is.
    """
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    env = {name: value for name, value in server.env.items() if name != "ALL_PROXY"}  # each costs TLS set-up
    for name in os.environ.keys() | env.keys():
        if name not in env:
            monkeypatch.delenv(name)
        elif os.environ.get(name) != env[name]:
            monkeypatch.setenv(name, env[name])
    old = {name: value for name, value in vars(huggingface_hub.constants).items() if name.isupper()}
    spec = importlib.util.spec_from_file_location("fresh_constants", huggingface_hub.constants.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub.")]:
        for name in old.keys() & vars(module).keys():
            if vars(module)[name] == old[name] != vars(fresh)[name]:
                monkeypatch.setattr(module, name, vars(fresh)[name])
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    if agents := sys.modules.get("huggingface_hub.utils._detect_agent"):  # asks the Hub once in a process
        monkeypatch.setattr(agents, "_registry", {"standardEnvVars": [], "harnesses": {}})
    assert server.endpoint == huggingface_hub.constants.ENDPOINT


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """huggingface_hub tries again at once; returns the seconds that it would have slept, as they come."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    naps: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": naps.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return naps


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own attempts follow each other at once."""
    monkeypatch.setattr(hub_client, "RETRY_DELAYS", tuple(0.0 for _ in hub_client.RETRY_DELAYS))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A pair of about 6 MB, sharded differently and in another order, in which some tensors need no base."""
    folder = tmp_path_factory.mktemp("large")
    old = {f"layer.{k}": weights((300, 1000), k) for k in range(9)}
    new = {name: value + weights(value.shape, 100 + k, 1e-4) for k, (name, value) in enumerate(old.items())}
    new["layer.3"] = old["layer.3"]
    new["layer.7"] = weights((300, 1000), 99)  # trained anew: coded without the base
    del new["layer.5"]
    new["added"] = weights((100, 1000), 98)
    names, others = list(old), list(new)[::-1]
    for k in range(3):
        shard = {name: bf16(old[name]) for name in names[3 * k : 3 * k + 3]}
        write_safetensors(folder / "base" / f"model-0000{k + 1}-of-00003.safetensors", shard)
    for k in range(2):
        shard = {name: bf16(new[name]) for name in others[k::2]}
        write_safetensors(folder / "target" / f"model-0000{k + 1}-of-00002.safetensors", shard)
    for side in ("base", "target"):
        (folder / side / "config.json").write_text("{}")
    (folder / "target" / "tokenizer.bin").write_bytes(np.random.default_rng(0).bytes(200_000))
    make_delta(folder / "base", folder / "target", folder / "delta", chunk_bytes=CHUNK_BYTES)
    return Trio(folder / "base", folder / "target", folder / "delta")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the delta on the shelf: made once, since commits of the same files have the same ids."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def shelf(hub: HubServer, large: Trio, made: Path) -> HubServer:
    """The Hub with org/base, org/target and, made from these two, org/delta."""
    hub.add_repo("org/base", contents(large.base))
    hub.add_repo("org/target", contents(large.target))
    if not any(made.iterdir()):
        make_delta("org/base", "org/target", made, chunk_bytes=CHUNK_BYTES)
    hub.add_repo("org/delta", contents(made))
    hub.log.clear()
    return hub


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, without what only Linux has."""
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    for package in ("moto", "flask_cors", "s3fs"):
        pytest.importorskip(package)
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 on loopback with one empty bucket, which is the S3 for this process. Its clients do not try again
    by themselves."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name, value in _s3_server.env.items():
        monkeypatch.setenv(name, value)
    _s3_server.empty()
    return _s3_server


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    import fsspec  # type: ignore[import-untyped]

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
