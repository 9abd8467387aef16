"""The commands that sign and attest, and the options that say who signs or must have signed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..words import counted, plain
from .options import BaseOption, Debug, Json, Quiet, Threads, Verbose
from .session import working
from .usage import UsageError

if TYPE_CHECKING:
    from ..signing.signers import Signer
    from ..signing.trust import SignatureRequirement, Trusted

#: The panels of these options.
SIGNED, SIGNER = "Who must have signed", "Who signs"

RequireSignature = Annotated[
    bool,
    typer.Option(
        "--require-signature", help="Refuse a delta that is not signed as follows.", rich_help_panel=SIGNED
    ),
]
PublicKey = Annotated[
    list[str] | None,
    typer.Option(
        "--public-key",
        metavar="PEM",
        help="The signer's public key. May be given several times: one of them suffices.",
        rich_help_panel=SIGNED,
    ),
]
RootCertificate = Annotated[
    list[str] | None,
    typer.Option(
        "--root-certificate",
        metavar="PEM",
        help="A root of the signer's certificate, or one between. May be given several times.",
        rich_help_panel=SIGNED,
    ),
]
Identity = Annotated[
    str | None,
    typer.Option(
        "--identity", metavar="NAME", help="The signer's identity at Sigstore.", rich_help_panel=SIGNED
    ),
]
IdentityProvider = Annotated[
    str | None,
    typer.Option(
        "--identity-provider",
        metavar="URL",
        help="Who vouched for that identity, such as https://accounts.google.com.",
        rich_help_panel=SIGNED,
    ),
]
TrustConfig = Annotated[
    str | None,
    typer.Option(
        "--trust-config",
        metavar="FILE",
        help="Servers and keys of another Sigstore than the public one.",
    ),
]
Staging = Annotated[bool, typer.Option("--staging", help="Use Sigstore's servers for tests.")]

StreamName = Annotated[
    str | None,
    typer.Option(
        "--stream-name",
        metavar="NAME",
        help="The stream's name, which is signed, too.",
    ),
]

SignerKey = Annotated[
    str | None,
    typer.Option("--private-key", metavar="PEM", help="The private key.", rich_help_panel=SIGNER),
]
Password = Annotated[
    str | None,
    typer.Option(
        "--password",
        envvar="DELTAWEIGHTS_KEY_PASSWORD",
        show_envvar=True,
        metavar="TEXT",
        help="The private key's password; better in the environment.",
        rich_help_panel=SIGNER,
    ),
]
SignerCertificate = Annotated[
    str | None,
    typer.Option("--certificate", metavar="PEM", help="The key's certificate.", rich_help_panel=SIGNER),
]
CertificateChain = Annotated[
    list[str] | None,
    typer.Option(
        "--certificate-chain",
        metavar="PEM",
        help="The certificates from there up to the root. May be given several times.",
        rich_help_panel=SIGNER,
    ),
]
Pkcs11 = Annotated[
    str | None,
    typer.Option(
        "--pkcs11",
        metavar="URI",
        help="The key in a token, by its PKCS #11 URI.",
        rich_help_panel=SIGNER,
    ),
]
Sigstore = Annotated[
    bool,
    typer.Option("--sigstore", help="Sign as yourself, through Sigstore's servers.", rich_help_panel=SIGNER),
]
IdentityToken = Annotated[
    str | None,
    typer.Option(
        "--identity-token",
        envvar="DELTAWEIGHTS_IDENTITY_TOKEN",
        show_envvar=True,
        metavar="TOKEN",
        help="An OpenID Connect token for --sigstore, instead of a browser.",
        rich_help_panel=SIGNER,
    ),
]
Ambient = Annotated[
    bool,
    typer.Option(
        "--ambient", help="Take the token for --sigstore that a CI system provides.", rich_help_panel=SIGNER
    ),
]


def requirement_of(
    public_key: Sequence[str] | None,
    root_certificate: Sequence[str] | None,
    identity: str | None,
    identity_provider: str | None,
    trust_config: str | None,
    staging: bool,
    *,
    is_required: bool,
) -> SignatureRequirement | None:
    """Who must have signed, as the options say; None: they say nothing. Naming somebody is requiring it.

    Raises:
        UsageError: a signature is required and nobody named, an identity without who vouches for it, or
            which Sigstore without an identity.
    """
    from ..signing.trust import TrustedCertificates, TrustedIdentity, TrustedKey

    found: list[Trusted] = [TrustedKey(path) for path in public_key or ()]
    if root_certificate:
        found.append(TrustedCertificates(tuple(root_certificate)))
    if bool(identity) != bool(identity_provider) or "" in (identity, identity_provider):
        raise UsageError("--identity and --identity-provider go together, and neither is empty.")
    if (trust_config is not None or staging) and not identity:
        raise UsageError("--trust-config and --staging go with --identity.")
    if identity and identity_provider:
        found.append(TrustedIdentity(identity, identity_provider, trust_config, staging))
    if not found and is_required:
        raise UsageError("Name who must have signed: --public-key, --root-certificate or --identity.")
    return found or None


def signer_of(
    private_key: str | None,
    password: str | None,
    certificate: str | None,
    certificate_chain: Sequence[str] | None,
    pkcs11: str | None,
    sigstore: bool,
    identity_token: str | None,
    ambient: bool,
    trust_config: str | None,
    staging: bool,
) -> Signer | None:
    """Who signs, as the options say; None: they say nothing.

    Raises:
        UsageError: they name several, a certificate without its key, or what another kind of signer needs.
    """
    from ..signing.signers import CertificateSigner, KeySigner, Pkcs11Signer, SigstoreSigner

    if sum((private_key is not None, pkcs11 is not None, sigstore)) > 1:
        raise UsageError("Name one signer: --private-key, --pkcs11 or --sigstore.")
    if (certificate or certificate_chain) and private_key is None and pkcs11 is None:
        raise UsageError("--certificate goes with --private-key or --pkcs11.")
    if certificate_chain and certificate is None:
        raise UsageError("--certificate-chain goes with --certificate.")
    if (ambient or staging or trust_config is not None) and not sigstore:
        raise UsageError("--ambient, --trust-config and --staging go with --sigstore.")
    if private_key is not None and certificate is not None:
        return CertificateSigner(private_key, certificate, tuple(certificate_chain or ()))
    if private_key is not None:
        return KeySigner(private_key, password)
    if pkcs11 is not None:
        return Pkcs11Signer(pkcs11, certificate, tuple(certificate_chain or ()))
    return SigstoreSigner(identity_token, ambient, trust_config, staging) if sigstore else None


def sign(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta, a folder.")],
    private_key: SignerKey = None,
    password: Password = None,
    certificate: SignerCertificate = None,
    certificate_chain: CertificateChain = None,
    pkcs11: Pkcs11 = None,
    sigstore: Sigstore = False,
    identity_token: IdentityToken = None,
    ambient: Ambient = False,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    repo: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Where it will be on the Hub: its page says so, and is signed."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Check DELTA and sign it: every file by SHA-256, in its file model.sig. Needs the extra `sign`.

    deltaweights sign delta --private-key key.pem
    deltaweights sign delta --private-key key.pem --repo your-name/model-delta
    deltaweights sign delta --sigstore
    """
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..sign import sign_delta

        signer = signer_of(
            private_key, password, certificate, certificate_chain, pkcs11, sigstore, identity_token, ambient,
            trust_config, staging,
        )  # fmt: skip
        if signer is None:
            raise UsageError("Name who signs: --private-key, --pkcs11 or --sigstore.")
        with work.progress() as shown:
            done = sign_delta(delta, signer, repo_id=repo, threads=threads, progress=shown)
    lines = [plain(f"{done.signature} signs {counted(done.files, 'file')}")]
    work.report(asdict(done), lines, with_costs=True)


def attest(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta, a folder.")],
    base: BaseOption = None,
    private_key: SignerKey = None,
    password: Password = None,
    certificate: SignerCertificate = None,
    certificate_chain: CertificateChain = None,
    pkcs11: Pkcs11 = None,
    sigstore: Sigstore = False,
    identity_token: IdentityToken = None,
    ambient: Ambient = False,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """State, signed, that DELTA and its base give the target; with --base rebuild it first.

    Without a signer, print the statement, for another program to sign. Needs the extra `sign`.

    deltaweights attest delta --base ./base --private-key key.pem
    deltaweights attest delta > statement.json
    """
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..attest import attest_delta, statement_of

        signer = signer_of(
            private_key, password, certificate, certificate_chain, pkcs11, sigstore, identity_token, ambient,
            trust_config, staging,
        )  # fmt: skip
        if signer is None and base is not None:
            raise UsageError("Name who signs: --private-key, --pkcs11 or --sigstore.")
        if signer is None:
            typer.echo(statement_of(delta), nl=False)
            return
        with work.progress() as shown:
            done = attest_delta(delta, signer, base=base, threads=threads, progress=shown)
    how = "rebuilt and compared" if done.rebuilt else "as the manifest has them"
    line = f"{done.attestation} states where {counted(done.subjects, 'file')} come from, {how}"
    work.report(asdict(done), [plain(line)], with_costs=True)
