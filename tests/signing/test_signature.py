"""Signatures of deltas: made and checked, by us and by model-signing; and everything that is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from deltaweights import (
    CertificateSigner,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    KeySigner,
    OutputError,
    Pkcs11Signer,
    SignatureError,
    SigningError,
    SigstoreSigner,
    TrustedCertificates,
    TrustedIdentity,
    TrustedKey,
    apply_delta,
    make_delta,
    open_target,
    plan_apply,
    sign_delta,
    verify_delta,
)
from deltaweights.delta.opening import read_manifest
from deltaweights.delta.pointer import POINTER_NAME, parse_pointer
from deltaweights.delta.signed import check_signers, require_same_files
from deltaweights.engines import serve_folder
from deltaweights.manifest import MANIFEST_NAME, Manifest
from deltaweights.signing import SIGNATURE_NAME, require_signed, signed_files
from deltaweights.signing.bundle import MAX_BUNDLE_BYTES, SignatureBundle, read_bundle
from deltaweights.storage import LocalSource, open_source
from deltaweights.workers import Meter

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import Trio
from ..hub_server import HubServer
from ..s3_server import S3Server
from .keys import Authority, KeyPair, write_pair
from .sigstore_server import ISSUER, SigstoreServer

SHARD = "delta-00001-of-00001.safetensors"


class Signed(NamedTuple):
    """A small signed delta, its base, and the keys: the signer's, and those of somebody else."""

    base: Path
    delta: Path
    keys: KeyPair
    others: KeyPair


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    """As small as they come: every bit of it is flipped. Shared: copy what you change."""
    folder = tmp_path_factory.mktemp("signed")
    write_safetensors(folder / "base" / "model.safetensors", {"w": bf16(weights((2, 3), 1))})
    write_safetensors(folder / "tuned" / "model.safetensors", {"w": bf16(weights((2, 3), 2))})
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    keys, others = write_pair(folder, "signer"), write_pair(folder, "other")
    sign_delta(folder / "delta", KeySigner(keys.private))
    return Signed(folder / "base", folder / "delta", keys, others)


@pytest.fixture
def sigstore() -> Iterator[SigstoreServer]:
    with SigstoreServer() as server:
        yield server


@pytest.fixture
def copy(signed: Signed, tmp_path: Path) -> Path:
    """A copy of that delta."""
    return Path(shutil.copytree(signed.delta, tmp_path / "delta"))


def model_signing(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line of model-signing."""
    command = [sys.executable, "-m", "model_signing", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refuses(folder: Path, base: Path, requirement: Any, out: Path, match: str) -> None:
    """`apply` refuses the delta, and writes nothing; so do all others."""
    calls: list[Callable[[], object]] = [
        lambda: apply_delta(folder, out, base=base, require_signature=requirement),
        lambda: open_target(folder, base, require_signature=requirement),
        lambda: verify_delta(folder, require_signature=requirement),
        lambda: plan_apply(folder, base=base, require_signature=requirement),
    ]
    for call in calls:
        with pytest.raises(DeltaWeightsError, match=match):
            call()
    assert not out.exists()


def test_a_signed_delta_is_applied(signed: Signed, tmp_path: Path) -> None:
    for requirement in (
        signed.keys.public,
        TrustedKey(signed.keys.public),
        [signed.others.public, signed.keys.public],
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        apply_delta(signed.delta, out, base=signed.base, require_signature=requirement)
        assert contents(out) == contents(signed.delta.parent / "tuned")
    with open_target(signed.delta, signed.base, require_signature=str(signed.keys.public)) as target:
        assert target["w"].data.nbytes == 12
    report = verify_delta(signed.delta, base=signed.base, require_signature=signed.keys.public)
    assert report.ok
    assert report.signed_by[0].startswith("key ")


def test_model_signing_verifies_ours(signed: Signed, copy: Path) -> None:
    """Also with what programs put there afterwards."""
    for name in (".cache/huggingface/download", ".git", ".deltaweights/licenses"):
        (copy / name).mkdir(parents=True)
        (copy / name / "x").write_text("x")
    (copy / ".gitattributes").write_text("x")
    (copy / "attestation.sigstore.json").write_text("x")
    key = ("--public_key", signed.keys.public, "--signature", copy / SIGNATURE_NAME)
    assert "succeeded" in (found := model_signing("verify", "key", copy, *key)).stdout, found
    (copy / "README.md").write_text("Another page")
    assert "Hash mismatch" in model_signing("verify", "key", copy, *key).stderr


def test_ours_verifies_what_model_signing_signed(signed: Signed, copy: Path, tmp_path: Path) -> None:
    (copy / SIGNATURE_NAME).unlink()
    key = ("--private_key", signed.keys.private, "--signature", copy / SIGNATURE_NAME)
    assert "succeeded" in (found := model_signing("sign", "key", copy, *key)).stdout, found
    assert verify_delta(copy, require_signature=signed.keys.public).ok
    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=signed.keys.public)
    (copy / "README.md").write_text("Another page")
    (problem,) = verify_delta(copy, require_signature=signed.keys.public).problems
    assert (problem.path, problem.kind) == ("README.md", "different")


def test_only_the_required_signer_counts(signed: Signed, copy: Path, tmp_path: Path) -> None:
    refuses(copy, signed.base, signed.others.public, tmp_path / "out", "not signed as it must be")
    refuses(copy, signed.base, [], tmp_path / "out", "Nobody is trusted")
    refuses(copy, signed.base, TrustedIdentity("a@b.c", "https://b.c"), tmp_path / "out", "through Sigstore")
    roots = TrustedCertificates((Authority(tmp_path).root,))
    refuses(copy, signed.base, roots, tmp_path / "out", "not signed with a certificate")
    refuses(copy, signed.base, tmp_path / "none.pem", tmp_path / "out", "Cannot read")
    refuses(copy, signed.base, signed.keys.private, tmp_path / "out", "no public key")
    sign_delta(copy, KeySigner(signed.others.private))  # by whoever else has write access
    refuses(copy, signed.base, signed.keys.public, tmp_path / "out", "not signed as it must be")
    (copy / SIGNATURE_NAME).unlink()
    refuses(copy, signed.base, signed.keys.public, tmp_path / "out", "is not signed")


def flips(data: bytes) -> Iterator[bytes]:
    """The data with each of its bits flipped."""
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def test_every_flipped_bit_of_a_signature_is_found(signed: Signed) -> None:
    """The statement is in there, too."""
    key = TrustedKey(signed.keys.public)
    data = (signed.delta / SIGNATURE_NAME).read_bytes()
    key.check(read_bundle(data, "model.sig"))
    found = 0
    for changed in flips(data):
        with pytest.raises(SignatureError):
            key.check(read_bundle(changed, "model.sig"))
        found += 1
    assert found == 8 * len(data)


def test_every_flipped_bit_of_a_statement_is_found(signed: Signed) -> None:
    """Also where its base64 is whole: the bits of what was signed, one by one."""
    key = TrustedKey(signed.keys.public)
    document = json.loads((signed.delta / SIGNATURE_NAME).read_bytes())
    payload = base64.b64decode(document["dsseEnvelope"]["payload"])
    for changed in flips(payload):
        document["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
        with pytest.raises(SignatureError, match="not signed as it must be"):
            key.check(read_bundle(json.dumps(document).encode(), "model.sig"))


def test_every_flipped_bit_of_a_signed_delta_is_found(signed: Signed, copy: Path, tmp_path: Path) -> None:
    """Each bit by the check that is made for its file; and, of each 97th, that all who read ask for it."""
    key = signed.keys.public
    with LocalSource(signed.delta) as source:
        says = signed_files(source, key)
        manifest = read_manifest(source)
    files = {path for path in contents(copy) if path not in ("README.md", SIGNATURE_NAME)}
    own = {MANIFEST_NAME, *(one.path for one in manifest.files)}
    assert files == set(says.digests) - {"README.md"} == own
    for path in sorted(files):
        data = (copy / path).read_bytes()
        for number, changed in enumerate(flips(data)):
            if path == MANIFEST_NAME:
                with pytest.raises(DeltaError):
                    says.require(Manifest.from_json(changed))
            else:
                (copy / path).write_bytes(changed)
                with LocalSource(copy) as source, pytest.raises(DeltaError, match="not the file that was"):
                    require_same_files(source, manifest, Meter(None, "", 0))
            if number % 97 == 0:
                (copy / path).write_bytes(changed)
                with pytest.raises(DeltaError):
                    open_target(copy, signed.base, require_signature=key)
                with pytest.raises(DeltaError):
                    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=key)
        (copy / path).write_bytes(data)
    assert not (tmp_path / "out").exists()
    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=key)


def test_every_flipped_bit_of_the_page_is_found_by_verify(signed: Signed, copy: Path) -> None:
    with LocalSource(signed.delta) as source:
        digest = signed_files(source, signed.keys.public).digests["README.md"]
    data = (copy / "README.md").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert all(hashlib.sha256(changed).hexdigest() != digest for changed in flips(data))
    (copy / "README.md").write_bytes(next(flips(data)))
    assert not verify_delta(copy, require_signature=signed.keys.public).ok
    (copy / "README.md").unlink()
    (problem,) = verify_delta(copy, require_signature=signed.keys.public).problems
    assert problem.kind == "missing"


def test_a_swapped_manifest_is_refused(signed: Signed, copy: Path, tmp_path: Path) -> None:
    """Another delta, whole in itself, beside the signature of this one."""
    write_safetensors(tmp_path / "evil" / "model.safetensors", {"w": bf16(weights((2, 3), 9))})
    make_delta(signed.base, tmp_path / "evil", tmp_path / "other")
    shutil.copy(copy / SIGNATURE_NAME, tmp_path / "other")
    refuses(tmp_path / "other", signed.base, signed.keys.public, tmp_path / "out", "is not of this delta")


def test_removed_and_added_files(signed: Signed, copy: Path, tmp_path: Path) -> None:
    """A file that nobody signed is never read, and `verify` names it; one that is missing is refused."""
    (copy / "added.safetensors").write_bytes((copy / SHARD).read_bytes())
    (problem,) = verify_delta(copy, require_signature=signed.keys.public).problems
    assert (problem.path, problem.kind) == ("added.safetensors", "extra")
    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=signed.keys.public)
    assert contents(tmp_path / "out") == contents(signed.delta.parent / "tuned")
    (copy / SHARD).unlink()
    with pytest.raises(DeltaError, match="not a whole delta"):
        apply_delta(copy, tmp_path / "out2", base=signed.base, require_signature=signed.keys.public)
    assert not (tmp_path / "out2").exists()


def test_a_manifest_that_names_another_file_than_the_signed_one_is_refused(
    signed: Signed, copy: Path, tmp_path: Path
) -> None:
    """By a signer who signed a manifest and other files than it says."""
    from deltaweights.signing import signing_by
    from deltaweights.signing.statement import folder_statement

    with LocalSource(copy) as source:
        digests = dict(signed_files(source, signed.keys.public).digests)
    for wrong in ({SHARD: "0" * 64}, {}):
        chosen = {path: wrong.get(path, sha256) for path, sha256 in digests.items() if wrong or path != SHARD}
        with signing_by(KeySigner(signed.keys.private)) as sign:
            (copy / SIGNATURE_NAME).write_bytes(sign(folder_statement("delta", chosen, ())))
        refuses(copy, signed.base, signed.keys.public, tmp_path / "out", "is not of this delta")


class ThenSwapped(NamedTuple):
    """Trusts a key, and swaps a file as soon as it has been asked, as a server could."""

    key: Path
    place: Path
    content: bytes

    def check(self, bundle: SignatureBundle) -> str:
        by = TrustedKey(self.key).check(bundle)
        self.place.write_bytes(self.content)
        return by


def other_manifest(folder: Path) -> bytes:
    """Another one, of the same files."""
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_bytes())
    return replace(manifest, tool=replace(manifest.tool, version="9")).to_json()


def test_the_manifest_whose_signature_was_checked_is_the_one_that_is_used(
    signed: Signed, copy: Path, tmp_path: Path
) -> None:
    place, right = copy / MANIFEST_NAME, (copy / MANIFEST_NAME).read_bytes()
    other = other_manifest(copy)
    with open_source(copy) as source:
        check_signers([source], [ThenSwapped(signed.keys.public, place, other)])  # type: ignore[list-item]
        assert read_manifest(source).to_json() == right
        require_signed(source, read_manifest(source), signed.keys.public)
    place.write_bytes(right)
    swapping: Any = [ThenSwapped(signed.keys.public, place, other)]
    serve_folder(copy, tmp_path / "model", base=signed.base, require_signature=swapping)
    assert place.read_bytes() == other
    pointer = parse_pointer((tmp_path / "model" / POINTER_NAME).read_bytes(), "")
    assert pointer.deltas[0].manifest == hashlib.sha256(right).hexdigest()


def test_license_texts_are_compared_as_they_are_written(trio: Trio, tmp_path: Path) -> None:
    """Not only before, when a server may have given others."""
    delta = Path(shutil.copytree(trio.delta, tmp_path / "delta"))
    text = next(delta.glob("licenses/*"))

    def swap(phase: str, *_: int) -> None:
        if phase == "apply":
            text.write_bytes(text.read_bytes()[:-1] + b"!")

    with pytest.raises(DeltaError, match=rf"{text.name} in the delta is damaged"):
        apply_delta(delta, tmp_path / "out", base=trio.base, progress=swap)
    assert not list((tmp_path / "out").rglob(text.name))


def test_requirements_that_would_require_less_cannot_be_made() -> None:
    """The library takes every provider for an empty one, and the system's roots for none."""
    for identity, provider in (("a@b.c", ""), ("", "https://b.c")):
        with pytest.raises(ValueError, match="identity"):
            TrustedIdentity(identity, provider)
    for roots in ((), "root.pem"):
        with pytest.raises(ValueError, match="roots"):
            TrustedCertificates(roots)


def envelope(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], bytes]:
    def changed(document: dict[str, Any]) -> bytes:
        change(document)
        return json.dumps(document, separators=(",", ":")).encode()

    return changed


def material(**fields: object) -> Callable[[dict[str, Any]], bytes]:
    """Another one in place of the key."""
    return envelope(lambda one: one.update(verificationMaterial={"tlogEntries": [], **fields}))


def within(**fields: object) -> Callable[[dict[str, Any]], bytes]:
    """Other fields of the envelope."""
    return envelope(lambda one: one["dsseEnvelope"].update(fields))


_RAW = {"rawBytes": "AAAA"}
_SIGNATURE = {"sig": "AAAA", "keyid": ""}

HOSTILE: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda _: b"",
    "not JSON": lambda _: b"model",
    "not UTF-8": lambda _: b'{"\xff": 1}',
    "a number": lambda _: b"1",
    "a huge number": lambda _: b'{"mediaType":' + b"9" * 10_000 + b"}",
    "deep": lambda _: b"[" * 200_000 + b"]" * 200_000,
    "huge": lambda _: b" " * (MAX_BUNDLE_BYTES + 1),
    "more white space": lambda one: b" " + json.dumps(one).encode(),
    "a field twice": lambda one: json.dumps(one).encode().replace(b"{", b'{"mediaType": 1, ', 1),
    "an unknown field": envelope(lambda one: one.update(more=1)),
    "another media type": envelope(lambda one: one.update(mediaType="text/plain")),
    "another payload type": within(payloadType="application/vnd.in-toto+xml"),
    "no signature": within(signatures=[]),
    "two signatures": within(signatures=[_SIGNATURE, _SIGNATURE]),
    "a key's name": within(signatures=[_SIGNATURE | {"keyid": "x"}]),
    "an empty payload": within(payload=""),
    "no base64": within(payload="%"),
    "no key": material(),
    "an empty hint": material(publicKey={"hint": ""}),
    "log entries": envelope(lambda one: one["verificationMaterial"].update(tlogEntries=[{}])),
    "an empty chain": material(x509CertificateChain={"certificates": []}),
    "no certificate": material(x509CertificateChain={"certificates": [_RAW]}),
    "keyless rubbish": material(certificate=_RAW, tlogEntries=[{"logIndex": "x"}]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_signatures_are_refused(name: str, signed: Signed, copy: Path, tmp_path: Path) -> None:
    document = json.loads((copy / SIGNATURE_NAME).read_bytes())
    (copy / SIGNATURE_NAME).write_bytes(HOSTILE[name](document))
    root = Authority(tmp_path).root
    config = tmp_path / "trust.json"
    config.write_text("{}")
    for requirement in (
        signed.keys.public,
        TrustedCertificates((root,)),
        TrustedIdentity("a@b.c", "https://b.c", trust_config=config),
    ):
        with pytest.raises(SignatureError):
            apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=requirement)
    assert not (tmp_path / "out").exists()


STATEMENTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another predicate": lambda one: one.update(predicateType="https://slsa.dev/provenance/v1"),
    "another type": lambda one: one.update(_type="https://in-toto.io/Statement/v0.1"),
    "no subject": lambda one: one.update(subject=[]),
    "another root": lambda one: one["subject"][0]["digest"].update(sha256="0" * 64),
    "shards": lambda one: one["predicate"]["serialization"].update(method="shards"),
    "another hash": lambda one: one["predicate"]["resources"][0].update(algorithm="blake2b"),
    "a name twice": lambda one: one["predicate"].update(resources=2 * one["predicate"]["resources"]),
    "a short digest": lambda one: one["predicate"]["resources"][0].update(digest="00"),
    "resources of another kind": lambda one: one["predicate"].update(resources={"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_signed_statements_of_another_form_are_refused(
    name: str, signed: Signed, copy: Path, tmp_path: Path
) -> None:
    """By the right key: what it signs is no list of this delta's files."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from deltaweights.signing.keys import sign_bytes

    document = json.loads((copy / SIGNATURE_NAME).read_bytes())
    envelope = document["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    STATEMENTS[name](statement)
    payload = json.dumps(statement).encode()
    key: Any = load_pem_private_key(signed.keys.private.read_bytes(), None)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(
        sign_bytes(key, envelope["payloadType"], payload)
    ).decode()
    (copy / SIGNATURE_NAME).write_text(json.dumps(document))
    refuses(copy, signed.base, signed.keys.public, tmp_path / "out", "is damaged")


def test_certificates(signed: Signed, copy: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.certificate("maker")
    sign_delta(copy, CertificateSigner(key, certificate, (authority.root,)))
    trusted = TrustedCertificates((authority.root,))
    assert verify_delta(copy, require_signature=trusted).signed_by == ("certificate of CN=maker",)
    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=trusted)
    found = model_signing(
        "verify",
        "certificate",
        copy,
        "--certificate_chain",
        authority.root,
        "--signature",
        copy / SIGNATURE_NAME,
    )
    assert "succeeded" in found.stdout, found
    other = TrustedCertificates((Authority(tmp_path / "other", "root").root,))
    refuses(copy, signed.base, other, tmp_path / "out2", "not signed as it must be")
    refuses(copy, signed.base, signed.keys.public, tmp_path / "out2", "no key alone")


@pytest.mark.parametrize(
    "facts",
    [
        {"days_ago": 20, "days_left": -1},
        {"days_ago": -1, "days_left": 20},
        {"for_signing": False},
        {"purpose": ExtendedKeyUsageOID.SERVER_AUTH},
    ],
)
def test_certificates_that_do_not_hold_are_refused(
    facts: dict[str, Any], signed: Signed, copy: Path, tmp_path: Path
) -> None:
    """Expired, not valid yet, not for signing, for the signatures of a web server."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.certificate("maker", **facts)
    sign_delta(copy, CertificateSigner(key, certificate, (authority.root,)))
    refuses(
        copy,
        signed.base,
        TrustedCertificates((authority.root,)),
        tmp_path / "out",
        "not signed as it must be",
    )


def test_every_flipped_bit_of_a_signature_with_certificates_is_found(
    signed: Signed, copy: Path, tmp_path: Path
) -> None:
    """In the certificates; the rest is as in one without."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.certificate("maker")
    sign_delta(copy, CertificateSigner(key, certificate, (authority.root,)))
    trusted = TrustedCertificates((authority.root,))
    data = (copy / SIGNATURE_NAME).read_bytes()
    trusted.check(read_bundle(data, "model.sig"))
    end = data.index(b'"dsseEnvelope"')
    for changed in flips(data[:end]):
        with pytest.raises(SignatureError):
            trusted.check(read_bundle(changed + data[end:], "model.sig"))


def test_a_certificate_that_nobody_needs_is_refused(signed: Signed, copy: Path, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other", "another")
    certificate, key = authority.certificate("maker")
    sign_delta(copy, CertificateSigner(key, certificate, (authority.root, other.root)))
    refuses(copy, signed.base, TrustedCertificates((authority.root,)), tmp_path / "out", "nothing to do with")


def test_keys_that_cannot_sign(signed: Signed, copy: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    (copy / SIGNATURE_NAME).unlink()
    other = write_pair(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(SigningError, match="cannot sign deltas"):
        sign_delta(copy, KeySigner(other.private))
    with pytest.raises(SigningError, match="secp256k1"):
        sign_delta(
            copy, KeySigner(write_pair(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1())).private)
        )
    rsa_key: Any = rsa.generate_private_key(65537, 2048)
    with pytest.raises(SigningError, match="RSA"):
        sign_delta(copy, KeySigner(write_pair(tmp_path, "rsa", rsa_key).private))
    with pytest.raises(SigningError, match="no private key"):
        sign_delta(copy, KeySigner(signed.keys.public))
    with pytest.raises(SigningError, match="Cannot read"):
        sign_delta(copy, KeySigner(tmp_path / "none"))
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 17))
    with pytest.raises(SigningError, match="no key and no certificate"):
        sign_delta(copy, KeySigner(big))
    certificate, _ = Authority(tmp_path / "ca").certificate("maker")
    with pytest.raises(SigningError, match="does not match"):
        sign_delta(copy, CertificateSigner(signed.keys.private, certificate, (certificate,)))
    with pytest.raises(SigningError, match="chain is missing"):
        sign_delta(copy, CertificateSigner(signed.keys.private, certificate))
    assert not (copy / SIGNATURE_NAME).exists()


def test_encrypted_keys(copy: Path, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "secret", password="open sesame")  # noqa: S106
    for wrong in (None, "open"):
        with pytest.raises(SigningError, match="no private key that can be read"):
            sign_delta(copy, KeySigner(pair.private, wrong))
    sign_delta(copy, KeySigner(pair.private, "open sesame"))
    assert verify_delta(copy, require_signature=pair.public).ok
    assert "sesame" not in repr(KeySigner(pair.private, "open sesame"))


@pytest.mark.parametrize("curve", ["SECP384R1", "SECP521R1"])
def test_larger_curves(curve: str, copy: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    pair = write_pair(tmp_path, "large", ec.generate_private_key(getattr(ec, curve)()))
    sign_delta(copy, KeySigner(pair.private))
    assert verify_delta(copy, require_signature=pair.public).ok


def test_only_whole_deltas_are_signed(signed: Signed, copy: Path) -> None:
    before = (copy / SIGNATURE_NAME).read_bytes()
    (copy / "notes.txt").write_text("not of the delta")
    with pytest.raises(DeltaError, match="notes"):
        sign_delta(copy, KeySigner(signed.keys.private))
    (copy / "notes.txt").unlink()
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:-1] + b"\1")
    with pytest.raises(DeltaError, match="different"):
        sign_delta(copy, KeySigner(signed.keys.private))
    (copy / SHARD).unlink()
    os.symlink(signed.delta / SHARD, copy / SHARD)
    with pytest.raises(SigningError, match="symbolic link"):
        sign_delta(copy, KeySigner(signed.keys.private))
    assert (copy / SIGNATURE_NAME).read_bytes() == before


def test_progress_is_told_of_what_is_compared_first(signed: Signed, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}

    def progress(phase: str, done: int, total: int) -> None:
        told[phase] = done, total

    apply_delta(
        signed.delta,
        tmp_path / "out",
        base=signed.base,
        require_signature=signed.keys.public,
        progress=progress,
    )
    done, total = told["check signed"]
    with LocalSource(signed.delta) as source:
        assert done == total == sum(one.size for one in read_manifest(source).files)


def test_only_folders_are_signed(
    signed: Signed, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that could be one of the Hub is a path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no file or folder org/none"):
        sign_delta("org/none", KeySigner(signed.keys.private))
    with pytest.raises(OutputError, match="is a URL"):
        sign_delta("s3://bucket/delta", KeySigner(signed.keys.private))
    (tmp_path / "org").mkdir()
    shutil.move(copy, tmp_path / "org" / "delta")
    sign_delta("org/delta", KeySigner(signed.keys.private))
    assert verify_delta("org/delta", require_signature=signed.keys.public).ok


def test_each_delta_of_a_chain_is_signed(signed: Signed, copy: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "next" / "model.safetensors", {"w": bf16(weights((2, 3), 3))})
    make_delta(signed.delta.parent / "tuned", tmp_path / "next", tmp_path / "second")
    key = signed.keys.public
    with pytest.raises(SignatureError, match="second is not signed"):
        apply_delta([copy, tmp_path / "second"], tmp_path / "out", base=signed.base, require_signature=key)
    assert not (tmp_path / "out").exists()
    sign_delta(tmp_path / "second", KeySigner(signed.keys.private))
    apply_delta([copy, tmp_path / "second"], tmp_path / "out", base=signed.base, require_signature=key)
    assert len(verify_delta([copy, tmp_path / "second"], require_signature=key).signed_by) == 2


def test_the_base_is_not_looked_for_before_the_signature(signed: Signed, copy: Path) -> None:
    with pytest.raises(SignatureError):
        open_target(copy, "no-such-base", require_signature=signed.others.public)


def test_what_a_target_in_memory_is_made_of_is_compared(signed: Signed, copy: Path) -> None:
    """The checksums of chunks are no protection against whoever writes the chunks."""
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-1] + b"\1")
    with pytest.raises(DeltaError, match="not the file that was signed"):
        open_target(copy, signed.base, require_signature=signed.keys.public)


@pytest.mark.usefixtures("no_pauses", "no_waiting")
def test_deltas_on_the_hub(hub: HubServer, signed: Signed, copy: Path, tmp_path: Path) -> None:
    """Only what is needed is fetched; a target in memory is made from a copy, which is gone afterwards."""
    hub.add_repo("org/delta", contents(copy))
    key = signed.keys.public
    with pytest.raises(SignatureError):
        apply_delta("org/delta", tmp_path / "out", base=signed.base, require_signature=signed.others.public)
    assert not hub.weight_bytes("org/delta")
    apply_delta("org/delta", tmp_path / "out", base=signed.base, require_signature=key)
    assert contents(tmp_path / "out") == contents(signed.delta.parent / "tuned")
    with open_target("org/delta", signed.base, require_signature=key) as target:
        root = target._recipe.source.root
        assert root
        assert root.is_dir()
        assert target["w"].data.nbytes == 12
    assert not root.exists()


def test_deltas_in_stores(s3: S3Server, signed: Signed, copy: Path, tmp_path: Path) -> None:
    for path, data in contents(copy).items():
        s3.system.pipe_file(f"bucket/delta/{path}", data)
    key, url = signed.keys.public, "s3://bucket/delta"
    with pytest.raises(SignatureError):
        open_target(url, signed.base, require_signature=signed.others.public)
    with open_target(url, signed.base, require_signature=key) as target:
        assert target["w"].data.nbytes == 12
    s3.system.pipe_file("bucket/delta/" + SHARD, contents(copy)[SHARD][:-1] + b"\1")
    with pytest.raises(DeltaError, match="not the file that was signed"):
        open_target(url, signed.base, require_signature=key)


def test_keyless_signatures(sigstore: SigstoreServer, signed: Signed, copy: Path, tmp_path: Path) -> None:
    """Through a Sigstore on loopback: its servers are asked to sign, and its keys are checked with."""
    config = sigstore.write_trust(tmp_path / "trust.json")
    sign_delta(copy, SigstoreSigner(sigstore.token("maker@example.org"), trust_config=config))
    trusted = TrustedIdentity("maker@example.org", ISSUER, trust_config=config)
    assert verify_delta(copy, require_signature=trusted).signed_by == (f"maker@example.org, by {ISSUER}",)
    apply_delta(copy, tmp_path / "out", base=signed.base, require_signature=trusted)
    own = ("--identity", "maker@example.org", "--identity_provider", ISSUER, "--trust_config", config)
    found = model_signing("verify", "sigstore", copy, *own, "--signature", copy / SIGNATURE_NAME)
    assert "succeeded" in found.stdout, found
    with SigstoreServer() as another:
        elsewhere = another.write_trust(tmp_path / "other.json")
    for wrong in (
        TrustedIdentity("other@example.org", ISSUER, trust_config=config),
        TrustedIdentity("maker@example.org", "https://other.test", trust_config=config),
        TrustedIdentity("maker@example.org", ISSUER, trust_config=elsewhere),
    ):
        refuses(copy, signed.base, wrong, tmp_path / "out2", "not signed as it must be")
    refuses(copy, signed.base, signed.keys.public, tmp_path / "out2", "no key alone")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # where a bit of a certificate's flipped
def test_flipped_bits_of_a_keyless_signature_are_found(
    sigstore: SigstoreServer, copy: Path, tmp_path: Path
) -> None:
    """Every bit of the log's checkpoint, which is text; of the rest, which takes minutes, one in 41."""
    config = sigstore.write_trust(tmp_path / "trust.json")
    sign_delta(copy, SigstoreSigner(sigstore.token("maker@example.org"), trust_config=config))
    trusted = TrustedIdentity("maker@example.org", ISSUER, trust_config=config)
    data = (copy / SIGNATURE_NAME).read_bytes()
    trusted.check(read_bundle(data, "model.sig"))
    start = data.index(b'"checkpoint"')
    end = data.index(b"}", start)
    for place, changed in enumerate(flips(data)):
        if start <= place // 8 < end or place % 41 == 0:
            with pytest.raises(SignatureError):
                trusted.check(read_bundle(changed, "model.sig"))


def test_keyless_signing_says_that_it_cannot_reach_its_servers(copy: Path) -> None:
    """No test reaches the network: the library's own error becomes ours."""
    for signer in (SigstoreSigner(), SigstoreSigner(identity_token="x", staging=True)):  # noqa: S106
        with pytest.raises(SigningError, match="could not be made"):
            sign_delta(copy, signer)


def test_without_the_extra(copy: Path, signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SigningError, match=r"deltaweights\[sign\]"):
        sign_delta(copy, KeySigner(signed.keys.private))
    with pytest.raises(SigningError, match=r"deltaweights\[sign\]"):
        verify_delta(copy, require_signature=signed.keys.public)


def test_keys_in_tokens(signed: Signed, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in software, where there is one."""
    pytest.importorskip("PyKCS11")
    modules = [path for path in map(Path, _MODULES) if path.exists()]
    if not (modules and shutil.which("softhsm2-util")):
        pytest.skip("needs softhsm2")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    token = ["softhsm2-util", "--token", "token", "--pin", "1234"]
    subprocess.run(
        [*token[:1], "--init-token", "--free", "--label", "token", "--pin", "1234", "--so-pin", "5678"],
        check=True,
    )
    subprocess.run([*token, "--import", str(signed.keys.private), "--label", "key", "--id", "01"], check=True)
    uri = f"pkcs11:token=token;object={{}}?module-path={modules[0]}&pin-value={{}}"
    with pytest.raises(SigningError, match="could not be made") as error:
        sign_delta(copy, Pkcs11Signer(uri.format("key", "9999")))
    assert "9999" not in str(error.value)
    for _ in range(2):
        sign_delta(copy, Pkcs11Signer(uri.format("key", "1234")))
    assert verify_delta(copy, require_signature=signed.keys.public).ok
    authority = Authority(tmp_path / "ca")
    certificate = authority.certificate_of(signed.keys.private, "token")
    chained = Pkcs11Signer(uri.format("key", "1234"), certificate, (authority.root,))
    sign_delta(copy, chained)
    trusted = TrustedCertificates((authority.root,))
    assert verify_delta(copy, require_signature=trusted).signed_by == ("certificate of CN=token",)
    other, _ = authority.certificate("another")
    with pytest.raises(SigningError, match="not the key's"):
        sign_delta(copy, Pkcs11Signer(uri.format("key", "1234"), other, (authority.root,)))
    with pytest.raises(SigningError, match="URI is none") as error:
        sign_delta(copy, Pkcs11Signer("token?pin-value=1234"))
    assert "1234" not in f"{error.value}{Pkcs11Signer('pin-value=1234')}"
    with pytest.raises(SigningError, match="could not be made"):
        sign_delta(copy, Pkcs11Signer(uri.format("other", "1234")))


_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)
