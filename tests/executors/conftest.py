"""A real Ray cluster on loopback: a head that works on nothing, and two nodes of one core each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from ..s3_server import S3Server

#: What lets the nodes reach the S3 of the tests.
_store_env: dict[str, str] = {}


@pytest.fixture(scope="session")
def cluster(_s3_server: S3Server) -> Iterator[Any]:
    """A ``ray.cluster_utils.Cluster``. Its nodes reach the S3 of the tests."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray asks which of this machine's addresses the internet would see; here, all is on loopback.
        patch.setattr("ray._private.services.node_ip_address_from_perspective", lambda *_: "127.0.0.1")
        from ray.cluster_utils import Cluster

        for is_last in (False, False, True):  # a node gives up if its helpers are not there after 15 seconds
            found = Cluster()
            _store_env.update(_s3_server.env)
            try:
                found.add_node(num_cpus=0, include_dashboard=False, node_ip_address="127.0.0.1")
                for _ in range(2):
                    add_node(found)
                break
            except Exception:
                found.shutdown()  # type: ignore[no-untyped-call]
                if is_last:
                    raise
        yield found
        ray.shutdown()  # what a failed test left open
        found.shutdown()  # type: ignore[no-untyped-call]


def add_node(cluster: Any) -> Any:
    """Another node of one core."""
    env = os.environ | _store_env
    return cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=env)
