"""A delta that is signed and attested, and users that take nothing else. Needs the extra ``sign``."""

import shutil
import tempfile
from pathlib import Path

import model_signing  # noqa: F401  the extra `sign`
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from safetensors.numpy import save_file

from deltaweights import (
    KeySigner,
    SignatureError,
    apply_delta,
    attest_delta,
    make_delta,
    sign_delta,
    verify_delta,
)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key, as ``openssl ecparam -name prime256v1 -genkey`` makes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "maker.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (256, 256))
    for name, change in (("base", 0.0), ("tuned", 2e-5)):
        (folder / name).mkdir()
        tensor = (weight + rng.normal(0, 1, weight.shape) * change).astype(np.float16)
        save_file({"layer.weight": tensor}, folder / name / "model.safetensors")
    private, public = make_keys(folder)

    # The publisher.
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    attest_delta(folder / "delta", KeySigner(private), base=folder / "base")
    report = sign_delta(folder / "delta", KeySigner(private))
    print(f"signed: {report.files} files")

    # A user, who got the public key some other way.
    found = verify_delta(
        folder / "delta", base=folder / "base", require_signature=public, require_attestation=public
    )
    print(f"verified: {found.ok}; its signer had rebuilt it: {found.attested_rebuilt}")
    apply_delta(folder / "delta", folder / "rebuilt", base=folder / "base", require_signature=public)

    # Somebody puts another delta into its place, whole in itself.
    save_file({"layer.weight": np.zeros((256, 256), np.float16)}, folder / "tuned" / "model.safetensors")
    make_delta(folder / "base", folder / "tuned", folder / "forged")
    shutil.copy(folder / "delta" / "model.sig", folder / "forged")
    try:
        apply_delta(folder / "forged", folder / "never", base=folder / "base", require_signature=public)
    except SignatureError as error:
        print(error.why)
    print(f"something was written: {(folder / 'never').exists()}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
