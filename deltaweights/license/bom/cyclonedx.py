"""CycloneDX 1.7, as JSON."""

from __future__ import annotations

from cyclonedx.model import (
    AttachedText,
    ExternalReference,
    ExternalReferenceType,
    HashAlgorithm,
    HashType,
    Property,
    XsUri,
)
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import (
    Component,
    ComponentType,
    Diff,
    Patch,
    PatchClassification,
    Pedigree,
)
from cyclonedx.model.license import LicenseAcknowledgement, LicenseExpression, LicenseExpressionDetails
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot7
from packageurl import PackageURL

from ..._version import __version__
from ...manifest import FileRecord
from .facts import BomPart, Facts, LicenseFacts


def write_cyclonedx(facts: Facts) -> str:
    """Write the document: its subject is the target, with the base as its ancestor and the delta as the patch
    between them."""
    target = _component(facts.target, ComponentType.MACHINE_LEARNING_MODEL)
    base = _component(facts.base, ComponentType.MACHINE_LEARNING_MODEL)
    delta = _component(facts.delta, ComponentType.DATA)
    delta.description = f"What the target adds to the base, made by {facts.maker}"
    if facts.attestation:
        delta.external_references.add(_attestation(facts.attestation))
    link = XsUri.make_bom_link(facts.document, bom_ref=delta.bom_ref)
    target.pedigree = Pedigree(
        ancestors=[base],
        patches=[Patch(type=PatchClassification.UNOFFICIAL, diff=Diff(url=link))],
        notes="The base and the delta together give the target's files, byte for byte.",
    )
    tool = Component(
        type=ComponentType.APPLICATION, name="deltaweights", version=__version__, bom_ref="deltaweights"
    )
    bom = Bom(
        serial_number=facts.document,
        metadata=BomMetaData(
            component=target, timestamp=facts.created, tools=ToolRepository(components=[tool])
        ),
        components=[delta],
    )
    bom.register_dependency(target, [delta])
    return JsonV1Dot7(bom).output_as_string(indent=2) + "\n"


def _attestation(file: FileRecord) -> ExternalReference:
    """Where the delta's provenance is, in the delta's folder."""
    return ExternalReference(
        type=ExternalReferenceType.ATTESTATION,
        url=XsUri(file.path),
        comment="SLSA provenance of the target, in a Sigstore bundle beside the delta's files",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
    )


def _component(part: BomPart, type: ComponentType) -> Component:
    place = (
        [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(part.url))] if part.url else []
    )
    return Component(
        type=type,
        bom_ref=part.kind,
        group=part.owner,
        name=part.name.rpartition("/")[2],
        version=part.revision,
        purl=PackageURL.from_string(part.purl) if part.purl else None,
        licenses=[_license(part, part.concluded)] if part.concluded else None,
        copyright=part.notice,
        external_references=place,
        properties=_properties(part),
        components=[_file(file, part) for file in part.files],
    )


def _license(part: BomPart, license: LicenseFacts) -> LicenseExpression:
    known = LicenseAcknowledgement
    return LicenseExpression(
        license.expression,
        acknowledgement=known.DECLARED if license is part.declared else known.CONCLUDED,
        details=[
            LicenseExpressionDetails(
                one.spdx,
                text=AttachedText(content=license.texts[one.spdx]) if one.spdx in license.texts else None,
                url=XsUri(one.source) if one.source else None,
            )
            for one in license.terms
        ],
    )


def _properties(part: BomPart) -> list[Property]:
    """The facts that the format has no field for."""
    found = [("conflict", text) for text in part.conflicts]
    if part.declared and part.declared.stated:
        found.append(("license:stated", part.declared.stated))
    if part.concluded:
        found += [("license:obligation", text) for text in part.concluded.obligations]
    return [Property(name=f"deltaweights:{name}", value=value) for name, value in found]


def _file(file: FileRecord, part: BomPart) -> Component:
    return Component(
        type=ComponentType.FILE,
        bom_ref=f"{part.kind}/{file.path}",
        name=file.path,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
    )
