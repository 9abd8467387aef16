"""Attestations: a signed statement of where a target comes from, made again and compared."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from deltaweights import (
    BaseMismatchError,
    DeltaError,
    KeySigner,
    SignatureError,
    attest_delta,
    bom_of,
    make_delta,
    sign_delta,
    statement_of,
    verify_delta,
)
from deltaweights.manifest import Manifest
from deltaweights.signing import ATTESTATION_NAME
from deltaweights.signing.keys import sign_bytes

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..conftest import Trio
from .keys import KeyPair, write_pair


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_pair(tmp_path, "signer")


@pytest.fixture
def delta(trio: Trio, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trio.delta, tmp_path / "delta"))


def test_what_is_attested_is_the_targets_and_its_materials_sha256(
    trio: Trio, delta: Path, keys: KeyPair
) -> None:
    """Read as any other program reads it: a Sigstore bundle, a DSSE envelope, an in-toto statement."""
    report = attest_delta(delta, KeySigner(keys.private), base=trio.base)
    bundle = json.loads(Path(report.attestation).read_bytes())
    assert bundle["dsseEnvelope"]["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert subjects == {path: sha256(data) for path, data in contents(trio.target).items()}
    made = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    materials = {one["name"]: one["digest"]["sha256"] for one in made}
    for folder, side in (("base", trio.base), ("delta", trio.delta)):
        there = {f"{folder}/{path}": sha256(data) for path, data in contents(side).items()}
        named = {name: digest for name, digest in materials.items() if name.startswith(f"{folder}/")}
        assert named.items() <= there.items()
        assert all(name in named for name in there if name.endswith((".safetensors", "deltaweights.json")))
    assert (report.subjects, report.materials, report.rebuilt) == (len(subjects), len(materials), True)


def test_an_attestation_is_made_again_and_compared(trio: Trio, delta: Path, keys: KeyPair) -> None:
    attest_delta(delta, KeySigner(keys.private))
    report = verify_delta(delta, require_attestation=keys.public)
    assert (report.ok, report.attested_by[0][:4], report.attested_rebuilt) == (True, "key ", False)
    attest_delta(delta, KeySigner(keys.private), base=trio.base)
    report = verify_delta(delta, base=trio.base, require_attestation=keys.public)
    assert (report.ok, report.attested_rebuilt) == (True, True)


def test_it_stands_beside_a_signature(delta: Path, keys: KeyPair) -> None:
    """Whichever came first."""
    for first, second in ((attest_delta, sign_delta), (sign_delta, attest_delta)):
        first(delta, KeySigner(keys.private))
        second(delta, KeySigner(keys.private))
        report = verify_delta(delta, require_signature=keys.public, require_attestation=keys.public)
        assert report.ok


def test_only_what_was_rebuilt_is_said_to_be(trio: Trio, delta: Path, keys: KeyPair, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "wrong" / "model.safetensors", {"w": bf16(weights((2, 3), 1))})
    with pytest.raises(BaseMismatchError):
        attest_delta(delta, KeySigner(keys.private), base=tmp_path / "wrong")
    shard = next(delta.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(DeltaError, match="not what its manifest says"):
        attest_delta(delta, KeySigner(keys.private), base=trio.base)
    assert not (delta / ATTESTATION_NAME).exists()


def test_other_signers_and_other_deltas_are_refused(
    trio: Trio, delta: Path, keys: KeyPair, tmp_path: Path
) -> None:
    with pytest.raises(SignatureError, match="has no attestation"):
        verify_delta(delta, require_attestation=keys.public)
    attest_delta(delta, KeySigner(keys.private))
    with pytest.raises(SignatureError, match="not signed as it must be"):
        verify_delta(delta, require_attestation=write_pair(tmp_path, "other").public)
    make_delta(trio.base, trio.target, tmp_path / "again", chunk_bytes=1 << 16, base_repo="org/base")
    shutil.copy(delta / ATTESTATION_NAME, tmp_path / "again")
    with pytest.raises(SignatureError, match="is not of this delta"):
        verify_delta(tmp_path / "again", require_attestation=keys.public)
    sign_delta(delta, KeySigner(keys.private))
    shutil.copy(delta / "model.sig", delta / ATTESTATION_NAME)
    with pytest.raises(SignatureError, match="is not of this delta"):
        verify_delta(delta, require_attestation=keys.public)


def _set(*path: str | int, value: object) -> Callable[[Any], object]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


CHANGES: dict[str, Callable[[Any], object]] = {
    "a subject": _set("subject", 0, "digest", "sha256", value="0" * 64),
    "a subject less": lambda one: one["subject"].pop(),
    "a material": _set(
        "predicate", "buildDefinition", "resolvedDependencies", 0, "digest", "sha256", value="0" * 64
    ),
    "the builder": _set("predicate", "runDetails", "builder", "id", value="somebody"),
    "the type": _set("predicateType", value="https://slsa.dev/provenance/v0.2"),
    "a field more": _set("predicate", "more", value=1),
    "rebuilt is no boolean": _set("predicate", "buildDefinition", "internalParameters", value={}),
}


@pytest.mark.parametrize("name", [*CHANGES, "no JSON", "deep"])
def test_statements_that_say_something_else_are_refused(name: str, delta: Path, keys: KeyPair) -> None:
    """By the right key."""
    attest_delta(delta, KeySigner(keys.private))
    document = json.loads((delta / ATTESTATION_NAME).read_bytes())
    envelope = document["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    payload = {"no JSON": b"{", "deep": b"[" * 100_000}.get(name, b"")
    if name in CHANGES:
        CHANGES[name](statement)
        payload = json.dumps(statement).encode()
    key: Any = load_pem_private_key(keys.private.read_bytes(), None)
    envelope["payload"] = base64.b64encode(payload).decode()
    signature = sign_bytes(key, envelope["payloadType"], payload)
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    (delta / ATTESTATION_NAME).write_text(json.dumps(document))
    with pytest.raises(SignatureError):
        verify_delta(delta, require_attestation=keys.public)


def test_the_statement_alone_is_what_would_be_signed(delta: Path, keys: KeyPair) -> None:
    attest_delta(delta, KeySigner(keys.private))
    bundle = json.loads((delta / ATTESTATION_NAME).read_bytes())
    assert json.loads(statement_of(delta)) == json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def test_files_of_repositories_have_addresses(trio: Trio, tmp_path: Path) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta", base_repo="org/base", base_revision="a" * 40)
    statement = json.loads(statement_of(tmp_path / "delta"))
    one = statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    path = one["name"].removeprefix("base/")
    assert one["uri"] == f"https://huggingface.co/org/base/resolve/{'a' * 40}/{path}"
    manifest = Manifest.from_json((tmp_path / "delta" / "deltaweights.json").read_bytes())
    assert one["digest"]["sha256"] == next(f.sha256 for f in manifest.base.files if f.path == path)


@pytest.mark.parametrize("format", ["cyclonedx", "spdx"])
def test_bills_of_materials_point_to_it(format: Any, delta: Path, keys: KeyPair) -> None:
    assert ATTESTATION_NAME.encode() not in bom_of(delta, format)
    attest_delta(delta, KeySigner(keys.private))
    document = bom_of(delta, format)
    assert ATTESTATION_NAME.encode() in document
    assert sha256((delta / ATTESTATION_NAME).read_bytes()).encode() in document


def with_metadata(folder: Path, shard: str, text: str = "x") -> None:
    """Let a shard have the same tensors in another file."""
    data = (folder / shard).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": {"of": text}, **json.loads(data[8:start])}).encode()
    header += b" " * (-len(header) % 8)
    (folder / shard).write_bytes(len(header).to_bytes(8, "little") + header + data[start:])


def test_a_base_of_the_same_tensors_is_not_the_one_that_is_attested(
    trio: Trio, delta: Path, keys: KeyPair, tmp_path: Path
) -> None:
    """The target can be rebuilt from it. But the statement has the SHA-256 of the base's files."""
    base = Path(shutil.copytree(trio.base, tmp_path / "base"))
    shard = next(base.glob("*.safetensors")).name
    with_metadata(base, shard)
    assert verify_delta(delta, base=base).ok
    with pytest.raises(DeltaError, match=rf"do not give the target\n{shard}: different"):
        attest_delta(delta, KeySigner(keys.private), base=base)
    assert not (delta / ATTESTATION_NAME).exists()
    attest_delta(delta, KeySigner(keys.private))
    found = verify_delta(delta, base=base, require_attestation=keys.public)
    assert [(one.place, one.path, one.kind) for one in found.problems] == [("base", shard, "different")]


def test_the_targets_between_attested_deltas_are_rebuilt(tmp_path: Path, keys: KeyPair) -> None:
    """The first delta says that it gives something else than it does, and the second one goes on from there.
    Only the last target would be as attested."""
    names = ("base", "one", "two")
    for seed, name in enumerate(names):
        write_safetensors(tmp_path / name / "model.safetensors", {"w": bf16(weights((2, 3), seed))})
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other"))
    with_metadata(tmp_path / "one", "model.safetensors")
    with_metadata(other, "model.safetensors", "y")
    make_delta(tmp_path / "base", tmp_path / "one", tmp_path / "1")
    make_delta(other, tmp_path / "two", tmp_path / "2")
    place = tmp_path / "1" / "deltaweights.json"
    manifest = Manifest.from_json(place.read_bytes())
    (file,) = manifest.target.files
    data = (other / "model.safetensors").read_bytes()
    lie = replace(file, sha256=sha256(data))
    place.write_bytes(replace(manifest, target=replace(manifest.target, files=(lie,))).to_json())
    for folder in ("1", "2"):
        attest_delta(tmp_path / folder, KeySigner(keys.private))
    chain, base = [tmp_path / "1", tmp_path / "2"], tmp_path / "base"
    assert verify_delta(chain, base=base).ok
    found = verify_delta(chain, base=base, require_attestation=keys.public)
    assert [(one.place, one.kind) for one in found.problems] == [("rebuilt", "different")]
