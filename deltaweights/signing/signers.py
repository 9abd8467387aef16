"""Who signs: a key, a certificate, a key in a token (PKCS #11), or an identity, through Sigstore.

OpenSSF's model-signing makes the signatures, each a Sigstore bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

from ..errors import SigningError
from .extra import failures_explained
from .keys import KeyFile, load_private, read_pem, require_curve


@dataclass(frozen=True, slots=True)
class KeySigner:
    """Sign with a private key: an ECDSA key of the curve P-256, P-384 or P-521.

    Attributes:
        private_key: its PEM file.
        password: what the file is encrypted with, if it is.
    """

    private_key: KeyFile
    password: str | None = field(default=None, repr=False)

    def configure(self, config: Any) -> None:
        """Let model-signing sign so."""
        require_curve(load_private(self.private_key, self.password), self.private_key)
        # The library says text, and hands it on to one that takes bytes.
        password = None if self.password is None else self.password.encode()
        config.use_elliptic_key_signer(private_key=Path(self.private_key).expanduser(), password=password)


@dataclass(frozen=True, slots=True)
class CertificateSigner:
    """Sign with a private key that has a certificate.

    Attributes:
        private_key: the key's PEM file, not encrypted.
        certificate: the PEM file of the key's certificate, which must allow digital signatures.
        chain: PEM files of the certificates between that one and the root, and the root.
    """

    private_key: KeyFile
    certificate: KeyFile
    chain: Sequence[KeyFile] = ()

    def configure(self, config: Any) -> None:
        """Let model-signing sign so."""
        require_curve(load_private(self.private_key), self.private_key)
        config.use_certificate_signer(
            private_key=Path(self.private_key).expanduser(),
            signing_certificate=Path(self.certificate).expanduser(),
            certificate_chain=_required(self.chain),
        )


@dataclass(frozen=True, slots=True)
class Pkcs11Signer:
    """Sign with a private key that never leaves its token, such as a smart card. Needs PyKCS11.

    Attributes:
        uri: the key's PKCS #11 URI (RFC 7512), with ``module-path`` or ``module-name``. May hold a PIN.
        certificate: the PEM file of the key's certificate, if it has one.
        chain: as for :class:`CertificateSigner`.
    """

    uri: str = field(repr=False)
    certificate: KeyFile | None = None
    chain: Sequence[KeyFile] = ()

    def configure(self, config: Any) -> None:
        """Let model-signing sign so."""
        if not self.uri.startswith("pkcs11:"):  # the library's message would show it, with its PIN
            raise SigningError("The token's URI is none", "It does not begin with pkcs11:.", "See RFC 7512.")
        try:
            config.use_pkcs11_signer(pkcs11_uri=self.uri)
        except RuntimeError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            raise SigningError(
                "Keys in tokens need a library that is not installed",
                f"{error.__cause__}.",
                "Install it: pip install PyKCS11.",
            ) from error
        if self.certificate is not None:
            try:
                self._certify(config._signer, self.certificate)
            except BaseException:
                _log_out(config._signer)
                raise

    def _certify(self, signer: Any, certificate: KeyFile) -> None:
        """Let the signature say so by a certificate: the library's own class for that (1.1.1) fails when it
        writes the certificates down."""
        from cryptography.x509 import load_pem_x509_certificate, load_pem_x509_certificates
        from model_signing._signing.sign_certificate import Signer

        own = load_pem_x509_certificate(read_pem(certificate))
        if own.public_key() != signer.public_key():
            raise SigningError(
                "The certificate is not the key's", f"{certificate} has another key.", "Pass the key's own."
            )
        _required(self.chain)
        others = load_pem_x509_certificates(b"\n".join(read_pem(path) for path in self.chain))
        facts: Any = SimpleNamespace(_signing_certificate=own, _trust_chain=others)
        material = Signer._get_verification_material(facts)
        signer._get_verification_material = lambda: material


@dataclass(frozen=True, slots=True)
class SigstoreSigner:
    """Sign as an identity (an e-mail address, a workflow), without keys, through Sigstore, whose servers have
    to be reached. The signature is entered in its public log, with the identity.

    Attributes:
        identity_token: an OpenID Connect token; None: one of the environment, or else a browser asks for it.
        ambient: look for a token in the environment, as CI systems have it.
        trust_config: a file with the servers and keys of another Sigstore than the public one.
        staging: use Sigstore's servers for tests.
    """

    identity_token: str | None = field(default=None, repr=False)
    ambient: bool = False
    trust_config: KeyFile | None = None
    staging: bool = False

    def configure(self, config: Any) -> None:
        """Let model-signing sign so."""
        config.use_sigstore_signer(
            identity_token=self.identity_token,
            use_ambient_credentials=self.ambient,
            use_staging=self.staging,
            trust_config=Path(self.trust_config).expanduser() if self.trust_config else None,
        )


#: Who signs.
Signer: TypeAlias = KeySigner | CertificateSigner | Pkcs11Signer | SigstoreSigner

_WHAT, _FIX = (
    "The signature could not be made",
    "Check key, certificates and password; keyless signing needs Sigstore's servers.",
)


def _required(paths: Sequence[KeyFile]) -> list[Path]:
    if not paths:
        raise SigningError(
            "The certificate's chain is missing",
            "Who checks the signature needs the certificates up to the root.",
            "Pass the chain: at least the root's certificate.",
        )
    return [Path(path).expanduser() for path in paths]


@contextmanager
def signing_by(signer: Signer) -> Iterator[Callable[[Any], bytes]]:
    """What signs statements of ``in_toto_attestation`` in the block: it gives a Sigstore bundle, as JSON.
    Keys are read and servers are reached at its start: whoever cannot sign knows it before files are hashed.

    Raises:
        SigningError: the signer cannot sign, or a library is missing. So does what signs.
    """
    with failures_explained(_WHAT, _FIX):
        from model_signing import signing

        config: Any = signing.Config()  # type: ignore[no-untyped-call]
        signer.configure(config)
    try:
        yield partial(_sign, config)
    finally:
        _log_out(config._signer)


def _sign(config: Any, statement: Any) -> bytes:
    with failures_explained(_WHAT, _FIX):
        # Its own way takes what it hashed itself, and signs what is in this attribute.
        bundle: str = config._signer.sign(SimpleNamespace(statement=statement)).bundle.to_json()
    return bundle.encode()


def _log_out(signer: Any) -> None:
    """End the session with a token, if there is one. A process can have one only, and the library would leave
    its end to the garbage collection."""
    session, signer.session = getattr(signer, "session", None), None
    if session is not None:
        with failures_explained(_WHAT, _FIX):
            session.logout()
            session.closeSession()
