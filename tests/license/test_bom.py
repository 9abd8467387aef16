"""Bills of materials: true, valid for the libraries of both formats, and the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import pytest
import spdx_python_model
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from license_expression import get_spdx_licensing
from spdx_python_model import v3_0_1 as spdx
from typer.testing import CliRunner

from deltaweights import DeltaError, DeltaWeightsError, Manifest, make_delta
from deltaweights.bom import Format, bom_of
from deltaweights.cli.commands import app
from deltaweights.license.bom.facts import MAX_ENTRIES, MAX_LICENSES, MAX_TEXT_BYTES
from deltaweights.manifest import (
    MANIFEST_NAME,
    BaseRecord,
    DeltaLicense,
    FileRecord,
    License,
    TargetFile,
    TargetRecord,
    Tool,
)

from ..checkpoints import digests, write_pair
from ..conftest import Trio
from ..test_manifest import shas, sizes

Json = dict[str, Any]
FORMATS: tuple[Format, ...] = get_args(Format)
LICENSING = get_spdx_licensing()
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_7)
COMMIT = "587cc4061cf6a7cc0d429d05c109447e5cf063af"
NOTICE = "Made up for tests, too.\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A pair with Hub ids, licenses and a notice, and its delta."""
    folder = tmp_path_factory.mktemp("published")
    base, target = write_pair(folder)
    (base / "NOTICE").write_text(NOTICE)
    make_delta(
        base,
        target,
        folder / "delta",
        base_repo="Qwen/Qwen2.5-72B",
        base_revision=COMMIT,
        target_repo="moonshotai/Kimi-Dev-72B",
        target_license="mit",
    )
    return Trio(base, target, folder / "delta")


def cyclonedx_of(delta: Path) -> Json:
    """The document, valid under the schema of CycloneDX 1.7."""
    text = bom_of(delta, "cyclonedx").decode("ascii")
    assert VALIDATOR.validate_str(text) is None
    document = json.loads(text)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.7")
    assert isinstance(document, dict)
    return document


def spdx_of(delta: Path) -> spdx.SHACLObjectSet:
    """The document's objects, after the library found each to have the properties that SPDX wants."""
    data = json.loads(bom_of(delta, "spdx"))
    model, objects = spdx_python_model.load_data(data)
    assert model is spdx
    assert isinstance(objects, spdx.SHACLObjectSet)
    assert not objects.missing_ids
    # Reading checks types and patterns, writing checks that nothing is missing.
    again = spdx.JSONLDSerializer().serialize_data(objects)
    assert sorted(map(json.dumps, again["@graph"])) == sorted(map(json.dumps, data["@graph"]))
    return objects


def named(objects: spdx.SHACLObjectSet, key: str) -> Any:
    """The element whose id ends in ``#key``."""
    (element,) = [one for one in objects.foreach() if (one.get_id() or "").endswith(f"#{key}")]
    return element


def related(objects: spdx.SHACLObjectSet, key: str, kind: str) -> list[Any]:
    """What the element is related to in this way, which there is one relationship of."""
    (relationship,) = [
        one
        for one in objects.foreach_type(spdx.Relationship)
        if one.from_ is named(objects, key)
        and one.relationshipType == spdx.RelationshipType.NAMED_INDIVIDUALS[kind]
    ]
    return list(relationship.to)


def hashes(component: Json) -> dict[str, str]:
    """SHA-256 by name of a CycloneDX component's files."""
    assert all(file["type"] == "file" for file in component["components"])
    found = {file["name"]: file["hashes"] for file in component["components"]}
    assert all(len(one) == 1 and one[0]["alg"] == "SHA-256" for one in found.values())
    return {name: one[0]["content"] for name, one in found.items()}


def spdx_hashes(objects: spdx.SHACLObjectSet, key: str) -> dict[str, str]:
    """Likewise in SPDX."""
    files = related(objects, key, "contains")
    assert all(type(file) is spdx.software_File for file in files)
    assert all(file.verifiedUsing[0].algorithm == spdx.HashAlgorithm.sha256 for file in files)
    return {file.name: file.verifiedUsing[0].hashValue for file in files}


def own_files(delta: Path) -> dict[str, str]:
    """The delta's files without its model card, which no hash in the manifest covers."""
    return {path: digest for path, digest in digests(delta).items() if path != "README.md"}


def edited(
    delta: Path, folder: Path, change: Callable[[Manifest], Manifest], texts: dict[str, bytes] | None = None
) -> Path:
    """A copy of a delta with another manifest, and with more files."""
    copy = folder / "edited"
    shutil.copytree(delta, copy)
    manifest = change(Manifest.from_json((copy / MANIFEST_NAME).read_bytes()))
    for record in records(texts or {}):
        manifest = replace(manifest, files=(*manifest.files, record))
    for path, text in (texts or {}).items():
        (copy / path).write_bytes(text)
    (copy / MANIFEST_NAME).write_bytes(manifest.to_json())
    return copy


def records(texts: dict[str, bytes]) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(path, len(text), hashlib.sha256(text).hexdigest()) for path, text in texts.items()
    )


def relicensed(delta: Path, folder: Path, base: License, texts: dict[str, bytes], target: License) -> Path:
    """A copy of a delta whose base is under another license, with these texts, and so is its target."""
    stored = {f"licenses/{'0' * 16}-{name}": text for name, text in texts.items()}

    def change(manifest: Manifest) -> Manifest:
        return replace(
            manifest,
            base=replace(manifest.base, license=replace(base, files=records(stored))),
            target=replace(manifest.target, license=target),
        )

    return edited(delta, folder, change, stored)


# What the documents say -------------------------------------------------------------------------------


def test_cyclonedx_says_what_was_made_of_what(published: Trio) -> None:
    document = cyclonedx_of(published.delta)
    target = document["metadata"]["component"]
    (base,) = target["pedigree"]["ancestors"]
    (delta,) = document["components"]
    assert [c["type"] for c in (target, base, delta)] == ["machine-learning-model"] * 2 + ["data"]
    assert (target["group"], target["name"]) == ("moonshotai", "Kimi-Dev-72B")
    assert target["purl"] == "pkg:huggingface/moonshotai/Kimi-Dev-72B"
    assert base["purl"] == f"pkg:huggingface/Qwen/Qwen2.5-72B@{COMMIT}"
    assert base["version"] == COMMIT
    serial = document["serialNumber"].removeprefix("urn:uuid:")
    (patch,) = target["pedigree"]["patches"]
    assert patch["diff"]["url"] == f"urn:cdx:{serial}/1#{delta['bom-ref']}"
    assert hashes(target) == digests(published.target)
    assert hashes(base) == digests(published.base)
    assert hashes(delta) == own_files(published.delta)


def test_spdx_says_what_was_made_of_what(published: Trio) -> None:
    objects = spdx_of(published.delta)
    target, base, delta = (named(objects, key) for key in ("target", "base", "delta"))
    assert [type(one) for one in (target, base, delta)] == [spdx.ai_AIPackage] * 2 + [spdx.software_Package]
    assert related(objects, "target", "descendantOf") == [base]
    assert related(objects, "base", "patchedBy") == [delta]
    assert base.name == "Qwen/Qwen2.5-72B"
    assert base.software_packageUrl == f"pkg:huggingface/Qwen/Qwen2.5-72B@{COMMIT}"
    assert base.software_packageVersion == COMMIT
    assert base.software_downloadLocation == f"https://huggingface.co/Qwen/Qwen2.5-72B/tree/{COMMIT}"
    assert base.suppliedBy.name == "Qwen"
    assert target.software_packageVersion is None
    assert spdx_hashes(objects, "target") == digests(published.target)
    assert spdx_hashes(objects, "base") == digests(published.base)
    assert spdx_hashes(objects, "delta") == own_files(published.delta)
    (document,) = objects.foreach_type(spdx.SpdxDocument)
    assert list(document.rootElement) == [named(objects, "bom")]
    assert list(named(objects, "bom").rootElement) == [target]
    everything = {one for one in objects.foreach() if isinstance(one, spdx.Element)}
    assert set(document.element) == everything - {document}


def test_without_hub_ids_there_is_no_purl(trio: Trio) -> None:
    document = cyclonedx_of(trio.delta)
    target = document["metadata"]["component"]
    assert not {"purl", "group", "version", "externalReferences"} & set(target)
    package = named(spdx_of(trio.delta), "target")
    assert package.software_packageUrl is package.software_downloadLocation is package.suppliedBy is None


def test_a_branch_is_no_commit(published: Trio, tmp_path: Path) -> None:
    delta = edited(
        published.delta, tmp_path, lambda m: replace(m, base=replace(m.base, revision="refs/pr/1"))
    )
    (base,) = cyclonedx_of(delta)["metadata"]["component"]["pedigree"]["ancestors"]
    assert (base["version"], base["purl"]) == ("refs/pr/1", "pkg:huggingface/Qwen/Qwen2.5-72B")


# Licenses ---------------------------------------------------------------------------------------------

QWEN = "LicenseRef-scancode-qwen-2024"
QWEN_TEXT = (
    b"Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n\nMade up below.\n"
)


def test_cyclonedx_has_licenses_texts_and_notices(published: Trio) -> None:
    document = cyclonedx_of(published.delta)
    target = document["metadata"]["component"]
    (base,) = target["pedigree"]["ancestors"]
    (license,) = base["licenses"]
    assert (license["expression"], license["acknowledgement"]) == (QWEN, "declared")
    (details,) = license["expressionDetails"]
    assert details["licenseIdentifier"] == QWEN
    assert details["text"]["content"] == (published.base / "LICENSE").read_text()
    assert base["copyright"] == NOTICE
    (license,) = target["licenses"]
    assert (license["expression"], license["acknowledgement"]) == (f"MIT AND {QWEN}", "concluded")
    assert document["components"][0]["licenses"] == [license]
    stated = {"name": "deltaweights:license:stated", "value": "other, qwen, LICENSE"}
    assert stated in base["properties"]
    obligations = [one for one in base["properties"] if one["name"] == "deltaweights:license:obligation"]
    assert any("Built with Qwen" in one["value"] for one in obligations)
    assert all(one in target["properties"] for one in obligations)


def test_spdx_has_licenses_texts_and_notices(published: Trio) -> None:
    objects = spdx_of(published.delta)
    (base,) = related(objects, "base", "hasDeclaredLicense")
    assert base.simplelicensing_licenseExpression == QWEN
    assert "Built with Qwen" in base.description
    assert related(objects, "base", "hasConcludedLicense") == [base]
    (target,) = related(objects, "target", "hasDeclaredLicense")
    (whole,) = related(objects, "target", "hasConcludedLicense")
    assert target.simplelicensing_licenseExpression == "MIT"
    assert whole.simplelicensing_licenseExpression == f"MIT AND {QWEN}"
    assert related(objects, "delta", "hasConcludedLicense") == [whole]
    for license in (base, whole):
        (entry,) = license.simplelicensing_customIdToUri
        text = objects.find_by_id(entry.value)
        assert entry.key == QWEN
        assert isinstance(text, spdx.simplelicensing_SimpleLicensingText)
        assert text.simplelicensing_licenseText == (published.base / "LICENSE").read_text()
    assert list(named(objects, "base").software_attributionText) == [NOTICE]


def test_an_unknown_license_is_given_in_its_own_words(published: Trio, tmp_path: Path) -> None:
    own = License("other", "Ours, 1.0 (draft)", "https://example.org/ours")
    text = "Do as you like.\r\nOr don't: \u00a9.\n"
    delta = relicensed(published.delta, tmp_path, own, {"LICENSE": text.encode()}, own)
    (base,) = cyclonedx_of(delta)["metadata"]["component"]["pedigree"]["ancestors"]
    (license,) = base["licenses"]
    assert license["expression"] == "LicenseRef-Ours-1.0-draft"
    assert [one["text"]["content"] for one in license["expressionDetails"]] == [text]
    assert "other, Ours, 1.0 (draft), https://example.org/ours" in [
        one["value"] for one in base["properties"]
    ]
    objects = spdx_of(delta)
    (license,) = related(objects, "base", "hasDeclaredLicense")
    (entry,) = license.simplelicensing_customIdToUri
    text_element = objects.find_by_id(entry.value)
    assert isinstance(text_element, spdx.simplelicensing_SimpleLicensingText)
    assert (text_element.name, text_element.simplelicensing_licenseText) == ("Ours, 1.0 (draft)", text)


def test_each_license_has_its_own_texts(published: Trio, tmp_path: Path) -> None:
    texts = {"LICENSE": QWEN_TEXT, "LICENSE-DATA": b"Data.\n", "USE_POLICY.md": b"Policy.\n"}
    both = License(expression=f"{QWEN} AND LicenseRef-data")
    delta = relicensed(published.delta, tmp_path, both, texts, License())
    (base,) = cyclonedx_of(delta)["metadata"]["component"]["pedigree"]["ancestors"]
    details = base["licenses"][0]["expressionDetails"]
    found = {one["licenseIdentifier"]: one["text"]["content"] for one in details}
    assert found == {QWEN: QWEN_TEXT.decode(), "LicenseRef-data": "Data.\n\n\nPolicy.\n"}


def test_a_text_that_is_not_there_is_said_to_be_missing(published: Trio, tmp_path: Path) -> None:
    delta = relicensed(published.delta, tmp_path, License("llama3.1"), {}, License())
    objects = spdx_of(delta)
    (license,) = related(objects, "base", "hasDeclaredLicense")
    (entry,) = license.simplelicensing_customIdToUri
    text = objects.find_by_id(entry.value)
    assert isinstance(text, spdx.simplelicensing_SimpleLicensingText)
    wanted = "The text is not in the delta. It was published at http"
    assert str(text.simplelicensing_licenseText).startswith(wanted)
    (base,) = cyclonedx_of(delta)["metadata"]["component"]["pedigree"]["ancestors"]
    assert "text" not in base["licenses"][0]["expressionDetails"][0]


def test_where_nothing_is_stated_nothing_is_claimed(published: Trio, tmp_path: Path) -> None:
    delta = relicensed(published.delta, tmp_path, License(), {}, License())
    target = cyclonedx_of(delta)["metadata"]["component"]
    assert "licenses" not in target
    assert "licenses" not in target["pedigree"]["ancestors"][0]
    objects = spdx_of(delta)
    unknown = spdx.expandedlicensing_IndividualLicensingInfo.NoAssertionLicense
    for key in ("base", "target"):
        for kind in ("hasDeclaredLicense", "hasConcludedLicense"):
            assert related(objects, key, kind) == [unknown]


def test_conflicts_are_passed_on(trio: Trio, tmp_path: Path) -> None:
    conflicts = ("The card says one thing, the text another.", "It names another base.")
    delta = edited(trio.delta, tmp_path, lambda m: replace(m, license=DeltaLicense(conflicts=conflicts)))
    properties = cyclonedx_of(delta)["metadata"]["component"]["properties"]
    assert (
        tuple(one["value"] for one in properties if one["name"] == "deltaweights:conflict") == conflicts[::-1]
    )
    assert named(spdx_of(delta), "target").comment == "\n".join(conflicts)


# The same every time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_delta_gives_the_same_bytes(published: Trio, tmp_path: Path, format: Format) -> None:
    copy = shutil.copytree(published.delta, tmp_path / "elsewhere")
    (copy / "README.md").write_text("Somebody wrote another model card.")
    call = f"bom_of({str(copy)!r}, {format!r})"
    script = f"import sys; from deltaweights.bom import bom_of; sys.stdout.buffer.write({call})"
    made = {bom_of(published.delta, format), bom_of(published.delta, format)}
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        made.add(
            subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, check=True
            ).stdout
        )
    assert len(made) == 1


def test_another_delta_or_time_has_another_id(published: Trio, tmp_path: Path) -> None:
    other = edited(published.delta, tmp_path, lambda m: replace(m, tool=Tool("another", "1")))
    time = datetime(2026, 5, 4, 3, 2, 1, tzinfo=timezone.utc)
    ids = set()
    for delta in (published.delta, other):
        for created in (time, time.replace(year=2025)):
            document = json.loads(bom_of(delta, "cyclonedx", created=created))
            assert datetime.fromisoformat(document["metadata"]["timestamp"]) == created
            ids.add(document["serialNumber"])
    assert len(ids) == 4
    graph = json.loads(bom_of(other, "spdx", created=time))["@graph"]
    assert [one["created"] for one in graph if one["type"] == "CreationInfo"] == ["2026-05-04T03:02:01Z"]


# Whatever a manifest says -----------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "a AND ", "LicenseRef-", "LicenseRef-a AND LicenseRef-b", "NONE", "other",
        "LICENSE", "https://example.org/a?b#c", "https://a:b/", "http://[::1", "https://a/%zz", "https://a#b#c",
        "javascript:alert(1)", "urn:cdx:0/1#x", "_:CreationInfo0", "\x00", "\ufffe\U0001f4a9", "\u202e",
        "https://example.org/" + "a" * 3000,
    ]
)  # fmt: skip
optional_words = st.none() | words
part = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,9}"
repo_ids = st.none() | st.from_regex(f"{part}(/{part})?", fullmatch=True)
revisions = st.none() | st.sampled_from(["a" * 40]) | st.from_regex(f"{part}(/{part})?", fullmatch=True)
license_texts = st.dictionaries(
    st.sampled_from(["LICENSE", "NOTICE", "LICENSE.txt"]), st.binary(max_size=30), max_size=3
)


@st.composite
def hostile(draw: st.DrawFn) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest that keeps the rules and says anything, and the license texts that it names."""
    own: dict[str, bytes] = {}
    licenses = []
    for _ in range(2):
        texts = {f"licenses/{draw(st.integers(0, 9))}-{n}": t for n, t in draw(license_texts).items()}
        texts = {path: own.get(path, text) for path, text in texts.items()}
        own |= texts
        id, name, link, expression = (draw(optional_words) for _ in range(4))
        obligations = tuple(draw(st.lists(words, max_size=2)))
        license = License(id, name, link, records(texts), obligations, expression or None)
        licenses.append(license)
    base_files = draw(
        st.lists(st.builds(FileRecord, words, sizes, shas), max_size=3, unique_by=lambda file: file.path)
    )
    target_files = [TargetFile(f.path, f.size, f.sha256, "base", f.path) for f in base_files if _is_plain(f)]
    notice = draw(st.none() | st.sampled_from(sorted(own))) if own else None
    manifest = Manifest(
        base=BaseRecord(draw(repo_ids), draw(revisions), licenses[0], tuple(base_files)),
        target=TargetRecord(draw(repo_ids), draw(revisions), licenses[1], tuple(target_files)),
        tensors=(),
        files=records(own),
        tool=Tool(draw(words), draw(words)),
        chunk_bytes=4096,
        license=DeltaLicense(draw(optional_words), tuple(draw(st.lists(words, max_size=2))), notice),
    )
    return manifest, own


def _is_plain(file: FileRecord) -> bool:
    return file.path.isascii() and file.path.isalnum()


@settings(max_examples=30)
@given(hostile())
def test_whatever_a_manifest_says_the_documents_are_valid(made: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, texts = made
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "licenses").mkdir()
        for path, text in texts.items():
            Path(folder, path).write_bytes(text)
        Path(folder, MANIFEST_NAME).write_bytes(manifest.to_json())
        document = cyclonedx_of(Path(folder))
        objects = spdx_of(Path(folder))
    for license in objects.foreach_type(spdx.simplelicensing_LicenseExpression):
        LICENSING.parse(license.simplelicensing_licenseExpression)
    for key in ("base", "target"):
        assert related(objects, key, "hasDeclaredLicense")
        assert related(objects, key, "hasConcludedLicense")
    wanted = {file.path: file.sha256 for file in manifest.base.files}
    if wanted:
        (base,) = document["metadata"]["component"]["pedigree"]["ancestors"]
        assert hashes(base) == spdx_hashes(objects, "base") == wanted


def test_too_many_licenses_are_refused(published: Trio, tmp_path: Path) -> None:
    many = License(expression=" AND ".join(f"LicenseRef-{number}" for number in range(MAX_LICENSES + 1)))
    delta = relicensed(published.delta, tmp_path, many, {}, License())
    with pytest.raises(DeltaWeightsError, match=f"{MAX_LICENSES + 1} licenses"):
        bom_of(delta)


@pytest.mark.parametrize("format", FORMATS)
def test_too_many_files_are_refused(published: Trio, tmp_path: Path, format: Format) -> None:
    more = tuple(FileRecord(f"{number}", 0, "0" * 64) for number in range(MAX_ENTRIES))

    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, base=replace(manifest.base, files=manifest.base.files + more))

    delta = edited(published.delta, tmp_path, change)
    with pytest.raises(DeltaWeightsError, match="can be listed"):
        bom_of(delta, format)


# Damaged deltas, missing libraries --------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "changed", "missing"])
def test_a_damaged_license_text_is_refused(published: Trio, tmp_path: Path, change: str) -> None:
    delta = shutil.copytree(published.delta, tmp_path / "delta")
    (path,) = delta.glob("licenses/*-LICENSE")
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change == "cut" else data.swapcase())
    if change == "missing":
        path.unlink()
    with pytest.raises(DeltaError, match="LICENSE"):
        bom_of(delta)


def test_a_huge_license_text_is_refused_unread(published: Trio, tmp_path: Path) -> None:
    delta = shutil.copytree(published.delta, tmp_path / "delta")
    (path,) = delta.glob("licenses/*-LICENSE")
    os.truncate(path, MAX_TEXT_BYTES + 1)
    record = FileRecord(path.relative_to(delta).as_posix(), MAX_TEXT_BYTES + 1, "0" * 64)

    def change(manifest: Manifest) -> Manifest:
        license = replace(manifest.base.license, files=(record,))
        others = tuple(file for file in manifest.files if file.path != record.path)
        return replace(manifest, base=replace(manifest.base, license=license), files=(*others, record))

    with pytest.raises(DeltaError, match="more than"):
        bom_of(edited(delta, tmp_path, change))


@pytest.mark.parametrize(
    ("format", "library"), [("cyclonedx", "cyclonedx.model"), ("spdx", "spdx_python_model")]
)
def test_a_missing_library_is_named(
    published: Trio, monkeypatch: pytest.MonkeyPatch, format: Format, library: str
) -> None:
    monkeypatch.delitem(sys.modules, f"deltaweights.license.bom.{format}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DeltaWeightsError, match=r"pip install cyclonedx-python-lib"):
        bom_of(published.delta, format)


# The command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_writes_to_stdout_or_a_file(published: Trio, tmp_path: Path, format: Format) -> None:
    wanted = bom_of(published.delta, format)
    command = ["bom", str(published.delta), "--format", format]
    assert CliRunner().invoke(app, command).stdout_bytes == wanted
    file = tmp_path / "bom.json"
    file.write_text("an older one")
    result = CliRunner().invoke(app, [*command, "-o", str(file)])
    assert (result.exit_code, result.output, file.read_bytes()) == (0, "", wanted)


def test_the_command_writes_cyclonedx_by_default(published: Trio) -> None:
    assert CliRunner().invoke(app, ["bom", str(published.delta)]).stdout_bytes == bom_of(published.delta)


def test_the_time_comes_from_the_environment_or_an_option(published: Trio) -> None:
    for options, environment in ((["--created", "1"], {}), ([], {"SOURCE_DATE_EPOCH": "1"})):
        result = CliRunner().invoke(app, ["bom", str(published.delta), *options], env=environment)
        assert json.loads(result.stdout)["metadata"]["timestamp"] == "1970-01-01T00:00:01+00:00"


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--format", "word"], 2), (["--created", "today"], 2), (["-o", "no/such/folder/bom.json"], 1)],
)
def test_the_command_explains_errors(published: Trio, options: list[str], code: int) -> None:
    result = CliRunner().invoke(app, ["bom", str(published.delta), *options])
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert not result.stdout
