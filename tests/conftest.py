"""Fixtures that several test modules share."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from deltaweights import make_delta

from .checkpoints import write_pair
from .hub_server import HubServer

settings.register_profile(
    "deltaweights",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deltaweights")

#: Small, so that small tensors have several chunks.
CHUNK_BYTES = 1 << 16


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
