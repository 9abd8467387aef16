"""The facts in a bill of materials, for any format."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ..._version import __version__
from ...errors import DeltaError, DeltaWeightsError
from ...manifest import MANIFEST_NAME, BaseRecord, DeltaLicense, FileRecord, License, Manifest, TargetRecord
from ...signing import ATTESTATION_NAME
from ...signing.bundle import MAX_BUNDLE_BYTES
from ...storage import Source, sha256_of
from ..rules import recognize, terms_of
from ..table import Terms

#: Files, obligations and conflicts. The library for CycloneDX compares every file with every other one.
MAX_ENTRIES = 10_000

#: Bounded, since each license may repeat each text.
MAX_LICENSES = 32

#: Of the license texts of one side.
MAX_TEXT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class LicenseFacts:
    """The license of a part. ``stated`` quotes the model card; ``texts`` maps SPDX ids to the texts that the
    delta has."""

    terms: tuple[Terms, ...]
    texts: Mapping[str, str]
    obligations: tuple[str, ...]
    stated: str = ""

    @property
    def expression(self) -> str:
        """The license as an SPDX expression."""
        return " AND ".join(one.spdx for one in self.terms)


@dataclass(frozen=True, slots=True)
class BomPart:
    """The base, the target or the delta.

    ``declared`` is its own stated license, ``concluded`` its license together with the base's, ``conflicts``
    the conflicts between them.
    """

    kind: Literal["base", "target", "delta"]
    files: tuple[FileRecord, ...]
    repo_id: str | None = None
    revision: str | None = None
    declared: LicenseFacts | None = None
    concluded: LicenseFacts | None = None
    notice: str | None = None
    conflicts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The Hub id, or else "base", "target" or "delta"."""
        return self.repo_id or self.kind

    @property
    def owner(self) -> str | None:
        """The user or organization that owns its repository."""
        return self.repo_id.rpartition("/")[0] or None if self.repo_id else None

    @property
    def commit(self) -> str | None:
        """The revision, if it is a commit."""
        return self.revision if re.fullmatch(r"[0-9a-f]{40}", self.revision or "") else None

    @property
    def purl(self) -> str | None:
        """The package URL. The characters of a Hub id need no escapes in it."""
        commit = f"@{self.commit}" if self.commit else ""
        return f"pkg:huggingface/{self.repo_id}{commit}" if self.repo_id else None

    @property
    def url(self) -> str | None:
        """The page on the Hub."""
        commit = f"/tree/{self.commit}" if self.commit else ""
        return f"https://huggingface.co/{self.repo_id}{commit}" if self.repo_id else None


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts. ``document`` is the id of a document with this content, written by this version;
    ``attestation`` is the file of the delta's attestation, if it has one."""

    document: uuid.UUID
    created: datetime
    maker: str
    base: BomPart
    target: BomPart
    delta: BomPart
    attestation: FileRecord | None = None


def read_facts(source: Source, manifest: Manifest, created: datetime) -> Facts:
    """Read the facts in a delta's manifest and license texts.

    Raises:
        DeltaError: they are damaged, missing, or too long to be license texts.
        DeltaWeightsError: there are more than :data:`MAX_ENTRIES` entries or :data:`MAX_LICENSES` licenses.
    """
    more = manifest.license or DeltaLicense()
    _require_few("entries", _count(manifest) + len(more.conflicts), MAX_ENTRIES)
    base_texts, target_texts = (_texts(side.license, source) for side in (manifest.base, manifest.target))
    base = _license(manifest.base.license, base_texts)
    target = _license(manifest.target.license, target_texts)
    whole = _together(target, base)
    encoded = manifest.to_json()
    itself = FileRecord(MANIFEST_NAME, len(encoded), hashlib.sha256(encoded).hexdigest())
    own_notice = _read(tuple(file for file in manifest.files if file.path == more.notice), source)
    attestation = _attestation(source)
    name = f"deltaweights:{__version__}:{manifest.checksum}:{created.isoformat()}"
    name += f":{attestation.sha256}" if attestation else ""
    return Facts(
        document=uuid.uuid5(uuid.NAMESPACE_URL, name),
        created=created,
        maker=f"{manifest.tool.name} {manifest.tool.version}",
        base=_model("base", manifest.base, base, base, _notice(base_texts)),
        target=_model("target", manifest.target, target, whole, _notice(target_texts), more.conflicts),
        delta=BomPart("delta", (itself, *manifest.files), concluded=whole, notice=_joined(own_notice)),
        attestation=attestation,
    )


def _attestation(source: Source) -> FileRecord | None:
    """The attestation's file, whoever signed it."""
    size = source.sizes.get(ATTESTATION_NAME)
    if size is None:
        return None
    if size > MAX_BUNDLE_BYTES:
        raise _damaged(source, f"{ATTESTATION_NAME} has more than {MAX_BUNDLE_BYTES} bytes")
    return FileRecord(ATTESTATION_NAME, size, sha256_of(source.blocks(ATTESTATION_NAME)))


def _count(manifest: Manifest) -> int:
    licenses = manifest.base.license, manifest.target.license
    files = [side.files for side in (manifest, manifest.base, manifest.target, *licenses)]
    return sum(map(len, [*files, *(license.obligations for license in licenses)]))


def _require_few(things: str, count: int, limit: int) -> None:
    if count > limit:
        raise DeltaWeightsError(
            "The delta is too large for a bill of materials",
            f"It has {count} {things}; at most {limit} can be listed.",
        )


def _model(
    kind: Literal["base", "target"],
    record: BaseRecord | TargetRecord,
    declared: LicenseFacts | None,
    concluded: LicenseFacts | None,
    notice: str | None,
    conflicts: tuple[str, ...] = (),
) -> BomPart:
    files = tuple(FileRecord(file.path, file.size, file.sha256) for file in record.files)
    return BomPart(kind, files, record.repo_id, record.revision, declared, concluded, notice, conflicts)


# Licenses ----------------------------------------------------------------------------------------------


def _texts(license: License, source: Source) -> list[tuple[str, bytes]]:
    """The license's files, with their names in the checkpoint."""
    names = [re.sub(r"^licenses/[0-9a-f]{16}-", "", file.path) for file in license.files]
    return list(zip(names, _read(license.files, source), strict=True))


def _read(files: tuple[FileRecord, ...], source: Source) -> list[bytes]:
    """The contents of files of the delta, as the manifest describes them."""
    if sum(file.size for file in files) > MAX_TEXT_BYTES:
        raise _damaged(source, f"Its license texts have more than {MAX_TEXT_BYTES} bytes")
    contents = []
    for file in files:
        if source.sizes.get(file.path) != file.size:
            raise _damaged(source, f"{file.path!r} is missing or not of the manifest's size")
        contents.append(b"".join(source.blocks(file.path)))
        if hashlib.sha256(contents[-1]).hexdigest() != file.sha256:
            raise _damaged(source, f"{file.path!r} does not have the manifest's SHA-256")
    return contents


def _damaged(source: Source, why: str) -> DeltaError:
    return DeltaError(f"{source.where} is not a whole delta", f"{why}.", "Get the delta again.")


def _is_notice(name: str) -> bool:
    return name.upper().startswith("NOTICE")


def _notice(texts: list[tuple[str, bytes]]) -> str | None:
    return _joined([text for name, text in texts if _is_notice(name)])


def _joined(texts: list[bytes]) -> str | None:
    return "\n\n".join(text.decode("utf-8", "replace") for text in texts) or None


def _license(license: License, texts: list[tuple[str, bytes]]) -> LicenseFacts | None:
    """The license of one side; None if nothing is stated."""
    terms = terms_of(license)
    _require_few("licenses", len(terms), MAX_LICENSES)
    if not terms:
        return None
    return LicenseFacts(
        terms,
        _by_license([text for name, text in texts if not _is_notice(name)], terms),
        license.obligations or tuple(text for one in terms for text in one.obligations),
        ", ".join(text for text in (license.id, license.name, license.link) if text),
    )


def _by_license(texts: list[bytes], terms: tuple[Terms, ...]) -> dict[str, str]:
    """The texts of each license. An unrecognized text belongs to the licenses without a text, or else to
    all."""
    ids = [one.spdx for one in terms]
    found = [(one.spdx if (one := recognize(text)) else None, text) for text in texts]
    left = [id for id in ids if id not in {spdx for spdx, _ in found}] or ids
    every = {
        id: [text for spdx, text in found if id == spdx or (spdx not in ids and id in left)] for id in ids
    }
    return {id: text for id in ids if (text := _joined(every[id]))}


def _together(target: LicenseFacts | None, base: LicenseFacts | None) -> LicenseFacts | None:
    """The license of the target and the delta: their own and the base's."""
    sides = [side for side in (target, base) if side]
    terms = tuple({one.spdx: one for side in sides for one in side.terms}.values())
    every = {one.spdx: {side.texts[one.spdx] for side in sides if one.spdx in side.texts} for one in terms}
    texts = {id: "\n\n".join(sorted(found)) for id, found in every.items() if found}
    obligations = tuple(dict.fromkeys(text for side in sides for text in side.obligations))
    return LicenseFacts(terms, texts, obligations) if terms else None
