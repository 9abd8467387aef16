"""The keys that an engine requires, whoever sends it requests: set where the engine is started."""

from __future__ import annotations

import os

from ..errors import SigningError

#: Paths of public keys, as in PATH: one of them must have signed what a pointer folder names, and the heads
#: of streams.
KEYS_VARIABLE = "DELTAWEIGHTS_PUBLIC_KEYS"


def required_keys() -> list[str] | None:
    """The keys' paths; None: the variable is not set, so that no signature is required.

    Raises:
        SigningError: it is set and names none.
    """
    if (named := os.environ.get(KEYS_VARIABLE)) is None:
        return None
    if keys := [path for path in named.split(os.pathsep) if path]:
        return keys
    raise SigningError(
        f"{KEYS_VARIABLE} names no key",
        "It is set, so that signatures are required.",
        "Name the paths of public keys, or unset it.",
    )
