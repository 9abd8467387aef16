"""SPDX 3.0.1, as JSON-LD."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, TypeVar

from spdx_python_model import v3_0_1 as spdx

from ..._version import __version__
from ...manifest import FileRecord
from ..table import Terms
from .facts import BomPart, Facts, LicenseFacts

_E = TypeVar("_E", bound=spdx.Element)

_PROFILES = [
    spdx.ProfileIdentifierType.core,
    spdx.ProfileIdentifierType.simpleLicensing,
    spdx.ProfileIdentifierType.software,
]


def write_spdx(facts: Facts) -> str:
    """Write the document: the target descends from the base, which is patched by the delta.

    The profile ``ai`` is not claimed, since it requires the model's release date, which a delta does not
    record.
    """
    document = _Document(facts)
    target = document.add_model(facts.target)
    base = document.add_model(facts.base)
    delta = document.add_delta(facts)
    document.relate("target", spdx.RelationshipType.descendantOf, [base])
    document.relate("base", spdx.RelationshipType.patchedBy, [delta])
    return document.to_json(target)


def _attestation(file: FileRecord) -> spdx.ExternalRef:
    """Where the delta's provenance is, in the delta's folder."""
    return spdx.ExternalRef(
        externalRefType=spdx.ExternalRefType.buildMeta,
        locator=[file.path],
        contentType="application/vnd.dev.sigstore.bundle.v0.3+json",
        comment=f"SLSA provenance of the target; SHA-256 {file.sha256}",
    )


class _Document:
    """Elements that share one creation info, with ids under the document's."""

    def __init__(self, facts: Facts) -> None:
        self._id = f"https://spdx.org/spdxdocs/deltaweights-{facts.document}"
        self._elements: dict[str, spdx.Element] = {}
        self._made = spdx.CreationInfo(specVersion="3.0.1", created=facts.created)
        self._made.createdBy = [self._add(spdx.SoftwareAgent, "maker", name=f"deltaweights {__version__}")]

    def _add(self, cls: type[_E], key: str, **properties: Any) -> _E:
        """The element with this key. A new one is made from the properties that are not None."""
        if key not in self._elements:
            known = {name: value for name, value in properties.items() if value is not None}
            self._elements[key] = cls(spdxId=f"{self._id}#{key}", creationInfo=self._made, **known)
        element = self._elements[key]
        assert isinstance(element, cls)
        return element

    def relate(self, key: str, type: str, targets: Sequence[spdx.Element | str]) -> None:
        """Add a relationship of this type from the element with this key; at most one."""
        self._add(
            spdx.Relationship,
            f"{key}-{type.rpartition('/')[2]}",
            from_=self._elements[key],
            relationshipType=type,
            to=list(targets),
        )

    def add_model(self, part: BomPart) -> spdx.ai_AIPackage:
        """Add a base or target, with its owner, files and licenses."""
        owner = self._add(spdx.Agent, f"owner-{part.owner}", name=part.owner) if part.owner else None
        model = self._add(
            spdx.ai_AIPackage,
            part.kind,
            name=part.name,
            comment="\n".join(part.conflicts) or None,
            suppliedBy=owner,
            software_primaryPurpose=spdx.software_SoftwarePurpose.model,
            software_packageVersion=part.revision,
            software_packageUrl=part.purl,
            software_downloadLocation=part.url,
            software_attributionText=[part.notice] if part.notice else None,
        )
        self._add_files(part)
        self._add_licenses(part)
        return model

    def add_delta(self, facts: Facts) -> spdx.software_Package:
        """Add the delta, with its files and licenses."""
        delta = self._add(
            spdx.software_Package,
            "delta",
            name="delta",
            summary="What the target adds to the base. Together they give the target's files, byte for byte.",
            software_primaryPurpose=spdx.software_SoftwarePurpose.patch,
            software_sourceInfo=f"Made by {facts.maker}.",
            software_attributionText=[facts.delta.notice] if facts.delta.notice else None,
            externalRef=[_attestation(facts.attestation)] if facts.attestation else None,
        )
        self._add_files(facts.delta)
        self._add_licenses(facts.delta)
        return delta

    def _add_files(self, part: BomPart) -> None:
        files = [
            self._add(
                spdx.software_File,
                f"{part.kind}-file-{number}",
                name=file.path,
                verifiedUsing=[spdx.Hash(algorithm=spdx.HashAlgorithm.sha256, hashValue=file.sha256)],
            )
            for number, file in enumerate(part.files)
        ]
        if files:
            self.relate(part.kind, spdx.RelationshipType.contains, files)

    def _add_licenses(self, part: BomPart) -> None:
        """Add one license of each kind, even an unknown one, as the profile ``ai`` requires."""
        unknown = spdx.expandedlicensing_IndividualLicensingInfo.NoAssertionLicense
        declared = self._license(f"{part.kind}-license", part.declared) if part.declared else unknown
        concluded = declared
        if part.concluded is not part.declared:
            concluded = self._license("license", part.concluded) if part.concluded else unknown
        self.relate(part.kind, spdx.RelationshipType.hasDeclaredLicense, [declared])
        self.relate(part.kind, spdx.RelationshipType.hasConcludedLicense, [concluded])

    def _license(self, key: str, license: LicenseFacts) -> spdx.Element | str:
        """The expression, with the text of every license in it that SPDX does not list."""
        texts = [
            spdx.DictionaryEntry(key=one.spdx, value=self._text(one, license).spdxId)
            for one in license.terms
            if one.spdx.startswith("LicenseRef-")
        ]
        return self._add(
            spdx.simplelicensing_LicenseExpression,
            key,
            name=license.stated or None,
            description="\n".join(("Listed, not legal advice:", *license.obligations)),
            simplelicensing_licenseExpression=license.expression,
            simplelicensing_customIdToUri=texts,
        )

    def _text(self, terms: Terms, license: LicenseFacts) -> spdx.simplelicensing_SimpleLicensingText:
        source = f" It was published at {terms.source}" if terms.source else ""
        text = license.texts.get(terms.spdx, f"The text is not in the delta.{source}")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._add(
            spdx.simplelicensing_SimpleLicensingText,
            f"{terms.spdx}-{digest}",
            name=terms.name,
            simplelicensing_licenseText=text,
        )

    def to_json(self, root: spdx.Element) -> str:
        """The document, a bill of materials about ``root``."""
        name = f"Bill of materials of {root.name}"
        elements = list(self._elements.values())
        bom = self._add(
            spdx.software_Sbom,
            "bom",
            name=name,
            rootElement=[root],
            element=elements,
            profileConformance=_PROFILES,
        )
        document = spdx.SpdxDocument(
            spdxId=self._id,
            name=name,
            creationInfo=self._made,
            rootElement=[bom],
            element=[bom, *elements],
            profileConformance=_PROFILES,
        )
        buffer = io.BytesIO()
        spdx.JSONLDSerializer().write(spdx.SHACLObjectSet([document, bom, *elements]), buffer, indent=2)
        return buffer.getvalue().decode() + "\n"
