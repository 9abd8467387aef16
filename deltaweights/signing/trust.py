"""Who must have signed: a key, a certificate under a root, or an identity; and whether they have."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import SignatureError
from .bundle import SignatureBundle, bytes_in
from .extra import failures_explained
from .keys import KeyFile, key_id, load_public, read_pem, require_curve

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_FIX = "Ask whoever publishes it who signs it; do not use it until that is settled."


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """Whoever holds the private half of this key.

    Attributes:
        public_key: its PEM file: an ECDSA key of the curve P-256, P-384 or P-521.
    """

    public_key: KeyFile

    def check(self, bundle: SignatureBundle) -> str:
        """Who signed, in words.

        Raises:
            SignatureError: it was not this key.
        """
        key = load_public(self.public_key)
        require_curve(key, self.public_key)
        name = key_id(key)
        if bundle.hint != name:
            who = f"the key {bundle.hint[:16]}…" if bundle.hint else "no key alone"
            raise _refused(
                bundle, f"It was signed by {who}, not by the key {name[:16]}… of {self.public_key}"
            )
        with _refusals_explained(bundle):
            from model_signing._signing.sign_ec_key import Verifier

            _require_same(_verified(Verifier(Path(self.public_key).expanduser()), bundle), bundle)
        return f"key {name}"


@dataclass(frozen=True, slots=True)
class TrustedCertificates:
    """Whoever has a certificate for signing under one of these roots, valid now.

    There is no trusted time in such a signature, so nobody can tell whether it was made while an expired
    certificate was still valid: such a signature counts for nothing.

    Attributes:
        roots: PEM files of the roots' certificates, and of any between them and the signer's.

    Raises:
        ValueError: ``roots`` is empty, or a path instead of several.
    """

    roots: Sequence[KeyFile]

    def __post_init__(self) -> None:
        if isinstance(self.roots, (str, os.PathLike)) or not self.roots:
            raise ValueError(f"roots is {self.roots!r}, not a sequence of paths")

    def check(self, bundle: SignatureBundle) -> str:
        """Who signed, in words.

        Raises:
            SignatureError: it was no such certificate.
        """
        if not bundle.certificates:
            raise _refused(bundle, "It was not signed with a certificate")
        pem = b"\n".join(read_pem(path) for path in self.roots)
        with _refusals_explained(bundle):
            from model_signing._signing.sign_certificate import Verifier

            paths = [Path(path).expanduser() for path in self.roots]
            _require_same(_verified(Verifier(paths), bundle), bundle)
            leaf = _valid_now(bundle, pem)
        return f"certificate of {leaf.subject.rfc4514_string()}"


def _valid_now(bundle: SignatureBundle, pem: bytes) -> Certificate:
    """The signer's certificate. The library compares certificates with the time at which that one began, so
    that it takes expired ones; here they are compared with the present time."""
    from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificates
    from OpenSSL import crypto

    store = crypto.X509Store()
    for one in load_pem_x509_certificates(pem):
        store.add_cert(crypto.X509.from_cryptography(one))
    given = [load_der_x509_certificate(one) for one in bundle.certificates]
    _require_purpose(given[0], bundle)
    leaf, *others = [crypto.X509.from_cryptography(one) for one in given]
    chain = crypto.X509StoreContext(store, leaf, others).get_verified_chain()
    used = {one.to_cryptography() for one in chain}
    if not set(given) <= used:
        raise _refused(bundle, "It has a certificate that has nothing to do with the signer's")
    return given[0]


def _require_purpose(leaf: Certificate, bundle: SignatureBundle) -> None:
    """Refuse a certificate that is for something else, such as a web server, though its key may make
    signatures: where purposes are named, code signing has to be one (RFC 5280, section 4.2.1.12). The
    library does not ask for that."""
    from cryptography.x509 import ExtendedKeyUsage, ExtensionNotFound
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        purposes = leaf.extensions.get_extension_for_class(ExtendedKeyUsage).value
    except ExtensionNotFound:
        return
    if {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}.isdisjoint(purposes):
        raise _refused(bundle, "Its certificate is not for signing code or models")


@dataclass(frozen=True, slots=True)
class TrustedIdentity:
    """Who signed through Sigstore, as this identity, which this provider vouched for.

    Attributes:
        identity: such as ``name@example.com``.
        provider: the URL of the OpenID Connect issuer, such as ``https://accounts.google.com``.
        trust_config: a file with the servers and keys of another Sigstore than the public one. Without it,
            the public one's keys are fetched.
        staging: use the keys of Sigstore's servers for tests.

    Raises:
        ValueError: identity or provider is empty.
    """

    identity: str
    provider: str
    trust_config: KeyFile | None = None
    staging: bool = False

    def __post_init__(self) -> None:
        if not self.identity or not self.provider:  # the library takes any provider for an empty one
            raise ValueError(f"An identity and its provider are needed, not {(self.identity, self.provider)}")

    def check(self, bundle: SignatureBundle) -> str:
        """Who signed, in words.

        Raises:
            SignatureError: it was somebody else, or Sigstore's keys cannot be had.
        """
        if not bundle.is_keyless:
            raise _refused(bundle, "It was not signed through Sigstore")
        with _refusals_explained(bundle):
            from model_signing._signing.sign_sigstore import Signature, Verifier
            from sigstore.models import Bundle

            verifier = Verifier(
                identity=self.identity,
                oidc_issuer=self.provider,
                use_staging=self.staging,
                trust_config=Path(self.trust_config).expanduser() if self.trust_config else None,
            )
            signature = Signature(Bundle.from_json(_text_of(bundle.document)))
            _require_same(verifier._verify_signed_content(signature), bundle)
            _require_nothing_more(signature, bundle)
        return f"{self.identity}, by {self.provider}"


#: Who is trusted.
Trusted: TypeAlias = TrustedKey | TrustedCertificates | TrustedIdentity

#: Who must have signed: somebody who is trusted; the path of a public key; or several, of which one suffices.
SignatureRequirement: TypeAlias = (
    "Trusted | str | os.PathLike[str] | Sequence[Trusted | str | os.PathLike[str]]"
)


def check_signer(bundle: SignatureBundle, requirement: SignatureRequirement) -> str:
    """Who signed, in words.

    Raises:
        SignatureError: nobody of those who could have.
        SigningError: a key cannot be read, or a library is missing.
    """
    wanted = [requirement] if isinstance(requirement, (str, os.PathLike, *_KINDS)) else list(requirement)
    refused = SignatureError("Nobody is trusted", "The list of who must have signed is empty.", "Name a key.")
    for one in wanted:
        trusted = TrustedKey(one) if isinstance(one, (str, os.PathLike)) else one
        try:
            return trusted.check(bundle)
        except SignatureError as error:
            refused = error
    raise refused


_KINDS = (TrustedKey, TrustedCertificates, TrustedIdentity)


def _verified(verifier: Any, bundle: SignatureBundle) -> tuple[str, bytes]:
    """The type and the bytes of what was signed, as model-signing finds them."""
    from model_signing._signing.sign_sigstore_pb import Signature
    from sigstore_models.bundle.v1 import Bundle

    found: tuple[str, bytes] = verifier._verify_signed_content(Signature(Bundle.from_dict(bundle.document)))
    return found


def _require_same(found: tuple[str, bytes], bundle: SignatureBundle) -> None:
    """What was checked there is what is read here."""
    kind, payload = found
    if (kind, payload) != (bundle.document["dsseEnvelope"]["payloadType"], bundle.payload):
        raise _refused(bundle, "What it signs is not what it holds")


def _require_nothing_more(signature: Any, bundle: SignatureBundle) -> None:
    """The file has nothing that the library overlooks: neither in its fields, nor in the text that the log
    signed, of which the library reads the root's hash and looks for a signature."""
    if json.loads(signature.bundle.to_json()) != bundle.document:
        raise _refused(bundle, "It holds more than a signature")
    for entry in bundle.document["verificationMaterial"]["tlogEntries"]:
        proof = entry["inclusionProof"]
        note, _, marks = proof["checkpoint"]["envelope"].partition("\n\n")
        origin, size, *_ = note.split("\n")
        _, name, mark = marks.partition("\n")[0].split(" ")
        if (name, size) != (origin.partition(" ")[0], proof["treeSize"]):
            raise _refused(bundle, "The log's checkpoint is of another log, or of another state of it")
        bytes_in(mark, bundle.where)


def _text_of(document: dict[str, Any]) -> str:
    return json.dumps(document)


def _refusals_explained(bundle: SignatureBundle) -> Any:
    return failures_explained(f"{bundle.where} is not signed as it must be", _FIX, SignatureError)


def _refused(bundle: SignatureBundle, why: str) -> SignatureError:
    return SignatureError(f"{bundle.where} is not signed as it must be", f"{why}.", _FIX)
