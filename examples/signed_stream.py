"""A weight stream that only its own trainer can write: signed heads, a change of keys, an old head refused.

Needs the extras ``torch`` and ``sign``.
"""

import shutil
import tempfile
from pathlib import Path

import model_signing  # noqa: F401  the extra `sign`
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deltaweights import KeySigner, SignatureError
from deltaweights.torch import DeltaPublisher, DeltaSubscriber


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, as ``openssl genpkey -algorithm ed25519`` makes them."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def train(model: torch.nn.Linear, step: int) -> None:
    with torch.no_grad():
        model.weight[step] += 0.01


def main(folder: Path) -> None:
    old, old_public = make_keys(folder, "old")
    new, new_public = make_keys(folder, "new")
    stream = folder / "stream"
    trained, serving = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    # The engine knows the next key before the trainer uses it.
    subscriber = DeltaSubscriber(stream, require_signature=[old_public, new_public], stream_name="run-7")
    for step, signers in enumerate(([old], [old, new], [new]), 1):
        signer = [KeySigner(path) for path in signers]
        with DeltaPublisher(stream, trained, signer=signer, stream_name="run-7") as publisher:
            train(trained, step)
            publisher.publish(step, trained)
        report = subscriber.sync(serving)
        print(f"step {report.step}: signed by {' and '.join(path.stem for path in signers)}, taken")
        if step == 1:
            shutil.copy(stream / "head.json", folder / "an-old-head.json")
    print(f"the same weights: {torch.equal(trained.weight, serving.weight)}")

    # Who can write to the stream's place can put an old head there. It was signed once; it is refused now.
    shutil.copy(folder / "an-old-head.json", stream / "head.json")
    try:
        subscriber.sync(serving)
    except SignatureError as error:
        print(error.why)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
