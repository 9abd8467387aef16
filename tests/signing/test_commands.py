"""`sign`, `attest`, and the options that require a signature, on the command line; and `push`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltaweights import (
    KeySigner,
    SignatureError,
    apply_delta,
    make_delta,
    push_delta,
    sign_delta,
    verify_delta,
)
from deltaweights.cli.commands import app
from deltaweights.signing import ATTESTATION_NAME

from ..checkpoints import bf16, contents, weights, write_safetensors
from ..hub_server import HubServer
from .keys import Authority, write_pair
from .sigstore_server import ISSUER, SigstoreServer
from .test_signature import Signed, copy, signed

__all__ = ["copy", "signed"]  # fixtures


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_sign_apply_verify(signed: Signed, copy: Path, tmp_path: Path) -> None:
    (copy / "model.sig").unlink()
    key = ("--public-key", signed.keys.public)
    assert "is not signed" in run("apply", copy, "-o", tmp_path / "out", "--base", signed.base, *key).output
    done = run("sign", copy, "--private-key", signed.keys.private)
    assert (done.exit_code, "signs 3 files" in done.output) == (0, True), done.output
    for required in ((), ("--require-signature",)):
        out = tmp_path / f"out{len(required)}"
        done = run("apply", copy, "-o", out, "--base", signed.base, *required, *key)
        assert done.exit_code == 0, done.output
        assert contents(out) == contents(signed.delta.parent / "tuned")
    done = run("verify", copy, "--signature", *key)
    assert "Signed by key " in done.output
    done = run("verify", copy, *key, "--json")
    assert json.loads(done.stdout)["signed_by"][0].startswith("key ")
    other = ("--public-key", signed.others.public)
    for command in (
        ("apply", copy, "-o", tmp_path / "no", "--base", signed.base, *other),
        ("apply", copy, "-o", tmp_path / "no", "--base", signed.base, *other, "--dry-run"),
        ("serve-folder", copy, "-o", tmp_path / "no", "--base", signed.base, *other),
        ("verify", copy, *other),
        ("plan", copy, "--base", signed.base, *other),
        ("compact", copy, "-o", tmp_path / "no", "--base", signed.base, *other),
    ):
        done = run(*command)
        assert (done.exit_code, "not signed as it must be" in done.output) == (1, True), done.output
    assert run("verify", copy, *other, *key).exit_code == 0  # one of them suffices
    assert not (tmp_path / "no").exists()


def test_jobs_of_a_batch(signed: Signed, copy: Path, tmp_path: Path) -> None:
    job = {"verb": "apply", "delta": str(copy), "base": str(signed.base)}
    jobs = [
        job | {"out": str(tmp_path / "yes"), "require_signature": str(signed.keys.public)},
        job | {"out": str(tmp_path / "no"), "require_signature": [str(signed.others.public)]},
        {"verb": "verify", "delta": str(copy), "require_signature": str(signed.others.public)},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in jobs))
    assert run("batch", tmp_path / "jobs.jsonl").exit_code == 1
    results = (tmp_path / "jobs.results.jsonl").read_text().splitlines()
    assert sorted("not signed as it must be" in line for line in results) == [False, True, True]
    assert contents(tmp_path / "yes") == contents(signed.delta.parent / "tuned")
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("no_pauses", "no_waiting")
def test_jobs_look_for_no_base_of_what_is_not_signed(
    hub: HubServer, signed: Signed, copy: Path, tmp_path: Path
) -> None:
    """The base is the one that a delta names: whoever wrote that."""
    commit = hub.add_repo("org/base", contents(signed.base))
    tuned = signed.delta.parent / "tuned"
    make_delta(signed.base, tuned, tmp_path / "d", base_repo="org/base", base_revision=commit)
    sign_delta(tmp_path / "d", KeySigner(signed.keys.private))
    job = {"verb": "apply", "delta": str(tmp_path / "d"), "out": str(tmp_path / "out")}
    for key, is_right in ((signed.others.public, False), (signed.keys.public, True)):
        jobs = tmp_path / f"{is_right}.jsonl"
        jobs.write_text(json.dumps(job | {"require_signature": str(key)}) + "\n")
        done = run("batch", jobs, "--cache", tmp_path / "cache")
        assert (done.exit_code == 0) == is_right, done.output
        assert bool(hub.requests("org/base")) == is_right


def test_attest(signed: Signed, copy: Path) -> None:
    statement = json.loads(run("attest", copy).stdout)
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    done = run("attest", copy, "--base", signed.base, "--private-key", signed.keys.private)
    assert (done.exit_code, "rebuilt and compared" in done.output) == (0, True), done.output
    key = ("--public-key", signed.keys.public)
    done = run("verify", copy, "--attestation", "--base", signed.base, *key)
    assert (done.exit_code, "who had rebuilt the target" in done.output) == (0, True), done.output
    assert "Signed by" not in done.output
    done = run("verify", copy, "--attestation", "--signature", *key)
    assert "Signed by" in done.output


def test_certificates_and_passwords(copy: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.certificate("maker\x1b[31m")
    chain = ("--certificate", certificate, "--certificate-chain", authority.root)
    done = run("sign", copy, "--private-key", key, *chain)
    assert done.exit_code == 0, done.output
    done = run("verify", copy, "--root-certificate", authority.root)
    assert "Signed by certificate of CN=maker" in done.output
    assert "\x1b" not in done.output  # from the certificate
    pair = write_pair(tmp_path, "secret", password="open sesame")  # noqa: S106
    env = {"DELTAWEIGHTS_KEY_PASSWORD": "open sesame"}
    assert run("sign", copy, "--private-key", pair.private).exit_code == 1
    done = CliRunner().invoke(app, ["sign", str(copy), "--private-key", str(pair.private)], env=env)
    assert done.exit_code == 0, done.output


def test_keyless(copy: Path, tmp_path: Path) -> None:
    with SigstoreServer() as server:
        config = server.write_trust(tmp_path / "trust.json")
        token = {"DELTAWEIGHTS_IDENTITY_TOKEN": server.token("maker@example.org")}
        command = [str(copy), "--sigstore", "--trust-config", str(config)]
        for verb in ("sign", "attest"):
            done = CliRunner().invoke(app, [verb, *command], env=token)
            assert done.exit_code == 0, done.output
    identity = ("--identity", "maker@example.org", "--trust-config", config)
    done = run("verify", copy, "--signature", "--attestation", *identity, "--identity-provider", ISSUER)
    assert "Signed by maker@example.org" in done.output
    done = run("verify", copy, *identity, "--identity-provider", "https://other.test")
    assert (done.exit_code, "OIDCIssuer does not match" in done.output) == (1, True), done.output


@pytest.mark.parametrize(
    "args",
    [
        ("sign", "delta"),
        ("sign", "delta", "--private-key", "k", "--sigstore"),
        ("sign", "delta", "--certificate", "c"),
        ("sign", "delta", "--private-key", "k", "--certificate-chain", "c"),
        ("attest", "delta", "--base", "base"),
        ("apply", "delta", "-o", "out", "--require-signature"),
        ("apply", "delta", "-o", "out", "--identity", "a@b.c"),
        ("verify", "delta", "--signature"),
        ("verify", "delta", "--attestation", "--identity-provider", "https://b.c"),
        ("verify", "delta", "--identity", "a@b.c", "--identity-provider", ""),
        ("apply", "delta", "-o", "out", "--identity", "", "--identity-provider", ""),
        ("apply", "delta", "-o", "out", "--trust-config", "t"),
        ("verify", "delta", "--public-key", "k", "--staging"),
        ("sign", "delta", "--private-key", "k", "--ambient"),
        ("sign", "delta", "--private-key", "k", "--trust-config", "t"),
        ("stream", "export", "s", "-o", "out", "--stream-name", "run"),
        ("stream", "import", "d", "s", "--base", "b", "--stream-name", "run"),
    ],
)
def test_wrong_usage(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


@pytest.mark.usefixtures("no_pauses", "no_waiting")
class TestPush:
    """A signature goes with its delta, and never with another one."""

    @pytest.fixture(autouse=True)
    def _user(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", hub.add_user("maker", orgs=["org"]))

    def test_a_signed_delta(self, hub: HubServer, signed: Signed, copy: Path, tmp_path: Path) -> None:
        (copy / "model.sig").unlink()
        assert "PATH_OF_THIS_DELTA" in (copy / "README.md").read_text()
        done = run("sign", copy, "--private-key", signed.keys.private, "--repo", "org/delta")
        assert done.exit_code == 0, done.output
        assert run("attest", copy, "--private-key", signed.keys.private).exit_code == 0
        report = push_delta(copy, "org/delta")
        assert {"model.sig", "attestation.sigstore.json"} <= set(report.uploaded)
        files = hub.files("org/delta")
        assert {path: files[path] for path in contents(copy)} == contents(copy)
        assert b"org/delta" in files["README.md"]
        assert push_delta(copy, "org/delta").uploaded == ()
        key = signed.keys.public
        assert verify_delta("org/delta", require_signature=key, require_attestation=key).ok
        apply_delta("org/delta", tmp_path / "out", base=signed.base, require_signature=key)

    def test_a_signature_of_something_else(self, hub: HubServer, signed: Signed, copy: Path) -> None:
        (copy / "README.md").write_text("Another page")
        with pytest.raises(SignatureError, match="page"):
            push_delta(copy, "org/delta")
        (copy / "model.sig").write_text("rubbish")
        with pytest.raises(SignatureError, match="damaged"):
            push_delta(copy, "org/delta")
        assert "org/delta" not in hub.repos

    def test_an_attestation_of_something_else(
        self, hub: HubServer, signed: Signed, copy: Path, tmp_path: Path
    ) -> None:
        write_safetensors(tmp_path / "later" / "model.safetensors", {"w": bf16(weights((2, 3), 5))})
        make_delta(signed.base, tmp_path / "later", tmp_path / "new")
        assert run("attest", copy, "--private-key", signed.keys.private).exit_code == 0
        shutil.copy(copy / ATTESTATION_NAME, tmp_path / "new")
        with pytest.raises(SignatureError, match="not of this delta"):
            push_delta(tmp_path / "new", "org/delta")
        assert "org/delta" not in hub.repos

    def test_an_earlier_deltas_signature_goes_away(
        self, hub: HubServer, signed: Signed, copy: Path, tmp_path: Path
    ) -> None:
        push_delta(copy, "org/delta")
        write_safetensors(tmp_path / "later" / "model.safetensors", {"w": bf16(weights((2, 3), 5))})
        make_delta(signed.base, tmp_path / "later", tmp_path / "unsigned")
        assert "model.sig" in push_delta(tmp_path / "unsigned", "org/delta").removed
        assert "model.sig" not in hub.files("org/delta")


def test_the_page_is_addressed_before_it_is_signed(signed: Signed, copy: Path) -> None:
    sign_delta(copy, KeySigner(signed.keys.private), repo_id="org/delta")
    assert "org/delta" in (copy / "README.md").read_text()
    assert verify_delta(copy, require_signature=signed.keys.public).ok
    assert run("sign", copy, "--private-key", signed.keys.private, "--repo", "nonsense").exit_code == 1
