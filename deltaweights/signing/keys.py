"""Key pairs in PEM files, and signatures of bytes by them.

What is signed is the bytes and what they are for, in DSSE's encoding (``PAE`` in the DSSE protocol, version
1.0.0), so that a signature for one purpose never holds for another one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import SigningError
from .extra import failures_explained, signing_libraries

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    PrivateKey: TypeAlias = EllipticCurvePrivateKey | Ed25519PrivateKey
    PublicKey: TypeAlias = EllipticCurvePublicKey | Ed25519PublicKey

#: A key in a file.
KeyFile: TypeAlias = "str | os.PathLike[str]"

_MAX_PEM_BYTES = 1 << 16

#: The NIST curves that model-signing takes, too, and the hash that goes with each.
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_KINDS = "It must be one of the curves P-256, P-384 and P-521, or Ed25519 for weight streams."


def read_pem(path: KeyFile) -> bytes:
    """The bytes of a small file with a key or certificates.

    Raises:
        SigningError: it cannot be read, or is no such file by its size.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MAX_PEM_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SigningError(f"Cannot read {os.fspath(path)}", f"{why}.", "Check the path.") from error
    if len(data) > _MAX_PEM_BYTES:
        raise SigningError(
            f"{os.fspath(path)} is no key and no certificate",
            f"It has more than {_MAX_PEM_BYTES} bytes.",
            "Pass a PEM file.",
        )
    return data


def load_private(path: KeyFile, password: str | None = None) -> PrivateKey:
    """The private key in a PEM file.

    Raises:
        SigningError: there is none, it is encrypted with another password, or of a kind that is not used.
    """
    data = read_pem(path)
    with signing_libraries():
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        key = load_pem_private_key(data, password.encode() if password is not None else None)
    except Exception as error:  # of several types
        raise SigningError(
            f"{os.fspath(path)} is no private key that can be read",
            f"{error}.".replace("..", "."),
            "Pass a PEM file, and its password if it is encrypted.",
        ) from error
    return _of_known_kind(key, path)  # type: ignore[return-value]


def load_public(path: KeyFile) -> PublicKey:
    """The public key in a PEM file.

    Raises:
        SigningError: there is none, or it is of a kind that is not used.
    """
    data = read_pem(path)
    with failures_explained(f"{os.fspath(path)} is no public key", "Pass a PEM file."):
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        key = load_pem_public_key(data)
    return _of_known_kind(key, path)  # type: ignore[return-value]


def _of_known_kind(key: object, path: KeyFile) -> object:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES and "Ed25519" not in type(key).__name__:
        kind = f"It is of the curve {curve}." if curve else f"It is a {type(key).__name__.strip('_')}."
        raise SigningError(f"{os.fspath(path)} is a key that is not used here", kind, _KINDS)
    return key


def require_curve(key: PrivateKey | PublicKey, path: KeyFile) -> None:
    """Raise :class:`SigningError` for a key that model-signing does not take."""
    if getattr(key, "curve", None) is None:
        raise SigningError(
            f"{os.fspath(path)} is a key that cannot sign deltas",
            "It is an Ed25519 key; model-signing takes ECDSA keys.",
            "Make one of the curve P-256, P-384 or P-521; Ed25519 is for weight streams.",
        )


def key_id(key: PublicKey) -> str:
    """SHA-256 (hex) of the public key's PEM file as OpenSSL writes it: what model-signing calls its hint."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pae(kind: str, body: bytes) -> bytes:
    """What a signature of ``body``, which is of the type ``kind``, is a signature of."""
    return b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(body), body)


def sign_bytes(key: PrivateKey, kind: str, body: bytes) -> bytes:
    """Sign ``body`` as being of the type ``kind``: Ed25519, or ECDSA in DER."""
    if (curve := getattr(key, "curve", None)) is None:
        return key.sign(pae(kind, body))  # type: ignore[call-arg]
    return key.sign(pae(kind, body), _ecdsa(curve.name))  # type: ignore[call-arg]


def is_signed(key: PublicKey, signature: bytes, kind: str, body: bytes) -> bool:
    """Whether ``signature`` is one of ``body``, as being of the type ``kind``, by the key's private half."""
    from cryptography.exceptions import InvalidSignature

    try:
        if (curve := getattr(key, "curve", None)) is None:
            key.verify(signature, pae(kind, body))  # type: ignore[call-arg]
        else:
            key.verify(signature, pae(kind, body), _ecdsa(curve.name))  # type: ignore[call-arg]
    except InvalidSignature:
        return False
    return True


def _ecdsa(curve: str) -> ECDSA:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(getattr(hashes, _CURVES[curve])())
