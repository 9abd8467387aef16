"""Signs a delta: its manifest, and so every file, by SHA-256; as OpenSSF's model-signing signs a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .card import address_card
from .delta.opening import read_manifest
from .errors import DeltaError, OutputError, SigningError
from .license.cards import CARD_NAME
from .manifest import MANIFEST_NAME, Manifest
from .metrics import timed_operation
from .signing import SIGNATURE_NAME, UNSIGNED_NAMES, Signer, manifest_sha256, signing_by
from .signing.statement import folder_statement
from .storage import LocalSource, Location, OutputFolder, is_clutter, output_path, sha256_of
from .storage.hub_upload import require_repo_id
from .verify import verify_delta
from .workers import ProgressCallback

_log = logging.getLogger(__name__)

#: What programs put beside a delta's files. It may be there or not: nobody reads it.
_NEVER_SIGNED = (*UNSIGNED_NAMES, ".cache", ".deltaweights")


@dataclass(frozen=True, slots=True)
class SignReport:
    """The result of :func:`sign_delta`.

    Attributes:
        signature: the path of the signature's file.
        files: how many files it covers.
    """

    signature: str
    files: int


@timed_operation("sign")
def sign_delta(
    delta: Location,
    signer: Signer,
    *,
    repo_id: str | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> SignReport:
    """Sign a delta in a folder: its files are compared with its manifest, then all of them are signed.

    The signature is a file of the folder, ``model.sig``, in place of any earlier one. `model_signing verify`
    takes it, too. What belongs to Git, and caches and attestations, are not part of what is signed.

    Args:
        delta: the folder.
        signer: who signs: a :class:`KeySigner`, :class:`CertificateSigner`, :class:`Pkcs11Signer` or
            :class:`SigstoreSigner`.
        repo_id: the repository on the Hub where the delta will be, ``org/name``: its page says so, and is
            signed like that. ``push`` leaves a signed page as it is.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("verify delta"), bytes done and total bytes.

    Raises:
        CheckpointError: there is no such folder.
        DeltaError: the delta is not whole, or other files are in its folder.
        OutputError: the folder cannot be written to.
        SigningError: there is no such key, it does not fit, or a library is missing.
    """
    folder = output_path(delta)
    _refuse_links(folder)
    with signing_by(signer) as sign:
        if repo_id is not None:
            _address(folder, repo_id)
        manifest = require_sound(folder, threads, progress)
        with LocalSource(folder) as source:
            digests = {MANIFEST_NAME: manifest_sha256(manifest)}
            digests |= {record.path: record.sha256 for record in manifest.files}
            if CARD_NAME in source.sizes:
                digests[CARD_NAME] = sha256_of(source.blocks(CARD_NAME))
            ignored = {*_NEVER_SIGNED, *(path.rstrip("/") for path in source.left_out), *_clutter(source)}
        _log.info("signing %s: %d files", folder, len(digests))
        statement = folder_statement(folder.absolute().name, digests, ignored)
        write_beside(folder, SIGNATURE_NAME, sign(statement))
    return SignReport(str(folder / SIGNATURE_NAME), len(digests))


def require_sound(folder: Path, threads: int | None, progress: ProgressCallback | None) -> Manifest:
    """The manifest of a delta whose folder has its files, each with its SHA-256, and no others.

    Raises:
        DeltaError: it does not.
    """
    with LocalSource(folder) as source:  # a path, though it may look like a Hub id
        manifest = read_manifest(source)
    report = verify_delta(folder.absolute(), threads=threads, progress=progress)
    if report.problems:
        first = report.problems[0]
        more = f", and {len(report.problems) - 1} more" if report.problems[1:] else ""
        raise DeltaError(
            f"{folder} is not what its manifest says",
            f"{first.path}: {first.kind}: {first.detail}{more}.",
            "Remove what is no part of the delta, or run the diff again.",
        )
    return manifest


def write_beside(folder: Path, name: str, content: bytes) -> None:
    """Write a file into a delta's folder, in place of an earlier one."""
    with OutputFolder(folder) as output, output.create(name) as file:
        file.write_blocks([content])
        file.commit()


def _refuse_links(folder: Path) -> None:
    """Raise :class:`SigningError` where a file is a symbolic link, as in a Hub cache: model-signing would not
    verify it."""
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (path := Path(here, name)).is_symlink():
                raise SigningError(
                    f"{folder} cannot be signed", f"{path} is a symbolic link.", "Sign a copy of the folder."
                )


def _address(folder: Path, repo_id: str) -> None:
    """Let the delta's page say where it will be."""
    require_repo_id(repo_id)
    try:
        card = (folder / CARD_NAME).read_bytes()
    except OSError as error:
        raise OutputError(f"{folder} has no page", f"{CARD_NAME}: {error.strerror}.") from error
    addressed = address_card(card, repo_id)
    if addressed != card:
        write_beside(folder, CARD_NAME, addressed)


def _clutter(source: LocalSource) -> Iterator[str]:
    return (path for path in source.sizes if is_clutter(path))
