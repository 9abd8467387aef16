"""Canonical JSON: what a delta, a distributed checkpoint and a weight stream say of themselves.

UTF-8, keys sorted, no white space, one line feed at the end: a value has one text, and a text one value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from .errors import DeltaWeightsError, FormatVersionError

Value = TypeVar("Value")


class Format(NamedTuple):
    """A format of documents: its name and version in them, what messages call one, and how many bytes one may
    have."""

    name: str
    version: int
    what: str
    most_bytes: int


class _Version(msgspec.Struct):
    format: str
    format_version: int


def encode(value: object) -> bytes:
    """The value as canonical JSON."""
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
    """The value whose canonical JSON ``data`` is.

    Args:
        kind: its type: a dataclass with the fields ``format`` and ``format_version``.
        damaged: makes the error to raise where ``data`` is anything else.
        encode: the inverse, where that is more than :func:`encode` (it fills in a checksum, say).

    Raises:
        FormatVersionError: the format version is not known here.
    """
    if len(data) > format.most_bytes:
        raise damaged(f"It has {len(data)} bytes, more than any of its kind")
    try:
        version = msgspec.json.decode(data, type=_Version)
        if version.format != format.name:
            raise damaged(f"Its format is {version.format[:100]!r}")
        if version.format_version != format.version:
            raise FormatVersionError(
                f"{format.what} has format version {version.format_version}",
                f"This version of deltaweights reads version {format.version}.",
                "Use a newer version of deltaweights.",
            )
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(f"{error}") from error
    if encode(value) != data:
        raise damaged("Its JSON is not in canonical form, or its checksum is wrong")
    return value
