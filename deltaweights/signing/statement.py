"""What a signature says of a folder: each file's SHA-256, in model-signing's in-toto statement."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec

from ..manifest import Sha256
from .bundle import damaged
from .extra import signing_libraries

#: What model-signing leaves out of a signature by itself: what belongs to Git.
GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")


class _Resource(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    algorithm: Literal["sha256"]
    digest: Sha256


class _Serialization(msgspec.Struct, frozen=True):
    method: Literal["files"]
    hash_type: Literal["sha256"]


class _Predicate(msgspec.Struct, frozen=True):
    resources: tuple[_Resource, ...]
    serialization: _Serialization


class _Digests(msgspec.Struct, frozen=True):
    sha256: Sha256


class _Subject(msgspec.Struct, frozen=True):
    digest: _Digests


class _Statement(msgspec.Struct, frozen=True):
    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    predicateType: Literal["https://model_signing/signature/v1.0"]  # noqa: N815
    subject: Annotated[tuple[_Subject, ...], msgspec.Meta(min_length=1, max_length=1)]
    predicate: _Predicate


def folder_statement(name: str, digests: Mapping[str, str], ignored: Iterable[str]) -> Any:
    """The statement about a folder, as model-signing makes it.

    Args:
        name: the folder's, for people.
        digests: the SHA-256 (hex) of each file that is signed, by its relative path.
        ignored: relative paths of what is not signed, whether it is there or not, besides :data:`GIT_PATHS`.

    Returns:
        A statement of ``in_toto_attestation``.
    """
    with signing_libraries():
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest
        from model_signing._signing.signing import Payload
    serialization = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": sorted({*GIT_PATHS, *ignored}),
        }
    )
    items = [
        serialization.new_item(path, Digest("sha256", bytes.fromhex(sha256)))
        for path, sha256 in digests.items()
    ]
    return Payload(manifest.Manifest(name, items, serialization)).statement


def signed_digests(payload: bytes, where: str) -> dict[str, str]:
    """The SHA-256 (hex) of each file that a statement names, by its relative path.

    Args:
        payload: its JSON.
        where: the signature's name in messages.

    Raises:
        SignatureError: it is no such statement.
    """
    try:
        statement = msgspec.json.decode(payload, type=_Statement)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(where, f"What it signs is no list of SHA-256: {error}") from error
    resources = statement.predicate.resources
    found = {one.name: one.digest for one in resources}
    if len(found) != len(resources):
        raise damaged(where, "It names a file twice")
    whole = hashlib.sha256(b"".join(bytes.fromhex(one.digest) for one in resources)).hexdigest()
    if whole != statement.subject[0].digest.sha256:
        raise damaged(where, "Its digest of the folder is not that of its files")
    return found
