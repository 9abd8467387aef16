"""Canonical JSON, for the documents of deltas, distributed checkpoints and weight streams.

It is UTF-8 with sorted keys, no white space, and one line feed at the end, so each value has exactly one
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from .errors import DeltaWeightsError, FormatVersionError

Value = TypeVar("Value")


class Format(NamedTuple):
    """A format of documents: its name and newest version, the word for a document in messages (``what``), the
    most bytes that a document may have, and the oldest version that is read, if it is another one."""

    name: str
    version: int
    what: str
    most_bytes: int
    oldest: int | None = None

    @property
    def readable(self) -> range:
        """The versions that are read."""
        return range(self.version if self.oldest is None else self.oldest, self.version + 1)


class _Version(msgspec.Struct):
    format: str
    format_version: int


def encode(value: object) -> bytes:
    """Encode a value as canonical JSON."""
    return msgspec.json.encode(value, order="sorted") + b"\n"


def digest(value: object) -> str:
    """SHA-256 of the value's canonical JSON, in hex."""
    return hashlib.sha256(encode(value)).hexdigest()


def decode(
    data: bytes,
    kind: type[Value],
    format: Format,
    damaged: Callable[[str], DeltaWeightsError],
    encode: Callable[[Value], bytes] = encode,
) -> Value:
    """Decode the value that has the canonical JSON ``data``.

    Args:
        kind: its type: a dataclass with the fields ``format`` and ``format_version``.
        damaged: makes the error to raise if ``data`` is anything else.
        encode: the inverse, if that does more than :func:`encode` (such as filling in a checksum).

    Raises:
        FormatVersionError: this version of deltaweights does not know the format version.
    """
    if len(data) > format.most_bytes:
        raise damaged(f"It has {len(data)} bytes, more than such a document may have")
    try:
        version = msgspec.json.decode(data, type=_Version)
        if version.format != format.name:
            raise damaged(f"Its format is {version.format[:100]!r}")
        if version.format_version not in format.readable:
            known = " to ".join(map(str, sorted({format.readable[0], format.version})))
            raise FormatVersionError(
                f"{format.what} has format version {version.format_version}",
                f"This version of deltaweights reads version {known}.",
                "Use a newer version of deltaweights.",
            )
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(f"{error}") from error
    if encode(value) != data:
        raise damaged("Its JSON is not in canonical form, or its checksum is wrong")
    return value
