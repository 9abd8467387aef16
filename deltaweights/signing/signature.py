"""A delta's signature, ``model.sig``: whether it is of this delta, and by whom."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..errors import SignatureError
from ..manifest import MANIFEST_NAME, Manifest
from ..storage import Source
from .bundle import MAX_BUNDLE_BYTES, SignatureBundle, read_bundle
from .statement import signed_digests
from .trust import SignatureRequirement, check_signer

#: The file that model-signing's own command line writes and reads, too.
SIGNATURE_NAME = "model.sig"

#: The attestation's file: a Sigstore bundle, too.
ATTESTATION_NAME = "attestation.sigstore.json"

#: What stands in a delta's folder and is no part of what is signed.
UNSIGNED_NAMES = frozenset({SIGNATURE_NAME, ATTESTATION_NAME})


@dataclass(frozen=True)
class SignedFiles:
    """What a signature says: who signed, in words, and the SHA-256 (hex) of each file, by its path."""

    where: str
    by: str
    digests: dict[str, str]

    def require(self, manifest: Manifest) -> None:
        """Check that the delta with this manifest is what was signed, as far as the manifest tells.

        Raises:
            SignatureError: it is another one.
        """
        own = {MANIFEST_NAME: manifest_sha256(manifest)}
        own |= {record.path: record.sha256 for record in manifest.files}
        for path, sha256 in own.items():
            signed = self.digests.get(path)
            if signed != sha256:
                found = f"the signed SHA-256 is {signed}" if signed else "which the signature does not cover"
                raise SignatureError(
                    f"{self.where} is not of this delta",
                    f"{path} has SHA-256 {sha256}; {found}.",
                    "Get the delta again, with its signature; whoever changed it has to sign it anew.",
                )


def manifest_sha256(manifest: Manifest) -> str:
    """The SHA-256 (hex) of the manifest's file: of one value, only one file is accepted."""
    return hashlib.sha256(manifest.to_json()).hexdigest()


def open_bundle(source: Source, name: str) -> SignatureBundle:
    """The signature file of that name in a delta.

    Raises:
        SignatureError: there is none, or it is damaged.
    """
    size = source.sizes.get(name)
    if size is None:
        raise SignatureError(
            f"{source.where} is not signed",
            f"It has no {name}.",
            "Ask whoever publishes it to sign it, or do not require a signature.",
        )
    where = source.name(name)
    if size > MAX_BUNDLE_BYTES:
        raise SignatureError(
            f"{where} is damaged", f"It has {size} bytes, more than a signature may have.", "Get it again."
        )
    return read_bundle(source.open(name).read(0, size), where)


def signed_files(source: Source, requirement: SignatureRequirement) -> SignedFiles:
    """Check the signature of the delta at ``source``, and return what it says. Reads no other file.

    Raises:
        SignatureError: there is none, it is damaged, or by somebody else.
        SigningError: a key cannot be read, or a library is missing.
    """
    bundle = open_bundle(source, SIGNATURE_NAME)
    by = check_signer(bundle, requirement)
    return SignedFiles(bundle.where, by, signed_digests(bundle.payload, bundle.where))


def require_signed(source: Source, manifest: Manifest, requirement: SignatureRequirement) -> str:
    """Check that the delta at ``source``, with this manifest, is signed as it must be. Returns by whom.

    Raises:
        SignatureError: it is not.
        SigningError: a key cannot be read, or a library is missing.
    """
    found = signed_files(source, requirement)
    found.require(manifest)
    return found.by
