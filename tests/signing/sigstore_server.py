"""A small Sigstore on loopback: a certificate authority with its certificate log, and a log of signatures.

It does for one signature what the real servers do, as sigstore's own client asks for it: RFC 6962 for the
certificate's timestamp, a tree of one entry, a signed checkpoint, a signed time. It believes every token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER = "https://issuer.test"
_NAME = "log.test"
_SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_OIDC_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def _canonical(value: object) -> bytes:
    """RFC 8785, for what has no floats and is ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class SigstoreServer:
    """Listens from ``with`` to the end of it."""

    def __init__(self) -> None:
        self._ca, self._certificate_log, self._log = _new_key(), _new_key(), _new_key()
        self._root = self._make_root()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"authorization_endpoint": server.url, "token_endpoint": server.url})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "signingCert" in self.path:
                    token = self.headers["Authorization"].removeprefix("Bearer ")
                    self.answer(server.certificates(body, token))
                else:
                    self.answer(server.entry(body))

            def answer(self, value: object) -> None:
                data = json.dumps(value).encode()
                self.send_response(201 if self.command == "POST" else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SigstoreServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, identity: str) -> str:
        """What an identity provider gives to somebody who logs in."""
        now = int(time.time())
        claims = {"iss": ISSUER, "sub": identity, "aud": "sigstore", "iat": now, "exp": now + 600}
        parts = (_canonical({"alg": "HS256", "typ": "JWT"}), _canonical(claims), b"believed by all")
        return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)

    def write_trust(self, path: Path) -> Path:
        """The file with addresses and public keys."""
        start = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, object]:
            kind = "PKIX_ECDSA_P256_SHA_256"
            return {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {"rawBytes": _text(_spki(key)), "keyDetails": kind, "validFor": start},
                "logId": {"keyId": _text(_id(key))},
            }

        services = [{"url": self.url, "majorApiVersion": 1, "validFor": start, "operator": "test"}]
        chain = {"certificates": [{"rawBytes": _text(self._root.public_bytes(Encoding.DER))}]}
        authority = {
            "subject": {"organization": "test", "commonName": "test"},
            "uri": self.url,
            "certChain": chain,
            "validFor": start,
        }
        document = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self._log)],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self._certificate_log)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": services,
                "oidcUrls": services,
                "rekorTlogUrls": services,
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(document))
        return path

    # The certificate authority, and its certificates' log

    def _make_root(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = self._builder(name, self._ca.public_key(), timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        key = x509.SubjectKeyIdentifier.from_public_key(self._ca.public_key())
        return builder.add_extension(key, critical=False).sign(self._ca, hashes.SHA256())

    def _builder(self, name: x509.Name, key: Any, lasts: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(timezone.utc).replace(microsecond=0)
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + lasts)

    def certificates(self, body: dict[str, str], token: str) -> dict[str, Any]:
        """A short-lived certificate for the key that asks, and for the token's identity."""
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        asked = x509.load_pem_x509_csr(base64.b64decode(body["certificateSigningRequest"]))
        builder = self._builder(x509.Name([]), asked.public_key(), timedelta(minutes=10))
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        signing = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CODE_SIGNING])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca.public_key())
        names = x509.SubjectAlternativeName([x509.RFC822Name(claims["sub"])])
        issuer = x509.UnrecognizedExtension(_OIDC_ISSUER, claims["iss"].encode())
        for extension in (usage, names, signing, authority, issuer):
            builder = builder.add_extension(extension, critical=extension in (usage, names))
        before = builder.sign(self._ca, hashes.SHA256())
        stamped = x509.UnrecognizedExtension(_SCT_LIST, self._timestamps(before.tbs_certificate_bytes))
        leaf = builder.add_extension(stamped, critical=False).sign(self._ca, hashes.SHA256())
        chain = [one.public_bytes(Encoding.PEM).decode() for one in (leaf, self._root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def _timestamps(self, certificate: bytes) -> bytes:
        """The certificate log's list of one signed timestamp (RFC 6962, section 3.2)."""
        now = int(time.time()) * 1000
        length = len(certificate).to_bytes(3, "big")
        entry = struct.pack("!BBQH", 0, 0, now, 1) + _id(self._ca) + length + certificate + b"\0\0"
        signature = _signature(self._certificate_log, entry)
        stamp = b"\0" + _id(self._certificate_log) + struct.pack("!QHBBH", now, 0, 4, 3, len(signature))
        stamp += signature
        listed = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        assert len(listed) < 128 or len(listed) < 256
        return b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else bytes([0x81, len(listed)])) + listed

    # The log of signatures

    def entry(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log's entry for a signed statement, which is the only one in its tree."""
        proposed = body["spec"]["proposedContent"]
        envelope = json.loads(proposed["envelope"])
        payload = base64.b64decode(envelope["payload"])
        digests = {"envelopeHash": proposed["envelope"].encode(), "payloadHash": payload}
        spec: dict[str, Any] = {
            name: {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}
            for name, data in digests.items()
        }
        spec["signatures"] = [
            {"signature": one["sig"], "verifier": verifier}
            for one, verifier in zip(envelope["signatures"], proposed["verifiers"], strict=True)
        ]
        text = _canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        root = hashlib.sha256(b"\0" + text).digest()
        note = f"{_NAME} - 1\n1\n{_text(root)}\n"
        mark = _text(_id(self._log)[:4] + _signature(self._log, note.encode()))
        facts = {
            "body": _text(text),
            "integratedTime": int(time.time()),
            "logID": _id(self._log).hex(),
            "logIndex": 0,
        }
        proof = {
            "logIndex": 0,
            "rootHash": root.hex(),
            "treeSize": 1,
            "hashes": [],
            "checkpoint": f"{note}\n\u2014 {_NAME} {mark}\n",
        }
        promise = _text(_signature(self._log, _canonical(facts)))
        return {"0": {**facts, "verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}}
