"""Signature files: Sigstore bundles (version 0.3) around a DSSE envelope, read so that every bit counts.

The library that checks the signature ignores much of such a file. Here each byte is either signed, or has
only one value that is accepted. So a changed file is found, whichever bit it was.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from ..errors import SignatureError

#: About 200 bytes for each file of a delta; a real one has some kB.
MAX_BUNDLE_BYTES = 1 << 23

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"

#: How programs write JSON; of one value, each style gives one text.
_STYLES: tuple[dict[str, Any], ...] = ({"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4})


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of the file that has no other fields than these."""


class _KeyHint(_Strict, frozen=True):
    hint: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Certificate(_Strict, frozen=True):
    rawBytes: str  # noqa: N815


class _Chain(_Strict, frozen=True):
    certificates: Annotated[tuple[_Certificate, ...], msgspec.Meta(min_length=1, max_length=16)]


class _Material(_Strict, frozen=True):
    tlogEntries: list[Any]  # noqa: N815
    publicKey: _KeyHint | None = None  # noqa: N815
    x509CertificateChain: _Chain | None = None  # noqa: N815
    certificate: _Certificate | None = None
    timestampVerificationData: Any = None  # noqa: N815


class _Signature(_Strict, frozen=True):
    sig: str
    keyid: Literal[""] = ""


class _Envelope(_Strict, frozen=True):
    payload: str
    payloadType: str  # noqa: N815
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(min_length=1, max_length=1)]


class _Document(_Strict, frozen=True):
    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]  # noqa: N815
    verificationMaterial: _Material  # noqa: N815
    dsseEnvelope: _Envelope  # noqa: N815


@dataclass(frozen=True, slots=True)
class SignatureBundle:
    """A signature file.

    Attributes:
        where: its name in messages.
        document: its JSON.
        payload: what was signed: an in-toto statement, in JSON.
        hint: the :func:`key_id` of the key that signed, if it was signed by a key alone.
        certificates: the signer's certificate (DER), and those up to a root, if it was signed so.
        is_keyless: whether it was signed through Sigstore.
    """

    where: str
    document: dict[str, Any]
    payload: bytes
    hint: str | None
    certificates: tuple[bytes, ...]
    is_keyless: bool


def read_bundle(data: bytes, where: str) -> SignatureBundle:
    """Read a signature file. Nothing is checked yet by its signature.

    Args:
        where: its name in messages.

    Raises:
        SignatureError: it is damaged, or of another kind.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise damaged(where, f"It has {len(data)} bytes, more than a signature may have")
    try:
        text = data.decode()
        raw = json.loads(text)
        if not any(json.dumps(raw, ensure_ascii=False, **style) == text for style in _STYLES):
            raise damaged(where, "Its JSON is not as programs write it")
        document = msgspec.convert(raw, _Document)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and those of the decoders, are ones
        raise damaged(where, f"{str(error)[:500]}") from error
    envelope, material = document.dsseEnvelope, document.verificationMaterial
    if envelope.payloadType != _PAYLOAD_TYPE:
        raise damaged(
            where, f"Its payload is of the type {envelope.payloadType[:100]!r}, not {_PAYLOAD_TYPE!r}"
        )
    found = [
        one is not None for one in (material.publicKey, material.x509CertificateChain, material.certificate)
    ]
    if sum(found) != 1:
        raise damaged(where, "It does not say in one way who signed")
    is_keyless = material.certificate is not None
    if not is_keyless and (
        material.tlogEntries or "timestampVerificationData" in raw["verificationMaterial"]
    ):
        raise damaged(where, "It has entries of a log that its kind does not have")
    bytes_in(envelope.signatures[0].sig, where)
    chain = material.x509CertificateChain
    return SignatureBundle(
        where,
        raw,
        bytes_in(envelope.payload, where),
        material.publicKey.hint if material.publicKey else None,
        tuple(bytes_in(one.rawBytes, where) for one in chain.certificates) if chain else (),
        is_keyless,
    )


def bytes_in(text: str, where: str) -> bytes:
    """The bytes of base64 text. Of the texts that decoders take for the same bytes, one counts."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise damaged(where, f"{error}") from error
    if base64.b64encode(data).decode() != text:
        raise damaged(where, "Its base64 is not as encoders write it")
    return data


def damaged(where: str, why: str) -> SignatureError:
    """The error for a signature file that is no signature."""
    return SignatureError(f"{where} is damaged", f"{why}.", "Get the delta again, with its signature.")
