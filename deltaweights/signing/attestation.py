"""A delta's attestation: the target's files are what these bytes of the base and these of the delta give.

It is an in-toto statement (version 1) with the predicate of SLSA provenance (version 1), made of the manifest
alone. So whoever has the manifest can make it again, and compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ..errors import SignatureError
from ..manifest import MANIFEST_NAME, BaseRecord, FileRecord, Manifest, TargetFile, TargetRecord
from ..storage import Source
from .bundle import SignatureBundle, damaged
from .extra import signing_libraries
from .signature import ATTESTATION_NAME, manifest_sha256, open_bundle
from .trust import SignatureRequirement, check_signer

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"

#: What was done: docs/trust.md describes the fields.
BUILD_TYPE = "urn:deltaweights:apply:1"

_HUB = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class Attested:
    """What an attestation says beside what the manifest says, too: who signed it, in words, and whether they
    had rebuilt the target before."""

    by: str
    is_rebuilt: bool


def provenance(manifest: Manifest, *, is_rebuilt: bool) -> dict[str, Any]:
    """The statement about a target, as JSON values.

    Args:
        is_rebuilt: whether whoever signs it rebuilt the target from base and delta, and compared it.
    """
    delta = FileRecord(MANIFEST_NAME, 0, manifest_sha256(manifest))
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(_descriptors(manifest.target.files, "", manifest.target)),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"delta": {"sha256": delta.sha256}},
                "internalParameters": {"targetRebuilt": is_rebuilt},
                "resolvedDependencies": [
                    *_descriptors(manifest.base.files, "base/", manifest.base),
                    *_descriptors((delta, *manifest.files), "delta/", None),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"pkg:pypi/{quote(manifest.tool.name, safe='')}",
                    "version": {manifest.tool.name: manifest.tool.version},
                }
            },
        },
    }


def _descriptors(
    files: tuple[FileRecord | TargetFile, ...] | tuple[FileRecord, ...] | tuple[TargetFile, ...],
    folder: str,
    record: BaseRecord | TargetRecord | None,
) -> Iterator[dict[str, Any]]:
    """Resource descriptors of files, with their addresses where a repository and its commit are known."""
    for file in files:
        found: dict[str, Any] = {"name": f"{folder}{file.path}", "digest": {"sha256": file.sha256}}
        if record is not None and record.repo_id and record.revision:
            found["uri"] = f"{_HUB}{record.repo_id}/resolve/{quote(record.revision)}/{quote(file.path)}"
        yield found


def as_statement(document: dict[str, Any]) -> Any:
    """The statement of ``in_toto_attestation`` with these JSON values."""
    with signing_libraries():
        from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
        from in_toto_attestation.v1.statement import Statement
    subjects = [ResourceDescriptor(**one).pb for one in document["subject"]]
    return Statement(subjects, document["predicateType"], document["predicate"])


def require_attested(source: Source, manifest: Manifest, requirement: SignatureRequirement) -> Attested:
    """Check the attestation of the delta at ``source``: who signed it, and that it is the one that its
    manifest leads to.

    Raises:
        SignatureError: there is none, it is damaged, by somebody else, or of another delta.
        SigningError: a key cannot be read, or a library is missing.
    """
    bundle = open_bundle(source, ATTESTATION_NAME)
    by = check_signer(bundle, requirement)
    return Attested(by, states_rebuilt(bundle, source, manifest))


def states_rebuilt(bundle: SignatureBundle, source: Source, manifest: Manifest) -> bool:
    """Whether the attestation of the delta at ``source`` says that its target was rebuilt. Who signed it is
    not asked.

    Raises:
        SignatureError: it is of another delta than the one with this manifest.
    """
    try:
        found = json.loads(bundle.payload)
    except (ValueError, RecursionError) as error:
        raise damaged(bundle.where, f"What it signs is no JSON: {error}") from error
    for is_rebuilt in (True, False):
        if found == provenance(manifest, is_rebuilt=is_rebuilt):
            return is_rebuilt
    raise SignatureError(
        f"{bundle.where} is not of this delta",
        f"It states something else than that {source.where} and its base give the target.",
        "Get the delta again, with its attestation; whoever changed it has to attest it anew.",
    )
