"""Keys and certificates for tests, made when they are asked for."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class KeyPair(NamedTuple):
    """The PEM files of both halves."""

    private: Path
    public: Path


def write_pair(folder: Path, name: str, key: Key | None = None, password: str | None = None) -> KeyPair:
    """A pair of keys, of the curve P-256 if none is given."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    pair.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return pair


class Authority:
    """A root that makes certificates."""

    def __init__(self, folder: Path, name: str = "root") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(timezone.utc)
        built = self._builder(self._name, self._key, now - timedelta(days=900), now + timedelta(days=900))
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.root = folder / f"{name}.crt"
        folder.mkdir(parents=True, exist_ok=True)
        self.root.write_bytes(built.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def certificate(
        self,
        name: str,
        *,
        days_ago: int = 1,
        days_left: int = 1,
        for_signing: bool = True,
        purpose: x509.ObjectIdentifier | None = None,
    ) -> tuple[Path, Path]:
        """A certificate, and its private key: PEM files."""
        private = write_pair(self._folder, name).private
        return self.certificate_of(private, name, days_ago, days_left, for_signing, purpose), private

    def certificate_of(
        self,
        private: Path,
        name: str,
        days_ago: int = 1,
        days_left: int = 1,
        for_signing: bool = True,
        purpose: x509.ObjectIdentifier | None = None,
    ) -> Path:
        """A certificate of a key that is there."""
        key = load_pem_private_key(private.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.now(timezone.utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        begin, end = now - timedelta(days=days_ago), now + timedelta(days=days_left)
        usage = x509.KeyUsage(
            digital_signature=for_signing,
            content_commitment=False,
            key_encipherment=not for_signing,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=False,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        purposes = x509.oid.ExtendedKeyUsageOID
        usual = purposes.CODE_SIGNING if for_signing else purposes.SERVER_AUTH
        others = x509.ExtendedKeyUsage([purpose or usual])
        built = self._builder(subject, key, begin, end).add_extension(usage, critical=True)
        built = built.add_extension(others, critical=False)
        place = self._folder / f"{name}.crt"
        place.write_bytes(built.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return place

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(begin).not_valid_after(end)
