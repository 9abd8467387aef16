"""The command line, as ``python -m tests.executors.driver``, on a cluster that is all on loopback."""

from __future__ import annotations

from ray._private import services

from deltaweights.__main__ import main

if __name__ == "__main__":
    setattr(services, "node_ip_address_from_perspective", lambda *_: "127.0.0.1")  # noqa: B010
    main()
