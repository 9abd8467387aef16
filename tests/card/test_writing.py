"""The delta's model card: what the Hub's own library reads in it, and the commands for its readers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import Manifest, compact_deltas, make_delta, verify_delta
from deltaweights.card import address_card, write_card
from deltaweights.entries import BaseTensor, TensorEntry
from deltaweights.inspect import load_manifest
from deltaweights.license.table import KNOWN, LISTED
from deltaweights.manifest import BaseRecord, FileRecord, License, TargetRecord, Tool

from ..checkpoints import bf16, weights, write_safetensors
from ..conftest import Trio


def test_the_hub_reads_base_license_and_library() -> None:
    assert _fields(write_card(EXAMPLE)) == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "other",
        "license_name": "mit-and-qwen",
        "license_link": "https://example.org/LICENSE",
        "library_name": "deltaweights",
        "tags": ["deltaweights", "delta", "safetensors"],
    }


def test_the_card_is_written_as_the_hubs_library_would() -> None:
    for manifest in (EXAMPLE, _with(base_id=None, base=License(), target=License())):
        written = write_card(manifest).decode()
        assert str(ModelCard(written)) == written


def test_a_target_that_states_no_license_shows_the_bases() -> None:
    fields = _fields(write_card(_with(target=License())))
    assert (fields["license"], fields["license_name"]) == ("other", "qwen")
    assert fields["license_link"] == "https://example.org/LICENSE"


def test_the_page_shows_what_changed(trio: Trio) -> None:
    text = ModelCard((trio.delta / "README.md").read_text()).text
    assert "50% of the weights changed." in text
    assert r"Weights of layers 0, 1 and 3 of model.layers changed most." in text
    (picture,) = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert (trio.delta / picture).read_bytes().startswith(b"<svg")


def test_the_picture_is_a_file_of_the_delta(trio: Trio, tmp_path: Path) -> None:
    """Listed with its SHA-256, the same each time, and gone with the layers that it shows."""
    manifest = load_manifest(trio.delta)
    assert "changes.svg" in {file.path for file in manifest.files}
    assert verify_delta(trio.delta).ok
    again = make_delta(
        trio.base, trio.target, tmp_path / "again", chunk_bytes=manifest.chunk_bytes, threads=1
    )
    assert again.files == manifest.files
    for side in ("old", "new"):
        write_safetensors(tmp_path / side / "m.safetensors", {"w": bf16(weights((8, 8), len(side)))})
    plain = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "again", force=True)
    assert "changes.svg" not in {file.path for file in plain.files}
    assert not (tmp_path / "again" / "changes.svg").exists()
    assert "changes.svg" not in (tmp_path / "again" / "README.md").read_text()


@given(name=st.text(max_size=60) | st.text("<>`*[]()!|\\_#\n&", min_size=1, max_size=60))
def test_names_of_tensors_are_no_markup(name: str) -> None:
    entry = replace(EXAMPLE.tensors[0], name=name, status="added", base=None, shared_bytes=0, changed=0)
    text = write_card(replace(EXAMPLE, tensors=(entry,))).decode()
    (said,) = (line for line in text.splitlines() if "1 tensor is new" in line)
    assert not re.search(r"[`*\[\]<>|_]", re.sub(r"\\.", "", said))


def test_where_nothing_is_known_nothing_is_claimed() -> None:
    manifest = _with(base_id=None, base=License(), target=License())
    assert set(_fields(write_card(manifest))) == {"library_name", "tags"}


def test_the_text_says_how_to_rebuild_and_under_which_licenses() -> None:
    text = ModelCard(write_card(EXAMPLE).decode()).text
    assert "deltaweights apply" in text
    assert "--base" not in text, "the base is found by its id"
    assert "org/base" in text
    assert "a" * 40 in text
    assert "qwen, https://example.org/LICENSE" in text
    assert "| License of the model | mit |" in text


def test_without_a_hub_id_the_command_asks_for_the_base() -> None:
    assert "--base" in ModelCard(write_card(_with(base_id=None)).decode()).text


def test_the_card_in_the_delta_is_the_manifests(trio: Trio) -> None:
    manifest = Manifest.from_json((trio.delta / "deltaweights.json").read_bytes())
    assert (trio.delta / "README.md").read_bytes() == write_card(manifest)
    fields = _fields(write_card(manifest))
    assert (fields["license"], fields["license_name"]) == ("other", "qwen")
    assert f"{manifest.target_bytes:,} bytes" in ModelCard.load(trio.delta / "README.md").text


# The fine-tune's own page ----------------------------------------------------------------------------

README = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
language: [en, no]
base_model: [org/base, org/other]
base_model_relation: merge
tags: [code, transformers]
model-index: 5
---
# Tuned *model*

It is [good](eval.md), and looks ![so](assets/logo.png).

```
[not](a-link)
"""


def test_name_text_and_metadata_are_the_fine_tunes(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": README, "eval.md": "x", "assets/logo.png": "x"})
    assert _fields(page) == {
        "base_model": "org/base",
        "base_model_relation": "merge",
        "license": "mit",
        "library_name": "deltaweights",
        "tags": ["code", "deltaweights", "delta", "safetensors"],
        "pipeline_tag": "text-generation",
        "language": ["en", False],
    }
    lines = ModelCard(page.decode()).text.strip().splitlines()
    assert lines[0] == "# Tuned *model*"
    assert "It is [good](files/eval.md), and looks ![so](files/assets/logo.png)." in lines
    assert "[not](a-link)" in lines
    own = lines.index("```", lines.index("[not](a-link)") - 1)
    assert max(k for k, line in enumerate(lines) if "License of" in line) < own, "an open fence hides nothing"


@pytest.mark.parametrize(
    ("above", "stays_above"),
    [
        ("", True),
        ("\n\n", True),
        ('<p align="center">\n  <img src="https://x.org/a.png"><br>\n</p>\n\n', True),
        ("<!-- made by hand -->\n[![badge](https://x.org/a.svg)](https://x.org)\n", True),
        ('<div align="center">\n\n', False),
        ("<!--\n", False),
        ("Some text.\n\n", False),
        ("```\n", False),
    ],
)
def test_the_page_begins_as_the_fine_tune_s(tmp_path: Path, above: str, stays_above: bool) -> None:
    """What would swallow the delta's part, or be put around it, comes below it."""
    page = _page(tmp_path, {"README.md": f"{above}# Tuned\n\nText.\n"}).decode()
    assert (page.index("# Tuned") < page.index("This is a delta")) == stays_above
    if stays_above:
        assert page.partition("---\n\n")[2].startswith(f"{above}# Tuned".strip())
    else:
        assert page.endswith("# Tuned\n\nText.\n")


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    page = _page(tmp_path, {"a.pt": "x", "b.pt": "x"}, exclude=["*.pt"]).decode()
    assert "| Left out | 2 files, listed in `deltaweights.json` |" in page
    assert re.search(r"^\| Model \| 1 file, [\d,]+ bytes \|$", page, re.MULTILINE)


def test_the_page_is_the_same_every_time(tmp_path: Path) -> None:
    pages = [_page(tmp_path / side, {"README.md": README, "eval.md": "x"}) for side in ("a", "b")]
    assert pages[0] == pages[1]


def test_a_page_of_the_base_s_text_is_not_made(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": README}, {"README.md": README})
    assert b"It is" not in page
    assert "pipeline_tag" not in _fields(page)


@pytest.mark.parametrize("target_repo", [None, "me/tuned"])
def test_files_that_are_not_in_the_delta_as_they_are(tmp_path: Path, target_repo: str | None) -> None:
    files = {"README.md": README, "eval.md": "packed\n" * 20_000}
    page = _page(tmp_path, files, target_repo=target_repo).decode()
    if target_repo:
        assert "[good](https://huggingface.co/me/tuned/blob/main/eval.md)" in page
        assert "![so](https://huggingface.co/me/tuned/resolve/main/assets/logo.png)" in page
    else:
        assert "It is good, and looks so." in page


def test_a_file_of_the_base_is_found_there(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": README, "eval.md": "x"}, {"docs/same.md": "x"}).decode()
    assert "[good](https://huggingface.co/org/base/blob/main/docs/same.md)" in page


@pytest.mark.parametrize("line", ["word " * 50 + "\n", "x" * (5 << 20), "é" * 300_000])
def test_a_long_text_is_cut_and_says_so(tmp_path: Path, line: str) -> None:
    text = "---\npipeline_tag: fill-mask\n---\n# Long\n\n" + line * max(1, 1_000_000 // len(line))
    page = _page(tmp_path, {"README.md": text})
    assert len(page) < 1 << 20
    assert b"It is longer: all of it is in README.md of the rebuilt model" in page


def test_characters_that_nobody_sees(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": "# A\u202eB\x00\x1b[0m\u2066\r\nC\r\n"}).decode()
    assert "# AB[0m\n" in page
    assert page.endswith("\nC\n")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)


def test_a_base_that_nobody_names_on_the_hub(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": README}, base_repo=None)
    fields = _fields(page)
    assert fields["base_model"] == ["org/base", "org/other"]
    assert fields["base_model_relation"] == "merge"
    assert "--base PATH_OF_THE_BASE" in page.decode()
    assert 'apply_delta("PATH_OF_THIS_DELTA", "OUT", base="PATH_OF_THE_BASE")' in page.decode()


def test_what_the_card_says_of_other_bases_is_not_kept(tmp_path: Path) -> None:
    fields = _fields(_page(tmp_path, {"README.md": README}, base_repo="org/third"))
    assert (fields["base_model"], fields["base_model_relation"]) == ("org/third", "finetune")


def test_nothing_is_said_that_is_not_so(tmp_path: Path) -> None:
    page = _page(tmp_path, {}, base_repo=None).decode()
    assert "# A model, as a delta" in page
    for word in ("None", "licenses/", "NOTICE", "Left out", "finetune", "transformers", "page follows"):
        assert word not in page


def test_a_delta_that_needs_no_base_asks_for_none(tmp_path: Path) -> None:
    page = _page(tmp_path, {"README.md": "# New\n"}, base_repo=None, tensor="another").decode()
    assert "needs no base" in page
    assert "PATH_OF_THE_BASE" not in page


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (
            '{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}',
            'from_pretrained("PATH_OF_THIS_DELTA")',
        ),
        (
            '{"model_type": "x", "architectures": ["X"], "auto_map": {"AutoModel": "x.X"}}',
            'from_pretrained("PATH_OF_THIS_DELTA", trust_remote_code=True)',
        ),
        ('{"model_type": "demo"}', None),
        ("[" * 100_000, None),
        ("[]", None),
        ("\xff", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_model_of_transformers_is_loaded_as_one(tmp_path: Path, config: str, call: str | None) -> None:
    page = _page(tmp_path, {"config.json": config}).decode()
    assert call in page if call else "from_pretrained" not in page


def test_the_place_is_put_into_the_commands_and_nowhere_else(tmp_path: Path) -> None:
    text = "# PATH_OF_THIS_DELTA\n\n<!-- how to use a/b -->a/b<!-- end of how to use it -->\n"
    page = _page(tmp_path, {"README.md": text})
    first = address_card(page, "me/one")
    assert first.count(b"PATH_OF_THIS_DELTA") == 1
    assert b"deltaweights apply me/one -o OUT\n" in first
    assert b">a/b<" in first
    assert address_card(first, "me/one@v2") == address_card(page, "me/one@v2")
    assert address_card(b"# By hand\n", "me/one") == b"# By hand\n"


def test_a_compacted_chain_has_the_last_ones_page(tmp_path: Path) -> None:
    _page(tmp_path, {"README.md": "# First\n"})
    _write(tmp_path / "next", {"README.md": README, "eval.md": "x"}, "weight", 9)
    make_delta(tmp_path / "target", tmp_path / "next", tmp_path / "step")
    compact_deltas([tmp_path / "delta", tmp_path / "step"], tmp_path / "whole", base=tmp_path / "base")
    page = (tmp_path / "whole" / "README.md").read_text()
    assert "# Tuned *model*" in page
    assert "[good](files/eval.md)" in page
    assert _fields(page.encode())["base_model"] == "org/base"
    assert "First" not in page


def _page(
    folder: Path,
    target: dict[str, str],
    base: dict[str, str] | None = None,
    *,
    base_repo: str | None = "org/base",
    tensor: str = "weight",
    **options: Any,
) -> bytes:
    """The card of the delta of two small checkpoints with these other files."""
    _write(folder / "base", base or {}, "weight", 1)
    _write(folder / "target", target, tensor, 2)
    make_delta(folder / "base", folder / "target", folder / "delta", base_repo=base_repo, **options)
    return (folder / "delta" / "README.md").read_bytes()


def _write(folder: Path, files: dict[str, str], tensor: str, seed: int) -> None:
    write_safetensors(folder / "model.safetensors", {tensor: bf16(weights((20, 10), seed))})
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())


# Licenses --------------------------------------------------------------------------------------------

HUB_IDS = {terms.hub for terms in (*KNOWN, *LISTED) if terms.hub}
texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.none() | texts.filter(bool),
    st.none() | texts.filter(bool),
    st.none() | texts.filter(bool),
    texts,
    texts,
)
def test_any_text_in_a_field_comes_back_from_the_front_matter(
    id: str | None, name: str | None, link: str | None, base: str, target: str
) -> None:
    """No value can break out of its field and state another license, and the Hub takes what is written."""
    manifest = _with(base_id=base, target_id=target, base=License(), target=License(id or "mit", name, link))
    fields = _fields(write_card(manifest))
    assert fields["library_name"] == "deltaweights"
    assert set(fields) <= {
        *("base_model", "base_model_relation", "library_name", "tags"),
        *("license", "license_name", "license_link"),
    }
    if "license" in fields:
        stated = fields["license"] if isinstance(fields["license"], list) else [fields["license"]]
        assert {"other", *HUB_IDS}.issuperset(stated)
        assert re.fullmatch(r"[a-z0-9.-]+", fields.get("license_name", "x"))
        assert re.match(r"https?://", fields.get("license_link", "https://"))


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        (License("apache-2.0"), License("mit"), {"license": ["mit", "apache-2.0"]}),
        (License("apache-2.0"), License("apache-2.0"), {"license": "apache-2.0"}),
        (License("llama3.1"), License("llama3.1"), {"license": "llama3.1"}),
        (License("apache-2.0"), License(), {"license": "apache-2.0"}),
        (License("unknown"), License("mit"), {"license": "mit"}),
        (
            License(
                "other", "qwen", "LICENSE", (FileRecord("licenses/0123456789abcdef-LICENSE", 1, "0" * 64),)
            ),
            License("mit"),
            {
                "license": "other",
                "license_name": "mit-and-qwen",
                "license_link": f"https://huggingface.co/org/base/blob/{'a' * 40}/LICENSE",
            },
        ),
        (
            License("other", "qwen-research", "LICENSE"),
            License("other", "My license"),
            {
                "license": "other",
                "license_name": "my-license-and-qwen-research",
                "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
            },
        ),
        (
            License("other", "deepseek", "LICENSE-MODEL"),
            License(),
            {
                "license": "other",
                "license_name": "deepseek",
                "license_link": "https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
            },
        ),
    ],
)
def test_the_front_matter_states_base_and_target_together(
    base: License, target: License, expected: dict[str, Any]
) -> None:
    fields = _fields(write_card(_with(base=base, target=target)))
    assert {key: value for key, value in fields.items() if key.startswith("license")} == expected


def test_what_the_license_wants_to_see_is_in_the_card() -> None:
    text = ModelCard(write_card(EXAMPLE).decode()).text
    assert "**Built with Qwen**" in text
    license = replace(EXAMPLE.base.license, obligations=("Keep | this\nline (1).",))
    assert "\n- Keep \\| this line (1).\n" in ModelCard(write_card(_with(base=license)).decode()).text


def _fields(card: bytes) -> dict[str, Any]:
    """The front matter as the Hub's library reads it."""
    data: Any = ModelCard(card.decode()).data
    return dict(data.to_dict())


EXAMPLE = Manifest(
    base=BaseRecord("org/base", "a" * 40, License("other", "qwen", "https://example.org/LICENSE"), files=()),
    target=TargetRecord("me/tuned", None, License("mit"), files=()),
    tensors=(
        TensorEntry("w", "m.safetensors", "BF16", (4,), "changed", BaseTensor("w", "BF16", (4,)), 8, 1, 10),
    ),
    files=(),
    tool=Tool("deltaweights", "1"),
    chunk_bytes=4096,
)


def _with(**changes: Any) -> Manifest:
    """The example with other ids (``base_id``, ``target_id``) or licenses (``base``, ``target``)."""
    base, target = EXAMPLE.base, EXAMPLE.target
    return replace(
        EXAMPLE,
        base=replace(
            base, repo_id=changes.get("base_id", base.repo_id), license=changes.get("base", base.license)
        ),
        target=replace(
            target,
            repo_id=changes.get("target_id", target.repo_id),
            license=changes.get("target", target.license),
        ),
    )
