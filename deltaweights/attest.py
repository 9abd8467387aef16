"""Attests a delta: a signed statement that base and delta give the target, each file by its SHA-256."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .delta.chain import open_recipe
from .delta.opening import read_manifest
from .errors import DeltaError
from .metrics import timed_operation
from .sign import require_sound, write_beside
from .signing import ATTESTATION_NAME, Signer, signing_by
from .signing.attestation import as_statement, provenance
from .storage import Location, Readable, open_source, output_path
from .verify import Problem, compare_materials, verify_delta
from .workers import ProgressCallback, Workers

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttestReport:
    """The result of :func:`attest_delta`.

    Attributes:
        attestation: the path of its file.
        subjects: how many files of the target it is about.
        materials: how many files of base and delta they come from.
        rebuilt: whether the target was rebuilt and compared before.
    """

    attestation: str
    subjects: int
    materials: int
    rebuilt: bool


def statement_of(delta: Location, *, rebuilt: bool = False) -> bytes:
    """What :func:`attest_delta` would sign, as JSON, for another program to sign. Reads the manifest only.

    Args:
        rebuilt: state that whoever signs it has rebuilt the target, and compared it.

    Raises:
        CheckpointError: there is nothing at ``delta``, or it cannot be read.
        DeltaError: its manifest is damaged.
    """
    with open_source(delta) as source:
        document = provenance(read_manifest(source), is_rebuilt=rebuilt)
    return json.dumps(document, indent=2).encode() + b"\n"


@timed_operation("attest")
def attest_delta(
    delta: Location,
    signer: Signer,
    *,
    base: Readable | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> AttestReport:
    """State that a delta in a folder and its base give the target, all by SHA-256, and sign that.

    The statement is SLSA provenance (version 1) in an in-toto statement: the target's files are its subjects,
    those of base and delta its materials. It is a file of the folder, ``attestation.sigstore.json``, in place
    of any earlier one: a Sigstore bundle, with the statement in a DSSE envelope.

    Args:
        delta: the folder. Its files are compared with its manifest first.
        signer: as for :func:`sign_delta`.
        base: if given, the target is rebuilt from it in memory first, and the SHA-256 of every file compared,
            also of the base's own; the statement says that this was done. Else it says what the delta's
            manifest says.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("verify delta", "check base", "rebuild", "verify base"), bytes done and
            total bytes.

    Raises:
        CheckpointError: there is no such folder or base.
        BaseMismatchError: it is another base.
        DeltaError: the delta is not whole, or does not give the target.
        OutputError: the folder cannot be written to.
        SigningError: there is no such key, it does not fit, or a library is missing.
    """
    folder = output_path(delta)
    with signing_by(signer) as sign:
        manifest = require_sound(folder, threads, progress)
        if base is not None:
            _rebuild(folder, base, threads, progress)
        document = provenance(manifest, is_rebuilt=base is not None)
        _log.info("attesting %s: %d files of the target", folder, len(document["subject"]))
        write_beside(folder, ATTESTATION_NAME, sign(as_statement(document)))
    materials = len(document["predicate"]["buildDefinition"]["resolvedDependencies"])
    return AttestReport(str(folder / ATTESTATION_NAME), len(document["subject"]), materials, base is not None)


def _rebuild(folder: Path, base: Readable, threads: int | None, progress: ProgressCallback | None) -> None:
    """Raise :class:`DeltaError` unless the delta in the folder and this base give the target, and the base's
    files are those that the statement names."""
    wrong: Sequence[Problem] = verify_delta(
        folder.absolute(), base=base, threads=threads, progress=progress
    ).problems
    if not wrong:
        with open_recipe(folder.absolute(), base) as target, Workers(threads) as workers:
            workers.at_stop(target.cancel)
            wrong, _ = compare_materials(target, workers, None, progress)
    if wrong:
        raise DeltaError(
            f"{folder} and this base do not give the target",
            f"{wrong[0].path}: {wrong[0].kind}: {wrong[0].detail}.",
            "Run the diff again.",
        )
