"""The keys that an engine requires, whoever sends it requests: set where the engine is started."""

from __future__ import annotations

import os

#: Paths of public keys, as in PATH: one of them must have signed what a pointer folder names, and the heads
#: of streams.
KEYS_VARIABLE = "DELTAWEIGHTS_PUBLIC_KEYS"


def required_keys() -> list[str] | None:
    """The keys' paths; None: no signature is required."""
    return [path for path in os.environ.get(KEYS_VARIABLE, "").split(os.pathsep) if path] or None
