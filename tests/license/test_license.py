"""Licenses: the table's facts, what a card and a text are taken for, what does not fit together, and who has
to accept what before anything is written."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from deltaweights import (
    Manifest,
    apply_delta,
    inspect_delta,
    license_of,
    make_delta,
    plan_apply,
    verify_delta,
)
from deltaweights.cli.commands import app
from deltaweights.license.rules import (
    MAX_TEXT_BYTES,
    combine,
    describe,
    expression_of,
    find_terms,
    notice_text,
    recognize,
    resolve,
    terms_of,
    text_records,
    unaccepted,
)
from deltaweights.license.table import KNOWN, LISTED, Terms
from deltaweights.manifest import BaseRecord, FileRecord, License, TargetRecord

from ..checkpoints import bf16, contents, safetensors_bytes, weights
from ..conftest import Trio

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "v1" / "delta"

QWEN = find_terms("qwen")
QWEN_TEXT = (
    b"Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n\nBy clicking\n"
)


# The table ---------------------------------------------------------------------------------------------

#: https://huggingface.co/docs/hub/repositories-licenses, 2026-08-22.
HUB_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail
openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""


def test_every_id_of_the_hub_is_in_the_table() -> None:
    assert {terms.hub for terms in (*KNOWN, *LISTED)} - {""} == set(HUB_IDS.split())


def test_no_two_licenses_share_a_name() -> None:
    every = (*KNOWN, *LISTED)
    assert len({terms.spdx for terms in every}) == len(every)
    names = [name for terms in every for name in (terms.hub, *terms.aliases) if name]
    names.remove("gemma")  # two versions of one license; a card does not say which
    assert sorted(names) == sorted(set(names))
    assert find_terms("gemma").dated == "2025-03-24"


def test_spdx_knows_the_ids() -> None:
    spdx = pytest.importorskip("license_expression").get_spdx_licensing()
    for terms in (*KNOWN, *LISTED):
        if not terms.spdx.startswith("LicenseRef-"):
            assert spdx.validate(terms.spdx).errors == []
        assert re.fullmatch(r"(LicenseRef-)?[A-Za-z0-9.-]+", terms.spdx)


@pytest.mark.parametrize("terms", KNOWN, ids=lambda terms: terms.spdx)
def test_an_entry_has_its_source_and_sections_for_all_it_says(terms: Terms) -> None:
    assert terms.source.startswith("https://")
    assert re.fullmatch(r"(\d{4}(-\d\d){1,2})?", terms.dated)
    assert terms.obligations
    for text in terms.obligations:
        assert text.endswith((").", "every copy.")), "where it stands; MIT has no sections"
    assert bool(terms.title) != bool(terms.digests), "its text can be told"
    if not terms.is_open:
        assert terms.title
    if terms.notice:
        assert any("Notice" in text for text in terms.obligations)
    for words in (terms.display, terms.prefix):
        assert not words or any(f'"{words}"' in text for text in terms.obligations)


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "qwen": ("copy of the agreement (3a)", "100 million monthly active users (4)", '"Built with Qwen"'),
        "qwen-research": ("research and evaluation only", '"Improved using Qwen"'),
        "tongyi-qianwen": ("100 million", "Do not improve other large language models"),
        "llama2": ("700 million", "Do not improve other large language models"),
        "llama3": (
            "700 million",
            '"Built with Meta Llama 3"',
            'begin with "Llama 3"',
            "Do not improve other",
        ),
        "llama3.1": ("700 million", '"Built with Llama"', 'begin with "Llama"'),
        "llama3.2": ("700 million", "European Union"),
        "llama3.3": ("700 million", "Acceptable Use Policy"),
        "llama4": ("700 million", "European Union"),
        "gemma": ("section 3.2", "called Notice"),
        "deepseek": ("paragraph 5", "attachment A"),
        "openrail++": ("paragraph 5", "attachment A"),
        "cc-by-nc-sa-4.0": ("commercial purposes", "same or a compatible license"),
        "cc-by-nd-4.0": ("Do not share changed versions",),
        "apache-2.0": ("copy of the license (4a)", "NOTICE"),
    }.items(),
)
def test_the_facts_that_people_ask_for_are_there(name: str, facts: tuple[str, ...]) -> None:
    text = " ".join(find_terms(name).obligations)
    assert [fact for fact in facts if fact not in text] == []


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("mit apache-2.0 bsd-3-clause cc-by-4.0 cc0-1.0 isc openmdw-1.0", "permissive"),
        ("gpl-3.0 agpl-3.0 cc-by-sa-4.0 mpl-2.0", "copyleft"),
        (
            "qwen qwen-research llama2 llama3.1 llama4 gemma deepseek openrail cc-by-nc-4.0 cc-by-nd-4.0 cc "
            "nobody-knows-this other",
            "restricted",
        ),
    ],
)
def test_open_licenses_are_known_as_such_and_all_others_are_not(names: str, kind: str) -> None:
    assert {name: find_terms(name).kind for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_the_document_has_the_table() -> None:
    text = (ROOT / "docs" / "licenses.md").read_text()
    for terms in KNOWN:
        row = next(line for line in text.splitlines() if f"| `{terms.spdx}` |" in line)
        names = [name for name in (terms.hub, *terms.aliases) if name]
        assert all(f"`{name}`" in row for name in names)
        assert f"[{terms.name}]({terms.source}) | {terms.dated} |" in row
        assert row.endswith("| no |") != terms.is_open


# Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("license", "expression"),
    [
        (License(), None),
        (License("unknown"), None),
        (License("apache-2.0"), "Apache-2.0"),
        (License("MIT"), "MIT"),
        (License("mit AND apache-2.0"), "MIT AND Apache-2.0"),
        (License("mit AND mit"), "MIT"),
        (License("llama3.1"), "LicenseRef-scancode-llama-3.1-license-2024"),
        (License("other", "qwen", "LICENSE"), "LicenseRef-scancode-qwen-2024"),
        (License("other", "Qwen"), "LicenseRef-scancode-qwen-2024"),
        (License(None, "qwen-research"), "LicenseRef-scancode-qwen-research-2024"),
        (License("other", "llama4"), "LicenseRef-scancode-llama-4-cla-2025"),
        (License("other", "Our License, v2!"), "LicenseRef-Our-License-v2"),
        (License("other"), "LicenseRef-other"),
        (License("LicenseRef-scancode-qwen-2024"), "LicenseRef-scancode-qwen-2024"),
        (License("LicenseRef-ours"), "LicenseRef-ours"),
        (License("MIT OR Apache-2.0"), "LicenseRef-MIT-OR-Apache-2.0"),
        (License("\x1b]0;x\x07"), "LicenseRef-0-x"),
        (License("许可证"), "LicenseRef-unnamed"),
        (License("apache-2.0", expression="MIT"), "MIT"),
    ],
)
def test_the_words_of_a_card_become_spdx(license: License, expression: str | None) -> None:
    assert expression_of(license) == expression


@given(st.text(), st.none() | st.text(), st.lists(st.sampled_from(["mit", "other", "x y", ""]), max_size=3))
def test_whatever_a_card_says_the_expression_is_one(id: str, name: str | None, ids: list[str]) -> None:
    for license in (License(id, name), License(" AND ".join(ids), name)):
        expression = expression_of(license)
        part = r"[A-Za-z0-9.+-]+"
        assert expression is None or re.fullmatch(rf"{part}( AND {part})*", expression)
        if expression:
            again = License(expression=expression)
            assert expression_of(again) == expression
            assert [t.is_open for t in terms_of(again)] == [t.is_open for t in terms_of(license)]


# Texts -------------------------------------------------------------------------------------------------


def _of_dependency(name: str) -> str:
    """The license text that an installed package came with."""
    files = distribution(name).files or []
    path = next(file for file in files if re.search(r"dist-info/(licenses/)?LICENSE(\.\w+)?$", str(file)))
    return Path(str(path.locate())).read_text()


TEXTS = {
    "Apache-2.0": (ROOT / "LICENSE").read_text(),
    "MIT": _of_dependency("rich"),
    "BSD-3-Clause": _of_dependency("zstandard"),
    "BSD-2-Clause": _of_dependency("xxhash"),
}
TITLES = {terms.spdx: "\n".join(terms.title).title() for terms in KNOWN if terms.title}


@pytest.mark.parametrize("spdx", TEXTS)
def test_a_real_text_is_recognized(spdx: str) -> None:
    for text in (
        TEXTS[spdx],
        TEXTS[spdx].upper(),
        TEXTS[spdx].replace('"', "\u201c"),
        "\ufeff" + TEXTS[spdx],
    ):
        terms = recognize(text.encode())
        assert terms
        assert terms.spdx == spdx


@settings(max_examples=20)
@given(st.sampled_from(list(TEXTS)), st.integers(50, 200), st.sampled_from(["\n", "\r\n"]))
def test_line_breaks_do_not_matter(spdx: str, width: int, newline: str) -> None:
    def wrapped(paragraph: str) -> str:
        keep = "copyright" in paragraph.lower()[:20] or len(paragraph) < 80  # copyright lines stay lines
        return paragraph if keep else newline.join(textwrap.wrap(paragraph, width, break_on_hyphens=False))

    text = f"{newline}{newline}".join(map(wrapped, TEXTS[spdx].split("\n\n")))
    assert recognize(text.encode()) == find_terms(spdx)


@settings(max_examples=50)
@given(
    st.sampled_from(list(TEXTS)), st.integers(0, 10**6), st.sampled_from(["not", "100 million users", "(x)"])
)
def test_a_changed_text_is_not_taken_for_the_original(spdx: str, place: int, more: str) -> None:
    """One word more, anywhere but in a title or a copyright line: a "modified MIT" is not MIT."""
    lines = TEXTS[spdx].splitlines()
    long = [k for k, line in enumerate(lines) if len(line) > 50 and "copyright (c)" not in line.lower()]
    lines[long[place % len(long)]] += f" {more}"
    assert recognize("\n".join(lines).encode()) is None


@pytest.mark.parametrize("spdx", TITLES)
def test_a_named_license_is_recognized_by_its_first_lines(spdx: str) -> None:
    known = find_terms(spdx)
    for text in (
        f"{TITLES[spdx]}\n\nmore",
        f"  **{TITLES[spdx]}**  \n\n1\\. more",
        f"Copyright (c) 2024 Somebody\n\n# {TITLES[spdx]}\nmore",
    ):
        assert recognize(text.encode()) == known
    assert recognize(f"see also: {TITLES[spdx]}\nmore".encode()) is None
    if len(known.title) > 1:
        assert recognize(f"{known.title[0]}\nof another date\nmore".encode()) is None


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_can_be_looked_at(text: bytes) -> None:
    """They may even be a title, of which Hypothesis learns from our source."""
    license, conflicts = resolve("base", License(), {"LICENSE": text})
    assert recognize(text) or str(license.expression).startswith("LicenseRef-text-")
    assert all("has the title of" in conflict for conflict in conflicts)


# One side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "texts", "expression", "conflict"),
    [
        (License("other", "qwen"), {"LICENSE": QWEN_TEXT}, QWEN.spdx, None),
        (License("other"), {"LICENSE": QWEN_TEXT}, QWEN.spdx, None),
        (License(), {"LICENSE": QWEN_TEXT}, QWEN.spdx, None),
        (License("other", "qwen"), {"LICENSE": b"made up"}, QWEN.spdx, None),
        (License("mit"), {"LICENSE": QWEN_TEXT}, f"MIT AND {QWEN.spdx}", "is stated to be under MIT, but"),
        (
            License("other", "ours"),
            {"LICENSE": TEXTS["MIT"]},
            "LicenseRef-ours AND MIT",
            "hold the text of MIT",
        ),
        (License("mit"), {"LICENSE": TEXTS["MIT"], "LICENSE-QWEN": QWEN_TEXT}, f"MIT AND {QWEN.spdx}", None),
        (
            License("gemma"),
            {"LICENSE": b"Gemma Terms of Use\nLast modified: April 1, 2024\n..."},
            "LicenseRef-scancode-gemma-tou-2024-04-01",
            None,
        ),
        (
            License("other", "qwen-research"),
            {
                "LICENSE": b"Qwen RESEARCH LICENSE AGREEMENT\n"
                b"Qwen RESEARCH LICENSE AGREEMENT Release Date: September 20, 2026\n"
            },
            "LicenseRef-scancode-qwen-research-2024",
            "is not the version that is known here",
        ),
        (License(), {}, None, None),
    ],
)
def test_card_and_texts_are_put_together(
    card: License, texts: dict[str, bytes | str], expression: str | None, conflict: str | None
) -> None:
    encoded = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
    license, conflicts = resolve("base", card, encoded)
    assert license.expression == expression
    assert (license.id, license.name) == (card.id, card.name), "the card's words stay as they are"
    assert [text for terms in terms_of(license) for text in terms.obligations] == [
        text.partition(": ")[2] if len(terms_of(license)) > 1 else text for text in license.obligations
    ]
    if conflict is None:
        assert conflicts == ()
    else:
        assert len(conflicts) == 1
        assert conflict in conflicts[0]


# Both sides --------------------------------------------------------------------------------------------


def _base(license: License, repo_id: str | None = "org/base") -> BaseRecord:
    return BaseRecord(repo_id, None, license, ())


def _target(license: License, repo_id: str | None = None) -> TargetRecord:
    return TargetRecord(repo_id, None, license, ())


FILE = (FileRecord("licenses/0123456789abcdef-LICENSE", 3, "0" * 64),)


@pytest.mark.parametrize(
    ("base", "target", "conflicts"),
    [
        (License("apache-2.0"), License("mit"), []),
        (License("other", "qwen", files=FILE), License("other", "qwen"), []),
        (License("other", "qwen", files=FILE), License(), []),
        (License("other", "qwen", files=FILE), License("mit AND qwen"), []),
        (
            License("other", "qwen", files=FILE),
            License("mit"),
            ["under MIT, but its base is under LicenseRef"],
        ),
        (License("gpl-3.0", files=FILE), License("mit"), ["but its base is under GPL-3.0"]),
        (License("other", "qwen"), License("qwen"), []),
        (License("gemma"), License(), ["came without the text of its license, Gemma Terms of Use"]),
    ],
)
def test_a_target_cannot_leave_its_base_s_license(
    base: License, target: License, conflicts: list[str]
) -> None:
    whole = combine(_base(base), _target(target))
    assert whole
    assert len(whole.conflicts) == len(conflicts)
    for text, part in zip(whole.conflicts, conflicts, strict=True):
        assert part in text


@pytest.mark.parametrize(
    ("license", "name", "fits"),
    [
        ("llama3.1", "me/Llama-3.1-Tuned", True),
        ("llama3.1", "me/llama_tuned", True),
        ("llama3.1", "me/Tuned-Llama", False),
        ("llama3", "me/Llama-3-Tuned", True),
        ("llama3", "me/Llama-Tuned", False),
        ("llama2", "me/Tuned", True),
        ("llama3.1", None, True),
    ],
)
def test_llama_wants_its_name_first(license: str, name: str | None, fits: bool) -> None:
    whole = combine(_base(License(license, files=FILE)), _target(License(license), name))
    assert whole
    assert (whole.conflicts == ()) == fits


@pytest.mark.parametrize(
    ("repo_id", "named", "fits"),
    [
        ("org/base", ("Org/Base",), True),
        ("org/base", ("x/y", "org/base"), True),
        ("org/base", ("x/y",), False),
        ("org/base", (), True),
        (None, ("x/y",), True),
    ],
)
def test_the_base_that_the_target_s_card_names_is_the_base(
    repo_id: str | None, named: tuple[str, ...], fits: bool
) -> None:
    whole = combine(_base(License(), repo_id), _target(License()), (), named)
    assert (whole is None) == fits


def test_where_nothing_is_stated_there_is_nothing_to_say() -> None:
    assert combine(_base(License()), _target(License())) is None


def test_the_notice_has_what_the_licenses_want_in_it() -> None:
    text = notice_text(
        _base(License("other", "qwen", files=FILE)), _target(License("llama3.1"), "me/x")
    ).decode()
    for part in (
        QWEN.notice,
        find_terms("llama3.1").notice,
        "Built with Qwen",
        FILE[0].path,
        "me/x",
        "changed",
    ):
        assert part in text
    assert "\nBuilt with Llama" not in text, "the base is what it was built with"
    assert text.endswith("\n")


# Whom to ask -------------------------------------------------------------------------------------------


def _manifest(base: License, target: License) -> Manifest:
    manifest = Manifest.from_json((FIXTURES / "deltaweights.json").read_bytes())
    return replace(
        manifest,
        base=replace(manifest.base, license=base),
        target=replace(manifest.target, license=target),
    )


@pytest.mark.parametrize(
    ("base", "target", "accepted", "missing"),
    [
        (License("apache-2.0"), License("mit"), [], []),
        (License(), License(), [], []),
        (License("unknown"), License(), [], []),
        (License("gpl-3.0"), License("cc-by-sa-4.0"), [], []),
        (License("other", "qwen"), License("mit"), [], ["qwen"]),
        (License("other", "qwen"), License("mit"), ["qwen"], []),
        (License("other", "qwen"), License("mit"), ["LICENSEREF-SCANCODE-QWEN-2024"], []),
        (License("other", "qwen"), License("mit"), ["MIT AND LicenseRef-scancode-qwen-2024"], []),
        (License("other", "qwen"), License("mit"), ["qwen-research", "mit", "other", ""], ["qwen"]),
        (License("other", "qwen"), License("cc-by-nc-4.0"), ["qwen"], ["cc-by-nc-4.0"]),
        (License("other", "qwen"), License("cc-by-nc-4.0"), ["qwen cc-by-nc-4.0"], []),
        (License("mit"), License("llama3.1"), [], ["llama3.1"]),
        (License("other", "ours"), License(), [], ["ours"]),
        (License("other", "ours"), License(), ["ours"], []),
        (License("other", "ours"), License(), ["LicenseRef-ours"], []),
        (License("other"), License(), [], ["other"]),
        (License(expression="LicenseRef-text-0123"), License(), [], ["LicenseRef-text-0123"]),
        (
            License(expression="LicenseRef-text-0123"),
            License(),
            ["LicenseRef-text-0124"],
            ["LicenseRef-text-0123"],
        ),
    ],
)
def test_all_but_open_licenses_have_to_be_accepted(
    base: License, target: License, accepted: list[str], missing: list[str]
) -> None:
    found = unaccepted(_manifest(base, target), accepted)
    assert [terms.spdx for terms in found] == [find_terms(name).spdx for name in missing]


@pytest.mark.parametrize(
    ("license", "missing"),
    [
        (License("llama3.1", expression="MIT"), ["llama3.1"]),
        (License("mit", "Llama 3.1 Community License Agreement", expression="MIT"), ["llama3.1"]),
        (License("mit", "ours", expression="MIT"), ["ours"]),
        (License("other", expression="MIT"), ["other"]),
        (License("other", expression="MIT", files=FILE), []),
        (License("apache-2.0", "Apache License, Version 2.0", expression="Apache-2.0"), []),
        (License("mit", "MIT License", expression="MIT"), []),
        (License("and", expression="AND"), ["AND"]),
    ],
)
def test_no_one_word_of_a_manifest_makes_a_license_open(license: License, missing: list[str]) -> None:
    found = unaccepted(_manifest(license, License()), ["MIT AND Apache-2.0"])
    assert [terms.spdx for terms in found] == [find_terms(name).spdx for name in missing]


def test_a_text_that_is_not_open_is_asked_for_whatever_the_manifest_says() -> None:
    manifest = _manifest(License("mit", expression="MIT", files=FILE), License())
    text = (" ".join(QWEN.title) + " ").encode()
    assert recognize(text) == QWEN
    assert unaccepted(manifest, (), {FILE[0].path: text}) == (QWEN,)


def test_a_delta_from_before_has_its_licenses_too() -> None:
    facts = describe(_manifest(License("other", "qwen"), License("mit")))
    assert facts.expression == f"MIT AND {QWEN.spdx}"
    assert facts.to_accept == (QWEN.spdx,)
    assert facts.base.obligations == QWEN.obligations
    assert facts.conflicts == ()


def test_what_is_too_long_to_be_a_license_text_is_none() -> None:
    manifest = _manifest(License(), License())
    text = FileRecord("licenses/a", 10, "0" * 64)
    huge = FileRecord("licenses/b", 4 * MAX_TEXT_BYTES, "0" * 64)
    license = License("mit", files=(text, huge))
    manifest = replace(
        manifest, files=(text, huge), base=replace(manifest.base, license=license), license=None
    )
    assert text_records(manifest) == (text,)


# Made, and applied -------------------------------------------------------------------------------------

SHARD = safetensors_bytes({"a": bf16(weights((4, 4)))})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A base under the Qwen LICENSE AGREEMENT, a target under MIT, and their delta. Copy what you change."""
    folder = tmp_path_factory.mktemp("qwen")
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
    _write(folder / "base", {"README.md": card.encode(), "LICENSE": QWEN_TEXT, "Notice": b"the notice\n"})
    card = "---\nlicense: mit\nbase_model: Qwen/Qwen2.5-72B\n---\n"
    _write(folder / "target", {"README.md": card.encode(), "LICENSE": TEXTS["MIT"].encode()})
    trio = Trio(folder / "base", folder / "target", folder / "delta")
    make_delta(trio.base, trio.target, trio.delta, base_repo="Qwen/Qwen2.5-72B", base_revision="a" * 40)
    return trio


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in {"model.safetensors": SHARD, **files}.items():
        (folder / name).write_bytes(data)


def _landed(out: Path) -> dict[str, bytes]:
    folder = out / ".deltaweights" / "licenses"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_tells_all_of_it(qwen: Trio) -> None:
    manifest = Manifest.from_json((qwen.delta / "deltaweights.json").read_bytes())
    assert manifest.base.license.expression == QWEN.spdx
    assert manifest.base.license.obligations == QWEN.obligations
    assert manifest.target.license.expression == "MIT"
    assert manifest.license == combine(manifest.base, manifest.target)
    whole = describe(manifest)
    assert whole.expression == f"MIT AND {QWEN.spdx}"
    assert len(whole.conflicts) == 1, "the target alone is stated to be MIT"
    assert "NOTICE" in {file.path for file in manifest.files}
    assert (qwen.delta / "NOTICE").read_bytes() == notice_text(manifest.base, manifest.target)


def test_plan_license_and_inspect_say_what_apply_asks_for(qwen: Trio, tmp_path: Path) -> None:
    """The manifest's words are those of an open license; the text in the delta is not."""
    delta = tmp_path / "delta"
    shutil.copytree(qwen.delta, delta)
    manifest = Manifest.from_json((delta / "deltaweights.json").read_bytes())
    stated = replace(manifest.base.license, id="mit", name=None, expression="MIT")
    manifest = replace(manifest, base=replace(manifest.base, license=stated))
    (delta / "deltaweights.json").write_bytes(manifest.to_json())
    assert describe(manifest).to_accept == ()
    refused = _run("apply", delta, "-o", tmp_path / "out", "--base", qwen.base)
    assert f"--accept-license {QWEN.spdx}" in refused.stderr
    assert plan_apply(delta, base=qwen.base).license.to_accept == (QWEN.spdx,)
    assert license_of(delta).to_accept == inspect_delta(delta).license.to_accept == (QWEN.spdx,)
    assert QWEN.spdx in _run("plan", delta, "--base", qwen.base).stdout
    assert QWEN.spdx in _run("license", delta).stdout


def test_a_pair_that_states_nothing_gives_a_delta_without_a_notice(tmp_path: Path) -> None:
    for side in ("base", "target"):
        _write(tmp_path / side, {"config.json": b"{}"})
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert manifest.license is None
    assert not (tmp_path / "delta" / "NOTICE").exists()
    assert (
        _run("apply", tmp_path / "delta", "-o", tmp_path / "out", "--base", tmp_path / "base").exit_code == 0
    )
    assert not (tmp_path / "out" / ".deltaweights").exists()


def test_texts_are_read_up_to_a_limit(tmp_path: Path) -> None:
    texts = {f"LICENSE.{k}": bytes([k]) * (MAX_TEXT_BYTES // 3) for k in range(4)}
    _write(tmp_path / "base", texts)
    _write(tmp_path / "target", {})
    manifest = make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert len(manifest.base.license.files) == 3


def test_the_texts_land_beside_the_result_and_are_no_part_of_it(qwen: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        apply_delta(qwen.delta, out, base=qwen.base)
        assert contents(out) == contents(qwen.target)
        landed = _landed(out)
        assert landed.pop("NOTICE") == (qwen.delta / "NOTICE").read_bytes()
        assert sorted(landed.values()) == sorted([QWEN_TEXT, b"the notice\n", TEXTS["MIT"].encode()])
        assert sorted(path.name for path in (out / ".deltaweights").iterdir()) == ["licenses"]
        assert verify_delta(qwen.delta, base=qwen.base, target=out).ok
        shutil.rmtree(out / ".deltaweights")  # run again, they are back
    make_delta(qwen.base, out, tmp_path / "again", base_repo="Qwen/Qwen2.5-72B", base_revision="a" * 40)
    assert contents(tmp_path / "again") == contents(qwen.delta)


def test_a_damaged_notice_is_found_before_anything_is_written(qwen: Trio, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(qwen.delta, delta)
    text = (delta / "NOTICE").read_bytes()
    (delta / "NOTICE").write_bytes(text.replace(b"Qwen", b"Kiwi", 1))
    out = tmp_path / "out"
    result = _run("apply", delta, "-o", out, "--base", qwen.base, "--accept-license", "qwen")
    assert result.exit_code == 1
    assert "NOTICE in the delta is damaged" in result.stderr
    assert not out.exists()
    result = _run("license", delta, "--texts")
    assert result.exit_code == 1
    assert "NOTICE in the delta is damaged" in result.stderr


@pytest.mark.parametrize("at", [".deltaweights/licenses", ".deltaweights/licenses/NOTICE"])
def test_the_texts_do_not_follow_links(qwen: Trio, tmp_path: Path, at: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    apply_delta(qwen.delta, out, base=qwen.base)
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"mine")
    place = out / at
    if place.is_dir():
        shutil.rmtree(place)
        place.symlink_to(elsewhere)
        result = _run("apply", qwen.delta, "-o", out, "--base", qwen.base, "--accept-license", "qwen")
        assert result.exit_code == 1
    else:
        place.unlink()
        place.symlink_to(elsewhere / "precious")
        apply_delta(qwen.delta, out, base=qwen.base)
        assert not place.is_symlink()
    assert contents(elsewhere) == {"precious": b"mine"}


# The command line --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTAWEIGHTS_ACCEPT_LICENSE", raising=False)


def _run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.mark.parametrize("options", [(), ("--json",), ("-q",), ("--accept-license", "qwen-research")])
def test_without_acceptance_nothing_is_written_and_the_exit_code_is_3(
    qwen: Trio, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = _run("apply", qwen.delta, "-o", tmp_path / "out", "--base", qwen.base, *options)
    assert result.exit_code == 3
    assert f"--accept-license {QWEN.spdx}" in result.stderr
    assert f"DELTAWEIGHTS_ACCEPT_LICENSE='{QWEN.spdx}'" in result.stderr
    assert not list(tmp_path.iterdir())
    if "--json" in options:
        assert "not accepted" in json.loads(result.stdout)["error"]["what"]


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--accept-license", QWEN.spdx], {}),
        (["--accept-license", "mit", "--accept-license", "Qwen"], {}),
        (["--accept-license", f"MIT AND {QWEN.spdx}"], {}),
        ([], {"DELTAWEIGHTS_ACCEPT_LICENSE": f"llama3.1 {QWEN.spdx}"}),
        ([], {"DELTAWEIGHTS_ACCEPT_LICENSE": f"MIT AND {QWEN.spdx}"}),
    ],
)
def test_what_the_message_says_to_pass_is_enough(
    qwen: Trio, tmp_path: Path, options: list[str], environment: dict[str, str]
) -> None:
    result = _run("apply", qwen.delta, "-o", tmp_path / "out", "--base", qwen.base, *options, **environment)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == contents(qwen.target)
    assert "license: qwen, LICENSE" in result.stderr
    assert f"MIT AND {QWEN.spdx}" in result.stderr
    assert all(text in result.stderr for text in QWEN.obligations)


#: The program, with stdin as its terminal, so that Ctrl-C there reaches it.
_AT_TERMINAL = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("deltaweights", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("answer", "code"), [(b"y\n", 0), (b"n\n", 3), (b"\n", 3), (b"\x04", 3), (b"\x03", 3)]
)
def test_at_a_terminal_it_asks(qwen: Trio, tmp_path: Path, answer: bytes, code: int) -> None:
    master, terminal = pty.openpty()
    out = tmp_path / "out"
    command = [sys.executable, "-c", _AT_TERMINAL, "apply", qwen.delta, "--base", qwen.base, "-o", out]
    with subprocess.Popen(
        list(map(str, command)),
        stdin=terminal,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        shown = b""
        while b"Do you accept" not in shown:
            shown += os.read(master, 4096)
        os.write(master, answer)
        with suppress(OSError):  # Linux: the other end is closed
            while True:
                if not select.select([master], [], [], 5)[0]:
                    os.write(master, answer)  # as a user would: Python may miss a Ctrl-C just before it reads
                elif data := os.read(master, 4096):
                    shown += data
                else:
                    break
    os.close(master)
    assert process.returncode == code, shown
    assert f"({QWEN.spdx})".encode() in shown
    assert out.exists() == (code == 0)


def test_license_shows_it_all(qwen: Trio) -> None:
    shown = _run("license", qwen.delta).stdout
    for text in (
        "base: Qwen/Qwen2.5-72B@aaaaaaaaaaaa, license: qwen, LICENSE",
        f"{QWEN.spdx}: Qwen LICENSE AGREEMENT ({QWEN.source}, 2024-09-19)",
        "target: a local folder, license: mit",
        f"together: MIT AND {QWEN.spdx}",
        f"to accept: {QWEN.spdx}",
        "not legal advice",
        *(f"- {text}" for text in QWEN.obligations),
        "which still applies",
        "- NOTICE, ",
    ):
        assert text in shown
    assert "By clicking" not in shown
    shown = _run("license", qwen.delta, "--texts").stdout
    assert "\n\n--- NOTICE\nThis delta holds" in shown
    assert "By clicking" in shown
    assert "Permission is hereby granted" in shown


def test_license_gives_it_all_as_json(qwen: Trio) -> None:
    def parsed(*options: str) -> dict[str, Any]:
        return dict(json.loads(_run("license", qwen.delta, "--json", *options).stdout))

    facts = parsed()
    manifest = Manifest.from_json((qwen.delta / "deltaweights.json").read_bytes())
    texts = facts.pop("texts")
    assert facts == json.loads(json.dumps(describe(manifest).to_dict()))
    assert texts == [msgspec.to_builtins(record) for record in text_records(manifest)]
    assert parsed("--texts") == json.loads(json.dumps(license_of(qwen.delta, texts=True).to_dict()))
    assert QWEN_TEXT.decode() in [text["text"] for text in parsed("--texts")["texts"]]


def test_license_of_a_delta_that_states_none(tmp_path: Path) -> None:
    for side in ("base", "target"):
        _write(tmp_path / side, {})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    shown = _run("license", tmp_path / "delta").stdout
    assert shown.split("\n") == [
        "base: a local folder, license: not stated",
        "target: a local folder, license: not stated",
        "together: not stated",
        "to accept: nothing",
        "",
    ]


def test_no_license_controls_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07\nAND\x9b2J\u202eTIM\u202c\u2066\u200b\u2028"
    card = "---\nlicense: other\nlicense_name: " + json.dumps(hostile) + "\n---\n"
    _write(tmp_path / "base", {"README.md": card.encode(), "LICENSE": hostile.encode()})
    _write(tmp_path / "target", {})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    for arguments in (
        ("license", tmp_path / "delta", "--texts"),
        ("apply", tmp_path / "delta", "-o", tmp_path / "out", "--base", tmp_path / "base"),
    ):
        output = _run(*arguments).output
        assert output
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066]", output)
    found = _run("license", tmp_path / "delta", "--json").stdout
    assert "\u202e" not in found
    assert "\u202e" in json.loads(found)["base"]["name"]
