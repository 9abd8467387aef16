"""Signatures: who signed a delta, what exactly, and who has to have."""

from .signature import (
    ATTESTATION_NAME,
    SIGNATURE_NAME,
    UNSIGNED_NAMES,
    SignedFiles,
    manifest_sha256,
    open_bundle,
    require_signed,
    signed_files,
)
from .signers import Signer, signing_by
from .trust import SignatureRequirement, check_signer

__all__ = [
    "ATTESTATION_NAME",
    "SIGNATURE_NAME",
    "UNSIGNED_NAMES",
    "SignatureRequirement",
    "SignedFiles",
    "Signer",
    "check_signer",
    "manifest_sha256",
    "open_bundle",
    "require_signed",
    "signed_files",
    "signing_by",
]
